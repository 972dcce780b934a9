"""What the attention op reads: groups of kv heads that share a storage, and who sees whom.

Letters: B batch, H query heads, K kv heads, G = H/K, N queries, M key columns, S slots of one group, D head dim.
A *column* is an index into the padded batch; a *position* counts the real tokens of one row, so that
`position = column - start[row]` and the first real token has position 0 whatever the padding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

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
class Selection:
    """Lists of what queries read: `index` (B, Kg, C, E) int32 numbers blocks of `key_block` columns, -1 = none.

    List c serves the queries c · query_block, …, counted from column `offset`, the first query's of the call. A key is
    read if a list names it and the pattern, causality and masks allow it.
    """

    index: Tensor
    key_block: int = 1
    query_block: int = 1
    offset: int = 0

    def mask(self, queries: Queries, S: int) -> Tensor:
        """Who is listed for whom, (B, Kg, N, S) bool: for references, and for a few rows at a time."""
        rows = torch.arange(queries.count, device=self.index.device) + queries.offset - self.offset
        lists = self.index[:, :, rows // self.query_block].long()  # (B, Kg, N, E)
        blocks = -(-S // self.key_block)
        listed = torch.zeros(*lists.shape[:3], blocks + 1, dtype=torch.bool, device=lists.device)
        listed.scatter_(3, torch.where((lists < 0) | (lists >= blocks), blocks, lists), True)
        return listed[..., :blocks].repeat_interleave(self.key_block, dim=3)[..., :S]

    def by_query(self, N: int) -> Tensor:
        """A list for every query, (B, Kg, N, E)."""
        return self.index.repeat_interleave(self.query_block, dim=2)[:, :, :N] if self.query_block > 1 else self.index


@dataclass(frozen=True)
class KVGroup:
    """Keys and values of some kv heads, and the pattern by which queries read them.

    Shapes: k (B, Kg, S, D), v (B, Kg, S, Dv). `positions` (B, 1 or Kg, S) says which real token a slot holds, -1 for an
    empty slot; None means that slot t holds column t. The last `tail` slots hold the newest columns in order (the
    chunk being read). `complete` promises that every slot before the tail holds a token that the pattern lets every query see, and that
    in the tail causality is the whole rule: without a mask of the model's own, none is built. `in_order` promises, of rows without
    padding, that the slots are the pattern's sinks and then tokens without a gap up to the newest: counted in slots instead of positions,
    sinks and window mean the same.
    """

    heads: tuple[int, ...]
    k: Tensor
    v: Tensor
    pattern: Pattern = field(default_factory=Full)
    positions: Tensor | None = None
    tail: int = 0
    compensation: Compensation | None = None
    complete: bool = False
    in_order: bool = False
    selection: Selection | None = None

    def with_values(self, v: Tensor) -> KVGroup:
        """The same keys with other values (used to read probability mass: values that are indicators)."""
        return replace(self, v=v)

    def with_selection(self, selection: Selection) -> KVGroup:
        """The same keys, of which queries read what lists name."""
        return replace(self, selection=selection)


@dataclass(frozen=True)
class Table:
    """Where one new query a row finds its keys, as addresses on the device: right again after every step without the host.

    k_ptr, v_ptr (B, K) int64 point at the first slot of each (row, kv head), slots of D elements without gaps; filled (B, K) int32
    slots are read. `splits` says how the kernel shares the work; `groups()` is the same as groups, for whoever cannot read addresses.
    """

    k_ptr: Tensor
    v_ptr: Tensor
    filled: Tensor
    groups: Callable[[], list[KVGroup]]
    compensation: Compensation | None = None  # of all kv heads in order, log count -inf where a head has none
    splits: Any = None


@dataclass(frozen=True)
class Queries:
    """Where the queries stand: `offset` columns came before them; `start` (B,) is the first real column of each row.

    Rows of packed sequences have a `start` (B, N): the column in which each query's own sequence begins.
    """

    count: int
    offset: int
    start: Tensor | None = None
    mask: Tensor | None = None  # (B, 1, N, M) bool over columns: the model's own rule, causality included
    causal: bool = True

    def positions(self, device: torch.device) -> Tensor:
        """Positions of the queries, (1 or B, N); negative for padding."""
        columns = torch.arange(self.offset, self.offset + self.count, device=device)[None]  # (1, N)
        return columns if self.start is None else columns - (self.start if self.packed else self.start[:, None])

    @property
    def packed(self) -> bool:
        """Does a row hold several sequences, so that every query has its own start?"""
        return self.start is not None and self.start.ndim == 2

    def rows(self, begin: int, end: int) -> Queries:
        """The queries `begin:end` alone."""
        mask = None if self.mask is None else self.mask[:, :, begin:end]
        start = self.start[:, begin:end] if self.start is not None and self.packed else self.start
        return replace(self, count=end - begin, offset=self.offset + begin, mask=mask, start=start)


def key_positions(group: KVGroup, queries: Queries) -> Tensor:
    """Positions of a group's slots, (1 or B, 1 or Kg, S); negative for empty slots and padding."""
    if group.positions is not None:
        return group.positions.long()
    if queries.packed:
        raise AttentionError("in packed rows a key has a position for every query, not one: use `visible`")
    columns = torch.arange(group.k.shape[2], device=group.k.device)[None, None]
    return columns if queries.start is None else columns - queries.start[:, None, None]


