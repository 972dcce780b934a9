"""Stand in front of the one attention call of a diffusers attention module.

Such a module computes q, k and v in its processor and calls torch's `scaled_dot_product_attention`. While it runs, between two forward
hooks, that call is taken (`attention_door.py`), so processors, weights and classes stay as they are and every torch kernel serves. Which
tokens are image and which are text is read from each call, never from a table of counts.

Letters: B batch, H query heads, K kv heads, N queries, M keys, D head dim.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from headwise.attach.attention_door import DOOR, Mode
from headwise.attach.controller import Controller
from headwise.attach.diffusers import is_cross, is_joint
from headwise.attach.hook import HeadCall
from headwise.attach.locate import Stack
from headwise.attach.site import Site
from headwise.errors import AttachError

REMEDY = (
    "its attention does not end in torch's scaled_dot_product_attention (another attention backend, a linear attention, or a "
    "processor of its own kernel): call model.set_attention_backend('native'), or choose a model whose attention does"
)
PROBE_IMAGE, PROBE_TEXT = 5, 3
SDPA = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")


def sdpa(
    module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """torch's kernel in the signature of transformers' attention functions: out (B, N, H, D)."""
    out = F.scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=mask,
        dropout_p=float(options.get("dropout") or 0.0),
        is_causal=bool(options.get("is_causal")),
        scale=options.get("scaling"),
        enable_gqa=q.shape[1] != k.shape[1],
    )
    return out.transpose(1, 2), None


_PROVED: weakref.WeakKeyDictionary[nn.Module, dict[tuple, bool | None]] = weakref.WeakKeyDictionary()
"""Kinds of attention modules of each model that are known to be reached, and whether their joint attention puts the image first
(None: unknown): a sampler attaches at every step, and neither proof nor order may cost it a wait for the device."""


_BY_DOOR: weakref.WeakKeyDictionary[nn.Module, set[tuple]] = weakref.WeakKeyDictionary()
"""Kinds of which the proof has shown that they look torch's attention up; the others are followed operation by operation."""


class _Watch:
    """Hands the first attention call of one module to its site; later calls of the same module (IP-Adapters) pass."""

    def __init__(self, site: Site, module: nn.Module, image: Tensor | None, text: Tensor | None):
        self.site, self.module, self.image, self.text = site, module, image, text
        self.seen = 0
        self._leave: Callable[[], None] | None = None

    def enter(self, by_door: bool) -> None:
        """From now on the attention calls of this thread come here."""
        if by_door and not torch.compiler.is_compiling():
            self._leave = functools.partial(DOOR.leave, DOOR.enter(self))
        else:
            mode = Mode(self)
            mode.__enter__()
            self._leave = functools.partial(mode.__exit__, None, None, None)

    def leave(self) -> None:
        """No longer."""
        if self._leave is not None:
            self._leave()

    def take(self, attention: Callable[..., Tensor], args: tuple, kwargs: dict) -> Tensor:
        """An attention call of the module."""
        self.seen += 1
        if self.seen > 1 or not self.site.active:
            return attention(*args, **kwargs)
        given = {**dict(zip(SDPA, args, strict=False)), **kwargs}
        q, k, v = given["query"], given["key"], given["value"]
        options = {
            "scaling": given.get("scale"),
            "is_causal": bool(given.get("is_causal")),
            "dropout": given.get("dropout_p") or 0.0,
            "segments": functools.partial(self._segments, q.shape[2], v),  # few interventions ask
            "cross": self.text is not None and self.text is not self.image and not is_joint(self.module),
        }
        out, _ = self.site.run(self.module, q, k, v, _four_dimensional(given.get("attn_mask"), q), options)
        return out.transpose(1, 2)

    def _segments(self, N: int, v: Tensor) -> dict[str, slice]:
        controller = self.site.controller
        assert isinstance(controller, DiffusersController)
        if v.shape[2] != N or self.image is None:
            return {}
        if is_joint(self.module) and self.text is not None:
            n, m = self.image.shape[1], self.text.shape[1]
            return _slices(controller.image_first(self.module, self.image, v, m), n, m) if n + m == N else {}
        if controller.joint is not None and controller.image_tokens != N:  # a single stream behind joint blocks
            first, m = controller.joint
            return _slices(first, N - m, m)
        return {"image": slice(0, N), "text": slice(0, 0)} if controller.image_tokens == N else {}


