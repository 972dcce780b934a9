"""What the op decides about a call, remembered by all that decides it.

A call is checked and its backend chosen once for every signature: shapes, strides, dtypes and devices of the tensors, patterns and
switches. No decision may depend on the numbers in a tensor, so none can go stale while they change.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from headwise.attention import crossover, sdpa
from headwise.attention.backends import Backend, Ran, Request, finish, take_heads
from headwise.attention.groups import KVGroup, Queries, Selection
from headwise.plan import Pattern

Parts = tuple[tuple[Pattern, tuple[int, ...]], ...]  # kv heads by pattern
MOST = 1024  # signatures kept; a text that grows by one token a call makes a new one each time


class Given(NamedTuple):
    """The arguments of one call of `headwise.attention`."""

    q: Tensor
    k: Tensor | None
    v: Tensor | None
    groups: Sequence[KVGroup] | None
    patterns: Pattern | Sequence[Pattern] | None
    causal: bool
    mask: Tensor | None
    start: Tensor | None
    offset: int | None
    active: Tensor | None
    gate: Tensor | None
    selected: Tensor | None
    key_block: int
    query_block: int
    scale: float | None
    dropout: float
    return_lse: bool
    backend: str

    def signature(self) -> tuple | None:
        """All that checks and choice depend on; None where that cannot be told or nothing may be kept (while a compiler traces)."""
        if torch.compiler.is_compiling():
            return None
        q, patterns, groups = self.q, self.patterns, self.groups
        tensors = (q, self.k, self.v, self.active, self.gate, self.mask, self.start, self.selected)
        traits = [None if x is None else (x.shape, x.stride(), x.dtype, x.device) for x in tensors]
        read = patterns if patterns is None or isinstance(patterns, Pattern) else tuple(patterns)
        switches = (self.causal, self.offset, self.key_block, self.query_block, self.dropout, self.return_lse)
        stored = None if groups is None else tuple([_group_signature(group) for group in groups])
        return *traits, stored, read, *switches, self.backend, self._records(), self._device_state()

    def _device_state(self) -> tuple | None:
        """What else the choice depends on, on CUDA: whether a graph is being captured, and the table of crossovers in force."""
        q = self.q
        plain = self.active is None and self.patterns is None and self.groups is None
        if plain or not q.is_cuda:
            return None
        table = crossover.lookup(crossover.device_name(q.device), q.dtype, q.shape[-1])
        return torch.cuda.is_current_stream_capturing(), table

    def _records(self) -> bool:
        """Will a gradient of queries, keys or values be asked for?"""
        if not torch.is_grad_enabled():
            return False
        tensors = (
            [self.q, self.k, self.v] if self.groups is None else [self.q, *(x for g in self.groups for x in (g.k, g.v))]
        )
        return any(x is not None and x.requires_grad for x in tensors)

    def request(self, parts: Parts | None, offset: int, notes: dict[str, Any]) -> Request:
        """The call as backends take it. `notes` may hold what they found out about other calls of the same signature."""
        q, k, v = self.q, self.k, self.v
        if k is None or v is None or parts is None:
            groups, whole = tuple(self.groups or ()), None
        else:
            groups, whole = dense_groups(k, v, parts), (k, v)
        if self.selected is not None:
            groups = tuple(self._with_lists(group, offset) for group in groups)
        queries = Queries(q.shape[2], offset, self.start, self.mask, self.causal)
        scale = q.shape[3] ** -0.5 if self.scale is None else self.scale
        return Request(
            q, groups, queries, scale, self.active, self.gate, self.return_lse, self.dropout, whole, None, notes
        )

    def _with_lists(self, group: KVGroup, offset: int) -> KVGroup:
        assert self.selected is not None
        lists = Selection(take_heads(self.selected, group.heads), self.key_block, self.query_block, offset)
        return group.with_selection(lists)


class Way(NamedTuple):
    """How calls of one signature are served: heads of dense keys by pattern, offset, what is known of them, backend and reason."""

    parts: Parts | None
    offset: int
    notes: dict[str, Any]
    backend: Backend
    ran: Ran

    def run(self, given: Given) -> tuple[Tensor, Tensor | None]:
        """(out, lse) of another call with the same signature; one that is a single library call is made without a `Request`."""
        is_causal = self.notes.get("one_call")
        if is_causal is None or given.k is None or given.v is None:
            return self.backend.run(given.request(self.parts, self.offset, self.notes))
        scale = given.q.shape[3] ** -0.5 if given.scale is None else given.scale
        out = sdpa.fused(given.q, given.k, given.v, scale, dropout=given.dropout, is_causal=is_causal)
        return finish(out, given.active, given.gate), None


_known: dict[tuple, Way] = {}


def recall(key: tuple | None) -> Way | None:
    """The way of an earlier call with this signature."""
    try:
        return None if key is None else _known.get(key)
    except TypeError:  # something that cannot be hashed: the checks will name it
        return None


def remember(key: tuple | None, way: Way) -> None:
    """Keep a way for the next call with this signature; all are forgotten when there are too many."""
    if key is None:
        return
    if len(_known) >= MOST:
        _known.clear()
    try:
        _known[key] = way
    except TypeError:
        return


def dense_groups(k: Tensor, v: Tensor, parts: Parts) -> tuple[KVGroup, ...]:
    """Groups over the same dense keys, k (B, K, M, D)."""
    if len(parts) == 1:
        return (KVGroup(parts[0][1], k, v, parts[0][0]),)
    return tuple(KVGroup(heads, take_heads(k, heads), take_heads(v, heads), pattern) for pattern, heads in parts)


def _group_signature(group: KVGroup) -> tuple:
    """All of a group but the numbers in its tensors."""
    k, v, positions, lists, extra = group.k, group.v, group.positions, group.selection, group.compensation
    listed = None if lists is None else (lists.index.shape, lists.key_block, lists.query_block, lists.offset)
    return (
        tuple(group.heads), k.shape, k.stride(), k.dtype, k.device, v.shape, v.stride(), v.dtype, v.device, group.pattern,
        None if positions is None else positions.shape, group.tail, extra is None, group.complete, group.in_order, listed,
    )  # fmt: skip
