"""Recipe: a small language model with mixture-of-head attention from scratch, beside a dense one on the same tokens."""

from __future__ import annotations

from typing import Literal

from headwise.registry import register
from headwise.route._convert import Choice, unfitted_router
from headwise.route._recipes import Arm, Job, Student, Trained, follow, settings_of, size_of
from headwise.route._recipes_text import SIZES, TextSize, small_llama, text_data, text_name


@register("train", "moh-lm", paper="01")
def train_moh_lm(
    *,
    size: Literal["cpu", "gpu"] = "cpu",
    active: float = 0.75,
    shared_count: int | None = None,
    beta: float = 0.01,
    gate_norm: Literal["official", "paper"] = "official",
    data: Literal["english", "code", "mixed"] = "mixed",
    text: str | None = None,
    control: bool = False,
    steps: int | None = None,
    folder: str | None = None,
    save_every: int = 0,
    resume: bool = False,
    device: str | None = None,
    seed: int = 0,
    progress: bool = False,
) -> Trained:
    """Train a byte language model whose tokens each run some of the heads (MoH, part A of the paper), from scratch.

    size: cpu (3 layers of width 96, 0.46 M bytes, under a minute an arm) or gpu (12 of width 768, 33 M bytes).
    active: share of the heads that run for each token.
    shared_count: heads that always run; by default half of the heads.
    beta: weight of the load-balance loss.
    gate_norm: scale of the gates: official (mean 1) or paper (sum at most 1).
    data: packaged text: english, code, or both mixed.
    text: a text of your own instead; its last tenth is held out.
    control: train the dense model too, from the same weights on the same rows.
    steps: optimizer steps, instead of the size's.
    folder: where checkpoints go, one folder an arm.
    save_every: steps between checkpoints; 0 for none.
    resume: continue the run in folder, killed or complete.
    device: cpu, cuda, …; by default the GPU where there is one.

    Returns the trained models, their curves and figures. Raises RouteError for counts that do not add up or another run's folder.

    >>> trained = train_moh_lm(steps=2, active=0.5)
    >>> trained.router.active_counts(), len(trained.curves["routed"].losses)
    ([4, 4, 4], 2)
    """
    chosen: TextSize = size_of(size, SIZES, steps)
    options = {"active": active, "shared_count": shared_count, "beta": beta, "gate_norm": gate_norm}
    settings = settings_of(chosen, size=size, **options, data=text_name(data, text), control=control, seed=seed)
    job = Job(
        name="moh-lm",
        recipe=chosen.recipe(seed),
        settings=settings,
        folder=folder,
        save_every=save_every,
        resume=resume,
        device=device,
        progress=progress,
    )
    choice = Choice(active=active, shared="first", shared_count=shared_count)

    def routed(done: object) -> Student:
        model = small_llama(chosen, seed=seed)
        heads = unfitted_router(model, choice, "trained", seed=seed, beta=beta, gate_norm=gate_norm)
        return Student(model, heads)

    routed(None)  # options that do not fit are said before texts are read
    rows = text_data(chosen, data, text, seed=seed, scale=size)
    arms = {"routed": Arm(routed, rows)}
    if control:
        arms["dense"] = Arm(lambda done: Student(small_llama(chosen, seed=seed)), rows)
    return follow(job, arms)
