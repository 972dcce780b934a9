"""Paper 01, MoH (Jin et al. 2024, arXiv 2410.11842): mixture-of-head attention, converted and trained.

A real language model is converted without training, by the paper's rule and by better ones, beside static pruning of as many heads;
then by the paper's rule with a short training, beside the dense model trained on the same tokens. Small models are trained from
scratch on dialects.
"""

import math
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from headwise.hub import load_model
from headwise.papers._moh_conversion import Texts, attached, convert, measure_conversion
from headwise.papers._moh_dialects import measure_dialects
from headwise.papers._run import Measured, device_of, reproduces
from headwise.papers.catalogue import Paper
from headwise.papers.reproduction import Check
from headwise.route import HeadRouter
from headwise.route._fit_steps import FitRecipe, fit_heads
from headwise.route._train import Recipe, train_lm
from headwise.score.taylor import taylor
from headwise.tasks import code, english
from headwise.tasks.calibration import calibration_rows

PAPER = Paper(
    slug="moh",
    status="partial",
    api="headwise.route.moh, headwise.route.moh_preset, headwise.route.load_official, headwise.route.train_moh, "
    "headwise.route.train_moh_lm, headwise.route.train_moh_vit, headwise.route.train_moh_dit, "
    "headwise.route.train_moh_recover, headwise.route.HeadRouter, headwise.score.taylor, headwise.score.output_norm",
    claim="A language model converted to run 7 of its 9 heads per token wins back by a short training most of "
    "what it lost, against the dense model trained on the same tokens; it loses less from the start if "
    "its shared heads are chosen by importance; and a model trained with routed heads from scratch equals "
    "the dense one and gives kinds of text heads of their own",
)


BEST: dict[str, Any] = {
    "text": "mixed",
    "target": "importance",
    "features": "queries",
    "absent": "rest",
    "allocate": "sensitivity",
}
"""The options of `headwise convert moh --router fitted` that are measured."""


@dataclass(frozen=True)
class Scale:
    """Sizes of a run."""

    eval_tokens: int = 1024
    fit: FitRecipe = field(default_factory=lambda: FitRecipe(tokens=8192, **BEST))
    passkeys: int = 4
    steps: int = 10
    batch_size: int = 2
    window: int = 256
    learning_rate: float = 1e-4
    rules: tuple[str, ...] = ("first",)  # conversions that are trained
    dialect_steps: int = 200


SCALES = {
    "cpu": Scale(),
    "gpu": Scale(
        eval_tokens=16384,
        fit=FitRecipe(tokens=16384, **BEST),
        passkeys=20,
        steps=200,
        batch_size=16,
        window=512,
        learning_rate=2e-4,
        rules=("first", "importance", "fitted"),
        dialect_steps=1000,
    ),
}

CHECKS = (
    Check("shared heads help", "ppl_7of9_first", "<", "ppl_7of9_none"),
    Check("important ones help more", "ppl_7of9_importance", "<", "ppl_7of9_first"),
    Check("routing beats static pruning of a layer", "ppl_7of9_importance", "<", "ppl_7of9_static_layer"),
    Check("also at 6 of 9", "ppl_6of9_importance", "<", "ppl_6of9_static_layer"),
    Check("training closes most of the gap", "gap_closed_first", ">=", 0.5),
    Check(
        "a fitted router needs no training to beat all static ones", "ppl_7of9_fitted", "<", "ppl_7of9_static_global"
    ),
    Check("on text of another kind it costs 5 % at 7 of 9", "growth_stories_7of9", "<=", 0.05),
    Check("and 12 % at 6 of 9", "growth_stories_6of9", "<=", 0.12),
    Check("and 30 % at 5 of 9", "growth_stories_5of9", "<=", 0.30),
    Check("its choice of heads matters", "ppl_stories_7of9_fitted", "<", "ppl_stories_7of9_shuffled"),
    Check("it keeps the heads that a passkey needs", "passkey_7of9_fitted", ">=", "passkey_dense"),
    Check("from scratch 75 % is on par with dense", "dialects_gap_75pct", "<=", 0.02),
    Check("dialects have heads of their own", "dialects_distance_75pct", ">", "dialects_twice_shuffled_75pct"),
    Check("the balance loss balances", "dialects_peak_75pct", "<", "dialects_peak_75pct_unbalanced"),
)


