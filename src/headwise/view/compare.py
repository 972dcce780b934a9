"""Two of a kind, side by side: tables of scores (of one model or of two), or plans."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from headwise.errors import UnitError, ViewError
from headwise.plan import HeadPlan
from headwise.units import HeadScores, HeadSet, Unit


@dataclass(frozen=True)
class ScorePair:
    """Two tables; `paired` says whether their heads stand for the same heads, otherwise `why` says why not."""

    a: HeadScores
    b: HeadScores
    paired: bool
    why: str = ""

    @classmethod
    def of(cls, a: HeadScores, b: HeadScores) -> ScorePair:
        """Tables of one shape and kind are paired; for two different models that is said."""
        if (a.kind, a.values.shape) != (b.kind, b.values.shape):
            return cls(a, b, False, f"{_shape(a)} against {_shape(b)}: heads cannot be paired, only layers by depth")
        other = a.fingerprint is not None and b.fingerprint is not None and a.fingerprint != b.fingerprint
        why = "two models: heads are paired by address, which means something only if one was made from the other"
        return cls(a, b, True, why if other else "")

    def numbers(self, k: int) -> list[tuple[str, str]]:
        """Name and value of each measure of agreement, as text."""
        if not self.paired:
            return []
        found = []
        for name, measure in (("Spearman", self.a.rank_correlation), ("Pearson", self.a.correlation)):
            try:
                found.append((name, f"{measure(self.b):+.3f}"))
            except UnitError:
                found.append((name, "undefined: one table is constant"))
        k = min(k, len(self.a))
        return [*found, (f"top {k} in common (Jaccard)", f"{self.a.overlap(self.b, k):.2f}")]

    def disagreements(self, count: int = 10) -> list[tuple[Unit, float, float, int, int]]:
        """Units whose ranks differ most: (unit, score in a, in b, rank in a, in b), ranks from 1."""
        if not self.paired:
            return []
        ranks = [{unit: place for place, (unit, _) in enumerate(t.ranking(), 1)} for t in (self.a, self.b)]
        units = sorted(ranks[0], key=lambda unit: (-abs(ranks[0][unit] - ranks[1][unit]), unit))
        return [(u, self.a[u], self.b[u], ranks[0][u], ranks[1][u]) for u in units[:count]]


def _shape(scores: HeadScores) -> str:
    return f"{scores.layers} × {scores.units} {scores.kind} units"


@dataclass(frozen=True)
class PlanPair:
    """Two plans at a length of `tokens`. Raises ViewError for plans of different shapes."""

    a: HeadPlan
    b: HeadPlan
    tokens: int

    def __post_init__(self) -> None:
        shapes = [(plan.layers, plan.kv_heads) for plan in (self.a, self.b)]
        if shapes[0] != shapes[1]:
            raise ViewError(f"plans of {shapes[0]} and {shapes[1]} (layers, kv heads) cannot be laid side by side")
        if not 1 <= self.tokens <= 10**7:
            raise ViewError(f"tokens is {self.tokens}; it must be from 1 to 10 000 000")

    def kept(self) -> tuple[HeadScores, HeadScores]:
        """What share of the tokens every kv head keeps, as tables to draw."""
        return tuple(  # type: ignore[return-value]
            HeadScores(values=plan.kept(self.tokens).float() / self.tokens, kind="kv", method="share kept")
            for plan in (self.a, self.b)
        )

    def changed(self) -> HeadSet:
        """The kv heads whose patterns differ."""
        rows = [
            [p != q for p, q in zip(*pair, strict=True)] for pair in zip(self.a.patterns, self.b.patterns, strict=True)
        ]
        return HeadSet.from_mask(torch.tensor(rows), "kv")

    def numbers(self) -> list[tuple[str, str]]:
        """What differs, as text."""
        total = self.a.layers * self.a.kv_heads
        return [
            (f"cache of A at {self.tokens} tokens", f"{self.a.ratio(self.tokens):.1%}"),
            (f"cache of B at {self.tokens} tokens", f"{self.b.ratio(self.tokens):.1%}"),
            ("kv heads with another pattern", f"{len(self.changed())} of {total}"),
            ("full in A, in B, in both", _full(self.a, self.b)),
            ("prefill", f"{self.a.prefill}, {self.b.prefill}"),
        ]


def _full(a: HeadPlan, b: HeadPlan) -> str:
    full = a.full_heads(), b.full_heads()
    return f"{len(full[0])}, {len(full[1])}, {len(full[0] & full[1])}"


def nearest_by_scores(tables: dict[str, HeadScores], unit: Unit, count: int = 8) -> list[tuple[Unit, float]]:
    """Units that score like `unit` in every table of its kind and shape: (unit, root mean square difference in standard deviations).

    Raises ViewError where no table has this unit.
    """
    fitting = [t for t in tables.values() if t.kind == unit.kind and unit.layer < t.layers and unit.index < t.units]
    shapes = [tuple(t.values.shape) for t in fitting]
    fitting = [t for t in fitting if tuple(t.values.shape) == shapes[0]]
    if not fitting:
        raise ViewError(f"no table of scores here has {unit}")
    values = torch.stack([t.values / t.values.std(correction=0).clamp(min=1e-12) for t in fitting])  # (T, L, U)
    gap = (values - values[:, unit.layer, unit.index, None, None]).square().mean(0).sqrt()
    order = gap.flatten().sort(stable=True).indices.tolist()
    units = [Unit(unit.kind, *divmod(place, fitting[0].units)) for place in order]
    return [(u, float(gap[u.layer, u.index])) for u in units if u != unit][:count]
