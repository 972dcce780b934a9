"""Paper 02, MoA (Fu et al. 2024, arXiv 2406.14909): every head its own span, which grows with the text by its own rule."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

import headwise
from headwise.budget._moa_profile import InfluenceProfile
from headwise.budget._moa_rules import moa_spans
from headwise.budget.moa import moa
from headwise.budget.moa_influence import moa_influence
from headwise.errors import HeadwiseError
from headwise.hub import load_model
from headwise.papers._run import Measured, device_of, reproduces
from headwise.papers.catalogue import Paper
from headwise.papers.reproduction import Check
from headwise.plan import HeadPlan, Pattern, SinkWindow
from headwise.tasks import Prompt, english, even_depths, exact_match, make_passkey, window_losses
from headwise.tasks.texts import encode

PAPER = Paper(
    slug="moa-sparse",
    status="works",
    api="headwise.budget.moa_influence, headwise.budget.moa, headwise.budget.moa_front, headwise.budget.moa_spans",
    claim="With half of the KV cache, spans alpha + beta · N that an influence profile and an integer programme choose for every kv head "
    "retrieve at least 1.5 times what a uniform window of equal bytes retrieves, at profiled lengths and at twice the longest, at no "
    "cost in perplexity against that window; the same rules on random heads do not",
)
CHECKS = (
    Check("the task is solved with the whole cache", "recall_full", ">=", 0.9),
    Check("half of the bytes at most", "cache_share_50", "<=", 0.5),
    Check("far more is retrieved than by a uniform window", "recall_ratio_50", ">=", 1.5),
    Check("random heads under the same rules do worse", "recall_moa_50", ">", "recall_shuffled_50_best"),
    Check("and the inverse choice", "recall_moa_50", ">", "recall_inverse_50"),
    Check("at no cost in perplexity", "ppl_moa_50", "<=", "ppl_uniform_50"),
    Check("at three quarters too", "recall_moa_75", ">=", "recall_uniform_75"),
    Check("at twice the profiled length too", "recall_moa_50_beyond", ">", "recall_uniform_50_beyond"),
)


@reproduces(PAPER, CHECKS)
def reproduce(scale: str = "cpu", *, seed: int = 0, progress: bool = False) -> Measured:
    """Measure the claim on smollm2. "cpu": profile at 512 and 1024, 6 passkeys a plan, about 3 minutes on two quiet cores; "gpu": more."""
    sizes: dict[str, Any] = {"lengths": (512, 1024), "samples": 2, "prompts": 6, "beyond": 2, "windows": 2}
    if scale == "gpu":
        sizes = {"lengths": (512, 1024, 2048), "samples": 8, "prompts": 40, "beyond": 20, "windows": 8}
    return measure(device=device_of(scale), seed=seed, progress=progress, **sizes)


def measure(
    model_name: str = "smollm2",
    *,
    lengths: Sequence[int],
    samples: int,
    prompts: int,
    beyond: int,
    windows: int,
    block: int = 64,
    shuffles: int = 3,
    device: str = "cpu",
    seed: int = 0,
    progress: bool = False,
) -> tuple[dict[str, float], dict[str, float]]:
    """(metrics, baselines) of MoA plans at 25, 50 and 75 % against uniform windows, shuffled and inverse rules of equal bytes."""
    model, tokenizer = load_model(model_name, device=device)
    if tokenizer is None:
        raise HeadwiseError(f"{model_name!r} has no tokenizer; retrieval needs a language model")
    started = time.monotonic()
    profile = moa_influence(
        model, tokenizer, lengths=lengths, samples=samples, block=block, seed=seed, progress=progress
    )
    metrics: dict[str, float] = {"profile_s": time.monotonic() - started}
    n = max(lengths)
    bench = Bench.of(model, tokenizer, n, prompts, windows, seed + 1000)
    far = Bench.of(model, tokenizer, 2 * n, beyond, 0, seed + 2000)
    full = HeadPlan.full(profile.layers, profile.fingerprint.kv_heads if profile.fingerprint else profile.units)
    baselines = {"recall_full": bench.recall(full), "ppl_full": bench.perplexity(full)}
    for share in (50, 75, 25):
        rules = _plan(profile, share, n)
        plan = moa_spans(rules, n, multiple=block, least=2 * block)
        metrics |= {f"recall_moa_{share}": bench.recall(plan), f"ppl_moa_{share}": bench.perplexity(plan)}
        metrics[f"cache_share_{share}"] = plan.ratio(n)
        other = uniform(plan, n, block)
        baselines |= {f"recall_uniform_{share}": bench.recall(other), f"ppl_uniform_{share}": bench.perplexity(other)}
        if share == 50:
            controls = _controls(bench, plan, n, shuffles, seed)
            metrics |= {"loss_50": float(rules.meta["loss"]), "rules_used": float(len(set(sum(rules.patterns, ()))))}
            metrics["recall_elastic_50"], metrics["ppl_elastic_50"] = bench.recall(rules), bench.perplexity(rules)
            longer = moa_spans(rules, 2 * n, multiple=block, least=2 * block)
            metrics |= {"recall_moa_50_beyond": far.recall(longer), "cache_share_50_beyond": longer.ratio(2 * n)}
            baselines |= controls | {"recall_uniform_50_beyond": far.recall(uniform(longer, 2 * n, block))}
            baselines["recall_full_beyond"] = far.recall(full)
    metrics["recall_ratio_50"] = metrics["recall_moa_50"] / max(baselines["recall_uniform_50"], 1 / (5 * prompts))
    return metrics, baselines


def _plan(profile: InfluenceProfile, share: int, n: int) -> HeadPlan:
    return moa(profile, budget=f"{share}%", lengths=str(2 * n), fixed_rows=True)


def _controls(bench: Bench, plan: HeadPlan, n: int, shuffles: int, seed: int) -> dict[str, float]:
    """The same patterns, and so the same bytes, on other heads."""
    generator = torch.Generator().manual_seed(seed)
    recalls = [bench.recall(shuffled(plan, generator)) for _ in range(shuffles)]
    return {
        "recall_shuffled_50": sum(recalls) / shuffles,
        "recall_shuffled_50_best": max(recalls),
        "recall_inverse_50": bench.recall(inverse(plan, n)),
    }


@dataclass(frozen=True)
class Bench:
    """Passkeys and text on which plans are compared; everything is read in one masked forward, which decoding equals."""

    model: Any
    keys: list[Prompt]
    text: Tensor
    length: int

    @classmethod
    def of(cls, model: Any, tokenizer: Any, length: int, prompts: int, windows: int, seed: int) -> Bench:
        """`prompts` passkeys of `length` tokens at depths that no window of half the text reaches, `windows` windows of held-out text."""
        generator = torch.Generator().manual_seed(seed)
        depths = even_depths(prompts, 0.1, 0.45)
        keys = [make_passkey(tokenizer, length=length, depth=d, generator=generator) for d in depths]
        text = torch.tensor(encode(tokenizer, english("eval")))[: windows * length]
        return cls(model, keys, text, length)

    def recall(self, plan: HeadPlan) -> float:
        """Share of the digits that are right."""
        return self._under(plan, lambda: exact_match(self.model, self.keys).tokens)

    def perplexity(self, plan: HeadPlan) -> float:
        """Of held-out text in windows of `length` tokens."""
        losses = self._under(
            plan, lambda: window_losses(self.model, self.text, window=self.length, tokens=len(self.text))
        )
        return float(losses.mean().exp())

    def _under(self, plan: HeadPlan, measured: Callable[[], Any]) -> Any:
        with headwise.attach(self.model, plan=plan):
            return measured()


def uniform(plan: HeadPlan, n: int, sinks: int) -> HeadPlan:
    """Every kv head with the same sinks and window, at least as many tokens in all as `plan` keeps at n."""
    kept = -(-int(plan.kept(n).sum()) // (plan.layers * plan.kv_heads))
    return HeadPlan.uniform(SinkWindow(sinks, kept - sinks), plan.layers, plan.kv_heads, method="uniform")


def shuffled(plan: HeadPlan, generator: torch.Generator) -> HeadPlan:
    """The patterns of the plan on heads drawn by lot."""
    flat = [pattern for row in plan.patterns for pattern in row]
    return _rearranged(plan, [flat[i] for i in torch.randperm(len(flat), generator=generator).tolist()], "shuffled")


def inverse(plan: HeadPlan, n: int) -> HeadPlan:
    """The longest span for the head that had the shortest, and so on."""
    flat = [pattern for row in plan.patterns for pattern in row]
    order = sorted(range(len(flat)), key=lambda i: flat[i].kept(n))
    turned: list[Pattern] = list(flat)
    for mine, other in zip(order, reversed(order), strict=True):
        turned[mine] = flat[other]
    return _rearranged(plan, turned, "inverse")


def _rearranged(plan: HeadPlan, flat: list[Pattern], method: str) -> HeadPlan:
    K = plan.kv_heads
    rows = tuple(tuple(flat[layer * K : (layer + 1) * K]) for layer in range(plan.layers))
    return replace(plan, patterns=rows, method=method)
