"""Routed attention against the float64 reference: forward and all gradients."""

import os

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_triton_common import check_gradients, close, dense_reference, kernel_device, make_qkv, positions

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
EXAMPLES = int(os.environ.get("HEADWISE_EXAMPLES", "5"))
RELAXED = dict(deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


def routed_case(B, H, K, N, M, D, dtype, density, causal, gated, padded, strided, seed, device, deterministic=False):
    """Run one drawn case; returns inputs and results for further assertions."""
    from headwise.attention.triton import routed_attention

    q, k, v = make_qkv(B, H, K, N, M, D, dtype, device, seed, strided)
    generator = torch.Generator().manual_seed(seed + 1)
    active = torch.rand(B, H, N, generator=generator) < density
    active[:, 0] = False if density < 0.9 else active[:, 0]
    gate = torch.rand(B, H, N, generator=generator).to(device, dtype) if gated else None
    start = torch.randint(0, M, (B,), generator=generator) if padded else None
    i, j = positions(N, M)
    mask = ((j <= i) if causal else (j > -1).expand(N, M))[None, None].expand(B, 1, N, M)
    if padded:
        mask = mask & (j >= start[:, None, None, None])
    scale = D**-0.5

    def run(q, k, v, gate):
        return routed_attention(
            q,
            k,
            v,
            active.to(device),
            gate=gate,
            causal=causal,
            return_lse=True,
            key_start=None if start is None else start.to(device),
            deterministic=deterministic,
        )

    def reference(q, k, v, gate):
        return dense_reference(q, k, v, mask, scale, gate, active)

    got, grads = check_gradients(run, reference, [q, k, v, gate], dtype, seed, with_lse=True)
    off = ~active.to(device)
    assert (got[0][off] == 0).all() and (grads[0][off] == 0).all(), "a query that is not served must be exactly 0"
    if gated:
        assert (grads[3][off] == 0).all()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("D", [64, 96, 128, 256])
@settings(max_examples=EXAMPLES, **RELAXED)
@given(
    B=st.integers(1, 2), heads=st.sampled_from([(4, 2), (2, 2), (8, 1), (3, 1)]), N=st.integers(1, 700),
    extra=st.integers(0, 300), density=st.sampled_from([0.0, 0.02, 0.25, 0.5, 1.0]), causal=st.booleans(),
    gated=st.booleans(), padded=st.booleans(), strided=st.booleans(), seed=st.integers(0, 9999), deterministic=st.booleans(),
)  # fmt: skip
def test_routed_matches_reference(
    B, heads, N, extra, D, dtype, density, causal, gated, padded, strided, seed, deterministic
):
    device = kernel_device()
    if device == "cpu":
        pytest.skip("the interpreter is too slow for this matrix; test_routed_small runs there")
    routed_case(B, *heads, N, N + extra, D, dtype, density, causal, gated, padded, strided, seed, device, deterministic)


@pytest.mark.gpu
@pytest.mark.parametrize("D", [64, 128])
@pytest.mark.parametrize("N", [1, 128, 129, 1500])
def test_routed_hopper_shapes(D, N):
    device = kernel_device()
    if device == "cpu":
        pytest.skip("the interpreter is too slow for this matrix; test_routed_small runs there")
    for causal in (True, False):
        routed_case(2, 4, 2, N, N + 3, D, torch.bfloat16, 0.4, causal, True, True, False, N, device)


@pytest.mark.parametrize(
    "B, H, K, N, M, D, density, causal, gated, padded, strided",
    [
        (2, 4, 2, 37, 37, 32, 0.5, True, True, False, False),
        (1, 2, 1, 33, 50, 48, 0.3, True, False, True, True),
        (1, 2, 2, 1, 1, 16, 1.0, False, True, False, False),
        (2, 2, 1, 40, 45, 16, 0.95, False, True, True, False),
    ],
)
def test_routed_small(B, H, K, N, M, D, density, causal, gated, padded, strided):
    routed_case(B, H, K, N, M, D, torch.float32, density, causal, gated, padded, strided, 3, kernel_device())


@pytest.mark.gpu
def test_forward_is_bitwise_repeatable_and_overwrites_poison():
    from headwise.attention.triton import routed_attention

    device = kernel_device()
    q, k, v = make_qkv(1, 4, 2, 300, 300, 64, torch.bfloat16 if device == "cuda" else torch.float32, device)
    active = (torch.rand(1, 4, 300, generator=torch.Generator().manual_seed(5)) < 0.5).to(device)
    first = routed_attention(q, k, v, active)
    for _ in range(3):
        poison = torch.full_like(first, float("nan"))
        del poison  # the caching allocator hands this memory to the next output
        again = routed_attention(q, k, v, active)
        assert torch.equal(first, again)


@pytest.mark.gpu
def test_deterministic_backward_is_bitwise_repeatable():
    from headwise.attention.triton import routed_attention

    device = kernel_device()
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    q, k, v = (x.requires_grad_() for x in make_qkv(1, 4, 2, 257, 257, 64, dtype, device))
    active = (torch.rand(1, 4, 257, generator=torch.Generator().manual_seed(5)) < 0.5).to(device)
    runs = []
    for _ in range(2):
        out = routed_attention(q, k, v, active, deterministic=True)
        runs.append(torch.autograd.grad(out.float().square().sum(), [q, k, v]))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.gpu
def test_nan_in_unserved_rows_does_not_leak():
    from headwise.attention.triton import routed_attention

    device = kernel_device()
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    q, k, v = make_qkv(1, 2, 1, 150, 150, 64, dtype, device)
    active = (torch.rand(1, 2, 150, generator=torch.Generator().manual_seed(7)) < 0.5).to(device)
    clean = routed_attention(q, k, v, active)
    dirty_q = torch.where(active[..., None], q, torch.full_like(q, float("nan"))).requires_grad_()
    dirty = routed_attention(dirty_q, k, v, active)
    assert torch.equal(clean, dirty)
    weight = torch.where(active[..., None], torch.ones_like(q), torch.full_like(q, float("nan")))
    (grad,) = torch.autograd.grad(dirty, dirty_q, weight)
    assert grad.isfinite().all()


def test_build_rows_is_a_permutation():
    device = kernel_device()
    from headwise.attention.triton._rows import build_rows

    active = torch.rand(2, 3, 190, generator=torch.Generator().manual_seed(0)) < 0.4
    rows, rank = build_rows(active.to(device))
    for b in range(2):
        for h in range(3):
            on, off = active[b, h].nonzero().flatten(), (~active[b, h]).nonzero().flatten()
            assert rows[b, h].tolist() == on.tolist() + off.tolist()
    close("rank", rank[..., 1:], active.cumsum(-1).to(device), torch.float32)
