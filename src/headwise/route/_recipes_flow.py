"""Image generators for the recipes: a rectified flow by diffusers' DiT class or by transformers' ViT layers, dense or routed.

Letters: B pictures, S pixels a side.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from headwise.attach import attach
from headwise.models.flow_dit import flow_dit, velocity_error, velocity_of
from headwise.models.flow_vit import flow_vit, train_flow
from headwise.models.loop import Run
from headwise.route._recipes import Job, Student, Trained, busiest_head
from headwise.route._recipes_images import Drawn
from headwise.route._train import Curve, Recipe

Kind = Literal["vit", "dit"]


@dataclass(frozen=True, kw_only=True)
class FlowSize:
    """Sizes of a flow and of its training."""

    width: int = 64
    layers: int = 4
    heads: int = 8
    steps: int = 400
    batch: int = 64
    rate: float = 3e-3
    pictures: int = 4096
    held_out: int = 256

    def recipe(self, seed: int) -> Recipe:
        """Steps, batch, rate and seed, checked."""
        return Recipe(steps=self.steps, batch_size=self.batch, learning_rate=self.rate, seed=seed)


SIZES = {
    "cpu": FlowSize(),
    "gpu": FlowSize(width=384, layers=12, heads=12, steps=4000, batch=256, rate=1e-3, pictures=60_000, held_out=2000),
}


def flow_model(kind: Kind, size: FlowSize, drawn: Drawn, *, seed: int) -> Any:
    """A generator with random weights for these pictures. Raises TaskError where diffusers is asked for and missing."""
    made = (flow_dit if kind == "dit" else flow_vit)(
        size=drawn.side,
        patch=drawn.patch,
        classes=drawn.classes,
        width=size.width,
        layers=size.layers,
        heads=size.heads,
        seed=seed,
    )
    return made


def follow_flow(job: Job, size: FlowSize, drawn: Drawn, arms: Mapping[str, Callable[[], Student]]) -> Trained:
    """Train the arms in turn on the same pictures, times and noises; one that is complete in the job's folder is only read."""
    job.open()
    trained = Trained(job.name, dict(job.settings), {})
    started = time.monotonic()
    for name, build in arms.items():
        student = build()
        student.model.to(job.place)
        losses = _train(job, name, student, size, drawn)
        found = measure_flow(student, drawn)
        trained.students[name] = student
        trained.curves[name] = Curve(losses, {len(losses): found["held_out_loss"]})
        tail = losses[-max(1, len(losses) // 10) :]
        trained.measured[name] = {"train_loss": sum(tail) / len(tail), **found}
    trained.seconds = time.monotonic() - started
    return trained


def _train(job: Job, name: str, student: Student, size: FlowSize, drawn: Drawn) -> list[float]:
    run = Run(
        steps=size.steps,
        folder=None if job.folder is None else str(Path(job.folder) / name),
        save_every=job.save_every,
        resume=job.resume,
        progress=job.progress,
        title=f"{job.name}, {name}",
    )
    pixels, labels = _stacked(drawn.rows.train)
    with ExitStack() as stack:
        if student.router is not None:
            stack.enter_context(attach(student.model, router=student.router))
        return train_flow(
            student.model,
            pixels,
            labels,
            velocity=velocity_of(student.model),
            null=drawn.classes,
            batch=size.batch,
            lr=size.rate,
            extra=None if student.router is None else student.router.loss,
            seed=job.recipe.seed,
            run=run,
        )


def measure_flow(student: Student, drawn: Drawn) -> dict[str, float]:
    """Error on held-out pictures, and how a router's load is spread over its heads."""
    held = _stacked(drawn.rows.held_out)
    if student.router is None:
        return {"held_out_loss": velocity_error(student.model, *held)}
    with attach(student.model, router=student.router), student.router.recording() as load:
        error = velocity_error(student.model, *held)
    return {"held_out_loss": error, "active": student.router.share, "busiest": busiest_head(student.router, load)}


def _stacked(rows: Any) -> tuple[Tensor, Tensor]:
    return torch.stack([row["pixel_values"] for row in rows]), torch.stack([row["labels"] for row in rows])
