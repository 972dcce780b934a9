"""Recipe: a byte language model as a union of experts from scratch, beside the dense one that it was cut from."""

from __future__ import annotations

from typing import Literal

from headwise import registry
from headwise.hub import byte_tokenizer
from headwise.registry import register
from headwise.route._recipes import Arm, Job, Student, Trained, follow, settings_of, size_of
from headwise.route._recipes_text import SIZES, TextSize, small_llama, text_data, text_name


@register("train", "uoe-lm", paper="24")
def train_uoe_lm(
    *,
    size: Literal["cpu", "gpu"] = "cpu",
    active: float = 0.5,
    mlp_experts: int = 4,
    mlp_k: int = 2,
    balance: float = 0.01,
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
    """Train a byte language model whose heads drop tokens from q, k and v (union of experts), from scratch.

    size: cpu (3 layers of width 96, 0.46 M bytes) or gpu (12 of width 768, 33 M bytes).
    active: share of the heads that take each token.
    mlp_experts: slices of the feed-forward layers; 0 leaves these layers dense.
    mlp_k: slices that a token takes.
    balance: coefficient of the load-balance loss; the paper has none.
    data: packaged text: english, code, or both mixed.
    text: a text of your own instead; its last tenth is held out.
    control: train the dense model too, from the same weights on the same rows.
    steps: optimizer steps, instead of the size's.
    folder: where checkpoints go, one folder an arm.
    save_every: steps between checkpoints; 0 for none.
    resume: continue the run in folder, killed or complete.
    device: cpu, cuda, …; by default the GPU where there is one.

    Returns the trained models, their curves and figures; `headwise convert uoe --help` tells what is cut.

    >>> sorted(train_uoe_lm(steps=1).students)
    ['routed']
    """
    chosen: TextSize = size_of(size, SIZES, steps)
    options = {"active": active, "mlp_experts": mlp_experts, "mlp_k": mlp_k, "balance": balance}
    job = Job(
        name="uoe-lm",
        recipe=chosen.recipe(seed),
        settings=settings_of(chosen, size=size, **options, data=text_name(data, text), control=control, seed=seed),
        folder=folder,
        save_every=save_every,
        resume=resume,
        device=device,
        progress=progress,
    )

    def routed(done: object) -> Student:
        # Through the register: a method file imports no other, and the conversion is the one that users call.
        union = registry.get("route", "uoe")(small_llama(chosen, seed=seed), byte_tokenizer(), seed=seed, **options)
        return Student(union.model, host=union.host, save=union.save_pretrained)

    routed(None)  # options that do not fit are said before texts are read
    rows = text_data(chosen, data, text, seed=seed, scale=size)
    arms = {"routed": Arm(routed, rows)}
    if control:
        arms["dense"] = Arm(lambda done: Student(small_llama(chosen, seed=seed)), rows)
    return follow(job, arms)
