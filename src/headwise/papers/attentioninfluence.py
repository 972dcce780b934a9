"""Paper 28, AttentionInfluence (Hua et al. 2025, arXiv 2505.07293): documents that suffer when retrieval heads are weakened."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch

import headwise
from headwise.errors import HeadwiseError
from headwise.hub import load_model
from headwise.papers._run import Measured, device_of, reproduces
from headwise.papers.catalogue import Paper
from headwise.papers.reproduction import Check
from headwise.progress import track
from headwise.score._selecting import Scored, rank_statistics, select_by_tokens
from headwise.tasks import code, english, exact_match, make_keyvalues, stories
from headwise.tasks.texts import encode

PAPER = Paper(
    slug="attentioninfluence",
    status="partial",
    api="headwise.score.attention_influence, headwise.score.InfluenceScorer, headwise.score.important_heads",
    claim="With the 5 % of heads that look keys up made uniform, a language model no longer looks keys up, and its loss rises, in "
    "proportion, more on mathematics, code and reference text than on stories, so that a selection by it leaves stories out; "
    "random heads of the same number tell these kinds of text apart less well",
)
KINDS = ("maths", "code", "reference")
SIZES: dict[
    str, dict[str, Any]
] = {  # look-ups to score by and to check by, documents of a kind, tokens of each, random sets
    "cpu": {"samples": 6, "checks": 4, "length": 640, "documents": 16, "tokens": 224, "draws": 3},
    "gpu": {"samples": 200, "checks": 40, "length": 2048, "documents": 40, "tokens": 288, "draws": 10},
}
CHECKS = (
    Check("the task is done by the intact model", "lookup_tokens_intact", ">=", 0.8),
    Check("and not without the heads", "lookup_tokens_without_top", "<=", 0.5),
    Check("random heads do not matter for it", "lookup_tokens_without_random", ">=", 0.8),
    Check("maths above stories", "auc_maths", ">=", 0.7),
    Check("code above stories", "auc_code", ">=", 0.7),
    Check("reference text above stories", "auc_reference", ">=", 0.7),
    Check("all of them above stories, not by chance", "p_all", "<=", 0.01),
    Check("better than random heads", "auc_all", ">", "auc_all_random"),
    Check("stories are hardly selected", "stories_among_selected", "<=", 0.1),
)


@reproduces(PAPER, CHECKS)
def reproduce(scale: str = "cpu", *, seed: int = 0, progress: bool = False) -> Measured:
    """Measure the claim on smollm2. "cpu": 53 documents of 224 tokens, about 4 minutes of one core. "gpu": more of everything."""
    return measure(device=device_of(scale), seed=seed, progress=progress, **SIZES[scale])


def measure(
    model_name: str = "smollm2",
    *,
    samples: int,
    checks: int,
    length: int,
    documents: int,
    tokens: int,
    draws: int,
    device: str = "cpu",
    seed: int = 0,
    progress: bool = False,
) -> tuple[dict[str, float], dict[str, float]]:
    """(metrics, baselines): the look-up task without heads, and how kinds of text rank by their influence."""
    model, tokenizer = load_model(model_name, device=device)
    if tokenizer is None:
        raise HeadwiseError(f"{model_name!r} has no tokenizer; AttentionInfluence needs a language model")
    scores = headwise.score.attention_influence(
        model, tokenizer, samples=samples, length=length, seed=seed, progress=progress
    )
    heads = headwise.score.important_heads(scores)
    generator = torch.Generator().manual_seed(seed)
    barred = scores.top(min(3 * len(heads), len(scores) - len(heads)))
    random = scores.random_sets(len(heads), draws, generator=generator, exclude=barred)
    metrics, baselines = _lookup(model, tokenizer, [heads, *random], checks, length, seed + 1000)
    corpus = texts(documents)
    scorer = headwise.score.InfluenceScorer(model, tokenizer, heads, controls=random, context=tokens, min_tokens=16)
    ids = {kind: [_ids(tokenizer, text, tokens) for text in members] for kind, members in corpus.items()}
    flat = [document for members in ids.values() for document in members]
    found = list(scorer.score(track(flat, "documents", progress)))
    by_kind, at = {}, 0
    for kind, members in ids.items():
        by_kind[kind] = found[at : at + len(members)]
        at += len(members)
    ranked, controls = _ranks(by_kind, draws)
    metrics |= {"heads": float(len(heads)), "best_score": float(scores.values.max())} | ranked
    return metrics | _selected(by_kind), baselines | controls


def texts(documents: int) -> dict[str, list[str]]:
    """At most `documents` texts of each kind: docstrings of sympy, modules of Python's library, its reference, stories (ten there are)."""
    return {
        "maths": maths()[:documents],
        "code": _pieces(code("eval"), documents),
        "reference": _pieces(english("eval"), documents),
        "stories": list(stories()[:documents]),
    }


