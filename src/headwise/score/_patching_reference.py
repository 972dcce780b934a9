"""Patching as it is defined, one head and two whole passes at a time: slow, and what the fast engine is tested against.

Letters: B pairs, N columns, H query heads, D head dim.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from headwise.attach import HeadCall, attach, find_stack
from headwise.edits import Edit
from headwise.score._blocks import Blocks, first, with_first
from headwise.score._patching import Run, answer
from headwise.score._paths import with_parts
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

    with ExitStack() as inside:
        if freeze_mlps:
            _freeze_mlps(model, pairs, where, inside)
        inside.enter_context(attach(model, transforms=[freeze]))
        arrived = answer(model, pairs, pairs.ids)[1]
    if receivers is None:
        return arrived
    with attach(model, transforms=[receive]):
        return answer(model, pairs, pairs.ids)[1]


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