def _positions_seen(group: KVGroup, queries: Queries) -> Tensor:
    """`key_positions` with an axis for the queries, (1 or B, 1 or Kg, 1 or N, S)."""
    if not queries.packed:
        return key_positions(group, queries)[:, :, None]
    assert queries.start is not None
    columns = torch.arange(group.k.shape[2], device=group.k.device)
    return columns - queries.start[:, None, :, None]


def visible(group: KVGroup, queries: Queries, slots: Tensor | None = None) -> Tensor:
    """Who sees whom in one group: bool (B or 1, Hg or Kg or 1, N, S).

    The pattern's rule, causality, empty slots and padding, and the model's own mask gathered at the slots' columns.
    `slots` (S',) restricts the group to some of its slots (the caller slices k and v alike).
    """
    k_pos = _positions_seen(group, queries)
    if slots is not None:
        k_pos = k_pos[..., slots]
    q_pos = queries.positions(group.k.device)[:, None, :, None]  # (B, 1, N, 1)
    if queries.causal:
        seen = group.pattern.reads(q_pos, k_pos) & (k_pos >= 0)
    elif group.pattern.keeps_all:
        seen = (k_pos >= 0).expand(-1, -1, queries.count, -1)
    else:
        raise AttentionError(f"pattern {group.pattern} needs causal attention; this attention is bidirectional")
    if queries.mask is not None:
        seen = seen & _gather_mask(queries.mask, k_pos[:, :, 0], queries.start)
    if group.selection is not None:
        listed = group.selection.mask(queries, group.k.shape[2])
        seen = seen & (listed if slots is None else listed[..., slots])
    return seen


def _gather_mask(mask: Tensor, k_pos: Tensor, start: Tensor | None) -> Tensor:
    """The model's mask (B, 1, N, M) at the columns where the slots' tokens stand: (B, 1 or Kg, N, S)."""
    columns = k_pos if start is None else k_pos + start[:, None, None]
    columns = columns.clamp(0, mask.shape[-1] - 1)
    batch, heads = max(mask.shape[0], columns.shape[0]), columns.shape[1]
    index = columns[:, :, None, :].expand(batch, heads, mask.shape[2], columns.shape[-1])
    return mask.expand(batch, heads, -1, -1).gather(-1, index)


def numbered_by_column(group: KVGroup, queries: Queries) -> bool:
    """Are positions columns and is there no mask, so that (lists aside) lengths, offset and pattern say who sees whom?"""
    return group.positions is None and queries.start is None and queries.mask is None


def query_heads(kv_heads: Sequence[int], group_size: int) -> list[int]:
    """Query heads served by some kv heads, in order.

    >>> query_heads([0, 2], 3)
    [0, 1, 2, 6, 7, 8]
    """
    return [h * group_size + g for h in kv_heads for g in range(group_size)]
