"""From which size on the own kernels win, as measured on a device: data, not constants.

`crossovers/*.json` ships with the package; `headwise bench … --table` measures this machine and writes a file of the
same form into the user's cache folder, which is asked first. A device without a table gets the one of `FALLBACK`, and a
note in the log says so.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from functools import cache, lru_cache
from pathlib import Path

import torch

from headwise import storage
from headwise.errors import ArtifactError

logger = logging.getLogger(__name__)
SHIPPED = Path(__file__).parent / "crossovers"
FALLBACK = "NVIDIA H200"
NEVER = 1 << 62
"""A size that no call reaches: here the library's dense kernel always wins."""


@dataclass(frozen=True, kw_only=True)
class Crossover:
    """Smallest sizes from which the own kernels win on one device, for one dtype and head dim.

    routed, windowed: tokens of a prefill called eagerly; `…_backward`: where gradients will be asked for; `…_graph`: inside
    a CUDA graph, where no host is waited for.
    decode: tokens kept over all (row, kv head) pairs.
    """

    device: str
    dtype: str
    head_dim: int
    routed: int
    routed_backward: int
    routed_graph: int
    windowed: int
    windowed_backward: int
    windowed_graph: int
    decode: int
    measured: str = ""

    def prefill(self, form: str, *, backward: bool, in_graph: bool) -> int:
        """The entry for one form, "routed" or "windowed"."""
        kind = "_graph" if in_graph else "_backward" if backward else ""
        return int(getattr(self, form + kind))

    def save(self, folder: Path | None = None) -> Path:
        """Write this table where `lookup` finds it, by default into the user's cache folder."""
        folder = user_folder() if folder is None else folder
        slug = "-".join(self.device.lower().split())
        path = folder / f"{slug}-{self.dtype}-{self.head_dim}.json"
        storage.write_plain_json(path, asdict(self))
        lookup.cache_clear()
        return path


def user_folder() -> Path:
    """Where tables measured on this machine lie."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "headwise" / "crossovers"


def read(path: Path) -> Crossover:
    """One table. Raises ArtifactError."""
    data = storage.read_plain_json(path)
    kinds = {f.name: (int if f.type == "int" else str) for f in fields(Crossover)}
    if any(type(data.get(name)) is not kind for name, kind in kinds.items()):
        raise ArtifactError(f"{str(path)!r} is no crossover table: it must hold {', '.join(kinds)}")
    return Crossover(**{name: data[name] for name in kinds})


def tables() -> Iterator[Crossover]:
    """All tables, this machine's own first; a broken one is left out with a warning."""
    for folder in (user_folder(), SHIPPED):
        for path in sorted(folder.glob("*.json")) if folder.is_dir() else ():
            try:
                yield read(path)
            except ArtifactError as error:
                logger.warning("%s; it is ignored", error)


@cache
def device_name(device: torch.device) -> str:
    """The name by which a CUDA device's table is found, read once."""
    return torch.cuda.get_device_name(device)


@lru_cache(maxsize=256)
def lookup(device: str, dtype: torch.dtype, head_dim: int) -> Crossover:
    """The table of a device; of its dtype and the nearest head dim where that one was not measured."""
    known, name = list(tables()), str(dtype).removeprefix("torch.")
    mine = [t for t in known if t.device == device]
    if not mine:
        logger.warning(
            "no measured crossovers for %s: those of %s are used. `headwise bench attention --table` measures them",
            device, FALLBACK,
        )  # fmt: skip
        mine = [t for t in known if t.device == FALLBACK]
    same = [t for t in mine if t.dtype == name] or [t for t in mine if t.dtype == "bfloat16" and name == "float16"]
    if not same:
        never = {f.name: NEVER for f in fields(Crossover) if f.type == "int"} | {"head_dim": head_dim}
        return Crossover(device=device, dtype=name, measured="nothing for this dtype", **never)
    return min(same, key=lambda t: abs(t.head_dim - head_dim))
