"""Attention composed of `scaled_dot_product_attention` calls over groups of like heads: the CPU default.

A group that needs no mask is one fused call. A windowed prefill is cut into blocks of queries, each of which reads the
sinks and its own band of keys, so work and memory follow the window and not N x N. Where the log-sum-exp is needed
(compensation tokens, partial sums) a few rows at a time are computed directly.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from headwise.attention.groups import KVGroup, Queries, visible

MASK_ELEMENTS = 1 << 24  # no mask or logit block is larger than this many elements
BAND_ROWS = 256  # queries of one block of a windowed prefill


def attend(
    q: Tensor, group: KVGroup, queries: Queries, scale: float, *, need_lse: bool = False, dropout: float = 0.0
) -> tuple[Tensor, Tensor | None]:
    """The same function as `reference.attend`; `lse` is None unless asked for."""
    if need_lse or group.compensation is not None:
        return _direct(q, group, queries, scale)
    if group.complete and group.tail == 0 and queries.mask is None:
        return _fused(q, group.k, group.v, scale, dropout=dropout), None
    if _plain_causal(group, queries):
        return _fused(q, group.k, group.v, scale, dropout=dropout, is_causal=queries.count > 1), None
    if not dropout and past_and_chunk(group, queries) and not _needs_grad(q, group):
        found = _joined(q, group, scale)
        if found is not None:
            return found, None
    return _blocks(q, group, queries, scale, dropout), None


def _plain_causal(group: KVGroup, queries: Queries) -> bool:
    """A square causal triangle, or one query that sees everything: no mask tensor is needed."""
    whole = group.positions is None and group.k.shape[2] == queries.offset + queries.count
    reads_all = group.pattern.kept(group.k.shape[2]) == group.k.shape[2]
    square = queries.offset == 0 or queries.count == 1
    free = queries.mask is None and queries.start is None and group.selection is None
    return queries.causal and whole and reads_all and square and free


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


def _fused(q: Tensor, k: Tensor, v: Tensor, scale: float, *, dropout: float = 0.0, is_causal: bool = False) -> Tensor:
    with preferred_kernels(q):
        return F.scaled_dot_product_attention(
            q, k, v, dropout_p=dropout, is_causal=is_causal, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
        )


def preferred_kernels(q: Tensor) -> AbstractContextManager[None]:
    """On Hopper cuDNN is 1.7x faster than the default kernel; elsewhere PyTorch's own order is best.

    Not for one query: cuDNN plans anew, for some 40 ms on the host, whenever the keys have grown.
    """
    if q.is_cuda and torch.cuda.get_device_capability(q.device)[0] == 9 and q.dtype in (torch.float16, torch.bfloat16):
        order = [
            SDPBackend.CUDNN_ATTENTION,
            SDPBackend.FLASH_ATTENTION,
            SDPBackend.EFFICIENT_ATTENTION,
            SDPBackend.MATH,
        ]
        if q.ndim == 4 and q.shape[2] == 1:
            order[:2] = order[1], order[0]
        return sdpa_kernel(order, set_priority=True)
    return nullcontext()


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
        outs.append(_masked(q[:, :, begin:end], k, v, visible(group, part, slots), scale, dropout))
    return outs[0] if len(outs) == 1 else torch.cat(outs, dim=2)


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


def _masked(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, scale: float, dropout: float) -> Tensor:
    """One masked call. Rows that see nothing are let see everything and zeroed afterwards: no NaN can arise."""
    G = q.shape[1] // k.shape[1]
    if seen.shape[1] not in (1, q.shape[1]):
        seen = seen.repeat_interleave(G, dim=1)
    sighted = seen.any(dim=-1, keepdim=True)
    if G > 1 and q.is_cuda:  # fused CUDA kernels take a mask only without GQA
        k, v = k.repeat_interleave(G, dim=1), v.repeat_interleave(G, dim=1)
    out = F.scaled_dot_product_attention(
        q, k, v, attn_mask=seen | ~sighted, dropout_p=dropout, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
    )
    return torch.where(sighted, out, torch.zeros((), dtype=out.dtype, device=out.device))


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
