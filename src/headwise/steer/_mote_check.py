"""Is it these experts? A dose curve: the n best experts off, beside as many random ones of the same layers.

Letters: R prompts, n experts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from headwise.attach import fingerprint
from headwise.attach.experts import attach_experts, find_experts
from headwise.checks import whole
from headwise.errors import EditError
from headwise.expert_edits import ExpertEdits, ExpertOp
from headwise.units import HeadScores, HeadSet

Measure = Callable[[], Mapping[str, Tensor]]
"""Runs the model as it stands; name -> (R,) bool, prompt by prompt, such as {"refused": …, "right": …}."""


@dataclass(frozen=True)
class Dose:
    """The n best experts: the share of prompts for which each measure is true, with them and with random ones (mean, all draws).

    `lost`, `gained`: prompts for which a measure stopped, or started, to be true; `p`: McNemar's exact test of the two.
    """

    n: int
    experts: HeadSet
    rate: Mapping[str, float]
    lost: Mapping[str, int]
    gained: Mapping[str, int]
    p: Mapping[str, float]
    random: Mapping[str, tuple[float, ...]]

    def random_mean(self, name: str) -> float:
        """Mean rate over the random draws."""
        return sum(self.random[name]) / len(self.random[name])


@dataclass(frozen=True)
class MoteCheck:
    """The rates without any edit, and the doses."""

    intact: Mapping[str, float]
    doses: tuple[Dose, ...]

    def dose(self, n: int) -> Dose:
        """The row of n experts."""
        for row in self.doses:
            if row.n == n:
                return row
        raise EditError(f"n={n} was not checked; doses: {[row.n for row in self.doses]}")

    def to_dict(self) -> dict[str, Any]:
        """Plain values for a report."""
        return {"intact": dict(self.intact), "doses": [{**vars(d), "experts": str(d.experts)} for d in self.doses]}

    def __str__(self) -> str:
        names = list(self.intact)
        lines = [f"{'experts':<9}" + "".join(f"{name:>14}{'random':>9}" for name in names)]
        lines.append(f"{'none':<9}" + "".join(f"{self.intact[name]:>14.3f}{'':>9}" for name in names))
        for row in self.doses:
            cells = (f"{row.rate[name]:>14.3f}{row.random_mean(name):>9.3f}" for name in names)
            lines.append(f"{row.n:<9}" + "".join(cells))
        return "\n".join(lines)


def mote_check(
    model: nn.Module,
    scores: HeadScores,
    measure: Measure,
    *,
    doses: Sequence[int] = (1, 2, 5, 10),
    draws: int = 10,
    op: ExpertOp = "off",
    value: float | None = None,
    seed: int = 0,
) -> MoteCheck:
    """Apply `op` to the n best experts, and to n random others in the same layers, and measure both; the model ends as it was.

    A random draw takes as many experts from each layer as the best ones have there, and none of the best ones of the largest dose.
    Raises EditError for empty doses or draws, UnitError for scores that are not of experts or of another model.

    >>> from headwise.hub import load_model
    >>> model, _ = load_model("tiny-random-mixtral")
    >>> scores = HeadScores(values=torch.arange(12.0).view(3, 4), kind="expert", method="demo")
    >>> ids = torch.arange(10)[None]
    >>> check = mote_check(model, scores, lambda: {"even": model(ids).logits[0].argmax(-1) % 2 == 0}, doses=(1,), draws=2)
    >>> str(check.dose(1).experts), len(check.dose(1).random["even"])
    ('L2E3', 2)
    """
    scores.check(fingerprint(model))
    if scores.kind != "expert":
        raise EditError(f"the check takes scores of experts; these are of kind {scores.kind!r}")
    if not doses or min(doses) < 1:
        raise EditError(f"doses={tuple(doses)}; numbers of experts, each at least 1")
    whole("draws", draws, 1, EditError)
    generator = torch.Generator().manual_seed(seed)
    experts, barred = find_experts(model).experts, scores.top(max(doses))
    intact = _measured(measure)

    def rates(units: HeadSet) -> Mapping[str, Tensor]:
        edits = ExpertEdits.parse(f"{op} {value} {units}" if value is not None and op != "force" else f"{op} {units}")
        with attach_experts(model, edits=edits):
            return _measured(measure)

    rows = []
    for n in doses:
        top = scores.top(n)
        with_top = rates(top)
        others = [rates(_alike(top, barred, experts, generator)) for _ in range(draws)]
        rows.append(_dose(n, top, intact, with_top, others))
    return MoteCheck({name: float(x.double().mean()) for name, x in intact.items()}, tuple(rows))


def _measured(measure: Measure) -> dict[str, Tensor]:
    with torch.no_grad():
        found = {name: torch.as_tensor(values).bool().cpu() for name, values in measure().items()}
    if not found or any(x.ndim != 1 or not len(x) for x in found.values()):
        raise EditError("measure() must give name -> (R,) of one truth value a prompt")
    return found


def _alike(top: HeadSet, barred: HeadSet, experts: int, generator: torch.Generator) -> HeadSet:
    """As many experts of each layer as `top` has there, none of them in `barred`."""
    pairs = []
    taken = {(unit.layer, unit.index) for unit in barred}
    for layer, members in top.by_layer().items():
        free = [e for e in range(experts) if (layer, e) not in taken]
        if len(free) < len(members):
            raise EditError(
                f"layer {layer}: {len(free)} experts are left to draw {len(members)} random ones from; smaller doses"
            )
        chosen = torch.randperm(len(free), generator=generator)[: len(members)].tolist()
        pairs += [(layer, free[i]) for i in chosen]
    return HeadSet.of(pairs, "expert")


def _dose(
    n: int,
    top: HeadSet,
    intact: Mapping[str, Tensor],
    with_top: Mapping[str, Tensor],
    others: Sequence[Mapping[str, Tensor]],
) -> Dose:
    from scipy.stats import binomtest

    lost = {name: int((intact[name] & ~with_top[name]).sum()) for name in intact}
    gained = {name: int((~intact[name] & with_top[name]).sum()) for name in intact}
    p = {}
    for name in intact:
        flips = lost[name] + gained[name]
        p[name] = float(binomtest(lost[name], flips).pvalue) if flips else 1.0
    rate = {name: float(with_top[name].double().mean()) for name in intact}
    random = {name: tuple(float(one[name].double().mean()) for one in others) for name in intact}
    return Dose(n, top, rate, lost, gained, p, random)
