"""Paper 26, Graph of Tokens (Nguyen et al. 2025, arXiv 2505.00792): experts chosen by a weighed average over similar tokens.

Small byte language models with 2 of 8 experts a token, trained from scratch under the plain router and under four graphs.
Their routing of one fixed text is compared from checkpoint to checkpoint, and with and without noise in the text.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from headwise.papers._run import Measured, reproduces
from headwise.papers._small_lm import Size, batches, corrupted, held_out_loss, mixture_lm, train
from headwise.papers.catalogue import Paper
from headwise.papers.reproduction import Check
from headwise.progress import track
from headwise.route import Graph, Router, Rule, SoftmaxTopK, fluctuation_curve, routing_agreement, routing_entropy

PAPER = Paper(
    slug="graph-of-tokens",
    status="partial",
    api="headwise.route.Graph, headwise.route.routing_fluctuation, headwise.route.routing_entropy, headwise.route.Router",
    claim="Routers that average the routing of similar or attended tokens change their choice between late checkpoints at "
    "least a fifth less than the plain router, keep more of it when a tenth of the text is replaced, and cost no loss; and "
    "noise in the router is damped by the size of the neighbourhood",
)


@dataclass(frozen=True)
class Scale:
    """Sizes of a run. Checkpoints are taken every `every` steps at the end of training, at a constant rate."""

    seeds: int = 3
    size: Size = field(default_factory=Size)
    checkpoints: int = 10
    every: int = 5
    device: str = "cpu"


SCALES = {
    "cpu": Scale(),
    "gpu": Scale(
        size=Size(
            width=384,
            layers=6,
            heads=6,
            hidden=512,
            experts=16,
            steps=250,
            batch=32,
            length=256,
            rate=1e-3,
            text="code",
        ),
        every=8,
        device="cuda",
    ),
}

ROUTERS: dict[str, Rule] = {
    "plain": SoftmaxTopK(k=2),
    "similarity": Graph(base=SoftmaxTopK(k=2), graph="similarity"),
    "attention": Graph(base=SoftmaxTopK(k=2), graph="attention"),
    "nosink": Graph(base=SoftmaxTopK(k=2), graph="attention", exclude_sink=1),
    "uniform": Graph(base=SoftmaxTopK(k=2), graph="cosine", tau=1e6),  # the ablation: a graph that knows nothing
}
CONTROLS = ("plain", "uniform")

CHECKS = (
    Check("similarity is steadier by a fifth", "fluctuation_similarity", "<=", "four_fifths_of_plain"),
    Check("attention is steadier by a fifth", "fluctuation_attention", "<=", "four_fifths_of_plain"),
    Check("similarity keeps more under noise", "agreement_similarity", ">", "agreement_plain"),
    Check("attention keeps more under noise", "agreement_attention", ">", "agreement_plain"),
    Check("similarity costs no loss", "loss_similarity", "<=", "loss_plain_and_1_percent"),
    Check("attention costs no loss", "loss_attention", "<=", "loss_plain_and_1_percent"),
    Check("similarity is better than a graph that knows nothing", "loss_similarity", "<", "loss_uniform"),
    Check("noise is damped as predicted", "damping_error", "<=", 0.15),
)


@reproduces(PAPER, CHECKS)
def reproduce(scale: str = "cpu", *, seed: int = 0, progress: bool = False) -> Measured:
    """Measure the claim with three seeds. "cpu": 2-layer models of width 64; "gpu": 6 layers of width 384, 16 experts."""
    size = SCALES[scale]
    jobs = [(name, seed + turn) for turn in range(size.seeds) for name in ROUTERS]
    rows: dict[str, list[dict[str, float]]] = {name: [] for name in ROUTERS}
    for name, turn in track(jobs, "models", progress):
        rows[name].append(measure(name, turn, size))
    metrics = {"damping_error": damping_error(seed)}
    baselines: dict[str, float] = {}
    for name, found in rows.items():
        for what in found[0]:
            value = sum(row[what] for row in found) / len(found)
            (baselines if name in CONTROLS else metrics)[f"{what}_{name}"] = value
    baselines["four_fifths_of_plain"] = 0.8 * baselines["fluctuation_plain"]
    baselines["loss_plain_and_1_percent"] = 1.01 * baselines["loss_plain"]
    return metrics, baselines


def measure(name: str, seed: int, scale: Scale) -> dict[str, float]:
    """Train one model; its loss, how steady, how robust and how sure its routing is, means over layers."""
    size = scale.size
    model, host = mixture_lm(size, seed, scale.device, rule=ROUTERS[name], losses={"balance": 0.01})
    fixed = torch.cat(list(batches(size, 4, 777, "eval"))).to(scale.device)
    seen: list[dict[int, Any]] = []
    wanted = {size.steps - 1 - scale.every * turn for turn in range(scale.checkpoints)}

    def keep(step: int) -> None:
        if step in wanted:
            seen.append(routings(model, host, fixed))
            model.train()

    train(model, size, seed, host=host, decay=False, each=keep)
    clean, noisy = seen[-1], routings(model, host, corrupted(fixed.cpu(), 0.1).to(scale.device))
    same = corrupted(fixed.cpu(), 0.1).to(scale.device) == fixed  # tokens that were not themselves replaced
    layers = range(len(clean))
    return {
        "loss": held_out_loss(model, size),
        "loss_noisy": held_out_loss(model, size, noise=0.1),
        "fluctuation": _mean(
            sum(curve) / len(curve) for n in layers if (curve := fluctuation_curve([c[n].index for c in seen]))
        ),
        "agreement": _mean(routing_agreement(clean[n].index[same], noisy[n].index[same]) for n in layers),
        "entropy": _mean(routing_entropy(clean[n], fraction=True) for n in layers),
        "violation": _mean(clean[n].statistics()["violation"] for n in layers),
    }


def routings(model: Any, host: Any, ids: Tensor) -> dict[int, Any]:
    """The routing of every layer for these tokens."""
    with host.recording() as record, torch.no_grad():
        model.eval()(ids)
    return {layer: rows[0] for layer, rows in record.items()}


def damping_error(seed: int, *, tokens: int = 32, draws: int = 2000) -> float:
    """Largest relative distance between the measured variance of Π under independent noise in R and Σ_j S_ij² times it.

    Frozen random features; S is read off by routing one-hot distributions through the graph.
    """
    generator = torch.Generator().manual_seed(seed)
    router = Router(Graph(base=SoftmaxTopK(k=2), graph="similarity"), width=32, experts=8, generator=generator)
    u = torch.randn(1, tokens, 32, generator=generator)
    q, k = (u @ router.get_parameter("W_s"))[:, None], u[:, None]
    logits = (q @ k.mT / 32**0.5).masked_fill(~torch.ones(tokens, tokens).tril().bool(), -1e30)
    S = logits.softmax(-1)[0, 0].detach()
    base = (u @ router.get_parameter("W").T).softmax(-1).detach()
    torch.testing.assert_close(router(u).probs.detach(), (S @ base), rtol=1e-4, atol=1e-5)
    noise = 0.01 * torch.randn(draws, tokens, 8, generator=generator)
    spread = (S @ (base + noise)).var(0).mean(-1)
    expected = 1e-4 * S.square().sum(-1)
    return float((spread / expected - 1).abs().max())


def _mean(values: Iterable[float]) -> float:
    values = list(values)
    return sum(values) / len(values)
