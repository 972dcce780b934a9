"""Paper 19, circuit analysis at scale (Lieberum et al. 2023, arXiv 2307.09458): multiple choice on two small models, not Chinchilla 70B.

smollm2 answers where the label stands behind its word, so that it can be copied; circuit-lm (names with `trained_`) was trained on
questions in the paper's form too, the label before its word. The same checks are asked of both.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from headwise.errors import HeadwiseError
from headwise.hub import load_model
from headwise.papers._run import Measured, asked_of, device_of, reproduces, with_second
from headwise.papers.catalogue import Paper
from headwise.papers.reproduction import Check, Reproduction
from headwise.score import LetterSpace, Quiz, Resample, label_pattern, letter_effects, letter_space
from headwise.tasks.multiple_choice import Form, make_multiple_choice
from headwise.tasks.pairs import PromptPairs
from headwise.units import HeadScores, HeadSet

PAPER = Paper(
    slug="circuit-chinchilla",
    status="partial",
    api="headwise.score.letter_heads, headwise.score.letter_effects, headwise.score.label_pattern, headwise.score.letter_space, "
    "headwise.tasks.multiple_choice.make_multiple_choice",
    claim="In multiple choice a few correct-letter heads look from the last token at the label of the right option and carry the answer, "
    "random heads do not; three dimensions of their queries and keys are enough to choose; and these dimensions say which item of the "
    "enumeration is meant: they carry over to random labels, though less well than to A, B, C, D",
)
SIZES: dict[str, dict[str, Any]] = {
    "cpu": {"seeds": 3, "fit": 12, "tests": 16, "draws": 3},
    "gpu": {"seeds": 5, "fit": 64, "tests": 128, "draws": 10},
}
TRAINED: dict[str, dict[str, Any]] = {
    "cpu": {"seeds": 3, "fit": 48, "tests": 64, "draws": 5},
    "gpu": {"seeds": 5, "fit": 256, "tests": 512, "draws": 20},
}
SMOLLM2_CHECKS = (
    Check("labels are answered, chance is 0.25", "accuracy_letters", ">=", 0.5),
    Check("correct-letter heads in every seed", "letter_heads_fewest", ">=", 1),
    Check("few heads hold 80 % of the direct effect", "output_nodes_share", "<=", 0.25),
    Check("letter heads carry the answer", "accuracy_without_letter_heads", "<", "accuracy_without_random_least"),
    Check("three dimensions keep the choice", "accuracy_rank_3_kept", ">=", 0.98),
    Check("the mean alone does not", "accuracy_rank_0", "<", "accuracy_rank_3"),
    Check("random dimensions do not", "loss_rank_3", "<", "loss_rank_3_random"),
    Check("moved queries name another item", "moved_letters", ">", "unmoved_letters"),
    Check("also with random labels", "moved_random", ">", "unmoved_random"),
    Check("less well than with letters", "moved_random", "<", "moved_letters"),
)
PREFIX = "trained_"
CHECKS = SMOLLM2_CHECKS + asked_of(SMOLLM2_CHECKS, "circuit-lm", PREFIX)
PUBLISHED = {"published_rank": 3.0, "published_output_heads_share": 32 / 5120}
"""Chinchilla 70B: 3 of 128 dimensions; 32 of 80 · 64 heads (and 13 MLPs) are output nodes, as a review states it."""


@reproduces(PAPER, CHECKS, PUBLISHED)
def reproduce(scale: str = "cpu", *, seed: int = 0, progress: bool = False) -> Measured:
    """Measure the claim on smollm2 and circuit-lm. "cpu": 12 and 48 prompts to find heads and axes, 16 and 64 others to test, 3 seeds."""
    device = device_of(scale)
    found = measure(device=device, seed=seed, **SIZES[scale])
    second = measure(model_name="circuit-lm", form="question", device=device, seed=seed, **TRAINED[scale])
    return with_second(found, second, PREFIX)


def sections(result: Reproduction, *, seed: int = 0, progress: bool = False) -> list[Any]:
    """The chapters of `reproduce --page`, on circuit-lm: effects of all heads, what the letter heads look at, how many dimensions count."""
    from headwise.report.chapters.circuits import letters

    model, tokenizer = load_model("circuit-lm")
    pairs = make_multiple_choice(tokenizer, count=32, form="question", seed=seed)
    return letters(result, model, pairs, name="circuit-lm", prefix=PREFIX)


def measure(
    *,
    seeds: int,
    fit: int,
    tests: int,
    draws: int,
    device: str = "cpu",
    seed: int = 0,
    model_name: str = "smollm2",
    form: Form = "recall",
) -> tuple[dict[str, float], dict[str, float]]:
    """(metrics, baselines), each the mean over seeds; a seed draws its own prompts, to find and to test, and its own random heads."""
    model, tokenizer = load_model(model_name, device=device)
    if tokenizer is None:
        raise HeadwiseError(f"{model_name!r} has no tokenizer; multiple choice is made of words")

    def prompts(count: int, at: int, labels: Any = "letters") -> PromptPairs:
        return make_multiple_choice(tokenizer, count=count, labels=labels, form=form, seed=at)

    rows = [_one_seed(model, prompts, seed + i, fit, tests, draws) for i in range(seeds)]
    mean = {name: sum(row[name] for row in rows) / len(rows) for name in rows[0]}
    mean["letter_heads_fewest"] = min(row["letter_heads"] for row in rows)
    mean["accuracy_rank_3_kept"] = mean["accuracy_rank_3"] / max(mean["accuracy_letters"], 1e-9)
    controls = ("without_random", "rank_3_random", "unmoved", "_other_items")
    baselines = {name: value for name, value in mean.items() if any(word in name for word in controls)}
    return {name: value for name, value in mean.items() if name not in baselines}, baselines


def _one_seed(model: Any, prompts: Any, seed: int, fit: int, tests: int, draws: int) -> dict[str, float]:
    found, asked = prompts(fit, 2 * seed), prompts(tests, 2 * seed + 1)
    pattern, effects = label_pattern(model, found), letter_effects(model, found)
    nodes, heads = effects.output_nodes(), pattern.of_kind("correct-letter")
    direct = HeadScores(values=effects.direct.double().mean(-1), method="direct")
    measured = {
        "letter_heads": float(len(heads)),
        "output_nodes": float(len(nodes)),
        "output_nodes_share": len(nodes) / direct.values.numel(),
        "letter_heads_in_output_nodes": len(heads & nodes) / max(1, len(heads)),
    }
    heads = (
        heads if len(heads) else direct.top(1)
    )  # the check on their number has failed; the rest is measured all the same
    shares = pattern.on_correct
    measured["attention_on_correct"] = float(torch.stack([shares[at] for at in heads.pairs()]).mean())
    generator, quiz, space = torch.Generator().manual_seed(seed), Quiz(model, asked), letter_space(model, found, heads)
    barred = heads | nodes
    measured |= _without(
        model, quiz, heads, nodes, direct.random_sets(len(heads), draws, generator=generator, exclude=barred)
    )
    measured |= _ranks(quiz, space, generator)
    others = {labels: prompts(tests, 2 * seed + 1, labels) for labels in ("random", "shuffled", "digits")}
    return measured | _moves(model, space, {"letters": asked} | others) | _deltas(model, space, others["random"], heads)


def _share(found: Tensor, wanted: Tensor) -> float:
    return float((found == wanted.cpu()).float().mean())


def _without(model: Any, quiz: Quiz, heads: HeadSet, nodes: HeadSet, random: list[HeadSet]) -> dict[str, float]:
    """Choices where the last outputs of some heads say what they say in the twin's run, in which another option is right."""
    correct, other = quiz.pairs.marks["correct"], quiz.pairs.marks["other"]
    twins = Resample.all_heads(model, quiz.pairs)
    plain, loss = quiz.choose()
    found = {"accuracy_letters": _share(plain, correct), "loss_letters": float(loss.mean())}
    for name, some in (("letter_heads", heads), ("output_nodes", nodes)):
        picked = quiz.choose(twins.only(some))[0]
        found[f"accuracy_without_{name}"], found[f"turned_by_{name}"] = _share(picked, correct), _share(picked, other)
    controls = [_share(quiz.choose(twins.only(some))[0], correct) for some in random]
    return found | {
        "accuracy_without_random": sum(controls) / len(controls),
        "accuracy_without_random_least": min(controls),
    }


