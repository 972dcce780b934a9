"""Edits: what happens to the output of a head, said as data. `headwise.attach` applies them.

Every edit mixes the output O of a head, before the output projection, with a target T:

    O'  =  (1 - s) · O + s · T,      s = amount · weight of the unit in `units`,      0 <= s <= 1

| op | T |
|---|---|
| zero | 0 |
| scale | value · O |
| uniform, mix_uniform | mean of V over the visible keys |
| replace, mix_vector | a vector of the unit (D,) |
| mix_v | V of the query's own token |
| patch | the output of another run, per unit (B, N, D) |
| reweight | keys of group g weigh w_g times as much, keys of no group as before: Σ_g w_g·O_g, over Σ_g w_g·P_g if `renormalize` |
| move | the source's mass goes to the target in proportion: O − O_s + (P_s / P_n) · O_n, so that O' = O − s·O_s + (s·P_s/P_n)·O_n |

P_g is the attention mass of the visible keys of group g and O_g their part of O. Where the masses to divide by are 0 (no key of
the target is visible, or every visible key weighs 0) T is O for `move` and 0 for `reweight`. Edits act in their order: O is the
output that earlier edits left, V, P_g and O_g are always those of the model.

Letters: U units of an edit, in the order of its set; B batch; N queries; D head dim.
"""

import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from headwise import storage
from headwise.addresses import Fingerprint, HeadSet, read_fingerprint
from headwise.checks import Meta, finite, plain_meta, shown
from headwise.errors import ArtifactError, EditError, UnitError
from headwise.selection import ALL_TOKENS, KeyGroup, TokenSelection
from headwise.storage import StrPath, decoding

__all__ = ["Edit", "HeadEdits", "KeyGroup", "Op", "Phase", "TokenSelection"]

Op = Literal["zero", "scale", "uniform", "replace", "mix_v", "mix_uniform", "mix_vector", "patch", "reweight", "move"]
Phase = Literal["all", "prefill", "decode"]
Tokens = TokenSelection | str | int | slice | range | Iterable[int]
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
NDIM = {"replace": 2, "mix_vector": 2, "patch": 4}  # dimensions of the tensor of the ops that have one


