"""The sdpa backend: which library calls it makes, blocks and bands, and how little it allocates; its numbers are tested in test_op."""

import pytest
import torch
from torch.nn import functional as F

from headwise.attention import KVGroup, attention, sdpa
from headwise.plan import Elastic, Full, SinkWindow


def normal(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def qkv(B=2, H=4, K=2, N=24, M=24, D=8):
    return normal(0, B, H, N, D), normal(1, B, K, M, D), normal(2, B, K, M, D)


@pytest.fixture
def calls(monkeypatch):
    """Every library call: queries, keys, mask elements (0: none), is_causal."""
    seen, library = [], F.scaled_dot_product_attention

    def counted(q, k, v, attn_mask=None, is_causal=False, **options):
        seen.append((q.shape[2], k.shape[2], 0 if attn_mask is None else attn_mask.numel(), is_causal))
        return library(q, k, v, attn_mask=attn_mask, is_causal=is_causal, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", counted)
    return seen


def same(got, want):
    torch.testing.assert_close(got, want, atol=2e-5, rtol=1e-5)


def test_full_heads_are_one_fused_causal_call_without_a_mask(calls):
    q, k, v = qkv()
    attention(q, k, v)
    attention(q, k, v, patterns=[SinkWindow(4, 20), SinkWindow(4, 20)])  # as long as the text: nothing is hidden
    assert calls == [(24, 24, 0, True)] * 2


def test_bidirectional_heads_need_no_mask_either(calls):
    q, k, v = qkv()
    attention(q, k, v, causal=False)
    assert calls == [(24, 24, 24 * 24, False)] or calls == [(24, 24, 0, False)]


def test_one_query_needs_no_mask(calls):
    q, k, v = qkv(N=1)
    attention(q, k, v)
    assert calls == [(1, 24, 0, False)]


def test_a_complete_group_needs_no_mask(calls):
    q, k, v = qkv(N=1)
    group = KVGroup((0, 1), k, v, SinkWindow(4, 20), torch.arange(24)[None, None], complete=True)
    same(attention(q, groups=[group], offset=23), attention(q, k, v, backend="reference"))
    assert calls == [(1, 24, 0, False)]


def test_like_heads_are_one_call_and_come_back_in_order(calls):
    q, k, v = qkv(H=8, K=4)
    patterns = [Full(), SinkWindow(1, 3), Full(), SinkWindow(1, 3)]
    same(attention(q, k, v, patterns=patterns), attention(q, k, v, patterns=patterns, backend="reference"))
    assert len(calls) == 2


@pytest.mark.parametrize("pattern", [SinkWindow(3, 10), Elastic(2, 4, 0.1)], ids=str)
@pytest.mark.parametrize("start", [None, torch.tensor([0, 37])], ids=["dense", "padded"])
def test_a_windowed_prefill_reads_bands(monkeypatch, calls, pattern, start):
    """Work follows the window: each block of queries reads the sinks and its own band."""
    monkeypatch.setattr(sdpa, "BAND_ROWS", 16)
    q, k, v = qkv(N=200, M=200)
    same(
        attention(q, k, v, patterns=pattern, start=start),
        attention(q, k, v, patterns=pattern, start=start, backend="reference"),
    )
    assert [n for n, *_ in calls] == [16] * 12 + [8]
    slack = 0 if start is None else 37
    assert max(m for _, m, *_ in calls) <= pattern.sinks + slack + pattern.window(200) + 16


@pytest.mark.parametrize("N", [1, 5, 60])
def test_bands_of_a_chunk_behind_a_store(monkeypatch, N):
    """Stored slots in any order, then the chunk in order; also with an offset that padding moves per row."""
    monkeypatch.setattr(sdpa, "BAND_ROWS", 8)
    past, start = 30, torch.tensor([0, 11])
    kept = torch.cat([torch.tensor([0, 1]), torch.arange(20, 30).flip(0)])
    q, k, v = qkv(N=N, M=past + N)
    columns = torch.cat([kept, torch.arange(past, past + N)])
    positions = (columns[None] - start[:, None]).clamp(min=-1)[:, None]
    pattern = SinkWindow(2, 6)
    group = KVGroup((0, 1), k[:, :, columns], v[:, :, columns], pattern, positions, tail=N)
    got = attention(q, groups=[group], offset=past, start=start)
    same(got, attention(q, groups=[group], offset=past, start=start, backend="reference"))
    if N == 5:  # nothing that this row reads was dropped
        same(got[0], attention(q, k, v, patterns=pattern)[0])


def test_masks_are_made_in_blocks(monkeypatch, calls):
    monkeypatch.setattr(sdpa, "MASK_ELEMENTS", 500)
    q, k, v = qkv()
    mask = torch.rand(2, 1, 24, 24, generator=torch.Generator().manual_seed(3)) < 0.8
    same(attention(q, k, v, mask=mask), attention(q, k, v, mask=mask, backend="reference"))
    assert len(calls) > 1 and max(2 * n * m for n, m, *_ in calls) <= 500


def test_log_sum_exp_in_blocks(monkeypatch):
    q, k, v = qkv()
    patterns, start = [Full(), SinkWindow(2, 5)], torch.tensor([3, 0])
    want = attention(q, k, v, patterns=patterns, start=start, return_lse=True, backend="reference")
    rows, direct = [], sdpa._direct_rows
    monkeypatch.setattr(sdpa, "_direct_rows", lambda q, *rest: rows.append(q.shape[2]) or direct(q, *rest))
    monkeypatch.setattr(sdpa, "MASK_ELEMENTS", 700)
    got = attention(q, k, v, patterns=patterns, start=start, return_lse=True)
    same(got.out, want.out)
    same(got.lse, want.lse)
    assert max(rows) == 700 // (2 * 2 * 24) and sum(rows) == 2 * 24


def test_partial_sums_merge_into_the_whole():
    """Groups of keys give (output, log-sum-exp); everything else is algebra."""
    q, k, v = qkv(N=1)
    parts = [attention(q, k[:, :, a:b], v[:, :, a:b], causal=False, return_lse=True) for a, b in ((0, 5), (5, 24))]
    lse = torch.stack([p.lse for p in parts])
    weights = torch.softmax(lse, dim=0)[..., None]
    same((weights * torch.stack([p.out for p in parts])).sum(0), attention(q, k, v))
    same(torch.logsumexp(lse, 0), attention(q, k, v, return_lse=True).lse)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("N", "M"), [(1, 24), (5, 24), (17, 18)])
def test_a_chunk_behind_its_past_is_two_fused_calls(calls, N, M, dtype):
    """Past and triangle joined by log-sum-exp are the masked softmax; storages in any order before the chunk."""
    q, k, v = (x.to(dtype) for x in qkv(N=N, M=M))
    want = attention(q.float(), k.float(), v.float(), backend="reference").to(dtype)
    atol = 2e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(attention(q, k, v), want, atol=atol, rtol=1e-2)
    order = torch.cat([torch.randperm(M - N, generator=torch.Generator().manual_seed(3)), torch.arange(M - N, M)])
    if N > 1:
        group = KVGroup((0, 1), k[:, :, order], v[:, :, order], positions=order[None, None], tail=N, complete=True)
        torch.testing.assert_close(attention(q, groups=[group], offset=M - N), want, atol=atol, rtol=1e-2)
    assert not any(elements for *_, elements, _ in calls)


def test_a_chunk_with_gradients_or_padding_keeps_its_mask(calls):
    """The joined form has no gradients of its log-sum-exp, and no place for padding."""
    q, k, v = qkv(N=5)
    q.requires_grad_()
    attention(q, k, v).sum().backward()
    assert q.grad is not None and calls[0][2] > 0
    start = torch.tensor([0, 3])
    same(attention(q.detach(), k, v, start=start), attention(q.detach(), k, v, start=start, backend="reference"))
    assert calls[-1][2] > 0
