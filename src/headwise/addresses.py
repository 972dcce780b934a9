"""Addresses of heads, kv heads and experts, sets of them, and the fingerprint of the model that they belong to.

Letters: L layers, H query heads, K kv heads, E experts, U units a layer (H, K or E).
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor

from headwise import storage
from headwise.checks import finite, shown, whole
from headwise.errors import ArtifactError, UnitError, WrongModelError
from headwise.storage import StrPath, decoding, field

Kind = Literal["head", "kv", "expert"]
LETTERS: dict[str, Kind] = {"H": "head", "K": "kv", "E": "expert"}
KINDS: dict[str, str] = {kind: letter for letter, kind in LETTERS.items()}
_ADDRESS = re.compile(r"L([0-9]{1,9})([HKE])([0-9]{1,9})")
_WEIGHT = re.compile(r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?")


class Unit(NamedTuple):
    """The address of one query head, kv head or expert, both numbers counted from 0; prints as `L11H15`, `L3K1` or `L8E5`.

    >>> Unit.parse("L11H15")
    Unit(kind='head', layer=11, index=15)
    >>> str(Unit("kv", 3, 1))
    'L3K1'
    """

    kind: Kind
    layer: int
    index: int  # type: ignore[assignment]  # hides tuple.index on purpose

    @classmethod
    def parse(cls, text: str) -> "Unit":
        """The unit that `text` names. Raises UnitError if it names none."""
        found = _ADDRESS.fullmatch(text.strip()) if isinstance(text, str) else None
        if found is None:
            raise UnitError(f"{shown(text)} names no unit; write L11H15 (head), L3K1 (kv head) or L8E5 (expert)")
        return cls(LETTERS[found[2]], int(found[1]), int(found[3]))

    def __str__(self) -> str:
        return f"L{self.layer}{KINDS[self.kind]}{self.index}"


@dataclass(frozen=True, kw_only=True)
class Fingerprint:
    """Which model an artifact was made for: its class, a hash of its configuration, and its numbers of units.

    >>> model = Fingerprint(architecture="LlamaForCausalLM", config_hash="3f2a", layers=30, heads=9, kv_heads=3)
    >>> model.units("kv")
    3
    >>> model.require(Fingerprint(architecture="LlamaForCausalLM", config_hash="77bc", layers=30, heads=9, kv_heads=3), "plan.json")
    Traceback (most recent call last):
    headwise.errors.WrongModelError: plan.json was made for LlamaForCausalLM (30 layers, 9 heads, 3 kv heads) but got \
LlamaForCausalLM (30 layers, 9 heads, 3 kv heads): config_hash is '3f2a' there, '77bc' here
    """

    architecture: str
    config_hash: str
    layers: int
    heads: int
    kv_heads: int
    experts: int = 0

    def __post_init__(self) -> None:
        for name in ("architecture", "config_hash"):
            if not isinstance(getattr(self, name), str):
                raise UnitError(f"{name} of a fingerprint must be text")
        for name in ("layers", "heads", "kv_heads"):
            object.__setattr__(self, name, whole(f"{name} of a fingerprint", getattr(self, name), 1, UnitError))
        object.__setattr__(self, "experts", whole("experts of a fingerprint", self.experts, 0, UnitError))

    def __str__(self) -> str:
        experts = f", {self.experts} experts" if self.experts else ""
        return f"{self.architecture} ({self.layers} layers, {self.heads} heads, {self.kv_heads} kv heads{experts})"

    def units(self, kind: Kind) -> int:
        """Units of this kind in a layer: H, K or E."""
        return {"head": self.heads, "kv": self.kv_heads, "expert": self.experts}[check_kind(kind)]

    def require(self, other: "Fingerprint", what: str) -> None:
        """Raises WrongModelError unless `other`, the model at hand, is the one that `what` was made for."""
        for name in (item.name for item in fields(self)):
            mine, theirs = getattr(self, name), getattr(other, name)
            if mine != theirs:
                raise WrongModelError(
                    f"{what} was made for {self} but got {other}: {name} is {mine!r} there, {theirs!r} here"
                )

    def to_dict(self) -> dict[str, Any]:
        """The fingerprint as plain values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "Fingerprint":
        """The inverse of `to_dict`. Raises ArtifactError for a missing, unknown or wrong entry."""
        types = {item.name: str if item.name in ("architecture", "config_hash") else int for item in fields(cls)}
        if not isinstance(data, Mapping) or set(data) != set(types):
            raise ArtifactError(f"a fingerprint has the entries {sorted(types)} and no others")
        values: dict[str, Any] = {name: field(data, name, kind) for name, kind in types.items()}
        return cls(**values)


