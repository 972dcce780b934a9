"""What the planners without scores share: the shape of a model, and a budget as tokens or a share of the text for each kv head."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from headwise.attach import find_stack, fingerprint
from headwise.checks import whole
from headwise.errors import PlanError
from headwise.plan import Budget, Selected
from headwise.units import Fingerprint


@dataclass(frozen=True)
class Shape:
    """What a planner must know of a model. `head_dim` and `dtype_bytes` are None where only a fingerprint was given."""

    fingerprint: Fingerprint
    head_dim: int | None = None
    dtype_bytes: int | None = None

    @classmethod
    def of(cls, model: Any) -> Shape:
        """Of a model, or of its `Fingerprint`. Raises PlanError for anything else."""
        if isinstance(model, Fingerprint):
            return cls(model)
        if not isinstance(model, nn.Module):
            raise PlanError(f"model is a {type(model).__name__}; it must be a transformers model or a Fingerprint")
        return cls(fingerprint(model), find_stack(model).head_dim, next(model.parameters()).dtype.itemsize)

    @property
    def layers(self) -> int:
        """L."""
        return self.fingerprint.layers

    @property
    def kv_heads(self) -> int:
        """K."""
        return self.fingerprint.kv_heads


@dataclass(frozen=True)
class Amount:
    """What one kv head may keep: a share of the text, or so many tokens (then `share` is 0)."""

    share: float = 0.0
    tokens: float = 0

    @classmethod
    def of(cls, budget: Budget | str, shape: Shape, batch: int = 1) -> Amount:
        """The even amount of a budget. A budget in bytes needs a shape that knows the size of a token."""
        amount = Budget.parse(budget) if isinstance(budget, str) else budget
        if not isinstance(amount, Budget):
            raise PlanError(f"budget is {budget!r}; write 0.5, 25%, 512tok or 64MiB")
        amount.need_bytes()
        if amount.unit == "ratio":
            return cls(share=float(amount.amount))
        if amount.unit == "tokens":
            return cls(tokens=int(amount.amount))
        if shape.head_dim is None or shape.dtype_bytes is None:
            raise PlanError(
                f"a budget of {amount} needs the model itself, not its fingerprint: the size of a token is unknown"
            )
        token = 2 * shape.head_dim * shape.dtype_bytes * whole("batch", batch, 1, PlanError)
        return cls(tokens=int(amount.amount) // token // (shape.layers * shape.kv_heads))

    def times(self, factor: float) -> Amount:
        """The amount of a head that gets `factor` times the even one, rounded down to a millionth of the text."""
        return Amount(share=min(1.0, int(self.share * factor * 1e6 + 1e-3) / 1e6), tokens=self.tokens * factor + 1e-6)

    def selected(self, sinks: int, window: int, **options: Any) -> Selected:
        """Sinks, window, and as many chosen tokens as the rest of the amount allows. Raises PlanError where it allows none."""
        always = whole("sinks", sinks, 0, PlanError) + whole("window", window, 1, PlanError)
        if self.share:
            return Selected(sinks, window, -always, share=self.share, **options)
        if int(self.tokens) < always:
            raise PlanError(
                f"the budget leaves {int(self.tokens)} tokens for a kv head, but {sinks} sinks and a window of {window} are {always}: "
                "raise the budget or shorten the window"
            )
        return Selected(sinks, window, int(self.tokens) - always, **options)


def deal(weights: Sequence[float], mean: float, least: float, most: float) -> list[float]:
    """Amounts in proportion to `weights` on top of `least`, at most `most`, whose mean is `mean`; what one cannot take goes to the others.

    >>> deal([3, 1, 0, 0], mean=0.25, least=0.1, most=0.5)
    [0.5, 0.3, 0.1, 0.1]
    """
    total = (mean - least) * len(weights)
    out, free = [least] * len(weights), [i for i, w in enumerate(weights) if w > 0] or list(range(len(weights)))
    weight = {i: weights[i] if weights[i] > 0 else 1.0 for i in free}
    while free and total > 1e-12:
        whole_weight = sum(weight[i] for i in free)
        full = [i for i in free if out[i] + total * weight[i] / whole_weight >= most]
        for i in full or free:
            add = most - out[i] if full else total * weight[i] / whole_weight
            out[i] += add
        total = (mean * len(weights)) - sum(out)
        free = [i for i in free if i not in full] if full else []
        if not free and total > 1e-12:
            free = [i for i in range(len(weights)) if out[i] < most - 1e-12]
            weight = dict.fromkeys(free, 1.0)
    return [round(x, 9) for x in out]
