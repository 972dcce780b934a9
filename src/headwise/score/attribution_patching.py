"""Attribution patching: activation patching to first order, every head from one forward and one backward pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from headwise.attach import HeadCall, attach, fingerprint
from headwise.attach.expert_stack import ExpertStack, find_experts
from headwise.modes import evaluating
from headwise.registry import register
from headwise.score._expert_sweep import record_parts
from headwise.score._patching import (
    Reduce,
    Task,
    answer,
    column_mask,
    make_pairs,
    need_language_model,
    record,
    shares,
)
from headwise.score._units import PatchUnit, units_of
from headwise.tasks.pairs import PromptPairs
from headwise.units import HeadScores

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@register("score", "attribution-patching", paper="19")
def attribution_patching(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    pairs: PromptPairs | None = None,
    task: Task = "induction",
    count: int = 16,
    tokens: Any = "all",
    unit: PatchUnit = "head",
    reduce: Reduce = "ratio_of_means",
    seed: int = 0,
    progress: bool = False,
) -> HeadScores:
    """First-order estimate of activation patching for all heads or experts: gradient times the difference of the two runs.

        score[l,h] = sum_{n,d} (z'_lh − z_lh) · dLD/dz_lh / (LD' − LD)

    z' and LD' belong to the corrupted run, as in `activation_patching` with direction "noising". Two forward passes and one
    backward pass in all. Gives HeadScores of kind "head", (L, H), or "expert", (L, E); no weight gets a gradient.

    pairs: prompts and corrupted twins of your own instead of `task` and `count`.
    task: "induction" works with any vocabulary; "ioi" and "colored-objects" need names and colours of one token.
    count: number of pairs.
    tokens: where the head is patched, a selection of positions; or one column of each row (from Python).
    unit: "head", or "expert": what an expert adds to its layer, so that dLD/dz is that of the layer's experts together.
    reduce: the ratio of mean effects, or the mean of the pairs' ratios.

    Raises ScoreError where prompt and twin are answered alike, AttachError for a model out of reach.

    >>> from headwise.hub import load_model
    >>> attribution_patching(*load_model("tiny-random-gpt2"), count=4).method
    'attribution-patching'
    """
    need_language_model(model)
    chosen = make_pairs(model, tokenizer, pairs, task, count, seed)
    where = column_mask(chosen, tokens)
    units_of(model, unit)
    with evaluating(model):
        moved, base, other = (_heads if unit == "head" else _experts)(model, chosen, where)
    values = shares(moved.double() + base.double(), base, other, reduce).cpu()
    meta: dict[str, Any] = {"reduce": reduce, "pairs": len(chosen), "seed": seed}
    data = "own pairs" if pairs is not None else f"{len(chosen)} pairs of {task}"
    return HeadScores(
        values=values, kind=unit, method="attribution-patching", data=data, fingerprint=fingerprint(model), meta=meta
    )


def _heads(model: PreTrainedModel, pairs: PromptPairs, where: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(first-order change of LD (L, H, B), LD (B,) of the prompts, of the twins)."""
    other = record(model, pairs, pairs.corrupt)
    z, gradients, base = slopes(model, pairs)
    moved = [
        ((o - mine) * g * where[..., None, None]).double().sum((1, 3)).T  # (H, B)
        for o, mine, g in zip(other.z, z, gradients, strict=True)
    ]
    return torch.stack(moved), base, other.difference


def _experts(model: PreTrainedModel, pairs: PromptPairs, where: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same with (L, E, B): the gradient at the output of a layer's experts, times what each expert's part moves."""
    stack = find_experts(model)
    base, other = (record_parts(model, stack, pairs, ids) for ids in (pairs.ids, pairs.corrupt))
    gradients = expert_slopes(model, stack, pairs)
    moved = torch.zeros(len(base.z), stack.experts, len(pairs), dtype=torch.float64, device=where.device)
    for layer, gradient in gradients.items():
        weighted = (gradient.unflatten(0, tuple(where.shape)) * where[..., None]).double()
        for expert in range(stack.experts):
            change = other.z[layer].of([expert])[0] - base.z[layer].of([expert])[0]  # (B, N, C)
            moved[layer, expert] = (change * weighted).sum((1, 2))
    return moved, base.difference, other.difference


def expert_slopes(model: PreTrainedModel, stack: ExpertStack, pairs: PromptPairs) -> dict[int, Tensor]:
    """dLD/d(output of the experts) of every layer that has some, (B · N, C)."""
    leaves: dict[int, Tensor] = {}

    def watch(layer: int) -> Callable:
        def hook(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
            leaves[layer] = torch.zeros_like(output, requires_grad=True)
            return output + leaves[layer]

        return hook

    handles = [one.experts.register_forward_hook(watch(one.layer)) for one in stack.layers]
    try:
        with torch.enable_grad():
            ld = answer(model, pairs, pairs.ids)[1]
    finally:
        for handle in handles:
            handle.remove()
    layers = sorted(leaves)
    found = torch.autograd.grad(ld.sum(), [leaves[layer] for layer in layers])
    return dict(zip(layers, found, strict=True))


def slopes(model: PreTrainedModel, pairs: PromptPairs) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """(head outputs, dLD/dz of each, both L of (B, N, H, D); LD (B,)) of the prompts."""
    outputs: dict[int, Tensor] = {}
    leaves: dict[int, Tensor] = {}

    def watch(call: HeadCall, attend: Callable[[], Tensor]) -> Tensor:
        out = attend()
        outputs[call.layer], leaves[call.layer] = out.detach(), torch.zeros_like(out, requires_grad=True)
        return out + leaves[call.layer]  # + 0: the same numbers, but a place to take the gradient at

    with torch.enable_grad(), attach(model, transforms=[watch]):
        ld = answer(model, pairs, pairs.ids)[1]
        layers = sorted(leaves)
        gradients = torch.autograd.grad(ld.sum(), [leaves[layer] for layer in layers])
    return [outputs[layer] for layer in layers], list(gradients), ld.detach()
