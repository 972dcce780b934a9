"""Reach every routed expert of a transformers model: read, switch off, force on, favour, scale, re-route, record.

headwise stands between router and experts: a pre-hook of the experts module sees (hidden, index, weight) and may hand
on others; a hook of the router sees its logits. Nothing is attached to a layer that nothing concerns.

Letters: B rows, N columns, T = B·N tokens, C width, E experts, k chosen a token.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from headwise.arguments import CACHE, argument_names, bound
from headwise.attach.expert_call import ExpertCall, apply_edits
from headwise.attach.expert_record import ExpertRecord
from headwise.attach.expert_stack import ExpertLayer, ExpertStack, find_experts
from headwise.attach.locate import fingerprint
from headwise.errors import AttachError, EditError, UnitError
from headwise.expert_edits import ExpertEdits
from headwise.selection import TokenSelection

__all__ = ["ExpertCall", "ExpertRecord", "ExpertStack", "attach_experts", "find_experts", "observe_experts"]

ATTRIBUTE = "_headwise_experts"
Transform = Callable[["ExpertCall"], "tuple[Tensor, Tensor] | None"]
Observer = Callable[["ExpertCall"], None]


@dataclass
class TokenPlaces:
    """Where the tokens of a forward pass stand: positions (B, N) among the real tokens of their rows, -1 for padding."""

    positions: Tensor
    decoding: bool
    fresh_rows: bool
    seen: set[int] = field(default_factory=set)


class _Controller:
    """Everything attached to the experts of one model."""

    def __init__(self, stack: ExpertStack):
        self.stack = stack
        self.attachments: list[ExpertAttachment] = []
        self.logits: dict[int, Tensor] = {}
        self.now: TokenPlaces | None = None
        self.handles: list[Any] = []

    @property
    def edits(self) -> list[ExpertEdits]:
        """Edits of all attachments that have any."""
        return [a.edits for a in self.attachments if a.edits is not None and len(a.edits)]

    @property
    def transforms(self) -> list[Transform]:
        """Transforms, oldest first."""
        return [transform for a in self.attachments for transform in a.transforms]

    @property
    def observers(self) -> list[Observer]:
        """Observers, oldest first."""
        return [observer for a in self.attachments for observer in a.observers]

    def refresh(self) -> None:
        """Hook the layers that something concerns, and no others."""
        for handle in self.handles:
            handle.remove()
        self.handles, self.logits = [], {}
        wanted = [layer for layer in self.stack.layers if self._concerned(layer.layer)]
        if not (self.edits or self.transforms or self.observers):
            self.stack.owner.__dict__.pop(ATTRIBUTE, None)
            return
        self.stack.owner.__dict__[ATTRIBUTE] = self
        self.handles = [
            self.stack.owner.register_forward_pre_hook(self._before, with_kwargs=True),
            self.stack.owner.register_forward_hook(functools.partial(self._after, wanted)),
        ]
        for layer in wanted:
            self.handles += [
                layer.router.register_forward_hook(functools.partial(self._routed, layer)),
                layer.experts.register_forward_pre_hook(functools.partial(self._enter, layer), with_kwargs=True),
            ]

    def _concerned(self, layer: int) -> bool:
        named = any(unit.layer == layer for edits in self.edits for edit in edits for unit in edit.units)
        return named or bool(self.transforms or self.observers)

    # -- hooks -------------------------------------------------------------------------------------------------------

    def _before(self, owner: nn.Module, args: tuple, kwargs: dict) -> None:
        self.now = locate_tokens(bound(owner, args, kwargs))

    def _after(self, wanted: list[ExpertLayer], owner: nn.Module, args: tuple, output: Any) -> None:
        missed = {layer.layer for layer in wanted} - (self.now.seen if self.now else set())
        self.logits = {}
        if missed:
            raise AttachError(
                f"the experts of layers {sorted(missed)} were never called, so nothing could be applied there"
            )

    def _routed(self, layer: ExpertLayer, router: nn.Module, args: tuple, output: Any) -> None:
        for tensor in output if isinstance(output, tuple) else (output,):
            if isinstance(tensor, Tensor) and tensor.is_floating_point() and tensor.shape[-1] == self.stack.experts:
                self.logits[layer.layer] = tensor.reshape(-1, self.stack.experts)
                return

    def _enter(self, layer: ExpertLayer, experts: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        if self.now is None:
            raise AttachError("the experts ran outside the model that they were attached to")
        given = bound(experts, args, kwargs)
        hidden, index, weight = (given[name] for name in argument_names(experts)[:3])
        if index.numel() and (index.ndim != 2 or weight.shape != index.shape):
            raise AttachError(
                f"layer {layer.layer}: experts were called with {tuple(index.shape)}, {tuple(weight.shape)}"
            )
        now, logits = self.now, self.logits.pop(layer.layer, None)
        call = ExpertCall(
            layer.layer, hidden, logits, index, weight, now.positions, now.decoding, now.fresh_rows, layer.router,
            (index, weight),
        )  # fmt: skip
        call = self._changed(call)
        if layer.layer not in now.seen:  # gradient checkpointing runs a layer twice
            now.seen.add(layer.layer)
            for observer in self.observers:
                observer(call)
        if call.index is index and call.weight is weight:
            return None
        return (hidden, call.index, call.weight), {}

    def _changed(self, call: ExpertCall) -> ExpertCall:
        for transform in self.transforms:
            result = transform(call)
            if result is not None:
                call = replace(call, index=result[0].to(call.index.dtype), weight=result[1].to(call.weight.dtype))
        edits = [
            (edit, [unit.index for unit in edit.units if unit.layer == call.layer])
            for group in self.edits
            for edit in group
        ]
        active = [(edit, experts) for edit, experts in edits if experts]
        return apply_edits(call, active) if active else call


def locate_tokens(given: dict) -> TokenPlaces:
    """Where the tokens of a forward pass stand, from the arguments (as `bound` gives them) of the module that runs the layers."""
    states = given.get("input_ids") if given.get("input_ids") is not None else given.get("inputs_embeds")
    if states is None:
        raise AttachError("the model was called with neither input_ids nor inputs_embeds: tokens have no address")
    (B, N), device = states.shape[:2], states.device
    cache, mask = given.get(CACHE), given.get("attention_mask")
    past = int(cache.get_seq_length()) if cache is not None else 0
    columns = past + torch.arange(N, device=device)
    if isinstance(mask, dict):
        mask = next((m for m in mask.values() if isinstance(m, Tensor)), None)
    if isinstance(mask, Tensor) and mask.ndim == 4:
        seen = mask if mask.dtype == torch.bool else mask == 0
        mask = seen.any(dim=2)[:, 0]
    if not isinstance(mask, Tensor):
        positions = columns.expand(B, -1)
    else:
        real = mask.bool()
        if real.shape[1] < past + N:
            raise AttachError(f"attention_mask has {real.shape[1]} columns for {past} cached and {N} new tokens")
        places = torch.where(real, real.long().cumsum(1) - 1, -1)
        positions = places[:, past : past + N].expand(B, -1)
    return TokenPlaces(positions, decoding=N == 1 and past > 0, fresh_rows=past == 0)


# -- attaching ---------------------------------------------------------------------------------------------------------


class ExpertAttachment:
    """What `attach_experts` returns: a context manager, or a lasting handle with `detach()`."""

    def __init__(
        self,
        controller: _Controller,
        edits: ExpertEdits | None,
        transforms: Sequence[Transform],
        observers: Sequence[Observer],
    ):
        self.controller, self.edits = controller, edits
        self.transforms, self.observers = tuple(transforms), tuple(observers)
        self.attached = True
        controller.attachments.append(self)
        controller.refresh()

    def detach(self) -> None:
        """Take it away; the last one to go leaves the model without hooks. Repeated calls do nothing."""
        if not self.attached:
            return
        self.attached = False
        self.controller.attachments = [a for a in self.controller.attachments if a is not self]
        self.controller.refresh()

    def __enter__(self) -> ExpertAttachment:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.detach()


def attach_experts(
    model: nn.Module,
    *,
    edits: ExpertEdits | None = None,
    transforms: Sequence[Transform] = (),
    observers: Sequence[Observer] = (),
) -> ExpertAttachment:
    """Change or watch the routing of a transformers mixture-of-experts model; attachments nest, in any order.

    A transform gives (index, weight), both (T, k), in place of the call's, or None to leave it: any router, or the
    replay of a record. Edits act on what transforms left, observers see what the experts get. Raises AttachError for a
    dense model, UnitError for an expert that the model lacks, EditError for a demand that cannot be met; the model is
    then as it was. Without anything to apply nothing is hooked.

    >>> from headwise.hub import load_model
    >>> model, _ = load_model("tiny-random-mixtral")
    >>> ids = torch.arange(10)[None]
    >>> with attach_experts(model, edits=ExpertEdits.ban("L1E0")), observe_experts(model) as record:
    ...     _ = model(ids)
    >>> int(record.count[0, 1, 0]), int(record.count[0, 1].sum())
    (0, 20)
    """
    stack = find_experts(model)
    if edits is not None and not isinstance(edits, ExpertEdits):
        raise AttachError(f"edits is a {type(edits).__name__}; it must be ExpertEdits, such as ExpertEdits.off('L8E5')")
    if edits is not None:
        _check(edits, model, stack)
    controller = stack.owner.__dict__.get(ATTRIBUTE) or _Controller(stack)
    return ExpertAttachment(controller, edits, transforms, observers)


def _check(edits: ExpertEdits, model: nn.Module, stack: ExpertStack) -> None:
    edits.check(fingerprint(model))
    numbers = stack.numbers()
    for edit in edits:
        for unit in edit.units:
            if unit.layer not in numbers or unit.index >= stack.experts:
                raise UnitError(f"{unit} does not exist; layers {numbers} have routed experts 0 to {stack.experts - 1}")
        k = getattr(stack.layers[0].router, "top_k", None)
        most = max(len(found) for found in edit.units.by_layer().values())
        if isinstance(k, int) and edit.op == "force" and most > k:
            raise EditError(f"{most} experts of a layer are forced on, but a token has {k}; force at most {k}")
        if isinstance(k, int) and edit.op == "ban" and stack.experts - most < k:
            raise EditError(f"{most} of {stack.experts} experts of a layer are banned, but a token needs {k} others")


def detach_experts(model: nn.Module) -> None:
    """Take everything away that is attached to the experts of a model (also of a deep copy of an attached model)."""
    for module in model.modules():
        controller = module.__dict__.get(ATTRIBUTE)
        if controller is not None:
            for attachment in list(controller.attachments):
                attachment.detach()


class observe_experts:  # noqa: N801 - used like a function
    """Context manager that records which experts tokens choose; gives an `ExpertRecord`. Changes no logits.

    `probs` also sums the router's probabilities, `per_token` keeps every token's choice. `tokens` and `phase` select
    what counts, as in edits; padding never does.

    >>> from headwise.hub import load_model
    >>> model, _ = load_model("tiny-random-qwen3-moe")
    >>> with observe_experts(model, probs=True, per_token=True) as record:
    ...     _ = model(torch.arange(9)[None])
    >>> record.count.shape, record.index(2).shape, record.probs(0).shape, round(float(record.prob[0, 0].sum()), 3)
    (torch.Size([1, 3, 8]), torch.Size([9, 2]), torch.Size([9, 8]), 9.0)
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        probs: bool = False,
        per_token: bool = False,
        tokens: TokenSelection | str | Sequence[int] | slice = "all",
        phase: str = "all",
    ):
        if phase not in ("all", "prefill", "decode"):
            raise EditError(f"phase is {phase!r}; it must be 'all', 'prefill' or 'decode'")
        self.model, self.probs, self.per_token, self.phase = model, probs, per_token, phase
        self.tokens = TokenSelection.of(tokens)
        self.handle: ExpertAttachment | None = None

    def __enter__(self) -> ExpertRecord:
        self.handle = attach_experts(self.model, observers=[self._see])
        stack = self.handle.controller.stack
        self.record = ExpertRecord(stack.numbers(), stack.depth, stack.experts, self.per_token)
        return self.record

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self.handle is not None
        self.handle.detach()

    def _see(self, call: ExpertCall) -> None:
        last = call.positions.max(dim=1, keepdim=True).values
        counted = self.tokens.mask(call.positions, last)
        if self.phase != "all" and (self.phase == "decode") != call.decoding:
            counted = torch.zeros_like(counted)
        self.record.add(call, counted, call.probs() if self.probs else None)
