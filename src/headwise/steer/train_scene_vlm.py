"""Recipe: a small vision-language model with a habit of speech that pictures do not bear out, to study hallucination with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch

from headwise.models.scene_vlm import SceneData, save_scene_vlm, train_scene_vlm
from headwise.registry import register
from headwise.route._recipes import Job, Trained, settings_of, size_of
from headwise.steer._recipes_vision import recipe, train_one
from headwise.tasks.descriptions import describe
from headwise.tasks.scenes import Habit, Task, make_scenes, scene_tokenizer


@dataclass(frozen=True, kw_only=True)
class SceneSize:
    """Sizes of a scene model and of its training."""

    model: str = "small"
    steps: int = 1200
    batch: int = 64
    rate: float = 2e-3
    pool: int = 6000
    measured_on: int = 200


SIZES = {
    "cpu": SceneSize(),
    "gpu": SceneSize(model="medium", steps=5000, batch=256, rate=2e-3, pool=20_000, measured_on=1000),
}
HABITS: tuple[Habit, ...] = ("half", "broken")


@register("train", "scene-vlm", paper="22")
def train_scenes(
    *,
    size: Literal["cpu", "gpu"] = "cpu",
    talk: float = 0.5,
    slip: float = 0.25,
    noise: float = 0.7,
    steps: int | None = None,
    folder: str | None = None,
    save_every: int = 0,
    resume: bool = False,
    device: str | None = None,
    seed: int = 0,
    progress: bool = False,
) -> Trained:
    """Train a LLaVA of about a million parameters on drawn scenes, with a habit that makes it invent objects.

    size: cpu (4 layers of 8 heads: the bundled models) or gpu (8 layers of 8 heads, four times the rows and the steps).
    talk: share of the rows of a batch that are speech without a picture.
    slip: how often a description in the training data names a second that is not in its picture, behind its first.
    noise: standard deviation of the pixels' noise, in training and measuring; colours have the values -1 and 1.
    steps: optimizer steps, instead of the size's.
    folder: where checkpoints go.
    save_every: steps between checkpoints; 0 for none.
    resume: continue the run in folder, killed or complete.
    device: cpu, cuda, …; by default the GPU where there is one.

    Returns the trained model, its curve, and what it says about unseen scenes: in `half` the second of a pair is in the picture as often
    as not, in `broken` never.

    >>> trained = train_scenes(steps=1)
    >>> sorted(trained.measured["scene-vlm"])[:4]
    ['at_right', 'broken_chair_i', 'broken_chair_s', 'broken_f1']
    """
    chosen: SceneSize = size_of(size, SIZES, steps)
    data = SceneData(batch=chosen.batch, talk=talk, slip=slip, noise=noise, pool=chosen.pool)
    job = Job(
        name="scene-vlm",
        recipe=recipe(chosen.steps, chosen.batch, chosen.rate, seed),
        settings=settings_of(chosen, size=size, talk=talk, slip=slip, noise=noise, seed=seed),
        folder=folder,
        save_every=save_every,
        resume=resume,
        device=device,
        progress=progress,
    )
    return train_one(
        job,
        "scene-vlm",
        lambda run, place: train_scene_vlm(chosen.model, data=data, lr=chosen.rate, seed=seed, device=place, run=run),
        lambda model: figures(model, chosen.measured_on, noise=noise),
        save_scene_vlm,
        scene_tokenizer(),
    )


@torch.no_grad()
def figures(model: Any, count: int, *, noise: float = 0.7, seed: int = 99) -> dict[str, float]:
    """Loss and rates of descriptions of unseen scenes, and the share of right answers to the other questions."""
    generator = torch.Generator().manual_seed(seed)
    found: dict[str, float] = {}
    for habit in HABITS:
        scenes = make_scenes(count, habit=habit, noise=noise, generator=generator)
        if habit == "half":
            rows = {name: tensor.to(model.device) for name, tensor in scenes.training().items()}
            found["held_out_loss"] = float(model(**rows).loss)
        found |= {f"{habit}_{name}": value for name, value in describe(model, scenes).measures().items()}
    tasks: tuple[Task, ...] = ("at", "count")
    for task in tasks:
        scenes = make_scenes(count, task=task, noise=noise, generator=generator)
        inputs = {name: tensor.to(model.device) for name, tensor in scenes.inputs().items()}
        first = model(**inputs).logits[:, -1].argmax(-1).cpu()
        right = first == torch.tensor([answer[0] for answer in scenes.answers])
        found[f"{task}_right"] = float(right.float().mean())
    return found
