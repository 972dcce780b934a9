"""How far what a head says lies from what its layer says (Task-KV, arXiv 2501.15113): the score behind its choice of heads."""

from __future__ import annotations

from typing import Any

import torch

from headwise.attach import fingerprint
from headwise.budget._semantic import Group, Metric, distance_table
from headwise.checks import whole
from headwise.errors import ScoreError
from headwise.registry import register
from headwise.tasks import make_passkeys
from headwise.units import HeadScores


@register("score", "semantic-distance", paper="11")
def semantic_distance(
    model: Any,
    tokenizer: Any,
    *,
    text: str | None = None,
    prompts: int = 4,
    length: int = 512,
    tokens: int = 256,
    window: int = 32,
    group: Group = "mean",
    metric: Metric = "l2",
    seed: int = 0,
    progress: bool = False,
) -> HeadScores:
    """Distance of each kv head's semantic vector from the mean of its layer, at the end of a prompt (Task-KV).

        v' = Σ c_j v_j over the `tokens` largest c_j, c the mean attention of the last `window` queries;   d_h = ||v'_h - mean v'||

    Distances are those of the values' own scale, so compare heads of one layer. Equal heads have equal distances.

    text: the prompt; by default the mean over `prompts` passkey prompts.
    prompts: passkey prompts, where no text is given.
    length: tokens of a passkey prompt.
    tokens: keys of a semantic vector.
    window: last queries that observe.
    group: how the query heads of a kv head are joined, "mean" or "max".
    metric: "l2" or "cosine".

    Returns kv scores (L, K). Raises ScoreError for an empty text.

    >>> from headwise.hub import load_model
    >>> model, tokenizer = load_model("tiny-random-llama")
    >>> semantic_distance(model, tokenizer, text="Where does the river end?").values.shape
    torch.Size([3, 2])
    """
    options: dict[str, Any] = {"tokens": whole("tokens", tokens, 1, ScoreError), "group": group, "metric": metric}
    options["window"] = whole("window", window, 1, ScoreError)
    if text is not None:
        rows = [tokenizer(text, return_tensors="pt").input_ids[0]]
        if not len(rows[0]):
            raise ScoreError("text is empty; there is no prompt to read")
    else:
        generator = torch.Generator().manual_seed(whole("seed", seed, 0, ScoreError))
        count = whole("prompts", prompts, 1, ScoreError)
        rows = [p.ids for p in make_passkeys(tokenizer, count=count, length=length, generator=generator)]
    tables = [distance_table(model, ids[None], **options)[0] for ids in rows]
    data = "one text" if text is not None else f"{prompts} passkey prompts of {length} tokens"
    return HeadScores(
        values=torch.stack(tables).mean(0),
        kind="kv",
        method="semantic-distance",
        data=data,
        fingerprint=fingerprint(model),
        meta={"metric": metric, "group": group},
    )
