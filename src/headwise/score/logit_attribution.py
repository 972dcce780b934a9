"""Direct logit attribution: what each head writes straight into the answer's logit."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from headwise.attach import fingerprint
from headwise.modes import evaluating
from headwise.registry import register
from headwise.score._patching import Task, make_pairs, need_language_model
from headwise.score._residual import Attribution, split
from headwise.tasks.pairs import PromptPairs
from headwise.units import HeadScores

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@register("score", "logit-attribution", paper="19")
def logit_attribution(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    pairs: PromptPairs | None = None,
    task: Task = "induction",
    count: int = 16,
    seed: int = 0,
    progress: bool = False,
) -> HeadScores:
    """What each head adds, on its own, to logit(answer) − logit(contrast), in logits.

        score[l,h] = mean over prompts of  (z_lh W_O^lh) ⊙ γ / s · (u_answer − u_contrast)

    γ and s are the final norm's weight and its scale on the whole stream, u the rows of the unembedding. `attribute` gives every
    other part too (embedding, biases, MLPs or experts), prompt by prompt; all parts add up to the model's logits, or it raises.
    Gives HeadScores of kind "head", (L, H), from one forward pass.

    pairs: prompts of your own instead of `task` and `count`; the twins are not read, their answers are the contrast.
    task: "induction" works with any vocabulary; "ioi" and "colored-objects" need names and colours of one token.
    count: number of prompts.

    Raises AttachError where the parts do not add up: logits capped or scaled, a gate between heads and projection.

    >>> from headwise.hub import load_model
    >>> tuple(logit_attribution(*load_model("tiny-random-gemma3"), count=4).values.shape)
    (4, 4)
    """
    found = attribute(model, tokenizer, pairs=pairs, task=task, count=count, seed=seed)
    meta: dict[str, Any] = {"prompts": len(found.model), "base": float(found.model.mean()), "error": found.error}
    meta["seed"] = seed
    data = "own prompts" if pairs is not None else f"{count} prompts of {task}"
    return HeadScores(
        values=found.heads.double().mean(0).cpu(),
        method="logit-attribution",
        data=data,
        fingerprint=fingerprint(model),
        meta=meta,
    )


def attribute(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    pairs: PromptPairs | None = None,
    task: Task = "induction",
    count: int = 16,
    seed: int = 0,
) -> Attribution:
    """All parts of the logit difference, prompt by prompt; options and errors as in `logit_attribution`.

    >>> from headwise.hub import load_model
    >>> parts = attribute(*load_model("tiny-random-gpt2"), count=4)
    >>> bool((parts.total - parts.model).abs().max() < 1e-4), sorted(parts.parts())[:2]
    (True, ['L0.bias', 'L0.mlp'])
    """
    need_language_model(model)
    chosen = make_pairs(model, tokenizer, pairs, task, count, seed)
    with evaluating(model):
        return split(model, chosen)
