"""VAR by the weights of the rows that it edits, of which there are few, and for one new token on a GPU by one kernel.

The same equation by several attention calls stands in `var.py`; tests hold the others to it. `_var_kernel.py` is the kernel.

Letters: B rows, H query heads, K kv heads, N queries, R of them that are edited, M key columns, C columns of the prompt, D head dim.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from headwise.attach import HeadCall
from headwise.attach.hook import INEXPRESSIBLE
from headwise.attention.triton._host import (
    DTYPES,
    LOG2E,
    MAX_HEAD_DIM,
    dot_precision,
    interpreting,
    multiprocessors,
    pad_head_dim,
    triton_available,
)

BLOCK, WARPS, STAGES = 64, 4, 3
SHARES = 32
"""Programs that may work on the keys of one (row, kv head); fewer where the batch and its heads fill the device."""


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
    """Weights (B, H, R, M) of chosen queries, and which columns (B, 3, C) of the prompt, M ≥ C, are sinks, the rest of the image, the
    image, as `groups_of` gives them."""

    call: HeadCall
    weights: Tensor
    groups: Tensor

    @classmethod
    def of(cls, call: HeadCall, groups: Tensor, columns: Tensor) -> Rows:
        """Of the queries at `columns` (B, R) of the pass."""
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
        return cls(call, logits.softmax(-1).view(B, H, R, M), groups.to(wide))

    def masses(self) -> dict[str, Tensor]:
        """Mass (B, H, R) of each group."""
        found = self._on_prompt() @ self.groups[:, None].mT  # (B, H, R, 3)
        return {name: found[..., i] for i, name in enumerate(("sinks", "rest", "image"))}

    def moved(self, out: Tensor, ratio: Tensor, chosen: Tensor, move: float) -> Tensor:
        """`out` (B, R, H, D) with the change of the weights times V where chosen (B, H, R); ratio P_sinks / P_rest (B, H, R)."""
        weights = self._on_prompt()
        C = weights.shape[-1]
        v = self.call.v[:, :, :C]
        B, K, _, D = v.shape
        sinks, rest = self.groups[:, None, None, 0], self.groups[:, None, None, 1]  # (B, 1, 1, C)
        change = weights * (ratio[..., None] * rest - sinks)
        added = (change.reshape(B, K, -1, C).to(v.dtype) @ v).view(B, -1, chosen.shape[2], D).transpose(1, 2)
        return torch.where(chosen.transpose(1, 2)[..., None], (out.float() + move * added.float()).to(out.dtype), out)

    def _on_prompt(self) -> Tensor:
        """The weights (B, H, R, C) on the prompt: what was decoded since is in no group."""
        return self.weights[..., : self.groups.shape[-1]]


def groups_of(codes: Tensor) -> Tensor:
    """(B, 3, C) float32: which of the prompt's columns are sinks, the rest of the image, the image; codes (B, C) as kernels read them."""
    sinks, image = (codes & 2) != 0, (codes & 1) != 0
    return torch.stack([sinks, image & ~sinks, image], dim=1).float()


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
    if torch.is_grad_enabled() or not call.decoding or not (q.is_cuda or interpreting()):
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


