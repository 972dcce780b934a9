"""What the benchmarks measure: for each kernel a correctness gate and a generator of table rows."""

from __future__ import annotations

import math

import torch
from measure import D, H, K, dense, dense_flops, graph_milliseconds, milliseconds, qkv, relative, step

from headwise.attention.triton import block_attention, plan_splits, ragged_decode, routed_attention, span_attention


def reference(q, k, v, mask):
    """Float64 dense attention on the device; mask (.., N, M)."""
    q, k, v = q.double(), *(x.double().repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    s = (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(~mask, -math.inf)
    return torch.nan_to_num(s.softmax(-1)) @ v


def compare(run, want, leaves) -> dict[str, float]:
    """Relative errors of the output and of every gradient of run() against want()."""
    got_out, want_out = run(*leaves), want(*leaves)
    weight = torch.randn_like(got_out)
    errors = {"out": relative(got_out, want_out)}
    pairs = zip(
        torch.autograd.grad(got_out, leaves, weight),
        torch.autograd.grad(want_out, leaves, weight.double()),
        strict=True,
    )
    for name, (a, b) in zip(("dq", "dk", "dv", "dgate"), pairs, strict=False):
        errors[name] = relative(a, b)
    return errors


def lower(N: int) -> torch.Tensor:
    """(N,N) causal mask."""
    return torch.ones(N, N, dtype=torch.bool, device="cuda").tril()


def routed_gate() -> dict[str, float]:
    """1111 tokens, gates, 40 % served."""
    N = 1111
    leaves = qkv(2, N, 8, 2, D, grad=True)
    gate = torch.rand(2, 8, N, device="cuda", requires_grad=True)
    active = torch.rand(2, 8, N, device="cuda") < 0.4
    run = lambda q, k, v, gate: routed_attention(q, k, v, active, gate=gate)
    want = lambda q, k, v, gate: reference(q, k, v, lower(N)) * (gate * active)[..., None]
    return compare(run, want, [*leaves, gate])


def routed(quick: bool, roof: dict):
    """Routed attention against dense cuDNN of the same length."""
    from headwise.attention.triton._rows import build_rows

    for N in [8192] if quick else [1024, 2048, 4096, 8192, 16384, 32768]:
        q, k, v = qkv(1, N, grad=True)
        rows = []
        with torch.no_grad():
            base, fa2 = (milliseconds(lambda b=b: dense(q, k, v, b)) for b in ("cudnn", "fa2"))
            base_graph = graph_milliseconds(lambda: dense(q, k, v)) if N <= 8192 else None
        base_step = milliseconds(step(lambda: dense(q, k, v), [q, k, v]))
        rows.append(
            {
                "N": N,
                "cudnn_ms": base,
                "tflops": dense_flops(1, N) / base / 1e9,
                "fa2_ms": fa2,
                "cudnn_fwd_bwd_ms": base_step,
                "tflops_fwd_bwd": dense_flops(1, N, True) / base_step / 1e9,
            }
        )
        for share in (0.75, 0.5, 0.25):
            active = torch.rand(1, H, N, device="cuda") < share
            with torch.no_grad():
                ms = milliseconds(lambda: routed_attention(q, k, v, active))
                index = graph_milliseconds(lambda: build_rows(active))
                in_graph = graph_milliseconds(lambda: routed_attention(q, k, v, active)) if base_graph else None
            row = {
                "N": N,
                "active": share,
                "ms": ms,
                "vs_cudnn": base / ms,
                "vs_fa2": fa2 / ms,
                "tflops": share * dense_flops(1, N) / ms / 1e9,
                "of_matmul": share * dense_flops(1, N) / ms / 1e9 / roof["matmul_tflops"],
                "index_ms": index,
            }
            if in_graph:  # short sequences: without the host's share, which is larger than the work
                row |= {"graph_ms": in_graph, "vs_cudnn_in_graphs": base_graph / in_graph}
            ms = milliseconds(step(lambda: routed_attention(q, k, v, active), [q, k, v]))
            row |= {
                "fwd_bwd_ms": ms,
                "fwd_bwd_vs_cudnn": base_step / ms,
                "fwd_bwd_tflops": share * dense_flops(1, N, True) / ms / 1e9,
            }
            rows.append(row)
        yield rows


def span_setup(N: int):
    """Half of the kv heads stream: 64 sinks + 256 recent."""
    return [64] * K, [N if h % 2 else 256 for h in range(K)]


def spans_gate() -> dict[str, float]:
    """Half streaming, 1111 tokens, both ways (split with the library, and all in the own kernel)."""
    N = 1111
    leaves = qkv(1, N, grad=True)
    sinks, windows = span_setup(N)
    i = torch.arange(N, device="cuda")
    window = torch.tensor(windows, device="cuda").repeat_interleave(H // K)[:, None, None]
    mask = (i <= i[:, None]) & ((i < 64) | (i[:, None] - i < window))
    want = lambda q, k, v: reference(q, k, v, mask)
    errors = compare(lambda q, k, v: span_attention(q, k, v, sinks, windows), want, leaves)
    own = compare(lambda q, k, v: span_attention(q, k, v, sinks, windows, dense_full_heads=False), want, leaves)
    return errors | {f"own_{name}": error for name, error in own.items()}


def spans(quick: bool, roof: dict):
    """Half streaming heads: library for the full heads + own kernel, and everything in the own kernel."""
    for N in [32768] if quick else [2048, 8192, 32768]:
        q, k, v = qkv(1, N, grad=True)
        sinks, windows = span_setup(N)
        on_device = [torch.tensor(x, dtype=torch.int32, device="cuda") for x in (sinks, windows)]
        neighbours = [N] * (K // 2) + [256] * (K // 2)
        with torch.no_grad():
            base = milliseconds(lambda: dense(q, k, v))
            times = {
                "split": milliseconds(lambda: span_attention(q, k, v, sinks, windows)),
                "split_neighbours": milliseconds(lambda: span_attention(q, k, v, sinks, neighbours)),
                "own": milliseconds(lambda: span_attention(q, k, v, *on_device)),
                "streaming_only": milliseconds(lambda: span_attention(q, k, v, sinks, [256] * K)),
            }
        base_step = milliseconds(step(lambda: dense(q, k, v), [q, k, v]))
        rows = [{"N": N, "cudnn_ms": base, "cudnn_fwd_bwd_ms": base_step}]
        for name, ms in times.items():
            rows.append({"N": N, "way": name, "ms": ms, "vs_cudnn": base / ms})
        for name, fn in (
            ("split", lambda: span_attention(q, k, v, sinks, windows)),
            ("own", lambda: span_attention(q, k, v, *on_device)),
        ):
            ms = milliseconds(step(fn, [q, k, v]))
            rows.append({"N": N, "way": name, "fwd_bwd_ms": ms, "fwd_bwd_vs_cudnn": base_step / ms})
        yield rows


def decode_inputs(lengths: torch.Tensor):
    """Own storage per (row, kv head) inside two big buffers -> q, pointers, lengths; and the bytes a decode must read."""
    B, kv = lengths.shape
    starts = torch.zeros(B * kv, dtype=torch.long, device="cuda")
    starts[1:] = lengths.flatten().cumsum(0)[:-1]
    total = int(lengths.sum())
    k, v = (torch.randn(total, D, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    pointers = [(x.data_ptr() + starts * D * 2).view(B, kv) for x in (k, v)]
    q = torch.randn(B, kv * (H // K), 1, D, device="cuda", dtype=torch.bfloat16)
    return q, k, v, pointers, lengths.to(torch.int32), 2 * total * D * 2


def decode_gate() -> dict[str, float]:
    """Lognormal lengths; every head against its own float64 softmax."""
    lengths = torch.randn(3, K, device="cuda").mul(1.0).exp().mul(900).long() + 1
    q, k, v, pointers, lengths32, _ = decode_inputs(lengths)
    out = ragged_decode(q, *pointers, lengths32)
    want, at, G = torch.empty_like(out, dtype=torch.float64), 0, H // K
    for b in range(3):
        for h in range(K):
            n = int(lengths[b, h])
            heads = slice(h * G, (h + 1) * G)
            want[b, heads] = reference(
                q[b : b + 1, heads],
                k[None, None, at : at + n],
                v[None, None, at : at + n],
                torch.ones(1, n, dtype=torch.bool, device="cuda"),
            )[0]
            at += n
    return {"out": relative(out, want)}


def decode_lengths(quick: bool):
    """Names and lengths (B,K) of the decode cases."""
    for B in (1, 4, 8):
        duo = torch.full((B, K), 131072, dtype=torch.long, device="cuda")
        duo[:, ::2] = 320
        yield f"duo50_131k_B{B}", duo
    generator = torch.Generator("cuda").manual_seed(0)
    for B in (8, 32):
        yield (
            f"lognormal_B{B}",
            (torch.randn(B, K, device="cuda", generator=generator).exp() * 8192).long().clamp(16, 262144),
        )
    if not quick:
        yield "full_32k_B1", torch.full((1, K), 32768, dtype=torch.long, device="cuda")
        yield "full_8k_B32", torch.full((32, K), 8192, dtype=torch.long, device="cuda")


def decode(quick: bool, roof: dict, variants=((64, 2), (64, 3), (128, 1))):
    """One decode step over several layers, each with its own keys, in one CUDA graph with one plan; time per layer."""
    for name, lengths in decode_lengths(quick):
        size = 4 * D * int(lengths.sum())
        layers = [decode_inputs(lengths) for _ in range(max(2, min(8, int(8e9 / size))))]
        lengths32 = layers[0][4]
        rows = []
        for block, per_sm in variants:
            programs = per_sm * torch.cuda.get_device_properties(0).multi_processor_count

            def run(block=block, programs=programs):
                plan = plan_splits(lengths32, block=block, programs=programs)
                return [ragged_decode(q, *pointers, lengths32, plan=plan) for q, _, _, pointers, _, _ in layers]

            ms = graph_milliseconds(run) / len(layers)
            rows.append(
                {
                    "case": name,
                    "block": block,
                    "per_sm": per_sm,
                    "layers": len(layers),
                    "us": ms * 1e3,
                    "tbs": size / ms / 1e9,
                    "of_copy": size / ms / 1e9 / roof["copy_tbs"],
                }
            )
        yield rows


def block_lists(N: int, block: int, density: float) -> torch.Tensor:
    """(1,K,C,E): a share of the visible blocks of every query block, its own block always, the others at random."""
    C = N // block
    scores = torch.rand(1, K, C, C, device="cuda")
    at = torch.arange(C, device="cuda")
    scores = scores.masked_fill(at > at[:, None], -1.0)
    scores[..., at, at] = 2.0
    entries = max(1, math.ceil(C * density))
    top = scores.topk(entries, dim=-1).indices.int()
    wanted = (torch.arange(1, C + 1, device="cuda") * density).ceil()[:, None]
    return torch.where(torch.arange(entries, device="cuda") < wanted, top, -1).contiguous()


def blocks_gate() -> dict[str, float]:
    """1088 tokens, blocks of 64, a quarter of the visible blocks."""
    N = 1088
    leaves = qkv(1, N, grad=True)
    lists = block_lists(N, 64, 0.25)
    mask = torch.zeros(1, K, N // 64, N // 64 + 1, dtype=torch.bool, device="cuda")
    mask.scatter_(3, torch.where(lists < 0, N // 64, lists).long(), True)
    mask = mask[..., :-1].repeat_interleave(64, 2).repeat_interleave(64, 3).repeat_interleave(H // K, 1) & lower(N)
    run = lambda q, k, v: block_attention(q, k, v, lists, block_size=64)
    return compare(run, lambda q, k, v: reference(q, k, v, mask), leaves)


def blocks(quick: bool, roof: dict):
    """Selected blocks at 1/8 of the visible blocks; ideal = dense cuDNN time times the share of block pairs kept."""
    for N in [32768] if quick else [4096, 8192, 16384, 32768]:
        q, k, v = qkv(1, N, grad=True)
        with torch.no_grad():
            base = milliseconds(lambda: dense(q, k, v))
        base_step = milliseconds(step(lambda: dense(q, k, v), [q, k, v]))
        rows = []
        for block in (64,) if quick else (32, 64, 128):
            lists = block_lists(N, block, 0.125)
            share = (lists >= 0).sum().item() / (K * (N // block) * (N // block + 1) / 2)
            with torch.no_grad():
                ms = milliseconds(lambda: block_attention(q, k, v, lists, block_size=block))
            both = milliseconds(step(lambda: block_attention(q, k, v, lists, block_size=block), [q, k, v]))
            rows.append(
                {
                    "N": N,
                    "block": block,
                    "share": share,
                    "ms": ms,
                    "vs_cudnn": base / ms,
                    "of_ideal": base * share / ms,
                    "tflops": share * dense_flops(1, N) / ms / 1e9,
                    "fwd_bwd_ms": both,
                    "fwd_bwd_vs_cudnn": base_step / both,
                }
            )
        yield rows


GATES = {"routed": routed_gate, "spans": spans_gate, "decode": decode_gate, "blocks": blocks_gate}
SECTIONS = {"routed": routed, "spans": spans, "decode": decode, "blocks": blocks}
