"""What the scripts here share: one decode step taken apart into the host's time, the device's time and the wall clock."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from timing import synchronize
from torch.autograd import DeviceType
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig, LlamaForCausalLM

KERNELS = {
    "default": None,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}

WARM = 4  # steps that do not count; a captured step runs twice before it is replayed


def llama(layers: int, heads: int, kv_heads: int, tokens: int, device: str, **size: int) -> LlamaForCausalLM:
    """A random Llama of this shape, bf16 on a GPU and float32 elsewhere, made on the device."""
    config = LlamaConfig(
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=tokens,
        **size,
    )
    config._attn_implementation = "sdpa"
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16 if device == "cuda" else torch.float32)
    try:
        with torch.device(device):
            return LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(before)


@contextmanager
def kernel(name: str) -> Iterator[None]:
    """Only this SDPA kernel; "default" is PyTorch's own choice."""
    backend = KERNELS[name]
    with nullcontext() if backend is None else sdpa_kernel(backend):
        yield


def taken_apart(step: Callable[[], Any], device: str, repeats: int) -> dict[str, float]:
    """Medians in ms: `host` until the call returns, `wall` until the device is done; `device`, the sum over its kernels (GPU only)."""
    host, wall = [], []
    for _ in range(repeats + WARM):
        synchronize(device)
        begin = time.perf_counter()
        step()
        host.append(1e3 * (time.perf_counter() - begin))
        synchronize(device)
        wall.append(1e3 * (time.perf_counter() - begin))
    found = {"host_ms": statistics.median(host[WARM:]), "wall_ms": statistics.median(wall[WARM:])}
    if device == "cuda":
        found["device_ms"] = sum(kernels(step).values())
    return found


def kernels(step: Callable[[], Any], repeats: int = 4) -> dict[str, float]:
    """Device milliseconds of one call by name of kernel, the longest first."""
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as found:
        for _ in range(repeats):
            step()
        torch.cuda.synchronize()
    on_device = [e for e in found.key_averages() if e.device_type == DeviceType.CUDA]
    times = {e.key: e.self_device_time_total / 1e3 / repeats for e in on_device}
    return dict(sorted(times.items(), key=lambda item: -item[1]))


def copy_rate(device: str) -> float:
    """Bytes a second that a large copy moves, read and written."""
    x = torch.empty(2**30 if device == "cuda" else 2**27, device=device, dtype=torch.uint8)
    y = torch.empty_like(x)
    times = []
    for _ in range(7):
        synchronize(device)
        begin = time.perf_counter()
        y.copy_(x)
        synchronize(device)
        times.append(time.perf_counter() - begin)
    return 2 * x.nbytes / statistics.median(times[2:])
