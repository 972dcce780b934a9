"""Recipe: a small class-conditional image generator with mixture-of-head attention, beside a dense one on the same pictures."""

from __future__ import annotations

from typing import Literal

from headwise.registry import register
from headwise.route._convert import Choice, unfitted_router
from headwise.route._presets import moh_preset
from headwise.route._recipes import Job, Student, Trained, settings_of, size_of
from headwise.route._recipes_flow import SIZES, FlowSize, flow_model, follow_flow
from headwise.route._recipes_images import ImageSize, image_data


@register("train", "moh-dit", paper="01")
def train_moh_dit(
    *,
    size: Literal["cpu", "gpu"] = "cpu",
    model: Literal["vit", "dit"] = "vit",
    active: float = 0.75,
    shared_count: int | None = None,
    preset: str | None = None,
    beta: float = 0.01,
    gate_norm: Literal["official", "paper"] = "official",
    data: Literal["shapes", "digits", "fashion-mnist"] = "shapes",
    images: str | None = None,
    control: bool = False,
    steps: int | None = None,
    folder: str | None = None,
    save_every: int = 0,
    resume: bool = False,
    device: str | None = None,
    seed: int = 0,
    progress: bool = False,
) -> Trained:
    """Train an image generator (a rectified flow) whose patches each run some of the heads (MoH, part A of the paper), from scratch.

    size: cpu (4 layers of width 64) or gpu (12 of width 384).
    model: vit (transformers' ViT layers, time and class as tokens) or dit (diffusers' DiTTransformer2DModel, which needs diffusers).
    active: share of the heads that run for each patch.
    shared_count: heads that always run; by default half of the heads.
    preset: a published configuration instead of a share, such as dit-b/2-75, its budget carried over to this model's layers and heads.
    beta: weight of the load-balance loss.
    gate_norm: scale of the gates: official (mean 1) or paper (sum at most 1).
    data: shapes (drawn, always there), digits (of scikit-learn), or fashion-mnist (the Debian package dataset-fashion-mnist).
    images: folder of the four files of fashion-mnist, if not where the package puts them.
    control: train the dense model too, from the same weights on the same pictures, times and noises.
    steps: optimizer steps, instead of the size's.
    folder: where checkpoints go, one folder an arm.
    save_every: steps between checkpoints; 0 for none.
    resume: continue the run in folder, killed or complete.
    device: cpu, cuda, …; by default the GPU where there is one.

    Returns the trained models, their curves and figures; held_out_loss is the mean square error of the velocity.

    >>> trained = train_moh_dit(steps=1)
    >>> sorted(trained.measured["routed"])
    ['active', 'busiest', 'held_out_loss', 'train_loss']
    """
    chosen: FlowSize = size_of(size, SIZES, steps)
    options = {"active": active, "shared_count": shared_count, "preset": preset, "beta": beta, "gate_norm": gate_norm}
    job = Job(
        name="moh-dit",
        recipe=chosen.recipe(seed),
        settings=settings_of(chosen, size=size, model=model, **options, data=data, control=control, seed=seed),
        folder=folder,
        save_every=save_every,
        resume=resume,
        device=device,
        progress=progress,
    )
    if preset is None:
        choice = Choice(active=active, shared="first", shared_count=shared_count)
    else:
        choice = Choice(preset=moh_preset(preset).scaled(chosen.layers, chosen.heads), shared_count=shared_count)
    drawn = image_data(data, images, ImageSize(pictures=chosen.pictures, held_out=chosen.held_out), seed=seed)

    def dense() -> Student:
        return Student(flow_model(model, chosen, drawn, seed=seed))

    def routed() -> Student:
        made = dense().model
        heads = unfitted_router(made, choice, "trained", seed=seed, beta=beta, gate_norm=gate_norm)
        return Student(made, heads)

    arms = {"routed": routed}
    if control:
        arms["dense"] = dense
    return follow_flow(job, chosen, drawn, arms)
