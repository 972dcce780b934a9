"""Recipe: a byte language model of experts under any rule of the router zoo, beside a dense one of equal active size."""

from __future__ import annotations

from typing import Literal

from headwise.checks import whole
from headwise.errors import RouteError
from headwise.hub import byte_tokenizer
from headwise.registry import register
from headwise.route._recipes import Arm, Job, Student, Trained, follow, settings_of, size_of
from headwise.route._recipes_rules import Mixture, MixtureLM
from headwise.route._recipes_text import SIZES, TextSize, small_llama, text_data, text_name


@register("train", "routers", paper="25")
def train_routers(
    *,
    rule: Literal[
        "softmax",
        "topk-softmax",
        "sigmoid",
        "noisy",
        "cosine",
        "norm",
        "top-p",
        "null",
        "hash",
        "dense",
        "lory",
        "similarity",
        "attention",
        "expert-choice",
        "sinkhorn",
        "soft",
        "smear",
    ] = "softmax",
    size: Literal["cpu", "gpu"] = "cpu",
    experts: int = 8,
    k: int = 2,
    balance: float = 0.01,
    z: float = 0.001,
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
    """Train a byte language model whose feed-forward layers are experts behind a router, from scratch.

    rule: how tokens choose; expert-choice, sinkhorn, soft and smear look at later tokens and are refused, as a language model
      is causal.
    size: cpu (3 layers of width 96, 0.46 M bytes) or gpu (12 of width 768, 33 M bytes).
    experts: experts of each layer, each 1/k of the dense layer's hidden units wide.
    k: experts that a token takes; top-p and null take up to twice as many, dense all, lory one merged expert.
    balance: weight of the load-balance loss (importance and load loss for noisy; none for hash, dense, lory, sigmoid).
    z: weight of the z-loss of softmax routers.
    data: packaged text: english, code, or both mixed.
    text: a text of your own instead; its last tenth is held out.
    control: train the dense model of equal active size too, on the same rows.
    steps: optimizer steps, instead of the size's.
    folder: where checkpoints go, one folder an arm.
    save_every: steps between checkpoints; 0 for none.
    resume: continue the run in folder, killed or complete.
    device: cpu, cuda, …; by default the GPU where there is one.

    Returns the trained models, their curves and figures. Raises RouteError for a rule that leaks, and as the rules do.

    >>> trained = train_routers(rule="sigmoid", experts=4, steps=1)
    >>> trained.students["routed"].host.layers[0].experts.experts
    4
    """
    chosen: TextSize = size_of(size, SIZES, steps)
    if chosen.hidden % whole("k", k, 1, RouteError, whole("experts", experts, 1, RouteError)):
        raise RouteError(f"k is {k}; it must divide the {chosen.hidden} hidden units of the dense layer")
    mixture = Mixture(rule, experts, k, float(balance), float(z), seed)
    options = {"rule": rule, "experts": experts, "k": k, "balance": balance, "z": z}
    job = Job(
        name="routers",
        recipe=chosen.recipe(seed),
        settings=settings_of(chosen, size=size, **options, data=text_name(data, text), control=control, seed=seed),
        folder=folder,
        save_every=save_every,
        resume=resume,
        device=device,
        progress=progress,
    )

    def routed(done: object) -> Student:
        model = small_llama(chosen, hidden=chosen.hidden // k, seed=seed)
        host = mixture.build(model)
        whole_model = MixtureLM(model, host, mixture, byte_tokenizer())
        return Student(model, host=host, save=whole_model.save_pretrained)

    routed(None)  # options that do not fit are said before texts are read
    rows = text_data(chosen, data, text, seed=seed, scale=size)
    arms = {"routed": Arm(routed, rows)}
    if control:
        arms["dense"] = Arm(lambda done: Student(small_llama(chosen, seed=seed)), rows)
    return follow(job, arms)
