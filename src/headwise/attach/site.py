"""One attention layer of an attached model, and what can be asked of it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from torch import Tensor, nn
from transformers.cache_utils import DynamicCache

from headwise.attach.edit import Applied, apply_output_edits, apply_query_edits
from headwise.attach.hook import HeadCall
from headwise.attach.locate import Stack
from headwise.attention.gating import gated
from headwise.cache import HeadwiseCache, HeadwiseLayer
from headwise.edits import HeadEdits
from headwise.errors import AttachError, CacheError
from headwise.plan import Full, HeadPlan, Pattern
from headwise.units import Fingerprint

if TYPE_CHECKING:
    from headwise.attach.controller import Controller


class LayerRouter(Protocol):
    """A router's module for one layer: gates (B, N, H) from what the call offers.

    An attribute `fill` (H, D), where it has one that is not None, takes the place of a head's output as far as its gate is
    below 1.
    """

    needs_hidden: bool

    def __call__(self, call: HeadCall) -> Tensor: ...


class Router(Protocol):
    """What `attach(router=...)` takes: a module per layer (None: all gates 1), and a loss to add in training.

    `attach` calls `check` and `install` before the first forward pass, and `uninstall` when the router goes or when
    attaching fails after `install`. `install` hangs what has parameters into the model, so that optimizers and `.to()`
    reach it, and changes nothing if it raises; `uninstall` leaves the model as it was.
    """

    def for_layer(self, layer: int) -> nn.Module | None: ...

    def check(self, fingerprint: Fingerprint) -> None: ...

    def install(self, model: nn.Module, stack: Stack) -> None: ...

    def uninstall(self, model: nn.Module, stack: Stack) -> None: ...

    def loss(self) -> Tensor | None: ...


Observer = Callable[[HeadCall, Tensor], None]

Transform = Callable[[HeadCall, Callable[[], Tensor]], Tensor]
"""What `attach(transforms=...)` takes: from the call, and a function that computes the head outputs as they would be without it,
the head outputs (B, N, H, D) that take their place. Gradients flow through it; it need not call the function."""


def concerns(part: object, layer: int) -> bool:
    """Does an observer or transform act in this layer? One with an attribute `in_layers` in those alone, any other in all."""
    layers = getattr(part, "in_layers", None)
    return layers is None or layer in layers


def in_order(transforms: tuple[Transform, ...], layer: int) -> tuple[Transform, ...]:
    """Innermost first: what makes the layer's attention itself (a true attribute `own_attention`), then the others as attached.

    Raises AttachError for two of the former: neither could work on the other's result.
    """
    own = [t for t in transforms if getattr(t, "own_attention", False)]
    if len(own) > 1:
        raise AttachError(f"layer {layer}: two transforms both make this layer's attention anew; attach one of them")
    return (*own, *(t for t in transforms if t not in own))


@dataclass(frozen=True)
class Intervention:
    """What one `attach` asked for."""

    plan: HeadPlan | None = None
    edits: HeadEdits | None = None
    router: Router | None = None
    observers: tuple[Observer, ...] = ()
    transforms: tuple[Transform, ...] = ()
    capture: bool = False


@dataclass
class Site:
    """One attention layer of an attached model."""

    controller: Controller
    layer: int
    base: Callable
    kv_heads: int  # on this rank
    first_head: int = 0  # global id of this rank's first query head
    patterns: tuple[Pattern, ...] | None = None
    dense_prefill: bool = False  # the plan reads a prompt densely, with a cache and without one
    edits: tuple[Applied, ...] = ()
    router: LayerRouter | None = None
    observers: tuple[Observer, ...] = ()
    transforms: tuple[Transform, ...] = ()
    hidden: Tensor | None = field(default=None, repr=False)

    @property
    def active(self) -> bool:
        """Is there anything to do but the base attention?"""
        return bool(self.patterns or self.edits or self.router or self.observers or self.transforms)

    @property
    def counts(self) -> bool:
        """Can a decode step do without the host's view of the keys, and of where tokens stand? What can says so by `counts`."""
        parts = (*self.edits, *self.observers, *self.transforms)
        return not self.router and all(getattr(part, "counts", False) for part in parts)

    @property
    def reads_hidden(self) -> bool:
        """Does anything attached, by a true attribute `needs_hidden`, ask for the input of the attention module?"""
        return any(getattr(part, "needs_hidden", False) for part in (self.router, *self.observers, *self.transforms))

    def run(
        self, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, options: dict[str, object]
    ) -> tuple[Tensor, Tensor | None]:
        """One attention call with everything that is attached to this layer."""
        past, first = self._columns(q, k)
        call = HeadCall(self, module, q, k, v, mask, options, past=past, first_column=first, hidden=self.hidden)
        self.hidden = None
        if self.patterns is not None:
            self._open_cache(call)
        if self.edits:
            q = apply_query_edits(self.edits, call)
        out, weights = self._attend(call, q) if self.router is None else self._routed(self.router, call, q)
        if self.edits:
            out = apply_output_edits(self.edits, call, out)
        for observe in self.observers:
            observe(call, out)
        return out, weights

    def _routed(self, router: LayerRouter, call: HeadCall, q: Tensor) -> tuple[Tensor, Tensor | None]:
        """g·O, or g·O + (1 − g)·F where the router names vectors F (H, D) that stand in for heads that do not run.

        Where a kernel of ours pays, heads leave out the queries whose gate is 0; not where a transform makes the attention, nor
        where a gate of 0 has a gradient (`gradient_at_zero` of the router).
        """
        gates, weights = router(call), None
        wanted = self.transforms or getattr(router, "gradient_at_zero", False)
        out = None if wanted else call.attend_served(q, gates)
        if out is None:
            out, weights = self._attend(call, q)
            out = gated(out, gates)
        fill = getattr(router, "fill", None)
        if fill is None:
            return out, weights
        rest = (1 - gates[..., None]).to(out.dtype)
        return out + rest * fill[self.first_head : self.first_head + out.shape[2]].to(out.dtype), weights

    def _columns(self, q: Tensor, k: Tensor) -> tuple[int, int]:
        """(columns before the first query, column of the first key): a sliding cache lets old columns go, a static one is longer."""
        cache, N, M = self.controller.cache, q.shape[2], k.shape[2]
        layers = cache.layers if isinstance(cache, DynamicCache) else ()
        if self.layer < len(layers) and getattr(layers[self.layer], "keys", None) is k:
            return (
                M - N,
                0,
            )  # the layer hands over all that it holds: known without asking, in every layer of every step
        seen = 0 if cache is None or isinstance(cache, HeadwiseCache) else int(cache.get_seq_length(self.layer))
        return (M - N, 0) if seen < N else (seen - N, max(0, seen - M))

    def _attend(self, call: HeadCall, q: Tensor) -> tuple[Tensor, Tensor | None]:
        """The attention of queries `q`, or what the transforms make of it, the first attached innermost."""
        if not self.transforms:
            return call._attend(q)
        compute: Callable[[], Tensor] = functools.partial(call.attend, q)
        for transform in self.transforms:
            compute = functools.partial(transform, call, compute)
        out = compute()
        B, H, N, _ = call.q.shape
        wanted = (B, N, H, call.v.shape[-1])
        if out.shape != wanted:
            raise AttachError(
                f"layer {self.layer}: a transform gave {tuple(out.shape)}; head outputs are (B, N, H, D) = {wanted}"
            )
        return out.contiguous(), None

    def _open_cache(self, call: HeadCall) -> None:
        """Under a plan: what the queries read comes from the ragged cache, or from the dense keys by pattern."""
        call.need_expressible("a KV plan")
        cache = self.controller.cache
        layer = cache.layers[self.layer] if isinstance(cache, HeadwiseCache) else None
        if isinstance(layer, HeadwiseLayer) and layer.pending is not None:
            width = self.controller.mask_width(call.mask)
            if width is not None and width != layer.seen + call.q.shape[2]:
                layer.pending = None
                raise CacheError(
                    f"layer {self.layer}: the attention mask covers {width} columns, the cache and this "
                    f"input have {layer.seen} + {call.q.shape[2]}. Was the cache filled by another prompt?"
                )
            call._start, call._start_known = call.start if layer.needs_start else layer.start, True
            call.past = layer.seen
            stepping = cache is not None and cache.steps is not None  # then nobody reads the mask
            if (
                call.mask is not None
                and not stepping
                and self.controller.says_nothing(call.mask, call._start, call.past)
            ):
                call.mask = None  # the groups say the same, and kernels that take no mask may serve
            call.groups, _, call._start = layer.take(call._start, call)
            call.table = layer.table
            return
        if call.past:
            raise AttachError(
                f"layer {self.layer}: a plan needs a HeadwiseCache; an already filled {type(cache).__name__} was given"
            )
        assert self.patterns is not None
        reads = [Full()] * len(self.patterns) if self.dense_prefill else self.patterns
        call.groups = call.dense_groups(reads)
