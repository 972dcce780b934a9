"""The op's own kernels as a backend: routed queries, windows, ragged decode, on CUDA, where no library has the shape."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from headwise.attention import crossover, sdpa
from headwise.attention.backends import Request, over_groups
from headwise.attention.groups import Compensation, KVGroup, Queries, Table
from headwise.plan import Pattern, SinkWindow

if TYPE_CHECKING:
    from headwise.attention.triton import Compensation as Tokens
    from headwise.attention.triton import SplitPlan

HEAD_DIMS = range(16, 257, 16)
CHUNK = 64  # queries from which a chunk behind its past, or behind a window, goes to our kernel


class Own:
    """Triton kernels of `attention.triton`. One of five forms serves a request, or none."""

    name = "triton"

    def refuse(self, request: Request) -> str | None:
        """Why no kernel of ours fits; None if one does."""
        why_not = unable(request.q)
        if why_not is not None or request.table is not None:
            return why_not
        q, first = request.q, request.groups[0]
        if first.v.shape[-1] != q.shape[-1] or request.dropout or request.queries.mask is not None:
            return "it takes no dropout, no mask of the model's own and no other head dim of the values"
        return (
            None
            if self._form(request)
            else "the call is neither routed, nor windowed, nor a decode step, nor a chunk behind its past"
        )

    def prefer(self, request: Request) -> str | None:
        """Only above the sizes from which it wins, by this device's table."""
        form, tokens = self._form(request), request.queries.count
        if form == "selected":
            return "lists of selected keys, which no library reads"
        table = crossover.lookup(crossover.device_name(request.q.device), request.q.dtype, request.q.shape[-1])
        if form == "chunk":
            return f"{tokens} tokens behind their past: libraries take a mask or plan anew for every length"
        if form in ("routed", "windowed"):
            in_graph = torch.cuda.is_current_stream_capturing()
            least = table.prefill(form, backward=request.needs_grad, in_graph=in_graph)
            return f"{form}, {tokens} tokens; it wins from {least} on" if tokens >= least else None
        kept = sum(g.k.shape[0] * g.k.shape[1] * g.k.shape[2] for g in request.groups)
        if form == "decode" and kept >= table.decode:
            return f"one query over {kept} kept tokens in ragged storage"
        return None

    def run(self, request: Request) -> tuple[Tensor, Tensor | None]:
        """By form."""
        if request.table is not None:
            return _by_table(request, request.table)
        form = self._form(request)
        if form == "routed":
            return _routed(request)
        if form == "decode":
            return _decode(request)
        if form == "selected":
            return _selected(request)
        if form == "windowed" and request.whole is not None:
            return _spans(request)
        return over_groups(_windowed if not request.need_lse else _windowed_lse, request)

    def _form(self, request: Request) -> str | None:
        """Which form serves the request, found once a call."""
        if "form" not in request.notes:
            request.notes["form"] = self._find_form(request)
        return request.notes["form"]

    def _find_form(self, request: Request) -> str | None:
        queries, groups = request.queries, request.groups
        if request.selected:
            return "selected" if _listed_alone(request) else None
        if queries.packed:
            return None
        if request.active is not None:
            dense = len(groups) == 1 and groups[0].positions is None and groups[0].pattern.keeps_all
            return "routed" if dense and not request.compensated else None
        if not queries.causal:
            return None
        if queries.count == 1 and queries.start is None and not request.needs_grad:
            return "decode" if all(_readable_whole(g, queries) for g in groups) else None
        kinds = {type(g.pattern) for g in groups if not g.pattern.keeps_all}
        if kinds == {SinkWindow} and not request.compensated and all(g.positions is None for g in groups):
            return "windowed"
        ours = (_behind(g, queries, request.q) or (g.in_order and _window(g, queries)) for g in groups)
        return "chunk" if any(ours) else None


def unable(x: Tensor) -> str | None:
    """Why no kernel of ours takes tensors like x (…, D); None if they do."""
    if not x.is_cuda:
        return f"it needs CUDA tensors, these are on {x.device}"
    if not _installed():
        return "triton is not installed"
    if x.dtype not in (torch.float16, torch.bfloat16, torch.float32) or x.shape[-1] not in HEAD_DIMS:
        return f"it has no {x.dtype} kernel for head dim {x.shape[-1]}"
    return None


def _installed() -> bool:
    from headwise.attention.triton import _host

    return _host.triton_available()


def _hopper(q: Tensor) -> bool:
    from headwise.attention.triton import _rows

    return _rows.use_hopper(q)


