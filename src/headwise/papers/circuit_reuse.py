"""Paper 29, circuit reuse (Merullo et al. 2023, arXiv 2310.08744): two tasks run on much the same heads.

circuit-lm (names with `trained_`) was trained on both tasks; smollm2 was not, and answers the second one above chance. The same checks
are asked of both, at the same sizes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from headwise.attach import attach
from headwise.attach.ablate import ablate
from headwise.attach.set_pattern import SetPattern
from headwise.errors import HeadwiseError
from headwise.hub import load_model
from headwise.papers._run import Measured, asked_of, device_of, reproduces, with_second
from headwise.papers.catalogue import Paper
from headwise.papers.reproduction import Check, Reproduction
from headwise.score import find_circuit
from headwise.tasks.colored_objects import make_colored_objects
from headwise.tasks.ioi import make_ioi
from headwise.tasks.pairs import PromptPairs
from headwise.units import HeadScores, HeadSet

PAPER = Paper(
    slug="circuit-reuse",
    status="partial",
    api="headwise.score.circuit, headwise.score.path_patching, headwise.score.find_circuit, headwise.attach.set_pattern.SetPattern",
    claim="The circuits of two tasks, indirect objects and coloured objects, share far more heads than chance; taking one task's "
    "circuit out harms the other task too; and making the first task's inhibition heads and its negative mover look at the wrong "
    "colours lets a model answer more colour questions, while other heads that look there do not",
)
SIZES: dict[str, dict[str, Any]] = {
    "cpu": {"seeds": 3, "pairs": 6, "tests": 24, "draws": 2},
    "gpu": {"seeds": 5, "pairs": 50, "tests": 200, "draws": 10},
}
SMOLLM2_CHECKS = (
    Check("indirect objects are solved", "ioi_accuracy", ">=", 0.8),
    Check("coloured objects are answered above chance", "colors_accuracy_of_three", ">", 0.334),
    Check("shared heads", "shared_of_union", ">=", "shared_of_union_random_x3"),
    Check("shared in every seed", "shared_of_union_worst_seed", ">", "shared_of_union_random"),
    Check("one circuit carries the other task", "colors_drop_without_ioi_circuit", ">", "colors_drop_without_random"),
    Check("and its own", "ioi_drop_without_ioi_circuit", ">", "ioi_drop_without_random"),
    Check("repair", "repair_gain", ">=", 0.1),
    Check("not by any heads", "repair_gain", ">", "repair_gain_random_most"),
)
PREFIX = "trained_"
CHECKS = SMOLLM2_CHECKS + asked_of(SMOLLM2_CHECKS, "circuit-lm", PREFIX)
PUBLISHED = {"published_shared_of_circuit": 0.78, "published_accuracy_before": 0.496, "published_accuracy_after": 0.937}
"""GPT-2 medium (abstract); the share is of in-circuit heads."""


@reproduces(PAPER, CHECKS, PUBLISHED)
def reproduce(scale: str = "cpu", *, seed: int = 0, progress: bool = False) -> Measured:
    """Measure the claim on smollm2 and circuit-lm. "cpu": 6 pairs a circuit, 24 questions, 3 seeds on each."""
    device = device_of(scale)
    found = measure(device=device, seed=seed, **SIZES[scale])
    second = measure(model_name="circuit-lm", device=device, seed=seed, **SIZES[scale])
    return with_second(found, second, PREFIX)


def sections(result: Reproduction, *, seed: int = 0, progress: bool = False) -> list[Any]:
    """The chapters of `reproduce --page`: both circuits of circuit-lm, the repair on both models, and how the first is patched."""
    from headwise.report.chapters.circuits import repair, reuse

    model, tokenizer = load_model("circuit-lm")
    return [*reuse(result, model, tokenizer, name="circuit-lm", prefix=PREFIX, seed=seed), repair(result, "smollm2")]


def measure(
    *, seeds: int, pairs: int, tests: int, draws: int, device: str = "cpu", seed: int = 0, model_name: str = "smollm2"
) -> tuple[dict[str, float], dict[str, float]]:
    """(metrics, baselines), each the mean over seeds; every seed draws its own prompts, questions and random heads."""
    model, tokenizer = load_model(model_name, device=device)
    if tokenizer is None:
        raise HeadwiseError(f"{model_name!r} has no tokenizer; the two tasks are made of words")
    rows = [_one_seed(model, tokenizer, seed + i, pairs, tests, draws) for i in range(seeds)]
    mean = {name: sum(row[name] for row in rows) / len(rows) for name in rows[0]}
    mean["shared_of_union_worst_seed"] = min(row["shared_of_union"] for row in rows)
    mean["repair_gain_random_most"] = max(row["repair_gain_random_most"] for row in rows)
    mean["shared_of_union_random_x3"] = 3 * mean["shared_of_union_random"]
    baselines = {name: value for name, value in mean.items() if "random" in name}
    return {name: value for name, value in mean.items() if name not in baselines}, baselines


def _one_seed(model: Any, tokenizer: Any, seed: int, pairs: int, tests: int, draws: int) -> dict[str, float]:
    ioi = find_circuit(model, tokenizer, task="ioi", count=pairs, seed=2 * seed)
    colors = find_circuit(model, tokenizer, task="colored-objects", count=pairs, seed=2 * seed)
    overlap = ioi.overlap(colors)
    scores, generator = ioi.stages[0].scores, torch.Generator().manual_seed(seed)
    barred = ioi.heads | colors.heads
    asked = make_colored_objects(tokenizer, count=tests, seed=2 * seed + 1).to(model.device)
    given = make_ioi(tokenizer, count=tests, seed=2 * seed + 1).to(model.device)
    found = {
        "shared_of_union": overlap["union"],
        "shared_of_ioi": overlap["mine"],
        "shared_of_colors": overlap["theirs"],
    }
    found["shared_of_union_random"] = chance_overlap(scores, ioi.heads, colors.heads, generator)
    found |= _drops(
        model, given, asked, ioi.heads, scores.random_sets(len(ioi.heads), draws, generator=generator, exclude=barred)
    )
    repair = repair_heads(ioi.stages[0].scores, ioi.stages[1].scores)
    controls = scores.random_sets(len(repair), draws, generator=generator, exclude=barred | repair)
    return found | _repair(model, asked, repair, controls)


def chance_overlap(scores: HeadScores, one: HeadSet, other: HeadSet, generator: torch.Generator) -> float:
    """Mean intersection over union of random sets of the same sizes."""
    pairs = zip(
        scores.random_sets(len(one), 200, generator=generator, exclude=HeadSet.empty()),
        scores.random_sets(len(other), 200, generator=generator, exclude=HeadSet.empty()),
        strict=True,
    )
    shares = [len(a & b) / len(a | b) for a, b in pairs]
    return sum(shares) / len(shares)


def repair_heads(to_logits: HeadScores, to_movers: HeadScores, inhibiting: int = 3) -> HeadSet:
    """The three heads that move the movers' queries the most towards the answer, and the mover that speaks against it the most."""
    negative = to_logits.bottom(1)
    order = [unit for unit, _ in to_movers.ranking() if unit not in list(negative)]
    return HeadSet.of([(unit.layer, unit.index) for unit in order[:inhibiting]]) | negative


