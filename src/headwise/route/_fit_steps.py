"""The steps of a fitted conversion: read text, mean outputs, gradient covariance, ridge regression, heads to layers."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from headwise.attach import find_stack
from headwise.checks import Meta
from headwise.errors import RouteError
from headwise.route._allocate import Costs, allocate, gradient_covariance
from headwise.route._config import LayerRoute
from headwise.route._convert import kept_text
from headwise.route._fitted import Means, fit, read
from headwise.route._router import HeadRouter
from headwise.tasks import code
from headwise.tasks.calibration import calibration_rows

FitText = Literal["english", "mixed"]
Target = Literal["norm", "importance"]
Absent = Literal["zero", "mean"]
Allocation = Literal["uniform", "sensitivity"]

SAMPLE = 4096
"""Tokens for mean outputs, gradients and costs of layers: they need fewer than a regression."""


@dataclass(frozen=True, kw_only=True)
class FitRecipe:
    """What a fitted router is fitted to, on which text. Raises RouteError for a value outside its choices."""

    tokens: int = 20480
    text: FitText = "english"
    target: Target = "norm"
    absent: Absent = "zero"
    allocate: Allocation = "uniform"
    stack: str | None = None
    seed: int = 0
    progress: bool = False

    def __post_init__(self) -> None:
        choices = {
            "fit_text": (self.text, ("english", "mixed")),
            "target": (self.target, ("norm", "importance")),
            "absent": (self.absent, ("zero", "mean")),
            "allocate": (self.allocate, ("uniform", "sensitivity")),
        }
        for name, (value, known) in choices.items():
            if value not in known:
                raise RouteError(f"{name} is {value!r}; it must be {' or '.join(known)}")

    def rows(self, model: Any, tokenizer: Any) -> Tensor:
        """Token rows (n, N): packaged English, or rows of English and of source code in turn."""
        window = min(512, self.tokens)
        if self.text == "english":
            return calibration_rows(model, tokenizer, text=None, tokens=self.tokens, window=window, seed=self.seed)
        half = max(window, self.tokens // 2)
        kinds = [
            calibration_rows(model, tokenizer, text=text, tokens=half, window=window, seed=self.seed)
            for text in (None, code("haystack"))
        ]
        return torch.stack([row for pair in zip(*kinds, strict=True) for row in pair])


def fit_router(router: HeadRouter, model: Any, tokenizer: Any, recipe: FitRecipe) -> HeadRouter:
    """The router, fitted by the recipe; with allocate="sensitivity" one of as many heads in all, dealt out anew.

    Raises RouteError if heads are to be dealt out but some are shared or their number is set layer by layer.
    """
    if recipe.allocate == "sensitivity" and any(route.shared for route in router.config.layers):
        raise RouteError("allocate='sensitivity' deals out heads that tokens choose: use shared='none'")
    stack = find_stack(model, recipe.stack)
    rows = recipe.rows(model, tokenizer)
    sample = rows[:: max(1, rows.numel() // SAMPLE) | 1]  # an odd stride, so that two kinds of rows in turn both stay
    how: dict[str, Any] = {"stack": recipe.stack, "progress": recipe.progress}
    fill = None
    if recipe.absent == "mean":
        means = Means(stack)
        read(model, sample, means, what="means for", **how)
        fill = means.table
        router = HeadRouter(replace(router.config, fill=fill.shape[-1]))
    needs_metric = recipe.target == "importance" or recipe.allocate == "sensitivity"
    metric = gradient_covariance(model, stack, sample) if needs_metric else None
    wanted = _shrunk(metric) if recipe.target == "importance" and metric is not None else None
    r2 = fit(router, model, rows, metric=wanted, fill=fill, **how)
    found: Meta = {
        "fit_tokens": rows.numel(),
        "fit_text": recipe.text,
        "target": recipe.target,
        "r2_lowest": min(r2),
        "r2_median": sorted(r2)[len(r2) // 2],
    }
    if recipe.allocate == "sensitivity" and metric is not None:
        router = _dealt_out(router, model, stack, sample, metric, fill, how)
        found["kept"] = kept_text(router.config.layers)
        found["allocated"] = " ".join(map(str, router.active_counts()))
    router.config = replace(router.config, meta={**router.config.meta, **found})
    return router


def _shrunk(metric: Tensor) -> Tensor:
    """Half M (L, C, C), half the multiple of the identity that has its trace: M of few tokens has sharp directions that another text
    does not share."""
    trace = metric.diagonal(dim1=1, dim2=2).mean(-1)
    return 0.5 * metric + 0.5 * trace[:, None, None] * torch.eye(metric.shape[-1])


def _dealt_out(
    router: HeadRouter, model: Any, stack: Any, rows: Tensor, metric: Tensor, fill: Tensor | None, how: dict[str, Any]
) -> HeadRouter:
    """As many heads in all, to the layers where leaving them out costs most; the fit does not depend on their number."""
    scores = [layer.rank for layer in router.layers]
    costs = Costs(stack, scores, metric, fill)
    read(model, rows, costs, what="costs of", **how)
    counts = allocate(costs.table, sum(router.active_counts()))
    layers = tuple(LayerRoute(heads=stack.heads, routed=count) for count in counts)
    made = HeadRouter(replace(router.config, layers=layers))
    made.load_state_dict(router.state_dict())
    return made
