"""Recipe: a pretrained language model is converted to run some of its heads and trained on, beside the dense one on the same tokens."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, Literal

from headwise import registry
from headwise.checks import finite
from headwise.errors import RouteError, TaskError
from headwise.hub import load_model
from headwise.registry import register
from headwise.route._distil import distilling
from headwise.route._recipes import Arm, Job, Student, Trained, follow, settings_of, size_of
from headwise.route._recipes_recover import SIZES, RecoverSize, examiner, recover_data


@register("train", "moh-recover", paper="01")
def train_moh_recover(
    *,
    model: str = "smollm2",
    size: Literal["cpu", "gpu"] = "cpu",
    active: float = 0.75,
    also: float | None = None,
    router: Literal["fitted", "norm"] = "fitted",
    target: Literal["norm", "importance"] = "importance",
    features: Literal["hidden", "queries"] = "queries",
    absent: Literal["zero", "rest"] = "rest",
    allocate: Literal["uniform", "sensitivity"] = "sensitivity",
    teacher: float = 0.0,
    beta: float = 0.01,
    ste_scope: Literal["selected", "all", "none"] = "selected",
    text: Literal["english", "mixed", "library"] = "mixed",
    steps: int | None = None,
    folder: str | None = None,
    save_every: int = 0,
    resume: bool = False,
    device: str | None = None,
    seed: int = 0,
    progress: bool = False,
) -> Trained:
    """Convert a pretrained language model to mixture-of-head attention, then train it and the dense model on the same tokens.

    The dense control comes first; every arm starts from the model's own weights and sees the same rows in the same order.

    model: local folder, hub id or bundled name of a causal language model with a tokenizer.
    size: cpu (20 steps of 512 tokens) or gpu (300 steps of 16384 tokens).
    active: share of the heads that run for each token.
    also: a second share, trained in the same way beside the first.
    router: fitted (closed form, then trained straight through) or norm (the paper's conversion, first half of the heads shared).
    target: what a fitted router predicts of a head; see `headwise convert moh --help`.
    features: what a fitted router reads of a token.
    absent: what a head gives that does not run, with a fitted router; rest starts as a mean and is trained.
    allocate: heads per layer of a fitted router.
    teacher: weight of the distance to the predictions of the trained dense model in the loss; 0 for the paper's loss alone.
    beta: weight of the load-balance loss.
    ste_scope: heads whose 0/1 gates receive a straight-through gradient.
    text: english, mixed (English and source code), or library (also the docstrings of installed packages).
    steps: optimizer steps, instead of the size's.
    folder: where checkpoints go, one folder an arm.
    save_every: steps between checkpoints; 0 for none.
    resume: continue the run in folder, killed or complete.
    device: cpu, cuda, …; by default the GPU where there is one.

    Returns the trained models, their curves and figures before and after the training: perplexity on unseen English, code
    and stories, passkeys found. Raises TaskError for a model without a tokenizer, RouteError for counts that do not add up.

    >>> trained = train_moh_recover(model="tiny-random-llama", router="norm", steps=1)
    >>> list(trained.students), sorted(trained.measured["routed"])[:3]
    (['dense', 'routed'], ['active', 'before_passkey', 'before_ppl_code'])
    """
    chosen: RecoverSize = size_of(size, SIZES, steps)
    if finite("teacher", teacher, RouteError) < 0:
        raise RouteError(f"teacher is {teacher}; it must be at least 0")
    tokenizer = load_model(model)[1]
    if tokenizer is None:
        raise TaskError(f"model {model!r} has no tokenizer, so no text can be read with it")
    options: dict[str, Any] = {"router": router, "beta": beta, "ste_scope": ste_scope}
    how: dict[str, Any] = {"target": target, "features": features, "absent": absent, "allocate": allocate}
    fit = how | {"fit_text": "mixed", "fit_tokens": chosen.fit_tokens}
    more = {"active": active, "also": also, "teacher": teacher, "text": text, "seed": seed}
    job = Job(
        name="moh-recover",
        recipe=chosen.recipe(seed),
        settings=settings_of(chosen, size=size, model=model, **options, **how, **more),
        folder=folder,
        save_every=save_every,
        resume=resume,
        device=device,
        progress=progress,
    )

    def dense(done: object) -> Student:
        return Student(load_model(model, dtype="float32", device=job.place)[0])

    def routed(share: float, done: Mapping[str, Student]) -> Student:
        # Through the register: a method file imports no other, and the conversion is the one that users call.
        made = dense(done).model
        convert = registry.get("route", "moh")
        given = options | (fit if router == "fitted" else {})
        heads = convert(made, tokenizer, active=share, seed=seed, progress=progress, **given)
        return Student(made, heads, during=partial(_taught, made, done["dense"].model, teacher) if teacher else None)

    rows, examine = recover_data(tokenizer, text, chosen, seed=seed), examiner(tokenizer, chosen)
    arms = {"dense": Arm(dense, rows, examine=examine), "routed": Arm(partial(routed, active), rows, examine=examine)}
    if also is not None:
        arms["also"] = Arm(partial(routed, also), rows, examine=examine)
    return follow(job, arms)


def _taught(model: Any, teacher: Any, weight: float) -> AbstractContextManager[Any]:
    return distilling(model, teacher, weight)