@torch.no_grad()
def answers(model: Any, pairs: PromptPairs) -> torch.Tensor:
    """Logits (B, V) of the last token; rows are padded on the left."""
    mask = pairs.mask.long()
    places = (mask.cumsum(1) - 1).clamp(min=0)
    out = model(input_ids=pairs.ids, attention_mask=mask, position_ids=places, use_cache=False, logits_to_keep=1)
    return out.logits[:, -1].float()


def _difference(logits: torch.Tensor, pairs: PromptPairs) -> float:
    rows = torch.arange(len(pairs), device=logits.device)
    return float((logits[rows, pairs.answers] - logits[rows, pairs.contrasts]).mean())


def _drops(
    model: Any, given: PromptPairs, asked: PromptPairs, heads: HeadSet, controls: Sequence[HeadSet]
) -> dict[str, float]:
    """What the logit differences of both tasks lose without a circuit, and without random heads."""
    before = {"ioi": answers(model, given), "colors": answers(model, asked)}
    pairs = {"ioi": given, "colors": asked}
    found = {"ioi_accuracy": float((before["ioi"].argmax(1) == given.answers).float().mean())}
    for task, prompts in pairs.items():
        base = _difference(before[task], prompts)

        def lost(out: HeadSet, prompts: PromptPairs = prompts, base: float = base) -> float:
            with ablate(model, out):
                return base - _difference(answers(model, prompts), prompts)

        found[f"{task}_drop_without_ioi_circuit"] = lost(heads)
        found[f"{task}_drop_without_random"] = sum(map(lost, controls)) / len(controls)
    return found


def _repair(model: Any, asked: PromptPairs, heads: HeadSet, controls: Sequence[HeadSet]) -> dict[str, float]:
    """Accuracy over the three colours and over the vocabulary, with heads made to look at the two wrong colours."""

    def right(out: HeadSet) -> tuple[float, float]:
        look = SetPattern(out, asked.last, asked.marks["wrong"])
        with attach(model, transforms=[look] if len(out) else []):
            return accuracies(answers(model, asked), asked)

    before, after = right(HeadSet.empty()), right(heads)
    gains = [right(control)[0] - before[0] for control in controls]
    return {
        "colors_accuracy_of_three": before[0],
        "colors_accuracy": before[1],
        "repaired_accuracy_of_three": after[0],
        "repaired_accuracy": after[1],
        "repair_gain": after[0] - before[0],
        "repair_gain_random": sum(gains) / len(gains),
        "repair_gain_random_most": max(gains),
    }


def accuracies(logits: torch.Tensor, asked: PromptPairs) -> tuple[float, float]:
    """Share of right answers among the three colours of the question, and among all tokens."""
    colors = torch.cat([asked.answers[:, None], asked.marks["choices"]], 1)
    of_three = logits.gather(1, colors).argmax(1) == 0
    return float(of_three.float().mean()), float((logits.argmax(1) == asked.answers).float().mean())
