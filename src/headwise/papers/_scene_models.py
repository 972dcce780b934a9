"""What the papers on vision-language models share: the bundled scene models, and numbers of what they say about scenes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from headwise.hub import load_model
from headwise.papers._run import Table, device_of, mean_of
from headwise.progress import track
from headwise.tasks.descriptions import Descriptions

MODELS = ("scene-vlm-0", "scene-vlm-1", "scene-vlm-2")
"""Trained with one recipe and three seeds."""


def of_each_model(
    measure: Callable[..., Table], sizes: Mapping[str, Any], scale: str, *, seed: int, progress: bool
) -> list[Table]:
    """`measure(model, seed=…, **sizes)` of every scene model, each with scenes of its own."""
    device, tables = device_of(scale), []
    for place, name in enumerate(track(MODELS, "scene models", progress)):
        model, _ = load_model(name, device=device)
        tables.append(measure(model, seed=seed + 1000 * place, **sizes))
    return tables


def named(said: Descriptions, name: str, measures: Sequence[str] | None = None) -> Table:
    """The rates of answers as `chair_i_<name>` and so on; all of them, or these `measures`."""
    found = said.measures()
    return {f"{key}_{name}": found[key] for key in measures or found}


def drawn(run: Callable[[], Table], draws: int) -> Table:
    """Means over random draws."""
    return mean_of([run() for _ in range(draws)])


def parted(numbers: Table, ends: tuple[str, ...]) -> tuple[Table, Table]:
    """(metrics, baselines): baselines are the numbers whose names end so."""
    baselines = {key: value for key, value in numbers.items() if key.endswith(ends)}
    return {key: value for key, value in numbers.items() if key not in baselines}, baselines