def maths() -> list[str]:
    """Long docstrings of functions and classes that compute something, from sympy, which torch brings along."""
    import sympy  # type: ignore[import-untyped]

    chosen = [getattr(sympy, name) for name in sorted(sympy.__all__)]
    long = [inspect.getdoc(thing) or "" for thing in chosen if callable(thing)]
    found = list(dict.fromkeys(text for text in long if len(text) > 1500))
    if len(found) < 10:
        raise HeadwiseError(
            "the docstrings of sympy are missing (python -OO strips them): nothing mathematical to read"
        )
    return found[:: max(1, len(found) // 10)]


def _pieces(text: str, count: int) -> list[str]:
    """Pieces of 2000 characters from even places, each from the start of a line on."""
    step = len(text) // (count + 1)
    starts = [text.index("\n", (i + 1) * step - step // 2) + 1 for i in range(count)]
    return [text[start : start + 2000] for start in starts]


def _ids(tokenizer: Any, text: str, tokens: int) -> torch.Tensor:
    return torch.tensor(encode(tokenizer, text)[:tokens])


def _lookup(
    model: Any, tokenizer: Any, sets: Sequence[Any], checks: int, length: int, seed: int
) -> tuple[dict[str, float], dict[str, float]]:
    """Share of answer tokens that are right: intact, without the important heads, without random ones."""
    prompts = make_keyvalues(tokenizer, count=checks, length=length, generator=torch.Generator().manual_seed(seed))
    intact = exact_match(model, prompts).tokens
    without = []
    for heads in sets:
        with headwise.ablate(model, heads, mode="uniform"):
            without.append(exact_match(model, prompts).tokens)
    random = sum(without[1:]) / len(without[1:])
    return {"lookup_tokens_intact": intact, "lookup_tokens_without_top": without[0]}, {
        "lookup_tokens_without_random": random
    }


def _ranks(by_kind: dict[str, list[Any]], draws: int) -> tuple[dict[str, float], dict[str, float]]:
    """AUC of each kind against the stories, by the score, by random heads, by the base loss alone."""
    plain = [i.score for i in by_kind["stories"]]
    everything = [i for kind in KINDS for i in by_kind[kind]]
    metrics = {f"score_{kind}": sum(i.score for i in members) / len(members) for kind, members in by_kind.items()}
    for kind in KINDS:
        statistics = rank_statistics([i.score for i in by_kind[kind]], plain)
        metrics |= {f"auc_{kind}": statistics["auc"], f"p_{kind}": statistics["p"]}
    statistics = rank_statistics([i.score for i in everything], plain)
    metrics |= {"auc_all": statistics["auc"], "p_all": statistics["p"]}
    drawn = [
        rank_statistics([i.control_scores[d] for i in everything], [i.control_scores[d] for i in by_kind["stories"]])[
            "auc"
        ]
        for d in range(draws)
    ]
    loss = rank_statistics([-i.base for i in everything], [-i.base for i in by_kind["stories"]])["auc"]
    baselines = {f"auc_all_random_{d}": auc for d, auc in enumerate(drawn)}
    baselines |= {"auc_all_random": sum(drawn) / draws, "auc_all_low_loss": loss}
    for kind, members in by_kind.items():
        means = [sum(i.control_scores[d] for i in members) / len(members) for d in range(draws)]
        baselines[f"score_{kind}_random"] = sum(means) / draws
    return metrics, baselines


def _selected(by_kind: dict[str, list[Any]]) -> dict[str, float]:
    """Share of stories among the best 30 % of the tokens, all kinds in one domain."""
    flat = [(kind, influence) for kind, members in by_kind.items() for influence in members]
    rows = [Scored(i, "", influence.tokens, influence.score) for i, (_, influence) in enumerate(flat)]
    keep = select_by_tokens(rows, 0.3).keep
    kept = sum(flat[i][0] == "stories" for i in keep)
    return {"stories_among_selected": kept / max(1, len(keep)), "documents_selected": float(len(keep))}
