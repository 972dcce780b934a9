"""What every unit of a model is worth: `HeadScores`, beside the addresses, sets and fingerprints that it is made of.

Letters: L layers, H query heads, K kv heads, U units a layer.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

from headwise import storage
from headwise.addresses import Fingerprint, HeadSet, Kind, Unit, check_kind, check_range, draw, read_fingerprint
from headwise.checks import Meta, finite, plain_meta, whole
from headwise.errors import UnitError
from headwise.storage import StrPath, decoding

__all__ = ["Fingerprint", "HeadScores", "HeadSet", "Kind", "Meta", "Unit"]


@dataclass(frozen=True, kw_only=True, eq=False)
class HeadScores:
    """What each unit is worth, by `method`, on `data`: values (L, U), any real dtype, kept as float32 on the CPU.

    Ties are broken by address: the lowest layer, then the lowest index, comes first. Raises UnitError for values that are not
    finite, not (L, U) or not of the size that `fingerprint` states.

    >>> scores = HeadScores(values=torch.tensor([[0.1, 0.9], [0.4, 0.0]]), method="retrieval", data="needle")
    >>> print(scores.top(2), round(scores["L1H0"], 3))
    L0H1,L1H0 0.4
    >>> scores.to_kv(kv_heads=1, reduce="max").ranking()[0][0]
    Unit(kind='kv', layer=0, index=0)
    """

    values: Tensor
    kind: Kind = "head"
    method: str
    data: str = ""
    fingerprint: Fingerprint | None = None
    meta: Meta = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_kind(self.kind)
        object.__setattr__(self, "values", _real_table(self.values))
        object.__setattr__(self, "meta", plain_meta(self.meta, UnitError))
        if not isinstance(self.method, str) or not isinstance(self.data, str):
            raise UnitError("method and data of scores must be text")
        if self.fingerprint:
            self._check_shape(self.fingerprint)

    @property
    def layers(self) -> int:
        return self.values.shape[0]

    @property
    def units(self) -> int:
        return self.values.shape[1]

    def __len__(self) -> int:
        return self.values.numel()

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, HeadScores):
            return NotImplemented
        return self._labels() == other._labels() and torch.equal(self.values, other.values)

    __hash__ = None  # type: ignore[assignment]

    def _labels(self) -> tuple[Any, ...]:
        return self.kind, self.method, self.data, self.fingerprint, self.meta

    def __getitem__(self, unit: Unit | str) -> float:
        unit = Unit.parse(unit) if isinstance(unit, str) else unit
        if not isinstance(unit, Unit) or unit.kind != self.kind:
            raise UnitError(f"{unit} is not of kind {self.kind!r}, which these scores are for")
        check_range(self.kind, [(unit.layer, unit.index)], self.layers, self.units)
        return float(self.values[unit.layer, unit.index])

    def __str__(self) -> str:
        head = f"{self.method} scores of {self.layers} × {self.units} {self.kind} units" + (
            self.data and f" on {self.data}"
        )
        return "\n".join([head, *(f"{unit!s:>8} {score:10.4f}" for unit, score in self.ranking()[:10])])

    def check(self, fingerprint: Fingerprint) -> None:
        """Raises WrongModelError if the scores were made for another model, UnitError if their shape does not fit it."""
        if self.fingerprint:
            self.fingerprint.require(fingerprint, f"the table of {self.method} scores")
        self._check_shape(fingerprint)

    def _check_shape(self, fingerprint: Fingerprint) -> None:
        wanted = (fingerprint.layers, fingerprint.units(self.kind))
        if tuple(self.values.shape) != wanted:
            raise UnitError(
                f"scores have shape {tuple(self.values.shape)}; {fingerprint} has {wanted} {self.kind} units"
            )

    # which units

    def ranking(self) -> list[tuple[Unit, float]]:
        """Every unit with its score, best first."""
        flat = self.values.flatten().tolist()
        return [(Unit(self.kind, *divmod(place, self.units)), flat[place]) for place in self._order()]

    def top(self, k: int) -> HeadSet:
        """The k best units, each with weight 1."""
        return self._pick(self._order(), k)

    def bottom(self, k: int) -> HeadSet:
        """The k worst units, each with weight 1."""
        return self._pick(self._order(descending=False), k)

    def top_fraction(self, fraction: float) -> HeadSet:
        """The best round(fraction · L · U) units, halves rounded to even; fraction in [0, 1]."""
        return self.top(round(_share("fraction", fraction) * len(self)))

    def at_least(self, threshold: float) -> HeadSet:
        """The units with score >= threshold."""
        return HeadSet.from_mask(self.values >= finite("threshold", threshold, UnitError), self.kind)

    def quantile(self, q: float) -> float:
        """The score below which a share q in [0, 1] of all L · U scores lies, linear between neighbours."""
        ordered = self.values.flatten().double().sort().values
        place = _share("q", q) * (len(self) - 1)
        low = int(place)
        high = min(low + 1, len(self) - 1)
        return float(ordered[low].lerp(ordered[high], place - low))

    def random_sets(
        self, k: int, n: int, *, generator: torch.Generator, exclude: HeadSet | None = None
    ) -> list[HeadSet]:
        """n random controls of k units each, drawn independently; without `exclude`, none holds a unit of `top(k)`."""
        barred = self.top(k) if exclude is None else exclude
        pool = (HeadSet.empty(self.kind) | barred).complement(self.layers, self.units)
        return [draw(pool, k, generator) for _ in range(whole("n", n, 0, UnitError))]

    def _order(self, *, descending: bool = True) -> list[int]:
        return self.values.flatten().sort(stable=True, descending=descending).indices.tolist()

    def _pick(self, order: list[int], k: int) -> HeadSet:
        count = whole("k", k, 0, UnitError, len(self))
        return HeadSet.of([divmod(place, self.units) for place in order[:count]], self.kind)

    # compared with others

    def correlation(self, other: "HeadScores") -> float:
        """Pearson correlation of two tables of the same shape. Raises UnitError where either is constant."""
        return _pearson(self._flat(other), other._flat(self))

    def rank_correlation(self, other: "HeadScores") -> float:
        """Spearman correlation: Pearson of the ranks, ties ranked by their average."""
        return _pearson(_ranks(self._flat(other)), _ranks(other._flat(self)))

    def overlap(self, other: "HeadScores", k: int) -> float:
        """Jaccard index |A ∩ B| / |A ∪ B| of the two top-k sets, k >= 1."""
        self._flat(other)
        mine, theirs = self.top(whole("k", k, 1, UnitError, len(self))), other.top(k)
        return len(mine & theirs) / len(mine | theirs)

    def _flat(self, other: "HeadScores") -> Tensor:
        if not isinstance(other, HeadScores) or (other.kind, other.values.shape) != (self.kind, self.values.shape):
            raise UnitError(f"scores compare only with scores of {self.layers} × {self.units} {self.kind} units")
        return self.values.flatten().double()

    # made into others

    def to_kv(self, kv_heads: int, reduce: Literal["max", "mean", "sum"] = "max") -> "HeadScores":
        """Scores of the K kv heads: each reduces its group of U / K query heads."""
        if self.kind != "head":
            raise UnitError(f"to_kv needs scores of kind 'head', these are of kind {self.kind!r}")
        count = whole("kv_heads", kv_heads, 1, UnitError)
        if self.units % count:
            raise UnitError(f"kv_heads is {count}; it must divide the {self.units} heads of a layer")
        if reduce not in ("max", "mean", "sum"):
            raise UnitError(f"reduce is {reduce!r}; it must be 'max', 'mean' or 'sum'")
        groups = self.values.view(self.layers, count, -1)
        values = groups.amax(-1) if reduce == "max" else groups.sum(-1) if reduce == "sum" else groups.mean(-1)
        return replace(self, values=values, kind="kv", meta={**self.meta, "reduce": reduce})

    def normalized(self, how: Literal["max", "sum", "zscore"] = "max") -> "HeadScores":
        """v / max(v), v / sum(v) or (v - mean(v)) / std(v) over all units. Raises UnitError for a divisor that is not above 0."""
        values = self.values.double()
        divisors = {"max": values.max(), "sum": values.sum(), "zscore": values.std(correction=0)}
        if how not in divisors:
            raise UnitError(f"how is {how!r}; it must be 'max', 'sum' or 'zscore'")
        divisor = divisors[how]
        if divisor <= 0:
            raise UnitError(
                f"scores cannot be normalized by {how}: the divisor is {float(divisor)}, it must be above 0"
            )
        shifted = values - values.mean() if how == "zscore" else values
        return replace(self, values=shifted / divisor, meta={**self.meta, "normalized": how})

    @classmethod
    def mean(cls, tables: Sequence["HeadScores"]) -> "HeadScores":
        """The mean of several tables of one shape, kind and model; labels come from the first."""
        if not tables:
            raise UnitError("the mean of no scores does not exist; give at least one table")
        first = tables[0]
        for other in tables[1:]:
            if first.fingerprint and other.fingerprint:
                first.fingerprint.require(other.fingerprint, "the first table of scores")
        total = torch.stack([first._flat(first), *(other._flat(first) for other in tables[1:])]).mean(0)
        return replace(first, values=total.view_as(first.values), meta={**first.meta, "tables": len(tables)})

    # on disk

    def save(self, path: StrPath) -> None:
        """Write a safetensors file: `values` (L, U) float32."""
        made_for = self.fingerprint and self.fingerprint.to_dict()
        meta = {"kind": self.kind, "method": self.method, "data": self.data, "meta": self.meta, "fingerprint": made_for}
        storage.write_tensors(path, "head-scores", 1, {"values": self.values}, meta)

    @classmethod
    def load(cls, path: StrPath) -> "HeadScores":
        """Read what `save` wrote. Raises ArtifactError; `check` tells whether the scores fit a model."""
        tensors, meta = storage.read_tensors(path, "head-scores", 1, {"values": (torch.float32, 2)})
        with decoding(path):
            return cls(
                values=tensors["values"],
                kind=check_kind(storage.field(meta, "kind", str)),
                method=storage.field(meta, "method", str),
                data=storage.field(meta, "data", str),
                fingerprint=read_fingerprint(meta),
                meta=storage.field(meta, "meta", dict),
            )

    def to_retrieval_json(self, path: StrPath) -> None:
        """Write {"layer-head": [score]}, the format of the Retrieval_Head repository."""
        table = {
            f"{layer}-{index}": [score]
            for layer, row in enumerate(self.values.tolist())
            for index, score in enumerate(row)
        }
        storage.write_plain_json(path, table)

    @classmethod
    def from_retrieval_json(cls, path: StrPath, layers: int, heads: int, *, data: str = "") -> "HeadScores":
        """Read {"layer-head": [scores of one test each]} of L × H heads; a head is worth the mean of its list."""
        table = storage.read_plain_json(path)
        shape = whole("layers", layers, 1, UnitError), whole("heads", heads, 1, UnitError)
        with decoding(path):
            if len(table) != layers * heads:
                raise UnitError(f"{len(table)} heads where {layers} × {heads} belong")
            values = torch.zeros(shape, dtype=torch.float64)
            for address, scores in table.items():
                values[_retrieval_address(address, *shape)] = _mean_score(address, scores)
            return cls(values=values, method="retrieval", data=data)


def _real_table(values: Any) -> Tensor:
    if not isinstance(values, Tensor) or values.ndim != 2 or not values.numel():
        raise UnitError("values must be a tensor of shape (layers, units) with at least one entry")
    if values.is_complex() or values.dtype == torch.bool:
        raise UnitError(f"values are {values.dtype}; they must be real numbers")
    table = values.detach().to("cpu", torch.float32, copy=True).contiguous()
    if not table.isfinite().all():
        layer, index = (~table.isfinite()).nonzero()[0].tolist()
        raise UnitError(f"values[{layer}, {index}] is {float(table[layer, index])}; scores must be finite in float32")
    return table


def _share(name: str, value: float) -> float:
    number = finite(name, value, UnitError)
    if not 0 <= number <= 1:
        raise UnitError(f"{name} is {value}; it must lie in [0, 1]")
    return number


def _ranks(values: Tensor) -> Tensor:
    """Ranks from 1, ties sharing their average, for a flat tensor."""
    _, place, counts = values.unique(return_inverse=True, return_counts=True)
    return (counts.cumsum(0) - (counts - 1) / 2)[place].double()


def _pearson(a: Tensor, b: Tensor) -> float:
    if (a == a[0]).all() or (b == b[0]).all():
        raise UnitError("a correlation with constant scores is undefined; compare tables whose scores differ")
    a, b = a - a.mean(), b - b.mean()
    return float((a @ b / (a.norm() * b.norm())).clamp(-1, 1))


def _retrieval_address(address: str, layers: int, heads: int) -> tuple[int, int]:
    found = re.fullmatch(r"(0|[1-9][0-9]{0,8})-(0|[1-9][0-9]{0,8})", address)
    if found is None:
        raise UnitError(f"{address[:60]!r} is no head; keys are 'layer-head'")
    pair = int(found[1]), int(found[2])
    check_range("head", [pair], layers, heads)
    return pair


def _mean_score(address: str, scores: Any) -> float:
    if not isinstance(scores, list) or not scores:
        raise UnitError(f"{address!r} has no list of scores")
    return sum(finite(f"a score of {address!r}", score, UnitError) for score in scores) / len(scores)
