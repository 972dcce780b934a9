"""Correct-letter heads: which heads put the label of the right option there, on multiple choice (Lieberum et al., arXiv 2307.09458)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, get_args

from headwise.attach import fingerprint
from headwise.errors import ScoreError
from headwise.progress import track
from headwise.registry import register
from headwise.score._letters import label_pattern, letter_effects, need_labels
from headwise.score._patching import ROWS
from headwise.tasks.multiple_choice import Form, Labels, make_multiple_choice
from headwise.tasks.pairs import PromptPairs
from headwise.units import HeadScores

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

By = Literal["direct", "total", "attention"]


@register("score", "letter-heads", paper="19")
def letter_heads(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    pairs: PromptPairs | None = None,
    count: int = 24,
    labels: Labels = "letters",
    form: Form = "recall",
    by: By = "direct",
    rows: int = ROWS,
    seed: int = 0,
    progress: bool = False,
) -> HeadScores:
    """How much of the right label's lead over another label each head writes, in multiple choice.

        direct, total:  mean over prompts of LD − LD(last output of the head := that for another right option), in logits
        attention:      mean over options k of the attention on label k where k is right, 0 to 1

    LD = logit(right label) − logit(the other one). direct: all behind the head is frozen but the final norm; total: it is live. Gives
    HeadScores of kind "head", (L, H). `label_pattern` names kinds of heads, `letter_space` finds what their queries and keys say.

    pairs: multiple-choice prompts of your own (`headwise.tasks.multiple_choice.choice_pairs`) instead of `count` and `labels`.
    count: number of prompts.
    labels: "letters", "shuffled", "random" or "digits", see `make_multiple_choice`.
    form: "recall", the label behind its word, or "question", the question first and the label before its word.
    by: "direct", "total" or "attention".
    rows: rows of a folded batch at most; results do not depend on it.

    Raises ScoreError for pairs without labels, TaskError where labels or words are not one token.

    >>> from headwise.hub import load_model
    >>> from headwise.tasks.multiple_choice import choice_pairs
    >>> pairs = choice_pairs([[9, 5, 6, 7], [9, 5, 6, 8]], [[9, 5, 6, 8], [9, 5, 6, 7]], [[1, 2]] * 2, [[5, 6]] * 2,
    ...     correct=[0, 1], other=[1, 0])
    >>> tuple(letter_heads(*load_model("tiny-random-llama"), pairs=pairs).values.shape)
    (3, 4)
    """
    if by not in get_args(By):
        raise ScoreError(f"by={by!r}; choose {', '.join(get_args(By))}")
    if pairs is None and tokenizer is None:
        raise ScoreError("multiple choice needs a tokenizer; give pairs= of your own (choice_pairs)")
    data = "own pairs" if pairs is not None else f"{count} prompts of multiple choice, {labels}, {form}"
    if pairs is None:
        assert tokenizer is not None
        pairs = make_multiple_choice(tokenizer, count=count, labels=labels, form=form, seed=seed)
    pairs = need_labels(pairs)
    meta: dict[str, Any] = {"by": by, "prompts": len(pairs), "seed": seed}
    if by == "attention":
        values = label_pattern(model, pairs).on_correct
    else:
        found = letter_effects(model, pairs, rows=rows, track=lambda layers: track(layers, "letter heads", progress))
        values, meta["base"] = getattr(found, by).double().mean(-1), float(found.base.mean())
    return HeadScores(values=values, method="letter-heads", data=data, fingerprint=fingerprint(model), meta=meta)
