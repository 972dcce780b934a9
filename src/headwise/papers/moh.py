"""Paper 01, MoH (Jin et al. 2024, arXiv 2410.11842): mixture-of-head attention, converted and trained.

A real language model is converted without training, by the paper's rule and by better ones, beside static pruning of as many heads;
then by the paper's rule with a short training, beside the dense model trained on the same tokens. Small models are trained from
scratch on dialects.
"""

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from headwise.attach import attach
from headwise.errors import HeadwiseError
from headwise.hub import load_model
from headwise.papers._moh_dialects import measure_dialects
from headwise.papers.catalogue import Paper
from headwise.papers.reproduction import Check, Reproduction
from headwise.route import HeadRouter, LayerRoute
from headwise.route._train import Recipe, train_lm
from headwise.route.moh import moh
from headwise.score.taylor import taylor
from headwise.tasks import code, english, perplexity
from headwise.tasks.calibration import calibration_rows
from headwise.tasks.texts import encode
from headwise.units import HeadScores

PAPER = Paper(
    slug="moh",
    status="partial",
    api="headwise.route.moh, headwise.route.moh_preset, headwise.route.load_official, headwise.route.train_moh, "
    "headwise.route.HeadRouter, headwise.score.taylor, headwise.score.output_norm",
    claim="A language model converted to run 7 of its 9 heads per token wins back by a short training most of "
    "what it lost, against the dense model trained on the same tokens; it loses less from the start if "
    "its shared heads are chosen by importance; and a model trained with routed heads from scratch equals "
    "the dense one and gives kinds of text heads of their own",
)


@dataclass(frozen=True)
class Scale:
    """Sizes of a run."""

    eval_tokens: int = 2048
    fit_tokens: int = 8192
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
        fit_tokens=40960,
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
    Check("from scratch 75 % is on par with dense", "dialects_gap_75pct", "<=", 0.02),
    Check("dialects have heads of their own", "dialects_distance_75pct", ">", "dialects_twice_shuffled_75pct"),
    Check("the balance loss balances", "dialects_peak_75pct", "<", "dialects_peak_75pct_unbalanced"),
)


def reproduce(scale: str = "cpu", *, seed: int = 0, progress: bool = False) -> Reproduction:
    """Measure the claim. "cpu": smollm2 and 10 steps of training, 4 minutes on two quiet cores. "gpu": 200 steps of 8192 tokens each
    for the dense model and three conversions."""
    if scale not in SCALES:
        raise HeadwiseError(f"scale is {scale!r}; it must be 'cpu' or 'gpu'")
    if scale == "gpu" and not torch.cuda.is_available():
        raise HeadwiseError("scale='gpu' needs a CUDA device; scale='cpu' needs none")
    started, size = time.monotonic(), SCALES[scale]
    device = "cuda" if scale == "gpu" else "cpu"
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
    seconds = time.monotonic() - started
    return Reproduction(PAPER.slug, PAPER.claim, scale, metrics, baselines, CHECKS, seconds)


# without training


def measure_conversion(
    name: str, size: Scale, *, device: str = "cpu", seed: int = 0, progress: bool = False
) -> tuple[dict[str, float], dict[str, float]]:
    """Perplexity on held-out text right after conversion, at 7/9 and 6/9 of the heads: (routed, dense and static)."""
    model, tokenizer = load_model(name, device=device, dtype="float32")
    ids = _held_out(tokenizer, size)
    importance = taylor(model, tokenizer, seed=seed, progress=progress)
    fitted = moh(model, tokenizer, router="fitted", fit_tokens=size.fit_tokens, seed=seed, progress=progress)
    routed, static = {}, {"ppl_dense": _perplexity(model, ids, None)}
    for count in (7, 6):
        for rule in ("first", "none", "importance"):
            routed[f"ppl_{count}of9_{rule}"] = _perplexity(model, ids, _convert(model, rule, count / 9, importance))
        routed[f"ppl_{count}of9_fitted"] = _perplexity(model, ids, with_count(fitted, count / 9))
        for scope in ("layer", "global"):
            router = moh(model, None, router="static", scope=scope, importance=importance, active=count / 9)
            static[f"ppl_{count}of9_static_{scope}"] = _perplexity(model, ids, router)
    return routed, static


