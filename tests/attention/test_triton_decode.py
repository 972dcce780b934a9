"""Ragged decode against the float64 reference."""

import math
import os

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_triton_common import close, dense_reference, kernel_device, make_qkv

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
EXAMPLES = int(os.environ.get("HEADWISE_EXAMPLES", "5"))
RELAXED = dict(deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


def ragged_reference(q, storages, lengths, seen=None, compensation=None):
    """Float64, one (row, kv head) at a time. storages[b][k] = (keys, values)."""
    B, H, NQ, D = q.shape
    K = lengths.shape[1]
    G = H // K
    out, lse = torch.zeros(B, H, NQ, D, dtype=torch.float64), torch.full((B, H, NQ), -math.inf, dtype=torch.float64)
    for b in range(B):
        for kvh in range(K):
            n = int(lengths[b, kvh])
            k, v = (x[:n].double().cpu() for x in storages[b][kvh])
            s = q[b, kvh * G : (kvh + 1) * G].double().cpu() @ k.T * D**-0.5  # (G, NQ, n)
            if seen is not None:
                s = s.masked_fill(~seen(b, kvh, n), -math.inf)
            if compensation is not None:
                k_hat, v_hat, count = (x[b, kvh].double().cpu() for x in compensation)
                extra = q[b, kvh * G : (kvh + 1) * G].double().cpu() @ k_hat * D**-0.5 + count
                s, v = torch.cat([s, extra[..., None]], -1), torch.cat([v, v_hat[None]])
            total = torch.logsumexp(s, -1) if s.shape[-1] else torch.full(s.shape[:2], -math.inf, dtype=torch.float64)
            p = torch.exp(s - torch.where(total.isinf(), 0.0, total)[..., None])
            out[b, kvh * G : (kvh + 1) * G], lse[b, kvh * G : (kvh + 1) * G] = p @ v, total
    return out, lse


def decode_case(B, K, G, NQ, D, dtype, top, rule, compensated, seed, device, programs=None):
    from headwise.attention.triton import Compensation, plan_splits, ragged_decode

    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(0, top + 1, (B, K), generator=generator, dtype=torch.int32)
    lengths[:, 0] = 0 if rule != "tail" else NQ
    storages = [
        [
            tuple(torch.randn(max(int(n), 1) + 3, D, generator=generator).to(device, dtype) for _ in range(2))
            for n in row
        ]
        for row in lengths
    ]
    for b in range(B):
        for kvh in range(K):
            for x in storages[b][kvh]:
                x[int(lengths[b, kvh]) :] = float("nan")  # slots past the length must not be read
    q = torch.randn(B, NQ, K * G, D, generator=generator).to(device, dtype).transpose(1, 2)
    pointers = [torch.tensor([[pair[i].data_ptr() for pair in row] for row in storages], device=device) for i in (0, 1)]
    options, seen, extra = {}, None, None
    if rule == "tail":
        lengths = lengths.clamp(min=NQ)
        storages = [
            [tuple(torch.randn(int(n), D, generator=generator).to(device, dtype) for _ in range(2)) for n in row]
            for row in lengths
        ]
        pointers = [
            torch.tensor([[pair[i].data_ptr() for pair in row] for row in storages], device=device) for i in (0, 1)
        ]
        options = dict(causal_tail=True)
        seen = lambda b, kvh, n: torch.arange(n)[None, :] <= n - NQ + torch.arange(NQ)[:, None]
    if rule == "positions":
        slots = [[torch.randperm(top + 4, generator=generator).to(device, torch.int32) for _ in row] for row in lengths]
        q_pos = torch.randint(0, top + 4, (B, NQ), generator=generator, dtype=torch.int32)
        table = torch.tensor([[x.data_ptr() for x in row] for row in slots], device=device)
        options = dict(slot_positions=table, query_positions=q_pos.to(device))
        seen = lambda b, kvh, n: slots[b][kvh][:n].cpu()[None, :] <= q_pos[b][:, None]
    if compensated:
        extra = [torch.randn(B, K, D, generator=generator).to(device, dtype) for _ in range(2)]
        count = torch.rand(B, K, generator=generator) * 5
        count[0, -1] = -math.inf
        extra.append(count.to(device))
        options["compensation"] = Compensation(*extra)
    on_device = lengths.to(device)
    plan = plan_splits(on_device, block=32 if device == "cpu" else 64, programs=programs)
    out, lse = ragged_decode(q, *pointers, on_device, plan=plan, return_lse=True, **options)
    want, want_lse = ragged_reference(q, storages, lengths, seen, extra)
    close("out", out, want, dtype)
    finite = want_lse.isfinite()
    assert torch.equal(lse.isfinite().cpu(), finite)
    close("lse", lse.cpu()[finite], want_lse[finite], dtype)
    assert torch.equal(out, ragged_decode(q, *pointers, on_device, plan=plan, **options)), "not bitwise repeatable"


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("D", [64, 96, 128, 256])
@settings(max_examples=EXAMPLES, **RELAXED)
@given(
    B=st.integers(1, 5), K=st.integers(1, 8), G=st.integers(1, 8), NQ=st.integers(1, 8),
    top=st.sampled_from([8, 63, 700, 5000]), rule=st.sampled_from(["all", "tail", "positions"]),
    compensated=st.booleans(), seed=st.integers(0, 9999),
)  # fmt: skip
def test_decode_matches_reference(B, K, G, NQ, D, dtype, top, rule, compensated, seed):
    device = kernel_device()
    if device == "cpu":
        pytest.skip("the interpreter is too slow for this matrix; test_decode_small runs there")
    decode_case(B, K, G, NQ, D, dtype, top, rule, compensated, seed, device)


@pytest.mark.parametrize("rule", ["all", "tail", "positions"])
@pytest.mark.parametrize("compensated", [False, True])
def test_decode_small(rule, compensated):
    decode_case(2, 3, 2, 3, 48, torch.float32, 150, rule, compensated, 4, kernel_device(), programs=7)


def test_groups_match_dense():
    from headwise.attention.triton import ragged_decode_groups

    device = kernel_device()
    q, k, v = make_qkv(2, 6, 3, 1, 90, 32, torch.float32, device)
    groups = [([2, 0], k[:, [2, 0]], v[:, [2, 0]], torch.tensor([90, 41])), ([1], k[:, 1:2], v[:, 1:2], 17)]
    out = ragged_decode_groups(q, groups)
    lengths = torch.tensor([[90, 17, 90], [41, 17, 41]])
    mask = (torch.arange(90) < lengths[..., None])[:, :, None]
    want, _ = dense_reference(*(x.double().cpu() for x in (q, k, v)), mask, 32**-0.5)
    close("out", out, want, torch.float32)


@pytest.mark.gpu
def test_cuda_graph_follows_the_lengths():
    from headwise.attention.triton import plan_splits, ragged_decode

    device = kernel_device()
    if device == "cpu":
        pytest.skip("CUDA graphs need a GPU")
    q, k, v = make_qkv(2, 8, 4, 1, 3000, 128, torch.bfloat16, device)
    pointers = [torch.tensor([[x[b, h].data_ptr() for h in range(4)] for b in range(2)], device=device) for x in (k, v)]
    lengths = torch.full((2, 4), 3000, dtype=torch.int32, device=device)

    def step():
        return ragged_decode(q, *pointers, lengths, plan=plan_splits(lengths))

    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()
    for seed in range(3):
        new = torch.randint(0, 3001, (2, 4), generator=torch.Generator().manual_seed(seed), dtype=torch.int32)
        lengths.copy_(new)
        graph.replay()
        want, _ = ragged_reference(q, [[(k[b, h], v[b, h]) for h in range(4)] for b in range(2)], new)
        close("out", out, want, torch.bfloat16)
