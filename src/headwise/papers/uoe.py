"""Paper 24, UoE (Yang et al. 2025, arXiv 2503.02495): a model cut into experts; tokens are dropped from q, k and v of a head.

Byte language models of one size are trained from scratch: dense, with selective attention at half of the heads a token
under a router that learns, under one that cannot (the released code), and under none (heads drawn at random), and as a whole
union of experts beside a dense model of its active size.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from headwise.arguments import cache_of
from headwise.papers._run import Measured, mean_of, reproduces
from headwise.papers._small_lm import Size, batches, held_out_loss, small_lm, train
from headwise.papers.catalogue import Paper
from headwise.papers.reproduction import Check
from headwise.progress import track
from headwise.route import Router, Routing, Rule
from headwise.route.uoe import uoe as cut

PAPER = Paper(
    slug="uoe",
    status="partial",
    api="headwise.route.uoe, headwise.route.UnionModel, headwise.route.SelectiveAttention, headwise.route.UnionTopK",
    claim="With each token in half of the heads, for queries, keys and values alike, a learnt router loses at most 2 % of "
    "held-out loss to full attention and beats routers that do not learn and random heads, at under 30 % of the attention "
    "products and about half of the KV cache; and a union of attention and feed-forward experts beats a dense model of its "
    "active size",
)


@dataclass(frozen=True)
class Scale:
    """Sizes of a run."""

    seeds: int = 3
    size: Size = field(default_factory=lambda: Size(hidden=128, steps=240, batch=8, length=128))
    device: str = "cpu"


SCALES = {
    "cpu": Scale(),
    "gpu": Scale(
        size=Size(width=384, layers=6, heads=6, hidden=1152, steps=200, batch=16, length=512, rate=1e-3, text="code"),
        device="cuda",
    ),
}

BASELINES = ("dense", "thin", "none", "random")
CHECKS = (
    Check("a learnt router beats random heads", "loss_gate", "<", "loss_random"),
    Check("a learnt router beats one that cannot learn", "loss_gate", "<", "loss_none"),
    Check("within 2 percent of full attention", "loss_gate", "<=", "loss_dense_and_2_percent"),
    Check("a union beats a dense model of its active size", "loss_union", "<", "loss_thin"),
    Check("attention products are saved", "attention_products_gate", "<", 0.3),
    Check("the cache is smaller", "kv_ratio_gate", "<", 0.6),
    Check("routers whose gates only choose do not learn", "router_moved_none", "==", 0.0),
    Check("routers whose gates weigh do", "router_moved_gate", ">", 0.0),
)


@dataclass(frozen=True, kw_only=True)
class RandomHeads(Rule):
    """k experts drawn at random for each column of a batch, the same in every row and pass: dropping without looking."""

    k: int = 2
    seed: int = 0

    def parameters(self, width: int, experts: int, generator: torch.Generator | None) -> dict[str, Tensor]:
        """None."""
        return {}

    def route(self, seen: Any) -> Routing:
        """See the class."""
        B, N, _ = seen.x.shape
        index = _drawn(self.k, N, seen.experts, self.seed, seen.x.device).expand(B, N, self.k)
        probs = torch.full((B, N, seen.experts), 1 / seen.experts, device=seen.x.device)
        return Routing(index, torch.ones_like(index, dtype=probs.dtype), probs, real=seen.real)


@lru_cache(maxsize=64)
def _drawn(k: int, N: int, E: int, seed: int, device: torch.device) -> Tensor:
    """(N, k) experts of each column, kept on the device: a copy to it would end the replay of training steps."""
    drawn = torch.rand(N, E, generator=torch.Generator().manual_seed(seed))
    return drawn.topk(k, dim=-1).indices.to(device)


@reproduces(PAPER, CHECKS)
def reproduce(scale: str = "cpu", *, seed: int = 0, progress: bool = False) -> Measured:
    """Measure the claim with three seeds. "cpu": 2 layers of width 64, rows of 128 bytes; "gpu": 6 of width 384, 512 bytes."""
    chosen = SCALES[scale]
    rows = [measure(seed + turn, chosen) for turn in track(range(chosen.seeds), "seeds", progress)]
    numbers = mean_of(rows)
    metrics = {name: value for name, value in numbers.items() if not name.endswith(BASELINES)}
    gains = [row["loss_random"] - row["loss_gate"] for row in rows]
    metrics |= {"gain_over_random_least": min(gains), "gain_over_random_most": max(gains)}
    baselines = {name: value for name, value in numbers.items() if name.endswith(BASELINES)}
    baselines["loss_dense_and_2_percent"] = 1.02 * numbers["loss_dense"]
    return metrics, baselines


def measure(seed: int, scale: Scale) -> dict[str, float]:
    """Held-out loss (nats a byte) of every model; what selective attention saves."""
    size, found = scale.size, {}
    for name, model in (("dense", _dense(scale, seed)), ("thin", _thin(scale, seed))):
        train(model, size, seed)
        found[f"loss_{name}"] = held_out_loss(model, size)
    for name in ("gate", "balanced", "none", "random", "union"):
        union = _union(name, scale, seed)
        before = {n: layer.router.state_dict() for n, layer in union.attention.items()}
        before = {n: {key: value.clone() for key, value in state.items()} for n, state in before.items()}
        _whole_lists(union, scale.device == "cuda")
        train(union.model, size, seed)
        _whole_lists(union, False)
        found[f"loss_{name}"] = held_out_loss(union.model, size)
        found[f"router_moved_{name}"] = _moved(union, before)
        if name != "random":  # random heads are drawn by column, which single steps do not know
            found[f"kv_ratio_{name}"], found[f"attention_products_{name}"] = savings(union, size, scale.device)
    return found


def _dense(scale: Scale, seed: int) -> Any:
    return small_lm(scale.size, scale.size.hidden, seed, scale.device)


def _thin(scale: Scale, seed: int) -> Any:
    """Half of the heads, of the same size, and half of the hidden units."""
    from transformers import LlamaConfig, LlamaForCausalLM

    size = scale.size
    like = small_lm(replace(size, layers=1), size.hidden // 2, seed).config.to_dict()
    like |= {"num_hidden_layers": size.layers, "head_dim": size.width // size.heads}
    like |= {"num_attention_heads": size.heads // 2, "num_key_value_heads": size.heads // 2}
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return LlamaForCausalLM(LlamaConfig(**like)).to(scale.device)


def _union(name: str, scale: Scale, seed: int) -> Any:
    """A model cut at half of its heads; "union" also at half of its feed-forward slices, "balanced" with a balance loss."""
    combine: Any = "none" if name == "none" else "gate"
    slices = 4 if name == "union" else 0
    options: dict[str, Any] = {"mlp_experts": slices, "mlp_k": 2, "balance": 0.01 if name == "balanced" else 0.0}
    union = cut(_dense(scale, seed), None, active=0.5, combine=combine, seed=seed, **options)
    if name == "random":
        for n, layer in union.attention.items():
            rule = RandomHeads(k=union.cut.attention_k, seed=1000 * seed + n)
            layer.router = Router(rule, width=scale.size.width, experts=layer.experts)
    return union


def _whole_lists(union: Any, on: bool) -> None:
    """Whether training steps may be replayed as a graph; the numbers are the same."""
    for layer in union.attention.values():
        layer.whole_lists = on


def _moved(union: Any, before: dict[int, dict[str, Tensor]]) -> float:
    """Largest change of a router's parameter over training, weight decay undone: an untrained weight only shrinks."""
    most = 0.0
    for n, layer in union.attention.items():
        for name, value in layer.router.state_dict().items():
            old = before[n][name]
            scale = (value * old).sum() / (old * old).sum().clamp(min=1e-12)
            change = float((value - scale * old).abs().max())
            most = max(most, change if change > 1e-6 else 0.0)
    return most


@torch.no_grad()
def savings(union: Any, size: Size, device: str) -> tuple[float, float]:
    """Bytes of the cache after one row over dense, and query-key products over those of all heads on all tokens."""
    kv, products = [], []
    for ids in batches(replace(size, batch=1), 4, 555, "eval"):
        with union.recording() as record:
            cache = cache_of(union.model(ids.to(device), use_cache=True))
        kv.append(union.kv_ratio(cache))
        for n in union.attention:
            routing = record[-1 - n][0]
            products.append(float(routing.load().square().sum()) / (routing.experts * ids.shape[1] ** 2))
    return sum(kv) / len(kv), sum(products) / len(products)
