"""Byte language models on text that every machine has, for the recipes: sizes, models, rows.

Letters: B rows of a step, N tokens of a row.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from headwise.errors import TaskError
from headwise.hub import byte_tokenizer
from headwise.route._recipes import Data
from headwise.route._train import Recipe, token_rows
from headwise.tasks import english
from headwise.tasks.texts import code

Source = Literal["english", "code", "mixed"]
HELD_OUT = 64  # rows
CODE_CHARS = {"cpu": 1_000_000, "gpu": 20_000_000}


@dataclass(frozen=True, kw_only=True)
class TextSize:
    """Sizes of a byte model and of its training: `steps` of `batch` rows of `length` bytes."""

    width: int = 96
    layers: int = 3
    heads: int = 8
    hidden: int = 192
    steps: int = 300
    batch: int = 16
    length: int = 96
    rate: float = 2e-3

    def recipe(self, seed: int) -> Recipe:
        """The training of this size."""
        return Recipe(steps=self.steps, batch_size=self.batch, learning_rate=self.rate, seed=seed)


SIZES = {
    "cpu": TextSize(),
    "gpu": TextSize(width=768, layers=12, heads=12, hidden=2048, steps=1000, batch=64, length=512, rate=6e-4),
}


def small_llama(size: TextSize, *, hidden: int | None = None, seed: int = 0) -> Any:
    """A Llama over the byte tokenizer's ids; weights from the seed, torch's random state untouched."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=320,
        hidden_size=size.width,
        intermediate_size=size.hidden if hidden is None else hidden,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.heads,
        max_position_embeddings=max(1024, size.length),
        pad_token_id=256,
        bos_token_id=257,
        eos_token_id=258,
        architectures=["LlamaForCausalLM"],  # else the first save sets it: another fingerprint
    )
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return LlamaForCausalLM._from_config(config, attn_implementation="sdpa")


def text_data(
    size: TextSize, data: Source, text: str | None, *, seed: int, scale: str = "cpu", steps: int | None = None
) -> Data:
    """Random windows of the packaged text, or of `text`, whose last tenth is then held out. Same seed, same rows.

    Raises TaskError for an unknown source or a text of which no two windows can be cut.
    """
    train, eval_ = _splits(data, scale) if text is None else _cut(text)
    for part in (train, eval_):
        if len(part) <= size.length:
            raise TaskError(f"text has {len(part)} bytes in one part; windows of {size.length} need more")
    rows = random_windows(train, (steps or size.steps) * size.batch, size.length, seed + 1)
    held_out = random_windows(eval_, HELD_OUT, size.length, 999)
    return Data(token_rows(rows), token_rows(held_out), byte_tokenizer())


def text_name(data: str, text: str | None) -> str:
    """What a run was trained on, for its settings."""
    return data if text is None else f"text {hashlib.sha256(text.encode()).hexdigest()[:16]}"


def _splits(data: str, scale: str) -> tuple[Tensor, Tensor]:
    if data not in ("english", "code", "mixed"):
        raise TaskError(f"data is {data!r}; it must be 'english', 'code' or 'mixed'")
    found = []
    for split in ("haystack", "eval"):
        parts = [english(split)] if data != "code" else []
        parts += [code(split, max_chars=CODE_CHARS[scale])] if data != "english" else []
        found.append(_bytes("\n\n".join(parts)))
    return found[0], found[1]


def _cut(text: str) -> tuple[Tensor, Tensor]:
    every = _bytes(text)
    at = len(every) - len(every) // 10
    return every[:at], every[at:]


def _bytes(text: str) -> Tensor:
    return torch.frombuffer(bytearray(text.encode("utf-8")), dtype=torch.uint8) if text else torch.zeros(0)


def random_windows(ids: Tensor, count: int, length: int, seed: int) -> Tensor:
    """Windows (count, length) of token ids (N,) that begin where `seed` draws. Raises TaskError for a text that is too short."""
    if len(ids) <= length:
        raise TaskError(f"text has {len(ids)} tokens; windows of {length} need more")
    starts = torch.randint(len(ids) - length, (count,), generator=torch.Generator().manual_seed(seed))
    return ids[starts[:, None] + torch.arange(length)].long()
