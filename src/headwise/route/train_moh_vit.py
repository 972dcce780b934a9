"""Recipe: a small ViT with mixture-of-head attention from scratch, beside a dense one on the same pictures."""

from __future__ import annotations

from typing import Literal

from headwise.models.shape_vit import shape_vit
from headwise.registry import register
from headwise.route._convert import Choice, unfitted_router
from headwise.route._recipes import Arm, Job, Student, Trained, follow, settings_of, size_of
from headwise.route._recipes_images import SIZES, ImageSize, image_data


@register("train", "moh-vit", paper="01")
def train_moh_vit(
    *,
    size: Literal["cpu", "gpu"] = "cpu",
    active: float = 0.75,
    shared_count: int | None = None,
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
    """Train an image classifier whose patches each run some of the heads (MoH, part A of the paper), from scratch.

    size: cpu (4 layers of width 64) or gpu (12 of width 384).
    active: share of the heads that run for each patch.
    shared_count: heads that always run; by default half of the heads.
    beta: weight of the load-balance loss.
    gate_norm: scale of the gates: official (mean 1) or paper (sum at most 1).
    data: shapes (drawn, always there), digits (of scikit-learn), or fashion-mnist (the Debian package dataset-fashion-mnist).
    images: folder of the four files of fashion-mnist, or of any data in its format, if not where the package puts them.
    control: train the dense model too, from the same weights on the same pictures.
    steps: optimizer steps, instead of the size's.
    folder: where checkpoints go, one folder an arm.
    save_every: steps between checkpoints; 0 for none.
    resume: continue the run in folder, killed or complete.
    device: cpu, cuda, …; by default the GPU where there is one.

    Returns the trained models, their curves and figures, accuracy on held-out pictures among them.

    >>> trained = train_moh_vit(steps=1)
    >>> sorted(trained.measured["routed"])
    ['accuracy', 'active', 'busiest', 'held_out_loss', 'train_loss']
    """
    chosen: ImageSize = size_of(size, SIZES, steps)
    options = {"active": active, "shared_count": shared_count, "beta": beta, "gate_norm": gate_norm}
    job = Job(
        name="moh-vit",
        recipe=chosen.recipe(seed),
        settings=settings_of(chosen, size=size, **options, data=data, control=control, seed=seed),
        folder=folder,
        save_every=save_every,
        resume=resume,
        device=device,
        progress=progress,
    )
    choice = Choice(active=active, shared="first", shared_count=shared_count)
    drawn = image_data(data, images, chosen, seed=seed)
    shape = {"size": drawn.side, "patch": drawn.patch, "classes": drawn.classes}

    def dense(done: object) -> Student:
        model = shape_vit(**shape, width=chosen.width, layers=chosen.layers, heads=chosen.heads, seed=seed)
        # Else the first loss and the first save set them, and the model gets another fingerprint.
        model.config.problem_type = "single_label_classification"
        model.config.architectures = [type(model).__name__]
        return Student(model)

    def routed(done: object) -> Student:
        model = dense(done).model
        heads = unfitted_router(model, choice, "trained", seed=seed, beta=beta, gate_norm=gate_norm)
        return Student(model, heads)

    arms = {"routed": Arm(routed, drawn.rows)}
    if control:
        arms["dense"] = Arm(dense, drawn.rows)
    return follow(job, arms)
