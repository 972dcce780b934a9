"""Paper 06, BAM (Zhang et al. 2024, arXiv 2408.08274): branch a seed, train the branches apart, mix them.

A seed is trained on three kinds of text, branched and trained on each alone. The seed and its three specialists are then
mixed and trained on all three, as BAM, as BTX (feed-forward experts, averaged attention) and as their plain average; beside
them a dense model and a mixture of four copies of it, which see as many tokens as all branches together and the mixture.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from headwise.papers._bam_domains import DOMAINS, Size, held_out, small_parallel_lm, train
from headwise.papers._run import Measured, mean_of, reproduces
from headwise.papers.catalogue import Paper
from headwise.papers.reproduction import Check
from headwise.progress import track
from headwise.route._bam_model import soup
from headwise.route.bam import bam as mix

PAPER = Paper(
    slug="bam",
    status="partial",
    api="headwise.route.bam, headwise.route.MixedModel, headwise.route.soup",
    claim="Mixing a seed and its specialists with attention experts that all run (BAM) reaches a lower held-out loss than "
    "mixing their feed-forward layers alone (BTX) or averaging them, on the same tokens; own keys and values beat shared "
    "ones; sending each token to one attention expert loses the gain; and it beats dense training on as many tokens",
)


@dataclass(frozen=True)
class Scale:
    """Sizes of a run."""

    seeds: int = 3
    size: Size = field(default_factory=Size)
    device: str = "cpu"


SCALES = {
    "cpu": Scale(),
    "gpu": Scale(
        size=Size(
            width=384, layers=6, heads=6, hidden=768, seed_steps=500, branch_steps=100, mix_steps=80, batch=24,
            length=256, rate=1e-3,
        ),
        device="cuda",
    ),
}  # fmt: skip

BASELINES = ("own", "seed", "dense", "copies", "soup", "btx")
CHECKS = (
    Check("attention experts beat feed-forward experts alone", "loss_bam", "<", "loss_btx"),
    Check("so they do with shared keys and values", "loss_bam_shared", "<", "loss_btx"),
    Check("own keys and values are no worse than shared", "loss_bam", "<=", "loss_bam_shared"),
    Check("all attention experts beat one", "loss_bam", "<", "loss_bam_top1"),
    Check("experts beat the average", "loss_btx", "<", "loss_soup"),
    Check("the mixture beats dense training on as many tokens", "loss_bam", "<", "loss_dense"),
    Check("specialists beat copies", "loss_bam", "<", "loss_copies"),
    Check("BAM starts lower than BTX", "start_bam", "<", "start_btx"),
)


@reproduces(PAPER, CHECKS)
def reproduce(scale: str = "cpu", *, seed: int = 0, progress: bool = False) -> Measured:
    """Measure the claim with three seeds. "cpu": 2 layers of width 64 on 1024 bytes a step; "gpu": 6 layers of width 384."""
    chosen = SCALES[scale]
    rows = [measure(seed + turn, chosen) for turn in track(range(chosen.seeds), "seeds", progress)]
    numbers = mean_of(rows)
    spread = [row["loss_btx"] - row["loss_bam"] for row in rows]
    metrics = {name: value for name, value in numbers.items() if not name.endswith(BASELINES)}
    metrics |= {"gain_over_btx_least": min(spread), "gain_over_btx_most": max(spread)}
    baselines = {name: value for name, value in numbers.items() if name.endswith(BASELINES)}
    return metrics, baselines


def measure(seed: int, scale: Scale) -> dict[str, float]:
    """Held-out losses (nats a byte) of every mixture before and after mixing, all from one seed model."""
    size = scale.size
    start = train(small_parallel_lm(size, seed, scale.device), DOMAINS, size.seed_steps, size, seed, size.rate)
    half = size.rate / 2  # as in the paper: branches peak at half the rate of pre-training
    sources = [start]
    for turn, domain in enumerate(DOMAINS):
        sources.append(train(copy.deepcopy(start), [domain], size.branch_steps, size, seed + 100 + turn, half))
    budget = len(DOMAINS) * size.branch_steps
    dense = train(copy.deepcopy(start), DOMAINS, budget, size, seed + 200, half)
    found = {f"{name}_own": held_out(model, size)[name] for name, model in zip(DOMAINS, sources[1:], strict=True)}
    found["loss_seed"] = held_out(start, size)["mean"]
    for name, build in mixtures(sources, dense, seed).items():
        model = build()
        found[f"start_{name}"] = held_out(model, size)["mean"]
        train(model, DOMAINS, size.mix_steps, size, seed + 300, half)
        after = held_out(model, size)
        found[f"loss_{name}"] = after["mean"]
        found |= {f"{domain}_{name}": after[domain] for domain in DOMAINS}
    return found


def mixtures(sources: list[Any], dense: Any, seed: int) -> dict[str, Callable[[], Any]]:
    """What is compared: name -> a function that builds the model."""
    return {
        "bam": lambda: mix(sources, None, parallel=True, seed=seed).model,
        "bam_shared": lambda: mix(sources, None, kv="shared", seed=seed).model,
        "bam_top1": lambda: mix(sources, None, attention_k=1, seed=seed).model,
        "btx": lambda: mix(sources, None, attention="average", seed=seed).model,
        "copies": lambda: mix([dense] * len(sources), None, seed=seed).model,
        "soup": lambda: soup(sources),
        "dense": lambda: copy.deepcopy(dense),
    }
