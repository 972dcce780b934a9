"""The gate files that the DuoAttention repository ships for its models: a table of numbers and a small config beside it."""

import math
from pathlib import Path

import torch

from headwise import storage
from headwise.checks import whole
from headwise.errors import ArtifactError, PlanError, ScoreError
from headwise.storage import StrPath
from headwise.units import Fingerprint, HeadScores

TABLE = "full_attention_heads.tsv"
CONFIG = "config.json"


def read_gates(folder: StrPath, *, fingerprint: Fingerprint | None = None) -> HeadScores:
    """Gates of the DuoAttention repository: `full_attention_heads.tsv`, L rows of K numbers, and `config.json`.

    `sink_size` and `recent_size` of the config, the lengths that the gates were trained with, come back in `meta` as sinks and
    window. With the `fingerprint` of a model, a table of another shape is refused. Raises ArtifactError, UnitError.

    >>> import tempfile
    >>> table = HeadScores(values=torch.tensor([[1.0, 0.25]]), kind="kv", method="duo-gates")
    >>> folder = tempfile.mkdtemp()
    >>> write_gates(table, folder, sinks=128, window=256)
    >>> read_gates(folder).values.tolist()
    [[1.0, 0.25]]
    """
    path = Path(folder) / TABLE
    rows = [_numbers(path, line) for line in storage.read_text(path).splitlines() if line.strip()]
    if not rows or len({len(row) for row in rows}) != 1:
        raise ArtifactError(
            f"{path} must hold L rows of equally many gates; it has rows of {sorted({len(r) for r in rows})}"
        )
    config = storage.read_plain_json(Path(folder) / CONFIG)
    sizes = {name: config.get(key) for name, key in (("sinks", "sink_size"), ("window", "recent_size"))}
    meta = {name: whole(f"{name} of {CONFIG}", size, 0, ArtifactError) for name, size in sizes.items()}
    return HeadScores(
        values=torch.tensor(rows),
        kind="kv",
        method="duo-gates",
        data="gate file",
        fingerprint=fingerprint,
        meta=dict(meta),
    )


def write_gates(scores: HeadScores, folder: StrPath, *, sinks: int, window: int) -> None:
    """Write what `read_gates` and the DuoAttention repository read. Raises ScoreError for scores that are no gates in [0, 1]."""
    if scores.kind != "kv":
        raise ScoreError(
            f"gates are scores of kind 'kv', these are of kind {scores.kind!r}: HeadScores.to_kv makes them"
        )
    low, high = float(scores.values.min()), float(scores.values.max())
    if low < 0 or high > 1:
        raise ScoreError(f"gates lie in [0, 1], these scores in [{low:.4g}, {high:.4g}]; rescale them first")
    config = {
        "sink_size": whole("sinks", sinks, 0, PlanError),
        "recent_size": whole("window", window, 1, PlanError),
    }
    lines = ["\t".join(repr(gate) for gate in row) for row in scores.values.tolist()]
    storage.write_text(Path(folder) / TABLE, "\n".join(lines) + "\n")
    storage.write_plain_json(Path(folder) / CONFIG, config)


def _numbers(path: Path, line: str) -> list[float]:
    try:
        row = [float(cell) for cell in line.split()]
    except ValueError as error:
        raise ArtifactError(f"{path}: {line[:60]!r} is no row of numbers") from error
    if not all(math.isfinite(gate) for gate in row):
        raise ArtifactError(f"{path}: {line[:60]!r} holds a gate that is not finite")
    return row
