"""Lists of selected keys and packed rows in the op: every backend that serves them against plain loops."""

import math

import pytest
import torch

from headwise.attention import attention
from headwise.errors import AttentionError
from headwise.plan import SinkWindow

BACKENDS = ("reference", "sdpa")


def draw(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def lists_for(B, K, C, blocks, entries, seed):
    """Lists without repeats, some entries -1, some lists empty."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.rand(B, K, C, blocks, generator=generator).argsort(-1)[..., :entries]
    return order.masked_fill(torch.rand(order.shape, generator=generator) < 0.3, -1).int()


def looped(q, k, v, lists, key_block, query_block, start=None, window=None):
    """One query and head at a time; -> out, lse."""
    B, H, N, D = q.shape
    K, M = k.shape[1:3]
    out, lse = torch.zeros_like(q), torch.full((B, H, N), -math.inf, dtype=q.dtype)
    for b, h, i in ((b, h, i) for b in range(B) for h in range(H) for i in range(N)):
        kv, here = h // (H // K), M - N + i
        first = 0 if start is None else int(start[b, i] if start.ndim == 2 else start[b])
        keys = []
        for block in lists[b, kv, i // query_block].tolist():
            for key in range(block * key_block, min(M, (block + 1) * key_block)) if block >= 0 else ():
                inside = window is None or here - key < window
                keys += [key] if first <= key <= here and inside else []
        if keys:
            logits = k[b, kv, keys] @ q[b, h, i] * D**-0.5
            out[b, h, i], lse[b, h, i] = logits.softmax(0) @ v[b, kv, keys], logits.logsumexp(0)
    return out, lse


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("key_block, query_block", [(1, 1), (4, 1), (4, 4), (3, 5)])
@pytest.mark.parametrize("padding", ["none", "left", "packed"])
def test_lists_are_read_as_written(backend, key_block, query_block, padding):
    B, H, K, N, M, D = 2, 6, 2, 13, 19, 8
    q, k, v = draw(0, B, H, N, D), draw(1, B, K, M, D), draw(2, B, K, M, D)
    lists = lists_for(B, K, -(-N // query_block), -(-M // key_block), 4, 3)
    starts = {"none": None, "left": torch.tensor([0, 4]), "packed": torch.tensor([[0] * 5 + [11] * 8, [3] * 13])}
    blocks = {"key_block": key_block, "query_block": query_block}
    got = attention(q, k, v, selected=lists, start=starts[padding], backend=backend, return_lse=True, **blocks)
    out, lse = looped(q, k, v, lists, key_block, query_block, starts[padding])
    torch.testing.assert_close(got.out, out, atol=1e-9, rtol=0)
    assert torch.equal(got.lse.isfinite(), lse.isfinite())
    finite = lse.isfinite()
    torch.testing.assert_close(got.lse[finite].double(), lse[finite], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_pattern_holds_inside_the_lists(backend):
    q, k, v = draw(0, 1, 4, 30, 8), draw(1, 1, 2, 30, 8), draw(2, 1, 2, 30, 8)
    lists = lists_for(1, 2, 30, 30, 12, 5)
    got = attention(q, k, v, selected=lists, patterns=SinkWindow(0, 7), backend=backend)
    torch.testing.assert_close(got, looped(q, k, v, lists, 1, 1, window=7)[0], atol=1e-9, rtol=0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("pattern", [None, SinkWindow(2, 5)])
def test_a_packed_row_is_its_sequences_one_by_one(backend, pattern):
    lengths = (7, 1, 16)
    q, k, v = draw(0, 1, 4, 24, 8), draw(1, 1, 2, 24, 8), draw(2, 1, 2, 24, 8)
    starts = torch.cat([torch.full((n,), sum(lengths[:i])) for i, n in enumerate(lengths)])[None]
    got = attention(q, k, v, start=starts, patterns=pattern, backend=backend).split(lengths, dim=2)
    parts = zip(*(x.split(lengths, dim=2) for x in (q, k, v)), strict=True)
    for mine, part in zip(got, parts, strict=True):
        torch.testing.assert_close(mine, attention(*part, patterns=pattern, backend="reference"), atol=1e-9, rtol=0)


def test_gradients_are_those_of_the_reference():
    leaves = [draw(i, 1, heads, 40, 8).requires_grad_() for i, heads in enumerate((4, 2, 2))]
    lists, weight = lists_for(1, 2, 10, 10, 4, 1), draw(9, 1, 4, 40, 8)
    options = {"selected": lists, "key_block": 4, "query_block": 4}
    grads = [torch.autograd.grad((attention(*leaves, backend=b, **options) * weight).sum(), leaves) for b in BACKENDS]
    for mine, exact in zip(*grads, strict=True):
        torch.testing.assert_close(mine, exact, atol=1e-9, rtol=0)


@pytest.mark.gpu
@pytest.mark.parametrize("key_block, query_block", [(1, 1), (64, 64), (16, 1), (16, 64)])
@pytest.mark.parametrize("padding", ["none", "left", "packed"])
def test_own_kernels_serve_them_on_cuda(key_block, query_block, padding):
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    B, K, N, D = 2, 2, 200, 64
    q, k, v = (draw(i, B, heads, N, D).bfloat16().cuda() for i, heads in enumerate((8, K, K)))
    lists = lists_for(B, K, -(-N // query_block), -(-N // key_block), 5, 3).cuda()
    starts = {"none": None, "left": torch.tensor([0, 40]), "packed": torch.tensor([[0] * 90 + [90] * 110, [7] * 200])}
    start = starts[padding] if starts[padding] is None else starts[padding].cuda()
    options = {"selected": lists, "start": start, "key_block": key_block, "query_block": query_block}
    got = attention(q, k, v, explain=True, **options)
    assert got.ran.backend == "triton"
    exact = attention(q.double(), k.double(), v.double(), backend="reference", **options)
    assert float((got.out.double() - exact).norm() / exact.norm()) < 1e-2


@pytest.mark.parametrize(
    "change, says",
    [
        ({"selected": torch.zeros(1, 2, 9, 2)}, "int32"),
        ({"selected": torch.zeros(1, 2, 5, 2, dtype=torch.int32)}, "C=9"),
        ({"selected": torch.zeros(1, 1, 9, 2, dtype=torch.int32)}, "kv head 1 has none"),
        ({"selected": torch.zeros(1, 2, 9, 2, dtype=torch.int32), "key_block": 0}, "key_block=0"),
        ({"start": torch.zeros(1, 9, dtype=torch.long), "causal": False}, "packed"),
        ({"start": torch.zeros(1, 8, dtype=torch.long)}, "N=9"),
        ({"selected": torch.zeros(1, 2, 9, 2, dtype=torch.int32), "backend": "flex"}, "lists"),
    ],
)
def test_what_does_not_fit_is_refused(change, says):
    q, k = draw(0, 1, 4, 9, 8), draw(1, 1, 2, 9, 8)
    with pytest.raises(AttentionError, match=says):
        attention(q, k, k, **change)