def with_count(fitted: HeadRouter, active: float) -> HeadRouter:
    """The same fitted router with another number of heads: the fit does not depend on it."""
    heads = fitted.config.layers[0].heads
    layers = (LayerRoute(heads=heads, routed=round(active * heads)),) * len(fitted.config.layers)
    made = HeadRouter(replace(fitted.config, layers=layers))
    made.load_state_dict(fitted.state_dict())
    return made


# a short training


def measure_recovery(
    name: str, size: Scale, *, device: str = "cpu", seed: int = 0, progress: bool = False
) -> tuple[dict[str, float], dict[str, float]]:
    """Perplexity after training on the same tokens with the same recipe: (conversions at 7/9, the dense model)."""
    found: dict[str, float] = {}
    for rule in ("dense", *size.rules):
        model, tokenizer = load_model(name, device=device, dtype="float32")
        ids, rows = _held_out(tokenizer, size), _training_rows(model, tokenizer, size, seed)
        router = None if rule == "dense" else _trainable(model, tokenizer, rule, size, seed)
        recipe = Recipe(steps=size.steps, batch_size=size.batch_size, learning_rate=size.learning_rate, seed=seed)
        with _attached(model, router):
            train_lm(model, rows, recipe, progress=progress)
        found[f"ppl_trained_{rule}"] = _perplexity(model, ids, router)
    dense = {"ppl_trained_dense": found.pop("ppl_trained_dense")}
    return found, dense


def _trainable(model: Any, tokenizer: Any, rule: str, size: Scale, seed: int) -> HeadRouter:
    if rule == "fitted":
        return moh(model, tokenizer, router="fitted", active=7 / 9, fit_tokens=size.fit_tokens, seed=seed)
    importance = taylor(model, tokenizer, seed=seed)
    return _convert(model, rule, 7 / 9, importance)


def gap_closed(metrics: dict[str, float], baselines: dict[str, float], rule: str) -> float:
    """Share of the loss that conversion added which training took back, the dense model being trained on the same tokens."""
    before = math.log(metrics[f"ppl_7of9_{rule}"] / baselines["ppl_dense"])
    after = math.log(metrics[f"ppl_trained_{rule}"] / baselines["ppl_trained_dense"])
    return 1 - after / before


# shared by both


def _convert(model: Any, rule: Any, active: float, importance: HeadScores) -> HeadRouter:
    """The paper's norm router with half of the heads shared: the first, none, or the most important ones."""
    given = importance if rule == "importance" else None
    return moh(model, None, active=active, shared=rule, importance=given)


@contextmanager
def _attached(model: Any, router: HeadRouter | None) -> Iterator[None]:
    if router is None:
        yield
        return
    with attach(model, router=router):
        yield


def _perplexity(model: Any, ids: Tensor, router: HeadRouter | None) -> float:
    with _attached(model, router):
        return perplexity(model, ids, window=512, tokens=len(ids))


def _held_out(tokenizer: Any, size: Scale) -> Tensor:
    """Documents that neither scores, fit nor training saw."""
    return torch.tensor(encode(tokenizer, english("eval")))[: size.eval_tokens]


def _training_rows(model: Any, tokenizer: Any, size: Scale, seed: int) -> Tensor:
    """English first and source code after it where English alone would come round many times."""
    tokens = size.steps * size.batch_size * size.window
    if tokens <= 50_000:
        return calibration_rows(model, tokenizer, text=None, tokens=tokens, window=size.window, seed=seed)
    text = english("haystack") + code("haystack")
    return calibration_rows(model, tokenizer, text=text, tokens=tokens, window=size.window, seed=seed)
