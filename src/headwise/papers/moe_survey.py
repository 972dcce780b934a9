"""Paper 25, A Survey on Mixture of Experts (Cai et al. 2024, arXiv 2407.06204): its taxonomy as routers that can be exchanged.

A task of latent clusters, where it is known what a good router does; then small byte language models from scratch, dense
and with eight experts under different routers, on the same tokens.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field

import torch

from headwise.papers._moe_clusters import measure_clusters
from headwise.papers._run import Measured, mean_of, reproduces
from headwise.papers._small_lm import BYTES, Size, held_out_loss, mixture_lm, small_lm, train
from headwise.papers.catalogue import Paper
from headwise.papers.reproduction import Check
from headwise.progress import track
from headwise.route import Cosine, Hash, NoisyTopK, Rule, SigmoidTopK, SoftmaxTopK

PAPER = Paper(
    slug="moe-survey",
    status="partial",
    api="headwise.route.MoELayer, headwise.route.Router, headwise.route.SoftmaxTopK, headwise.route.upcycle, headwise.route.SwitchHead",
    claim="Top-k routers with a balance loss and expert choice find latent clusters that hashing cannot; mutual information "
    "makes routing sure and even; and a byte language model with 2 of 8 experts a token beats the dense one of equal "
    "active size on the same tokens, under learned routers that differ little among themselves",
)


@dataclass(frozen=True)
class Scale:
    """Sizes of a run."""

    seeds: int = 3
    cluster_steps: int = 600
    size: Size = field(default_factory=Size)
    device: str = "cpu"


SCALES = {
    "cpu": Scale(),
    "gpu": Scale(
        size=Size(width=384, layers=6, heads=6, hidden=512, steps=200, batch=32, length=256, rate=1e-3, text="code"),
        device="cuda",
    ),
}

CHECKS = (
    Check("top-k with a balance loss finds the clusters", "purity_balanced", ">", 0.9),
    Check("expert choice does too", "purity_choice", ">", 0.9),
    Check("hashing does not", "purity_hash", "<", 0.3),
    Check("the balance loss keeps experts alive", "dead_balanced", "<=", "dead_unbalanced"),
    Check("mutual information raises information", "information_information", ">", "information_unbalanced"),
    Check("soft mixtures of tokens train without a loss", "error_soft", "<", "error_hash"),
    Check("experts beat dense of equal active size", "loss_topk", "<", "loss_dense"),
    Check("learned routers lie close together", "spread_learned", "<=", 0.03),
    Check("and beat hashing", "loss_topk", "<", "loss_hash"),
)

ROUTERS: dict[str, tuple[Callable[[], Rule], dict[str, float]]] = {
    "topk": (lambda: SoftmaxTopK(k=2), {"balance": 0.01}),
    "unbalanced": (lambda: SoftmaxTopK(k=2), {}),
    "sigmoid": (lambda: SigmoidTopK(k=2), {}),
    "noisy": (lambda: NoisyTopK(k=2), {"importance": 0.1, "load": 0.1}),
    "cosine": (lambda: Cosine(k=2), {"balance": 0.01}),
    "hash": (lambda: Hash(vocabulary=BYTES, k=2), {}),
}
LEARNED = ("topk", "sigmoid", "noisy", "cosine")
CONTROLS = ("hash", "unbalanced", "dense", "wide")


@reproduces(PAPER, CHECKS)
def reproduce(scale: str = "cpu", *, seed: int = 0, progress: bool = False) -> Measured:
    """Measure the claim with three seeds. "cpu": 2-layer models of width 64; "gpu": 6 layers of width 384."""
    size = SCALES[scale]
    seeds = range(seed, seed + size.seeds)
    if size.device == "cpu":
        clusters = [measure_clusters(s, size.cluster_steps) for s in track(seeds, "clusters", progress)]
        models = [measure_models(s, size) for s in track(seeds, "language models", progress)]
    else:  # clusters are measured on the CPU meanwhile, as everywhere
        spawn = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(size.seeds, spawn, torch.set_num_threads, (1,)) as pool:
            jobs = [pool.submit(measure_clusters, s, size.cluster_steps) for s in seeds]
            models = [measure_models(s, size) for s in track(seeds, "language models", progress)]
            clusters = [job.result() for job in jobs]
    numbers = mean_of(clusters) | mean_of(models)
    learned = [numbers[f"loss_{name}"] for name in LEARNED]
    numbers |= {"spread_learned": max(learned) / min(learned) - 1}
    control = {name: value for name, value in numbers.items() if any(name.endswith(f"_{c}") for c in CONTROLS)}
    metrics = {name: value for name, value in numbers.items() if name not in control}
    return metrics, control


def measure_models(seed: int, scale: Scale, names: Iterable[str] = tuple(ROUTERS)) -> dict[str, float]:
    """Held-out loss (nats a byte) of every router and of the two dense models; load and sureness of the routed ones."""
    size, found = scale.size, {}
    for name, hidden in (("dense", 2 * size.hidden), ("wide", size.experts * size.hidden)):
        model = small_lm(size, hidden, seed, scale.device)
        train(model, size, seed)
        found[f"loss_{name}"] = held_out_loss(model, size)
    for name in names:
        rule, losses = ROUTERS[name]
        model, host = mixture_lm(size, seed, scale.device, rule=rule(), losses=losses)
        train(model, size, seed, host=host)
        with host.recording() as record:
            found[f"loss_{name}"] = held_out_loss(model, size)
        numbers = [routing.statistics() for layer in record.values() for routing in layer]
        for what in ("violation", "entropy"):
            found[f"{what}_{name}"] = sum(row[what] for row in numbers) / len(numbers)
    return found
