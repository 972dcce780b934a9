"""Decode steps whose bookkeeping stands on the device, so that the host need not look: one launch a step and one a layer.

A cache hands its storages over as rings (`stores.Ring`); from then on a token is written, and the next one found its place, by
kernels, or by torch where those do not run. A captured CUDA graph of a step stays right from step to step, because all that changes
is in tensors. `HeadwiseCache.begin_steps` starts it; whatever is no decode step ends it first (`HeadwiseLayer.settle`).

Letters: L layers, B batch, K kv heads, Kg heads of one ring, C slots, D head dim.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from headwise.attention.backends import take_heads
from headwise.attention.groups import Compensation, KVGroup, Table
from headwise.attention.own import unable
from headwise.plan import Full
from headwise.stores import Ring

ROOM = 256  # tokens for which a buffer that grows gets room at least, before the steps begin anew


class Steps:
    """The rings of all layers of a cache, moved on together."""

    def __init__(self, rings: Sequence[Sequence[Ring]], position: Tensor):
        self.rings = [list(layer) for layer in rings]
        self.fast = unable(self.rings[0][0].k) is None
        self.position = position.to(torch.int32)  # (B,) of the newest token
        self.at, self.filled, self.wrap, self.limit = (
            torch.stack([_by_head(layer, name) for layer in self.rings]) for name in ("at", "filled", "wrap", "limit")
        )
        self.slot, self.gone = torch.zeros_like(self.at), torch.zeros_like(self.at)
        rooms = [ring.room for layer in self.rings for ring in layer if ring.room is not None]
        self.left = min(rooms, default=None)
        self.count = 0  # tokens taken
        self.closed = False  # has a layer settled?
        if self.fast:
            self._addresses()
        self.tables = [self._table(layer) for layer in range(len(self.rings))]

    def _addresses(self) -> None:
        from headwise.attention.triton.rings import Counters

        self.counters = Counters.of(self.at, self.filled, self.wrap, self.limit, self.position)
        self.slot, self.gone = self.counters.slot, self.counters.gone
        self.means = [_means(layer) for layer in self.rings]
        tables = [[_pointers(layer, name) for layer in self.rings] for name in ("k", "v", "positions")]
        both = torch.tensor(tables, dtype=torch.int64).to(self.at.device)
        self.k_ptr, self.v_ptr, self.p_ptr = both[0], both[1], both[2]

    def _table(self, layer: int) -> Table:
        this = weakref.ref(self)  # no ring of references: a dropped cache is freed without the garbage collector

        def groups() -> list[KVGroup]:
            steps = this()
            assert steps is not None
            return steps.groups(layer)

        if not self.fast:
            return Table(self.at[layer], self.at[layer], self.filled[layer], groups)
        splits, means = self.counters.splits(layer), self.means[layer]
        compensation = None if means is None else Compensation(means.k_hat, means.v_hat, means.log_count)
        return Table(self.k_ptr[layer], self.v_ptr[layer], self.filled[layer], groups, compensation, splits)

    @property
    def nbytes(self) -> int:
        """Bytes of the numbers; the storages belong to the stores."""
        numbers = [self.at, self.filled, self.wrap, self.limit, self.slot, self.gone, self.position]
        if self.fast:
            numbers += [self.k_ptr, self.v_ptr, self.p_ptr, self.counters.starts, self.counters.first]
            numbers += [x for means in self.means if means is not None for x in means]
        return sum(x.numel() * x.element_size() for x in numbers)

    def write(self, layer: int, k: Tensor, v: Tensor) -> None:
        """The new token's keys and values (B, K, 1, D) of one layer; the first layer moves all rings on."""
        if layer == 0:
            self.advance()
        if not self.fast:
            self._write(layer, k, v)
            return
        from headwise.attention.triton.rings import write

        slot, gone = self.slot[layer], self.gone[layer]
        pointers = self.k_ptr[layer], self.v_ptr[layer], self.p_ptr[layer]
        write(k, v, *pointers, slot, gone, self.position, self.means[layer])

    def advance(self) -> None:
        """One token further."""
        self.counted(1)
        if self.fast:
            from headwise.attention.triton.rings import advance

            advance(self.counters)
            return
        self.slot.copy_(self.at)
        self.gone.copy_(self.filled >= self.limit)
        self.at.copy_(torch.where(self.at + 1 >= self.limit, self.wrap, self.at + 1))
        self.filled.copy_(torch.minimum(self.filled + 1, self.limit))
        self.position += 1

    def over(self, layer: int) -> bool:
        """Is there no room for another token, or did a layer before this one end the steps?"""
        return self.closed or (layer == 0 and self.left == 0)

    def counted(self, count: int) -> None:
        """The host's side of `count` steps."""
        self.count += count
        self.left = None if self.left is None else self.left - count

    def _write(self, layer: int, k: Tensor, v: Tensor) -> None:
        """The reference: one scatter a tensor."""
        for ring in self.rings[layer]:
            slot = take_heads(self.slot[layer], ring.heads).long()[..., None]  # (B, Kg, 1)
            if ring.positions is not None:
                R, P = ring.positions.shape[:2]
                ring.positions.scatter_(2, slot[:R, :P], self.position[:R, None, None].expand(R, P, 1))
            if ring.skip is not None:
                slot = slot + torch.tensor(ring.skip, device=slot.device)[:, None, None]
            index = slot[..., None].expand(-1, -1, -1, ring.k.shape[3])
            if ring.folded is not None:
                leaving = take_heads(self.gone[layer], ring.heads)[:, :1].to(
                    torch.float32
                )  # (B, 1): the heads are alike
                _fold(ring.folded, ring.k.gather(2, index)[:, :, 0], ring.v.gather(2, index)[:, :, 0], leaving)
            for storage, new in ((ring.k, k), (ring.v, v)):
                storage.scatter_(2, index, take_heads(new, ring.heads))

    def finish(self, layer: int) -> None:
        """Give the means of what left back to the stores."""
        means = self.means[layer] if self.fast else None
        for ring in self.rings[layer]:
            if means is not None and ring.folded is not None:
                ring.folded[0].copy_(take_heads(means.k_hat, ring.heads))
                ring.folded[1].copy_(take_heads(means.v_hat, ring.heads))
                ring.folded[2].copy_(take_heads(means.number, ring.heads)[:, :1])

    def groups(self, layer: int) -> list[KVGroup]:
        """What a query at the newest token reads, as groups with positions; -1 where a slot holds no token."""
        return [self._group(layer, ring) for ring in self.rings[layer]]

    def _group(self, layer: int, ring: Ring) -> KVGroup:
        filled = take_heads(self.filled[layer], ring.heads)
        B, Kg = filled.shape
        skip = torch.tensor(ring.skip or [0] * B, dtype=torch.int32, device=filled.device)[:, None, None]
        end = int((filled[..., None] + skip).max())  # what lies behind was never written
        at = torch.arange(end, device=filled.device, dtype=torch.int32) - skip  # (B, 1, S)
        held = (at >= 0) & (at < filled[..., None])
        positions = at if ring.positions is None else ring.positions[..., :end]
        positions = positions.expand(B, Kg, end).masked_fill(~held, -1)
        extra, means = None, self.means[layer] if self.fast else _means(self.rings[layer])
        if ring.folded is not None and means is not None:
            extra = Compensation(*(take_heads(x, ring.heads) for x in (means.k_hat, means.v_hat, means.log_count)))
        return KVGroup(ring.heads, ring.k[:, :, :end], ring.v[:, :, :end], Full(), positions, compensation=extra)


