"""The steps of a fitted conversion: read text, mean outputs, gradient covariance, ridge regression, heads to layers."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from headwise.attach import HeadCall, Stack, attach, find_stack, fingerprint
from headwise.attach.controller import tensor_parallel
from headwise.attach.projection import hidden_width
from headwise.checks import Meta, whole
from headwise.errors import RouteError
from headwise.route._absent import Means, RestMeans
from headwise.route._allocate import Costs, allocate, gradient_covariance
from headwise.route._config import Features, LayerRoute, RouterConfig
from headwise.route._convert import kept_text
from headwise.route._fitted import fit, read
from headwise.route._local import FirstKeys
from headwise.route._router import HeadRouter
from headwise.tasks import code
from headwise.tasks.calibration import calibration_rows

FitText = Literal["english", "mixed"]
Target = Literal["norm", "importance"]
Absent = Literal["zero", "mean", "rest"]
Allocation = Literal["uniform", "sensitivity"]

LEAST = 2
"""Heads that every layer keeps when heads are dealt out."""

SAMPLE = 4096
"""Tokens for mean outputs, gradients and costs of layers: they need fewer than a regression."""


@dataclass(frozen=True, kw_only=True)
class FitRecipe:
    """What a fitted router is fitted to, on which text. Raises RouteError for a value outside its choices.

    `total`: heads of all layers together, to be dealt out; None for as many as the router has. `rounds`: 2 fits once on the
    model as it is and once more under the first router, whose hidden states are those that the second will meet.
    """

    tokens: int = 20480
    text: FitText = "english"
    target: Target = "norm"
    features: Features = "hidden"
    absent: Absent = "zero"
    allocate: Allocation = "uniform"
    total: int | None = None
    rounds: int = 1
    stack: str | None = None
    seed: int = 0
    progress: bool = False

    def __post_init__(self) -> None:
        choices = {
            "fit_text": (self.text, ("english", "mixed")),
            "target": (self.target, ("norm", "importance")),
            "features": (self.features, ("hidden", "queries")),
            "absent": (self.absent, ("zero", "mean", "rest")),
            "allocate": (self.allocate, ("uniform", "sensitivity")),
        }
        for name, (value, known) in choices.items():
            if value not in known:
                raise RouteError(f"{name} is {value!r}; it must be {' or '.join(known)}")
        whole("fit_rounds", self.rounds, 1, RouteError)

    def rows(self, model: Any, tokenizer: Any) -> Tensor:
        """Token rows (n, N): packaged English, or rows of English and of source code in turn."""
        context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        window = min(512, self.tokens, context or 512)
        if self.text == "english":
            return calibration_rows(model, tokenizer, text=None, tokens=self.tokens, window=window, seed=self.seed)
        half = max(window, self.tokens // 2)
        kinds = [
            calibration_rows(model, tokenizer, text=text, tokens=half, window=window, seed=self.seed)
            for text in (None, code("haystack", max_chars=8 * half))
        ]
        return torch.stack([row for pair in zip(*kinds, strict=True) for row in pair])


def best_options(model: Any, stack: str | None = None, *, dealt: bool = True) -> dict[str, Any]:
    """Options of a recipe that were measured to be the best, as far as this model allows them; `dealt`: may layers differ?

    Importance and sensitivity need the next-token loss of a causal language model, queries need keys by kv head, and all of it a
    model that is not spread over ranks.

    >>> from headwise.hub import load_model
    >>> best_options(load_model("tiny-random-deepseek-v3")[0])  # its keys are larger than its heads: they are not read
    {'target': 'importance', 'features': 'hidden', 'absent': 'rest', 'allocate': 'sensitivity'}
    """
    found = find_stack(model, stack)
    if tensor_parallel(found.modules[0])[1] > 1:
        return {"target": "norm", "features": "hidden", "absent": "zero", "allocate": "uniform"}
    head = getattr(model, "get_output_embeddings", lambda: None)()
    language, keys = found.causal and head is not None, FirstKeys()
    read(model, torch.zeros(1, 1, dtype=torch.long), keys, stack=stack)
    return {
        "target": "importance" if language else "norm",
        "features": "queries" if keys.table.shape[1:] == (found.kv_heads, found.head_dim) else "hidden",
        "absent": "rest",
        "allocate": "sensitivity" if language and dealt else "uniform",
    }


@dataclass(frozen=True)
class Fit:
    """What was measured once, for routers of any number of heads: a fitted router, and tables by number k of absent heads.

    `fills` (L, H + 1, H, D) what absent heads give, `costs` (L, H + 1) what doing without them costs; None where not asked for.
    """

    router: HeadRouter
    fills: Tensor | None
    costs: Tensor | None
    found: Meta

    def uniform(self, active: int | None = None) -> HeadRouter:
        """The router with `active` heads in every layer, by default with those that it was made with."""
        layers = self.router.config.layers
        if active is not None:
            layers = tuple(replace(route, routed=active - len(route.shared)) for route in layers)
        return self._with(layers, {"kept": kept_text(layers)})

    def dealt(self, total: int, *, least: int = LEAST) -> HeadRouter:
        """A router of `total` heads in all layers together, more of them where doing without costs more.

        At least `least` stay in every layer, as far as the total allows: a sum of costs does not know that layers make up for
        each other, and would take all but one head from some.
        """
        if self.costs is None:
            raise RouteError("costs of layers were not measured: fit with allocate='sensitivity'")
        L, H = self.costs.shape[0], self.costs.shape[1] - 1
        counts = allocate(self.costs, total, least=max(1, min(least, total // L, H)))
        layers = tuple(LayerRoute(heads=self.costs.shape[1] - 1, routed=count) for count in counts)
        return self._with(layers, {"kept": kept_text(layers), "allocated": " ".join(map(str, counts))})

    @torch.no_grad()
    def _with(self, layers: tuple[LayerRoute, ...], more: Meta) -> HeadRouter:
        config = self.router.config
        made = HeadRouter(replace(config, layers=layers, meta={**config.meta, **self.found, **more}))
        made.load_state_dict(self.router.state_dict())
        if self.fills is not None:
            for layer, route, table in zip(made.layers, layers, self.fills, strict=True):
                layer.fill.copy_(table[route.heads - route.active])  # type: ignore[operator]
        return made


def fit_router(router: HeadRouter, model: Any, tokenizer: Any, recipe: FitRecipe) -> HeadRouter:
    """The router, fitted by the recipe; with allocate="sensitivity" its heads are dealt out to the layers anew.

    Raises RouteError if heads are to be dealt out but some are shared or their number is set layer by layer.
    """
    if recipe.allocate == "sensitivity" and any(route.shared for route in router.config.layers):
        raise RouteError("allocate='sensitivity' deals out heads that tokens choose: use shared='none'")
    under: HeadRouter | None = None
    for _ in range(recipe.rounds):
        found = measure_fit(router, model, tokenizer, recipe, under=under)
        if recipe.allocate == "uniform":
            made = found.uniform()
        else:
            made = found.dealt(sum(router.active_counts()) if recipe.total is None else recipe.total)
        under = _copied(made)
    return made


def measure_fit(
    router: HeadRouter, model: Any, tokenizer: Any, recipe: FitRecipe, *, under: HeadRouter | None = None
) -> Fit:
    """Read the text of the recipe and fit the router's maps, its stand-ins for absent heads, and the costs of the layers.

    `under` a router, everything is measured on the model that this router makes of it.
    """
    stack = find_stack(model, recipe.stack)
    router = HeadRouter(replace(router.config, **_sizes(stack, recipe)))
    rows = recipe.rows(model, tokenizer)
    sample = rows[:: max(1, rows.numel() // SAMPLE) | 1]  # an odd stride, so that two kinds of rows in turn both stay
    how: dict[str, Any] = {"under": under, "stack": recipe.stack, "progress": recipe.progress}
    means = None
    if recipe.absent == "mean":
        seen = Means(stack)
        read(model, sample, seen, what="means for", **how)
        means = seen.table
    metric = _metric(model, stack, sample, recipe, under)
    wanted = _shrunk(metric) if recipe.target == "importance" and metric is not None else None
    r2 = fit(router, model, rows, metric=wanted, fill=means, **how)
    fills = None if means is None else means[:, None].expand(-1, stack.heads + 1, -1, -1)
    if recipe.absent == "rest":
        rest = RestMeans(stack, _scores(router))
        read(model, sample, rest, what="means for", **how)
        fills = rest.table
    costs = None
    if recipe.allocate == "sensitivity" and metric is not None:
        seen_costs = Costs(stack, _scores(router), metric, fills)
        read(model, sample, seen_costs, what="costs of", **how)
        costs = seen_costs.table
    found: Meta = {
        "fit_tokens": rows.numel(),
        "fit_text": recipe.text,
        "target": recipe.target,
        "absent": recipe.absent,
    }
    found |= {"rounds": recipe.rounds, "r2_lowest": min(r2), "r2_median": sorted(r2)[len(r2) // 2]}
    return Fit(router, fills, costs, found)


def fit_heads(model: Any, tokenizer: Any, recipe: FitRecipe) -> Fit:
    """One fit for routers of any number of heads, none of them shared: `Fit.dealt(total)` or `Fit.uniform(active)` makes one.

    >>> from headwise.hub import load_model
    >>> fitted = fit_heads(*load_model("tiny-random-llama"), FitRecipe(tokens=512, allocate="sensitivity"))
    >>> [sum(fitted.dealt(n).active_counts()) for n in (6, 9)], fitted.uniform(2).active_counts()
    ([6, 9], [2, 2, 2])
    """
    stack, print_ = find_stack(model, recipe.stack), fingerprint(model, recipe.stack)
    layers = (LayerRoute(heads=stack.heads, routed=stack.heads),) * stack.layers
    config = RouterConfig(kind="fitted", layers=layers, width=hidden_width(stack), fingerprint=print_)
    return measure_fit(HeadRouter(config), model, tokenizer, recipe)


def _sizes(stack: Stack, recipe: FitRecipe) -> dict[str, Any]:
    """What a configuration says of stand-ins for absent heads and of what is read."""
    sizes: dict[str, Any] = {"fill": 0 if recipe.absent == "zero" else stack.head_dim, "features": recipe.features}
    if recipe.features == "queries":
        sizes |= {"kv_heads": stack.kv_heads, "head_dim": stack.head_dim}
    return sizes


def _metric(model: Any, stack: Stack, sample: Tensor, recipe: FitRecipe, under: HeadRouter | None) -> Tensor | None:
    """M of each layer, where the recipe needs it."""
    if recipe.target != "importance" and recipe.allocate != "sensitivity":
        return None
    with nullcontext() if under is None else attach(model, router=under, stack=recipe.stack):
        return gradient_covariance(model, stack, sample)


def _copied(router: HeadRouter) -> HeadRouter:
    """A copy through whose choice no gradient runs."""
    made = HeadRouter(replace(router.config, ste_scope="none"))
    made.load_state_dict(router.state_dict())
    return made


def _scores(router: HeadRouter) -> list[Callable[[HeadCall], Tensor]]:
    """What gives each layer's scores (B, N, H) for a call; shared heads come first."""

    def of(layer: Any) -> Callable[[HeadCall], Tensor]:
        def scores(call: HeadCall) -> Tensor:
            mine = layer.scores(call)
            every = mine.new_full((*mine.shape[:2], layer.route.heads), torch.inf)
            every[..., layer.pool] = mine
            return every

        return scores

    return [of(layer) for layer in router.layers]


def _shrunk(metric: Tensor) -> Tensor:
    """Half M (L, C, C), half the multiple of the identity that has its trace: M of few tokens has sharp directions that another text
    does not share."""
    trace = metric.diagonal(dim1=1, dim2=2).mean(-1)
    return 0.5 * metric + 0.5 * trace[:, None, None] * torch.eye(metric.shape[-1])
