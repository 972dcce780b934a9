"""The store of a `Selected` pattern: tokens chosen by content when a chunk of the prompt has been read, as many as each head wins.

Heads that keep equally many share a part; a part is as long as its longest row needs. Letters as in `stores`; Kp heads of a part.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from headwise.attention.backends import take_heads
from headwise.attention.groups import KVGroup, Queries, query_heads
from headwise.errors import CacheError
from headwise.keyscores import Ask, choose, resolve
from headwise.plan import Full, Selected
from headwise.stores import Columns, Reader, Ring, Store, grown, owns

SLACK = 8  # slots by which a part grows at least: parts are short, and there are many


@dataclass
class Part:
    """Heads with storages of one length: k, v (B, Kp, C, D) and positions (B, Kp, C) int32 with -1 for empty, C >= `length` slots.

    `most` and `least` say, row by row, how many tokens the fullest and the emptiest head hold. `next` is the slot of the token that
    leaves next, where all rows and heads are alike, their window is the ring of slots from `ring` on.
    """

    heads: tuple[int, ...]  # places within the store
    k: Tensor
    v: Tensor
    positions: Tensor
    length: int
    most: list[int]
    least: list[int]
    ring: int | None = None
    next: int = 0

    def view(self, heads: Sequence[int], *, start: Tensor | None, alone: bool) -> KVGroup:
        """What queries read: every token held, up to their own. `alone`: one query, behind all of them."""
        k, v = self.k[:, :, : self.length], self.v[:, :, : self.length]
        complete = alone and start is None and min(self.least) == self.length
        positions = self.positions[:, :, : self.length]
        return KVGroup(tuple(heads[h] for h in self.heads), k, v, Full(), positions, complete=complete)

    def append(self, k: Tensor, v: Tensor, positions: Tensor, added: list[int]) -> None:
        """New columns (B, Kp, N, D) behind the others; `added` of them are real, row by row."""
        end = self.length + k.shape[2]
        positions = positions[:, None].expand(*k.shape[:3])
        self.positions = grown(self.positions, positions, self.length, end, SLACK)
        self.k, self.v = grown(self.k, k, self.length, end, SLACK), grown(self.v, v, self.length, end, SLACK)
        at = slice(self.length, end)
        self.k[:, :, at], self.v[:, :, at], self.positions[:, :, at] = k, v, positions
        self.length, self.ring = end, None
        self.most = [m + n for m, n in zip(self.most, added, strict=True)]
        self.least = [m + n for m, n in zip(self.least, added, strict=True)]

    def step(self, k: Tensor, v: Tensor, position: Tensor, leaving: list[int], added: list[int]) -> None:
        """One new token a row, in the place of the one at position `leaving` (-1: none leaves), else in an empty slot or a new one."""
        net = [n if gone < 0 else 0 for n, gone in zip(added, leaving, strict=True)]
        if self.ring is not None and min(leaving) >= 0:
            self._turn(k, v, position)
            return
        self.ring = None
        if max(m + n for m, n in zip(self.most, net, strict=True)) > self.length:
            self.append(k, v, position, net)
            self._drop(leaving)
            return
        held = self.positions[:, :, : self.length]
        gone = held == torch.tensor(leaving, device=held.device, dtype=torch.int32)[:, None, None]
        slot = ((gone & (held >= 0)).to(torch.int8) * 2 + (held < 0)).argmax(-1, keepdim=True)  # (B, Kp, 1)
        held.scatter_(2, slot, position[:, None].expand_as(slot))
        self.k.scatter_(2, slot[..., None].expand_as(k), k)
        self.v.scatter_(2, slot[..., None].expand_as(v), v)
        self.most = [m + n for m, n in zip(self.most, net, strict=True)]
        self.least = [m + n for m, n in zip(self.least, net, strict=True)]

    def _turn(self, k: Tensor, v: Tensor, position: Tensor) -> None:
        """The ring moves on by one slot, known on the host."""
        assert self.ring is not None
        self.k[:, :, self.next], self.v[:, :, self.next] = k[:, :, 0], v[:, :, 0]
        self.positions[:, :, self.next] = position
        self.next = self.next + 1 if self.next + 1 < self.length else self.ring

    def _drop(self, leaving: list[int]) -> None:
        if max(leaving) < 0:
            return
        held = self.positions[:, :, : self.length]
        gone = torch.tensor(leaving, device=held.device, dtype=torch.int32)[:, None, None]
        held.masked_fill_((held == gone) & (gone >= 0), -1)

    def rings(self, store: Sequence[int], low: list[int] | None, lengths: list[int], recent: int, room: int) -> Ring:
        """What is chosen, then the window as a ring, in each head. `low` (B,) is where the windows begin; None: everything stays."""
        heads = tuple(store[h] for h in self.heads)
        more = [room] * len(lengths) if low is None else extra(low, lengths, recent)
        slots = max(self.length, *(m + min(n, room) for m, n in zip(self.most, more, strict=True)))
        self._in_order(slots)
        filled = (self.positions >= 0).sum(-1, dtype=torch.int32)
        if low is None:
            limit, wrap = torch.full_like(filled, slots), torch.zeros_like(filled)
            return Ring(heads, self.k, self.v, self.positions, filled, filled, wrap, limit, slots - max(self.most))
        first, missing, many = (
            torch.tensor(x, device=filled.device, dtype=torch.int32)[:, None]
            for x in (low, [max(0, f - n) for f, n in zip(low, lengths, strict=True)], more)
        )
        window = self.positions >= first[:, None]
        wrap, limit = filled - window.sum(-1, dtype=torch.int32) + missing, filled + many
        oldest = self.positions.masked_fill(~window, 2**31 - 1).argmin(-1).to(torch.int32)
        at = torch.where(filled < limit, filled, oldest)
        return Ring(heads, self.k, self.v, self.positions, at, filled, wrap, limit, None if max(more) <= room else room)

    def _in_order(self, slots: int) -> None:
        """Tokens by position, empty slots behind them, `slots` in all."""
        if self.ring is not None and self.positions.shape[2] == self.length == slots:
            return
        held = self.positions[:, :, : self.length]
        order = held.masked_fill(held < 0, 2**31 - 1).argsort(-1)
        more = slots - self.length
        self.positions = F.pad(held.gather(2, order), (0, more), value=-1)
        index = order[..., None].expand(-1, -1, -1, self.k.shape[3])
        self.k, self.v = (F.pad(x[:, :, : self.length].gather(2, index), (0, 0, 0, more)) for x in (self.k, self.v))
        self.ring = None

    def settle(self, added: list[int], count: int) -> None:
        """`count` tokens went through the rings, of which `added` (B,) took new slots."""
        if self.ring is not None:
            self.next = self.ring + (self.next - self.ring + count) % (self.length - self.ring)
        self.most = [m + n for m, n in zip(self.most, added, strict=True)]
        self.least = [m + n for m, n in zip(self.least, added, strict=True)]
        self.length = max(self.length, *self.most)

    def select_rows(self, index: Tensor) -> None:
        """Row i becomes row index[i]."""
        at = index.to(self.k.device)
        self.k, self.v, self.positions = (t.index_select(0, at) for t in (self.k, self.v, self.positions))
        self.most, self.least = ([counts[i] for i in index.tolist()] for counts in (self.most, self.least))


class SelectedStore(Store):
    """Sinks, a window and chosen tokens; the choice is made anew after every chunk of the prompt, from all that is held.

    The prompt ends with the first token that comes alone. From then on the window slides and the chosen tokens stay, or, with `grow`,
    everything stays.
    """

    pattern: Selected

    def __init__(self, pattern: Selected, heads: tuple[int, ...]):
        self.scorer, self.split = resolve(pattern)
        super().__init__(pattern, heads)

    def reset(self) -> None:
        """Free the storage."""
        super().reset()
        self.parts: list[Part] = []
        self.edge: list[
            int
        ] = []  # first position of each row's window when the prompt ended: what lies before is chosen
        self.ended = False  # is the prompt over?

    def tensors(self) -> list[Tensor]:
        """Keys, values and positions of all parts."""
        return [t for part in self.parts for t in (part.k, part.v, part.positions)]

    @property
    def slots(self) -> int:
        """Tokens for which the longest head has room."""
        return max((part.length for part in self.parts), default=0)

    @property
    def held(self) -> str:
        """Slots of every head."""
        by_head = {h: part.length for part in self.parts for h in part.heads}
        return "/".join(str(by_head[h]) for h in sorted(by_head)) if len(self.parts) > 1 else str(self.slots)

    def extend(
        self, k: Tensor, v: Tensor, new: Columns, *, keep_all: bool, reader: Reader | None = None
    ) -> list[KVGroup]:
        """A token alone takes its place; a chunk is read together with all that is held, and then the choice is made."""
        alone = new.count == 1 and bool(self.parts)
        self.ended = self.ended or alone
        if alone or (self.ended and self.pattern.grow):
            self._write(k, v, new, alone)
            return [part.view(self.heads, start=new.start, alone=alone) for part in self.parts]
        group = self._whole(k, v, new)
        self._select(group, new, reader)
        return [group]

    def _write(self, k: Tensor, v: Tensor, new: Columns, alone: bool) -> None:
        """Behind the prompt: one token in the place of another, or more behind what is held."""
        positions, lengths = new.positions(k.device).expand(k.shape[0], -1), new.lengths()
        added = [n - max(0, new.offset - first) for n, first in zip(lengths, new.rows, strict=True)]
        leaving = [-1] * len(lengths)
        if not self.pattern.grow:
            late = [n - 1 - self.pattern.recent for n in lengths]
            leaving = [p if p >= low else -1 for p, low in zip(late, self._lows() or (), strict=True)]
        for part in self.parts:
            mine = (k, v) if len(self.parts) == 1 else (take_heads(k, part.heads), take_heads(v, part.heads))
            if alone:
                part.step(*mine, positions, leaving, added)
            else:
                part.append(*mine, positions, added)

    def _whole(self, k: Tensor, v: Tensor, new: Columns) -> KVGroup:
        """All that is held and the chunk as one group, in order of position, empty slots first."""
        if not self.parts:
            return KVGroup(self.heads, k, v)
        held = self._merged()
        order = held[2].argsort(dim=-1, stable=True)
        keys, values = (x.gather(2, order[..., None].expand(-1, -1, -1, x.shape[3])) for x in held[:2])
        fresh = new.positions(k.device)[:, None].expand(*k.shape[:3])
        positions = torch.cat([held[2].gather(2, order), fresh], dim=2)
        return KVGroup(self.heads, torch.cat([keys, k], 2), torch.cat([values, v], 2), Full(), positions)

    def _merged(self) -> tuple[Tensor, Tensor, Tensor]:
        """Keys, values, positions of all heads in order, short ones filled up with empty slots."""
        found = []
        for name, empty in (("k", 0), ("v", 0), ("positions", -1)):
            parts = [getattr(part, name) for part in self.parts]
            shape = (parts[0].shape[0], len(self.heads), self.slots, *parts[0].shape[3:])
            out = parts[0].new_full(shape, empty)
            for part, x in zip(self.parts, parts, strict=True):
                out[:, list(part.heads), : part.length] = x[:, :, : part.length]
            found.append(out)
        return found[0], found[1], found[2]

    def _select(self, group: KVGroup, new: Columns, reader: Reader | None) -> None:
        """Keep what the pattern's rule chooses of a group, and free the rest."""
        seen = tuple(new.lengths())
        ask = self._ask(group, new, reader, seen)
        keep, positions = choose(ask, self.scorer, self.split), ask.positions.int()
        counts = keep.sum(-1).tolist()  # (B, Kg)
        self.edge = [n - self.pattern.recent for n in seen]
        alike = new.start is None and min(seen) >= self.pattern.sinks + self.pattern.recent
        sizes = [max(1, *(row[h] for row in counts)) for h in range(len(self.heads))]
        parts = []
        for size in sorted(set(sizes)):
            heads = tuple(h for h, s in enumerate(sizes) if s == size)
            part = self._part(heads, group, positions, keep, size)
            rows = [[row[h] for h in heads] for row in counts]
            part.most, part.least = [max(row) for row in rows], [min(row) for row in rows]
            if alike and min(part.least) == size:
                part.ring = part.next = size - self.pattern.recent
            parts.append(part)
        self.parts = parts

    def _ask(self, group: KVGroup, new: Columns, reader: Reader | None, seen: tuple[int, ...]) -> Ask:
        if reader is None:
            return Ask(None, group, Queries(new.count, new.offset, new.start), 1.0, 0, self.pattern, seen)
        q = reader.q
        if len(self.heads) < reader.k.shape[1]:
            q = take_heads(q, query_heads(self.heads, q.shape[1] // reader.k.shape[1]))
        return Ask(q, group, reader.queries(), reader.scale, reader.layer, self.pattern, seen)

    def _part(self, heads: tuple[int, ...], group: KVGroup, positions: Tensor, keep: Tensor, size: int) -> Part:
        """The tokens to keep of some heads, by position, in fresh memory; shorter rows end in empty slots."""
        k, v, at, keep = (take_heads(x, heads) for x in (group.k, group.v, positions, keep))
        if size == k.shape[2] and all(owns(x) and x.is_contiguous() for x in (k, v)):
            return Part(heads, k, v, at.masked_fill(~keep, -1), size, [], [])
        order = at.masked_fill(~keep, 2**31 - 1).argsort(dim=-1)[..., :size]
        held = at.masked_fill(~keep, -1).gather(2, order)
        keys, values = (x.gather(2, order[..., None].expand(-1, -1, -1, x.shape[3])) for x in (k, v))
        return Part(heads, keys, values, held, size, [], [])

    @property
    def countable(self) -> bool:
        """Once a prompt was read."""
        return bool(self.parts)

    def rings(self, seen: Columns, room: int) -> list[Ring]:
        """One for each part. The prompt ends here."""
        self.ended = True
        low, lengths = self._lows(), seen.lengths()
        return [part.rings(self.heads, low, lengths, self.pattern.recent, room) for part in self.parts]

    def settle(self, seen: Columns, count: int) -> None:
        """The host's counts of what was written."""
        low, before = self._lows(), [max(0, n - count) for n in seen.lengths()]
        more = [count] * len(before) if low is None else extra(low, before, self.pattern.recent)
        for part in self.parts:
            part.settle([min(n, count) for n in more], count)

    def _lows(self) -> list[int] | None:
        """First position of each row that may leave; None where nothing does."""
        return None if self.pattern.grow else [max(edge, self.pattern.sinks) for edge in self.edge]

    def must_take_back(self) -> None:
        """Refused: a chunk of drafts would be read, and chosen from, otherwise than its tokens one by one."""
        raise CacheError(
            f"{self.pattern} with dense prefill reads a chunk of draft tokens otherwise than one token at a time: assisted generation "
            "needs a plan with prefill='masked' and without +grow"
        )

    def crop(self, left: Columns | None, count: int) -> None:
        """Take back columns read behind the prompt, as long as nothing has left for them."""
        if left is None or not self.parts or count == 0:
            return
        rows = list(zip(left.lengths(), self.edge, strict=True))
        recent, sinks = self.pattern.recent, self.pattern.sinks
        whole = self.ended and all(n >= edge + recent for n, edge in rows)
        kept = self.pattern.grow or all(n + count <= max(edge, sinks) + recent for n, edge in rows)
        if not (whole and kept):
            raise CacheError(
                f"crop(-{count}): {self.pattern} has chosen from these tokens, or dropped others for them, and cannot take them back"
            )
        for part in self.parts:
            limit = torch.tensor(left.lengths(), device=part.k.device, dtype=torch.int32)[:, None, None]
            held = part.positions[:, :, : part.length]
            held.masked_fill_(held >= limit, -1)
            part.length = max(1, int((held >= 0).any(0).any(0).nonzero().max()) + 1)
            counts = (held >= 0).sum(-1)
            part.most, part.least, part.ring = counts.amax(1).tolist(), counts.amin(1).tolist(), None

    def select_rows(self, index: Tensor) -> None:
        """Row i becomes row index[i]."""
        for part in self.parts:
            part.select_rows(index)
        self.edge = [self.edge[i] for i in index.tolist()] if self.edge else []


def extra(low: list[int], lengths: list[int], recent: int) -> list[int]:
    """Tokens that each row takes before the first one leaves its window."""
    return [max(0, recent - (n - first)) for first, n in zip(low, lengths, strict=True)]
