"""What is measured: for each case a correctness gate and a generator of table rows.

Letters: B batch, H query heads, K kv heads, G = H/K, N tokens, D head dim.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from headwise.attention import KVGroup, attention
from headwise.bench import measure, peers
from headwise.plan import Full, SinkWindow

Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Setting:
    """The shape that is measured, by default Llama-3-8B's attention, and where."""

    device: str
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    dtype: torch.dtype = torch.bfloat16
    lengths: tuple[int, ...] = ()
    backward: bool = True
    roof: dict[str, float] | None = None

    def qkv(self, N: int, B: int = 1, *, grad: bool = False) -> list[Tensor]:
        """Random q (B,H,N,D), k and v (B,K,N,D)."""
        shapes = [(B, heads, N, self.head_dim) for heads in (self.heads, self.kv_heads, self.kv_heads)]
        return [torch.randn(s, device=self.device, dtype=self.dtype, requires_grad=grad) for s in shapes]

    def flops(self, N: int, *, backward: bool = False) -> float:
        """Causal attention of one row: 4 N²/2 D H forward, 3.5 times that with backward."""
        return self.heads * 2 * N * N * self.head_dim * (3.5 if backward else 1.0)

    @property
    def own(self) -> str:
        """The backend that is measured: the own kernels on CUDA, the op's choice elsewhere."""
        return "triton" if self.device == "cuda" else "auto"

    def time(self, fn: Callable[[], Any]) -> float:
        """Median ms without gradients."""
        with torch.no_grad():
            return measure.milliseconds(fn, self.device)

    def of_roof(self, name: str, value: float) -> float | None:
        """Share of the machine's own rate."""
        return None if self.roof is None else value / self.roof[name]


@dataclass(frozen=True)
class Case:
    """One command of the bench."""

    name: str
    about: str
    lengths: tuple[int, ...]
    small: tuple[int, ...]  # on a CPU
    gate: Callable[[Setting], dict[str, float]]
    rows: Callable[[Setting, int], Iterator[Row]]
    ratio: str = "vs_dense"


def against_dense(setting: Setting, N: int, work: float, run: Callable[..., Tensor]) -> Iterator[Row]:
    """Rows that every prefill case has: forward, inside a graph, forward + backward, and the op's own choice, over dense."""
    q, k, v = setting.qkv(N, grad=setting.backward)
    with torch.no_grad():
        name, dense = measure.fastest_dense(q, k, v)
        base, ms = dense[name], setting.time(lambda: run(q, k, v, setting.own))
        row: Row = {"ms": ms, "vs_dense": base / ms, "dense": name, "dense_ms": base}
        if setting.own != "auto":  # what the op does unasked, and what it would do without our kernels
            auto, library = (setting.time(lambda b=b: run(q, k, v, b)) for b in ("auto", "sdpa"))  # type: ignore[misc]
            row |= {"auto_vs_dense": base / auto, "vs_library": library / ms}
        row |= {f"vs_{other}": time / ms for other, time in dense.items() if other != name}
        row |= {"tflops": work * setting.flops(N) / ms / 1e9}
        row |= {"of_matmul": setting.of_roof("matmul_tflops", row["tflops"])}
        if setting.device == "cuda" and N <= 8192:
            in_graph = measure.graph_milliseconds(lambda: run(q, k, v, setting.own))
            dense_graph = min(measure.graph_milliseconds(lambda n=n: measure.dense(q, k, v, n)) for n in dense)  # type: ignore[misc]
            row |= {"graph_ms": in_graph, "vs_dense_in_graph": dense_graph / in_graph}
    if setting.backward:
        # which kernel is fastest eagerly is host noise at short lengths: each mode has its own fastest one
        steps = [
            measure.step(lambda kernel=kernel: measure.dense(q, k, v, kernel), [q, k, v])  # type: ignore[misc]
            for kernel in (None if n == "sdpa" else n for n in dense)
        ]
        base = min(measure.milliseconds(step, setting.device) for step in steps)
        both = measure.milliseconds(measure.step(lambda: run(q, k, v, setting.own), [q, k, v]), setting.device)
        row |= {"fwd_bwd_ms": both, "fwd_bwd_vs_dense": base / both}
    yield row


def attend(*tensors: Tensor, **options: Any) -> Tensor:
    """The op's output alone."""
    out = attention(*tensors, **options)
    assert isinstance(out, Tensor)
    return out