def _readable_whole(group: KVGroup, queries: Queries) -> bool:
    """Does the one query see every slot?"""
    S = group.k.shape[2]
    in_order = group.positions is None and queries.offset + 1 == S and group.pattern.kept(S) == S
    strides = group.k.stride(-1) == 1 and group.k.stride(2) == group.v.stride(2) == group.k.shape[-1]
    return ((group.complete and group.tail == 0) or in_order) and strides


def _behind(group: KVGroup, queries: Queries, q: Tensor) -> bool:
    """A chunk behind a past that every query sees whole, where our kernel is faster than the library's two calls."""
    long = queries.count >= CHUNK and group.compensation is None
    return long and sdpa.past_and_chunk(group, queries) and _hopper(q)


def _window(group: KVGroup, queries: Queries) -> bool:
    """Sinks and a window in dense keys, or a chunk of them behind what a cache holds in order."""
    ordered = group.positions is None or (group.in_order and queries.count >= CHUNK)
    return isinstance(group.pattern, SinkWindow) and ordered and group.compensation is None


def _routed(request: Request) -> tuple[Tensor, Tensor | None]:
    from headwise.attention.triton import routed_attention

    group, start = request.groups[0], request.queries.start
    assert request.active is not None
    found = routed_attention(
        request.q,
        group.k,
        group.v,
        request.active,
        gate=request.gate,
        causal=request.queries.causal,
        scale=request.scale,
        key_start=None if start is None else start.to(torch.int32),
        return_lse=request.need_lse,
    )
    return found if isinstance(found, tuple) else (found, None)


def _listed_alone(request: Request) -> bool:
    """One dense group whose lists are the whole rule beside causality and the rows' starts."""
    group, queries = request.groups[0], request.queries
    whole = len(request.groups) == 1 and group.pattern.keeps_all and queries.offset + queries.count == group.k.shape[2]
    key_block = 0 if group.selection is None else group.selection.key_block
    return whole and request.active is None and not request.compensated and key_block in (1, 2, 4, 8, 16, 32, 64, 128)


def _selected(request: Request) -> tuple[Tensor, Tensor | None]:
    """Lists of blocks by the block kernel; lists of single queries, and packed or padded rows, by the key kernel."""
    from headwise.attention.triton import block_attention, key_attention

    (group,), queries, q = request.groups, request.queries, request.q
    lists, start = group.selection, queries.start
    assert lists is not None
    options: dict = {"causal": queries.causal, "scale": request.scale, "return_lse": request.need_lse}
    if start is None and lists.key_block == lists.query_block >= 16:
        found = block_attention(q, group.k, group.v, lists.index, block_size=lists.key_block, **options)
    else:
        first = None if start is None else (start if queries.packed else start[:, None].expand(-1, queries.count))
        options["first"] = None if first is None else first.to(torch.int32)
        found = key_attention(q, group.k, group.v, lists.by_query(queries.count), key_block=lists.key_block, **options)
    out, lse = found if isinstance(found, tuple) else (found, None)
    return (out if request.gate is None else out * request.gate[..., None].to(out.dtype)), lse


def _by_table(request: Request, table: Table) -> tuple[Tensor, Tensor | None]:
    from headwise.attention.triton import Compensation as Tokens
    from headwise.attention.triton import ragged_decode

    extra = table.compensation
    found = ragged_decode(
        request.q,
        table.k_ptr,
        table.v_ptr,
        table.filled,
        scale=request.scale,
        plan=table.splits,
        compensation=None if extra is None else Tokens(extra.k, extra.v, extra.log_count),
        return_lse=request.need_lse,
    )
    out, lse = found if isinstance(found, tuple) else (found, None)
    return (out if request.gate is None else out * request.gate[..., None].to(out.dtype)), lse


def _decode(request: Request) -> tuple[Tensor, Tensor | None]:
    from headwise.attention.triton import ragged_decode

    groups, B, device = request.groups, request.q.shape[0], request.q.device
    places = tuple((g.heads, *_address(g.k), *_address(g.v)) for g in groups)
    k_ptr, v_ptr = _pointers(places, B, request.q.element_size(), device)
    lengths, plan = _work(tuple((g.heads, g.k.shape[2]) for g in groups), B, device)
    found = ragged_decode(
        request.q,
        k_ptr,
        v_ptr,
        lengths,
        scale=request.scale,
        plan=plan,
        compensation=_all_compensations(request) if request.compensated else None,
        return_lse=request.need_lse,
    )
    out, lse = found if isinstance(found, tuple) else (found, None)
    return (out if request.gate is None else out * request.gate[..., None].to(out.dtype)), lse


