"""Timing on any device: medians with a cold cache, graphs where there are graphs, and the machine's own rates as the roof.

Letters: B batch, H query heads, K kv heads, N tokens, D head dim.
"""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

DENSE = {"cudnn": SDPBackend.CUDNN_ATTENTION, "fa2": SDPBackend.FLASH_ATTENTION}


def milliseconds(fn: Callable[[], Any], device: str, rep: int = 60) -> float:
    """Median time of fn in ms: device events with the L2 flushed, or, on a CPU, at least three runs in `rep` ms."""
    if device == "cuda":
        from triton.testing import do_bench

        return do_bench(fn, warmup=15, rep=rep, return_mode="median")
    fn()
    times: list[float] = []
    end = time.perf_counter() + rep / 1e3
    while len(times) < 3 or (time.perf_counter() < end and len(times) < 100):
        begin = time.perf_counter()
        fn()
        times.append(1e3 * (time.perf_counter() - begin))
    return statistics.median(times)


def graph_milliseconds(fn: Callable[[], Any], rep: int = 60) -> float:
    """Median time of one replay of a CUDA graph that holds fn: the work without the host's share."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        fn()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        fn()
    return milliseconds(graph.replay, "cuda", rep)


def ceilings(device: str, dtype: torch.dtype) -> dict[str, float]:
    """The machine's own rates: a matrix product in `dtype` (TFLOP/s, random data) and a copy (TB/s, read + written)."""
    size, copied = (8192, 2**31) if device == "cuda" else (1024, 2**28)
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    matmul = 2 * size**3 / milliseconds(lambda: a @ b, device) / 1e9
    x = torch.empty(copied, device=device, dtype=torch.uint8).random_()
    y = torch.empty_like(x)
    return {"matmul_tflops": matmul, "copy_tbs": 2 * copied / milliseconds(lambda: y.copy_(x), device) / 1e9}


def environment(device: str) -> dict[str, str]:
    """What the figures were measured with."""
    found = {"torch": torch.__version__, "python": platform.python_version(), "date": time.strftime("%Y-%m-%d")}
    if device != "cuda":
        return found | {"device": f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"}
    import triton

    versions = {
        "triton": triton.__version__,
        "cuda": str(torch.version.cuda),
        "cudnn": str(torch.backends.cudnn.version()),
    }
    return found | {"device": torch.cuda.get_device_name()} | versions


def dense(q: Tensor, k: Tensor, v: Tensor, kernel: str | None = None) -> Tensor:
    """Causal dense attention by one named library kernel ("cudnn", "fa2"), or by PyTorch's own choice."""
    with nullcontext() if kernel is None else sdpa_kernel(DENSE[kernel]):
        return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])


def fastest_dense(q: Tensor, k: Tensor, v: Tensor) -> tuple[str, dict[str, float]]:
    """(name, ms by name) of the dense kernels that serve these tensors; the first is the fastest: the fair baseline."""
    times = {}
    for name in DENSE if q.is_cuda else ():
        try:
            times[name] = milliseconds(lambda name=name: dense(q, k, v, name), "cuda")  # type: ignore[misc]
        except RuntimeError:  # this kernel does not take the dtype or head dim
            continue
    if not times:
        times["sdpa"] = milliseconds(lambda: dense(q, k, v), q.device.type)
    return min(times, key=times.__getitem__), times


def step(fn: Callable[[], Tensor], leaves: Sequence[Tensor]) -> Callable[[], Any]:
    """Forward and backward of fn() with a fixed output gradient."""
    weight = torch.randn_like(fn())
    return lambda: torch.autograd.grad(fn(), leaves, weight)


def relative(got: Tensor, want: Tensor) -> float:
    """||got - want|| / ||want||, infinite when anything is not a number."""
    got, want = got.detach().double(), want.detach().double()
    error = float((got - want).norm() / want.norm().clamp(min=1e-9))
    return error if error == error else float("inf")


def errors(run: Callable[..., Tensor], want: Callable[..., Tensor], leaves: Sequence[Tensor]) -> dict[str, float]:
    """Relative errors of the output and of every gradient of run(*leaves) against want(*float64 leaves)."""
    exact = [x.detach().double().requires_grad_() for x in leaves]
    mine, theirs = run(*leaves), want(*exact)
    weight = torch.randn_like(mine)
    grads = torch.autograd.grad(mine, leaves, weight), torch.autograd.grad(theirs, exact, weight.double())
    found = {f"d{name}": relative(a, b) for name, a, b in zip(("q", "k", "v", "gate"), *grads, strict=False)}
    return {"out": relative(mine, theirs), **found}
