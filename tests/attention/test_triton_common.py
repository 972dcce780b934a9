"""Float64 dense references and input makers for the kernel tests (and two tests of the references themselves)."""

import numpy as np
import pytest
import torch

triton_missing = "triton is not installed"
TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 2e-2}


def kernel_device():
    """'cuda' on a GPU, 'cpu' in Triton's interpreter; skips where neither is possible."""
    pytest.importorskip("triton", reason=triton_missing)
    from headwise.attention.triton import _host

    if _host.interpreting():
        if tuple(int(x) for x in np.__version__.split(".")[:2]) >= (2, 4):
            pytest.skip("Triton 3.6's interpreter turns one-element arrays into ints, which numpy 2.4 forbids")
        return "cpu"
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device, or TRITON_INTERPRET=1")
    return "cuda"


def positions(N, M):
    """Query positions (N,1) and key positions (1,M), aligned at the last token."""
    return torch.arange(N)[:, None] + M - N, torch.arange(M)[None, :]


def span_mask(N, M, K, sinks, windows, key_start=None, B=1):
    """(B,K,N,M) bool: which keys each kv head reads."""
    i, j = positions(N, M)
    start = torch.zeros(B, dtype=torch.long) if key_start is None else key_start.cpu().long()
    start = start[:, None, None, None]
    sinks, windows = (torch.as_tensor(x).cpu().long()[None, :, None, None] for x in (sinks, windows))
    return (j <= i) & (j >= start) & ((j - start < sinks) | (i - j < windows))


def dense_reference(q, k, v, mask, scale, gate=None, active=None):
    """Float64 attention: mask broadcastable to (B,H,N,M); rows without keys give 0 and lse -inf. -> out, lse."""
    G = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(G, dim=1) for x in (k, v))
    mask = mask if mask.shape[1] == 1 else mask.repeat_interleave(q.shape[1] // mask.shape[1], dim=1)
    if active is not None:
        mask = mask & active[..., None]
    s = (q @ k.transpose(-1, -2)) * scale
    s = s.masked_fill(~mask, float("-inf"))
    lse = torch.logsumexp(s, dim=-1)
    p = torch.where(mask, torch.exp(s - torch.where(lse.isinf(), 0.0, lse)[..., None]), 0.0)
    out = p @ v
    return (out if gate is None else out * gate[..., None]), lse


def close(name, got, want, dtype, floor=1e-3):
    """Relative error in the 2-norm; NaN never passes."""
    got, want = got.detach().double().cpu(), want.detach().double().cpu()
    error = (got - want).norm() / max(want.norm().item(), floor * max(want.numel(), 1) ** 0.5)
    assert error <= TOLERANCE[dtype], f"{name}: relative error {error:.2e} for {dtype}, shape {tuple(got.shape)}"


def check_gradients(run, reference, leaves, dtype, seed=0, with_lse=False):
    """Compare outputs and every gradient of run(*leaves) with reference(*float64 leaves)."""
    device = next(x.device for x in leaves if x is not None)
    mine = [
        None if x is None else x.detach().clone(memory_format=torch.preserve_format).requires_grad_() for x in leaves
    ]
    exact = [None if x is None else x.detach().double().cpu().requires_grad_() for x in leaves]
    got, want = run(*mine), reference(*exact)
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(want[0].shape, generator=generator, dtype=torch.float64).to(dtype).double()
    got_total, want_total = (got[0].double() * weight.to(device)).sum(), (want[0] * weight).sum()
    close("out", got[0], want[0], dtype)
    finite = want[1].isfinite()
    assert torch.equal(got[1].isfinite().cpu(), finite), "lse is finite at other places than the reference"
    close("lse", got[1].cpu()[finite], want[1][finite], dtype)
    if with_lse:
        lse_weight = torch.randn(finite.shape, generator=generator, dtype=torch.float64)
        got_total = got_total + (torch.where(finite.to(device), got[1].double(), 0.0) * lse_weight.to(device)).sum()
        want_total = want_total + (torch.where(finite, want[1], 0.0) * lse_weight).sum()
    names = [name for name, x in zip(("dq", "dk", "dv", "dgate"), mine, strict=False) if x is not None]
    got_grads = torch.autograd.grad(got_total, [x for x in mine if x is not None])
    want_grads = torch.autograd.grad(want_total, [x for x in exact if x is not None])
    for name, a, b in zip(names, got_grads, want_grads, strict=True):
        close(name, a, b, dtype)
    return got, got_grads


def make_qkv(B, H, K, N, M, D, dtype, device, seed=0, strided=False):
    """Random q, k, v; strided=True gives views with a padded head dim and swapped axes."""
    generator = torch.Generator().manual_seed(seed)

    def one(heads, length):
        if not strided:
            return torch.randn(B, heads, length, D, generator=generator).to(device, dtype)
        wide = torch.randn(B, length, heads, D + 8, generator=generator).to(device, dtype)
        return wide[..., :D].transpose(1, 2)

    return one(H, N), one(K, M), one(K, M)


def test_reference_matches_softmax():
    q, k, v = (
        torch.randn(1, 2, 7, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(i)) for i in range(3)
    )
    i, j = positions(7, 7)
    out, lse = dense_reference(q, k, v, (j <= i)[None, None], 0.25)
    want = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.25)
    assert torch.allclose(out, want) and lse.shape == (1, 2, 7)


def test_span_mask_counts():
    mask = span_mask(6, 6, 2, [1, 0], [2, 6])
    assert mask[0, 0].sum(-1).tolist() == [1, 2, 3, 3, 3, 3]
    assert mask[0, 1].sum().item() == 21
