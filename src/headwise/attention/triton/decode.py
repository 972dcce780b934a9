"""Ragged decode: one to eight query tokens against a different number of keys in every (row, kv head)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from headwise.attention.triton import _host

MAX_QUERIES = 8
MAX_SEGMENTS = 8192


@dataclass(frozen=True)
class SplitPlan:
    """How the blocks of all (row, kv head) segments are shared by the programs; made once per step, used by every layer."""

    starts: Tensor  # (B*K+1,) int32: first block of each segment in the concatenation
    first: Tensor  # (P,) int32: segment in which each program begins
    share: Tensor  # (1,) int32: blocks a program works on
    programs: int
    block: int
    stages: int = 3  # depth of the load pipeline

    @property
    def segments(self) -> int:
        """Number of (row, kv head) pairs."""
        return self.starts.numel() - 1


@dataclass(frozen=True)
class Compensation:
    """One extra key/value per (row, kv head): logit + log_count. k_hat, v_hat (B,K,D); log_count (B,K), -inf = absent."""

    k_hat: Tensor
    v_hat: Tensor
    log_count: Tensor


def plan_splits(lengths: Tensor, *, block: int = 64, programs: int | None = None, stages: int = 3) -> SplitPlan:
    """Cut the work of lengths (B,K) int32 (valid slots, on the device) into equal shares; one small launch, no host sync.

    The number of programs is fixed (two a multiprocessor by default), so a CUDA graph that holds the plan and the
    decode stays right when the lengths change.
    """
    _host.require_triton()
    from headwise.attention.triton import _kernels_decode as kernels

    if lengths.dim() != 2 or lengths.dtype != torch.int32:
        raise ValueError(f"lengths must be an int32 tensor (B,K), got {lengths.dtype} {tuple(lengths.shape)}")
    B, K = lengths.shape
    segments = B * K
    if segments > MAX_SEGMENTS:
        raise ValueError(f"at most {MAX_SEGMENTS} (row, kv head) pairs in one call, got {segments}")
    if programs is None:
        programs = 4 if _host.interpreting() else 2 * _host.multiprocessors(lengths.device.index)
    starts, first, share = (
        torch.empty(n, dtype=torch.int32, device=lengths.device) for n in (segments + 1, programs, 1)
    )
    size = max(16, 1 << (segments - 1).bit_length())
    kernels.plan_decode[(1,)](
        lengths,
        starts,
        first,
        share,
        segments,
        programs,
        *lengths.stride(),
        K,
        BN=block,
        S=size,
        PP=max(1, min(64, 8192 // size)),
        num_warps=4 if size <= 1024 else 8,
    )
    return SplitPlan(starts, first, share, programs, block, stages)


def ragged_decode(
    q: Tensor,
    k_ptr: Tensor,
    v_ptr: Tensor,
    lengths: Tensor,
    *,
    k_stride: int | None = None,
    v_stride: int | None = None,
    scale: float | None = None,
    plan: SplitPlan | None = None,
    compensation: Compensation | None = None,
    causal_tail: bool = False,
    slot_positions: Tensor | None = None,
    query_positions: Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of a few query tokens over ragged key/value storages, split by total work. Forward only.

    Args:
        q: (B,H,Nq,D), Nq <= 8; head h reads kv head h // (H/K). float16, bfloat16 or float32.
        k_ptr, v_ptr: (B,K) int64 data pointers to rows of D contiguous elements of q's dtype, 16-byte aligned. The
            caller keeps the storages alive.
        lengths: (B,K) int32 valid slots, on the device. Slots [0, length) are read, in any order (ring buffers).
        k_stride, v_stride: elements from one slot to the next; D by default.
        plan: result of ``plan_splits`` for these lengths; made here when absent.
        compensation: an extra token per (row, kv head).
        causal_tail: the last Nq slots are the query tokens in order, and token i does not see the later ones.
        slot_positions: (B,K) int64 pointers to int32 positions of the slots; with ``query_positions`` (B,Nq) int32, a
            slot is visible when its position is not larger than the query's.
        return_lse: also return (B,H,Nq) float32, natural units.

    Returns:
        (B,H,Nq,D); a query without visible slots gives 0 and lse -inf.

    Limits: no backward; H/K * Nq <= 64; a new number of rows, heads or tokens compiles a new kernel.
    """
    _host.require_triton()
    from headwise.attention.triton import _kernels_decode as kernels

    B, H, NQ, D = q.shape
    K = k_ptr.shape[1]
    _check(q, k_ptr, v_ptr, lengths, slot_positions, query_positions)
    q = _host.last_dim_contiguous(q)
    G = H // K
    R = max(16, 1 << (G * NQ - 1).bit_length())
    plan = plan_splits(lengths) if plan is None else plan
    if plan.segments != B * K:
        raise ValueError(f"the plan is for {plan.segments} (row, kv head) pairs, the call has {B * K}")
    BD = _host.pad_head_dim(D)
    slots = plan.programs + plan.segments
    part_o = torch.empty(slots, R, BD, dtype=torch.float32, device=q.device)
    part_m, part_l = torch.empty(2, slots, R, dtype=torch.float32, device=q.device)
    out = torch.empty(B, H, NQ, D, dtype=q.dtype, device=q.device)
    lse = torch.empty(B, H, NQ, dtype=torch.float32, device=q.device)
    scale_log2 = _host.softmax_scale(scale, D) * _host.LOG2E
    wide = q.dtype == torch.float32 or D > 128  # shared memory then holds two stages only
    consts = dict(G=G, NQ=NQ, K=K, D=D, BD=BD, R=R)
    kernels.decode_partial[(plan.programs,)](
        q, k_ptr.contiguous(), v_ptr.contiguous(), lengths, plan.starts, plan.first, plan.share,
        slot_positions, query_positions, part_o, part_m, part_l,
        *q.stride()[:3], *lengths.stride(), k_stride or D, v_stride or D, scale_log2, plan.segments, plan.programs,
        BN=plan.block, CAUSAL=causal_tail and NQ > 1, POSITIONED=slot_positions is not None,
        PRECISION=_host.dot_precision(q.dtype), STAGES=min(plan.stages, 2) if wide else plan.stages, num_warps=4, **consts,
    )  # fmt: skip
    comp = (None,) * 3 if compensation is None else _compensation(compensation, B, K, D)
    kernels.decode_merge[(B * K, G * NQ)](
        q, part_o, part_m, part_l, plan.starts, plan.share, *comp, out, lse, *q.stride()[:3], scale_log2, H,
        PC=64 if BD <= 128 else 32, COMPENSATED=compensation is not None, num_warps=4, **consts,
    )  # fmt: skip
    return (out, lse) if return_lse else out


