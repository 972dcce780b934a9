"""Run a function on several gloo ranks of this machine: `run_distributed(check_ring, 2, 1024)`.

The function must be importable (top level of a test module); it is called as `function(rank, world_size, *args)` in a
process of its own, with the default group set up through a file, so no port is needed. Whatever a rank raises is raised
here, with the rank and its traceback. Ranks are forked from one server that has imported torch and transformers, which is
most of what a fresh interpreter would take; the server never computes, so no thread of it is lost in a fork.
"""

import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

PRELOADED = [
    "torch.distributed.tensor",
    "transformers.models.llama.modeling_llama",
    "headwise.attach",
    "headwise.route",
]


class RankError(AssertionError):
    """A rank raised, died, or did not come back in time."""


def run_distributed(function: Callable[..., None], world_size: int = 2, *args: Any, seconds: float = 60) -> None:
    """Call `function(rank, world_size, *args)` on every rank; at most `seconds`, then every rank is ended."""
    with tempfile.TemporaryDirectory() as folder:
        context = _context()
        ranks = [
            context.Process(target=_rank, args=(function, rank, world_size, folder, seconds, args), daemon=True)
            for rank in range(world_size)
        ]
        for process in ranks:
            process.start()
        try:
            _wait(ranks, Path(folder), time.monotonic() + seconds)
        finally:
            for process in ranks:
                process.kill()
                process.join()


def _context() -> Any:
    if "forkserver" not in mp.get_all_start_methods():
        return mp.get_context("spawn")
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context


def _rank(
    function: Callable[..., None], rank: int, world_size: int, folder: str, seconds: float, args: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)
    try:
        store = dist.FileStore(f"{folder}/store", world_size)
        dist.init_process_group(
            "gloo", store=store, rank=rank, world_size=world_size, timeout=timedelta(seconds=seconds)
        )
        function(rank, world_size, *args)
        dist.barrier()
        dist.destroy_process_group()
    except BaseException:
        (Path(folder) / f"error{rank}").write_text(traceback.format_exc())
        raise SystemExit(1) from None


def _wait(ranks: list[Any], folder: Path, deadline: float) -> None:
    while any(process.is_alive() for process in ranks):
        broken = [rank for rank, process in enumerate(ranks) if process.exitcode not in (None, 0)]
        if broken:
            break
        if time.monotonic() > deadline:
            alive = [rank for rank, process in enumerate(ranks) if process.is_alive()]
            raise RankError(f"ranks {alive} did not come back in time")
        time.sleep(0.02)
    broken = [rank for rank, process in enumerate(ranks) if process.exitcode not in (None, 0)]
    notes = {rank: folder / f"error{rank}" for rank in broken if (folder / f"error{rank}").exists()}
    if notes:  # the first to fail: what the others say then is that it is gone
        rank = min(notes, key=lambda rank: notes[rank].stat().st_mtime_ns)
        raise RankError(f"rank {rank}: {notes[rank].read_text()}")
    if broken:
        raise RankError(f"rank {broken[0]}: exit code {ranks[broken[0]].exitcode}")