@reproduces(PAPER, CHECKS)
def reproduce(scale: str = "cpu", *, seed: int = 0, progress: bool = False) -> Measured:
    """Measure the claim. "cpu": smollm2, one fit, and 10 steps of training, some 8 minutes of CPU time. "gpu": 200 steps of 8192 tokens
    each for the dense model and three conversions."""
    size = SCALES[scale]
    device = device_of(scale)
    metrics, baselines = measure_conversion("smollm2", size, device=device, seed=seed, progress=progress)
    trained, dense = measure_recovery("smollm2", size, device=device, seed=seed, progress=progress)
    metrics, baselines = metrics | trained, baselines | dense
    dialects = measure_dialects(steps=size.dialect_steps, seed=seed, progress=progress)
    dialects["dialects_gap_75pct"] = dialects["dialects_loss_75pct"] / dialects["dialects_loss_dense"] - 1
    dialects["dialects_twice_shuffled_75pct"] = 2 * dialects["dialects_shuffled_75pct"]
    control = ("dense", "unbalanced", "unshared", "shuffled")
    for name, value in dialects.items():
        (baselines if any(word in name for word in control) else metrics)[name] = value
    for rule in size.rules:
        metrics[f"gap_closed_{rule}"] = gap_closed(metrics, baselines, rule)
    return metrics, baselines


# a short training


def measure_recovery(
    name: str, size: Scale, *, device: str = "cpu", seed: int = 0, progress: bool = False
) -> tuple[dict[str, float], dict[str, float]]:
    """Perplexity after training on the same tokens with the same recipe: (conversions at 7/9, the dense model)."""
    found: dict[str, float] = {}
    for rule in ("dense", *size.rules):
        model, tokenizer = load_model(name, device=device, dtype="float32")
        texts, rows = Texts.of(tokenizer, size.eval_tokens, 1), _training_rows(model, tokenizer, size, seed)
        router = None if rule == "dense" else _trainable(model, tokenizer, rule, size, seed)
        recipe = Recipe(steps=size.steps, batch_size=size.batch_size, learning_rate=size.learning_rate, seed=seed)
        with attached(model, router):
            train_lm(model, rows, recipe, progress=progress)
        found[f"ppl_trained_{rule}"] = texts.perplexity(model, "english", router)
    dense = {"ppl_trained_dense": found.pop("ppl_trained_dense")}
    return found, dense


def _trainable(model: Any, tokenizer: Any, rule: str, size: Scale, seed: int) -> HeadRouter:
    if rule == "fitted":
        fitted = fit_heads(model, tokenizer, replace(size.fit, seed=seed))
        return fitted.dealt(round(7 / 9 * sum(route.heads for route in fitted.router.config.layers)))
    importance = taylor(model, tokenizer, seed=seed) if rule == "importance" else None
    return convert(model, rule, 7 / 9, importance)


def gap_closed(metrics: dict[str, float], baselines: dict[str, float], rule: str) -> float:
    """Share of the loss that conversion added which training took back, the dense model being trained on the same tokens."""
    before = math.log(metrics[f"ppl_7of9_{rule}"] / baselines["ppl_dense"])
    after = math.log(metrics[f"ppl_trained_{rule}"] / baselines["ppl_trained_dense"])
    return 1 - after / before


def _training_rows(model: Any, tokenizer: Any, size: Scale, seed: int) -> Tensor:
    """English first and source code after it where English alone would come round many times."""
    tokens = size.steps * size.batch_size * size.window
    if tokens <= 50_000:
        return calibration_rows(model, tokenizer, text=None, tokens=tokens, window=size.window, seed=seed)
    text = english("haystack") + code("haystack")
    return calibration_rows(model, tokenizer, text=text, tokens=tokens, window=size.window, seed=seed)
