"""Attention composed of `scaled_dot_product_attention` calls over groups of like heads: the CPU default.

A group that needs no mask is one fused call. A windowed prefill is cut into blocks of queries, each of which reads the
sinks and its own band of keys, so work and memory follow the window and not N x N. Where the log-sum-exp is needed
(compensation tokens, partial sums) a few rows at a time are computed directly.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from headwise.attention.groups import KVGroup, Queries, numbered_by_column, visible
from headwise.plan import Pattern

MASK_ELEMENTS = 1 << 24  # no mask or logit block is larger than this many elements
BAND_ROWS = 256  # queries of one block of a windowed prefill
KEPT_ELEMENTS = 1 << 18  # a mask that is kept for the next call is not larger than this many elements


def attend(
    q: Tensor, group: KVGroup, queries: Queries, scale: float, *, need_lse: bool = False, dropout: float = 0.0
) -> tuple[Tensor, Tensor | None]:
    """The same function as `reference.attend`; `lse` is None unless asked for."""
    if need_lse or group.compensation is not None:
        return _direct(q, group, queries, scale)
    is_causal = one_call(group, queries)
    if is_causal is not None:
        return fused(q, group.k, group.v, scale, dropout=dropout, is_causal=is_causal), None
    if not dropout and past_and_chunk(group, queries) and not _needs_grad(q, group):
        found = _joined(q, group, scale)
        if found is not None:
            return found, None
    return _blocks(q, group, queries, scale, dropout), None


def one_call(group: KVGroup, queries: Queries) -> bool | None:
    """`is_causal` of the library call that serves a group without a mask tensor; None where one is needed.

    All slots that every query sees; without a causal rule; a square causal triangle, or one query that sees everything.
    """
    if group.complete and group.tail == 0 and queries.mask is None:
        return False
    if group.selection is not None or not numbered_by_column(group, queries):
        return None
    S = group.k.shape[2]
    if not queries.causal:
        return False if group.pattern.keeps_all else None
    whole = queries.offset + queries.count == S and group.pattern.kept(S) == S
    square = queries.offset == 0 or queries.count == 1
    return queries.count > 1 if whole and square else None


def past_and_chunk(group: KVGroup, queries: Queries) -> bool:
    """A chunk behind a past of which every query sees every slot; within the chunk, causality alone."""
    N, S = queries.count, group.k.shape[2]
    if not queries.causal or queries.mask is not None or queries.start is not None or group.selection is not None:
        return False
    if group.positions is not None:
        return group.complete and group.tail == N < S
    return group.pattern.kept(S) == S and queries.offset == S - N > 0


def _needs_grad(q: Tensor, group: KVGroup) -> bool:
    return torch.is_grad_enabled() and (q.requires_grad or group.k.requires_grad or group.v.requires_grad)


def _joined(q: Tensor, group: KVGroup, scale: float) -> Tensor | None:
    """The past by one fused call and the chunk's triangle by another, joined by their log-sum-exp; None where no kernel gives one."""
    past = group.k.shape[2] - q.shape[2]
    before = _with_lse(q, group.k[:, :, :past], group.v[:, :, :past], scale, is_causal=False)
    inside = _with_lse(q, group.k[:, :, past:], group.v[:, :, past:], scale, is_causal=True)
    if before is None or inside is None:
        return None
    share = torch.sigmoid(before[1] - inside[1])[..., None]
    return torch.lerp(inside[0].float(), before[0].float(), share).to(q.dtype)


def _with_lse(q: Tensor, k: Tensor, v: Tensor, scale: float, *, is_causal: bool) -> tuple[Tensor, Tensor] | None:
    """Output and log-sum-exp (B, H, N) of a library kernel, the fastest that takes the call; without gradients."""
    aten, (B, H, N, D) = torch.ops.aten, q.shape
    if not q.is_cuda:
        if q.device.type != "cpu" or v.shape[-1] != D:
            return None
        out, lse = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, is_causal, scale=scale)
        return out, lse
    backends = torch.backends.cuda
    params = backends.SDPAParams(q, k, v, None, 0.0, is_causal, k.shape[1] != H)
    if torch.cuda.get_device_capability(q.device)[0] == 9 and backends.can_use_cudnn_attention(params):
        out, lse, *_ = aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, is_causal, False, scale=scale)
    elif D % 8 == 0 and backends.can_use_flash_attention(params):
        out, lse, *_ = aten._scaled_dot_product_flash_attention(q, k, v, 0.0, is_causal, False, scale=scale)
    else:
        return None
    return out, lse.reshape(B, H, -1)[..., :N]


