"""What is attached to a model: one `Controller` per stack of attention layers, one `Site` per layer.

`attach` pushes an `Intervention`; the controller hands every site what concerns its layer. When the last intervention
goes, the model is as it was: implementation name, hooks and attributes.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache

from headwise.attach import hook
from headwise.attach.edit import Applied, apply_output_edits, apply_query_edits, localize
from headwise.attach.hook import HeadCall
from headwise.attach.locate import Stack
from headwise.cache import HeadwiseCache, HeadwiseLayer
from headwise.edits import HeadEdits
from headwise.errors import AttachError, CacheError
from headwise.plan import HeadPlan, Pattern, SinkWindow


class LayerRouter(Protocol):
    """A router's module for one layer: gates (B, N, H) from what the call offers."""

    needs_hidden: bool

    def __call__(self, call: HeadCall) -> Tensor: ...


class Router(Protocol):
    """What `attach(router=...)` takes: modules per layer, and a loss to add in training."""

    def for_layer(self, layer: int) -> nn.Module | None: ...

    def check(self, stack: Stack) -> None: ...

    def loss(self) -> Tensor | None: ...


Observer = Callable[[HeadCall, Tensor], None]


@dataclass(frozen=True)
class Intervention:
    """What one `attach` asked for."""

    plan: HeadPlan | None = None
    edits: HeadEdits | None = None
    router: Router | None = None
    observers: tuple[Observer, ...] = ()


@dataclass
class Site:
    """One attention layer of an attached model."""

    controller: Controller
    layer: int
    base: Callable
    kv_heads: int  # on this rank
    first_head: int = 0  # global id of this rank's first query head
    patterns: tuple[Pattern, ...] | None = None
    edits: tuple[Applied, ...] = ()
    router: LayerRouter | None = None
    observers: tuple[Observer, ...] = ()
    hidden: Tensor | None = field(default=None, repr=False)

    @property
    def active(self) -> bool:
        """Is there anything to do but the base attention?"""
        return bool(self.patterns or self.edits or self.router or self.observers)

    def run(
        self, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, options: dict[str, object]
    ) -> tuple[Tensor, Tensor | None]:
        """One attention call with everything that is attached to this layer."""
        call = HeadCall(self, module, q, k, v, mask, options, past=k.shape[2] - q.shape[2], hidden=self.hidden)
        self.hidden = None
        if self.patterns is not None:
            self._open_cache(call)
        call.q = apply_query_edits(self.edits, call)
        out, weights = call._attend(call.q)
        if self.router is not None:
            out = out * self.router(call)[..., None].to(out.dtype)
        out = apply_output_edits(self.edits, call, out)
        for observe in self.observers:
            observe(call, out)
        return out, weights

    def _open_cache(self, call: HeadCall) -> None:
        """Under a plan: what the queries read comes from the ragged cache, or from the dense keys by pattern."""
        used = [name for name in hook.INEXPRESSIBLE if call.options.get(name) is not None]
        if used:
            raise AttachError(f"layer {self.layer}: the model passes {used} to its attention, which a KV plan cannot express")
        cache = self.controller.cache
        layer = cache.layers[self.layer] if isinstance(cache, HeadwiseCache) else None
        if isinstance(layer, HeadwiseLayer) and layer.pending is not None:
            if call.mask is not None and call.mask.shape[-1] != layer.seen + call.q.shape[2]:
                raise CacheError(
                    f"layer {self.layer}: the attention mask covers {call.mask.shape[-1]} columns, the cache and this "
                    f"input have {layer.seen} + {call.q.shape[2]}. Was the cache filled by another prompt?"
                )
            groups, past, start = layer.take(call.start if layer.seen == 0 else None)
            call.groups, call.past = groups, past
            call._start, call._start_known = start, True
            return
        if call.past:
            raise AttachError(f"layer {self.layer}: a plan needs a HeadwiseCache; an already filled {type(cache).__name__} was given")
        assert self.patterns is not None
        call.groups = hook.split_by_pattern(call.k, call.v, self.patterns)