def _address(x: Tensor) -> tuple[int, int, int]:
    """Where a storage (B, Kg, S, D) begins, and the elements between its rows and between its heads."""
    return x.data_ptr(), x.stride(0), x.stride(1)


@functools.lru_cache(maxsize=4096)
def _pointers(places: tuple, B: int, size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Data pointers of keys and values by (row, kv head), (B, K) int64 on the device.

    A function of the addresses alone, so a table can be kept; storages stay where they are for many steps.
    """
    K = sum(len(heads) for heads, *_ in places)
    tables = [[[0] * K for _ in range(B)] for _ in range(2)]
    for heads, *addresses in places:
        for table, (base, row, head) in zip(tables, (addresses[:3], addresses[3:]), strict=True):
            for b in range(B):
                for place, h in enumerate(heads):
                    table[b][h] = base + (b * row + place * head) * size
    both = torch.tensor(tables, dtype=torch.int64).to(device, non_blocking=True)
    return both[0], both[1]


@functools.lru_cache(maxsize=256)
def _work(slots: tuple, B: int, device: torch.device) -> tuple[Tensor, SplitPlan]:
    """Slots by (row, kv head), (B, K) int32 on the device, and their even split; layers of the same structure share both."""
    from headwise.attention.triton import plan_splits

    by_head = sorted((h, count) for heads, count in slots for h in heads)
    lengths = torch.tensor([[count for _, count in by_head]] * B, dtype=torch.int32).to(device, non_blocking=True)
    return lengths, plan_splits(lengths)


def _all_compensations(request: Request) -> Tokens:
    """Tokens of all kv heads in order, log count -inf where a group has none."""
    from headwise.attention.triton import Compensation as Tokens

    B, K, D = request.q.shape[0], request.kv_heads, request.q.shape[-1]
    k_hat, v_hat = request.q.new_zeros(2, B, K, D, dtype=torch.float32)
    log_count = request.q.new_full((B, K), -torch.inf, dtype=torch.float32)
    for group in request.groups:
        if isinstance(group.compensation, Compensation):
            heads = list(group.heads)
            k_hat[:, heads], v_hat[:, heads] = group.compensation.k.float(), group.compensation.v.float()
            log_count[:, heads] = group.compensation.log_count
    return Tokens(k_hat, v_hat, log_count)


def _spans(request: Request) -> tuple[Tensor, Tensor | None]:
    """All heads by one launch, where the keys were given whole: full heads are windows as long as the text."""
    from headwise.attention.triton import span_attention

    assert request.whole is not None
    (k, v), start = request.whole, request.queries.start
    by_head = {h: g.pattern for g in request.groups for h in g.heads}
    spans = [_sinks_and_window(by_head[h], k.shape[2]) for h in range(k.shape[1])]
    found = span_attention(
        request.q,
        k,
        v,
        [sinks for sinks, _ in spans],
        [window for _, window in spans],
        scale=request.scale,
        key_start=None if start is None else start.to(torch.int32),
        return_lse=request.need_lse,
    )
    out, lse = found if isinstance(found, tuple) else (found, None)
    return (out if request.gate is None else out * request.gate[..., None].to(out.dtype)), lse


def _sinks_and_window(pattern: Pattern, M: int) -> tuple[int, int]:
    return (pattern.sinks, pattern.recent) if isinstance(pattern, SinkWindow) else (0, M)


def _windowed(q: Tensor, group: KVGroup, queries: Queries, scale: float) -> tuple[Tensor, Tensor | None]:
    return _span(q, group, queries, scale, need_lse=False)


def _windowed_lse(q: Tensor, group: KVGroup, queries: Queries, scale: float) -> tuple[Tensor, Tensor | None]:
    return _span(q, group, queries, scale, need_lse=True)


def _span(q: Tensor, group: KVGroup, queries: Queries, scale: float, *, need_lse: bool) -> tuple[Tensor, Tensor | None]:
    """Windows and chunks behind their past by our kernel, other heads by the library's."""
    behind = _behind(group, queries, q)
    if not behind and not _window(group, queries):
        return sdpa.attend(q, group, queries, scale, need_lse=need_lse)
    from headwise.attention.triton import span_attention

    Kg = group.k.shape[1]
    start = None if queries.start is None else queries.start.to(torch.int32)
    sinks, window = (0, group.k.shape[2]) if behind else _sinks_and_window(group.pattern, group.k.shape[2])
    found = span_attention(
        q,
        group.k,
        group.v,
        [sinks] * Kg,
        [window] * Kg,
        scale=scale,
        key_start=start,
        return_lse=need_lse,
    )
    return found if isinstance(found, tuple) else (found, None)