class Means(NamedTuple):
    """What left the rings of a layer, heads in order: means k, v (B, K, D), how many (B, K), and the logit it adds; float32.

    `weigh` (K,) int32 says which heads keep such means: 0 none, 1 as one token, 2 as many as they stand for.
    """

    k_hat: Tensor
    v_hat: Tensor
    number: Tensor
    log_count: Tensor
    weigh: Tensor


def _means(layer: Sequence[Ring]) -> Means | None:
    """The means of a layer as its rings have them; None where no ring keeps any."""
    if all(ring.folded is None for ring in layer):
        return None
    B, _, _, D = layer[0].k.shape
    K, device = sum(len(ring.heads) for ring in layer), layer[0].k.device
    k_hat, v_hat = torch.zeros(2, B, K, D, device=device)
    number, weigh = torch.zeros(B, K, device=device), [0] * K
    for ring in layer:
        if ring.folded is not None:
            heads = list(ring.heads)
            k_hat[:, heads], v_hat[:, heads], number[:, heads] = (
                ring.folded[0],
                ring.folded[1],
                ring.folded[2].expand(B, len(heads)),
            )
            for h in heads:
                weigh[h] = 2 if ring.weighed else 1
    kinds = torch.tensor(weigh, dtype=torch.int32, device=device)
    log_count = torch.where(kinds == 2, number, number.clamp(max=1)).log()
    return Means(k_hat, v_hat, number, log_count, kinds)


def _fold(means: tuple[Tensor, Tensor, Tensor], k: Tensor, v: Tensor, leaving: Tensor) -> None:
    """k_hat <- (n k_hat + k) / (n + 1) in the rows that lose a token, leaving (B, 1) = 1."""
    k_hat, v_hat, n = means
    total = (n + leaving).clamp(min=1)[..., None]
    for mean, x in ((k_hat, k), (v_hat, v)):
        mean.copy_((mean * n[..., None] + x.float() * leaving[..., None]) / total)
    n += leaving


def _by_head(layer: Sequence[Ring], name: str) -> Tensor:
    """A number of all rings of a layer, heads in order: (B, K) int32, contiguous."""
    order = [h for ring in layer for h in ring.heads]
    places = sorted(range(len(order)), key=order.__getitem__)
    joined = torch.cat([getattr(ring, name).to(torch.int32) for ring in layer], dim=1)
    return take_heads(joined, places).contiguous()


def _pointers(layer: Sequence[Ring], name: str) -> list[list[int]]:
    """Addresses of slot 0 by (row, kv head); 0 where there is no such tensor."""
    K = sum(len(ring.heads) for ring in layer)
    table = [[0] * K for _ in range(layer[0].k.shape[0])]
    for ring in layer:
        x: Tensor | None = getattr(ring, name)
        if x is None:
            continue
        rows, heads = (0 if size == 1 else x.stride(dim) for dim, size in enumerate(x.shape[:2]))
        for b, row in enumerate(table):
            skip = ring.skip[b] * x.stride(2) if ring.skip is not None else 0
            for place, h in enumerate(ring.heads):
                row[h] = x.data_ptr() + (b * rows + place * heads + skip) * x.element_size()
    return table
