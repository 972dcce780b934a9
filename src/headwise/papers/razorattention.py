"""Paper 30, RazorAttention (Tang et al. 2024, arXiv 2407.15891): a probe without data finds the heads whose cache must stay whole."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

import headwise
from headwise.arguments import cache_argument, cache_of
from headwise.errors import HeadwiseError
from headwise.hub import load_model
from headwise.papers._run import Measured, device_of, reproduces
from headwise.papers.catalogue import Paper
from headwise.papers.reproduction import Check
from headwise.plan import HeadPlan
from headwise.tasks import Prompt, english, even_depths, exact_match, make_passkey
from headwise.tasks.texts import encode
from headwise.units import HeadScores, HeadSet

PAPER = Paper(
    slug="razorattention",
    status="partial",
    api="headwise.score.induction, headwise.score.echo, headwise.score.induction_and_echo, headwise.budget.razor, headwise.HeadwiseCache",
    claim="With the 15 % of kv heads full that a probe of random tokens names, and sinks, a buffer and a compensation token for the "
    "rest, a model retrieves about as well as with its whole cache, which as many random heads do not; the compensation token brings its "
    "logits nearer",
)
OPTIONS: dict[str, Any] = {"sinks": 4, "s0": 128, "c": 5.0}  # the paper's, but for s0 = 4000, scaled to short texts
READ = 64  # tokens behind the prompt whose logits are compared
CHECKS = (
    Check("the task is solved with the whole cache", "recall_full", ">=", 0.9),
    Check("the plan is on par", "recall_loss", "<=", 0.1),
    Check("random heads are not", "recall_random", "<=", 0.65),
    Check("bytes are really freed", "cache_share", "<=", 0.5),
    Check("the probe finds retrieval heads", "correlation_with_retrieval", ">=", 0.7),
    Check("whatever tokens it draws", "jaccard_over_seeds", ">=", 0.8),
    Check("random heads lose the text too", "kl_razor_1024", "<", "kl_random_1024"),
    Check("the compensation token helps at 1024 tokens", "kl_razor_1024", "<", "kl_no_token_1024"),
    Check("the compensation token helps at 2048 tokens", "kl_razor_2048", "<", "kl_no_token_2048"),
)


@reproduces(PAPER, CHECKS)
def reproduce(scale: str = "cpu", *, seed: int = 0, progress: bool = False) -> Measured:
    """Measure the claim on smollm2. "cpu": 5 passkeys, 12 texts, 3-4 minutes on two cores. "gpu": 40 passkeys, 24 texts."""
    sizes: dict[str, Any] = (
        {"prompts": 5, "texts": 12, "draws": 2}
        if scale == "cpu"
        else {"prompts": 40, "texts": 24, "draws": 5, "batch_size": 8}
    )
    return measure(device=device_of(scale), seed=seed, progress=progress, **sizes)


def measure(
    model_name: str = "smollm2",
    *,
    prompts: int,
    texts: int,
    draws: int,
    length: int = 1024,
    batch_size: int = 1,
    success: Any = "exact",
    device: str = "cpu",
    seed: int = 0,
    progress: bool = False,
) -> tuple[dict[str, float], dict[str, float]]:
    """(metrics, baselines) of a Razor plan against the whole cache, random heads, and no compensation token."""
    model, tokenizer = load_model(model_name, device=device)
    if tokenizer is None:
        raise HeadwiseError(f"{model_name!r} has no tokenizer; retrieval needs a language model")
    generator = torch.Generator().manual_seed(seed + 1000)
    probes = [
        headwise.score.induction_and_echo(model, tokenizer, length=256, repeats=2, seed=seed + i, progress=progress)
        for i in range(3)
    ]
    induction, echo = probes[0]
    plan = headwise.budget.razor(induction, echo=echo, **OPTIONS)
    metrics = agreement([headwise.budget.razor(a, echo=b).full_heads() for a, b in probes])
    metrics |= _with_retrieval(model, tokenizer, induction, success, seed, progress)
    keys = [
        make_passkey(tokenizer, length=length, depth=depth, generator=generator)
        for depth in even_depths(prompts, 0.1, 0.75)  # in front of the buffer
    ]
    bare = headwise.budget.razor(induction, echo=echo, weight="none", **OPTIONS)
    one = headwise.budget.razor(induction, echo=echo, weight="one", **OPTIONS)
    randoms = [_other_heads(plan, generator) for _ in range(draws)]
    full, size = recall(model, keys, HeadPlan.full(plan.layers, plan.kv_heads), batch_size)
    mine, bytes_ = recall(model, keys, plan, batch_size)
    metrics |= {
        "recall_razor": mine,
        "recall_loss": full - mine,
        "cache_bytes_razor": bytes_,
        "cache_share": bytes_ / size,
    }
    metrics |= {"full_heads": len(plan.full_heads()), "plan_share_131072": _published(induction, echo).ratio(131072)}
    baselines = {
        "recall_full": full,
        "cache_bytes_full": size,
        "recall_no_token": recall(model, keys, bare, batch_size)[0],
    }
    baselines["recall_random"] = sum(recall(model, keys, other, batch_size)[0] for other in randoms) / draws
    ids = torch.tensor(encode(tokenizer, english("eval")))
    plans = {"razor": plan, "no_token": bare, "one": one, "random": randoms[0]}
    for n in (length, 2 * length):
        found = divergence(model, _pieces(ids, n, texts), plans)
        metrics[f"kl_razor_{n}"] = sum(found.pop("razor")) / texts
        baselines |= {f"kl_{name}_{n}": sum(values) / texts for name, values in found.items()}
    return metrics, baselines


def recall(model: Any, keys: list[Prompt], plan: HeadPlan, batch_size: int = 1) -> tuple[float, float]:
    """(share of the digits that are right, bytes of the cache after the last batch of prompts), decoding through the cache."""
    made: list[headwise.HeadwiseCache] = []

    def cache() -> headwise.HeadwiseCache:
        made[:] = [headwise.HeadwiseCache(plan)]
        return made[0]

    with headwise.attach(model, plan=plan):
        result = exact_match(model, keys, through="cache", cache=cache, batch_size=batch_size)
    return result.tokens, float(made[0].nbytes)


@torch.no_grad()
def divergence(model: Any, pieces: list[Tensor], plans: dict[str, HeadPlan]) -> dict[str, list[float]]:
    """For each text the KL in nats of each plan's next-token distribution from the dense model's, the mean of its last `READ` tokens.

    The prompt is read densely under every plan, so one prefill serves all: its keys and values are put into each plan's cache.
    """
    found: dict[str, list[float]] = {name: [] for name in plans}
    for ids in pieces:
        rows = ids[None].to(model.device)
        past = cache_of(model(rows[:, :-READ], use_cache=True, logits_to_keep=1))
        others = {name: _log_probs(model, rows, _compressed(past, plan), plan) for name, plan in plans.items()}
        dense = _log_probs(model, rows, past, None)
        for name, other in others.items():
            found[name].append(float((dense.exp() * (dense - other)).sum(-1).mean()))
    return found


def _pieces(ids: Tensor, length: int, count: int) -> list[Tensor]:
    """`count` pieces of `length` tokens at even distances."""
    step = max(0, len(ids) - length) // max(1, count - 1)
    return [ids[i * step : i * step + length] for i in range(count)]


def _compressed(past: Any, plan: HeadPlan) -> headwise.HeadwiseCache:
    """What the plan keeps of a dense cache."""
    cache = headwise.HeadwiseCache(plan)
    for layer, dense in zip(cache.layers, past.layers, strict=True):
        layer.update(dense.keys, dense.values)
        layer.take(None)
    return cache


def _log_probs(model: Any, rows: Tensor, past: Any, plan: HeadPlan | None) -> Tensor:
    """(READ, V) of the last tokens, read behind a prompt."""
    with nullcontext() if plan is None else headwise.attach(model, plan=plan):
        return model(rows[:, -READ:], **cache_argument(model, past)).logits[0].float().log_softmax(-1)


def agreement(sets: list[HeadSet]) -> dict[str, float]:
    """The least Jaccard index of any two sets of heads."""
    pairs = [(a, b) for i, a in enumerate(sets) for b in sets[i + 1 :]]
    return {"jaccard_over_seeds": min(len(a & b) / len(a | b) for a, b in pairs)}


def _with_retrieval(
    model: Any, tokenizer: Any, induction: HeadScores, success: Any, seed: int, progress: bool
) -> dict[str, float]:
    """How the probe's ranking agrees with heads that really copy on natural text."""
    natural = headwise.score.retrieval(
        model, tokenizer, tests=6, length=512, success=success, seed=seed + 7, progress=progress
    )
    constant = natural.values.min() == natural.values.max()
    return {
        "correlation_with_retrieval": float("nan") if constant else induction.correlation(natural),
        "rank_correlation_with_retrieval": float("nan") if constant else induction.rank_correlation(natural),
        "shared_of_top20": float(len(induction.top(min(20, len(natural))) & natural.top(min(20, len(natural))))),
    }


def _other_heads(plan: HeadPlan, generator: torch.Generator) -> HeadPlan:
    """The same plan with as many full heads, none of them the same."""
    chosen = plan.full_heads()
    other = next(p for row in plan.patterns for p in row if not p.keeps_all)
    drawn = chosen.random_control(plan.layers, plan.kv_heads, generator=generator)
    patterns = HeadPlan.from_set(drawn, other, plan.layers, plan.kv_heads).patterns
    return replace(plan, patterns=patterns, method="random")


def _published(induction: HeadScores, echo: HeadScores) -> HeadPlan:
    """The plan with the paper's own constants."""
    return headwise.budget.razor(induction, echo=echo)
