"""Selected-key attention against the float64 reference: forward and all gradients, packed sequences, key blocks."""

import os

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_triton_common import check_gradients, dense_reference, kernel_device, make_qkv, positions

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
EXAMPLES = int(os.environ.get("HEADWISE_EXAMPLES", "5"))
RELAXED = dict(deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


def draw_lists(B, K, N, M, key_block, entries, generator):
    """Random lists without repeats, shuffled, with -1 mixed in; some are empty. Returns lists and (B,K,N,M) mask."""
    blocks = -(-M // key_block)
    order = torch.rand(B, K, N, blocks, generator=generator).argsort(-1)[..., :entries]
    order = torch.nn.functional.pad(order, (0, entries - order.shape[-1]), value=-1)
    dropped = torch.rand(order.shape, generator=generator) < torch.rand(B, K, N, 1, generator=generator)
    lists = order.masked_fill(dropped, -1)
    hit = torch.zeros(B, K, N, blocks + 1, dtype=torch.bool)
    hit.scatter_(3, torch.where(lists < 0, blocks, lists), True)
    return lists.int(), hit[..., :-1].repeat_interleave(key_block, -1)[..., :M]


def key_case(B, K, G, N, M, D, dtype, key_block, entries, causal, packed, strided, seed, device):
    from headwise.attention.triton import key_attention

    q, k, v = make_qkv(B, K * G, K, N, M, D, dtype, device, seed, strided)
    generator = torch.Generator().manual_seed(seed)
    lists, mask = draw_lists(B, K, N, M, key_block, entries, generator)
    i, j = positions(N, M)
    mask = mask & (j <= i) if causal else mask
    first = None
    if packed:  # the last query's sequence begins somewhere, earlier queries belong to the one before
        begins = torch.randint(0, M, (B, 1), generator=generator)
        first = torch.where(begins <= i.T, begins, 0)
        mask = mask & (j >= first[:, None, :, None])

    def run(q, k, v):
        start = None if first is None else first.int().to(device)
        return key_attention(
            q, k, v, lists.to(device), key_block=key_block, first=start, causal=causal, return_lse=True
        )

    check_gradients(run, lambda q, k, v: dense_reference(q, k, v, mask, D**-0.5), [q, k, v], dtype, seed, with_lse=True)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("D", [64, 96, 128, 256])
@settings(max_examples=EXAMPLES, **RELAXED)
@given(
    B=st.integers(1, 2), K=st.integers(1, 2), G=st.integers(1, 20), N=st.integers(1, 300), extra=st.integers(0, 200),
    key_block=st.sampled_from([1, 1, 4, 16, 64]), entries=st.integers(1, 90), causal=st.booleans(), packed=st.booleans(),
    strided=st.booleans(), seed=st.integers(0, 9999),
)  # fmt: skip
def test_keys_match_reference(
    B, K, G, N, extra, D, dtype, key_block, entries, causal, packed, strided, seed
):  # fmt: skip
    device = kernel_device()
    if device == "cpu":
        pytest.skip("the interpreter is too slow for this matrix; test_keys_small runs there")
    key_case(B, K, G, N, N + extra, D, dtype, key_block, entries, causal, packed, strided, seed, device)


@pytest.mark.parametrize(
    "N, M, G, key_block, entries, causal, packed",
    [(21, 21, 2, 1, 40, True, True), (13, 40, 3, 4, 5, True, False), (9, 30, 1, 16, 2, False, True)],
)
def test_keys_small(N, M, G, key_block, entries, causal, packed):
    key_case(2, 2, G, N, M, 16, torch.float32, key_block, entries, causal, packed, False, 2, kernel_device())


def test_bad_lists_name_what_is_right():
    kernel_device()
    from headwise.attention.triton import key_attention

    q, k = torch.randn(1, 2, 4, 16), torch.randn(1, 1, 4, 16)
    if torch.cuda.is_available():
        q, k = q.cuda(), k.cuda()
    lists = torch.zeros(1, 1, 4, 2, dtype=torch.int32, device=q.device)
    with pytest.raises(ValueError, match="key_block"):
        key_attention(q, k, k, lists, key_block=3)
    with pytest.raises(ValueError, match="int32"):
        key_attention(q, k, k, lists.long())
    with pytest.raises(ValueError, match="first"):
        key_attention(q, k, k, lists, first=lists[0, 0, 0])