def ragged_decode_groups(
    q: Tensor,
    groups: Sequence[tuple[Sequence[int], Tensor, Tensor, Tensor | int]],
    **options,
) -> Tensor | tuple[Tensor, Tensor]:
    """``ragged_decode`` over groups of kv heads that share a storage.

    Args:
        q: (B,H,Nq,D).
        groups: (kv_head_indices, k (B,Kg,S,D), v (B,Kg,S,D), lengths (B,) int tensor or int) per group; together they
            name every kv head once. All groups need the same slot stride.
        options: passed on to ``ragged_decode`` (scale, plan, compensation, causal_tail, return_lse).
    """
    k_ptr, v_ptr, lengths = group_pointers(groups, q.shape[0], q.device)
    strides = {(k.stride(2), v.stride(2)) for _, k, v, _ in groups}
    if len(strides) != 1 or any(x.stride(-1) != 1 for _, k, v, _ in groups for x in (k, v)):
        raise ValueError(f"all groups need one slot stride and contiguous rows, got slot strides {sorted(strides)}")
    k_stride, v_stride = strides.pop()
    return ragged_decode(q, k_ptr, v_ptr, lengths, k_stride=k_stride, v_stride=v_stride, **options)


def group_pointers(groups, B: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Pointers k, v (B,K) int64 and lengths (B,K) int32 of groups; one host-to-device copy, so build once per cache."""
    K = sum(len(heads) for heads, *_ in groups)
    if sorted(h for heads, *_ in groups for h in heads) != list(range(K)):
        raise ValueError("the groups must name each of the kv heads 0..K-1 exactly once")
    k_table, v_table = [[0] * K for _ in range(B)], [[0] * K for _ in range(B)]
    lengths = torch.empty(B, K, dtype=torch.int32, device=device)
    for heads, k, v, length in groups:
        for table, x in ((k_table, k), (v_table, v)):
            for b in range(B):
                for g, h in enumerate(heads):
                    table[b][h] = x.data_ptr() + (b * x.stride(0) + g * x.stride(1)) * x.element_size()
        column = length.to(device, torch.int32)[:, None] if isinstance(length, Tensor) else length
        for h in heads:
            lengths[:, h : h + 1] = column
    tables = torch.tensor([k_table, v_table], dtype=torch.int64).to(device, non_blocking=True)
    return tables[0], tables[1], lengths


def _compensation(token: Compensation, B: int, K: int, D: int) -> tuple[Tensor, Tensor, Tensor]:
    """Contiguous (k_hat, v_hat, log_count) after a shape check."""
    shapes = tuple(x.shape for x in (token.k_hat, token.v_hat, token.log_count))
    if shapes != ((B, K, D), (B, K, D), (B, K)):
        raise ValueError(f"compensation must be k_hat, v_hat {(B, K, D)} and log_count {(B, K)}, got {shapes}")
    return token.k_hat.contiguous(), token.v_hat.contiguous(), token.log_count.contiguous()


def _check(q, k_ptr, v_ptr, lengths, slot_positions, query_positions) -> None:
    """Shapes and dtypes of the decode inputs."""
    B, H, NQ, D = q.shape
    K = k_ptr.shape[1]
    if not 1 <= NQ <= MAX_QUERIES:
        raise ValueError(f"ragged_decode takes 1 to {MAX_QUERIES} query tokens, got {NQ}")
    if H % K or H // K * NQ > 64:
        raise ValueError(f"query heads ({H}) must be a multiple of kv heads ({K}) and H/K * Nq at most 64")
    if q.dtype not in _host.DTYPES or D % 16 or D > _host.MAX_HEAD_DIM:
        raise ValueError(f"unsupported dtype {q.dtype} or head dim {D}")
    for name, x, dtype in (
        ("k_ptr", k_ptr, torch.int64),
        ("v_ptr", v_ptr, torch.int64),
        ("lengths", lengths, torch.int32),
    ):
        if x.shape != (B, K) or x.dtype != dtype or x.device != q.device:
            raise ValueError(f"{name} must be {dtype} (B,K) = {(B, K)} on {q.device}, got {x.dtype} {tuple(x.shape)}")
    if (slot_positions is None) != (query_positions is None):
        raise ValueError("slot_positions and query_positions come together")
    if query_positions is not None and (query_positions.shape != (B, NQ) or query_positions.dtype != torch.int32):
        raise ValueError(f"query_positions must be int32 (B,Nq) = {(B, NQ)}")
