"""The trained head router as a few kernels: what `TrainedLayer.gates` and the balance loss of the batch compute.

Composed of torch operations this is twenty launches of a forward pass and 58 of a training step in every layer, three of them
float32 products with a copy of the hidden state. Here it is two launches forward (one outside training) and three backward, with
float32 inside like the composed one, which stays the reference.

Letters: T tokens, C width, H = S + E heads, S shared, E of the pool, K chosen, U columns: the heads and two of α.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from headwise.route._losses import Scaling
from headwise.route._permute import kernels_work

MOST_COLUMNS = 64
SPLITS = 64  # parts of the tokens that the gradient of the weights is summed over


@dataclass(frozen=True)
class HeadRule:
    """What the kernels must know of a layer: S, E and K, how gates are scaled, and the balance loss (None: not wanted)."""

    shared: int
    pool: int
    routed: int
    official: bool = True
    balance: Scaling | None = None

    @property
    def columns(self) -> int:
        """Heads, and two of α where there are shared and routed ones."""
        return self.shared + self.pool + 2 * bool(self.shared and self.routed)


def fused_heads_work(x: Tensor, rule: HeadRule) -> bool:
    """Can the kernels do this? A layer with weights and at most 64 columns, on CUDA (or in Triton's interpreter)."""
    fits = rule.columns <= MOST_COLUMNS and (rule.routed > 0 or rule.shared > 1)
    return fits and x.numel() > 0 and kernels_work(x)


def fused_heads(
    x: Tensor,
    W_r: Tensor | None,
    W_s: Tensor | None,
    W_h: Tensor | None,
    rule: HeadRule,
    place: Tensor,
    real: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Gates (T, H) in head order, float32, and the balance loss where it is wanted; both with gradients, once.

    x (T, C). W_r (E, C) with K > 0, W_s (S, C) with S > 1, W_h (2, C) with both. place (H,): numbers of the shared heads, then
    of the pool's, ascending. real (T,) bool leaves padding out of the loss.
    """
    given = (x, W_r, W_s, W_h)
    keep = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in given)
    gates, balance = _HeadGates.apply(*given, rule, place, real if rule.balance else None, keep)
    return gates, balance


class _HeadGates(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        W_r: Tensor | None,
        W_s: Tensor | None,
        W_h: Tensor | None,
        rule: HeadRule,
        place: Tensor,
        real: Tensor | None,
        keep: bool,
    ) -> tuple[Tensor, Tensor | None]:
        from headwise.route import _fused_heads_kernels as kernels

        x = x.contiguous()
        W_r, W_s, W_h = (None if W is None else W.contiguous() for W in (W_r, W_s, W_h))
        real = None if real is None else real.contiguous().view(torch.uint8)
        (T, C), S, E = x.shape, rule.shared, rule.pool
        EP, BM = _tile(rule.columns)
        blocks = -(-T // BM)
        gates = torch.empty(T, S + E, device=x.device)
        saved = torch.empty(T, rule.columns, device=x.device) if keep else None
        partial = torch.empty(blocks, 2 * EP + 1, device=x.device) if rule.balance else None
        kernels.head_gates[(blocks,)](
            x, W_s, W_r, W_h, place, real, gates, saved, partial, T, C, S, E, rule.routed,
            EP=EP, BM=BM, BK=64, SHARED=S > 0, ROUTED=rule.routed > 0, OFFICIAL=rule.official,
            MASKED=real is not None, BALANCE=partial is not None, SAVE=saved is not None,
        )  # fmt: skip
        balance = slope = None
        if partial is not None:
            balance, slope = torch.empty((), device=x.device), torch.empty(EP, device=x.device)
            kernels.finish[(1,)](partial, balance, slope, blocks, E, EP=EP, BR=64, SCALING=rule.balance)
        ctx.save_for_backward(x, W_r, W_s, W_h, place, real, saved, slope)
        ctx.rule = rule
        ctx.set_materialize_grads(False)
        return gates, balance

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gates: Tensor | None, balance: Tensor | None) -> tuple[Tensor | None, ...]:
        from headwise.route import _fused_heads_kernels as kernels

        x, W_r, W_s, W_h, place, real, saved, slope = ctx.saved_tensors
        rule: HeadRule = ctx.rule
        (T, C), S, E, U = x.shape, rule.shared, rule.pool, rule.columns
        EP, BM = _tile(U)
        gates = None if gates is None else gates.contiguous()
        dl = torch.empty(T, U, device=x.device)
        dx = torch.empty_like(x) if ctx.needs_input_grad[0] else None
        kernels.head_gradients[(-(-T // BM),)](
            saved, W_s, W_r, W_h, place, real, slope, gates, balance, dl, dx, T, C, S, E, rule.routed,
            EP=EP, BM=BM, BK=64, SHARED=S > 0, ROUTED=rule.routed > 0, OFFICIAL=rule.official,
            MASKED=real is not None, GATES=gates is not None, BALANCE=balance is not None, X=dx is not None,
        )  # fmt: skip
        if not any(ctx.needs_input_grad[1:4]):
            return dx, *[None] * 7
        splits = min(SPLITS, -(-T // BM))
        partial = torch.empty(splits, U, C, device=x.device)
        kernels.head_weight_gradient[(-(-C // 64), splits)](
            dl, x, partial, T, C, U, -(-T // splits), EP=EP, BM=BM, BK=64
        )
        parts = partial.sum(0).split([S, E, U - S - E])
        grads = [
            parts[part].to(W.dtype) if W is not None and needed else None
            for W, part, needed in zip((W_r, W_s, W_h), (1, 0, 2), ctx.needs_input_grad[1:4], strict=True)
        ]
        return dx, *grads, *[None] * 4


def _tile(columns: int) -> tuple[int, int]:
    """Columns up to a power of two that a matmul takes, and tokens of a tile."""
    EP = max(16, 1 << (columns - 1).bit_length())
    return EP, 64 if EP <= 32 else 32
