"""What a head reads while the model repeats its context: scores in the manner of KVzip (Kim et al. 2025, arXiv 2505.23416)."""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
from torch import Tensor

from headwise.attach import HeadCall, attach, find_stack, fingerprint
from headwise.attention.groups import KVGroup, visible
from headwise.checks import shown, whole
from headwise.errors import ScoreError
from headwise.progress import track
from headwise.registry import register
from headwise.tasks import english
from headwise.tasks.texts import encode
from headwise.units import HeadScores

Reduce = Literal["mean", "max"]
ROWS = 128  # queries whose attention is made at a time
ASK = "\n\nRepeat the previous context:\n\n"


@register("score", "reconstruction")
def reconstruction(
    model: Any,
    tokenizer: Any,
    *,
    tokens: int = 256,
    texts: int = 2,
    reduce: Reduce = "mean",
    seed: int = 0,
    progress: bool = False,
) -> HeadScores:
    """How strongly a kv head reads a text back while the model repeats it; no question is involved (after KVzip).

        s_j = max over the queries i of the second copy, and over the query heads of the kv head, of softmax(q_i·k / √d)_j
        score = mean (or max) of s_j over the keys j of the first copy

    The input is text, a request to repeat it, and the text again. KVzip keeps keys by s_j itself, for one given context; the score of a
    head over English text is the query-agnostic part that a plan needs, e.g. `headwise.budget.duo(scores, budget="50%")`.

    tokens: length of each text.
    texts: pieces of English, drawn.
    reduce: "mean" or "max" over the keys of the text.
    seed: of the draw.

    Returns kv scores (L, K) in [0, 1]. Raises ScoreError for a count below 1 or an unknown reduction.

    >>> from headwise.hub import load_model
    >>> model, tokenizer = load_model("tiny-random-llama")
    >>> reconstruction(model, tokenizer, tokens=40, texts=1).values.shape
    torch.Size([3, 2])
    """
    if reduce not in get_args(Reduce):
        raise ScoreError(f"reduce is {shown(reduce)}; it must be 'mean' or 'max'")
    length, count = whole("tokens", tokens, 1, ScoreError), whole("texts", texts, 1, ScoreError)
    generator = torch.Generator().manual_seed(whole("seed", seed, 0, ScoreError))
    ids = torch.tensor(encode(tokenizer, english("haystack"), special=False))
    if len(ids) < length:
        raise ScoreError(f"tokens is {length}; the packaged text has {len(ids)}")
    ask = torch.tensor(encode(tokenizer, ASK, special=False))
    starts = torch.randint(0, len(ids) - length + 1, (count,), generator=generator).tolist()
    tables = [read_back(model, ids[at : at + length], ask, reduce) for at in track(starts, "reading back", progress)]
    return HeadScores(
        values=torch.stack(tables).mean(0),
        kind="kv",
        method="reconstruction",
        data=f"{count} texts of {length} tokens",
        fingerprint=fingerprint(model),
        meta={"reduce": reduce},
    )


def read_back(model: Any, text: Tensor, ask: Tensor, reduce: str = "mean") -> Tensor:
    """(L, K): each kv head's score for one text (T,), read, asked for by the tokens `ask`, and read again."""
    T, stack = len(text), find_stack(model)
    found = torch.zeros(stack.layers, stack.kv_heads)

    def observe(call: HeadCall, out: Tensor) -> None:
        best = strongest(call, T + len(ask), T)
        found[call.layer] = (best.mean(-1) if reduce == "mean" else best.amax(-1))[0].cpu()

    with attach(model, observers=[observe]), torch.no_grad():
        model(torch.cat([text, ask, text])[None].to(model.device), use_cache=False)
    return found


def strongest(call: HeadCall, begin: int, keys: int) -> Tensor:
    """max of the attention that the queries from `begin` on pay to each of the first `keys` keys: (B, K, keys) float32."""
    B, H, N, D = call.q.shape
    K = call.k.shape[1]
    group, queries = KVGroup(tuple(range(K)), call.k, call.v), call.queries()
    best = call.q.new_zeros(B, K, keys, dtype=torch.float32)
    for at in range(begin, N, ROWS):
        end = min(at + ROWS, N)
        q = call.q[:, :, at:end].float().view(B, K, H // K, end - at, D) * call.scale
        seen = visible(group, queries.rows(at, end))[:, :, None]
        logits = q @ call.k.float().transpose(-1, -2)[:, :, None]
        shares = logits.masked_fill(~seen, -torch.inf).softmax(-1).nan_to_num(0.0)[..., :keys]
        best = torch.maximum(best, shares.amax((2, 3)))
    return best
