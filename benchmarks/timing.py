"""What the benchmarks share: clocks that wait for the device, sides that take turns, a call as a CUDA graph."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch


def synchronize(device: str) -> None:
    """Wait for the device."""
    if device == "cuda":
        torch.cuda.synchronize()


def clock(device: str) -> float:
    """Seconds, after all work on the device is done; on one CPU thread its own, so that other work does not count."""
    synchronize(device)
    if device != "cuda" and torch.get_num_threads() == 1:
        return time.process_time()
    return time.perf_counter()


def rounds(sides: dict[str, Callable[[], None]], device: str, count: int = 5) -> dict[str, float]:
    """Median seconds of each side; the sides take turns, so that drift of the machine hits all alike."""
    times: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(count + 1):
        for name, run in sides.items():
            start = clock(device)
            run()
            if turn:
                times[name].append(clock(device) - start)
    return {name: statistics.median(ts) for name, ts in times.items()}


def graphed(run: Callable[[], None]) -> Callable[[], None]:
    """The same work captured as a CUDA graph, after three runs beside it."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        run()
    return graph.replay
