"""Small byte language models on packaged English, trained alike: dense ones and mixtures of experts. For the papers that train."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import torch
from torch import Tensor

from headwise.papers._step import Step, seeded
from headwise.route import MoEHost, upcycle
from headwise.tasks import english
from headwise.tasks.texts import code

BYTES = 256


@dataclass(frozen=True)
class Size:
    """Sizes of a model and of its training."""

    width: int = 64
    layers: int = 2
    heads: int = 4
    hidden: int = 64  # of one expert; a dense layer of the same active size has k times as many
    experts: int = 8
    steps: int = 120
    batch: int = 16
    length: int = 64
    rate: float = 3e-3
    text: Literal["english", "code"] = "english"


def small_lm(size: Size, hidden: int, seed: int, device: str = "cpu") -> Any:
    """A Llama over bytes with `hidden` units a feed-forward layer; weights from the seed, torch's random state untouched."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=BYTES,
        hidden_size=size.width,
        intermediate_size=hidden,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.heads,
        max_position_embeddings=max(64, size.length),
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return LlamaForCausalLM(config).to(device)


def mixture_lm(size: Size, seed: int, device: str = "cpu", **options: Any) -> tuple[Any, MoEHost]:
    """The same with experts of `size.hidden` units, drawn anew from the statistics of a dense layer: nothing is copied."""
    model = small_lm(size, size.hidden, seed, device)
    return model, upcycle(model, experts=size.experts, how="drop", drop=1.0, seed=seed, **options)


@lru_cache
def corpus(kind: Literal["english", "code"], split: Literal["haystack", "eval"]) -> Tensor:
    """Bytes (n,) of packaged English (0.25 MB) or of Python's library (3 MB); the splits share no document."""
    text = english(split) if kind == "english" else code(split, max_chars=4_000_000)
    return torch.tensor(list(text.encode("utf-8")))


def batches(size: Size, count: int, seed: int, split: Any = "haystack") -> Iterator[Tensor]:
    """`count` batches (batch, length) of random windows of the text; the same for every model of a seed."""
    text = corpus(size.text, split)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        starts = torch.randint(len(text) - size.length, (size.batch,), generator=generator)
        yield text[starts[:, None] + torch.arange(size.length)]


def train(
    model: Any,
    size: Size,
    seed: int,
    *,
    host: MoEHost | None = None,
    decay: bool = True,
    each: Callable[[int], None] | None = None,
) -> None:
    """AdamW with a warm-up of a tenth, then linear decay to 0 or a constant rate; `each(step)` is called after a step."""
    warm = max(1, size.steps // 10)
    model.train()
    step = Step(model, after=None if host is None else host.update_bias)
    with seeded(step.device, seed + 17):  # the noise of noisy routers
        for turn, ids in enumerate(batches(size, size.steps, seed + 1)):
            step(ids, size.rate * min(1.0, (turn + 1) / warm) * (1 - turn / size.steps if decay else 1.0))
            if each is not None:
                each(turn)
        del step  # and with it its graph, which holds the random state of the device
    model.eval()


@torch.no_grad()
def held_out_loss(model: Any, size: Size, *, count: int = 8, noise: float = 0.0) -> float:
    """Mean loss (nats a byte) on text that no training saw; a share `noise` of the input bytes is replaced at random."""
    losses, device = [], next(model.parameters()).device
    for ids in batches(size, count, 999, "eval"):
        losses.append(float(model(corrupted(ids, noise).to(device), labels=ids.to(device)).loss))
    return math.fsum(losses) / len(losses)


def corrupted(ids: Tensor, share: float, seed: int = 5) -> Tensor:
    """ids with a share of the tokens replaced by random bytes that occur in English."""
    if not share:
        return ids
    generator = torch.Generator().manual_seed(seed)
    other = torch.randint(32, 127, ids.shape, generator=generator)
    return torch.where(torch.rand(ids.shape, generator=generator) < share, other, ids)
