"""The artifact between profiling and planning: `InfluenceProfile`, block maps of influence at several lengths."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from headwise import storage
from headwise.addresses import check_kind, read_fingerprint
from headwise.errors import PlanError, UnitError
from headwise.storage import StrPath, decoding
from headwise.units import HeadScores


@dataclass(frozen=True, kw_only=True, eq=False)
class InfluenceProfile(HeadScores):
    """MoA's influence profile: E[P] (L, H, P/b, P/b) for each profiled length P, blocks of b tokens.

    E[P][l, h, i, j] is the sum over a block of queries i and one of keys j of |dL|, the first-order loss change in nats of taking a
    key from a row (see `headwise.budget.moa`), mean over samples. As `HeadScores` its `values` are each head's influence on keys
    that are neither in the first block nor in the last two, at the longest length: what a streaming head would lose.

    >>> profile = InfluenceProfile.of({4: torch.ones(1, 2, 4, 4).tril()}, block=1)
    >>> profile.values.tolist(), profile.to_kv(1).maps[4].shape
    ([[1.0, 1.0]], torch.Size([1, 1, 4, 4]))
    """

    maps: dict[int, Tensor]
    block: int

    def __post_init__(self) -> None:
        super().__post_init__()
        for length, maps in self.maps.items():
            wanted = (self.layers, self.units, length // self.block, length // self.block)
            if tuple(maps.shape) != wanted or length % self.block:
                raise UnitError(
                    f"maps[{length}] has shape {tuple(maps.shape)}; with blocks of {self.block} it is {wanted}"
                )
            if not bool(torch.isfinite(maps).all()) or bool((maps < 0).any()):
                raise UnitError(f"maps[{length}] holds a number that is negative or not finite; influence is a size")

    @classmethod
    def of(cls, maps: dict[int, Tensor], block: int, **labels: Any) -> InfluenceProfile:
        """The profile of these maps, with the values that they imply."""
        if not maps:
            raise PlanError("a profile needs the maps of at least one length")
        longest = maps[max(maps)]
        rows, columns = (torch.arange(size) for size in longest.shape[-2:])
        far = (columns > 0) & (rows[:, None] - columns > 1)
        return cls(values=(longest * far).sum((-1, -2)), maps=maps, block=block, method="moa-influence", **labels)

    @property
    def lengths(self) -> list[int]:
        """Profiled lengths, shortest first."""
        return sorted(self.maps)

    def to_kv(self, kv_heads: int, reduce: Literal["max", "mean", "sum"] = "max") -> InfluenceProfile:
        """The profile of kv heads: block by block the largest (or the mean, the sum) influence of the group's query heads."""
        maps = {length: _reduced(m, kv_heads, reduce) for length, m in self.maps.items()} if self.kind == "head" else {}
        plain = HeadScores.to_kv(self._plain(), kv_heads, reduce)  # checks what was asked for
        return InfluenceProfile.of(
            maps, self.block, kind="kv", data=self.data, fingerprint=self.fingerprint, meta=plain.meta
        )

    def _plain(self) -> HeadScores:
        return HeadScores(
            values=self.values,
            kind=self.kind,
            method=self.method,
            data=self.data,
            fingerprint=self.fingerprint,
            meta=self.meta,
        )

    def normalized(self, how: Literal["max", "sum", "zscore"] = "max") -> HeadScores:
        """The values alone, normalized; see `HeadScores.normalized`."""
        return self._plain().normalized(how)

    @classmethod
    def mean(cls, tables: Sequence[HeadScores]) -> InfluenceProfile:
        """The mean of several profiles of the same lengths, blocks and model, map by map."""
        profiles = [table for table in tables if isinstance(table, InfluenceProfile)]
        first = profiles[0] if profiles else None
        same = [p for p in profiles if first and (p.lengths, p.block) == (first.lengths, first.block)]
        if first is None or len(same) != len(tables):
            raise UnitError("the mean of profiles needs profiles alone, of the same lengths and blocks")
        plain = HeadScores.mean([p._plain() for p in same])  # checks models and shapes
        maps = {n: torch.stack([p.maps[n] for p in same]).mean(0) for n in first.lengths}
        labels = {"kind": first.kind, "data": first.data, "fingerprint": first.fingerprint, "meta": plain.meta}
        return cls.of(maps, first.block, **labels)

    def save(self, path: StrPath) -> None:
        """Write a safetensors file: `values` (L, U) and all `maps`, flat, float32."""
        flat = torch.cat([self.maps[n].float().flatten(2) for n in self.lengths], dim=-1)
        made_for = self.fingerprint and self.fingerprint.to_dict()
        meta: dict[str, Any] = {"kind": self.kind, "data": self.data, "meta": self.meta, "fingerprint": made_for}
        meta |= {"lengths": self.lengths, "block": self.block}
        storage.write_tensors(path, "influence-profile", 1, {"values": self.values, "maps": flat}, meta)

    @classmethod
    def load(cls, path: StrPath) -> InfluenceProfile:
        """Read what `save` wrote. Raises ArtifactError."""
        expect = {"values": (torch.float32, 2), "maps": (torch.float32, 3)}
        tensors, meta = storage.read_tensors(path, "influence-profile", 1, expect)
        with decoding(path):
            lengths, block = storage.field(meta, "lengths", list), storage.field(meta, "block", int)
            return cls(
                values=tensors["values"],
                maps=_unflattened(tensors["maps"], lengths, block),
                block=block,
                method="moa-influence",
                kind=check_kind(storage.field(meta, "kind", str)),
                data=storage.field(meta, "data", str),
                fingerprint=read_fingerprint(meta),
                meta=storage.field(meta, "meta", dict),
            )


def _reduced(maps: Tensor, kv_heads: int, reduce: str) -> Tensor:
    if kv_heads < 1 or maps.shape[1] % kv_heads:
        return maps  # refused by the caller
    grouped = maps.unflatten(1, (kv_heads, -1))
    return grouped.amax(2) if reduce == "max" else grouped.sum(2) if reduce == "sum" else grouped.mean(2)


def _unflattened(flat: Tensor, lengths: list[Any], block: int) -> dict[int, Tensor]:
    if block < 1 or not lengths or not all(isinstance(n, int) and n >= block for n in lengths):
        raise PlanError(f"lengths {lengths} and blocks of {block} tokens do not fit")
    sizes = [(n // block) ** 2 for n in lengths]
    if sum(sizes) != flat.shape[-1]:
        raise PlanError(f"maps hold {flat.shape[-1]} blocks where {sum(sizes)} belong")
    parts = flat.split(sizes, dim=-1)
    return {n: part.unflatten(-1, (n // block, n // block)).clone() for n, part in zip(lengths, parts, strict=True)}


def of_kv_heads(profile: InfluenceProfile, kv_heads: int | None) -> InfluenceProfile:
    """The profile of kv heads, whose count comes from the fingerprint or from the caller."""
    if not isinstance(profile, InfluenceProfile):
        raise PlanError(
            f"moa plans from an InfluenceProfile, not from {type(profile).__name__}: "
            "headwise.budget.moa_influence(model, tokenizer) makes one, InfluenceProfile.load reads one"
        )
    if profile.kind == "kv":
        return profile
    count = profile.fingerprint.kv_heads if profile.fingerprint else kv_heads
    if count is None:
        raise PlanError("the profile is of query heads and does not know its model: give kv_heads=")
    return profile.to_kv(count, "max")
