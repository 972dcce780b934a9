"""Recovery training of a converted model: convert, then train with the language-model loss and the balance loss."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

from torch import nn

from headwise.attach import attach
from headwise.errors import RouteError
from headwise.registry import register
from headwise.route._convert import Choice, unfitted_router
from headwise.route._router import HeadRouter
from headwise.route._train import Recipe, train_lm
from headwise.tasks.calibration import calibration_rows
from headwise.units import HeadScores

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@register("train", "moh", paper="01")
def train_moh(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    router: Literal["norm", "trained"] = "norm",
    start: HeadRouter | None = None,
    active: float = 0.75,
    shared: Literal["first", "importance", "none"] | None = None,
    shared_count: int | None = None,
    importance: HeadScores | None = None,
    beta: float = 0.01,
    steps: int = 100,
    batch_size: int = 4,
    window: int = 256,
    learning_rate: float = 1e-4,
    weights: Literal["all", "router"] = "all",
    text: str | None = None,
    save_model: str | None = None,
    folder: str | None = None,
    save_every: int = 0,
    resume: bool = False,
    seed: int = 0,
    progress: bool = False,
) -> HeadRouter:
    """Train a mixture-of-head model: convert it (or start from a router), then train on text through transformers' Trainer.

    Loss = language-model loss + beta · mean balance loss. The model's own weights change in place; with weights="router"
    only the router's parameters do. From the command line, `--save-model` keeps the trained model: its adapter alone is half of the result.

    router: norm (the paper's conversion: straight-through gates, no parameters) or trained (the paper's linear router).
    active: share of the heads that run for each token.
    shared: which heads always run: first, importance or none; see `headwise convert moh --help`.
    shared_count: how many; by default half of the heads.
    importance: scores of the heads, e.g. of `headwise score taylor`.
    beta: weight of the load-balance loss.
    steps: optimizer steps.
    batch_size: rows of one step.
    window: tokens of a row.
    learning_rate: at its peak.
    weights: all, or router for the router's parameters only.
    text: what to train on; by default the packaged English.
    save_model: folder for the trained model and its tokenizer.
    folder: where checkpoints go, router included.
    save_every: steps between checkpoints; 0 for none.
    resume: continue from the newest checkpoint in folder.
    `start`: a router to train further (norm, fitted or trained) instead of converting.

    Returns the router; its meta holds steps, first and last training loss.

    >>> from headwise.hub import load_model
    >>> router = train_moh(*load_model("tiny-random-llama"), steps=2, batch_size=2, window=32)
    >>> router.config.meta["steps"]
    2
    """
    recipe = Recipe(
        steps=steps,
        batch_size=batch_size,
        learning_rate=learning_rate,
        seed=seed,
        folder=folder,
        save_every=save_every,
    )
    if start is None:
        choice = Choice(active=active, shared=shared, shared_count=shared_count, importance=importance)
        start = unfitted_router(model, choice, router, seed=seed, beta=beta)
    if weights not in ("all", "router"):
        raise RouteError(f"weights is {weights!r}; it must be 'all' or 'router'")
    if weights == "router" and not list(start.parameters()):
        raise RouteError(f"weights='router', but a {start.config.kind!r} router has no parameters; use weights='all'")
    rows = calibration_rows(model, tokenizer, text=text, tokens=_tokens(recipe, window), window=window, seed=seed)
    with attach(model, router=start), _trainable(model, start if weights == "router" else None):
        losses = train_lm(model, rows, recipe, resume=resume, progress=progress)
    found: dict[str, Any] = {"steps": steps, "tokens": rows.numel(), "trained_weights": weights}
    found |= {"first_loss": losses[0], "last_loss": losses[-1]} if losses else {}
    start.config = replace(start.config, meta={**start.config.meta, **found})
    if save_model is not None:
        model.save_pretrained(save_model)
        if tokenizer is not None:
            tokenizer.save_pretrained(save_model)
    return start


def _tokens(recipe: Recipe, window: int) -> int:
    return recipe.steps * recipe.batch_size * recipe.accumulate * window


@contextmanager
def _trainable(model: nn.Module, router: HeadRouter | None) -> Iterator[None]:
    """With a router, only its parameters get gradients while the block runs."""
    if router is None:
        yield
        return
    own = {id(p) for p in router.parameters()}
    frozen = [p for p in model.parameters() if p.requires_grad and id(p) not in own]
    for p in frozen:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in frozen:
            p.requires_grad_(True)
