"""MoA's influence profile: what the loss would change by, to first order, if a key were taken from a row of attention.

Letters: L layers, B batch, H query heads, K kv heads, G = H/K, N tokens, n rows of one block, D head dim, b tokens of a block,
c = N/b blocks.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from headwise.attach import HeadCall
from headwise.errors import AttachError

ROWS = 1 << 22  # entries of attention that are in memory at a time, whatever the length


def influence_rows(q: Tensor, k: Tensor, v: Tensor, out: Tensor, grad: Tensor, first: int, scale: float) -> Tensor:
    """First-order loss change (B, H, n, N) of taking key j from row i = first + 0..n-1 and renormalising what remains.

    Taking j away changes the row by dA_ij = -A_ij and dA_ik = A_ik A_ij / (1 - A_ij), so with g = dL/dA = grad · v

        dL_ij = -A_ij (g_ij - sum_k A_ik g_ik) / (1 - A_ij + eps),          sum_k A_ik g_ik = grad_i · out_i.

    Row 0 has one key alone and nothing to renormalise: dL_00 = -g_00. Signed, in float32, 0 for keys behind the row.

    q, out, grad (B, H, n, D) are the rows alone; k, v (B, K, N, D) all keys. Query heads share the keys of their group as they are.
    """
    B, H, n, _ = q.shape
    K, N = k.shape[1:3]
    q, out, grad = (x.float().reshape(B, K, -1, x.shape[-1]) for x in (q, out, grad))  # (B, K, G·n, D)
    logits = ((q * scale) @ k.float().mT).view(B, K, -1, n, N)
    rows = torch.arange(first, first + n, device=q.device)[:, None]
    behind = torch.arange(N, device=q.device) > rows  # (n, N)
    probs = logits.masked_fill(behind, -torch.inf).softmax(-1)
    g = (grad @ v.float().mT).view_as(probs)
    mean = (grad * out).sum(-1).view(B, K, -1, n, 1)
    mean = torch.where(rows > 0, mean, 0.0)
    rest = torch.where(rows > 0, 1 - probs + torch.finfo(torch.float32).eps, 1.0)
    return (-probs * (g - mean) / rest).view(B, H, n, N)


def influence_blocks(q: Tensor, k: Tensor, v: Tensor, out: Tensor, grad: Tensor, *, block: int, scale: float) -> Tensor:
    """Sums of |dL| over b × b blocks, (H, c, c) float32 on the CPU, mean over the rows of the batch; N is a multiple of b.

    q, out, grad (B, H, N, D), k, v (B, K, N, D). A few rows of blocks at a time: no N × N matrix is made.
    """
    B, H, N, _ = q.shape
    c = N // block
    sums = torch.zeros(H, c, c, device=q.device)
    step = max(1, ROWS // (B * H * N * block)) * block
    for first in range(0, N, step):
        rows = slice(first, min(first + step, N))
        seen = rows.stop  # keys behind the last row of these have no influence
        part = influence_rows(
            q[:, :, rows], k[:, :, :seen], v[:, :, :seen], out[:, :, rows], grad[:, :, rows], first, scale
        )
        blocks = part.abs().view(B, H, -1, block, seen // block, block).sum(dim=(3, 5)).mean(0)
        sums[:, first // block : rows.stop // block, : seen // block] = blocks
    return sums.cpu()


class InfluenceProbe:
    """A transform for `attach` that leaves the outputs alone and, in the backward pass, fills `blocks` (L, H, c, c).

    Each layer's map is made when its gradient arrives and nothing of it is kept but the sums.
    """

    def __init__(self, layers: int, block: int):
        self.block = block
        self.blocks: list[Tensor | None] = [None] * layers

    def __call__(self, call: HeadCall, attend: Callable[[], Tensor]) -> Tensor:
        """The layer's own output (B, N, H, D), with a hook on its gradient."""
        call.need_expressible("an influence profile")
        if call.start is not None or not call.causal or call.past:
            raise AttachError("an influence profile reads whole causal rows without padding, in one pass")
        out = attend()
        q, k, v, kept = call.q.detach(), call.k.detach(), call.v.detach(), out.detach()

        def fill(grad: Tensor) -> None:
            rows = {"out": kept.transpose(1, 2), "grad": grad.transpose(1, 2)}
            self.blocks[call.layer] = influence_blocks(q, k, v, **rows, block=self.block, scale=call.scale)

        if not out.requires_grad:
            out = out.detach().requires_grad_()  # the first layers of a frozen model
        out.register_hook(fill)
        return out

    def taken(self) -> Tensor:
        """The maps of one backward pass, (L, H, c, c)."""
        missing = [layer for layer, blocks in enumerate(self.blocks) if blocks is None]
        if missing:
            raise AttachError(f"no gradient reached the attention of layers {missing}")
        maps, self.blocks = torch.stack([b for b in self.blocks if b is not None]), [None] * len(self.blocks)
        return maps
