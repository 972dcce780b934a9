"""Task vectors: the hidden state behind a prompt with examples, put into one without (Hendel et al. 2023, arXiv 2310.15916)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from headwise.attach import fingerprint
from headwise.checks import Meta, whole
from headwise.errors import EditError
from headwise.modes import frozen
from headwise.registry import register
from headwise.steer._residual import ResidualVector, best_layer, last_hidden
from headwise.tasks.icl import Pair, Template, draw_few_shot, encode_item, icl_pairs, icl_split

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@register("steer", "task-vector")
def task_vector(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    task: str = "antonym",
    pairs: Sequence[Pair] | None = None,
    prompts: int = 1,
    shots: int = 10,
    layer: int | None = None,
    template: Template | None = None,
    seed: int = 0,
) -> ResidualVector:
    """Put the hidden state of a prompt with examples into one without.

    The output of one layer at the last token takes the place of the same in a prompt without examples; the query of the
    prompt with examples is another one.

    task: a family of `headwise.tasks.icl`. pairs: own (input, output) pairs instead.
    prompts: with examples, to average over (the source takes 1). shots: examples in each.
    layer: behind which layer; by default the one of lowest loss on held-out questions.

    Raises TaskError for too few pairs, EditError for a bad option.

    >>> from headwise.hub import load_model
    >>> model, tokenizer = load_model("tiny-random-llama")
    >>> vector = task_vector(model, tokenizer, task="next-letter", shots=2)
    >>> vector.mode, len(vector.vector)
    ('replace', 64)
    """
    whole("prompts", prompts, 1, EditError)
    template, generator = template or Template(), torch.Generator().manual_seed(seed)
    split = icl_split(icl_pairs(task) if pairs is None else pairs, generator=generator, test=0.0)
    items = []
    for _ in range(prompts):
        examples, (x, y) = draw_few_shot(split.train, shots, generator)
        items.append(encode_item(tokenizer, template.few_shot(examples, x), y))
    with frozen(model):
        states = last_hidden(model, items).mean(0)  # (L, C)
        if layer is None:
            held_out = [encode_item(tokenizer, template.ask(x), y) for x, y in split.validation]
            layer, _ = best_layer(model, states, "replace", held_out)
    whole("layer", layer, 0, EditError, high=len(states) - 1)
    meta: Meta = {"task": task if pairs is None else "own pairs", "prompts": prompts, "shots": shots, "seed": seed}
    return ResidualVector(states[layer], layer, "replace", fingerprint(model), "task-vector", meta)
