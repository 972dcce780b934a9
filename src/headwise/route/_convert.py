"""From shares and scores to the heads of each layer: how many run, which are shared, which tokens may choose.

Letters: L layers, H query heads.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from headwise.addresses import Fingerprint
from headwise.attach import find_stack, fingerprint
from headwise.attach.projection import hidden_width
from headwise.checks import finite, whole
from headwise.errors import RouteError
from headwise.route._config import Kind, LayerRoute, RouterConfig
from headwise.route._presets import MoHPreset
from headwise.route._router import HeadRouter
from headwise.units import HeadScores, HeadSet

Rounding = Literal["half-up", "floor", "ceil"]
Shared = Literal["first", "importance", "none"]
StaticScope = Literal["layer", "global"]


def kept_heads(active: float, heads: int, rounding: Rounding = "half-up") -> int:
    """How many of `heads` heads a share keeps, at least one.

    >>> kept_heads(0.75, 9), kept_heads(0.75, 9, "floor"), kept_heads(0.5, 9)
    (7, 6, 5)
    """
    share = finite("active", active, RouteError)
    if not 0 < share <= 1:
        raise RouteError(f"active is {active}; it must be above 0 and at most 1")
    exact = round(share * heads, 9)  # 0.7 * 45 is 31.499999999999996
    rounded = {"half-up": math.floor(exact + 0.5), "floor": math.floor(exact), "ceil": math.ceil(exact)}
    if rounding not in rounded:
        raise RouteError(f"rounding is {rounding!r}; it must be half-up, floor or ceil")
    return max(1, rounded[rounding])


@dataclass(frozen=True, kw_only=True)
class Choice:
    """Which heads run: what `moh` was asked for, before it meets a model."""

    active: float = 0.75
    rounding: Rounding = "half-up"
    active_heads: Sequence[int] | None = None
    dense_layers: int = 0
    shared: Shared | None = None
    shared_count: int | None = None
    shared_heads: HeadSet | None = None
    importance: HeadScores | None = None
    scope: StaticScope = "layer"
    preset: MoHPreset | None = None

    def counts(self, model: Fingerprint) -> list[int]:
        """Heads that run in each layer."""
        whole("dense_layers", self.dense_layers, 0, RouteError, model.layers)
        if self.active_heads is None:
            counts = [kept_heads(self.active, model.heads, self.rounding)] * model.layers
        else:
            if len(self.active_heads) != model.layers:
                raise RouteError(f"active_heads names {len(self.active_heads)} layers, the model has {model.layers}")
            counts = [whole("a number of active heads", n, 1, RouteError, model.heads) for n in self.active_heads]
        return [model.heads] * self.dense_layers + counts[self.dense_layers :]

    def routes(self, model: Fingerprint) -> tuple[LayerRoute, ...]:
        """Shared heads and number of chosen ones, per layer."""
        if self.preset is not None:
            return self._preset(self.preset, model)
        made = []
        for layer, count in enumerate(self.counts(model)):
            shared = self._shared(model, layer, count)
            if len(shared) > count:
                raise RouteError(f"layer {layer}: {len(shared)} shared heads are more than the {count} that run")
            made.append(LayerRoute(heads=model.heads, shared=shared, routed=count - len(shared)))
        return tuple(made)

    def _preset(self, preset: MoHPreset, model: Fingerprint) -> tuple[LayerRoute, ...]:
        given = (self.active_heads, self.shared, self.shared_count, self.shared_heads, self.dense_layers or None)
        if any(value is not None for value in given):
            raise RouteError(
                "a preset names the heads that run and those that are shared: leave active_heads, dense_layers, shared, "
                "shared_count and shared_heads out"
            )
        return preset.routes(model.layers, model.heads)

    def static(self, model: Fingerprint) -> tuple[LayerRoute, ...]:
        """The control: the best heads by `importance`, as many as would be active, for all tokens alike."""
        scores = self._scores(model, "router='static'")
        counts = self.counts(model)
        if self.scope not in ("layer", "global"):
            raise RouteError(f"scope is {self.scope!r}; it must be 'layer' or 'global'")
        if self.scope == "layer":
            kept = [_best(scores.values[layer], count) for layer, count in enumerate(counts)]
        else:
            kept = self._global(scores, sum(counts))
        return tuple(LayerRoute(heads=model.heads, shared=heads) for heads in kept)

    def _global(self, scores: HeadScores, total: int) -> list[tuple[int, ...]]:
        """The `total` best heads of the whole model, and at least the best one of each layer and all of dense layers."""
        ranked = scores.values.clone()
        ranked[: self.dense_layers] = torch.inf
        ranked.scatter_(1, scores.values.argmax(dim=1, keepdim=True), torch.inf)
        order = ranked.flatten().sort(descending=True, stable=True).indices[:total].tolist()
        rows: list[list[int]] = [[] for _ in range(scores.layers)]
        for place in order:
            rows[place // scores.units].append(place % scores.units)
        return [tuple(sorted(row)) for row in rows]

    def _shared(self, model: Fingerprint, layer: int, count: int) -> tuple[int, ...]:
        if self.shared_heads is not None:
            if self.shared is not None or self.shared_count is not None:
                raise RouteError("shared_heads names the shared heads; leave shared and shared_count out")
            self.shared_heads.check(model)
            return self.shared_heads.by_layer().get(layer, ())
        how = self.shared or ("first" if self.importance is None else "importance")
        if how == "none":
            if self.shared_count:
                raise RouteError(
                    f"shared_count is {self.shared_count} with shared='none'; leave it out or choose shared heads"
                )
            return ()
        wanted = self.shared_count
        number = (
            min(model.heads // 2, count)
            if wanted is None
            else whole("shared_count", wanted, 0, RouteError, model.heads)
        )
        if how == "first":
            return tuple(range(number))
        if how != "importance":
            raise RouteError(f"shared is {how!r}; it must be first, importance or none")
        return _best(self._scores(model, "shared='importance'").values[layer], number)

    def _scores(self, model: Fingerprint, what: str) -> HeadScores:
        if self.importance is None:
            raise RouteError(f"{what} needs importance=, the HeadScores of the model, e.g. of headwise.score.taylor")
        self.importance.check(model)
        if self.importance.kind != "head":
            raise RouteError(f"importance is of kind {self.importance.kind!r}; it must score query heads")
        return self.importance

    def meta(self, routes: Sequence[LayerRoute]) -> dict[str, Any]:
        """What was asked for and what came out, for the adapter."""
        found: dict[str, Any] = {"asked": float(self.active), "kept": kept_text(routes)}
        if self.active_heads is not None:
            found["asked"] = "active_heads"
        if self.preset is not None:
            found["asked"], found["preset"] = self.preset.nominal, self.preset.name
        if self.importance is not None:
            found["importance"] = self.importance.method
        return found


def kept_text(routes: Sequence[LayerRoute]) -> str:
    """How many heads run, in words.

    >>> kept_text([LayerRoute(heads=4, shared=(0,), routed=2)] * 3)
    '3 of 4 (0.750)'
    """
    kept, heads = sum(route.active for route in routes), sum(route.heads for route in routes)
    same = len({route.active for route in routes}) == 1
    text = f"{routes[0].active} of {routes[0].heads}" if same else f"{kept} of {heads} over {len(routes)} layers"
    return f"{text} ({kept / heads:.3f})"


def _best(scores: torch.Tensor, count: int) -> tuple[int, ...]:
    """The `count` heads of largest score, ascending by number."""
    return tuple(sorted(scores.sort(descending=True, stable=True).indices[:count].tolist()))


def unfitted_router(
    model: Any, choice: Choice, kind: Kind, *, stack: str | None = None, seed: int = 0, **options: Any
) -> HeadRouter:
    """A router of this kind for a model, as it is before any training or fit; `options` are those of `RouterConfig`."""
    print_ = fingerprint(model, stack)
    routes = choice.static(print_) if kind == "static" else choice.routes(print_)
    width = hidden_width(find_stack(model, stack)) if kind in ("trained", "fitted") else 0
    meta = choice.meta(routes)
    config = RouterConfig(layers=routes, kind=kind, width=width, fingerprint=print_, meta=meta, **options)
    return HeadRouter(config, generator=torch.Generator().manual_seed(seed))