def gate_by(setting: Setting, N: int, **options: Any) -> dict[str, float]:
    """The measured backend against the equation, forward and all gradients."""
    leaves = setting.qkv(N, 2, grad=True)
    run = lambda *x: attend(*x, backend=setting.own, **options)
    return measure.errors(run, lambda *x: attend(*x, backend="reference", **options), leaves)


# -- routed queries ----------------------------------------------------------------------------------------------------


def routed_gate(setting: Setting) -> dict[str, float]:
    """777 tokens, 40 % served, gates."""
    N = 777
    active = torch.rand(2, setting.heads, N, device=setting.device) < 0.4
    gates = torch.rand(2, setting.heads, N, device=setting.device)
    return gate_by(setting, N, active=active, gate=gates)


def routed_rows(setting: Setting, N: int) -> Iterator[Row]:
    """Each head serves a random share of the queries."""
    for share in (0.75, 0.5, 0.25):
        active = torch.rand(1, setting.heads, N, device=setting.device) < share
        run = lambda q, k, v, backend, active=active: attend(q, k, v, active=active, backend=backend)
        for row in against_dense(setting, N, share, run):
            yield {"N": N, "active": share, **row}


# -- spans -------------------------------------------------------------------------------------------------------------

SPAN = SinkWindow(64, 256)


def span_patterns(setting: Setting) -> list[Any]:
    """Half of the kv heads stream."""
    return [Full() if h % 2 else SPAN for h in range(setting.kv_heads)]


def span_gate(setting: Setting) -> dict[str, float]:
    """777 tokens, half of the kv heads streaming."""
    return gate_by(setting, 777, patterns=span_patterns(setting))


def span_rows(setting: Setting, N: int) -> Iterator[Row]:
    """Half of the kv heads read 64 sinks and 256 recent tokens."""
    work = 0.5 + 0.5 * min(1.0, 2 * SPAN.kept(N) / N)
    run = lambda q, k, v, backend: attend(q, k, v, patterns=span_patterns(setting), backend=backend)
    for row in against_dense(setting, N, work, run):
        others = peers.spans(setting, N, SPAN.sinks, SPAN.recent) if N <= peers.FLEX_LIMIT else {}
        yield {"N": N, **row, **{f"vs_{name}": ms / row["ms"] for name, ms in others.items()}}


# -- selected blocks ---------------------------------------------------------------------------------------------------


