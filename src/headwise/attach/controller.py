"""What is attached to a model: one `Controller` per stack of attention layers, one `Site` per layer.

`attach` pushes an `Intervention`; the controller hands every site what concerns its layer. When the last intervention
goes, the model is as it was: implementation name, hooks and attributes.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache

from headwise.arguments import CACHE, bound, with_cache
from headwise.attach import hook
from headwise.attach.capture import Capture
from headwise.attach.edit import localize
from headwise.attach.locate import Stack
from headwise.attach.site import Intervention, Site, concerns, in_order
from headwise.attention.sdpa import MASK_ELEMENTS
from headwise.cache import HeadwiseCache
from headwise.errors import AttachError, CacheError
from headwise.plan import HeadPlan, Pattern, SinkWindow


class Controller:
    """Everything attached to one stack of one model."""

    def __init__(self, model: nn.Module, stack: Stack):
        self.stack = stack
        self.base = str(stack.config._attn_implementation).removeprefix(hook.PREFIX)  # type: ignore[attr-defined]
        self._cache: weakref.ref[Cache] | None = None  # the caller's: nothing here may keep it alive
        self._mask: Tensor | str | None = None  # the 2-D mask that the model got, or what else it got
        self._padding: tuple[Tensor | None, Tensor | None] | None = None  # real columns and start, found once a pass
        self._plain: dict[int, bool] = {}  # masks of this pass, by identity: causality and padding alone?
        self._fits: HeadPlan | None = None  # the plan of a cache that was found to fit
        self.interventions: list[Intervention] = []
        self.sites = [self._site(layer, module) for layer, module in enumerate(stack.modules)]
        self._hooks: list[Any] = []
        self._hidden_hooks: list[Any] = []  # only where something reads the hidden states
        self._capture: Capture | None = None
        self.steps_everywhere = False  # decode steps by torch's operations where our kernels do not run: for tests

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
        self._watch_hidden()
        self._set_capture(any(i.capture for i in self.interventions))

    def remove(self) -> None:
        """Put everything back; a config shared with another attached stack stays switched until that one goes."""
        for handle in self._hooks + self._hidden_hooks:
            handle.remove()
        self._set_capture(False)
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
        if intervention.plan is not None and (why := hook.inexpressible(self.base, {})):
            raise AttachError(f"a KV plan cannot be attached, because {why}")
        if intervention.plan is not None and getattr(self.stack.config, "kv_lora_rank", None):
            raise AttachError(
                "this model caches one latent for all heads (MLA): no kv head has a cache of its own to budget"
            )
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
        self._fits = None
        plan = next((i.plan for i in self.interventions if i.plan is not None), None)
        router = next((i.router for i in self.interventions if i.router is not None), None)
        for site, module in zip(self.sites, self.stack.modules, strict=True):
            first_kv = site.first_head * self.stack.kv_heads // self.stack.heads
            site.patterns = None
            site.dense_prefill = plan is not None and plan.prefill == "dense"
            if plan is not None:
                own = plan.layer(site.layer)[first_kv : first_kv + site.kv_heads]
                site.patterns = tuple(sliding(p, module) for p in own)
            site.edits = ()
            for intervention in self.interventions:
                if intervention.edits is not None:
                    site.edits += tuple(localize(intervention.edits, site, self.stack))
            site.observers = tuple(o for i in self.interventions for o in i.observers if concerns(o, site.layer))
            site.transforms = in_order(
                tuple(t for i in self.interventions for t in i.transforms if concerns(t, site.layer)), site.layer
            )
            site.router = router.for_layer(site.layer) if router is not None else None  # type: ignore[assignment]
        if self._hooks:
            self._watch_hidden()
            self._set_capture(any(i.capture for i in self.interventions))

    def _set_capture(self, wanted: bool) -> None:
        """Decode steps as CUDA graphs, made anew whenever what is attached changes."""
        if self._capture is not None:
            self._capture.remove()
        owner = self.stack.owner
        self._capture = Capture(owner, lambda: self.cache) if wanted else None

    def _watch_hidden(self) -> None:
        """A pre-hook on the attention modules whose hidden states something reads; the others stay without a hook."""
        for handle in self._hidden_hooks:
            handle.remove()
        self._hidden_hooks = [
            module.register_forward_pre_hook(functools.partial(_keep_hidden, site), with_kwargs=True)
            for site, module in zip(self.sites, self.stack.modules, strict=True)
            if site.reads_hidden
        ]

    # -- before a forward pass ---------------------------------------------------------------------------------------

    def _before(self, owner: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        """Note the 2-D mask and the cache; under a plan give the model a cache that frees memory."""
        self._keep_switched()
        given = bound(owner, args, kwargs)
        self._mask, self._padding, self._plain = _brief(given.get("attention_mask")), None, {}
        cache = wanted = given.get(CACHE)
        if self.sites[0].patterns is not None:
            wanted = self._plan_cache(cache, given, owner)
        self._cache = None if wanted is None else weakref.ref(wanted)
        if isinstance(wanted, HeadwiseCache) and wanted.layers[0].seen:
            self._step(wanted, given)
        if wanted is cache:
            return None
        return with_cache(owner, args, kwargs, wanted)

    def _step(self, cache: HeadwiseCache, given: dict) -> None:
        """A token alone behind a prompt: its bookkeeping moves to the device, if that is possible and its mask hides nothing more."""
        fed = given.get("input_ids") if given.get("inputs_embeds") is None else given.get("inputs_embeds")
        steps, one = cache.steps, isinstance(fed, Tensor) and fed.shape[1] == 1
        simple = one and all(site.counts for site in self.sites)
        simple = simple and not torch.is_grad_enabled() and not torch.compiler.is_compiling()
        mask = self._mask
        if steps is not None and not (
            simple and (mask is None or (isinstance(mask, Tensor) and bool(mask[:, -1].all())))
        ):
            cache.settle()
        elif steps is not None and steps.left == 0:
            cache.settle()
            cache.begin_steps(everywhere=self.steps_everywhere)
        elif (
            steps is None and simple and cache.countable(everywhere=self.steps_everywhere) and self._only_padding(cache)
        ):
            cache.begin_steps(everywhere=self.steps_everywhere)

    def _only_padding(self, cache: HeadwiseCache) -> bool:
        """Does the mask hide nothing but what lies before each row's start?"""
        if self._mask is None:
            return True
        layer = cache.layers[0]
        if not isinstance(self._mask, Tensor) or self._mask.shape[1] != layer.seen + 1:
            return False
        columns = torch.arange(layer.seen + 1, device=self._mask.device)
        first = 0 if layer.start is None else layer.start[:, None]
        return bool((self._mask.bool() == (columns >= first)).all())

    @property
    def cache(self) -> Cache | None:
        """The cache of the forward pass at hand."""
        return None if self._cache is None else self._cache()

    def _keep_switched(self) -> None:
        """Another model with the same config object may have been detached; a change by the user is refused."""
        config, name = self.stack.config, hook.PREFIX + self.base
        now = config._attn_implementation  # type: ignore[attr-defined]
        if now == self.base:
            config._attn_implementation = name  # type: ignore[attr-defined]
        elif now != name:
            raise AttachError(
                f"the attention implementation became {now!r} while headwise was attached to {self.base!r}: detach first"
            )

    def _plan_cache(self, cache: Cache | None, given: dict, owner: nn.Module) -> Cache | None:
        """A HeadwiseCache in place of none or of an empty DynamicCache."""
        if isinstance(cache, HeadwiseCache):
            self._must_fit(cache)
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
        return HeadwiseCache(self._local_plan())

    def _local_plan(self) -> HeadPlan:
        """The attached plan as this rank and the model's own windows make it."""
        plan = next(i.plan for i in self.interventions if i.plan is not None)
        patterns = tuple(site.patterns or () for site in self.sites)
        return replace(plan, patterns=patterns, fingerprint=None)

    def _must_fit(self, cache: HeadwiseCache) -> None:
        """A given cache must keep what the attached plan says, or the plan would silently not be applied, and be whole."""
        first, last = cache.layers[0], cache.layers[-1]
        if first.pending is not None or last.pending is not None or first.seen != last.seen:
            raise CacheError(
                "a pass with this HeadwiseCache broke off between its layers, or headwise was not attached: reset() it"
            )
        if cache.plan is self._fits:
            return
        plan, local = next(i.plan for i in self.interventions if i.plan is not None), self._local_plan()
        if cache.plan.patterns not in (plan.patterns, local.patterns) or cache.plan.prefill != plan.prefill:
            raise AttachError(
                f"the model was given a HeadwiseCache of another plan ({cache.plan}) than the attached one ({plan})"
            )
        self._fits = cache.plan

    # -- where the tokens stand --------------------------------------------------------------------------------------

    def mask_width(self, mask: Tensor | None) -> int | None:
        """Columns of the mask as the model was given it, else of the layer's."""
        mask = self._mask if isinstance(self._mask, Tensor) else mask
        return None if mask is None else mask.shape[-1]

    def row_start(self, mask: Tensor | None) -> Tensor | None:
        """First real column of each row (B,); None without left padding."""
        return self._find_padding(mask)[1]

    def real_columns(self, mask: Tensor | None, past: int, count: int, batch: int) -> Tensor | None:
        """Which of the columns past..past+count are no padding, (B, count) bool; None if nothing says so."""
        real = self._find_padding(mask)[0]
        return None if real is None or real.shape[1] < past + count else real[:, past : past + count].expand(batch, -1)

    def says_nothing(self, mask: Tensor, start: Tensor | None, past: int) -> bool:
        """Is a layer's mask (B, 1, N, M) what causality and left padding say anyway? Looked at once a pass; layers share their masks."""
        if id(mask) not in self._plain:
            known = self._mask is None or isinstance(
                self._mask, Tensor
            )  # else the mask is all that says where rows start
            self._plain[id(mask)] = known and self.stack.causal and _only_causal(hook.as_bool(mask), start, past)
        return self._plain[id(mask)]

    def _find_padding(self, mask: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """Real columns and start, from the 2-D mask, or from a 4-D one if that is what the model was given."""
        if self._padding is None:
            real = self._real(mask)
            start = None if real is None else torch.where(real.any(1), real.to(torch.int8).argmax(1), real.shape[1])
            self._padding = real, start if start is not None and bool(start.any()) else None
        return self._padding

    def _real(self, mask: Tensor | None) -> Tensor | None:
        if isinstance(self._mask, Tensor):
            return self._mask.bool()
        if self._mask == "several":
            raise AttachError(
                "a static cache of a model with sliding windows hides where the rows start: use the default cache"
            )
        given = self._mask is not None and isinstance(mask, Tensor) and mask.ndim == 4
        return hook.as_bool(mask).any(dim=2)[:, 0] if given else None  # type: ignore[arg-type]


def _only_causal(mask: Tensor, start: Tensor | None, past: int) -> bool:
    """Does mask (B, 1, N, M) bool let query i, at column past + i, see just the columns start … past + i? Padding's own rows are free."""
    N, M = mask.shape[2:]
    columns, first = torch.arange(M, device=mask.device), 0 if start is None else start[:, None, None, None]
    rows = max(1, MASK_ELEMENTS // max(1, mask.shape[0] * M))
    for begin in range(0, N, rows):
        part = mask[:, :, begin : begin + rows]
        at = torch.arange(begin, begin + part.shape[2], device=mask.device)[:, None] + past
        if not bool(((part == ((columns <= at) & (columns >= first))) | (at < first)).all()):
            return False
    return True


def _brief(mask: object) -> Tensor | str | None:
    """A 2-D mask itself; of others only what they are, as they are large and the layers are given them anyway."""
    if isinstance(mask, Tensor) and mask.ndim == 2:
        return mask
    return None if mask is None else "several" if isinstance(mask, dict) and len(mask) > 1 else "one"


def _keep_hidden(site: Site, module: nn.Module, args: tuple, kwargs: dict) -> None:
    """Attention pre-hook: the hidden states that enter the attention, for the call that follows."""
    site.hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]


def sliding(pattern: Pattern, module: nn.Module) -> Pattern:
    """A layer with a sliding window never reads beyond it: keeping all means keeping the window.

    So does a compensation token: it would stand for tokens that the layer does not read.
    """
    window = sliding_window(module)
    return SinkWindow(sinks=0, window=window) if window and (pattern.keeps_all or pattern.compensated) else pattern


def sliding_window(module: nn.Module) -> int | None:
    """Length of the model's own window in this layer, None where it reads everything."""
    config = getattr(module, "config", None)
    window: object = getattr(module, "sliding_window", None)
    if not hasattr(module, "sliding_window") and not getattr(config, "layer_types", None):
        window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    return window if isinstance(window, int) and window > 0 else None


def tensor_parallel(module: nn.Module) -> tuple[int, int]:
    """(rank, size) of the tensor-parallel group that this attention module's projections are split over."""
    from torch.distributed.tensor import DTensor, Shard

    for parameter in module.parameters():
        if isinstance(parameter, DTensor) and any(isinstance(p, Shard) for p in parameter.placements):
            mesh = parameter.device_mesh
            return mesh.get_local_rank(), mesh.size()
    return 0, 1


def controllers(model: nn.Module) -> Sequence[Controller]:
    """All controllers attached to a model."""
    return [c for m in model.modules() for c in m.__dict__.get("_headwise_controllers", {}).values()]
