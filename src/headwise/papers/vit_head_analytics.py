"""Paper 10, visual analytics of attention heads in vision transformers (Li et al. 2023, arXiv 2303.13731).

The paper makes no quantitative claim that was public to us; this tests what its three questions presuppose: that pruning says which heads
matter, that heads look at different distances, and that an auto-encoder sorts their patterns.
"""

from __future__ import annotations

import statistics
from typing import Any

import torch
from torch import Tensor

from headwise.errors import UnitError
from headwise.models.shape_vit import shape_vit, train_vit
from headwise.papers._run import Measured, device_of, reproduces
from headwise.papers.catalogue import Paper
from headwise.papers.reproduction import Check, Reproduction
from headwise.score._vision import Grid
from headwise.score._vit_autoencoder import clusters, fit, patterns, planted, purity
from headwise.score.vit_importance import gate_gradient, importance_of, pruning_curve
from headwise.score.vit_patterns import atlas_of
from headwise.score.vit_strength import strength_of
from headwise.tasks.shapes import make_shapes
from headwise.units import HeadScores

PAPER = Paper(
    slug="vit-head-analytics",
    status="works",
    api="headwise.score.vit_importance, headwise.score.vit_strength, headwise.score.vit_patterns",
    claim="In a trained ViT the heads whose pruning changes the prediction most cost far more accuracy than as many of the least important "
    "or of random ones; label-free and labelled metrics rank them alike and one backward estimates the ranking; some head of the "
    "first layer attends to its neighbours above chance; and an auto-encoder over attention patterns sorts known ones",
)
_LAST: list[Any] = []
"""The first model of this process's last run with the images it was scored by, for the page."""
SHARE = 0.25
"""Of the heads, taken out together: six of 24."""
SIZES: dict[str, dict[str, Any]] = {
    "cpu": {
        "seeds": 3,
        "steps": 300,
        "images": 128,
        "size": 24,
        "layers": 6,
        "width": 64,
        "classes": (4, 2),
        "epochs": 300,
    },
    "gpu": {
        "seeds": 5,
        "steps": 2000,
        "images": 512,
        "size": 32,
        "layers": 12,
        "width": 192,
        "classes": (4, 4),
        "epochs": 1500,
    },
}
CHECKS = (
    Check("the model has learned the task", "accuracy", ">=", 0.95),
    Check("the most important quarter is the model", "lost_without_most", ">=", 0.3),
    Check("the least important quarter is hardly needed", "lost_without_least", "<=", 0.05),
    Check("chance is in between", "lost_without_random", "<", "lost_without_most"),
    Check("metrics agree", "rank_probability_js", ">=", 0.6),
    Check("one backward estimates it", "rank_gradient_js", ">=", 0.4),
    Check("some head of the first layer looks next door", "neighbour_over_uniform", ">", 1.0),
    Check("patterns come back", "autoencoder_r2", ">=", 0.6),
    Check("known patterns are sorted", "planted_purity", ">=", 0.9),
)


@reproduces(PAPER, CHECKS)
def reproduce(scale: str = "cpu", *, seed: int = 0, progress: bool = False) -> Measured:
    """Train small ViTs on drawn shapes and ask the three questions. "cpu": three models, 1-3 minutes on two cores."""
    return measure(device=device_of(scale), seed=seed, progress=progress, **SIZES[scale])


def sections(result: Reproduction, *, seed: int = 0, progress: bool = False) -> list[Any]:
    """The chapters of `reproduce --page`: the first model's heads, linked views; measured anew where no run was in this process."""
    from headwise.report.vit_page import vit_sections

    if not _LAST:
        measure(device=device_of(result.scale), seed=seed, progress=progress, **SIZES[result.scale])
    model, pixels, labels, steps = _LAST
    atlas = atlas_of(model, pixels[:32], steps=steps, seed=seed)
    return vit_sections(importance_of(model, pixels, labels), strength_of(model, pixels), atlas)


