"""Soft injection: the examples of a prompt move into the heads (Park et al. 2025, arXiv 2507.20906)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from headwise.edits import HeadEdits
from headwise.registry import register
from headwise.steer._soft_fit import Loss, Select, fit_tasks
from headwise.tasks.icl import Pair, Template, icl_pairs

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@register("steer", "soft-injection", paper="27")
def soft_injection(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    task: str = "antonym",
    pairs: Sequence[Pair] | None = None,
    prompts: int = 50,
    shots: int = 10,
    steps: int = 400,
    lr: float = 0.2,
    batch: int = 1,
    loss: Loss = "first",
    select: Select = "best",
    template: Template | None = None,
    seed: int = 0,
    progress: bool = False,
) -> HeadEdits:
    """Learn a task from examples, so that prompts without examples do it.

        t_lh = mean over M prompts with N examples of x_lh at the last token,
        x'_lh = (1 - alpha_lh) x_lh + alpha_lh t_lh   at the last token of a prompt without examples,   alpha = sigmoid(theta)

    theta (L, H) is all that is trained: Adam on the cross-entropy of the answer. Gives one `mix_vector` edit with a weight a head;
    `headwise.steer.TaskEmbedding` is the same with `fit`, `scores`, `with_alpha`, and `serve` for several tasks in one batch.

    task: a family of `headwise.tasks.icl`; a fifth of its pairs is held out to choose by.
    pairs: own (input, output) pairs instead.
    prompts: M, prompts with examples to average over.
    shots: N, examples in each.
    steps: of Adam, each with `batch` random questions.
    lr: learning rate of theta, which starts at 0 (alpha = 0.5).
    batch: questions a step.
    loss: on the first token of the answer, or on all of them (full).
    select: shares with the best held-out loss, or the last.

    Raises TaskError for an unknown task, too few pairs, an answer without a token of its own; AttachError for a model out of reach.

    >>> from headwise.hub import load_model
    >>> model, tokenizer = load_model("tiny-random-llama")
    >>> edits = soft_injection(model, tokenizer, task="next-letter", prompts=2, shots=2, steps=1)
    >>> edits.method, len(edits[0].units), str(edits[0].tokens), edits[0].phase
    ('soft-injection', 12, 'last', 'prefill')
    """
    name = task if pairs is None else "own pairs"
    data = {name: icl_pairs(task) if pairs is None else pairs}
    found = fit_tasks(
        model, tokenizer, data, prompts=prompts, shots=shots, steps=steps, lr=lr, batch=batch,
        loss=loss, select=select, template=template, seed=seed, progress=progress,
    )  # fmt: skip
    return found[name].edits()
