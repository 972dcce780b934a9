"""Recipe: a small class-conditional image generator (rectified flow), of diffusers' DiT class or of transformers' ViT layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch

from headwise.models.flow_dit import flow_dit, velocity_error, velocity_of
from headwise.models.flow_vit import flow_vit, train_flow
from headwise.models.loop import Run
from headwise.registry import register
from headwise.route._recipes import Job, Trained, settings_of, size_of
from headwise.route._recipes_images import ImageSize, image_data
from headwise.steer._recipes_vision import recipe, train_one


@dataclass(frozen=True, kw_only=True)
class FlowSize:
    """Sizes of a flow and of its training."""

    width: int = 64
    layers: int = 4
    heads: int = 4
    steps: int = 1000
    batch: int = 64
    rate: float = 3e-3
    pictures: int = 4096
    held_out: int = 256


SIZES = {
    "cpu": FlowSize(),
    "gpu": FlowSize(width=384, layers=12, heads=12, steps=6000, batch=256, rate=1e-3, pictures=60_000, held_out=2000),
}


@register("train", "flow-dit", paper="07")
def train_flow_dit(
    *,
    size: Literal["cpu", "gpu"] = "cpu",
    model: Literal["dit", "vit"] = "dit",
    data: Literal["shapes", "digits", "fashion-mnist"] = "shapes",
    images: str | None = None,
    unconditional: float = 0.1,
    steps: int | None = None,
    folder: str | None = None,
    save_every: int = 0,
    resume: bool = False,
    device: str | None = None,
    seed: int = 0,
    progress: bool = False,
) -> Trained:
    """Train a class-conditional diffusion transformer from scratch, as a rectified flow.

    size: cpu (4 layers of 4 heads) or gpu (12 of 12).
    model: dit (diffusers' DiTTransformer2DModel) or vit (`FlowViT`: transformers' layers, class and time as tokens).
    data: shapes (drawn, always there), digits (of scikit-learn), or fashion-mnist (the Debian package dataset-fashion-mnist).
    images: folder of the four files of fashion-mnist, if not where the package puts them.
    unconditional: how often the label is hidden.
    steps: optimizer steps, instead of the size's.
    folder: where checkpoints go.
    save_every: steps between checkpoints; 0 for none.
    resume: continue the run in folder, killed or complete.
    device: cpu, cuda, …; by default the GPU where there is one.

    Returns the trained model, its curve, and its loss on held-out pictures.

    >>> trained = train_flow_dit(model="vit", steps=1)
    >>> sorted(trained.measured["vit"])
    ['held_out_loss', 'train_loss']
    """
    chosen: FlowSize = size_of(size, SIZES, steps)
    job = Job(
        name="flow-dit",
        recipe=recipe(chosen.steps, chosen.batch, chosen.rate, seed),
        settings=settings_of(chosen, size=size, model=model, data=data, unconditional=unconditional, seed=seed),
        folder=folder,
        save_every=save_every,
        resume=resume,
        device=device,
        progress=progress,
    )
    drawn = image_data(data, images, ImageSize(pictures=chosen.pictures, held_out=chosen.held_out), seed=seed)
    pixels, labels = (torch.stack([row[key] for row in drawn.rows.train]) for key in ("pixel_values", "labels"))
    shape = {"size": drawn.side, "patch": drawn.patch, "classes": drawn.classes}
    shape |= {"width": chosen.width, "layers": chosen.layers, "heads": chosen.heads, "seed": seed}

    def trained(run: Run, place: str) -> tuple[Any, list[float]]:
        made = (flow_dit if model == "dit" else flow_vit)(**shape).to(place)
        options: dict[str, Any] = {"batch": chosen.batch, "lr": chosen.rate, "unconditional": unconditional}
        losses = train_flow(
            made, pixels, labels, velocity=velocity_of(made), null=drawn.classes, seed=seed, run=run, **options
        )
        return made, losses

    held = tuple(torch.stack([row[key] for row in drawn.rows.held_out]) for key in ("pixel_values", "labels"))
    return train_one(
        job,
        model,
        trained,
        lambda made: {"held_out_loss": velocity_error(made, *held)},
        lambda made, place: made.save_pretrained(place),
    )
