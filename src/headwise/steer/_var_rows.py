"""VAR by the weights of the rows that it edits, of which there are few, and for one new token on a GPU by one kernel.

The same equation by several attention calls stands in `var.py`; tests hold the others to it. `_var_kernel.py` is the kernel.

Letters: B rows, H query heads, K kv heads, N queries, R of them that are edited, M key columns, C columns of the prompt, D head dim.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from headwise.attach import HeadCall
from headwise.attach.hook import INEXPRESSIBLE
from headwise.attention.triton._host import (
    DTYPES,
    LOG2E,
    MAX_HEAD_DIM,
    interpreting,
    pad_head_dim,
    triton_available,
)

LONGEST = 4096
"""Keys that one program still reads in the time of a decode step; beyond it the partial sums, which library kernels split, serve."""
BLOCK, WARPS = 64, 4


def is_dense(call: HeadCall) -> bool:
    """Keys as the model gives them, with a mask that says which columns a query sees: what rows of weights can be made of."""
    if (
        call.groups is not None
        or call.first_column
        or any(call.options.get(name) is not None for name in INEXPRESSIBLE)
    ):
        return False
    mask, N, M = call.mask, call.q.shape[2], call.k.shape[2]
    if mask is None:
        return call.causal and call.past + N == M
    return mask.dtype == torch.bool and mask.shape[1] == 1 and mask.shape[2] in (1, N)


@dataclass(frozen=True)
class Rows:
    """Weights (B, H, R, M) of chosen queries, and which columns (B, 3, M) are sinks, the rest of the image, the image."""

    call: HeadCall
    weights: Tensor
    groups: Tensor

    @classmethod
    def of(cls, call: HeadCall, codes: Tensor, columns: Tensor) -> Rows:
        """Of the queries at `columns` (B, R) of the pass; codes (B, C) of the prompt's columns."""
        q, k = call.q, call.k
        B, H, N, D = q.shape
        (K, M), R = k.shape[1:3], columns.shape[1]
        if R < N:
            q = q.gather(2, columns[:, None, :, None].expand(-1, H, -1, D))
        wide = torch.promote_types(q.dtype, torch.float32)
        logits = (q.reshape(B, K, -1, D).to(wide) * call.scale) @ k.to(wide).mT  # (B, K, G·R, M)
        logits = logits.view(B, K, H // K, R, M)
        if N > 1 or call.mask is not None:
            lowest = torch.finfo(logits.dtype).min  # not −∞: a row of padding sees nothing, and must not give NaN
            logits = logits.masked_fill(~_seen(call, columns)[:, None, None], lowest)
        code = torch.nn.functional.pad(codes, (0, max(0, M - codes.shape[1])))[:, :M]
        sinks, image = (code & 2) != 0, (code & 1) != 0
        groups = torch.stack([sinks, image & ~sinks, image], dim=1).to(wide)
        return cls(call, logits.softmax(-1).view(B, H, R, M), groups)

    def masses(self) -> dict[str, Tensor]:
        """Mass (B, H, R) of each group."""
        found = self.weights @ self.groups[:, None].mT  # (B, H, R, 3)
        return {name: found[..., i] for i, name in enumerate(("sinks", "rest", "image"))}

    def moved(self, out: Tensor, ratio: Tensor, chosen: Tensor, move: float) -> Tensor:
        """`out` (B, R, H, D) with the change of the weights times V where chosen (B, H, R); ratio P_sinks / P_rest (B, H, R)."""
        v = self.call.v
        B, K, M, D = v.shape
        sinks, rest = self.groups[:, None, None, 0], self.groups[:, None, None, 1]  # (B, 1, 1, M)
        change = self.weights * (ratio[..., None] * rest - sinks)
        added = (change.view(B, K, -1, M).to(v.dtype) @ v).view(B, -1, chosen.shape[2], D).transpose(1, 2)
        return torch.where(chosen.transpose(1, 2)[..., None], (out.float() + move * added.float()).to(out.dtype), out)


def _seen(call: HeadCall, columns: Tensor) -> Tensor:
    """(B, R, M): which keys the queries at these columns see."""
    M, mask = call.k.shape[2], call.mask
    if mask is None:
        return torch.arange(M, device=columns.device) <= (columns + call.past)[..., None]
    mask = mask[:, 0].expand(columns.shape[0], -1, -1)
    return mask if mask.shape[1] == columns.shape[1] == 1 else mask.gather(1, columns[..., None].expand(-1, -1, M))


def serves(call: HeadCall) -> bool:
    """One new token behind others, on a GPU, with no gradient to be had, all keys in reach: what the kernel is for."""
    q = call.q
    if torch.is_grad_enabled() or not call.decoding or not (q.is_cuda or interpreting()) or call.past >= LONGEST:
        return False
    fits = q.dtype in DTYPES and q.shape[-1] <= MAX_HEAD_DIM and q.is_contiguous()
    return fits and (by_address(call) or _in_one_piece(call)) and triton_available()


def by_address(call: HeadCall) -> bool:
    """A step on the device whose slots are positions, none missing: every head keeps all, and no token stands for others."""
    table, patterns = call.table, call.site.patterns
    if table is None or table.splits is None or table.compensation is not None or patterns is None:
        return False
    return all(pattern.keeps_all for pattern in patterns) and call.k.shape[-1] == call.v.shape[-1]


def _in_one_piece(call: HeadCall) -> bool:
    k, v, mask = call.k, call.v, call.mask
    dense = is_dense(call) and k.is_contiguous() and v.is_contiguous() and k.shape == v.shape
    return dense and (mask is None or (mask.shape[0] == call.q.shape[0] and mask.is_contiguous()))


def redistribute(
    call: HeadCall,
    codes: Tensor,
    heads: Tensor | None,
    count: Tensor,
    *,
    move: float,
    rho: float | None,
    minimum_mass: float,
) -> Tensor:
    """Head outputs (B, 1, H, D); adds the number of edited (row, head) to `count`.

    codes (B, C) uint8 of the prompt (1 image, 2 sink) by column, `by_address` by position; heads (H,) uint8: where it may edit.
    rho None: every head, whatever it looks at.
    """
    from headwise.steer._var_kernel import redistribute_one

    q, k, table = call.q, call.k, call.table
    mask = call.mask if table is None else None
    keys, values, filled = (k, call.v, codes) if table is None else (table.k_ptr, table.v_ptr, table.filled)
    B, H, _, D = q.shape
    out = torch.empty(B, 1, H, D, dtype=q.dtype, device=q.device)
    redistribute_one[(B, H)](
        q, keys, values, filled, codes, codes if mask is None else mask.view(torch.uint8), codes if heads is None else heads, out, count,
        codes.shape[1], k.shape[2], call.scale * LOG2E, move, 0.0 if rho is None else rho, minimum_mass,
        H=H, G=H // k.shape[1], D=D, BD=pad_head_dim(D), BM=BLOCK, TABLE=table is not None, MASKED=mask is not None,
        CENTRIC=rho is not None, CHOSEN=heads is not None, num_warps=WARPS,
    )  # fmt: skip
    return out
