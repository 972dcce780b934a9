"""What the recipes of vision models share: one model a run, trained by `models.loop`, written with its curve and figures."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from headwise.models.loop import Run
from headwise.route._recipes import Job, Student, Trained
from headwise.route._train import Curve, Recipe
from headwise.storage import StrPath

Train = Callable[[Run, str], tuple[Any, list[float]]]
Measure = Callable[[Any], Mapping[str, float]]


def train_one(
    job: Job, name: str, train: Train, measure: Measure, save: Callable[[Any, StrPath], None], tokenizer: Any = None
) -> Trained:
    """Train the one model of a job, from its checkpoint if it is resumed, and measure it.

    `train(run, device)` gives model and losses; `measure(model)` its figures, "held_out_loss" among them; `save(model, folder)` writes it.
    """
    job.open()
    started = time.monotonic()
    run = Run(
        steps=job.recipe.steps,
        folder=None if job.folder is None else str(Path(job.folder) / name),
        save_every=job.save_every,
        resume=job.resume,
        progress=job.progress,
        title=f"{job.name}",
    )
    model, losses = train(run, job.place)
    figures = dict(measure(model))
    tail = losses[-max(1, len(losses) // 10) :]
    return Trained(
        name=job.name,
        settings=dict(job.settings),
        students={name: Student(model, save=lambda folder: save(model, folder))},
        curves={name: Curve(losses, {len(losses): figures["held_out_loss"]})},
        measured={name: {"train_loss": sum(tail) / len(tail), **figures}},
        tokenizer=tokenizer,
        seconds=time.monotonic() - started,
    )


def recipe(steps: int, batch: int, rate: float, seed: int) -> Recipe:
    """Steps, batch, rate and seed, checked."""
    return Recipe(steps=steps, batch_size=batch, learning_rate=rate, seed=seed)
