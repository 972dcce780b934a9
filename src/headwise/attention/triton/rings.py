"""Decode steps that a device can take without the host: rings of slots, moved on and written to by one launch each."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from headwise.attention.triton import _host
from headwise.attention.triton.decode import MAX_SEGMENTS, SplitPlan


@dataclass(frozen=True)
class Counters:
    """The rings of all layers: int32 (L, B, K) each but `position` (B,), the position of the newest token of each row.

    The next token goes to slot `at`; behind slot `limit` - 1 follows `wrap`; `filled` slots are held; `slot` is where the newest
    token stands, and `gone` is 1 where another left for it. `splits` has one plan a layer, right for `filled`.
    """

    at: Tensor
    filled: Tensor
    wrap: Tensor
    limit: Tensor
    slot: Tensor
    gone: Tensor
    position: Tensor
    starts: Tensor  # (L, B*K+1)
    first: Tensor  # (L, P)
    share: Tensor  # (L, 1)
    block: int = 64

    @classmethod
    def of(cls, at: Tensor, filled: Tensor, wrap: Tensor, limit: Tensor, position: Tensor) -> Counters:
        """With room for what the kernels find."""
        L, B, K = at.shape
        if B * K > MAX_SEGMENTS:
            raise ValueError(f"at most {MAX_SEGMENTS} (row, kv head) pairs in one step, got {B * K}")
        programs = 4 if _host.interpreting() else 2 * _host.multiprocessors(at.device.index)
        starts, first, share = (at.new_empty(shape) for shape in ((L, B * K + 1), (L, programs), (L, 1)))
        slot, gone = torch.zeros_like(at), torch.zeros_like(at)
        return cls(at, filled, wrap, limit, slot, gone, position, starts, first, share)

    def splits(self, layer: int) -> SplitPlan:
        """The split of one layer's work, as views."""
        return SplitPlan(self.starts[layer], self.first[layer], self.share[layer], self.first.shape[1], self.block)


def advance(rings: Counters) -> None:
    """One token further, in all layers: one launch, no host synchronisation."""
    _host.require_triton()
    from headwise.attention.triton import _kernels_steps as kernels

    L, B, K = rings.at.shape
    size = max(16, 1 << (B * K - 1).bit_length())
    kernels.advance_rings[(L,)](
        rings.at, rings.filled, rings.wrap, rings.limit, rings.slot, rings.gone, rings.position, rings.starts, rings.first, rings.share,
        B * K, rings.first.shape[1], B,
        BN=rings.block, S=size, PP=max(1, min(64, 8192 // size)), SB=max(2, 1 << (B - 1).bit_length()),
        num_warps=4 if size <= 1024 else 8,
    )  # fmt: skip


def write(
    k: Tensor,
    v: Tensor,
    k_ptr: Tensor,
    v_ptr: Tensor,
    positions: Tensor,
    slot: Tensor,
    gone: Tensor,
    position: Tensor,
    means=None,
) -> None:
    """New keys and values (B, K, 1, D) into the slots of one layer, and their positions (pointers (B, K) int64, 0: none).

    `means` (`headwise.steps.Means`): what leaves a ring for them is added to its mean first.
    """
    _host.require_triton()
    from headwise.attention.triton import _kernels_steps as kernels

    B, K, _, D = k.shape
    k, v = _host.last_dim_contiguous(k), _host.last_dim_contiguous(v)
    kernels.write_rings[(B * K,)](
        k, v, k_ptr, v_ptr, positions, slot, gone, position, *(means or (None,) * 5), *k.stride()[:2], *v.stride()[:2],
        K=K, D=D, BD=_host.pad_head_dim(D), FOLD=means is not None, num_warps=1,
    )  # fmt: skip
