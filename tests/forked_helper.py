"""Work in processes forked from this one: they can be killed and interrupted, and nothing is imported again."""

import multiprocessing
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def forked(work: Callable[[], Any], log: Path | None = None) -> Any:
    """`work` in a process of its own; its output goes to `log`."""

    def quiet() -> None:
        torch.set_num_threads(1)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        out = open(log or os.devnull, "w")  # noqa: SIM115
        os.dup2(out.fileno(), 1)
        os.dup2(out.fileno(), 2)
        sys.stdout = sys.stderr = out
        try:
            work()
        except SystemExit as end:
            out.flush()
            os._exit(int(end.code or 0))
        out.flush()
        os._exit(0)

    process = multiprocessing.get_context("fork").Process(target=quiet)
    process.start()
    return process