def check_kind(kind: str) -> Kind:
    """`kind` itself, if it is one of the three; UnitError otherwise."""
    if kind not in ("head", "kv", "expert"):
        raise UnitError(f"kind is {shown(kind)}; it must be 'head', 'kv' or 'expert'")
    return cast(Kind, kind)


def check_range(kind: Kind, pairs: Iterable[tuple[int, int]], layers: int, units: int) -> None:
    """Raises UnitError for the first (layer, index) outside `layers` × `units`, naming it and the valid range."""
    letter = KINDS[kind]
    for layer, index in pairs:
        if layer >= layers or index >= units:
            span = (
                f"L0{letter}0 to L{layers - 1}{letter}{units - 1}"
                if layers and units
                else f"none, the model has no {kind} units"
            )
            raise UnitError(f"{Unit(kind, layer, index)} does not exist; valid: {span}")


@dataclass(frozen=True)
class HeadSet:
    """A set of units of one kind, each with a weight (1 unless told): immutable, sorted, printed as text that parses again.

    `|`, `&` and `-` are union, intersection and difference; where both sides hold a unit, the weight of the left one wins.
    Tables have shape (L, U). Every method that is given a unit that does not exist raises UnitError.

    >>> top = HeadSet.parse("L12H3, L11H15:0.5")
    >>> print(top, len(top), "L11H15" in top, top.weight("L11H15"))
    L11H15:0.5,L12H3 2 True 0.5
    >>> print(top | HeadSet.of([(0, 1), (11, 15)]))
    L0H1,L11H15:0.5,L12H3
    >>> print(top.to_kv(group_size=4))
    L11K3:0.5,L12K0
    """

    kind: Kind
    entries: tuple[tuple[int, int, float], ...] = ()  # (layer, index, weight)

    def __post_init__(self) -> None:
        letter = KINDS[check_kind(self.kind)]
        entries = sorted(
            (
                whole("layer", layer, 0, UnitError),
                whole("index", index, 0, UnitError),
                finite("weight", weight, UnitError),
            )
            for layer, index, weight in self.entries
        )
        for left, right in zip(entries, entries[1:], strict=False):
            if left[:2] == right[:2]:
                raise UnitError(f"L{left[0]}{letter}{left[1]} is named twice; name each unit once")
        object.__setattr__(self, "entries", tuple(entries))

    @classmethod
    def empty(cls, kind: Kind = "head") -> "HeadSet":
        """The set of no units, which has no text."""
        return cls(kind)

    @classmethod
    def parse(cls, text: str) -> "HeadSet":
        """The set that `text` lists: addresses of one kind with optional `:weight`, split by commas. Raises UnitError."""
        if not isinstance(text, str) or not text.strip():
            raise UnitError("the text names no unit; write L11H15,L12H3:0.5 or use HeadSet.empty(kind)")
        units, weights = [], []
        for part in text.split(","):
            address, colon, weight = part.partition(":")
            if colon and not _WEIGHT.fullmatch(weight.strip()):
                raise UnitError(f"{part.strip()[:60]!r} has no number after the colon; write L11H15:0.5")
            units.append(Unit.parse(address))
            weights.append(float(weight) if colon else 1.0)
        if len({unit.kind for unit in units}) > 1:
            raise UnitError(
                f"{text[:60]!r} mixes kinds of units; a set holds only heads, only kv heads or only experts"
            )
        return cls.of([(unit.layer, unit.index) for unit in units], units[0].kind, weights)

    @classmethod
    def of(
        cls, pairs: Iterable[tuple[int, int]], kind: Kind = "head", weights: Sequence[float] | None = None
    ) -> "HeadSet":
        """The set of these (layer, index) pairs, with one weight each."""
        try:
            pairs = [(layer, index) for layer, index in pairs]
        except (TypeError, ValueError):
            raise UnitError("pairs must be a sequence of (layer, index)") from None
        weights = [1.0] * len(pairs) if weights is None else list(weights)
        if len(weights) != len(pairs):
            raise UnitError(f"{len(pairs)} units but {len(weights)} weights; give one weight a unit")
        return cls(kind, tuple((layer, index, weight) for (layer, index), weight in zip(pairs, weights, strict=True)))

    @classmethod
    def from_mask(cls, mask: Tensor, kind: Kind = "head") -> "HeadSet":
        """The set of the True entries of a bool table (L, U)."""
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.ndim != 2:
            raise UnitError("mask must be a bool tensor of shape (layers, units)")
        return cls.of([(layer, index) for layer, index in mask.nonzero().tolist()], kind)

    def __str__(self) -> str:
        letter = KINDS[self.kind]
        return ",".join(
            f"L{layer}{letter}{index}" + (f":{w!r}" if w != 1.0 else "") for layer, index, w in self.entries
        )

    def __repr__(self) -> str:
        return f"HeadSet.parse({str(self)!r})" if self.entries else f"HeadSet.empty({self.kind!r})"

    def __len__(self) -> int:
        return len(self.entries)

    def __iter__(self) -> Iterator[Unit]:
        return (Unit(self.kind, layer, index) for layer, index, _ in self.entries)

    def __contains__(self, unit: object) -> bool:
        unit = Unit.parse(unit) if isinstance(unit, str) else unit
        return isinstance(unit, Unit) and unit.kind == self.kind and (unit.layer, unit.index) in self._weights

    def __or__(self, other: "HeadSet") -> "HeadSet":
        return self._combine(self._other(other) | self._weights)

    def __and__(self, other: "HeadSet") -> "HeadSet":
        kept = self._other(other)
        return self._combine({pair: weight for pair, weight in self._weights.items() if pair in kept})

    def __sub__(self, other: "HeadSet") -> "HeadSet":
        gone = self._other(other)
        return self._combine({pair: weight for pair, weight in self._weights.items() if pair not in gone})

    @cached_property
    def _weights(self) -> dict[tuple[int, int], float]:
        return {(layer, index): weight for layer, index, weight in self.entries}

    def _other(self, other: "HeadSet") -> dict[tuple[int, int], float]:
        if not isinstance(other, HeadSet) or other.kind != self.kind:
            raise UnitError(f"a set of kind {self.kind!r} combines only with another of that kind, not {shown(other)}")
        return other._weights

    def _combine(self, weights: Mapping[tuple[int, int], float]) -> "HeadSet":
        return HeadSet(self.kind, tuple((layer, index, weight) for (layer, index), weight in weights.items()))

    def weight(self, unit: Unit | str) -> float:
        """The weight of one unit of the set."""
        if unit not in self:
            raise UnitError(f"{unit} is not in the set")
        unit = Unit.parse(unit) if isinstance(unit, str) else unit
        return self._weights[unit.layer, unit.index]

    def weights(self) -> tuple[float, ...]:
        """One weight a unit, in the order of iteration."""
        return tuple(self._weights.values())

    def pairs(self) -> tuple[tuple[int, int], ...]:
        """(layer, index) of each unit, in the order of iteration."""
        return tuple(self._weights)

    def by_layer(self) -> dict[int, tuple[int, ...]]:
        """For each layer with units in the set, their indices."""
        found: dict[int, list[int]] = {}
        for layer, index in self._weights:
            found.setdefault(layer, []).append(index)
        return {layer: tuple(indices) for layer, indices in found.items()}

    def mask(self, layers: int, units: int) -> Tensor:
        """(L, U) bool: True for the units of the set."""
        check_range(self.kind, self._weights, layers, units)
        mask = torch.zeros(layers, units, dtype=torch.bool)
        if self._weights:
            mask[tuple(torch.tensor(self.pairs()).T)] = True
        return mask

    def table(self, layers: int, units: int, fill: float = 0.0) -> Tensor:
        """(L, U) float32: the weights of the units of the set, `fill` for all others."""
        table = torch.full((layers, units), fill, dtype=torch.float32)
        table[self.mask(layers, units)] = torch.tensor(self.weights(), dtype=torch.float32)
        return table

    def check(self, fingerprint: Fingerprint) -> None:
        """Raises UnitError if the model lacks a unit of the set."""
        check_range(self.kind, self._weights, fingerprint.layers, fingerprint.units(self.kind))

    def complement(self, layers: int, units: int) -> "HeadSet":
        """All units of `layers` × `units` that are not in the set, with weight 1."""
        return HeadSet.from_mask(~self.mask(layers, units), self.kind)

    def to_kv(self, group_size: int) -> "HeadSet":
        """The kv heads that these heads read: head h reads kv head h // group_size; the largest weight of a group wins."""
        self._must_be("head", "to_kv")
        size = whole("group_size", group_size, 1, UnitError)
        groups: dict[tuple[int, int], float] = {}
        for layer, index, weight in self.entries:
            pair = (layer, index // size)
            groups[pair] = max(weight, groups.get(pair, weight))
        return HeadSet("kv", tuple((layer, index, weight) for (layer, index), weight in groups.items()))

    def to_heads(self, group_size: int) -> "HeadSet":
        """The heads that read these kv heads, each with the weight of its kv head."""
        self._must_be("kv", "to_heads")
        size = whole("group_size", group_size, 1, UnitError)
        heads = ((layer, index * size + member, w) for layer, index, w in self.entries for member in range(size))
        return HeadSet("head", tuple(heads))

    def _must_be(self, kind: Kind, name: str) -> None:
        if self.kind != kind:
            raise UnitError(f"{name} needs a set of kind {kind!r}, this one holds {self.kind!r}")

    def random_control(
        self,
        layers: int,
        units: int,
        *,
        generator: torch.Generator,
        size: int | None = None,
        exclude: "HeadSet | None" = None,
    ) -> "HeadSet":
        """A random set of the same size (or `size`) out of `layers` × `units` that holds no unit of this set nor of `exclude`."""
        barred = self if exclude is None else self | exclude
        return draw(barred.complement(layers, units), len(self) if size is None else size, generator)

    def save(self, path: StrPath, *, fingerprint: Fingerprint | None = None) -> None:
        """Write a safetensors file: `units` (S, 2) int64, `weights` (S,) float64, for S units."""
        if fingerprint:
            self.check(fingerprint)
        tensors = {
            "units": torch.tensor(self.pairs(), dtype=torch.int64).reshape(-1, 2),
            "weights": torch.tensor(self.weights(), dtype=torch.float64),
        }
        meta = {"kind": self.kind, "fingerprint": fingerprint and fingerprint.to_dict()}
        storage.write_tensors(path, "head-set", 1, tensors, meta)

    @classmethod
    def load(cls, path: StrPath, *, fingerprint: Fingerprint | None = None) -> "HeadSet":
        """Read what `save` wrote. With `fingerprint`, WrongModelError or UnitError if it belongs to another model."""
        tensors, meta = storage.read_tensors(
            path, "head-set", 1, {"units": (torch.int64, 2), "weights": (torch.float64, 1)}
        )
        units, weights = tensors["units"], tensors["weights"]
        with decoding(path):
            made_for = read_fingerprint(meta)
            if units.shape[1] != 2:
                raise UnitError(f"'units' has shape {tuple(units.shape)}; it must be (units, 2)")
            found = cls.of(units.tolist(), check_kind(field(meta, "kind", str)), weights.tolist())
            if made_for:
                found.check(made_for)
        if fingerprint:
            if made_for:
                made_for.require(fingerprint, str(path))
            found.check(fingerprint)
        return found


def read_fingerprint(meta: Mapping[str, Any]) -> Fingerprint | None:
    """The fingerprint entry of a file, if it has one."""
    data = meta.get("fingerprint")
    return None if data is None else Fingerprint.from_dict(data)


def draw(pool: HeadSet, size: int, generator: torch.Generator) -> HeadSet:
    """`size` units of `pool`, uniformly without replacement."""
    whole("size", size, 0, UnitError)
    if not isinstance(generator, torch.Generator):
        raise UnitError("generator must be a torch.Generator")
    if size > len(pool):
        raise UnitError(f"{size} random units wanted but only {len(pool)} remain; ask for fewer or exclude fewer")
    order = torch.randperm(len(pool), generator=generator, device=generator.device)[:size].tolist()
    return HeadSet(pool.kind, tuple(pool.entries[place] for place in order))
