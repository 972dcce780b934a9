"""What a cache layer is made of: a store for the kv heads of one pattern. It holds what the pattern keeps and frees the rest.

Letters: B batch, Kg heads of one store, S slots, N new columns, D head dim. Columns and positions as in `attention.groups`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor

from headwise.attention.groups import Compensation, KVGroup, Queries
from headwise.errors import CacheError
from headwise.plan import Full, Pattern

GROWTH = 64  # a full buffer grows by 1/GROWTH of its length: 1.6 % of slack buys amortised O(GROWTH) copies per token


class Columns:
    """New columns of one forward pass: how many came before, how many come, where the rows start."""

    def __init__(self, offset: int, count: int, start: Tensor | None, rows: list[int]):
        self.offset, self.count, self.start, self.rows = offset, count, start, rows

    def positions(self, device: torch.device) -> Tensor:
        """Positions of the new columns, (1 or B, N) int32; -1 for padding."""
        columns = torch.arange(self.offset, self.offset + self.count, device=device, dtype=torch.int32)[None]
        if self.start is None:
            return columns
        return (columns - self.start[:, None].to(torch.int32)).clamp(min=-1)

    def lengths(self) -> list[int]:
        """Real tokens seen by each row, the new ones included."""
        return [max(0, self.offset + self.count - first) for first in self.rows]


class Reader(Protocol):
    """The attention call that reads the new columns: what a rule of content may look at, beside the keys."""

    @property
    def q(self) -> Tensor: ...  # (B, H, N, D)

    @property
    def k(self) -> Tensor: ...  # (B, K, N, D), the new columns

    @property
    def scale(self) -> float: ...

    @property
    def layer(self) -> int: ...

    def queries(self) -> Queries: ...


class Store:
    """Keys and values of the kv heads of one pattern. Subclasses say what is kept."""

    def __init__(self, pattern: Pattern, heads: tuple[int, ...]):
        self.pattern, self.heads = pattern, heads
        self.reset()

    def reset(self) -> None:
        """Free the storage."""
        self.k: Tensor | None = None
        self.v: Tensor | None = None

    def tensors(self) -> list[Tensor]:
        """All tensors that this store has allocated."""
        return [t for t in (self.k, self.v) if t is not None]

    @property
    def nbytes(self) -> int:
        """Bytes of those tensors."""
        return sum(t.untyped_storage().nbytes() for t in self.tensors())

    @property
    def slots(self) -> int:
        """Tokens for which there is room."""
        return 0 if self.k is None else self.k.shape[2]

    @property
    def held(self) -> str:
        """`slots`, for a table; where heads differ, one number a head."""
        return str(self.slots)

    def extend(
        self, k: Tensor, v: Tensor, new: Columns, *, keep_all: bool, reader: Reader | None = None
    ) -> list[KVGroup]:
        """Store new columns (B, Kg, N, D) and return what their queries, those of `reader`, read."""
        raise NotImplementedError

    def must_take_back(self) -> None:
        """Raises CacheError if draft tokens, read in chunks, would not be read as one by one."""

    def crop(self, left: Columns | None, count: int) -> None:
        """Take back the last `count` columns; `left` describes what remains."""
        raise NotImplementedError

    def select_rows(self, index: Tensor) -> None:
        """Row i becomes row index[i]."""
        if self.k is not None and self.v is not None:
            index = index.to(self.k.device)
            self.k, self.v = self.k.index_select(0, index), self.v.index_select(0, index)


class FullStore(Store):
    """Every column, in order, in a buffer that grows by 1/64 of its length."""

    def reset(self) -> None:
        """Free the storage."""
        super().reset()
        self.length = 0

    def extend(
        self, k: Tensor, v: Tensor, new: Columns, *, keep_all: bool, reader: Reader | None = None
    ) -> list[KVGroup]:
        """Write the new columns behind the old ones; the queries read all of them."""
        end = self.length + k.shape[2]
        self.k, self.v = grown(self.k, k, self.length, end), grown(self.v, v, self.length, end)
        self.k[:, :, self.length : end] = k
        self.v[:, :, self.length : end] = v
        self.length = end
        return [KVGroup(heads=self.heads, k=self.k[:, :, :end], v=self.v[:, :, :end], pattern=self.pattern)]

    def crop(self, left: Columns | None, count: int) -> None:
        """Forget the last columns; their room stays."""
        self.length -= min(count, self.length)


class WindowStore(Store):
    """Sinks and a recent window, slots in any order, each with the position of its token (-1: empty).

    With compensation, what leaves the window is folded into the mean key and value of all dropped tokens:
    k_hat <- (n k_hat + k) / (n + 1), the same as recomputing the mean.
    """

    def __init__(self, pattern: Pattern, heads: tuple[int, ...], dense_prefill: bool):
        self.dense_prefill = dense_prefill
        super().__init__(pattern, heads)

    def reset(self) -> None:
        """Free the storage."""
        super().reset()
        self.positions: Tensor | None = None  # (1 or B, S) int32
        self.folded: tuple[Tensor, Tensor, Tensor] | None = None  # k, v (B, Kg, D) float32; count (B, 1) float32
        self.edge: list[int] | None = None  # first position of each row's window after the last chunk of a prompt
        self.frozen: list[int] | None = None  # that edge, once a growing buffer is past its prompt and drops no more
        self.next: int | None = (
            None  # slot of the token that leaves next; known while rows are alike and in cyclic order
        )

    def tensors(self) -> list[Tensor]:
        """Keys, values, positions, compensation."""
        extra = [] if self.positions is None else [self.positions]
        return super().tensors() + extra + (list(self.folded) if self.folded else [])

    def extend(
        self, k: Tensor, v: Tensor, new: Columns, *, keep_all: bool, reader: Reader | None = None
    ) -> list[KVGroup]:
        """One token replaces the one that leaves; a chunk is read together with the store and then compressed.

        The prompt, which may come in chunks, ends with the first token that comes alone.
        """
        if self.pattern.grows and new.count == 1 and self.frozen is None:
            self.frozen = self.edge
        if new.count == 1 and self.k is not None and not keep_all and self.slots == self._room(new):
            self._replace_oldest(k, v, new)
            return [self._view(new, chunk=0)]
        before = self._compensation()
        self._append(k, v, new)
        view = replace(self._view(new, chunk=new.count), compensation=before)
        if not keep_all:
            self._compress(new)
            if new.count == 1:
                view = self._view(new, chunk=0)
        return [view]

    def _view(self, new: Columns, chunk: int) -> KVGroup:
        assert self.k is not None and self.v is not None and self.positions is not None
        reads_all = self.frozen is not None or (chunk > 1 and self.dense_prefill)
        fresh = chunk == self.slots and new.offset == 0  # the very first columns stand in column order
        exact = new.start is None and (reads_all or self.slots == self.pattern.kept(new.offset + new.count))
        return KVGroup(
            heads=self.heads,
            k=self.k,
            v=self.v,
            pattern=Full() if reads_all else self.pattern,
            positions=None if fresh else self.positions[:, None],
            tail=chunk,
            compensation=self._compensation(),
            complete=new.count == 1 and exact,
        )

    def _append(self, k: Tensor, v: Tensor, new: Columns) -> None:
        positions = new.positions(k.device)
        if self.k is None or self.v is None or self.positions is None:
            self.k, self.v, self.positions = k, v, positions
            self.next = self.pattern.sinks if new.start is None else None
            return
        if self.next != self.pattern.sinks:  # the ring has turned: what is appended breaks its order
            self.next = None
        self.k, self.v = torch.cat([self.k, k], dim=2), torch.cat([self.v, v], dim=2)
        self.positions = torch.cat([self.positions, positions], dim=1)

    def _keep(self, new: Columns) -> Tensor:
        """Which slots stay, (1 or B, S) bool."""
        assert self.positions is not None
        first = self.frozen or self._edges(new)
        self.edge = first
        first = first[:1] if self.positions.shape[0] == 1 else first
        edge = torch.tensor(first, device=self.positions.device, dtype=torch.int32)[:, None]
        real = self.positions >= 0
        return real & ((self.positions < self.pattern.sinks) | (self.positions >= edge))

    def _edges(self, new: Columns) -> list[int]:
        """First position of each row's window after the new columns."""
        return [n - self.pattern.window(n) for n in new.lengths()]

    def _room(self, new: Columns) -> int:
        """Slots that the longest row needs after the new columns."""
        lengths = new.lengths()
        if self.frozen is not None:
            sinks = self.pattern.sinks
            pairs = zip(lengths, self.frozen, strict=True)
            return max(min(n, sinks) + n - max(first, min(n, sinks)) for n, first in pairs)
        return max(self.pattern.kept(n) for n in lengths)

    def _compress(self, new: Columns) -> None:
        """Drop what the pattern does not keep, and free it."""
        assert self.k is not None and self.v is not None and self.positions is not None
        keep = self._keep(new)
        room = self._room(new)
        if self.pattern.compensated and self.frozen is None:  # a frozen buffer drops nothing more
            self._fold((self.positions >= 0) & ~keep)
        if room >= self.slots and owns(self.k) and owns(self.v):
            self.positions = self.positions.masked_fill(~keep, -1)
            return
        self.positions = self.positions.masked_fill(~keep, -1)
        key = self.positions.masked_fill(~keep, 2**31 - 1)
        order = torch.argsort(key, dim=1)[:, :room]  # kept ones first, by position: a ring in order
        self.positions = self.positions.gather(1, order)
        self.k, self.v = _take(self.k, order), _take(self.v, order)
        self.next = self.pattern.sinks if new.start is None else None

    def _replace_oldest(self, k: Tensor, v: Tensor, new: Columns) -> None:
        """The new token takes the slot of the token that leaves the window, or, in a row that none leaves, an empty one."""
        assert self.k is not None and self.v is not None and self.positions is not None
        if self.next is not None and self.next < self.slots:
            self._replace_slot(self.next, k, v, new)
            return
        leaving = (self.positions >= 0) & ~self._keep(new)
        slot = (leaving.to(torch.int8) * 2 + (self.positions < 0)).argmax(dim=1, keepdim=True)  # (1 or B, 1)
        if self.pattern.compensated:
            self._fold(leaving)
        self.positions.scatter_(1, slot, new.positions(k.device))
        index = slot[:, None, :, None].expand(k.shape[0], k.shape[1], 1, k.shape[3])
        self.k.scatter_(2, index, k)
        self.v.scatter_(2, slot[:, None, :, None].expand(*v.shape), v)

    def _replace_slot(self, slot: int, k: Tensor, v: Tensor, new: Columns) -> None:
        """The same for rows that are alike, by a slot known on the host: three small writes."""
        assert self.k is not None and self.v is not None and self.positions is not None
        if self.pattern.compensated:
            ones = self.k.new_ones(self.k.shape[0], 1, dtype=torch.float32)
            self._add(self.k[:, :, slot].float(), self.v[:, :, slot].float(), ones)
        self.k[:, :, slot], self.v[:, :, slot] = k[:, :, 0], v[:, :, 0]
        self.positions[:, slot] = new.offset
        self.edge = self._edges(new)
        self.next = slot + 1 if slot + 1 < self.slots else self.pattern.sinks

    def _fold(self, dropped: Tensor) -> None:
        """Add the dropped slots (1 or B, S) to the running means."""
        assert self.k is not None and self.v is not None
        weight = dropped.expand(self.k.shape[0], -1).to(torch.float32)[:, None, :, None]  # (B, 1, S, 1)
        count = weight.sum(dim=(1, 2))  # (B, 1)
        k_sum, v_sum = (self.k.float() * weight).sum(2), (self.v.float() * weight).sum(2)  # (B, Kg, D)
        self._add(k_sum, v_sum, count)

    def _add(self, k_sum: Tensor, v_sum: Tensor, count: Tensor) -> None:
        """k_hat <- (n k_hat + sum) / (n + count), and so for v; sums (B, Kg, D), count (B, 1), all float32."""
        if self.folded is None:
            self.folded = (torch.zeros_like(k_sum), torch.zeros_like(v_sum), torch.zeros_like(count))
        k_hat, v_hat, n = self.folded
        total = (n + count).clamp(min=1)[..., None]
        self.folded = ((k_hat * n[..., None] + k_sum) / total, (v_hat * n[..., None] + v_sum) / total, n + count)

    def _compensation(self) -> Compensation | None:
        if self.folded is None:
            return None
        k_hat, v_hat, n = self.folded
        count = n if self.pattern.compensation == "count" else n.clamp(max=1)
        return Compensation(k=k_hat, v=v_hat, log_count=count.log().expand(-1, k_hat.shape[1]))

    def must_take_back(self) -> None:
        """Refuses a dense prefill, whose chunks read all that is kept, and windows that are cut once."""
        if self.dense_prefill or self.pattern.grows:
            raise CacheError(
                f"{self.pattern} with {'dense' if self.dense_prefill else 'masked'} prefill reads a chunk of draft tokens otherwise than "
                "one token at a time: assisted generation needs a plan with prefill='masked' and without +grow"
            )

    def crop(self, left: Columns | None, count: int) -> None:
        """Take back the last columns. Exact while they are recorded, or while nothing has left the window."""
        if left is None or self.positions is None or self.k is None or self.v is None:
            return
        ends = left.lengths()
        dropped = any(self.pattern.kept(n + count) < n + count for n in ends)
        if dropped:  # assisted generation asks even when it took every draft
            self.must_take_back()
        lost = count > 0 and any(self._was_evicted(n + count, n) for n in ends)
        if lost and not self._holds_all(left):
            raise CacheError(
                f"crop(-{count}): {self.pattern} has already dropped tokens that would be visible again; call "
                "activate_past_recording() before the tokens to take back: assisted generation does so for the cache "
                "that it is given as past_key_values=HeadwiseCache(plan)"
            )
        ends = ends[:1] if self.positions.shape[0] == 1 else ends
        limit = torch.tensor(ends, device=self.positions.device, dtype=torch.int32)[:, None]
        self.positions = self.positions.masked_fill(self.positions >= limit, -1)
        self.next = None
        self._compress(left)

    def _was_evicted(self, before: int, after: int) -> bool:
        """Has a token visible at length `after` left the window by length `before`?"""
        return before - self.pattern.window(before) > after - self.pattern.window(after)

    def _holds_all(self, left: Columns) -> bool:
        """Are all tokens that the pattern keeps at this length still stored? (Recorded past, or a short text.)"""
        assert self.positions is not None
        for row, n in enumerate(left.lengths()):
            held = self.positions[min(row, self.positions.shape[0] - 1)]
            if int(((held >= 0) & (held < n)).sum()) < self.pattern.kept(n):
                return False
        return True

    def select_rows(self, index: Tensor) -> None:
        """Row i becomes row index[i]."""
        super().select_rows(index)
        if self.positions is not None and self.positions.shape[0] > 1:
            self.positions = self.positions.index_select(0, index.to(self.positions.device))
        if self.folded is not None:
            at = index.to(self.folded[0].device)
            self.folded = tuple(t.index_select(0, at) for t in self.folded)  # type: ignore[assignment]
        if self.frozen is not None:
            self.frozen = [self.frozen[i] for i in index.tolist()]
        if self.edge is not None:
            self.edge = [self.edge[i] for i in index.tolist()]


def grown(buffer: Tensor | None, new: Tensor, used: int, end: int, least: int = GROWTH) -> Tensor:
    """A buffer (B, Kg, C, D) with room for `end` slots, of which the first `used` are copied.

    It grows by 1/GROWTH of its length, and by `least` slots at least.
    """
    if buffer is not None and buffer.shape[2] >= end:
        return buffer
    capacity = end if buffer is None else end + max(least, end // GROWTH)
    shape = (new.shape[0], new.shape[1], capacity, *new.shape[3:])
    out = torch.empty(shape, dtype=new.dtype, device=new.device)
    if buffer is not None:
        out[:, :, :used] = buffer[:, :, :used]
    return out


def owns(x: Tensor) -> bool:
    """Does this tensor fill its storage, so that keeping it keeps nothing else alive?"""
    return x.untyped_storage().nbytes() == x.numel() * x.element_size()


def _take(x: Tensor, order: Tensor) -> Tensor:
    """Slots `order` (1 or B, S') of x (B, Kg, S, D), in fresh memory."""
    if order.shape[0] == 1:
        return x.index_select(2, order[0])
    return x.gather(2, order[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))
