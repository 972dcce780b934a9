"""What the attention op reads: groups of kv heads that share a storage, and who sees whom.

Letters: B batch, H query heads, K kv heads, G = H/K, N queries, M key columns, S slots of one group, D head dim.
A *column* is an index into the padded batch; a *position* counts the real tokens of one row, so that
`position = column - start[row]` and the first real token has position 0 whatever the padding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from headwise.errors import AttentionError
from headwise.plan import Full, Pattern


@dataclass(frozen=True)
class Compensation:
    """One extra key per (row, kv head) that stands for all dropped tokens: logit `q.k*scale + log_count`.

    Shapes: k, v (B, Kg, D); log_count (B, Kg) float32, -inf where nothing was dropped.
    """

    k: Tensor
    v: Tensor
    log_count: Tensor


@dataclass(frozen=True)
class KVGroup:
    """Keys and values of some kv heads, and the pattern by which queries read them.

    Shapes: k (B, Kg, S, D), v (B, Kg, S, Dv). `positions` (B, 1 or Kg, S) says which real token a slot holds, -1 for an
    empty slot; None means that slot t holds column t. The last `tail` slots hold the newest columns in order (the
    chunk being read). `complete` promises that every slot holds a token that the
    pattern lets every query see: without a mask of the model's own, none is built.
    """

    heads: tuple[int, ...]
    k: Tensor
    v: Tensor
    pattern: Pattern = field(default_factory=Full)
    positions: Tensor | None = None
    tail: int = 0
    compensation: Compensation | None = None
    complete: bool = False

    def with_values(self, v: Tensor) -> KVGroup:
        """The same keys with other values (used to read probability mass: values that are indicators)."""
        return replace(self, v=v)


@dataclass(frozen=True)
class Queries:
    """Where the queries stand: `offset` columns came before them; `start` (B,) is the first real column of each row."""

    count: int
    offset: int
    start: Tensor | None = None
    mask: Tensor | None = None  # (B, 1, N, M) bool over columns: the model's own rule, causality included
    causal: bool = True

    def positions(self, device: torch.device) -> Tensor:
        """Positions of the queries, (1 or B, N); negative for padding."""
        columns = torch.arange(self.offset, self.offset + self.count, device=device)[None]  # (1, N)
        return columns if self.start is None else columns - self.start[:, None]

    def rows(self, begin: int, end: int) -> Queries:
        """The queries `begin:end` alone."""
        mask = None if self.mask is None else self.mask[:, :, begin:end]
        return replace(self, count=end - begin, offset=self.offset + begin, mask=mask)


def key_positions(group: KVGroup, queries: Queries) -> Tensor:
    """Positions of a group's slots, (1 or B, 1 or Kg, S); negative for empty slots and padding."""
    if group.positions is not None:
        return group.positions.long()
    columns = torch.arange(group.k.shape[2], device=group.k.device)[None, None]
    return columns if queries.start is None else columns - queries.start[:, None, None]


def visible(group: KVGroup, queries: Queries, slots: Tensor | None = None) -> Tensor:
    """Who sees whom in one group: bool (B or 1, Hg or Kg or 1, N, S).

    The pattern's rule, causality, empty slots and padding, and the model's own mask gathered at the slots' columns.
    `slots` (S',) restricts the group to some of its slots (the caller slices k and v alike).
    """
    k_pos = key_positions(group, queries)
    if slots is not None:
        k_pos = k_pos[..., slots]
    q_pos = queries.positions(group.k.device)[:, None, :, None]  # (B, 1, N, 1)
    if queries.causal:
        seen = group.pattern.reads(q_pos, k_pos[:, :, None, :]) & (k_pos >= 0)[:, :, None, :]
    elif group.pattern.keeps_all:
        seen = (k_pos >= 0)[:, :, None, :].expand(-1, -1, queries.count, -1)
    else:
        raise AttentionError(f"pattern {group.pattern} needs causal attention; this attention is bidirectional")
    if queries.mask is not None:
        seen = seen & _gather_mask(queries.mask, k_pos, queries.start)
    return seen


def _gather_mask(mask: Tensor, k_pos: Tensor, start: Tensor | None) -> Tensor:
    """The model's mask (B, 1, N, M) at the columns where the slots' tokens stand: (B, 1 or Kg, N, S)."""
    columns = k_pos if start is None else k_pos + start[:, None, None]
    columns = columns.clamp(0, mask.shape[-1] - 1)
    batch, heads = max(mask.shape[0], columns.shape[0]), columns.shape[1]
    index = columns[:, :, None, :].expand(batch, heads, mask.shape[2], columns.shape[-1])
    return mask.expand(batch, heads, -1, -1).gather(-1, index)


def query_heads(kv_heads: Sequence[int], group_size: int) -> list[int]:
    """Query heads served by some kv heads, in order.

    >>> query_heads([0, 2], 3)
    [0, 1, 2, 6, 7, 8]
    """
    return [h * group_size + g for h in kv_heads for g in range(group_size)]
