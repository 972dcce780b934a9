"""Selected-block attention against the float64 reference: forward and all gradients."""

import os

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_triton_common import check_gradients, dense_reference, kernel_device, make_qkv, positions

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
EXAMPLES = int(os.environ.get("HEADWISE_EXAMPLES", "5"))
RELAXED = dict(deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


def draw_lists(B, K, N, M, block_size, entries, generator):
    """Random lists without repeats, shuffled, with -1 mixed in; some lists are empty. Returns lists and (B,K,N,M) mask."""
    C, blocks = -(-N // block_size), -(-M // block_size)
    lists = torch.full((B, K, C, entries), -1, dtype=torch.int32)
    mask = torch.zeros(B, K, N, M, dtype=torch.bool)
    for b, h, c in ((b, h, c) for b in range(B) for h in range(K) for c in range(C)):
        count = int(torch.randint(0, min(entries, blocks) + 1, (1,), generator=generator))
        chosen = torch.randperm(blocks, generator=generator)[:count]
        lists[b, h, c, torch.randperm(entries, generator=generator)[:count]] = chosen.int()
        for block in chosen.tolist():
            rows, keys = (
                slice(c * block_size, (c + 1) * block_size),
                slice(block * block_size, (block + 1) * block_size),
            )
            mask[b, h, rows, keys] = True
    return lists, mask


def block_case(B, K, G, N, M, D, dtype, block_size, entries, causal, strided, seed, device):
    from headwise.attention.triton import block_attention

    q, k, v = make_qkv(B, K * G, K, N, M, D, dtype, device, seed, strided)
    lists, mask = draw_lists(B, K, N, M, block_size, entries, torch.Generator().manual_seed(seed))
    if causal:
        i, j = positions(N, M)
        mask = mask & (j <= i)

    def run(q, k, v):
        return block_attention(q, k, v, lists.to(device), block_size=block_size, causal=causal, return_lse=True)

    check_gradients(run, lambda q, k, v: dense_reference(q, k, v, mask, D**-0.5), [q, k, v], dtype, seed, with_lse=True)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("D", [64, 96, 128, 256])
@settings(max_examples=EXAMPLES, **RELAXED)
@given(
    B=st.integers(1, 2), K=st.integers(1, 2), G=st.integers(1, 5), N=st.integers(1, 600), extra=st.integers(0, 200),
    block_size=st.sampled_from([16, 32, 64, 128]), entries=st.integers(1, 9), causal=st.booleans(), strided=st.booleans(),
    seed=st.integers(0, 9999),
)  # fmt: skip
def test_blocks_match_reference(B, K, G, N, extra, D, dtype, block_size, entries, causal, strided, seed):
    device = kernel_device()
    if device == "cpu":
        pytest.skip("the interpreter is too slow for this matrix; test_blocks_small runs there")
    block_case(B, K, G, N, N + extra, D, dtype, block_size, entries, causal, strided, seed, device)


@pytest.mark.parametrize(
    "N, M, G, entries, causal", [(70, 70, 2, 3, True), (33, 60, 3, 4, True), (20, 50, 1, 2, False)]
)
def test_blocks_small(N, M, G, entries, causal):
    block_case(2, 2, G, N, M, 16, torch.float32, 16, entries, causal, False, 2, kernel_device())
