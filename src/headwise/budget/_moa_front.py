"""The Pareto front of MoA plans: built from a profile, drawn, and validated on a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from headwise.attach import attach
from headwise.budget._moa_calibration import Calibration, answer_loss
from headwise.budget._moa_profile import InfluenceProfile, of_kv_heads
from headwise.budget._moa_rules import candidate_rules, fixed_span, kept_tokens, lost_influence
from headwise.budget._moa_solve import Problem, check_feasible, pareto_front
from headwise.checks import finite, shown, whole
from headwise.errors import PlanError
from headwise.plan import Budget, HeadPlan, Pattern


@dataclass(frozen=True)
class MoaFront:
    """Plans none of which is better than another at all profiled lengths, best mean loss first.

    losses[i][p]: influence that plan i hides at lengths[p], as a share of what the shortest spans hide.
    """

    plans: tuple[HeadPlan, ...]
    losses: tuple[tuple[float, ...], ...]
    lengths: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.plans)

    def validated(self, model: Any, calibration: Calibration) -> tuple[HeadPlan, list[float]]:
        """The plan under which the model predicts its own answers best, and the mean loss in nats of every plan.

        The samples should be new ones, of a length that was not profiled: influence is a first-order proxy, and this is its test.
        """
        losses = [validation_loss(model, plan, calibration) for plan in self.plans]
        return self.plans[min(range(len(losses)), key=losses.__getitem__)], losses

    def figure(self) -> Any:
        """A plotly figure: hidden influence at the longest against the shortest profiled length; needs plotly."""
        import plotly.graph_objects as go

        x, y = ([row[place] for row in self.losses] for place in (0, -1))
        colour = [float(np.mean(row)) for row in self.losses]
        marker = {"color": colour, "colorscale": "Blues_r", "size": 10, "line": {"width": 1, "color": "#123a7a"}}
        text = [f"plan {i}: mean {c:.3f}" for i, c in enumerate(colour)]
        figure = go.Figure(go.Scatter(x=x, y=y, mode="markers", marker=marker, text=text))
        figure.update_xaxes(title=f"hidden influence at {self.lengths[0]} tokens")
        figure.update_yaxes(title=f"at {self.lengths[-1]} tokens")
        figure.update_layout(template="plotly_white", height=340, margin={"l": 48, "r": 12, "t": 24, "b": 44})
        return figure


def moa_front(
    profile: InfluenceProfile,
    *,
    budget: Budget | str = "50%",
    lengths: Sequence[int] | None = None,
    rules_per_layer: int | None = 2,
    lowest: float = 0.9,
    alpha_step: int | None = None,
    betas: int = 9,
    fixed_rows: bool = False,
    intervals: int = 4,
    kv_heads: int | None = None,
    head_dim: int | None = None,
    dtype_bytes: int = 2,
    batch: int = 1,
    progress: bool = False,
) -> MoaFront:
    """All plans that the epsilon-constraint method finds; options and errors as `headwise.budget.moa`.

    >>> import torch
    >>> maps = {n: torch.rand(2, 2, n // 64, n // 64, generator=torch.Generator().manual_seed(n)).tril() for n in (256, 512)}
    >>> front = moa_front(InfluenceProfile.of(maps, 64, kind="kv"), budget="75%", lengths=[512])
    >>> all(plan.ratio(512) <= 0.75 for plan in front.plans)
    True
    """
    kv = of_kv_heads(profile, kv_heads)
    planned = sorted({*kv.lengths, *(lengths if lengths is not None else [2 * kv.lengths[-1]])})
    step = max(kv.block, kv.lengths[-1] // 8) if alpha_step is None else alpha_step
    rules = candidate_rules(kv.lengths, planned, step, betas)
    patterns = [rule.pattern(kv.block, kv.block) for rule in rules]
    amount = Budget.parse(budget) if isinstance(budget, str) else budget
    limits = _limits(amount, planned, kv, head_dim, dtype_bytes, batch)
    if rules_per_layer is not None:
        whole("rules_per_layer", rules_per_layer, 1, PlanError)
    if not 0 <= finite("lowest", lowest, PlanError) <= 1:
        raise PlanError(f"lowest is {lowest}; it must lie in [0, 1]")
    problem = _problem(kv, patterns, planned, limits, lowest, rules_per_layer, fixed_rows)
    check_feasible(problem, planned, [limit / (n * problem.units) for limit, n in zip(limits, planned, strict=True)])
    found = _search(problem, intervals, progress)
    if not found and lowest:
        found = _search(_problem(kv, patterns, planned, limits, 0.0, rules_per_layer, fixed_rows), intervals, progress)
        lowest = 0.0
    if not found:
        raise PlanError(f"no plan was found for {amount} at {planned} tokens; raise the budget or rules_per_layer")
    meta = {"budget": str(amount), "lengths": ",".join(map(str, planned)), "lowest": lowest, "fixed_rows": fixed_rows}
    return MoaFront(
        plans=tuple(_plan(kv, patterns, choice, loss, meta) for choice, loss in found),
        losses=tuple(tuple(map(float, loss)) for _, loss in found),
        lengths=tuple(kv.lengths),
    )


def parse_lengths(text: str) -> list[int]:
    """`2048,4096` as numbers. Raises PlanError."""
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if not numbers or min(numbers) < 1:
        raise PlanError(f"lengths is {shown(text)}; give tokens split by commas, such as 2048,4096")
    return numbers


def validation_loss(model: Any, plan: HeadPlan, calibration: Calibration) -> float:
    """Mean cross entropy in nats of the model's own answers, read under a plan."""
    with attach(model, plan=plan), torch.no_grad():
        losses = [
            float(answer_loss(model, ids, answers))
            for ids, answers in zip(calibration.ids, calibration.answers, strict=True)
        ]
    return sum(losses) / len(losses)


def _limits(
    amount: Budget, planned: list[int], kv: InfluenceProfile, head_dim: int | None, dtype_bytes: int, batch: int
) -> list[int]:
    """Tokens that all kv heads together may keep at each planned length, at most all of them."""
    if amount.unit == "bytes" and head_dim is None:
        raise PlanError(f"a budget of {amount} needs head_dim=, the size of a head")
    token = 2 * (head_dim or 1) * dtype_bytes * batch
    sizes = {"layers": kv.layers, "kv_heads": kv.units, "token_bytes": token}
    return [min(amount.slots(context=n, **sizes), n * kv.layers * kv.units) for n in planned]


def _problem(
    kv: InfluenceProfile,
    patterns: list[Pattern],
    planned: list[int],
    limits: list[int],
    lowest: float,
    rules_per_layer: int | None,
    fixed_rows: bool,
) -> Problem:
    at = {n: [fixed_span(p, n, kv.block, 2 * kv.block) for p in patterns] if fixed_rows else patterns for n in planned}
    loss = [lost_influence(kv.maps[n], at[n], kv.block).flatten(0, 1).numpy() for n in kv.lengths]
    cost = [kept_tokens(at[n], n).numpy() for n in planned]
    upper = np.array(limits, dtype=np.float64)
    return Problem(np.stack(loss), np.stack(cost), lowest * upper, upper, kv.layers, rules_per_layer)


def _search(problem: Problem, intervals: int, progress: bool) -> list[tuple[Any, Any]]:
    whole("intervals", intervals, 0, PlanError, 16)
    if intervals == 0:
        choice = problem.solve(np.ones(len(problem.loss)))
        return [] if choice is None else [(choice, problem.losses(choice))]
    from rich.progress import Progress

    P = len(problem.loss)
    with Progress(disable=not progress) as bar:
        task = bar.add_task("Pareto front", total=1 + P * intervals ** (P - 1))
        return pareto_front(problem, intervals=intervals, advance=lambda: bar.advance(task))


def _plan(kv: InfluenceProfile, patterns: list[Pattern], choice: Any, loss: Any, meta: dict[str, Any]) -> HeadPlan:
    rows = choice.reshape(kv.layers, kv.units).tolist()
    return HeadPlan(
        patterns=tuple(tuple(patterns[c] for c in row) for row in rows),
        fingerprint=kv.fingerprint,
        method="moa",
        meta=meta | {"loss": float(loss.mean())},
    )
