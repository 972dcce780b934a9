"""The store of a window: sinks and the latest tokens, in slots whose order is free.

Letters as in `stores`.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from headwise.attention.groups import Compensation, KVGroup
from headwise.errors import CacheError
from headwise.plan import Full, Pattern, SinkWindow
from headwise.stores import Columns, Reader, Ring, Store, by_slots, owns


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
        if chunk > 1:  # may a query of the chunk read every slot before it?
            exact = reads_all and (self.frozen is not None or self.slots - chunk == self.pattern.kept(new.offset))
        else:
            exact = new.count == 1 and (reads_all or self.slots == self.pattern.kept(new.offset + new.count))
        held = self.slots - chunk == self.pattern.kept(new.offset)
        return KVGroup(
            heads=self.heads,
            k=self.k,
            v=self.v,
            pattern=Full() if reads_all else self.pattern,
            positions=None if fresh else self.positions[:, None],
            tail=chunk,
            compensation=self._compensation(),
            complete=exact and new.start is None,
            in_order=chunk > 1 and held and new.start is None and self.next == self.pattern.sinks,
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

    @property
    def countable(self) -> bool:
        """Not with a window that lengthens."""
        return self.pattern.grows or isinstance(self.pattern, SinkWindow)

    def rings(self, seen: Columns, room: int) -> list[Ring]:
        """Behind the sinks the window turns; what only grows is filled up."""
        assert self.k is not None and self.v is not None
        grows = self.pattern.grows
        self.frozen = self.edge if grows and self.frozen is None else self.frozen
        longest = self._room(seen)
        size = None if grows else self.pattern.kept(2**30)  # slots of a ring that turns
        slots = longest + room if size is None else min(size, longest + room)
        fit = self.next is not None and self.slots == longest == slots and by_slots(self.k) and by_slots(self.v)
        if not fit:
            self._in_order(longest, slots)
        assert self.k is not None and self.v is not None and self.positions is not None
        B, Kg, C = self.k.shape[:3]
        held = self.positions >= 0
        filled = held.sum(1, dtype=torch.int32)
        sinks = 0 if size is None else self.pattern.sinks
        oldest = self.positions[:, sinks:].argmin(1).to(torch.int32) + sinks
        at = torch.where(filled < C, filled, oldest)
        at, filled = (x[:, None].expand(B, Kg) for x in (at, filled))
        wrap, limit = (at.new_full((B, Kg), x) for x in (sinks, C))
        left = None if size == C else C - longest
        if self.pattern.compensated and self.folded is None:
            mean = self.k.new_zeros(B, Kg, self.k.shape[3], dtype=torch.float32)
            self.folded = mean, torch.zeros_like(mean), mean.new_zeros(B, 1)
        positions, counted = self.positions[:, None], self.pattern.compensation == "count"
        return [
            Ring(
                self.heads,
                self.k,
                self.v,
                positions,
                at,
                filled,
                wrap,
                limit,
                left,
                folded=self.folded,
                weighed=counted,
            )
        ]

    def _in_order(self, longest: int, slots: int) -> None:
        """Kept tokens by position, empty slots behind them, `slots` in all; the longest row holds `longest` tokens."""
        assert self.k is not None and self.v is not None and self.positions is not None
        order = self.positions.masked_fill(self.positions < 0, 2**31 - 1).argsort(dim=1)[:, :longest]
        held = self.positions.gather(1, order)
        self.positions = held.new_full((held.shape[0], slots), -1)
        self.positions[:, : order.shape[1]] = held
        keys, values = _take(self.k, order), _take(self.v, order)
        self.k, self.v = (x.new_zeros(*x.shape[:2], slots, x.shape[3]) for x in (keys, values))
        self.k[:, :, : order.shape[1]], self.v[:, :, : order.shape[1]] = keys, values
        self.next = None

    def settle(self, seen: Columns, count: int) -> None:
        """The host's view of what was written; slots that no row needed are freed."""
        first = self.pattern.sinks
        if self.next is not None:
            self.next = first + (self.next - first + count) % (self.slots - first)
        if self.frozen is None:
            self.edge = self._edges(seen)
        if self.slots != self._room(seen):
            self._compress(seen)

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


def _take(x: Tensor, order: Tensor) -> Tensor:
    """Slots `order` (1 or B, S') of x (B, Kg, S, D), in fresh memory."""
    if order.shape[0] == 1:
        return x.index_select(2, order[0])
    return x.gather(2, order[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))
