"""Recipe: branch, train, mix. One seed model, a branch of it for each kind of text, and their mixture (BAM), trained in phases."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Literal

from headwise import registry
from headwise.checks import whole
from headwise.errors import RouteError
from headwise.hub import byte_tokenizer
from headwise.registry import register
from headwise.route._recipes import Arm, Job, Student, Trained, follow, settings_of, size_of
from headwise.route._recipes_text import SIZES, TextSize, small_llama, text_data

DOMAINS: tuple[Literal["english", "code"], ...] = ("english", "code")


@register("train", "bam", paper="06")
def train_bam(
    *,
    size: Literal["cpu", "gpu"] = "cpu",
    attention: Literal["soft", "average"] = "soft",
    kv: Literal["expert", "shared"] = "expert",
    ffn_top_k: int = 1,
    control: bool = False,
    steps: int | None = None,
    folder: str | None = None,
    save_every: int = 0,
    resume: bool = False,
    device: str | None = None,
    seed: int = 0,
    progress: bool = False,
) -> Trained:
    """Train a seed model on English and code, a branch of it on each, and then the mixture of all three (BAM).

    The steps are shared out: a third for the seed, a sixth for each branch, a third for the mixture.

    size: cpu (3 layers of width 96) or gpu (12 of width 768).
    attention: soft (BAM) or average (BTX, no attention experts).
    kv: expert (own keys and values) or shared.
    ffn_top_k: feed-forward experts a token.
    control: train the seed on for as many steps as branches and mixture together, on the mixed text: the dense model of the same rows.
    steps: optimizer steps of all phases together, instead of the size's; at least 6.
    folder: where checkpoints go, one folder a phase.
    save_every: steps between checkpoints; 0 for none.
    resume: continue the run in folder, killed or complete.
    device: cpu, cuda, …; by default the GPU where there is one.

    Returns the models of all phases, the mixture as "routed"; `headwise convert bam --help` tells how they are mixed.

    >>> sorted(train_bam(steps=6).students)
    ['code', 'english', 'routed', 'seed']
    """
    chosen: TextSize = size_of(size, SIZES, steps)
    whole("steps", chosen.steps, 6, RouteError)
    options = {"attention": attention, "kv": kv, "ffn_top_k": ffn_top_k}
    job = Job(
        name="bam",
        recipe=chosen.recipe(seed),
        settings=settings_of(chosen, size=size, **options, control=control, seed=seed),
        folder=folder,
        save_every=save_every,
        resume=resume,
        device=device,
        progress=progress,
    )
    third, sixth = chosen.steps // 3, chosen.steps // 6

    def start(done: Mapping[str, Student]) -> Student:
        return Student(small_llama(chosen, seed=seed))

    def branch(done: Mapping[str, Student]) -> Student:
        return Student(copy.deepcopy(done["seed"].model))

    def mix(done: Mapping[str, Student]) -> Student:
        sources = [done[name].model for name in ("seed", *DOMAINS)]
        # Through the register: a method file imports no other, and the conversion is the one that users call.
        mixed = registry.get("route", "bam")(sources, [byte_tokenizer()] * 3, seed=seed, **options)
        return Student(mixed.model, host=mixed.host, save=mixed.save_pretrained)

    before = start({})
    mix(dict.fromkeys(("seed", *DOMAINS), before))  # options that do not fit are said before anything is trained
    rows = {name: text_data(chosen, name, None, seed=seed, scale=size, steps=sixth) for name in DOMAINS}
    mixed_rows = text_data(chosen, "mixed", None, seed=seed, scale=size)
    arms = {"seed": Arm(start, mixed_rows, third)}
    arms |= {name: Arm(branch, rows[name], sixth) for name in DOMAINS}
    arms["routed"] = Arm(mix, text_data(chosen, "mixed", None, seed=seed + 1, scale=size, steps=third), third)
    if control:
        again = text_data(chosen, "mixed", None, seed=seed + 1, scale=size)
        arms["dense"] = Arm(branch, again, 2 * sixth + third)
    return follow(job, arms)