class Controller:
    """Everything attached to one stack of one model."""

    def __init__(self, model: nn.Module, stack: Stack):
        self.stack = stack
        self.base = str(stack.config._attn_implementation).removeprefix(hook.PREFIX)  # type: ignore[attr-defined]
        self.cache: Cache | None = None
        self.attention_mask: Tensor | None = None
        self._start: tuple[Tensor | None] | None = None
        self.interventions: list[Intervention] = []
        self.sites = [self._site(layer, module) for layer, module in enumerate(stack.modules)]
        self._hooks: list[Any] = []

    def _site(self, layer: int, module: nn.Module) -> Site:
        rank, size = tensor_parallel(module)
        for name, count in (("query heads", self.stack.heads), ("kv heads", self.stack.kv_heads)):
            if count % size:
                raise AttachError(f"{count} {name} cannot be split over {size} tensor-parallel ranks")
        heads = self.stack.heads // size
        base = hook.base_function(module, self.base)
        return Site(self, layer, base, kv_heads=self.stack.kv_heads // size, first_head=rank * heads)

    # -- install and remove ------------------------------------------------------------------------------------------

    def install(self) -> None:
        """Switch the model to the headwise attention function."""
        name = hook.register(self.base)
        self.stack.config._attn_implementation = name  # type: ignore[attr-defined]
        for site, module in zip(self.sites, self.stack.modules, strict=True):
            module.__dict__["_headwise_site"] = site
        self.stack.owner.__dict__.setdefault("_headwise_controllers", {})[self.stack.pattern] = self
        self._hooks = [self.stack.owner.register_forward_pre_hook(self._before, with_kwargs=True)]
        self._hooks += [
            module.register_forward_pre_hook(functools.partial(_keep_hidden, site), with_kwargs=True)
            for site, module in zip(self.sites, self.stack.modules, strict=True)
        ]

    def remove(self) -> None:
        """Put everything back; a config shared with another attached stack stays switched until that one goes."""
        for handle in self._hooks:
            handle.remove()
        for module in self.stack.modules:
            module.__dict__.pop("_headwise_site", None)
        attached = self.stack.owner.__dict__.get("_headwise_controllers", {})
        attached.pop(self.stack.pattern, None)
        if not attached:
            self.stack.owner.__dict__.pop("_headwise_controllers", None)
            self.stack.config._attn_implementation = self.base  # type: ignore[attr-defined]

    def push(self, intervention: Intervention) -> None:
        """Add an intervention; refuses a second plan or router."""
        for name in ("plan", "router"):
            taken = [i for i in self.interventions if getattr(i, name) is not None]
            if getattr(intervention, name) is not None and taken:
                raise AttachError(f"this model already has a {name} attached; detach it first")
        if intervention.plan is not None and self.base not in hook.PLAN_BASES:
            raise AttachError(f"a KV plan needs attn_implementation in {hook.PLAN_BASES}, the model has {self.base!r}")
        if intervention.plan is not None and getattr(self.stack.config, "kv_lora_rank", None):
            raise AttachError("this model caches one latent for all heads (MLA): no kv head has a cache of its own to budget")
        if intervention.plan is not None and not self.stack.causal:
            raise AttachError(f"a KV plan needs causal attention; stack {self.stack.pattern} is bidirectional")
        self.interventions.append(intervention)
        try:
            self._distribute()
        except Exception:
            self.interventions.pop()
            self._distribute()
            raise

    def pop(self, intervention: Intervention) -> None:
        """Take an intervention away, in any order."""
        self.interventions = [i for i in self.interventions if i is not intervention]
        self._distribute()

    def _distribute(self) -> None:
        plan = next((i.plan for i in self.interventions if i.plan is not None), None)
        router = next((i.router for i in self.interventions if i.router is not None), None)
        for site, module in zip(self.sites, self.stack.modules, strict=True):
            first_kv = site.first_head * self.stack.kv_heads // self.stack.heads
            site.patterns = None
            if plan is not None:
                own = plan.layer(site.layer)[first_kv : first_kv + site.kv_heads]
                site.patterns = tuple(sliding(p, module) for p in own)
            site.edits = ()
            for intervention in self.interventions:
                if intervention.edits is not None:
                    site.edits += tuple(localize(intervention.edits, site, self.stack))
            site.observers = tuple(o for i in self.interventions for o in i.observers)
            site.router = router.for_layer(site.layer) if router is not None else None  # type: ignore[assignment]

    # -- before a forward pass ---------------------------------------------------------------------------------------

    def _before(self, owner: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        """Note the 2-D mask and the cache; under a plan give the model a cache that frees memory."""
        given = _bound(type(owner), args, kwargs)
        mask = given.get("attention_mask")
        self.attention_mask = mask if isinstance(mask, Tensor) and mask.ndim == 2 else None
        self._start = None
        self.cache = given.get("past_key_values")
        if self.sites[0].patterns is None:
            return None
        cache = self._plan_cache(self.cache, given, owner)
        if cache is self.cache:
            return None
        self.cache = cache
        args, kwargs = _replace_argument(type(owner), args, kwargs, "past_key_values", cache)
        return args, kwargs

    def _plan_cache(self, cache: Cache | None, given: dict, owner: nn.Module) -> Cache | None:
        """A HeadwiseCache in place of none or of an empty DynamicCache."""
        if isinstance(cache, HeadwiseCache):
            return cache
        if cache is None:
            wanted = given.get("use_cache")
            wanted = getattr(self.stack.config, "use_cache", False) if wanted is None else wanted
            return self._new_cache() if wanted and not torch.is_grad_enabled() else None
        if type(cache) is DynamicCache and cache.get_seq_length() == 0 and not getattr(cache, "offloading", False):
            return self._new_cache()
        raise AttachError(
            f"a KV plan cannot use the {type(cache).__name__} it was given (static, offloaded, quantised or already "
            "filled): pass HeadwiseCache(plan), or leave the cache to headwise"
        )

    def _new_cache(self) -> HeadwiseCache:
        plan = next(i.plan for i in self.interventions if i.plan is not None)
        patterns = tuple(site.patterns or () for site in self.sites)
        return HeadwiseCache(replace(plan, patterns=patterns, fingerprint=None))

    # -- where the tokens stand --------------------------------------------------------------------------------------

    def row_start(self, mask: Tensor | None) -> Tensor | None:
        """First real column of each row; from the 2-D mask if the model got one, else from the 4-D mask."""
        if self._start is None:
            self._start = (self._find_start(mask),)
        return self._start[0]

    def _find_start(self, mask: Tensor | None) -> Tensor | None:
        if self.attention_mask is not None:
            real = self.attention_mask.bool()
        elif isinstance(mask, Tensor) and mask.ndim == 4:
            real = hook.as_bool(mask).any(dim=2)[:, 0]
        else:
            return None
        start = real.to(torch.int8).argmax(dim=1)
        return start if bool(start.any()) else None

    def real_columns(self, past: int, count: int, batch: int) -> Tensor | None:
        """Which of the columns past..past+count are no padding, (B, count) bool; None if nothing says so."""
        if self.attention_mask is None or self.attention_mask.shape[1] < past + count:
            return None
        return self.attention_mask[:, past : past + count].bool().expand(batch, -1)


def _keep_hidden(site: Site, module: nn.Module, args: tuple, kwargs: dict) -> None:
    """Attention pre-hook: routers read the hidden states that enter the attention."""
    if site.router is not None and site.router.needs_hidden:
        site.hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]


def sliding(pattern: Pattern, module: nn.Module) -> Pattern:
    """A layer with a sliding window never reads beyond it: keeping all means keeping the window."""
    window = sliding_window(module)
    return SinkWindow(sinks=0, window=window) if pattern.keeps_all and window else pattern


def sliding_window(module: nn.Module) -> int | None:
    """Length of the model's own window in this layer, None where it reads everything."""
    config = getattr(module, "config", None)
    if hasattr(module, "sliding_window"):
        window = module.sliding_window
    elif getattr(config, "layer_types", None) or not getattr(config, "use_sliding_window", True):
        return None
    else:
        window = getattr(config, "sliding_window", None)
    return window if isinstance(window, int) and window > 0 else None


def tensor_parallel(module: nn.Module) -> tuple[int, int]:
    """(rank, size) of the tensor-parallel group that this attention module's projections are split over."""
    from torch.distributed.tensor import DTensor, Shard

    for parameter in module.parameters():
        if isinstance(parameter, DTensor) and any(isinstance(p, Shard) for p in parameter.placements):
            mesh = parameter.device_mesh
            return mesh.get_local_rank(), mesh.size()
    return 0, 1


@functools.cache
def _signature(cls: type[nn.Module]) -> inspect.Signature:
    return inspect.signature(cls.forward)


def _bound(cls: type[nn.Module], args: tuple, kwargs: dict) -> dict:
    """Arguments of a forward call by name."""
    names = [n for n in _signature(cls).parameters if n != "self"]
    return {**dict(zip(names, args, strict=False)), **kwargs}


def _replace_argument(cls: type[nn.Module], args: tuple, kwargs: dict, name: str, value: object) -> tuple[tuple, dict]:
    names = [n for n in _signature(cls).parameters if n != "self"]
    if name in names[: len(args)]:
        at = names.index(name)
        return (*args[:at], value, *args[at + 1 :]), kwargs
    return args, {**kwargs, name: value}


def controllers(model: nn.Module) -> Sequence[Controller]:
    """All controllers attached to a model."""
    return [c for m in model.modules() for c in m.__dict__.get("_headwise_controllers", {}).values()]
