"""Patching as it is defined, one head or expert and two whole passes at a time: slow, and what the fast engine is tested against.

Letters: B pairs, N columns, H query heads, D head dim.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from headwise.attach import HeadCall, attach, find_stack
from headwise.attach.experts import find_experts
from headwise.edits import Edit
from headwise.score._blocks import Blocks, first, with_first
from headwise.score._expert_sweep import watching
from headwise.score._patching import Run, answer
from headwise.score._receivers import with_parts
from headwise.units import HeadSet

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from headwise.tasks.pairs import PromptPairs


@torch.no_grad()
def patch_one(
    model: PreTrainedModel, pairs: PromptPairs, base: Run, outputs: list[Tensor], unit: str, where: Tensor
) -> Tensor:
    """LD (B,) of a run in which one head's outputs are replaced at the columns `where` (B, N), by an ordinary edit."""
    layer, head = HeadSet.parse(unit).pairs()[0]
    new = torch.where(where[..., None], outputs[layer][:, :, head], base.z[layer][:, :, head])
    with attach(model, edits=Edit.patch(HeadSet.parse(unit), new[None])):
        return answer(model, pairs, pairs.ids)[1]


@torch.no_grad()
def path_one(
    model: PreTrainedModel,
    pairs: PromptPairs,
    base: Run,
    other: Run,
    sender: str,
    receivers: HeadSet | None,
    through: str,
    where: Tensor,
    freeze_mlps: bool,
) -> Tensor:
    """LD (B,) with one sender's direct path to the receivers (None: the logits) patched, in two whole passes."""
    layer, head = HeadSet.parse(sender).pairs()[0]
    groups = {} if receivers is None else receivers.by_layer()
    mine = where[..., None, None]
    seen: dict[int, HeadCall] = {}

    def freeze(call: HeadCall, attend: Callable[[], Tensor]) -> Tensor:
        if call.layer in groups:
            seen[call.layer] = call
        wanted = base.z[call.layer].clone()
        if call.layer == layer:
            wanted[:, :, head] = other.z[layer][:, :, head]
        return torch.where(mine, wanted, attend())

    with ExitStack() as inside:
        if freeze_mlps:
            _freeze_mlps(model, pairs, where, inside)
        inside.enter_context(attach(model, transforms=[freeze]))
        arrived = answer(model, pairs, pairs.ids)[1]
    if receivers is None:
        return arrived
    with attach(model, transforms=[_receiving(groups, seen, through, where)]):
        return answer(model, pairs, pairs.ids)[1]


def _receiving(
    groups: Mapping[int, Sequence[int]], seen: Mapping[int, HeadCall], through: str, where: Tensor
) -> Callable:
    """The transform of pass B: every receiver computed anew with q, k or v of the calls `seen` at the patched columns."""

    def receive(call: HeadCall, attend: Callable[[], Tensor]) -> Tensor:
        out = attend()
        for h in groups.get(call.layer, ()):
            changed = {
                name: torch.where(where[:, None, :, None], getattr(seen[call.layer], name), getattr(call, name))
                for name in through
            }
            out = out.clone()
            out[:, :, h] = with_parts(call, changed).attend()[:, :, h]
        return out

    return receive


def _freeze_mlps(model: PreTrainedModel, pairs: PromptPairs, where: Tensor, inside: ExitStack) -> None:
    """MLPs give their outputs of the unpatched run at the columns `where`."""
    mlps = Blocks(model, find_stack(model), None).mlps
    clean: dict[int, Tensor] = {}

    def keep(layer: int) -> Callable:
        def hook(module: Any, args: Any, output: Any) -> None:
            clean[layer] = first(output)

        return hook

    def put(layer: int) -> Callable:
        def hook(module: Any, args: Any, output: Any) -> Any:
            return with_first(output, torch.where(where[..., None], clean[layer], first(output)))

        return hook

    handles = [mlp.register_forward_hook(keep(layer)) for layer, mlp in enumerate(mlps)]
    answer(model, pairs, pairs.ids)
    for handle in handles:
        handle.remove()
    for layer, mlp in enumerate(mlps):
        handle = mlp.register_forward_hook(put(layer))
        inside.callback(handle.remove)


