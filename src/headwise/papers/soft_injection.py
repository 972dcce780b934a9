"""Paper 27, soft injection (Park et al. 2025, arXiv 2507.20906): tasks move out of the prompt into the heads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from headwise.errors import HeadwiseError
from headwise.hub import load_model
from headwise.papers._run import Measured, device_of, reproduces
from headwise.papers._soft_baselines import function_vectors, task_vectors
from headwise.papers.catalogue import Paper
from headwise.papers.reproduction import Check, Reproduction
from headwise.steer import TaskEmbedding, fit_tasks, serve
from headwise.tasks.icl import Item, Split, Template, draw_few_shot, encode_item, icl_split, icl_tasks
from headwise.tasks.icl_batch import exact_rows, pack

PAPER = Paper(
    slug="soft-injection",
    status="works",
    api="headwise.steer.soft_injection, headwise.steer.TaskEmbedding, headwise.steer.serve, headwise.steer.fit_tasks, "
    "headwise.steer.function_vector, headwise.steer.task_vector",
    claim="With a mean of head outputs mixed in by learned shares, prompts without examples are answered nearly as well as "
    "prompts with ten, better than with a function vector, than with all heads replaced, and than with the same shares at random heads",
)
CPU_TASKS = (
    "antonym", "capitalize", "choose-last", "city-country", "comparative", "demonym",
    "first-letter", "kind", "next-number", "past", "plural", "sentiment",
)  # fmt: skip
SIZES: dict[str, dict[str, Any]] = {
    "cpu": {
        "tasks": CPU_TASKS,
        "seeds": 3,
        "prompts": 8,
        "steps": 60,
        "test": 5,
        "trials": 4,
        "every": 4,
        "held_out": 4,
    },
    "gpu": {
        "tasks": None,
        "seeds": 3,
        "prompts": 50,
        "steps": 400,
        "test": 30,
        "trials": 52,
        "every": 1,
        "held_out": 20,
    },
}
CHECKS = (
    Check("examples help", "exact_ten_shot", ">=", 0.5),
    Check("nearly as good as ten examples", "gap_to_ten_shot", ">=", -0.02),
    Check("far better than none", "gain_over_zero_shot", ">=", 0.5),
    Check("better than a function vector", "exact_function_vector", "<", "exact_soft"),
    Check("a function vector helps", "exact_zero_shot", "<", "exact_function_vector"),
    Check("all heads replaced is worse", "exact_all_replaced", "<", "exact_soft"),
    Check("the places of the shares matter", "exact_shuffled_alpha", "<", "exact_soft"),
    Check("the vectors carry the task", "exact_vectors_of_another_task", "<=", 0.25),
    Check("in every seed far better than none", "gain_over_zero_shot_worst_seed", ">=", 0.5),
)
PUBLISHED = {"published_gain_over_ten_shot_least": 0.102, "published_gain_over_ten_shot_most": 0.143}
"""Mean over 57 tasks, least and most of 12 models of 4B to 70B parameters (abstract)."""


@reproduces(PAPER, CHECKS, PUBLISHED)
def reproduce(scale: str = "cpu", *, seed: int = 0, progress: bool = False) -> Measured:
    """Measure the claim on smollm2. "cpu": 12 tasks, 3 seeds, in bfloat16. "gpu": all families, the paper's 400 steps and 50 prompts."""
    return measure(device=device_of(scale), seed=seed, progress=progress, **SIZES[scale])


def sections(result: Reproduction, *, seed: int = 0, progress: bool = False) -> list[Any]:
    """The chapters of `reproduce --page`: answers by method, and the shares of three tasks against causal effects."""
    from headwise.report.chapters.circuits import injection

    model, tokenizer = load_model("smollm2", dtype="bfloat16")
    return injection(result, model, tokenizer, tasks=("antonym", "plural", "past"), seed=seed)


@dataclass(frozen=True)
class Cell:
    """One task with one seed: its pairs and the questions it is tested by, with no examples and with ten."""

    task: str
    seed: int
    split: Split
    asked: list[Item]
    shown: list[Item]

    @property
    def name(self) -> str:
        """Unique among all cells."""
        return f"{self.task}#{self.seed}"


