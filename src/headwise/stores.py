"""What a cache layer is made of: a store for the kv heads of one pattern. It holds what the pattern keeps and frees the rest.

Letters: B batch, Kg heads of one store, S slots, N new columns, D head dim. Columns and positions as in `attention.groups`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from headwise.attention.groups import KVGroup, Queries
from headwise.plan import Pattern

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


@dataclass(frozen=True)
class Ring:
    """Where the next tokens of some kv heads go, in numbers that a device can move on by itself.

    Every head of every row has its own ring, int32 (B, Kg): the next token goes to slot `at`, the one after it to `at + 1` or, behind
    slot `limit` - 1, to `wrap`. The first `filled` slots hold tokens, which every later query reads. `skip`: so many slots of padding
    lie in front of slot 0, row by row, and count in none of these numbers. `room`: tokens until a slot is missing; None: never. What
    leaves a full ring is added to `folded`, where there is one.
    """

    heads: tuple[int, ...]
    k: Tensor
    v: Tensor
    positions: Tensor | None  # (1 or B, 1 or Kg, C) int32, written along; None where slot t holds column t
    at: Tensor
    filled: Tensor
    wrap: Tensor
    limit: Tensor
    room: int | None
    skip: list[int] | None = None
    folded: tuple[Tensor, Tensor, Tensor] | None = (
        None  # means k, v (B, Kg, D) and number (B, 1) of what left the ring, float32
    )
    weighed: bool = True  # does the compensation token count as many as it stands for?


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

    @property
    def countable(self) -> bool:
        """Can rings say where tokens go?"""
        return False

    def rings(self, seen: Columns, room: int) -> list[Ring]:
        """The storage as rings with place for `room` more tokens, or for all that ever come; only where `countable`.

        `seen` are the columns so far. The prompt is over; until `settle` the rings are written to and nothing else is called.
        """
        raise NotImplementedError

    def settle(self, seen: Columns, count: int) -> None:
        """`count` tokens were written through the rings; `seen` are the columns with them."""
        raise NotImplementedError

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

    @property
    def countable(self) -> bool:
        """Always."""
        return True

    def rings(self, seen: Columns, room: int) -> list[Ring]:
        """Behind the last token, until the buffer is full."""
        assert self.k is not None and self.v is not None
        end = self.length + room
        self.k, self.v = (grown(x, x, self.length, end, 0) for x in (self.k, self.v))
        B, Kg, C = self.k.shape[:3]
        skip = torch.tensor(seen.rows, dtype=torch.int32, device=self.k.device)[:, None].expand(B, Kg)
        filled, limit = self.length - skip, C - skip
        return [Ring(self.heads, self.k, self.v, None, filled, filled, 0 * skip, limit, C - self.length, seen.rows)]

    def settle(self, seen: Columns, count: int) -> None:
        """They stand behind the others."""
        self.length += count

    def crop(self, left: Columns | None, count: int) -> None:
        """Forget the last columns; their room stays."""
        self.length -= min(count, self.length)


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


def by_slots(x: Tensor) -> bool:
    """Does one slot of x (B, Kg, S, D) follow the other without a gap?"""
    return x.stride(3) == 1 and x.stride(2) == x.shape[3]


def owns(x: Tensor) -> bool:
    """Does this tensor fill its storage, so that keeping it keeps nothing else alive?"""
    return x.untyped_storage().nbytes() == x.numel() * x.element_size()
