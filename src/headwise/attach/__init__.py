"""Reach every head of a transformers model: one hook, through the attention interface that models already call."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import Any, overload

from torch import nn

from headwise.attach.controller import Controller, controllers
from headwise.attach.experts import ExpertAttachment, attach_experts, detach_experts
from headwise.attach.hook import HeadCall
from headwise.attach.locate import Stack, find_stack, fingerprint, fingerprint_of
from headwise.attach.site import Intervention, Observer, Router, Transform
from headwise.callable_module import make_callable
from headwise.edits import Edit, HeadEdits
from headwise.errors import AttachError, PlanError
from headwise.expert_edits import ExpertEdits
from headwise.keyscores import check as check_selectors
from headwise.plan import HeadPlan

__all__ = ["Attachment", "HeadCall", "Router", "Stack", "Transform", "attach", "detach", "find_stack", "fingerprint"]


class Attachment:
    """What `attach` returns: a context manager, or a lasting handle with `detach()`."""

    def __init__(self, model: nn.Module, controller: Controller, intervention: Intervention):
        self.model, self.controller, self.intervention = model, controller, intervention
        self.attached = True
        self._stand_in: Intervention | None = None  # while suspended: an empty one that keeps the model attached

    def detach(self) -> None:
        """Take this intervention away; the last one to go leaves the model as it was. Repeated calls do nothing."""
        if not self.attached:
            return
        self.attached = False
        if self.intervention.router is not None:
            self.intervention.router.uninstall(self.model, self.controller.stack)
        self.controller.pop(self._stand_in or self.intervention)
        if not self.controller.interventions:
            self.controller.remove()

    def suspend(self) -> None:
        """Leave it out of the passes that follow, until `resume`; far cheaper than to detach and attach again."""
        if self.attached and self._stand_in is None:
            self._stand_in = Intervention()
            self._exchange(self.intervention, self._stand_in)

    def resume(self) -> None:
        """Put a suspended intervention back, behind the others that are attached. AttachError once it is detached."""
        if not self.attached:
            raise AttachError("this attachment was detached; attach again")
        if self._stand_in is not None:
            self._exchange(self._stand_in, self.intervention)
            self._stand_in = None

    def _exchange(self, old: Intervention, new: Intervention) -> None:
        self.controller.push(new)
        self.controller.pop(old)

    def __enter__(self) -> Attachment:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.detach()


@overload
def attach(model: nn.Module, *, edits: ExpertEdits) -> ExpertAttachment: ...


@overload
def attach(
    model: nn.Module,
    *,
    plan: HeadPlan | None = ...,
    edits: HeadEdits | Edit | Sequence[Edit] | None = ...,
    router: Router | None = ...,
    observers: Sequence[Observer] = ...,
    transforms: Sequence[Transform] = ...,
    stack: str | None = ...,
    capture: bool = ...,
) -> Attachment: ...


def attach(
    model: nn.Module,
    *,
    plan: HeadPlan | None = None,
    edits: HeadEdits | Edit | Sequence[Edit] | ExpertEdits | None = None,
    router: Router | None = None,
    observers: Sequence[Observer] = (),
    transforms: Sequence[Transform] = (),
    stack: str | None = None,
    capture: bool = False,
) -> Any:
    """Apply a KV plan, head edits, a head router, observers or transforms to a transformers model, without changing its code.

    The model keeps its class, its weights and its own attention kernel. Attachments nest and may be detached in any
    order; at most one plan and one router are active at a time. A transform `f(call, attend)` gives the head outputs
    (B, N, H, D) of a layer in place of `attend()`; edits and observers come after it. Raises `AttachError` if the model cannot be reached,
    `WrongModelError` if an artifact belongs to another model, `UnitError` if a head does not exist; the model is then
    as it was. `ExpertEdits` are applied by `attach_experts` and stand alone. `stack` chooses a tower where a model has
    several ("text_model", "vision_model"). `capture` turns decode steps under a plan into CUDA graphs: the host launches a step as a
    whole, which is what a short step waits for; graphs take memory, and a mask that hides tokens behind the prompt ends them.

    >>> import torch
    >>> from headwise.hub import load_model
    >>> from headwise.edits import Edit
    >>> from headwise.units import HeadSet
    >>> model, _ = load_model("tiny-random-llama")
    >>> ids = torch.arange(10)[None]
    >>> before = model(ids).logits
    >>> with attach(model, edits=Edit.zero(HeadSet.parse("L0H1"))):
    ...     changed = model(ids).logits
    >>> bool((before != changed).any()), bool((before == model(ids).logits).all())
    (True, True)
    """
    if isinstance(edits, ExpertEdits):
        if plan is not None or router is not None or observers or transforms or stack is not None or capture:
            raise AttachError("ExpertEdits are attached on their own: call attach once for experts and once for heads")
        return attach_experts(model, edits=edits)
    found = find_stack(model, stack)
    if capture and (plan is None or next(model.parameters()).device.type != "cuda"):
        where = "the model has no plan" if plan is None else f"the model is on {next(model.parameters()).device}"
        raise AttachError(f"capture=True needs a KV plan and a model on a CUDA device; {where}")
    intervention = Intervention(plan, _as_edits(edits), router, tuple(observers), tuple(transforms), capture)
    _check(found, intervention)
    existing = [c for c in controllers(model) if c.stack.pattern == found.pattern]
    controller = existing[0] if existing else found.controller(model)
    if router is not None:
        router.install(model, found)
    try:
        controller.push(intervention)
        if not existing:
            controller.install()
    except Exception:
        if router is not None:
            router.uninstall(model, found)
        raise
    return Attachment(model, controller, intervention)


def detach(model: nn.Module) -> None:
    """Take everything away that is attached to a model (also to a deep copy of an attached model)."""
    detach_experts(model)
    for controller in list(controllers(model)):
        for intervention in list(controller.interventions):
            Attachment(model, controller, intervention).detach()


def _as_edits(edits: HeadEdits | Edit | Sequence[Edit] | None) -> HeadEdits | None:
    if edits is None or isinstance(edits, HeadEdits):
        return edits
    return HeadEdits.of(*([edits] if isinstance(edits, Edit) else edits))


def _check(found: Stack, wanted: Intervention) -> None:
    print_ = fingerprint_of(found)
    if wanted.plan is not None:
        if not isinstance(wanted.plan, HeadPlan):
            raise AttachError(
                f"plan is a {type(wanted.plan).__name__}; it must be a HeadPlan (HeadPlan.load reads one)"
            )
        wanted.plan.check(print_)
        _check_patterns(wanted.plan, found)
    if wanted.edits is not None:
        wanted.edits.check(print_)
    if wanted.router is not None:
        wanted.router.check(print_)


def _check_patterns(plan: HeadPlan, found: Stack) -> None:
    """Unknown key scorers; a window that no text of this model can outgrow saves nothing: most likely a slip of a digit."""
    for pattern in dict.fromkeys(p for row in plan.patterns for p in row):
        check_selectors(pattern)
        if pattern.selects and not pattern.keeps_all and plan.prefill != "dense":
            raise PlanError(
                f"{pattern} chooses its tokens when the prompt has been read: the plan needs prefill='dense'"
            )
    context = getattr(found.config, "max_position_embeddings", None)
    if not isinstance(context, int):
        return
    for pattern in dict.fromkeys(p for row in plan.patterns for p in row):
        if not pattern.keeps_all and pattern.kept(context) >= context:
            raise PlanError(
                f"pattern {pattern} keeps all of the {context} tokens that this model can read, so it saves nothing: "
                "shorten the window, or use Full()"
            )


make_callable(__name__, "attach")
