"""Function vectors: the heads that carry a task, summed into one vector of the residual stream (Todd et al. 2023, arXiv 2310.15213)."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from headwise.arguments import cache_argument, cache_of
from headwise.attach import find_stack, fingerprint
from headwise.attach.projection import head_weights, output_projection
from headwise.checks import Meta, whole
from headwise.errors import EditError
from headwise.modes import frozen
from headwise.progress import track
from headwise.registry import register
from headwise.steer._injection import Injection, inject
from headwise.steer._residual import ResidualVector, best_layer
from headwise.steer._soft_fit import task_vectors
from headwise.tasks.icl import Item, Pair, Template, draw_few_shot, encode_item, icl_pairs, icl_split
from headwise.units import HeadScores, HeadSet

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

ROWS = 90  # heads that are patched in one pass


@register("steer", "function-vector")
def function_vector(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    task: str = "antonym",
    pairs: Sequence[Pair] | None = None,
    prompts: int = 50,
    shots: int = 10,
    trials: int = 25,
    top: int = 10,
    heads: HeadSet | None = None,
    layer: int | None = None,
    template: Template | None = None,
    seed: int = 0,
    progress: bool = False,
) -> ResidualVector:
    """Add one vector to the residual stream so that prompts without examples do a task.

        v = sum over the heads of most causal effect of t_lh W_O^lh,    t as in soft injection

    The causal effect of a head is how much p(answer) gains at the last token of prompts with shuffled answers when t_lh takes the
    place of its output (`causal_effects`).

    task: a family of `headwise.tasks.icl`. pairs: own (input, output) pairs instead.
    prompts: to average t over. shots: examples in each.
    trials: prompts with shuffled answers to measure the effect on.
    top: how many heads. heads: these heads instead of measuring.
    layer: behind which layer; by default the one of lowest loss on held-out questions.

    Raises TaskError for too few pairs, EditError for a bad option.

    >>> from headwise.hub import load_model
    >>> model, tokenizer = load_model("tiny-random-llama")
    >>> vector = function_vector(model, tokenizer, task="next-letter", prompts=2, shots=2, trials=1, top=3, layer=1)
    >>> vector.layer, vector.mode, len(vector.vector)
    (1, 'add', 64)
    """
    whole("prompts", prompts, 1, EditError)
    template, generator = template or Template(), torch.Generator().manual_seed(seed)
    split = icl_split(icl_pairs(task) if pairs is None else pairs, generator=generator, test=0.0)
    with frozen(model):
        vectors = task_vectors(model, tokenizer, split.train, prompts, shots, template, generator)
        if heads is None:
            prompts_ = shuffled_prompts(tokenizer, split.train, trials, shots, template, generator)
            heads = causal_effects(model, prompts_, vectors, progress=progress).top(top)
        vector = summed(model, vectors, heads)
        if layer is None:
            items = [encode_item(tokenizer, template.ask(x), y) for x, y in split.validation]
            layer, _ = best_layer(model, vector.expand(find_stack(model).layers, -1), "add", items)
    meta: Meta = {
        "task": task if pairs is None else "own pairs",
        "heads": str(heads),
        "prompts": prompts,
        "shots": shots,
        "seed": seed,
    }
    return ResidualVector(vector, layer, "add", fingerprint(model), "function-vector", meta)


def shuffled_prompts(
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[Pair],
    trials: int,
    shots: int,
    template: Template,
    generator: torch.Generator,
) -> list[Item]:
    """Prompts whose examples carry each other's answers: the format without the task."""
    whole("trials", trials, 1, EditError)
    items = []
    for _ in range(trials):
        examples, (x, y) = draw_few_shot(pairs, shots, generator)
        order = torch.randperm(shots, generator=generator).tolist()
        mixed = [(a, examples[j][1]) for (a, _), j in zip(examples, order, strict=True)]
        items.append(encode_item(tokenizer, template.few_shot(mixed, x), y))
    return items


@torch.no_grad()
def causal_effects(
    model: nn.Module, items: Sequence[Item], vectors: Tensor, *, rows: int = ROWS, progress: bool = False
) -> HeadScores:
    """Mean gain of p(first answer token) when one head's output at the last token becomes its vector (L, H, D), for every head.

    Each prompt is read once; its cache then serves `rows` copies of the last token, one patched head each. vectors (M, L, H, D): one
    set a prompt, where prompts are of different tasks.
    """
    stack, device = find_stack(model), next(model.parameters()).device
    L, H = stack.layers, stack.heads
    own = vectors if vectors.ndim == 4 else vectors.expand(len(items), *vectors.shape)
    total = torch.zeros(L * H)
    eye = torch.eye(L * H + 1, L * H, device=device).roll(1, 0)  # row 0 is the empty patch
    eye[0] = 0
    for item, mine in track(list(zip(items, own, strict=True)), "causal effects", progress):
        ids = item.ids.to(device)[None]
        cache = cache_of(model(input_ids=ids[:, :-1], use_cache=True, logits_to_keep=1))
        gains = []
        for begin in range(0, L * H + 1, rows):
            alpha = eye[begin : begin + rows].view(-1, L, H)
            branch = copy.deepcopy(cache)
            branch.batch_repeat_interleave(len(alpha))
            with inject(model, Injection(alpha, mine[None].to(device), torch.zeros(len(alpha), dtype=torch.long))):
                last = ids[:, -1:].expand(len(alpha), -1)
                out = model(input_ids=last, use_cache=True, **cache_argument(model, branch))
            gains.append(out.logits[:, -1].float().softmax(-1)[:, int(item.answer[0])].cpu())
        p = torch.cat(gains)
        total += p[1:] - p[0]
    values = (total / len(items)).view(L, H)
    data = f"{len(items)} prompts with shuffled answers"
    return HeadScores(values=values, method="causal-effect", data=data, fingerprint=fingerprint(model))


@torch.no_grad()
def summed(model: nn.Module, vectors: Tensor, heads: HeadSet) -> Tensor:
    """(C,) float32: sum over the heads of t_lh W_O^lh; biases of the projection are of no head."""
    stack, parts = find_stack(model), []
    for layer, head in heads.pairs():
        weights = head_weights(output_projection(stack, layer), stack.heads)[head].float().cpu()
        parts.append(vectors[layer, head].float() @ weights)
    return torch.stack(parts).sum(0)
