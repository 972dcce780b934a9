"""MoA's choice of rules: a multi-objective integer programme, solved by HiGHS, and its Pareto front.

Letters: L layers, K kv heads, U = L · K units, C rules, P profiled lengths (objectives), N planned lengths (bounds).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from headwise.errors import PlanError

Array = NDArray[np.float64]
SLACK = 1e-9  # of a box, relative: the optimum that defines it must lie inside


@dataclass(frozen=True)
class Problem:
    """Choose one rule for each unit.

        minimise (sum_u loss[p, u, x_u])_p    so that    lower_n <= sum_u cost[n, x_u] <= upper_n   for all n

    and no layer uses more than `rules_per_layer` rules. loss (P, U, C), cost (N, C), lower and upper (N,); `layers` says how many
    layers the U units are split over. Losses are scaled by that of the worst rule of each length, so that 1 is "all heads worst".
    """

    loss: Array
    cost: Array
    lower: Array
    upper: Array
    layers: int
    rules_per_layer: int | None = 2
    gap: float = 1e-3
    seconds: float = 20.0
    scale: Array = field(init=False, repr=False)

    def __post_init__(self) -> None:
        worst = self.loss.max(axis=2).sum(axis=1)
        object.__setattr__(self, "scale", np.where(worst > 0, worst, 1.0))

    @property
    def units(self) -> int:
        return self.loss.shape[1]

    @property
    def rules(self) -> int:
        return self.loss.shape[2]

    def losses(self, choice: NDArray[np.int64]) -> Array:
        """Scaled loss of a choice (U,) at each profiled length, (P,)."""
        return self.loss[:, np.arange(self.units), choice].sum(axis=1) / self.scale

    def costs(self, choice: NDArray[np.int64]) -> Array:
        """Tokens kept by all units at each planned length, (N,)."""
        return self.cost[:, choice].sum(axis=1)

    def fits(self, choice: NDArray[np.int64]) -> bool:
        """Whether a choice meets every bound."""
        costs, slack = self.costs(choice), 1e-6 * np.maximum(self.upper, 1)
        by_layer = choice.reshape(self.layers, -1)
        few = self.rules_per_layer is None or all(len(set(row)) <= self.rules_per_layer for row in by_layer.tolist())
        return few and bool((costs <= self.upper + slack).all() and (costs >= self.lower - slack).all())

    def solve(self, weights: Array, boxes: tuple[Array, Array] | None = None) -> NDArray[np.int64] | None:
        """The choice (U,) of least weighted loss, all scaled losses within boxes (low (P,), high (P,)); None if there is none."""
        from scipy.optimize import Bounds, LinearConstraint, milp

        objective = np.tensordot(weights / self.scale, self.loss, axes=1).ravel()
        many = self.rules_per_layer is None or self.rules_per_layer >= self.units // self.layers
        objective = objective if many else np.concatenate([objective, np.zeros(self.layers * self.rules)])
        constraints = [LinearConstraint(*rows) for rows in self._rows(boxes, limited=not many)]
        found = milp(
            objective,
            constraints=constraints,
            integrality=np.ones_like(objective),
            bounds=Bounds(0, 1),
            options={"mip_rel_gap": self.gap, "time_limit": self.seconds},
        )
        if found.x is None:
            return None
        choice = found.x[: self.units * self.rules].reshape(self.units, self.rules).argmax(axis=1)
        return choice if self.fits(choice) else None

    def _rows(self, boxes: tuple[Array, Array] | None, *, limited: bool) -> Iterator[tuple]:
        """(matrix, low, high) of each set of constraints over x (U · C) and, where rules are limited, y (L · C)."""
        from scipy.sparse import csr_array, eye_array, hstack, kron

        U, C, L = self.units, self.rules, self.layers
        none = csr_array((1, L * C if limited else 0))

        def wide(x: csr_array) -> csr_array:
            return hstack([x, kron(np.ones((x.shape[0], 1)), none)]) if limited else x

        yield wide(kron(eye_array(U), np.ones((1, C)))), np.ones(U), np.ones(U)
        yield wide(csr_array(np.tile(self.cost, (1, U)))), self.lower, self.upper
        if boxes is not None:
            loss = self.loss.reshape(len(self.loss), -1) / self.scale[:, None]
            yield wide(csr_array(loss)), *boxes
        if limited:
            x, y = eye_array(U * C), kron(kron(eye_array(L), np.ones((U // L, 1))), eye_array(C))
            yield hstack([x, -y]), -np.inf, np.zeros(U * C)  # a rule that is used is counted
            used = kron(eye_array(L), np.ones((1, C)))
            yield hstack([csr_array((L, U * C)), used]), -np.inf, np.full(L, float(self.rules_per_layer or C))


def pareto_front(
    problem: Problem, *, intervals: int = 4, advance: Callable[[], None] = lambda: None
) -> list[tuple[NDArray[np.int64], Array]]:
    """The non-dominated choices that the epsilon-constraint method finds, each with its scaled losses (P,), best mean first.

    Each objective is minimised alone; the ranges in which that leaves the others are split into `intervals`; then each objective is
    minimised once more with the others confined to every combination of intervals.
    """
    P = len(problem.loss)
    alone = [problem.solve(np.eye(P)[p] + 1e-6) for p in range(P)]
    advance()
    found = [choice for choice in alone if choice is not None]
    if not found:
        return []
    found += [c for c in [problem.solve(np.ones(P))] if c is not None]
    corners = np.stack([problem.losses(choice) for choice in found])
    edges = np.linspace(corners.min(axis=0), corners.max(axis=0), intervals + 1)  # (intervals + 1, P)
    flat = np.ptp(corners, axis=0) <= 1e-12
    for primary in range(P):
        others = [p for p in range(P) if p != primary and not flat[p]]
        for cells in itertools.product(range(intervals), repeat=len(others)):
            low, high = np.full(P, -np.inf), np.full(P, np.inf)
            for p, cell in zip(others, cells, strict=True):
                low[p], high[p] = edges[cell, p] * (1 - SLACK), edges[cell + 1, p] * (1 + SLACK)
            if others:
                choice = problem.solve(np.eye(P)[primary] + 1e-6, (low, high))
                found += [] if choice is None else [choice]
            advance()
    return _front(problem, found)


def _front(problem: Problem, choices: list[NDArray[np.int64]]) -> list[tuple[NDArray[np.int64], Array]]:
    """Without duplicates and without what another choice beats or equals everywhere."""
    points = [(choice, problem.losses(choice)) for choice in choices]
    kept: list[tuple[NDArray[np.int64], Array]] = []
    for choice, loss in sorted(points, key=lambda point: tuple(point[1])):
        if not any(bool((other <= loss + 1e-12).all()) for _, other in kept):
            kept = [(c, other) for c, other in kept if not bool((loss <= other).all())] + [(choice, loss)]
    return sorted(kept, key=lambda point: float(point[1].mean()))


def check_feasible(problem: Problem, lengths: list[int], densities: list[float]) -> None:
    """Raises PlanError where a bound lies below what the cheapest rule takes, and says what is possible."""
    least = problem.cost.min(axis=1) * problem.units
    for n, length in enumerate(lengths):
        if least[n] > problem.upper[n]:
            share = least[n] / (problem.units * length)
            raise PlanError(
                f"a density of {densities[n]:.4g} at {length} tokens is out of reach: the shortest rule keeps {share:.4g} of them "
                "(sinks and a window of one block); raise the budget, or profile with a smaller block"
            )
