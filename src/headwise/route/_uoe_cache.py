"""The KV cache of selective attention: each head stores the tokens that it took, and no others.

Letters: B batch, E experts (kv heads), S_e slots of one expert, M new tokens of the busiest expert, D head dim.
"""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from headwise.attention import KVGroup
from headwise.errors import CacheError


class UnionCacheLayer(CacheLayerMixin):
    """One layer of a transformers cache, ragged per expert: k, v (B, S_e, D), S_e the longest row's number of tokens.

    `places` (B, S_e) holds the position of each slot's token in its row, -1 for an empty slot. `seen` counts columns of
    the batch, taken or not, so that the model's positions stay right.
    """

    is_croppable = True
    is_sliding = False

    def __init__(self, experts: int):
        super().__init__()
        self.experts = experts
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self.k: list[Tensor] = []
        self.v: list[Tensor] = []
        self.places: list[Tensor] = []
        self.seen = 0
        self.start: Tensor | None = None
        self.is_initialized = False

    def append(self, k: Tensor, v: Tensor, places: Tensor, columns: int) -> None:
        """Store k, v (B, E, M, D) of tokens at places (B, E, M), -1 = none; `columns` were read. Lists are early to late."""
        if not self.is_initialized:
            empty = k[:, :, :0], v[:, :, :0], places[:, :, :0]
            self.k, self.v, self.places = (list(t.unbind(1)) for t in empty)
        for e in range(self.experts):
            new = k[:, e], v[:, e], places[:, e]
            self._append_one(e, *new)
        self.is_initialized = True
        self.seen += columns

    def _append_one(self, e: int, k: Tensor, v: Tensor, places: Tensor) -> None:
        taken = places >= 0
        lengths = (self.places[e] >= 0).sum(1)
        slots = int((lengths + taken.sum(1)).max())
        grow = slots - self.places[e].shape[1]
        if grow > 0:
            self.k[e], self.v[e] = (torch.nn.functional.pad(t[e], (0, 0, 0, grow)) for t in (self.k, self.v))
            self.places[e] = torch.nn.functional.pad(self.places[e], (0, grow), value=-1)
        row, which = taken.nonzero(as_tuple=True)
        slot = (lengths[:, None] + taken.cumsum(1) - 1)[row, which]
        for store, value in ((self.k, k), (self.v, v), (self.places, places)):
            store[e] = store[e].index_put((row, slot), value[row, which].to(store[e].dtype))

    def groups(self) -> list[KVGroup]:
        """What the attention op reads: one group an expert."""
        return [
            KVGroup(heads=(e,), k=self.k[e][:, None], v=self.v[e][:, None], positions=self.places[e][:, None])
            for e in range(self.experts)
        ]

    @property
    def counts(self) -> Tensor:
        """(B, E) tokens that each expert holds."""
        return torch.stack([(places >= 0).sum(1) for places in self.places], 1)

    @property
    def nbytes(self) -> int:
        """Bytes of the allocated keys, values and places."""
        return sum(t.numel() * t.element_size() for ts in (self.k, self.v, self.places) for t in ts)

    @property
    def kv_bytes(self) -> int:
        """Bytes of keys and values alone."""
        return sum(t.numel() * t.element_size() for ts in (self.k, self.v) for t in ts)

    # -- what transformers asks of a cache layer -----------------------------------------------------------------------

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Not needed."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> NoReturn:
        """Dense attention has no business here."""
        raise CacheError("this cache belongs to a union of experts: start a new one for the dense model")

    def get_seq_length(self) -> int:
        """Columns seen."""
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of the mask that the model builds."""
        return self.seen + query_length, 0

    def get_max_length(self) -> int:
        """No limit."""
        return -1

    def crop(self, tokens_to_remove: int) -> None:
        """Take the last columns away again (a negative number, as transformers 5 says it)."""
        gone = abs(tokens_to_remove)
        if not self.is_initialized or not gone:
            return
        self.seen = max(self.seen - gone, 0)
        for e, places in enumerate(self.places):
            limit = self.seen if self.start is None else (self.seen - self.start)[:, None]
            kept = torch.where(places < limit, places, -1)
            slots = max(int((kept >= 0).sum(1).max()), 0)
            self.k[e], self.v[e], self.places[e] = self.k[e][:, :slots], self.v[e][:, :slots], kept[:, :slots]

    def _rows(self, index: Tensor) -> None:
        for store in (self.k, self.v, self.places):
            store[:] = [t.index_select(0, index.to(t.device)) for t in store]
        self.start = None if self.start is None else self.start.index_select(0, index.to(self.start.device))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Rows in another order, for beam search."""
        if self.is_initialized:
            self._rows(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Only these rows."""
        if self.is_initialized:
            self._rows(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row several times."""
        if self.is_initialized:
            self._rows(torch.arange(len(self.k[0])).repeat_interleave(repeats))