def _ranks(quiz: Quiz, space: LetterSpace, generator: torch.Generator) -> dict[str, float]:
    """Choices with few dimensions of the letter heads' queries and keys left, found on other prompts."""
    found: dict[str, float] = {}
    for rank in (0, 1, 3, 8, 16):
        picked, loss = quiz.choose(space.keep(quiz.pairs, rank))
        found[f"accuracy_rank_{rank}"] = _share(picked, quiz.pairs.marks["correct"])
        found[f"loss_rank_{rank}"] = float(loss.mean())
    picked, loss = quiz.choose(space.random(generator).keep(quiz.pairs, 3))
    found["accuracy_rank_3_random"] = _share(picked, quiz.pairs.marks["correct"])
    return found | {"loss_rank_3_random": float(loss.mean())}


def _moves(model: Any, space: LetterSpace, prompts: dict[str, PromptPairs]) -> dict[str, float]:
    """Share of answers that are the item to which class means of A, B, C, D move the queries, before and after the move."""
    found: dict[str, float] = {}
    for labels, pairs in prompts.items():
        quiz = Quiz(model, pairs)
        to = quiz.pairs.marks["other"]
        plain, moved = quiz.choose()[0], quiz.choose(space.move(quiz.pairs, to))[0]
        found[f"accuracy_{labels}"] = _share(plain, quiz.pairs.marks["correct"])
        found[f"unmoved_{labels}"], found[f"moved_{labels}"] = _share(plain, to), _share(moved, to)
    return found


def _deltas(model: Any, space: LetterSpace, random: PromptPairs, heads: HeadSet) -> dict[str, float]:
    """Cosine between an item's delta with letters and with random labels: the same item, and other items."""
    there = letter_space(model, random, heads)
    found: dict[str, float] = {}
    for part, name in (("q", "query"), ("k", "key")):
        table = space.cosines(there, part)
        same, C = float(table.diagonal().mean()), len(table)
        found[f"{name}_cosine"] = same
        found[f"{name}_cosine_other_items"] = (float(table.sum()) - C * same) / (C * C - C)
    return found