@dataclass(frozen=True, kw_only=True, eq=False)
class Edit:
    """One change to the outputs of some query heads, for some query tokens, in one phase; the equation stands above.

    `tokens` selects the queries by their position among the real tokens of the row. `phase`: "decode" is a forward pass of one token
    a row behind cached ones, "prefill" any other. Use the named constructors; they raise EditError, UnitError for an empty set.

    >>> edit = Edit.mix_v(HeadSet.parse("L3H1:0.5,L4H0"), 0.8, phase="decode")
    >>> edit.op, edit.strengths().tolist()
    ('mix_v', [0.4000000059604645, 0.800000011920929])
    """

    units: HeadSet
    op: Op
    amount: float = 1.0
    value: float | None = None
    tensor: Tensor | None = None
    keys: tuple[KeyGroup, ...] = ()
    renormalize: bool = True
    tokens: TokenSelection = ALL_TOKENS
    phase: Phase = "all"

    def __post_init__(self) -> None:
        if self.op not in get_args(Op):
            raise EditError(f"op is {shown(self.op)}; it must be one of {', '.join(get_args(Op))}")
        if self.phase not in get_args(Phase):
            raise EditError(f"phase is {shown(self.phase)}; it must be 'all', 'prefill' or 'decode'")
        object.__setattr__(self, "tokens", TokenSelection.of(self.tokens))
        object.__setattr__(self, "keys", tuple(self.keys))
        self._check_units()
        self._check_value()
        self._check_tensor()
        self._check_keys()

    def _check_units(self) -> None:
        if not isinstance(self.units, HeadSet) or self.units.kind != "head":
            raise EditError(
                "units must be a HeadSet of kind 'head'; HeadSet.to_heads(group_size) makes one of kv heads"
            )
        if not len(self.units):
            raise UnitError(f"the edit {self.op!r} has an empty set of units; name at least one head")
        amount = finite("amount", self.amount, EditError)
        if not 0 <= amount <= 1:
            raise EditError(f"amount is {amount}; it must lie in [0, 1]")
        for unit, weight in zip(self.units, self.units.weights(), strict=True):
            if not 0 <= amount * weight <= 1:
                raise EditError(f"{unit} has strength amount · weight = {amount} · {weight}; it must lie in [0, 1]")
        object.__setattr__(self, "amount", amount)

    def _check_value(self) -> None:
        if (self.op == "scale") != (self.value is not None):
            raise EditError(f"value is {self.value}; op 'scale' needs a number, other ops have none")
        if self.value is not None:
            object.__setattr__(self, "value", finite("value", self.value, EditError))

    def _check_tensor(self) -> None:
        ndim, tensor = NDIM.get(self.op), self.tensor
        if ndim is None and tensor is not None:
            raise EditError(f"op {self.op!r} has no tensor")
        if ndim is None:
            return
        if (
            not isinstance(tensor, Tensor)
            or tensor.ndim != ndim
            or len(tensor) != len(self.units)
            or not tensor.numel()
        ):
            shape = tuple(tensor.shape) if isinstance(tensor, Tensor) else type(tensor).__name__
            wanted = "(U, D)" if ndim == 2 else "(U, B, N, D)"
            raise EditError(
                f"op {self.op!r} needs a tensor {wanted} with U = {len(self.units)}, one entry a unit; got {shape}"
            )
        if tensor.dtype not in FLOATS or not tensor.isfinite().all():
            raise EditError(
                f"the tensor of op {self.op!r} must hold finite numbers of 16 to 64 bits; got {tensor.dtype}"
            )

    def _check_keys(self) -> None:
        most = {"reweight": 64, "move": 2}.get(self.op, 0)
        if any(not isinstance(group, KeyGroup) for group in self.keys) or not min(most, 1) <= len(self.keys) <= most:
            raise EditError(
                f"op {self.op!r} takes {'1 to ' if most else ''}{most} key groups; got {len(self.keys)}: {self.keys!r:.80}"
            )
        if len({group.name for group in self.keys}) < len(self.keys):
            raise EditError(f"key groups must have different names; got {[group.name for group in self.keys]}")
        if not isinstance(self.renormalize, bool):
            raise EditError(f"renormalize is {shown(self.renormalize)}; it must be True or False")

    @classmethod
    def zero(cls, units: HeadSet, *, tokens: Tokens = "all", phase: Phase = "all") -> "Edit":
        """Output 0: the head is ablated."""
        return _make("zero", units, tokens, phase)

    @classmethod
    def scale(cls, units: HeadSet, value: float, *, tokens: Tokens = "all", phase: Phase = "all") -> "Edit":
        """Output times `value`, any finite number."""
        return _make("scale", units, tokens, phase, value=value)

    @classmethod
    def uniform(cls, units: HeadSet, *, tokens: Tokens = "all", phase: Phase = "all") -> "Edit":
        """The head attends to all visible keys alike."""
        return _make("uniform", units, tokens, phase)

    @classmethod
    def replace(cls, units: HeadSet, vectors: Tensor, *, tokens: Tokens = "all", phase: Phase = "all") -> "Edit":
        """Output = a vector, such as the mean of a calibration run: (U, D), or (D,) for all units."""
        return _make("replace", units, tokens, phase, tensor=_per_unit(vectors, units))

    @classmethod
    def patch(cls, units: HeadSet, outputs: Tensor, *, tokens: Tokens = "all", phase: Phase = "all") -> "Edit":
        """Output = that of another run, (U, B, N, D), query for query."""
        return _make("patch", units, tokens, phase, tensor=outputs)

    @classmethod
    def mix_v(cls, units: HeadSet, amount: float, *, tokens: Tokens = "all", phase: Phase = "all") -> "Edit":
        """(1 - u) · O + u · V of the query's own token: the head attends to itself, by share u."""
        return _make("mix_v", units, tokens, phase, amount=amount)

    @classmethod
    def mix_uniform(cls, units: HeadSet, amount: float, *, tokens: Tokens = "all", phase: Phase = "all") -> "Edit":
        """(1 - u) · O + u · mean of V over the visible keys."""
        return _make("mix_uniform", units, tokens, phase, amount=amount)

    @classmethod
    def mix_vector(
        cls, units: HeadSet, amount: float, vectors: Tensor, *, tokens: Tokens = "all", phase: Phase = "all"
    ) -> "Edit":
        """(1 - u) · O + u · a vector: (U, D), or (D,) for all units."""
        return _make("mix_vector", units, tokens, phase, amount=amount, tensor=_per_unit(vectors, units))

    @classmethod
    def reweight(
        cls,
        units: HeadSet,
        keys: Iterable[KeyGroup],
        *,
        renormalize: bool = True,
        amount: float = 1.0,
        tokens: Tokens = "all",
        phase: Phase = "all",
    ) -> "Edit":
        """Keys of each group weigh `group.weight` times as much as before; a key in two groups belongs to the first."""
        return _make("reweight", units, tokens, phase, keys=tuple(keys), renormalize=renormalize, amount=amount)

    @classmethod
    def move(
        cls,
        units: HeadSet,
        amount: float,
        source: KeyGroup,
        target: KeyGroup | None = None,
        *,
        tokens: Tokens = "all",
        phase: Phase = "all",
    ) -> "Edit":
        """Move a share `amount` of the attention on `source` to `target` (None: all other visible keys), in proportion (VAR)."""
        keys = (source,) if target is None else (source, target)
        return _make("move", units, tokens, phase, keys=keys, amount=amount)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Edit):
            return NotImplemented
        plain = [item.name for item in fields(self) if item.name != "tensor"]
        return all(getattr(self, name) == getattr(other, name) for name in plain) and _same(self.tensor, other.tensor)

    __hash__ = None  # type: ignore[assignment]

    def strengths(self) -> Tensor:
        """(U,) float32: s = amount · weight of each unit."""
        return torch.tensor([self.amount * weight for weight in self.units.weights()])

    def for_layer(self, layer: int) -> "Edit | None":
        """The part of the edit that concerns one layer, if any."""
        places = [place for place, unit in enumerate(self.units) if unit.layer == layer]
        if not places:
            return None
        units = HeadSet("head", tuple(self.units.entries[place] for place in places))
        return replace(self, units=units, tensor=None if self.tensor is None else self.tensor[places])

    def __str__(self) -> str:
        value = "" if self.value is None else f" by {self.value:g}"
        amount = "" if self.amount == 1 else f", amount {self.amount:g}"
        keys = "".join(f", {group}" for group in self.keys)
        return f"{self.op}{value} {self.units}{amount}{keys}, tokens {self.tokens}, phase {self.phase}"

    def _to_dict(self, tensor: str | None) -> dict[str, Any]:
        plain = {name: getattr(self, name) for name in ("op", "amount", "value", "renormalize", "phase")}
        keys = [group.to_dict() for group in self.keys]
        return {**plain, "units": str(self.units), "tokens": str(self.tokens), "keys": keys, "tensor": tensor}

    @classmethod
    def _from_dict(cls, data: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> "Edit":
        name = data.get("tensor")
        return cls(
            units=HeadSet.parse(storage.field(data, "units", str)),
            op=storage.field(data, "op", str),  # type: ignore[arg-type]
            amount=storage.field(data, "amount", float),
            value=None if data.get("value") is None else storage.field(data, "value", float),
            tensor=None if name is None else tensors[storage.field(data, "tensor", str)],
            keys=tuple(KeyGroup.from_dict(group) for group in storage.field(data, "keys", list)),
            renormalize=storage.field(data, "renormalize", bool),
            tokens=TokenSelection.of(storage.field(data, "tokens", str)),
            phase=storage.field(data, "phase", str),  # type: ignore[arg-type]
        )


@dataclass(frozen=True)
class HeadEdits:
    """A sequence of edits, applied in order.

    >>> edits = HeadEdits.of(Edit.zero(HeadSet.parse("L1H2")), Edit.scale(HeadSet.parse("L0H0,L1H2"), 2.0))
    >>> [edit.op for edit in edits.for_layer(1)], len(edits + edits)
    (['zero', 'scale'], 4)
    """

    edits: tuple[Edit, ...]
    fingerprint: Fingerprint | None = field(default=None, kw_only=True)
    method: str = field(default="", kw_only=True)
    meta: Meta = field(default_factory=dict, kw_only=True)

    def __post_init__(self) -> None:
        object.__setattr__(self, "edits", tuple(self.edits))
        if not all(isinstance(edit, Edit) for edit in self.edits):
            raise EditError("edits must all be of type Edit, such as Edit.zero(units)")
        if not isinstance(self.method, str):
            raise EditError("method must be text")
        object.__setattr__(self, "meta", plain_meta(self.meta, EditError))
        if self.fingerprint:
            self._check_units(self.fingerprint)

    __hash__ = None  # type: ignore[assignment]

    @classmethod
    def of(
        cls, *edits: Edit, fingerprint: Fingerprint | None = None, method: str = "", meta: Meta | None = None
    ) -> "HeadEdits":
        """The sequence of these edits."""
        return cls(edits, fingerprint=fingerprint, method=method, meta=meta or {})

    def __len__(self) -> int:
        return len(self.edits)

    def __iter__(self) -> Iterator[Edit]:
        return iter(self.edits)

    def __getitem__(self, place: int) -> Edit:
        return self.edits[place]

    def __add__(self, other: "HeadEdits | Edit") -> "HeadEdits":
        """These edits, then those of `other`; labels come from the left. Raises WrongModelError if they are for two models."""
        if isinstance(other, Edit):
            other = HeadEdits((other,))
        if not isinstance(other, HeadEdits):
            return NotImplemented
        if self.fingerprint and other.fingerprint:
            self.fingerprint.require(other.fingerprint, "the first list of edits")
        return replace(self, edits=self.edits + other.edits, fingerprint=self.fingerprint or other.fingerprint)

    def for_layer(self, layer: int) -> tuple[Edit, ...]:
        """The edits that concern a layer, in order, with only its units."""
        return tuple(part for edit in self.edits if (part := edit.for_layer(layer)) is not None)

    def check(self, fingerprint: Fingerprint) -> None:
        """Raises WrongModelError if the edits were made for another model, UnitError for a head that the model lacks."""
        if self.fingerprint:
            self.fingerprint.require(fingerprint, "the list of edits")
        self._check_units(fingerprint)

    def _check_units(self, fingerprint: Fingerprint) -> None:
        for edit in self.edits:
            edit.units.check(fingerprint)

    def __str__(self) -> str:
        return "\n".join(f"{place}. {edit}" for place, edit in enumerate(self.edits, 1)) or "no edits"

    def save(self, path: StrPath, *, patches: bool = False) -> None:
        """Write `name.json` and, if an edit has a tensor, `name.safetensors` beside it.

        Outputs of another run ("patch") are large; they are written only with `patches=True`. Raises EditError otherwise.
        """
        if not patches and any(edit.op == "patch" for edit in self.edits):
            raise EditError("an edit 'patch' holds outputs of another run; pass patches=True to write them too")
        tensors = {f"edit{place}": edit.tensor for place, edit in enumerate(self.edits) if edit.tensor is not None}
        names = [None if edit.tensor is None else f"edit{place}" for place, edit in enumerate(self.edits)]
        payload: dict[str, Any] = {
            "edits": [edit._to_dict(name) for edit, name in zip(self.edits, names, strict=True)],
            "fingerprint": self.fingerprint and self.fingerprint.to_dict(),
            "method": self.method,
            "meta": self.meta,
            "tensors": _write_beside(_beside(path), tensors),
        }
        storage.write_json(path, "head-edits", 1, payload)

    @classmethod
    def load(cls, path: StrPath) -> "HeadEdits":
        """Read what `save` wrote. Raises ArtifactError; `check` tells whether the edits fit a model."""
        payload = storage.read_json(path, "head-edits", 1)
        with decoding(path):
            rows = storage.field(payload, "edits", list)
            if not all(isinstance(row, dict) and isinstance(row.get("tensor"), str | None) for row in rows):
                raise ArtifactError("'edits' must be a list of objects, each with the name of a tensor or null")
            named = [row for row in rows if row.get("tensor") is not None]
            expect = {row["tensor"]: (None, NDIM.get(str(row.get("op")), 0)) for row in named}
        tensors = _read_beside(_beside(path), expect, payload.get("tensors"))
        with decoding(path):
            return cls(
                tuple(Edit._from_dict(row, tensors) for row in rows),
                fingerprint=read_fingerprint(payload),
                method=storage.field(payload, "method", str),
                meta=storage.field(payload, "meta", dict),
            )


def _make(op: Op, units: HeadSet, tokens: Tokens, phase: Phase, **rest: Any) -> Edit:
    return Edit(op=op, units=units, tokens=TokenSelection.of(tokens), phase=phase, **rest)


def _per_unit(vectors: Tensor, units: HeadSet) -> Tensor:
    one = isinstance(vectors, Tensor) and vectors.ndim == 1 and isinstance(units, HeadSet)
    return vectors.expand(len(units), -1) if one else vectors


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    return a.dtype == b.dtype and a.device == b.device and torch.equal(a, b)


def _beside(path: StrPath) -> Path:
    if not str(path).endswith(".json"):
        raise EditError(f"{str(path)!r} must end in .json; tensors go to a .safetensors file of the same name")
    return Path(path).with_suffix(".safetensors")


def _write_beside(path: Path, tensors: Mapping[str, Tensor]) -> str | None:
    """Write the tensors, if any, and give the digest that ties them to their JSON file."""
    if not tensors:
        return None
    if os.path.exists(path) and not storage.holds_kind(path, "head-edits"):
        raise ArtifactError(f"{str(path)!r} exists and holds something else; save the edits under another name")
    storage.write_tensors(path, "head-edits", 1, tensors, {})
    return storage.digest(path)


def _read_beside(path: Path, expect: storage.Expect, digest: Any) -> dict[str, Tensor]:
    if not expect:
        return {}
    tensors, _ = storage.read_tensors(path, "head-edits", 1, expect)
    if storage.digest(path) != digest:
        raise ArtifactError(f"{str(path)!r} belongs to another list of edits; copy both files, or save it again")
    return tensors
