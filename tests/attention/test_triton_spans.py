"""Span attention against the float64 reference: forward and all gradients."""

import os

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_triton_common import check_gradients, close, dense_reference, kernel_device, make_qkv, span_mask

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
EXAMPLES = int(os.environ.get("HEADWISE_EXAMPLES", "5"))
RELAXED = dict(deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


def span_case(B, G, N, M, D, dtype, sinks, windows, padded, strided, seed, device, deterministic=False):
    from headwise.attention.triton import span_attention

    K = len(sinks)
    q, k, v = make_qkv(B, K * G, K, N, M, D, dtype, device, seed, strided)
    start = torch.randint(0, M, (B,), generator=torch.Generator().manual_seed(seed)) if padded else None
    mask = span_mask(N, M, K, sinks, windows, start, B)
    tensors = [torch.tensor(x, dtype=torch.int32, device=device) for x in (sinks, windows)]

    def run(q, k, v):
        return span_attention(
            q,
            k,
            v,
            *tensors,
            return_lse=True,
            deterministic=deterministic,
            key_start=None if start is None else start.to(device),
        )

    check_gradients(run, lambda q, k, v: dense_reference(q, k, v, mask, D**-0.5), [q, k, v], dtype, seed, with_lse=True)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("D", [64, 96, 128, 256])
@settings(max_examples=EXAMPLES, **RELAXED)
@given(
    B=st.integers(1, 2), G=st.integers(1, 4), N=st.integers(1, 800), extra=st.integers(0, 300),
    sinks=st.lists(st.sampled_from([0, 1, 4, 64, 200]), min_size=3, max_size=3),
    windows=st.lists(st.sampled_from([0, 1, 5, 64, 256, 1 << 30]), min_size=3, max_size=3), padded=st.booleans(),
    strided=st.booleans(), seed=st.integers(0, 9999), deterministic=st.booleans(),
)  # fmt: skip
def test_spans_match_reference(B, G, N, extra, D, dtype, sinks, windows, padded, strided, seed, deterministic):
    device = kernel_device()
    if device == "cpu":
        pytest.skip("the interpreter is too slow for this matrix; test_spans_small runs there")
    span_case(B, G, N, N + extra, D, dtype, sinks, windows, padded, strided, seed, device, deterministic)


@pytest.mark.parametrize(
    "N, M, sinks, windows, padded",
    [
        (70, 70, [4, 0], [8, 1 << 30], False),
        (33, 110, [40, 2], [5, 33], False),
        (50, 120, [3, 0], [20, 0], True),
        (1, 9, [1, 2], [1, 3], False),
    ],
)
def test_spans_small(N, M, sinks, windows, padded):
    span_case(2, 2, N, M, 16, torch.float32, sinks, windows, padded, False, 1, kernel_device())


@pytest.mark.gpu
@pytest.mark.parametrize("full", [[0], [1, 3], [0, 1, 2, 3], []])
def test_split_between_library_and_kernel(full):
    from headwise.attention.triton import span_attention

    device = kernel_device()
    if device == "cpu":
        pytest.skip("the split is decided on a GPU only")
    K, G, N, D = 4, 2, 515, 64
    windows = [N if h in full else 37 for h in range(K)]
    q, k, v = make_qkv(1, K * G, K, N, N, D, torch.bfloat16, device)
    want, _ = dense_reference(*(x.double().cpu() for x in (q, k, v)), span_mask(N, N, K, [4] * K, windows), D**-0.5)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out = span_attention(*leaves, [4] * K, windows)
    close("out", out, want, torch.bfloat16)
    split = torch.autograd.grad(out.float().square().sum(), leaves)
    own = span_attention(*leaves, [4] * K, windows, dense_full_heads=False)
    for a, b in zip(split, torch.autograd.grad(own.float().square().sum(), leaves), strict=True):
        close("gradient", a, b, torch.bfloat16)
