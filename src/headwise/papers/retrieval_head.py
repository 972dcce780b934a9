"""Paper 13, retrieval heads (Wu et al. 2024, arXiv 2404.15574): few heads copy from the context, and without them nothing is copied."""

from __future__ import annotations

from typing import Any

import torch

import headwise
from headwise.errors import HeadwiseError
from headwise.hub import load_model
from headwise.papers._run import Measured, device_of, reproduces
from headwise.papers.catalogue import Paper
from headwise.papers.reproduction import Check, Reproduction
from headwise.score.retrieval import retrieval
from headwise.tasks import make_passkeys
from headwise.units import HeadScores

PAPER = Paper(
    slug="retrieval-head",
    status="works",
    api="headwise.score.retrieval, headwise.score.retrieval_tests, headwise.score.retrieval_check",
    claim="Under a fifth of the heads copy from the context at all often; which ones hardly depends on the tests; and with the three "
    "best of them taken out a model no longer finds a passkey, while with as many random others taken out it does",
)
TOP = 3
SIZES: dict[
    str, dict[str, Any]
] = {  # tests to score by, prompts to check by, random sets, tokens of a prompt, tokens of text
    "cpu": {"tests": 12, "prompts": 6, "draws": 2, "length": 512, "text": 1024},
    "gpu": {"tests": 60, "prompts": 40, "draws": 10, "length": 2048, "text": 16384},
}
CHECKS = (
    Check("the task is solved by the intact model", "recall_intact", ">=", 0.95),
    Check("few heads", "share_above_0.1", "<=", 0.2),
    Check("most never copy", "share_zero", ">=", 0.5),
    Check("two halves of the tests agree", "correlation_of_halves", ">=", 0.8),
    Check("without the best three nothing is found", "recall_without_top", "<=", 0.3),
    Check("without random others it is", "recall_lost_to_random", "<=", 0.03),
    Check("text is read about as well", "ppl_ratio_top", "<=", 1.2),
)
PUBLISHED = {"published_share_above_0.1_least": 0.021, "published_share_above_0.1_most": 0.062}
"""Least and most over the seven score files of the authors, Llama-2-13B-64K and Mixtral-8x7B."""


@reproduces(PAPER, CHECKS, PUBLISHED)
def reproduce(scale: str = "cpu", *, seed: int = 0, progress: bool = False) -> Measured:
    """Measure the claim on smollm2. "cpu": passkeys of 512 tokens, 1-3 minutes on two cores. "gpu": more of them, of 2048 tokens."""
    return measure(device=device_of(scale), seed=seed, progress=progress, **SIZES[scale])


def measure(
    model_name: str = "smollm2",
    *,
    tests: int,
    prompts: int,
    draws: int,
    length: int,
    text: int,
    success: Any = "exact",
    device: str = "cpu",
    seed: int = 0,
    progress: bool = False,
) -> tuple[dict[str, float], dict[str, float]]:
    """(metrics, baselines): how few heads score, how alike two halves of the tests are, and what taking heads out does."""
    model, tokenizer = load_model(model_name, device=device)
    if tokenizer is None:
        raise HeadwiseError(f"{model_name!r} has no tokenizer; retrieval needs a language model")
    generator = torch.Generator().manual_seed(seed)
    keys = make_passkeys(tokenizer, count=tests, length=length, generator=generator)
    halves = [
        retrieval(model, tokenizer, prompts=half, success=success, progress=progress)
        for half in (keys[::2], keys[1::2])
    ]
    scores = HeadScores.mean(halves)
    check = headwise.score.retrieval_check(
        model,
        tokenizer,
        scores,
        top=(TOP,),
        random_sets=draws,
        tests=prompts,
        length=length,
        text_tokens=text,
        seed=seed + 1000,  # other keys and texts than those that the scores are made of
        progress=progress,
    )
    return _sparsity(halves, scores) | _without(check, "top"), _without(check, "random")


def sections(result: Reproduction, *, seed: int = 0, progress: bool = False) -> list[Any]:
    """The chapters of `reproduce --page`: scores as a map, and against the effect of single heads, from four prompts."""
    from headwise.report.chapters.circuits import copying

    model, tokenizer = load_model("smollm2")
    keys = make_passkeys(tokenizer, count=4, length=512, generator=torch.Generator().manual_seed(seed))
    return copying(model, tokenizer, prompts=keys, seed=seed)


def _sparsity(halves: list[HeadScores], scores: HeadScores) -> dict[str, float]:
    count = len(scores)
    constant = any(half.values.min() == half.values.max() for half in halves)  # a correlation is undefined then
    return {
        "share_above_0.1": len(scores.at_least(0.1)) / count,
        "share_above_0.5": len(scores.at_least(0.5)) / count,
        "share_zero": float((scores.values == 0).float().mean()),
        "best_score": float(scores.values.max()),
        "correlation_of_halves": float("nan") if constant else halves[0].correlation(halves[1]),
        "rank_correlation_of_halves": float("nan") if constant else halves[0].rank_correlation(halves[1]),
        "jaccard_of_halves_top10": halves[0].overlap(halves[1], 10),
    }


def _without(check: headwise.score.RetrievalCheck, kind: str) -> dict[str, float]:
    """Recall (all digits), share of digits and perplexity without the heads of one kind; the mean over random draws."""
    intact = check.intact
    rows = [check.top(TOP)] if kind == "top" else list(check.random(TOP))
    recall = sum(row.result.mean for row in rows) / len(rows)
    ratio = sum((row.perplexity or 0.0) / (intact.perplexity or 1.0) for row in rows) / len(rows)
    found = {
        f"recall_without_{kind}": recall,
        f"digits_without_{kind}": sum(row.result.tokens for row in rows) / len(rows),
        f"ppl_ratio_{kind}": ratio,
    }
    if kind == "random":
        lost = intact.result.mean - recall
        found |= {
            "recall_lost_to_random": lost,
            "recall_intact": intact.result.mean,
            "ppl_intact": intact.perplexity or 0.0,
        }
    return found
