"""Three kinds of text that want different attention, and small parallel-block models trained on them. For paper 06."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import torch
from torch import Tensor

from headwise.papers._step import Step
from headwise.tasks import english
from headwise.tasks.texts import code

DOMAINS = ("prose", "code", "sums")
BYTES = 256


@dataclass(frozen=True)
class Size:
    """Sizes of a model and of the phases of its training, in steps of `batch` rows of `length` bytes."""

    width: int = 64
    layers: int = 2
    heads: int = 4
    hidden: int = 128
    seed_steps: int = 150
    branch_steps: int = 100
    mix_steps: int = 60
    batch: int = 16
    length: int = 64
    rate: float = 3e-3


@lru_cache
def text(domain: str, split: Literal["haystack", "eval"]) -> Tensor:
    """Bytes (n,) of a domain; the two splits share no document and no sum."""
    sources: dict[str, Callable[[Any], str]] = {"prose": english, "code": code, "sums": _sums}
    return torch.tensor(list(sources[domain](split).encode("utf-8")), dtype=torch.uint8)


def _sums(split: str) -> str:
    """Lines such as `407+58=465; 465-58=407`: the second half is found by looking back. An eighth of the pairs is held out."""
    generator = torch.Generator().manual_seed(11)
    lines = []
    for a, b in torch.randint(0, 1000, (40000, 2), generator=generator).tolist():
        if ((a * 31 + b) % 8 == 0) == (split == "eval"):
            lines.append(f"{a}+{b}={a + b}; {a + b}-{b}={a}")
    return "\n".join(lines)


def batch(domains: Sequence[str], size: Size, generator: torch.Generator, split: Literal["haystack", "eval"]) -> Tensor:
    """Rows (batch, length) of random windows, the domains in turn."""
    rows = []
    for row in range(size.batch):
        source = text(domains[row % len(domains)], split)
        start = int(torch.randint(len(source) - size.length, (), generator=generator))
        rows.append(source[start : start + size.length])
    return torch.stack(rows).long()


def small_parallel_lm(size: Size, seed: int, device: str = "cpu") -> Any:
    """A byte model with the paper's parallel blocks (Cohere's class): one norm, x + attention(u) + ffn(u), SwiGLU, rotary."""
    from transformers import CohereConfig, CohereForCausalLM

    config = CohereConfig(
        vocab_size=BYTES,
        hidden_size=size.width,
        intermediate_size=size.hidden,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.heads,
        max_position_embeddings=max(64, size.length),
        logit_scale=1.0,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return CohereForCausalLM(config).to(device)


def train(model: Any, domains: Sequence[str], steps: int, size: Size, seed: int, rate: float) -> Any:
    """AdamW with a tenth of warm-up and linear decay to a tenth; gives the model back, in eval mode."""
    warm = max(1, steps // 10)
    generator = torch.Generator().manual_seed(seed)
    model.train()
    step = Step(model)
    for turn in range(steps):
        factor = min(1.0, (turn + 1) / warm) * (1 - 0.9 * turn / max(steps, 1))
        step(batch(domains, size, generator, "haystack"), rate * factor)
    return model.eval()


@torch.no_grad()
def held_out(model: Any, size: Size, *, count: int = 6) -> dict[str, float]:
    """Loss (nats a byte) on unseen text of each domain, and their mean."""
    found, device = {}, next(model.parameters()).device
    for domain in DOMAINS:
        generator = torch.Generator().manual_seed(999)
        rows = [batch([domain], size, generator, "eval").to(device) for _ in range(count)]
        found[domain] = sum(float(model(ids, labels=ids).loss) for ids in rows) / count
    return {**found, "mean": sum(found.values()) / len(DOMAINS)}