def _slices(image_first: bool | None, image: int, text: int) -> dict[str, slice]:
    if image_first is None or image < 1:
        return {}
    if image_first:
        return {"image": slice(0, image), "text": slice(image, image + text)}
    return {"text": slice(0, text), "image": slice(text, text + image)}


@torch.no_grad()
def _image_first(module: nn.Module, image: Tensor, v: Tensor, text: int) -> bool | None:
    """Whether v = [image, text] or [text, image]: the place at which the first image token's value stands; None if at neither.

    Both places hold image tokens or text tokens of one batch row, so the nearer one is the place, if it is near at all.
    """
    to_v, fused = getattr(module, "to_v", None), getattr(module, "to_qkv", None)
    if fused is not None and getattr(module, "fused_projections", False):
        own = fused(image[:1, :1])[..., -v.shape[1] * v.shape[3] :]
    elif to_v is not None:
        own = to_v(image[:1, :1])
    else:
        return None
    own = own.flatten().float()
    gaps = [(v[0, :, at].flatten().float() - own).norm() / own.norm().clamp(min=1e-12) for at in (0, text)]
    best = int(gaps[1] < gaps[0])
    if float(gaps[best]) > 0.05:  # the values were normalised or mixed after their projection
        return None
    return best == 0


def _four_dimensional(mask: Tensor | None, q: Tensor) -> Tensor | None:
    """The mask as (B or 1, 1 or H, N, M)."""
    if mask is None:
        return None
    mask = mask[(None,) * (4 - mask.ndim)] if mask.ndim < 3 else mask[:, None] if mask.ndim == 3 else mask
    return mask.expand(-1, -1, q.shape[2], -1)


class _NotReached(AttachError):
    """A module ran without a call of torch's attention that was seen."""


