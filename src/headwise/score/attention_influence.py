"""AttentionInfluence, step 1: the heads that matter, found by looking sentences up under random keys (arXiv 2505.07293).

Steps 2 and 3, what a document loses without them, are `InfluenceScorer`; step 4 is `select_by_tokens` and the command
`headwise select-data`. Letters: L layers, H query heads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Literal

import torch

from headwise.attach import fingerprint
from headwise.checks import Meta
from headwise.errors import TaskError
from headwise.registry import register
from headwise.score._copying import Trace, trace_prompts
from headwise.tasks import Prompt, make_keyvalues
from headwise.units import HeadScores

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@register("score", "attention-influence", paper="28")
def attention_influence(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    samples: int = 20,
    length: int = 1024,
    shots: int = 3,
    key_length: int = 32,
    decode: bool = False,
    prompts: Sequence[Prompt] | None = None,
    batch_size: int = 1,
    seed: int = 0,
    progress: bool = False,
) -> HeadScores:
    """Score how much each head looks sentences up: random keys to sentences in a JSON object, a few solved, one to solve.

        R[l,h] = |{answer tokens w_t : the top key of the row that predicts w_t holds w_t, inside the value}| / |value|

    averaged over all samples (arXiv 2505.07293). Gives HeadScores (L, H) in [0, 1]; `headwise.score.important_heads` takes the
    best 5 % of them. The paper used 800 samples of at most 4096 tokens.

    samples: number of prompts. length: most tokens of a prompt; as many pairs as fit.
    shots: solved look-ups before the one to solve.
    key_length: letters and digits of a key.
    decode: decode greedily and judge the tokens that came; by default the right answer is read in one pass.
    prompts: prompts of your own instead.
    batch_size: prompts a forward pass; the scores do not depend on it.

    Raises TaskError for prompts that do not fit, AttachError for a model out of reach.

    >>> from headwise.hub import load_model
    >>> model, tokenizer = load_model("tiny-random-llama")
    >>> scores = attention_influence(model, tokenizer, samples=2, length=900, shots=1, key_length=8)
    >>> tuple(scores.values.shape), scores.meta["samples"], bool((scores.values <= 1).all())
    ((3, 4), 2, True)
    """
    made_for = fingerprint(model)
    if batch_size < 1:
        raise TaskError(f"batch_size={batch_size}; at least 1")
    if prompts is None:
        if tokenizer is None:
            raise TaskError("making prompts needs a tokenizer; or give prompts= of your own")
        generator = torch.Generator().manual_seed(seed)
        prompts = make_keyvalues(
            tokenizer, count=samples, length=length, generator=generator, shots=shots, key_length=key_length
        )
    if not prompts:
        raise TaskError("prompts is empty; at least one sample is needed")
    through: Literal["generate", "one-forward"] = "generate" if decode else "one-forward"
    traces = trace_prompts(model, tokenizer, prompts, through=through, batch_size=batch_size, progress=progress)
    answered = sum(map(_answered, traces))
    judged = traces if decode else [replace(t, emitted=t.prompt.answer_ids) for t in traces]
    values = torch.stack([trace.score("set") for trace in judged]).double().mean(0)
    meta: Meta = {"samples": len(traces), "answered": answered, "decode": decode, "seed": seed}
    data = f"key-value look-ups of up to {max(map(len, prompts))} tokens, {answered} of {len(traces)} answered"
    return HeadScores(values=values, method="attention-influence", data=data, fingerprint=made_for, meta=meta)


def _answered(trace: Trace) -> bool:
    """Did the model itself choose every token of the answer?"""
    answer = trace.prompt.answer_ids
    return torch.equal(trace.emitted[: len(answer)], answer)