def measure(
    model_name: str = "smollm2",
    *,
    tasks: Sequence[str] | None,
    seeds: int,
    prompts: int,
    steps: int,
    test: int,
    trials: int,
    every: int,
    held_out: int,
    shots: int = 10,
    dtype: str = "bfloat16",
    device: str = "cpu",
    seed: int = 0,
    progress: bool = False,
) -> tuple[dict[str, float], dict[str, float]]:
    """(metrics, baselines): shares of test questions answered exactly, means over tasks and seeds, and over each seed's tasks."""
    model, tokenizer = load_model(model_name, dtype=dtype, device=device)
    if tokenizer is None:
        raise HeadwiseError(f"{model_name!r} has no tokenizer; soft injection needs a language model")
    names = icl_tasks() if tasks is None else tuple(tasks)
    cells = [make_cell(tokenizer, task, seed + s, test, shots) for s in range(seeds) for task in names]
    found = fit_tasks(
        model, tokenizer, {c.name: c.split.train for c in cells},
        validation={c.name: c.split.validation for c in cells},
        prompts=prompts, shots=shots, steps=steps, validate=max(1, steps // 4), validation_items=held_out, seed=seed, progress=progress,
    )  # fmt: skip
    fitted = [found[c.name] for c in cells]
    exact = {
        "zero_shot": answered(model, [c.asked for c in cells]),
        "ten_shot": answered(model, [c.shown for c in cells], rows=8),
        "soft": injected(model, cells, fitted),
        **{name: injected(model, cells, changed) for name, changed in controls(fitted, len(names), seed).items()},
    }
    sizes = {"trials": trials, "every": every, "held_out": held_out, "prompts": prompts, "shots": shots, "seed": seed}
    exact |= function_vectors(model, tokenizer, cells, [t.vectors for t in fitted], **sizes)
    exact |= task_vectors(model, tokenizer, cells, **sizes)
    return summary(exact, seeds)


def make_cell(tokenizer: Any, task: str, seed: int, test: int, shots: int) -> Cell:
    """Questions from the test part, examples from the training part; each question has examples of its own."""
    generator, template = torch.Generator().manual_seed(seed), Template()
    split = icl_split(task, generator=generator)
    asked, shown = [], []
    for x, y in split.test[:test]:
        examples, _ = draw_few_shot(split.train, shots, generator, query=(x, y))
        asked.append(encode_item(tokenizer, template.ask(x), y))
        shown.append(encode_item(tokenizer, template.few_shot(examples, x), y))
    return Cell(task, seed, split, asked, shown)


def controls(fitted: list[TaskEmbedding], tasks: int, seed: int) -> dict[str, list[TaskEmbedding]]:
    """What is changed to see what matters: no learning, all replaced, shares at other heads, vectors of the next task."""
    generator = torch.Generator().manual_seed(seed)

    def shuffled(task: TaskEmbedding) -> TaskEmbedding:
        order = torch.randperm(task.alpha.numel(), generator=generator)
        return task.with_alpha(task.alpha.flatten()[order].view_as(task.alpha))

    def others(i: int) -> TaskEmbedding:
        first = i - i % tasks  # the cells of one seed stand together
        return fitted[first + (i + 1 - first) % tasks]

    return {
        "untrained_half": [t.with_alpha(0.5) for t in fitted],
        "all_replaced": [t.with_alpha(1.0) for t in fitted],
        "shuffled_alpha": [shuffled(t) for t in fitted],
        "vectors_of_another_task": [others(i).with_alpha(t) for i, t in enumerate(fitted)],
    }


def answered(model: Any, groups: list[list[Item]], rows: int = 64) -> Tensor:
    """(cells,) share of exact answers without any change of the model."""
    device = next(model.parameters()).device
    flat = [item for group in groups for item in group]
    right = torch.cat([exact_rows(model, pack(flat[i : i + rows], device)).cpu() for i in range(0, len(flat), rows)])
    return _by_cell(right, groups)


def injected(model: Any, cells: Sequence[Cell], tasks: Sequence[TaskEmbedding], rows: int = 64) -> Tensor:
    """(cells,) share of exact answers with each cell's embedding in its questions."""
    device = next(model.parameters()).device
    flat = [(item, task) for cell, task in zip(cells, tasks, strict=True) for item in cell.asked]
    right = []
    for begin in range(0, len(flat), rows):
        items, own = zip(*flat[begin : begin + rows], strict=True)
        batch = pack(items, device)
        with serve(model, own, columns=batch.ends):
            right.append(exact_rows(model, batch).cpu())
    return _by_cell(torch.cat(right), [c.asked for c in cells])


def _by_cell(right: Tensor, groups: Sequence[Sequence[Item]]) -> Tensor:
    return torch.stack([part.double().mean() for part in right.split([len(g) for g in groups])])


def summary(exact: dict[str, Tensor], seeds: int) -> tuple[dict[str, float], dict[str, float]]:
    """Means over all cells, and the gains of the method by seed."""
    means = {f"exact_{name}": float(values.mean()) for name, values in exact.items()}
    by_seed = (exact["soft"] - exact["zero_shot"]).view(seeds, -1).mean(1)
    metrics = {
        "exact_soft": means.pop("exact_soft"),
        "gain_over_zero_shot": float((exact["soft"] - exact["zero_shot"]).mean()),
        "gap_to_ten_shot": float((exact["soft"] - exact["ten_shot"]).mean()),
        "gap_to_ten_shot_standard_error": float((exact["soft"] - exact["ten_shot"]).std() / len(exact["soft"]) ** 0.5),
        "gain_over_zero_shot_worst_seed": float(by_seed.min()),
        "tasks_at_least_as_good_as_ten_shot": float((exact["soft"] >= exact["ten_shot"]).double().mean()),
    }
    return metrics, means
