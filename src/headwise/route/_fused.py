"""A router that is top-k of softmax(W x), as a few kernels: what a `SoftmaxTopK` computes, with two losses that cost nothing more.

    l = W x,   p = softmax(l),   the k best,   w = p or p / Σ p of the kept, times `scale`
    balance = E / Σ f · Σ_e f_e P_e  ("unit" scaling over the batch),   z = mean logsumexp(l)²

Composed of torch operations a routing with both losses is about a hundred launches, forward and backward, on tensors of a few
thousand numbers: the host takes longer than the layer that is routed. Here it is two launches forward and three backward,
in float32 like the composed one, which stays the reference.

Letters: T tokens, C width, E units, k slots.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from headwise.attach.gates import GateRule
from headwise.route._permute import kernels_work

MOST_UNITS, MOST_SLOTS = 64, 8
SPLITS = 64  # parts of the tokens that the gradient of W is summed over


class Fused(NamedTuple):
    """What `fused_choice` gives: (T, k) index and weight, (T, E) probs and logits; balance, z and `good` are scalars."""

    index: Tensor  # type: ignore[assignment]  # hides tuple.index on purpose
    weight: Tensor
    probs: Tensor
    logits: Tensor
    balance: Tensor
    z: Tensor
    good: Tensor  # 1.0 if all logits are finite


def fused_works(x: Tensor, W: Tensor, gate: GateRule) -> bool:
    """Can the kernels do this? Softmax scores without groups, at most 64 units and 8 slots, on CUDA."""
    plain = gate.score == "softmax" and gate.groups == 1
    return plain and len(W) <= MOST_UNITS and gate.k <= MOST_SLOTS and x.numel() > 0 and kernels_work(x)


def fused_choice(x: Tensor, W: Tensor, gate: GateRule, real: Tensor | None = None) -> Fused:
    """Route x (T, C) by W (E, C); `real` (T,) bool leaves padding out of the losses."""
    gate.check(len(W))
    return Fused(*_Choice.apply(x, W, gate, real))


class _Choice(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, W: Tensor, gate: GateRule, real: Tensor | None) -> tuple[Tensor, ...]:
        from headwise.route import _fused_kernels as kernels

        x, W = x.contiguous(), W.contiguous()
        real = None if real is None else real.contiguous().view(torch.uint8)
        (T, C), E, k = x.shape, len(W), gate.k
        EP, BM = _units(E)
        blocks = -(-T // BM)
        logits, probs = (torch.empty(T, E, device=x.device) for _ in range(2))
        weight, index = torch.empty(T, k, device=x.device), torch.empty(T, k, dtype=torch.long, device=x.device)
        lse, partial = torch.empty(T, device=x.device), torch.empty(blocks, 2 * EP + 3, device=x.device)
        numbers, slope = torch.empty(4, device=x.device), torch.empty(EP, device=x.device)
        kernels.choose[(blocks,)](
            x, W, real, logits, probs, lse, index, weight, partial, T, C, E, gate.scale,
            K=k, KP=_power(k), EP=EP, BM=BM, BK=64, RENORM=gate.renorm, MASKED=real is not None,
        )  # fmt: skip
        kernels.finish[(1,)](partial, numbers, slope, blocks, E, EP=EP, BR=64)
        ctx.save_for_backward(x, W, real, probs, lse, index, weight, numbers, slope)
        ctx.gate = gate
        balance, z, _, good = numbers.unbind()
        ctx.mark_non_differentiable(index, good)
        ctx.set_materialize_grads(False)
        return index, weight, probs, logits, balance, z, good

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: Any, *grads: Tensor | None) -> tuple[Tensor | None, Tensor | None, None, None]:
        from headwise.route import _fused_kernels as kernels

        x, W, real, probs, lse, index, weight, numbers, slope = ctx.saved_tensors
        gw, gp, gl, balance, z = (None if g is None else g.contiguous() for g in grads[:5])
        (T, C), E = x.shape, len(W)
        EP, BM = _units(E)
        dl = torch.empty(T, E, device=x.device)
        dx = torch.empty_like(x) if ctx.needs_input_grad[0] else None
        kernels.gradients[(-(-T // BM),)](
            probs, lse, index, weight, W, real, slope, numbers, gw, gp, gl, balance, z, dl, dx, T, C, E, ctx.gate.scale,
            K=ctx.gate.k, EP=EP, BM=BM, BK=64, RENORM=ctx.gate.renorm, MASKED=real is not None, WEIGHT=gw is not None,
            PROBS=gp is not None, LOGITS=gl is not None, BALANCE=balance is not None, Z=z is not None, X=dx is not None,
        )  # fmt: skip
        if not ctx.needs_input_grad[1]:
            return dx, None, None, None
        splits = min(SPLITS, -(-T // BM))
        partial = torch.empty(splits, E, C, device=x.device)
        kernels.weight_gradient[(-(-C // 64), splits)](dl, x, partial, T, C, E, -(-T // splits), EP=EP, BM=BM, BK=64)
        return dx, partial.sum(0).to(W.dtype), None, None


def _units(E: int) -> tuple[int, int]:
    """Units up to a power of two that a matmul takes, and tokens of a tile."""
    EP = max(16, _power(E))
    return EP, 64 if EP <= 32 else 32


def _power(size: int) -> int:
    return 1 << max(size - 1, 0).bit_length()