def expert_part(module: Any, seen: tuple[Any, ...], expert: int) -> Tensor:
    """What one expert added to the tokens of a recorded call (hidden, index, weight, …), (T, C): the call with all other weights 0."""
    hidden, index, weight = seen[:3]
    result: Tensor = module(hidden, index, weight * (index == expert).to(weight.dtype))
    return result


@torch.no_grad()
def expert_one(
    model: PreTrainedModel,
    pairs: PromptPairs,
    unit: str,
    where: Tensor,
    *,
    base: Run | None = None,
    receivers: HeadSet | None = None,
    through: str = "",
    direct: bool = False,
) -> Tensor:
    """LD (B,) with one expert's part taken from the other run, in whole passes: its total effect, or only its `direct` path.

    `base` is a `record` of the heads, which the direct path keeps; its MLPs answer live.
    """
    layer, expert = HeadSet.parse(unit).pairs()[0]
    stack = find_experts(model)
    module = next(one.experts for one in stack.layers if one.layer == layer)
    runs: list[tuple[Any, ...]] = []
    for ids in (pairs.ids, pairs.corrupt):
        seen: dict[int, tuple[Any, ...]] = {}
        with watching(stack, seen):
            answer(model, pairs, ids)
        runs.append(seen[layer])
    moved = expert_part(module, runs[1], expert) - expert_part(module, runs[0], expert)
    moved = moved * where.reshape(-1, 1)
    handle = module.register_forward_hook(lambda m, a, output: output + moved)
    try:
        if not direct:
            return answer(model, pairs, pairs.ids)[1]
        assert base is not None
        return _two_passes(model, pairs, base, receivers, through, where, handle)
    finally:
        handle.remove()


def _two_passes(
    model: PreTrainedModel,
    pairs: PromptPairs,
    base: Run,
    receivers: HeadSet | None,
    through: str,
    where: Tensor,
    sending: Any,
) -> Tensor:
    """Pass A with all heads frozen, pass B with q, k or v of the receivers from it."""
    groups = {} if receivers is None else receivers.by_layer()
    seen: dict[int, HeadCall] = {}

    def freeze(call: HeadCall, attend: Callable[[], Tensor]) -> Tensor:
        seen[call.layer] = call
        return torch.where(where[..., None, None], base.z[call.layer], attend())

    with attach(model, transforms=[freeze]):
        arrived = answer(model, pairs, pairs.ids)[1]
    if receivers is None:
        return arrived
    sending.remove()
    with attach(model, transforms=[_receiving(groups, seen, through, where)]):
        return answer(model, pairs, pairs.ids)[1]


@torch.no_grad()
def to_experts_one(
    model: PreTrainedModel,
    pairs: PromptPairs,
    base: Run,
    other: Run,
    sender: str,
    receivers: HeadSet,
    through: str,
    where: Tensor,
    freeze_mlps: bool,
) -> Tensor:
    """LD (B,) with one head's direct path to experts patched, in two whole passes, a part being the call with all other weights 0."""
    layer, head = HeadSet.parse(sender).pairs()[0]
    stack = find_experts(model)
    arrived: dict[int, tuple[Any, ...]] = {}
    experts = {one.layer: one.experts for one in stack.layers}

    def freeze(call: HeadCall, attend: Callable[[], Tensor]) -> Tensor:
        wanted = base.z[call.layer].clone()
        if call.layer == layer:
            wanted[:, :, head] = other.z[layer][:, :, head]
        return torch.where(where[..., None, None], wanted, attend())

    def put(l: int, mine: Sequence[int]) -> Callable:
        def hook(module: Any, args: Any, output: Tensor) -> Tensor:
            x = arrived[l][0] if "x" in through else args[0]
            _, index, weight = (arrived[l] if "w" in through else args)[:3]
            moved = [
                expert_part(module.forward, (x, index, weight), e) - expert_part(module.forward, args, e) for e in mine
            ]
            return output + sum(moved) * where.reshape(-1, 1)

        return hook

    with ExitStack() as inside:
        if freeze_mlps:
            _freeze_mlps(model, pairs, where, inside)
        inside.enter_context(attach(model, transforms=[freeze]))
        inside.enter_context(watching(stack, arrived))
        answer(model, pairs, pairs.ids)
    with ExitStack() as inside:
        for l, mine in receivers.by_layer().items():
            inside.callback(experts[l].register_forward_hook(put(l, mine)).remove)
        return answer(model, pairs, pairs.ids)[1]