def block_lists(setting: Setting, N: int, block: int, density: float, B: int = 1) -> Tensor:
    """(B,K,C,E): a share of the visible blocks of every query block, its own always, the others at random."""
    C = -(-N // block)
    scores, at = torch.rand(B, setting.kv_heads, C, C, device=setting.device), torch.arange(C, device=setting.device)
    scores = scores.masked_fill(at > at[:, None], -1.0)
    scores[..., at, at] = 2.0
    entries = max(1, math.ceil(C * density))
    top = scores.topk(entries, dim=-1).indices.int()
    wanted = (torch.arange(1, C + 1, device=setting.device) * density).ceil()[:, None]
    return torch.where(torch.arange(entries, device=setting.device) < wanted, top, -1).contiguous()


def block_gate(setting: Setting) -> dict[str, float]:
    """1000 tokens in blocks of 64, a quarter of the visible blocks; and single keys."""
    blocks = block_lists(setting, 1000, 64, 0.25, 2)
    found = gate_by(setting, 1000, selected=blocks, key_block=64, query_block=64)
    keys = block_lists(setting, 300, 1, 0.25, 2)
    return found | {f"keys_{name}": error for name, error in gate_by(setting, 300, selected=keys).items()}


def block_rows(setting: Setting, N: int) -> Iterator[Row]:
    """1/8 of the visible blocks of 32, 64 and 128; ideal = dense time times the share of block pairs that is read."""
    for block in (32, 64, 128):
        lists = block_lists(setting, N, block, 0.125)
        C = lists.shape[2]
        share = float((lists >= 0).sum() / (setting.kv_heads * C * (C + 1) / 2))
        options = {"selected": lists, "key_block": block, "query_block": block}
        run = lambda q, k, v, backend, options=options: attend(q, k, v, backend=backend, **options)
        for row in against_dense(setting, N, share, run):
            others = peers.blocks(setting, N, lists, block) if N <= peers.FLEX_LIMIT and block == 128 else {}
            named = {f"vs_{name}": ms / row["ms"] for name, ms in others.items()}
            yield {"N": N, "block": block, "share": share, "of_ideal": share * row["vs_dense"], **row, **named}


# -- decode ------------------------------------------------------------------------------------------------------------


def decode_groups(setting: Setting, N: int, B: int) -> tuple[KVGroup, ...]:
    """Half of the kv heads hold N tokens, the other half 320: what a cache of a half-streaming plan hands over."""
    groups = []
    for heads, S in ((range(1, setting.kv_heads, 2), N), (range(0, setting.kv_heads, 2), min(N, 320))):
        size = (B, len(heads), S, setting.head_dim)
        k, v = (torch.randn(size, device=setting.device, dtype=setting.dtype) for _ in range(2))
        positions = torch.arange(N - S, N, device=setting.device)[None, None]
        groups.append(KVGroup(tuple(heads), k, v, positions=positions, complete=True))
    return tuple(groups)


def decode_gate(setting: Setting) -> dict[str, float]:
    """One query of two rows over 1777 and 320 tokens."""
    groups = decode_groups(setting, 1777, 2)
    q = torch.randn(2, setting.heads, 1, setting.head_dim, device=setting.device, dtype=setting.dtype)
    options: Any = {"groups": groups, "offset": 1776}
    got, want = (attend(q, backend=backend, **options) for backend in (setting.own, "reference"))
    return {"out": measure.relative(got, want)}


def decode_rows(setting: Setting, N: int) -> Iterator[Row]:
    """A decode step over several layers with their own keys, against dense attention over N tokens in every head."""
    for B in (1, 4, 8) if setting.device == "cuda" else (1, 4):
        size = 4 * B * setting.kv_heads * N * setting.head_dim
        layers = max(2, min(8, int(8e9 / size)))
        kept = [decode_groups(setting, N, B) for _ in range(layers)]
        q = torch.randn(B, setting.heads, 1, setting.head_dim, device=setting.device, dtype=setting.dtype)
        whole = [setting.qkv(N, B)[1:] for _ in range(2)]
        run = lambda backend=setting.own, kept=kept, q=q: [
            attend(q, groups=g, offset=N - 1, backend=backend) for g in kept
        ]
        base = lambda q=q, whole=whole, n=layers: [_dense_decode(q, *whole[i % 2]) for i in range(n)]
        yield {"N": N, "B": B, **_decode_times(setting, run, base, kept, layers)}


def _dense_decode(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    from headwise.attention.sdpa import preferred_kernels

    with preferred_kernels(q):
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=q.shape[1] != k.shape[1])


def _decode_times(setting: Setting, run: Any, base: Any, kept: list, layers: int) -> Row:
    read = sum(t.numel() * t.element_size() for g in kept[0] for t in (g.k, g.v))
    with torch.no_grad():
        ms, dense_ms = setting.time(run) / layers, setting.time(base) / layers
        row: Row = {"layers": layers, "us": 1e3 * ms, "vs_dense": dense_ms / ms}
        if setting.own != "auto":
            row["vs_library"] = setting.time(lambda: run("sdpa")) / layers / ms
        best = ms
        if setting.device == "cuda":
            best, dense_graph = (measure.graph_milliseconds(f) / layers for f in (run, base))
            row |= {"graph_us": 1e3 * best, "vs_dense_in_graph": dense_graph / best}
    tbs = read / best / 1e9
    return row | {"tbs": tbs, "of_copy": setting.of_roof("copy_tbs", tbs)}


CASES = {
    case.name: case
    for case in (
        Case("attention", "routed queries: each head serves 75, 50 or 25 % of the tokens",
             (1024, 2048, 4096, 8192, 16384, 32768), (256, 1024), routed_gate, routed_rows),
        Case("spans", "half of the kv heads read 64 sinks and 256 recent tokens",
             (2048, 8192, 32768), (512, 2048), span_gate, span_rows),
        Case("blocks", "each query block reads 1/8 of the visible key blocks",
             (4096, 8192, 16384, 32768), (512, 1024), block_gate, block_rows),
        Case("decode", "one token; half of the kv heads hold everything, the others 320 tokens",
             (8192, 32768, 131072), (2048, 8192), decode_gate, decode_rows),
    )
}  # fmt: skip
