"""Induction and echo heads, found without data: random tokens, repeated (the probe of RazorAttention, arXiv 2407.15891).

Letters: L layers, H query heads, K random tokens before they repeat, T = K · repeats, R watched rows.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from headwise.attach import fingerprint
from headwise.attach.observe import observe
from headwise.checks import Meta
from headwise.errors import AttachError, TaskError
from headwise.modes import evaluating
from headwise.registry import register
from headwise.tasks.texts import encode
from headwise.units import HeadScores

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

LENGTH = 2500  # K of the paper, 4 times: 10 000 tokens


@register("score", "induction", paper="30")
def induction(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    length: int | None = None,
    repeats: int = 4,
    low: int | None = None,
    high: int | None = None,
    start_token: bool = True,
    seed: int = 0,
    progress: bool = False,
) -> HeadScores:
    """Score how much each head looks at what followed the same token before, on random tokens that repeat.

        induction[l,h] = mean over queries i >= K of  sum_{j < i, j ≡ i mod K} A[i, j+1]

    A probability mass in [0, 1]; RazorAttention's probe (arXiv 2407.15891, section 3). No text is needed, and no N x N matrix is kept.
    Gives HeadScores of kind "head", (L, H). `induction_and_echo` gives both scores of the probe from one forward pass.

    length: K, random tokens before they repeat; by default 2500 as in the paper, or what the model's context holds.
      256 finds the same heads in seconds.
    repeats: how often the K tokens stand in the probe, at least 2.
    low: smallest token id to draw; by default all ids but the special ones.
    high: one more than the largest token id to draw.
    start_token: begin with the token that the tokenizer puts before every text, if it has one.

    Raises TaskError for a probe that exceeds vocabulary or context; AttachError for ALiBi models, whose classes do not attach.

    >>> from headwise.hub import load_model
    >>> model, tokenizer = load_model("tiny-random-llama")
    >>> scores = induction(model, tokenizer, length=32, repeats=2)
    >>> tuple(scores.values.shape), bool((scores.values > 0).all())
    ((3, 4), True)
    """
    return induction_and_echo(
        model,
        tokenizer,
        length=length,
        repeats=repeats,
        low=low,
        high=high,
        start_token=start_token,
        seed=seed,
        progress=progress,
    )[0]


@register("score", "echo", paper="30")
def echo(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    length: int | None = None,
    repeats: int = 4,
    low: int | None = None,
    high: int | None = None,
    start_token: bool = True,
    seed: int = 0,
    progress: bool = False,
) -> HeadScores:
    """Score how much each head looks at the same token before, on random tokens that repeat.

        echo[l,h] = mean over queries i >= K of  sum_{j < i, j ≡ i mod K} A[i, j]

    The other half of the probe of `induction`, with the same options and errors.

    length: K, random tokens before they repeat; by default 2500 as in the paper, or what the model's context holds.
    repeats: how often the K tokens stand in the probe, at least 2.
    low: smallest token id to draw; by default all ids but the special ones.
    high: one more than the largest token id to draw.
    start_token: begin with the token that the tokenizer puts before every text, if it has one.

    >>> from headwise.hub import load_model
    >>> model, tokenizer = load_model("tiny-random-llama")
    >>> echo(model, tokenizer, length=32, repeats=2).method
    'echo'
    """
    return induction_and_echo(
        model,
        tokenizer,
        length=length,
        repeats=repeats,
        low=low,
        high=high,
        start_token=start_token,
        seed=seed,
        progress=progress,
    )[1]


def induction_and_echo(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    length: int | None = None,
    repeats: int = 4,
    low: int | None = None,
    high: int | None = None,
    start_token: bool = True,
    seed: int = 0,
    progress: bool = False,
) -> tuple[HeadScores, HeadScores]:
    """Both scores of the probe from one prefill; options and errors as in `induction`."""
    made_for = fingerprint(_without_alibi(model))
    first = _start_tokens(tokenizer) if start_token else []
    period = _period(model, length, repeats, len(first))
    drawn = draw_tokens(_pool(model, tokenizer, low, high), period, torch.Generator().manual_seed(seed))
    ids = torch.cat([torch.tensor(first, dtype=torch.long), drawn.repeat(repeats)])
    masses = probe(model, ids, period, len(first), progress)
    data = f"{period} random tokens x {repeats}"
    meta: Meta = {"length": period, "repeats": repeats, "start_tokens": len(first), "seed": seed}
    made = [
        HeadScores(values=masses[name], method=name, data=data, fingerprint=made_for, meta=meta)
        for name in ("induction", "echo")
    ]
    return made[0], made[1]


@torch.no_grad()
def probe(model: PreTrainedModel, ids: Tensor, period: int, first: int, progress: bool = False) -> dict[str, Tensor]:
    """Mean masses (L, H) over the rows of ids (T,) that have an earlier copy: "induction" and "echo".

    `first` tokens stand before the repeated ones. One forward pass; per head and row two numbers are kept.
    """

    def same(q: Tensor, k: Tensor) -> Tensor:
        return ((q - k) % period == 0) & (k < q) & (k >= first)

    def behind(q: Tensor, k: Tensor) -> Tensor:
        return same(q, k - 1)

    rows = range(first + period, len(ids))
    with evaluating(model), observe(model, rows=rows, pair_mass={"induction": behind, "echo": same}) as record:
        with _working("probing heads", progress):
            model(ids[None].to(model.device), logits_to_keep=1, use_cache=False)
    return {name: record.table(name)[:, 0].double().mean(-1) for name in ("induction", "echo")}


def draw_tokens(pool: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """`count` ids (K,) of the pool (P,): all different where the pool has that many, else with repetition."""
    if count <= len(pool):
        return pool[torch.randperm(len(pool), generator=generator)[:count]]
    return pool[torch.randint(len(pool), (count,), generator=generator)]


def _start_tokens(tokenizer: PreTrainedTokenizerBase | None) -> list[int]:
    return [] if tokenizer is None else encode(tokenizer, "", special=True)


def _period(model: PreTrainedModel, length: int | None, repeats: int, first: int) -> int:
    if repeats < 2:
        raise TaskError(f"repeats={repeats}; the tokens must stand at least twice")
    window = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    period = min(LENGTH, (window - first) // repeats if window else LENGTH) if length is None else length
    if period < 2:
        raise TaskError(f"length={period}; at least 2 tokens, so that 'the same' and 'the next' differ")
    if window and period * repeats + first > window:
        raise TaskError(
            f"length={period} · repeats={repeats} and {first} start token(s) exceed the model's context of {window}"
        )
    return period


def _pool(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, low: int | None, high: int | None
) -> Tensor:
    """Ids (P,) to draw from: those in [low, high) that are no special tokens."""
    size = int(model.config.get_text_config().vocab_size)
    size = size if tokenizer is None else min(size, len(tokenizer))
    low, high = 0 if low is None else low, size if high is None else high
    if not 0 <= low < high <= size:
        raise TaskError(f"low={low}, high={high} is no range of token ids; the vocabulary has {size}")
    special = set() if tokenizer is None else {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    pool = torch.tensor([i for i in range(low, high) if i not in special], dtype=torch.long)
    if len(pool) < 2:
        raise TaskError(
            f"low={low}, high={high} holds {len(pool)} token(s) that are not special; at least 2 are needed"
        )
    return pool


def _without_alibi(model: nn.Module) -> nn.Module:
    """The model itself, unless it biases its logits by distance: its retrieval heads follow from its weights, not from a probe."""
    config = getattr(model, "config", None)
    nested = getattr(config, "attn_config", None)
    if (
        getattr(config, "alibi", False)
        or getattr(nested, "alibi", False)
        or getattr(config, "model_type", "") == "bloom"
    ):
        raise AttachError(
            f"{type(model).__name__} uses ALiBi: the probe is for rotary or learned positions, and no ALiBi class of transformers "
            "(Bloom, MPT, Falcon with alibi) calls the attention interface, so a plan made for it could not be applied either"
        )
    return model


def _working(title: str, progress: bool) -> Any:
    from contextlib import nullcontext

    if not progress:
        return nullcontext()
    from rich import get_console

    return get_console().status(title)
