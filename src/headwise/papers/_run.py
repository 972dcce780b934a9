"""What every `reproduce` does alike: refuse a scale that cannot run here, measure, keep the time, hold the numbers to the checks."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence

import torch

from headwise.errors import HeadwiseError
from headwise.papers.catalogue import Paper
from headwise.papers.reproduction import SCALES, Check, Reproduction

Table = dict[str, float]
Measured = tuple[Table, Table] | tuple[Table, Table, Sequence[Check]]
"""What was reached and what it is held against; checks too, where they depend on the scale or on the numbers."""


def device_of(scale: str) -> str:
    """"cpu" or "cuda". Raises HeadwiseError for an unknown scale, and for "gpu" on a machine without a GPU.

    >>> device_of("cpu")
    'cpu'
    """  # fmt: skip
    if scale not in SCALES:
        raise HeadwiseError(f"scale is {scale!r}; it must be {' or '.join(map(repr, SCALES))}")
    if scale == "gpu" and not torch.cuda.is_available():
        raise HeadwiseError("scale='gpu' needs a CUDA device; scale='cpu' needs none")
    return "cuda" if scale == "gpu" else "cpu"


def reproduces(
    paper: Paper, checks: Sequence[Check] = (), published: Mapping[str, float] | None = None
) -> Callable[[Callable[..., Measured]], Callable[..., Reproduction]]:
    """Decorator that makes `reproduce(scale, *, seed, progress)` of a function that measures; `published` joins the baselines."""

    def decorator(measure: Callable[..., Measured]) -> Callable[..., Reproduction]:
        def reproduce(scale: str = "cpu", *, seed: int = 0, progress: bool = False) -> Reproduction:
            device_of(scale)
            started = time.monotonic()
            metrics, baselines, *own = measure(scale, seed=seed, progress=progress)
            found = tuple(own[0]) if own else tuple(checks)
            seconds = time.monotonic() - started
            return Reproduction(
                paper.slug, paper.claim, scale, metrics, {**baselines, **(published or {})}, found, seconds
            )

        reproduce.__doc__, reproduce.__module__ = measure.__doc__, measure.__module__
        return reproduce

    return decorator


def asked_of(checks: Sequence[Check], model: str, prefix: str) -> tuple[Check, ...]:
    """The same checks of a second model, whose numbers are named with a prefix.

    >>> str(asked_of([Check("few", "used", "<", "all")], "tiny", "tiny_")[0])
    'tiny, few: tiny_used < tiny_all'
    """

    def named(side: str | float) -> str | float:
        return f"{prefix}{side}" if isinstance(side, str) else side

    return tuple(Check(f"{model}, {c.name}", named(c.left), c.op, named(c.right)) for c in checks)


def with_second(first: tuple[Table, Table], second: tuple[Table, Table], prefix: str) -> tuple[Table, Table]:
    """Metrics and baselines of two models in one pair; the second's names get the prefix.

    >>> with_second(({"a": 1.0}, {}), ({"a": 2.0}, {}), "x_")
    ({'a': 1.0, 'x_a': 2.0}, {})
    """
    metrics, baselines = (
        one | {prefix + name: value for name, value in other.items()} for one, other in zip(first, second, strict=True)
    )
    return metrics, baselines


def mean_of(rows: Sequence[Mapping[str, float]]) -> Table:
    """Mean of each number over runs; a number that a run lacks is an error.

    >>> mean_of([{"loss": 1.0}, {"loss": 2.0}])
    {'loss': 1.5}
    """
    return {name: sum(row[name] for row in rows) / len(rows) for name in rows[0]}