@dataclass(frozen=True)
class Room:
    """Where the programs of one launch leave their partial sums for the last of them: made once for all layers and steps.

    parts (B·K·S, R·(BD + 2)) float32; arrived (B·K,) int32, 0 between launches; S shares of the keys.
    """

    parts: Tensor
    arrived: Tensor
    shares: int

    @classmethod
    def of(cls, q: Tensor, kv_heads: int, shares: int | None = None) -> Room:
        """For queries q (B, H, 1, D): two programs a multiprocessor, as the plain decode kernel has."""
        B, H, _, D = q.shape
        pairs, rows = B * kv_heads, _tile_rows(H // kv_heads)
        if shares is None:
            wanted = 4 if interpreting() else 2 * multiprocessors(q.device.index)
            shares = min(SHARES, max(1, wanted // pairs))
        parts = torch.empty(pairs * shares, rows * (pad_head_dim(D) + 2), dtype=torch.float32, device=q.device)
        return cls(parts, torch.zeros(pairs, dtype=torch.int32, device=q.device), shares)


def _padded(n: int) -> int:
    return 1 << (n - 1).bit_length()


def _tile_rows(group: int) -> int:
    return max(16, 4 * _padded(group))


class Step:
    """One layer's decode steps behind one prompt: `step(call)` gives head outputs (B, 1, H, D), and adds the number of edited (row,
    head) to `count`. What does not change from token to token is prepared once.

    codes (B, C) uint8 of the prompt (1 image, 2 sink) by column, `by_address` by position; heads (H,) uint8: where it may edit.
    rho None: every head, whatever it looks at.
    """

    def __init__(
        self,
        call: HeadCall,
        codes: Tensor,
        heads: Tensor | None,
        count: Tensor,
        room: Room,
        *,
        move: float,
        rho: float | None,
        minimum_mass: float,
    ):
        (B, H, _, D), K, dtype = call.q.shape, call.k.shape[1], call.q.dtype
        self.codes, self.key = codes, _key(call)
        self.shape, self.grid = (B, 1, H, D), (B * K, room.shares, 1)
        narrow = dtype == torch.float32 or D > 128  # shared memory then holds two stages only
        self.fixed = (
            codes, codes if heads is None else heads, room.parts, room.arrived, count,
            codes.shape[1], call.scale * LOG2E, float(move), float(rho or 0.0), float(minimum_mass),
        )  # fmt: skip
        self.constants: dict[str, Any] = dict(
            K=K, G=H // K, GP=_padded(H // K), D=D, BD=pad_head_dim(D), BM=BLOCK, R=_tile_rows(H // K), S=room.shares,
            SP=_padded(room.shares), TABLE=call.table is not None, MASKED=call.table is None and call.mask is not None,
            CENTRIC=rho is not None, CHOSEN=heads is not None, PRECISION=dot_precision(dtype), STAGES=min(STAGES, 2) if narrow else STAGES,
        )  # fmt: skip
        self.values = tuple(self.constants.values())
        self.kernel: Any = None

    def fits(self, call: HeadCall) -> bool:
        """Is this another token as the first one was, for which `serves` holds? Asked in every layer of every step, so briefly."""
        if (
            _key(call) != self.key
            or torch.is_grad_enabled()
            or call.options.get("dropout")
            or not call.q.is_contiguous()
        ):
            return False
        k, mask = call.k, call.mask
        if call.table is not None:
            return True
        if not (k.is_contiguous() and call.v.is_contiguous()):
            return False
        return call.past + 1 == k.shape[2] if mask is None else mask.is_contiguous()

    def __call__(self, call: HeadCall) -> Tensor:
        """Through Triton's dispatch the first time; then the compiled kernel itself, which costs the host a third of that."""
        q, k, v, table = call.q, call.k, call.v, call.table
        mask = filled = self.codes
        if table is not None:
            k, v, filled = table.k_ptr, table.v_ptr, table.filled
        elif call.mask is not None:
            mask = call.mask.view(torch.uint8)
        out = torch.empty(self.shape, dtype=q.dtype, device=q.device)
        given = (q, k, v, filled, mask, out, call.k.shape[2], *self.fixed)
        if (q.data_ptr() | k.data_ptr() | v.data_ptr()) & 15:  # Triton compiles another kernel for these
            _jit(self.grid, given, self.constants)
        elif self.kernel is None:
            self.kernel = _jit(self.grid, given, self.constants)
        else:
            self.kernel[self.grid](*given, *self.values)
        return out


def _key(call: HeadCall) -> tuple:
    """What two calls of a layer must share to be the same `Step`."""
    return call.q.shape, call.k.shape[1], call.mask is None, call.table is None, call.first_column


def _jit(grid: tuple[int, int, int], given: tuple, constants: dict[str, Any]) -> Any:
    from headwise.steer._var_kernel import redistribute_one

    return redistribute_one[grid](*given, **constants, num_warps=WARPS)