def fused(q: Tensor, k: Tensor, v: Tensor, scale: float, *, dropout: float = 0.0, is_causal: bool = False) -> Tensor:
    """One call of the library, by its fastest kernel here."""
    options: dict[str, Any] = {"dropout_p": dropout, "is_causal": is_causal, "scale": scale}
    options["enable_gqa"] = q.shape[1] != k.shape[1]
    if not q.is_cuda:
        return F.scaled_dot_product_attention(q, k, v, **options)
    with preferred_kernels(q):
        return F.scaled_dot_product_attention(q, k, v, **options)


def preferred_kernels(q: Tensor) -> AbstractContextManager[Any]:
    """On Hopper cuDNN is 1.7x faster than the default kernel; elsewhere PyTorch's own order is best.

    Not for one query: cuDNN plans anew, for some 40 ms on the host, whenever the keys have grown.
    """
    if not q.is_cuda or q.dtype not in (torch.float16, torch.bfloat16) or not _hopper(q.device.index):
        return nullcontext()
    first = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION]
    if q.ndim == 4 and q.shape[2] == 1:
        first.reverse()
    order = [*first, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    if torch.compiler.is_compiling() or not _Order.possible:
        return sdpa_kernel(order, set_priority=True)
    return _Order(order)


@functools.cache
def _hopper(index: int | None) -> bool:
    return torch.cuda.get_device_capability(index)[0] == 9


class _Order:
    """`sdpa_kernel(order, set_priority=True)` for a tenth of its time on the host, which is 18 µs.

    Only the order is set. Kernels that were switched off stay off, as `sdpa_kernel` would not leave them.
    """

    possible = hasattr(torch._C, "_get_sdp_priority_order") and hasattr(torch._C, "_set_sdp_priority_order")

    def __init__(self, first: Sequence[SDPBackend]) -> None:
        self.first = first

    def __enter__(self) -> None:
        self.before = torch._C._get_sdp_priority_order()
        first = [int(kernel) for kernel in self.first]  # type: ignore[call-overload]
        torch._C._set_sdp_priority_order(first + [kernel for kernel in self.before if kernel not in first])

    def __exit__(self, *raised: object) -> None:
        torch._C._set_sdp_priority_order(self.before)


def _blocks(q: Tensor, group: KVGroup, queries: Queries, scale: float, dropout: float) -> Tensor:
    """Blocks of queries, each with a mask over the keys that any of its rows can see."""
    S = group.k.shape[2]
    banded = _has_band(group, queries)
    rows = BAND_ROWS if banded else max(1, MASK_ELEMENTS // max(1, q.shape[0] * S))
    outs = []
    for begin in range(0, queries.count, rows):
        end = min(begin + rows, queries.count)
        part = queries.rows(begin, end)
        slots = _band(group, part, queries.offset + queries.count) if banded else None
        k, v = (group.k, group.v) if slots is None else (group.k[:, :, slots], group.v[:, :, slots])
        outs.append(_masked(q[:, :, begin:end], k, v, _sight(group, part, slots), scale, dropout))
    return outs[0] if len(outs) == 1 else torch.cat(outs, dim=2)


class Sight(NamedTuple):
    """Who sees whom, bool (B or 1, 1 or Kg or Hg, n, S): rows that see nothing see everything in `seen` and are False in `sighted`.

    `sighted` (…, n, 1) is None where every row is known to see something.
    """

    seen: Tensor
    sighted: Tensor | None


def _sight(group: KVGroup, part: Queries, slots: Tensor | None) -> Sight:
    """The mask of one block of queries; what follows from lengths alone, and is small, is made once and kept."""
    S, lists = group.k.shape[2], group.selection
    small = slots is None and part.count * S <= KEPT_ELEMENTS
    if small and part.causal and numbered_by_column(group, part) and not _in_passing(group.k):
        kept = _kept_sight(group.pattern, part.count, part.offset, S, group.k.device)
        if lists is None:
            return kept
        seen = kept.seen & lists.mask(part, S)
        seen = seen if kept.sighted is None else seen & kept.sighted
    else:
        seen = visible(group, part, slots)
    sighted = seen.any(dim=-1, keepdim=True)
    return Sight(seen | ~sighted, sighted)


def _in_passing(x: Tensor) -> bool:
    """Is memory that is made now somebody else's: a graph's that is being captured, a compiler's that traces?"""
    return torch.compiler.is_compiling() or (x.is_cuda and torch.cuda.is_current_stream_capturing())


@functools.lru_cache(maxsize=64)
def _kept_sight(pattern: Pattern, count: int, offset: int, S: int, device: torch.device) -> Sight:
    with torch.inference_mode(False):
        rows, columns = torch.arange(offset, offset + count, device=device), torch.arange(S, device=device)
        seen = pattern.reads(rows[:, None], columns)[None, None]
        sighted = seen.any(dim=-1, keepdim=True)
        return Sight(seen | ~sighted, None if bool(sighted.all()) else sighted)


def _has_band(group: KVGroup, queries: Queries) -> bool:
    """A window much shorter than the stretch of keys that stands in column order."""
    ordered = group.k.shape[2] if group.positions is None else group.tail
    return (
        queries.causal
        and not queries.packed
        and group.pattern.kept(queries.offset + queries.count) + BAND_ROWS < ordered
    )


def _band(group: KVGroup, part: Queries, columns: int) -> Tensor:
    """Slots that the rows of one block can see: what always shows, and the band of the widest window.

    `columns` counts all columns up to the newest one, which stands in the last slot.
    """
    S, device = group.k.shape[2], group.k.device
    end = part.offset + part.count  # one past the last visible column
    if group.positions is None:
        first_column, always = 0, group.pattern.sinks + (0 if part.start is None else int(part.start.max()))
    else:
        always = S - group.tail
        first_column = columns - S  # column of slot 0, were all slots in order
    low = part.offset - group.pattern.window(end) + 1 - first_column
    high = min(end - first_column, S)
    if low <= always:
        return torch.arange(high, device=device)
    return torch.cat([torch.arange(always, device=device), torch.arange(low, high, device=device)])


def _masked(q: Tensor, k: Tensor, v: Tensor, sight: Sight, scale: float, dropout: float) -> Tensor:
    """One masked call. Rows that see nothing are let see everything and zeroed afterwards: no NaN can arise."""
    G = q.shape[1] // k.shape[1]
    seen, sighted = (None if x is None else _by_query_head(x, q.shape[1], G) for x in sight)
    if G > 1 and q.is_cuda:  # fused CUDA kernels take a mask only without GQA
        k, v = k.repeat_interleave(G, dim=1), v.repeat_interleave(G, dim=1)
    grouped = q.shape[1] != k.shape[1]
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, dropout_p=dropout, scale=scale, enable_gqa=grouped)
    return out if sighted is None else torch.where(sighted, out, 0.0)


def _by_query_head(x: Tensor, H: int, G: int) -> Tensor:
    return x if x.shape[1] in (1, H) else x.repeat_interleave(G, dim=1)


def _direct(q: Tensor, group: KVGroup, queries: Queries, scale: float) -> tuple[Tensor, Tensor]:
    """Logits of a bounded number of rows at a time, with their log-sum-exp; what `reference.attend` writes at once."""
    B, Hg, N, D = q.shape
    S = group.k.shape[2]
    rows = max(1, MASK_ELEMENTS // max(1, B * Hg * S))
    outs, lses = [], []
    for begin in range(0, N, rows):
        end = min(begin + rows, N)
        out, lse = _direct_rows(q[:, :, begin:end], group, queries.rows(begin, end), scale)
        outs.append(out)
        lses.append(lse)
    if len(outs) == 1:
        return outs[0], lses[0]
    return torch.cat(outs, dim=2), torch.cat(lses, dim=2)


def _direct_rows(q: Tensor, group: KVGroup, queries: Queries, scale: float) -> tuple[Tensor, Tensor]:
    B, Hg, n, D = q.shape
    Kg = group.k.shape[1]
    G = Hg // Kg
    wide = torch.promote_types(q.dtype, torch.float32)
    q_rows = (q.to(wide) * scale).reshape(B, Kg, G * n, D)
    logits = q_rows @ group.k.to(wide).transpose(-1, -2)  # (B, Kg, G*n, S); half precision would round the logits
    if not (group.complete and group.tail == 0 and queries.mask is None):
        seen = visible(group, queries)[:, :, None].expand(B, Kg, G, n, -1).reshape(logits.shape)
        logits = logits.masked_fill(~seen, -torch.inf)
    lse = torch.logsumexp(logits, dim=-1)
    if group.compensation is not None:
        extra = (q_rows @ group.compensation.k.to(wide)[..., None])[..., 0]
        extra = extra + group.compensation.log_count.to(wide)[..., None]
        lse = torch.logaddexp(lse, extra)
    floor = lse.masked_fill(torch.isneginf(lse), 0.0)
    out = torch.exp(logits - floor[..., None]).to(group.v.dtype) @ group.v
    if group.compensation is not None:
        weight = torch.exp(extra - floor)[..., None].to(out.dtype)
        out = out + weight * group.compensation.v.to(out.dtype)[:, :, None]
    return out.reshape(B, Hg, n, -1).to(q.dtype), lse.reshape(B, Hg, n)