class DiffusersSite(Site):
    """One attention module of a diffusers model; in cross-attention the queries have no keys of their own."""

    def _columns(self, q: Tensor, k: Tensor) -> tuple[int, int]:
        return max(k.shape[2] - q.shape[2], 0), 0

    def run(
        self, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, options: dict[str, object]
    ) -> tuple[Tensor, Tensor | None]:
        """One attention call with everything that is attached to this layer."""
        if options["cross"] and any(applied.edit.op == "mix_v" for applied in self.edits):
            raise AttachError(
                f"layer {self.layer}: mix_v needs self-attention; this module reads other tokens (the text)"
            )
        if k.shape[1] != self.kv_heads:
            k, v = self._own_heads(module, q, k, v)
        return super().run(module, q, k, v, mask, options)

    def _own_heads(self, module: nn.Module, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """The K heads of keys and values of a processor that repeats them for grouped queries; AttachError if it does something else."""
        G = q.shape[1] // self.kv_heads
        if not module.__dict__.get("_headwise_repeats"):
            alike = k.shape[1] == q.shape[1] and torch.equal(v[:, ::G, :1], v[:, G - 1 :: G, :1])
            if not alike:
                raise AttachError(
                    f"layer {self.layer}: {k.shape[1]} heads of keys reach the attention, the projections make {self.kv_heads}, and they "
                    "are not repeated head by head: which query reads which is unknown"
                )
            module.__dict__["_headwise_repeats"] = True
        return k[:, ::G], v[:, ::G]


class DiffusersController(Controller):
    """A stack of attention modules that call torch's attention: hooks instead of a registered attention function."""

    remedy = REMEDY

    def __init__(self, model: nn.Module, stack: Stack):
        self.joint: tuple[bool, int] | None = None  # (image first, text tokens) of the forward pass at hand
        self.image_tokens: int | None = None  # of the forward pass at hand, where the input is a grid
        self._watching: dict[int, _Watch] = {}
        super().__init__(model, stack)

    def _site(self, layer: int, module: nn.Module) -> Site:
        return DiffusersSite(self, layer, sdpa, kv_heads=self.stack.kv_heads, first_head=0)

    def install(self) -> None:
        """Hang the hooks, then prove on random tokens that every kind of attention module here can be changed."""
        self.stack.owner.__dict__.setdefault("_headwise_controllers", {})[self.stack.pattern] = self
        self._hooks = [self.stack.owner.register_forward_pre_hook(self._before, with_kwargs=True)]
        for site, module in zip(self.sites, self.stack.modules, strict=True):
            module.__dict__["_headwise_site"] = site
        try:
            self._prove()
        except Exception:
            self.remove()
            raise
        self._watch_hidden()

    def remove(self) -> None:
        """Take the hooks away; nothing else was changed."""
        for handle in self._hooks + self._hidden_hooks:
            handle.remove()
        for module in self.stack.modules:
            module.__dict__.pop("_headwise_site", None)
            module.__dict__.pop("_headwise_repeats", None)
        attached = self.stack.owner.__dict__.get("_headwise_controllers", {})
        attached.pop(self.stack.pattern, None)
        if not attached:
            self.stack.owner.__dict__.pop("_headwise_controllers", None)

    def _watch_hidden(self) -> None:
        """Hooks on the modules in which something is to be done; the others run as if nothing were attached."""
        super()._watch_hidden()
        active = [(site, module) for site, module in zip(self.sites, self.stack.modules, strict=True) if site.active]
        self._hidden_hooks += [handle for site, module in active for handle in self._hang(site, module)]
        joint = next((module for module in self.stack.modules if is_joint(module)), None)
        if joint is not None and not all(is_joint(module) for _, module in active):
            self._hidden_hooks.append(joint.register_forward_pre_hook(self._note_text, with_kwargs=True))

    def _hang(self, site: Site, module: nn.Module) -> list[Any]:
        """The two hooks of one module."""
        by_door = self._kind(module) in _BY_DOOR.get(self.stack.owner, ())
        return [
            module.register_forward_pre_hook(self._enter(site, by_door), with_kwargs=True),
            module.register_forward_hook(self._leave(site), always_call=True),
        ]

    def _note_text(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        """For a single stream behind joint blocks: how many text tokens there are, and on which side."""
        text = kwargs.get("encoder_hidden_states", args[1] if len(args) > 1 else None)
        first = _PROVED.get(self.stack.owner, {}).get(self._kind(module))
        self.joint = (first, text.shape[1]) if first is not None and isinstance(text, Tensor) else None

    def image_first(self, module: nn.Module, image: Tensor, v: Tensor, text: int) -> bool | None:
        """Does this kind of joint attention put image tokens before text tokens? Read from a call if the proof has not found it."""
        known = _PROVED.setdefault(self.stack.owner, {})
        kind = self._kind(module)
        if known.get(kind) is None:
            known[kind] = _image_first(module, image, v, text)
        return known[kind]

    def _before(self, owner: nn.Module, args: tuple, kwargs: dict) -> None:
        """Note how many image tokens a grid of latents makes; other inputs are counted where they are attended to."""
        self.joint = None
        latents = kwargs.get("hidden_states", args[0] if args else None)
        patch = getattr(getattr(owner, "config", None), "patch_size", None)
        grid = isinstance(latents, Tensor) and latents.ndim == 4 and isinstance(patch, int)
        self.image_tokens = (latents.shape[-2] // patch) * (latents.shape[-1] // patch) if grid else None  # type: ignore[union-attr]

    def _enter(self, site: Site, by_door: bool) -> Callable:
        def enter(module: nn.Module, args: tuple, kwargs: dict) -> None:
            image = kwargs.get("hidden_states", args[0] if args else None)
            text = kwargs.get("encoder_hidden_states", args[1] if len(args) > 1 else None)
            watch = _Watch(site, module, image if isinstance(image, Tensor) and image.ndim == 3 else None, text)
            self._watching[site.layer] = watch
            watch.enter(by_door)

        return enter

    def _leave(self, site: Site) -> Callable:
        def leave(module: nn.Module, args: tuple, output: Any) -> None:
            watch = self._watching.pop(site.layer, None)
            if watch is None:
                return
            watch.leave()
            if output is not None and not watch.seen and site.active:
                raise _NotReached(
                    f"layer {site.layer} of {type(self.stack.owner).__name__} was not reached: {self.remedy}"
                )

        return leave

    # -- the proof ---------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _prove(self) -> None:
        """An edit of all heads changes what each kind of module gives for random tokens; otherwise AttachError."""
        proved = _PROVED.setdefault(self.stack.owner, {})
        for site, module in zip(self.sites, self.stack.modules, strict=True):
            kind = self._kind(module)
            if kind in proved or next(module.parameters()).device.type == "meta":
                continue
            by_door = _BY_DOOR.setdefault(self.stack.owner, set())
            by_door.add(kind)
            try:
                proved[kind] = self._prove_one(site, module)
            except _NotReached:  # it may hold on to the function itself
                by_door.discard(kind)
                proved[kind] = self._prove_one(site, module)

    def _kind(self, module: nn.Module) -> tuple:
        """What decides whether a module is reached."""
        processor = module.processor
        return type(module), type(processor), str(getattr(processor, "_attention_backend", None)), is_joint(module)

    def _try(self, module: nn.Module) -> Any:
        """What the module gives for random tokens."""
        return module(**_probe(module))

    def _prove_one(self, site: Site, module: nn.Module) -> bool | None:
        """The proof for one module; gives whether it puts image tokens first, None where that is no question or no answer."""
        kept = site.transforms, site.edits, site.observers, site.router
        found: list[bool | None] = [None]

        def look(call: HeadCall, attend: Callable[[], Tensor]) -> Tensor:
            if is_joint(module):
                found.append(_image_first(module, _probe(module)["hidden_states"], call.v, PROBE_TEXT))
            return attend()

        outputs, handles = [], self._hang(site, module)
        try:
            for transform in (look, _nothing_comes_out):
                site.transforms, site.edits, site.observers, site.router = (transform,), (), (), None
                outputs.append(_tensors(self._try(module)))
        except AttachError:
            raise
        except Exception:  # it needs more than hidden states: its first real call is checked instead, see _leave
            _BY_DOOR[self.stack.owner].discard(self._kind(module))
            return None
        finally:
            site.transforms, site.edits, site.observers, site.router = kept
            for handle in handles:
                handle.remove()
        if all(torch.equal(a, b) for a, b in zip(*outputs, strict=True)):
            raise AttachError(
                f"layer {site.layer} of {type(self.stack.owner).__name__}: zeroing all heads of a {type(module).__name__} changes "
                f"nothing. Its output projection is zero, or {self.remedy}"
            )
        return found[-1]


def _nothing_comes_out(call: HeadCall, attend: Callable[[], Tensor]) -> Tensor:
    return torch.zeros_like(attend())


def _probe(module: nn.Module) -> dict[str, Tensor]:
    """Random tokens for one attention module: a few of its own, and of the text where it reads text."""
    generator = torch.Generator().manual_seed(0)
    weight: Any = module.to_q.weight  # type: ignore[union-attr]
    dtype = weight.dtype if weight.is_floating_point() else torch.float32

    def tokens(count: int, width: Any) -> Tensor:
        return torch.randn(1, count, int(width), generator=generator).to(weight.device, dtype)

    inputs = {"hidden_states": tokens(PROBE_IMAGE, module.to_q.in_features)}  # type: ignore[union-attr]
    if is_joint(module):
        inputs["encoder_hidden_states"] = tokens(PROBE_TEXT, module.add_k_proj.in_features)  # type: ignore[union-attr]
    elif is_cross(module):
        inputs["encoder_hidden_states"] = tokens(PROBE_TEXT, module.to_k.in_features)  # type: ignore[union-attr]
    return inputs


def _tensors(output: Any) -> list[Tensor]:
    return [item for item in (output if isinstance(output, tuple | list) else (output,)) if isinstance(item, Tensor)]