def measure(
    *,
    seeds: int,
    steps: int,
    images: int,
    size: int,
    layers: int,
    width: int,
    classes: tuple[int, int],
    epochs: int,
    device: str = "cpu",
    seed: int = 0,
    progress: bool = False,
) -> tuple[dict[str, float], dict[str, float]]:
    """(metrics, baselines): means over `seeds` models, each with its own training, images and random sets."""
    rows: list[dict[str, float]] = []
    for number in range(seed, seed + seeds):
        generator = torch.Generator().manual_seed(1000 + number)
        how: dict[str, Any] = {"size": size, "shapes": classes[0], "textures": classes[1], "generator": generator}
        train, scored, tested = (make_shapes(n, **how) for n in (4096, images, 4 * images))
        model = shape_vit(size=size, layers=layers, width=width, heads=4, classes=train.classes, seed=number).to(device)
        train_vit(model, train.pixels, train.labels, steps=steps, seed=number, progress=progress)
        if number == seed:
            _LAST[:] = [model, scored.pixels, scored.labels, epochs]
        found = _heads(model, scored.pixels, scored.labels, tested.pixels, tested.labels, number)
        found |= _distance(model, scored.pixels)
        found["autoencoder_r2"] = atlas_of(model, scored.pixels[:32], steps=epochs, seed=number).r2
        rows.append(found | _planted(size // 4, epochs, number))
    mean = {name: statistics.fmean(row[name] for row in rows) for name in rows[0]}
    spread = {
        f"spread_{name}": statistics.pstdev(row[name] for row in rows)
        for name in ("lost_without_most", "lost_without_random")
    }
    compared = {"lost_without_least", "lost_without_random", "uniform_neighbour"}
    return (
        {name: value for name, value in mean.items() if name not in compared} | {"models": float(seeds)},
        {name: value for name, value in mean.items() if name in compared} | spread,
    )


def _heads(model: Any, pixels: Tensor, labels: Tensor, test: Tensor, truth: Tensor, seed: int) -> dict[str, float]:
    """Pruning: agreement of metrics on the scored images, accuracy lost on others."""
    found = importance_of(model, pixels, labels)
    js, probability = found.scores("js"), found.scores("probability")
    gradient = gate_gradient(model, pixels, labels)
    order = [(unit.layer, unit.index) for unit, _ in js.ranking()]
    k = max(1, round(SHARE * len(order)))
    accuracy, most = pruning_curve(model, test, truth, order, counts=[0, k])
    least = pruning_curve(model, test, truth, order[::-1], counts=[k])[0]
    generator = torch.Generator().manual_seed(seed)
    random = [
        pruning_curve(model, test, truth, list(one.pairs()), counts=[k])[0]
        for one in js.random_sets(k, 3, generator=generator)
    ]
    return {
        "accuracy": accuracy,
        "lost_without_most": accuracy - most,
        "lost_without_least": accuracy - least,
        "lost_without_random": accuracy - statistics.fmean(random),
        "rank_probability_js": _rank(probability, js),
        "rank_gradient_js": _rank(gradient, js),
    }


def _rank(a: HeadScores, b: HeadScores) -> float:
    try:
        return a.rank_correlation(b)
    except UnitError:  # one of them is the same for all heads
        return float("nan")


def _distance(model: Any, pixels: Tensor) -> dict[str, float]:
    """Strength at hop 1 in the first layer over that of uniform attention, and how far heads look early and late."""
    found = strength_of(model, pixels)
    tokens = found.grid.patches + found.grid.prefix
    neighbour = float(found["strength"][0, :, 1].max())
    reach = found["distance"] / found["mass"].sum(-1).clamp(min=1e-12)
    return {
        "neighbour_over_uniform": neighbour * tokens,
        "uniform_neighbour": 1 / tokens,
        "distance_first_layer": float(reach[0].mean()),
        "distance_last_layer": float(reach[-1].mean()),
        "distance_least": float(reach.min()),
        "distance_most": float(reach.max()),
    }


def _planted(side: int, steps: int, seed: int) -> dict[str, float]:
    """Purity of the clusters of known patterns."""
    grid = Grid(side, side, 0)
    kinds = ("self", "local", "row", "column", "uniform", "spot")
    A, truth = planted(kinds, 40, grid, generator=torch.Generator().manual_seed(seed))
    pictures = patterns(A, grid)
    trained = fit(pictures, torch.arange(len(A)), latent=16, steps=steps, seed=seed)
    with torch.no_grad():
        labels = clusters(trained.model.encode(pictures), 12, seed)
    return {"planted_purity": purity(labels, truth)}
