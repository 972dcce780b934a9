"""Timing and checking helpers of the kernel benchmarks."""

from __future__ import annotations

import platform

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

H, K, D = 32, 8, 128  # Llama-3-8B attention: 32 query heads, 8 kv heads of 128


def milliseconds(fn, rep: int = 60, warmup: int = 15) -> float:
    """Median time of fn in ms, by device events, L2 flushed between runs."""
    from triton.testing import do_bench

    return do_bench(fn, warmup=warmup, rep=rep, return_mode="median")


def graph_milliseconds(fn, rep: int = 60) -> float:
    """Median time of one replay of a CUDA graph that holds fn."""
    fn()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        fn()
    return milliseconds(graph.replay, rep)


def ceilings() -> dict[str, float]:
    """This machine's own rates: bf16 matrix product (TFLOP/s, random data) and device copy (TB/s, read + written)."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    matmul = 2 * 8192**3 / milliseconds(lambda: a @ b) / 1e9
    x = torch.empty(2**31, device="cuda", dtype=torch.uint8).random_()
    y = torch.empty_like(x)
    copy = 2 * x.numel() / milliseconds(lambda: y.copy_(x)) / 1e9
    return {"matmul_tflops": matmul, "copy_tbs": copy}


def environment() -> dict[str, str]:
    """What the figures were measured with."""
    import triton

    return {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cuda": str(torch.version.cuda),
        "cudnn": str(torch.backends.cudnn.version()),
        "python": platform.python_version(),
    }


def qkv(B: int, N: int, heads: int = H, kv: int = K, dim: int = D, grad: bool = False):
    """Random bf16 q (B,heads,N,dim), k and v (B,kv,N,dim)."""
    shapes = ((B, heads, N, dim), (B, kv, N, dim), (B, kv, N, dim))
    return [torch.randn(s, device="cuda", dtype=torch.bfloat16, requires_grad=grad) for s in shapes]


def dense(q, k, v, backend: str = "cudnn"):
    """Causal dense attention by one named library kernel."""
    which = {"cudnn": SDPBackend.CUDNN_ATTENTION, "fa2": SDPBackend.FLASH_ATTENTION}[backend]
    with sdpa_kernel(which):
        return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def dense_flops(B: int, N: int, backward: bool = False) -> float:
    """Causal attention: 4 N^2/2 D H forward, 3.5 times that with backward."""
    return B * H * 2 * N * N * D * (3.5 if backward else 1.0)


def step(fn, leaves):
    """Forward and backward of fn() with a fixed output gradient."""
    weight = torch.randn_like(fn())

    def run():
        return torch.autograd.grad(fn(), leaves, weight)

    return run


def relative(got, want) -> float:
    """||got - want|| / ||want||, infinite when anything is not a number."""
    error = ((got.double() - want.double()).norm() / want.double().norm().clamp(min=1e-9)).item()
    return error if error == error else float("inf")
