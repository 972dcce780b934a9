"""A transformers `Cache` whose layers hold, for every kv head, only the tokens that its pattern keeps.

The kv heads of a layer are grouped by pattern; each group has its own tensors, as long as that pattern needs. What is
dropped is freed. The model's attention is reached through `headwise.attach`, which asks a layer for its groups
(`HeadwiseLayer.take`) right after the model has called `update`; the keys keep the rotary positions they came with.

Letters: B batch, K kv heads, Kg heads of one group, S slots, D head dim. Columns and positions as in `attention.groups`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from headwise.attention.backends import take_heads
from headwise.attention.groups import KVGroup, Queries, Table
from headwise.attention.own import unable
from headwise.errors import CacheError, PlanError
from headwise.plan import HeadPlan, Pattern, Selected
from headwise.selected_store import SelectedStore
from headwise.steps import ROOM, Steps
from headwise.stores import Columns, FullStore, Reader, Store
from headwise.window_store import WindowStore

FEW = 4  # tokens for which moving the books to the device and back is not worth it
Layers = Tensor | Sequence[Tensor]  # the same for every layer, or one for each


class HeadwiseCache(Cache):
    """The KV cache of a `HeadPlan`: real memory freed per kv head, under plain `generate`.

    >>> from headwise.plan import SinkWindow
    >>> cache = HeadwiseCache(HeadPlan.uniform(SinkWindow(sinks=4, window=32), layers=2, kv_heads=2))
    >>> cache.nbytes
    0
    """

    def __init__(self, plan: HeadPlan):
        self.plan = plan
        layers = [
            HeadwiseLayer(plan.groups(layer), dense_prefill=plan.prefill == "dense", index=layer)
            for layer in range(plan.layers)
        ]
        super().__init__(layers=layers)
        self._last: Steps | None = None
        self._short = 0  # how often steps ended after a few tokens

    @property
    def nbytes(self) -> int:
        """Bytes of all allocated tensors: keys, values, slot positions, compensation tokens, the numbers of `begin_steps`."""
        return sum(layer.nbytes for layer in self.layers) + (self.steps.nbytes if self.steps else 0)

    @property
    def steps(self) -> Steps | None:
        """Decode steps whose bookkeeping stands on the device, where they have begun."""
        return self.layers[0].steps if self.layers else None

    def begin_steps(self, *, everywhere: bool = False) -> Steps | None:
        """From here on tokens come one at a time, and their bookkeeping moves to the device: fewer launches, none that waits for the host.

        None, and nothing changes, where our kernels do not run (`everywhere` takes torch's operations there) or where a pattern's slots
        follow no rule that a device can count by: windows that lengthen with the text. What is no such step
        (a chunk, beams, taking back) ends them by itself; where that happens at once and again, they do not begin any more.
        """
        if not self.countable(everywhere=everywhere):
            return None
        layers: list[HeadwiseLayer] = self.layers
        first = layers[0]
        seen, room = first.columns(), max(ROOM, first.seen // ROOM)
        found = []
        for layer in layers:
            found.append([ring for store in layer.stores for ring in store.rings(seen, room)])
        last = torch.tensor([first.seen - 1 - row for row in first.rows], device=first.device)
        self._short += self._last is not None and self._last.count < FEW
        steps = self._last = Steps(found, last)
        for layer in layers:
            layer.steps = steps
        return steps

    def countable(self, *, everywhere: bool = False) -> bool:
        """Would `begin_steps` begin?"""
        layers: list[HeadwiseLayer] = self.layers
        first = layers[0]
        if not first.seen or self._short > 1 or not (everywhere or unable(first.like) is None):
            return False
        return all(layer.seen == first.seen and layer.device == first.device and layer.countable for layer in layers)

    def settle(self) -> None:
        """End the steps, if they have begun: the host knows again what is held where."""
        for layer in self.layers:
            layer.settle()

    def fill(self, k: Layers, v: Layers, q: Layers | None = None) -> HeadwiseCache:
        """As if a prompt had been read whose keys and values are k, v (B, K, T, D), in every layer or one for each; returns the cache.

        For measurements: memory and the time of a decode step at T tokens without running a prompt, or many plans behind one dense
        prefill. `q` (B, H, T, D) are its queries, or the last of them, for plans that choose tokens by content. No padding.

        >>> cache = HeadwiseCache(HeadPlan.full(layers=2, kv_heads=2)).fill(torch.ones(1, 2, 8, 4), torch.ones(1, 2, 8, 4))
        >>> cache.nbytes, cache.get_seq_length()
        (1024, 8)
        """
        for index, layer in enumerate(self.layers):
            keys, values, queries = (x if x is None or isinstance(x, Tensor) else x[index] for x in (k, v, q))
            assert keys is not None and values is not None
            layer.update(keys, values)
            layer.take(None, None if queries is None else _Prompt(queries, keys, queries.shape[-1] ** -0.5, index))
        return self

    def layer_bytes(self) -> list[int]:
        """Allocated bytes, one number a layer."""
        return [layer.nbytes for layer in self.layers]

    def table(self) -> str:
        """Bytes, tokens and patterns of every layer as text."""
        lines = [f"{'layer':>5} {'MiB':>9} {'seen':>7}  kv heads: slots"]
        for index, layer in enumerate(self.layers):
            stores = "; ".join(f"{list(s.heads)} {s.pattern}: {s.held}" for s in layer.stores)
            lines.append(f"{index:5d} {layer.nbytes / 2**20:9.3f} {layer.get_seq_length():7d}  {stores}")
        lines.append(f"total {self.nbytes / 2**20:9.3f}")
        return "\n".join(lines)


@dataclass(frozen=True)
class _Prompt:
    """A reader made of the keys of a prompt without padding and its last queries."""

    q: Tensor
    k: Tensor
    scale: float
    layer: int

    def queries(self) -> Queries:
        """They stand at the end."""
        return Queries(self.q.shape[2], self.k.shape[2] - self.q.shape[2])


class HeadwiseLayer(CacheLayerMixin):
    """One layer: a store per group of kv heads with the same pattern.

    `update` only hands the new keys and values over; `take` writes them and returns what the queries read. Between the
    two nothing else may happen, and an `update` without `take` (a model that headwise is not attached to) raises.
    """

    is_sliding = False
    is_croppable = True

    def __init__(self, groups: list[tuple[Pattern, tuple[int, ...]]], *, dense_prefill: bool, index: int = 0):
        super().__init__()
        if not dense_prefill and any(pattern.compensated for pattern, _ in groups):
            raise PlanError(
                "a compensation token stands for tokens that are dropped after the prompt: such a plan needs "
                "prefill='dense'"
            )
        if not dense_prefill and any(pattern.selects and not pattern.keeps_all for pattern, _ in groups):
            raise PlanError("tokens chosen by content are known after the prompt: such a plan needs prefill='dense'")
        self.stores: list[Store] = [make_store(pattern, heads, dense_prefill) for pattern, heads in groups]
        self.kv_heads = sum(len(heads) for _, heads in groups)
        self.seen = 0  # columns, padding included
        self.start: Tensor | None = None  # (B,) first real column; None where no row is padded
        self.record_past = False
        self.pending: tuple[Tensor, Tensor] | None = None
        self.index = index
        self.steps: Steps | None = None  # the same for all layers of a cache

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Note dtype and device; storage grows with what is kept."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.like = key_states.new_empty(
            0, key_states.shape[-1] if key_states.shape[-1] == value_states.shape[-1] else 0
        )
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Hand over keys and values (B, K, N, D) of N new columns; they are stored by `take`."""
        if self.pending is not None:
            raise CacheError(
                "a HeadwiseCache was updated twice without being read: the model is not attached. "
                "Use it inside `with headwise.attach(model, plan=plan):`"
            )
        if key_states.shape[1] != self.kv_heads:
            raise CacheError(
                f"this cache holds {self.kv_heads} kv heads a layer, the model gives {key_states.shape[1]}"
            )
        if self.seen and key_states.shape[0] != self.batch_size:
            raise CacheError(
                f"this cache holds a batch of {self.batch_size} rows and {self.seen} tokens; it was given a batch of "
                f"{key_states.shape[0]}. Make a new HeadwiseCache for a new batch, or call reset()"
            )
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if self.steps is not None and (key_states.shape[2] != 1 or self.steps.over(self.index)):
            self.settle()
        self.pending = (key_states, value_states)
        return key_states, value_states

    def take(self, start: Tensor | None, reader: Reader | None = None) -> tuple[list[KVGroup], int, Tensor | None]:
        """Store the pending columns; return (groups to read, columns before the queries, start of the rows).

        `start` (B,) is the first real column of each row, None without padding; it is read while `needs_start`. `reader` is the
        attention call, for patterns that choose tokens by content.
        """
        if self.pending is None:
            raise CacheError("nothing to read: the model did not update this layer in this forward pass")
        (k, v), self.pending = self.pending, None
        if self.seen == 0 or (start is not None and self.needs_start):
            self.start = start
            self.rows = [0] * k.shape[0] if start is None else [int(s) for s in start.tolist()]
        offset, N = self.seen, k.shape[2]
        self.seen += N
        if self.steps is not None:
            self.steps.write(self.index, k, v)
            return [], offset, self.start
        groups: list[KVGroup] = []
        new = Columns(offset, N, self.start, self.rows)
        for store in self.stores:
            part = (k, v) if len(self.stores) == 1 else (take_heads(k, store.heads), take_heads(v, store.heads))
            groups += store.extend(*part, new, keep_all=self.record_past, reader=reader)
        return groups, offset, self.start

    @property
    def table(self) -> Table | None:
        """Where the query of a step finds its keys, once `take` has stored its own; None where groups say it."""
        return None if self.steps is None else self.steps.tables[self.index]

    @property
    def countable(self) -> bool:
        """Can a device say by itself where the next tokens go?"""
        return not self.record_past and all(store.countable for store in self.stores)

    def settle(self) -> None:
        """End the steps, if any: the stores learn what was written."""
        if self.steps is None:
            return
        self.steps.finish(self.index)
        for store in self.stores:
            store.settle(self.columns(), self.steps.count)
        self.steps.closed, self.steps = True, None

    def columns(self) -> Columns:
        """The columns so far."""
        return Columns(self.seen, 0, self.start, self.rows)

    @property
    def needs_start(self) -> bool:
        """Is there a row of which nothing but padding was seen so far (a chunk of a padded prompt)?"""
        return self.seen == 0 or max(self.rows) >= self.seen

    @property
    def nbytes(self) -> int:
        """Bytes of this layer's allocated tensors."""
        return sum(store.nbytes for store in self.stores)

    @property
    def batch_size(self) -> int:
        """Rows held, 0 when empty."""
        return len(self.rows) if self.seen else 0

    @property
    def max_batch_size(self) -> int:
        """Rows held (the name transformers asks for)."""
        return self.batch_size

    def get_seq_length(self) -> int:
        """Columns seen, whether kept or not."""
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Masks are built over all columns; `take`'s groups pick from them what is stored."""
        return self.seen + query_length, 0

    def get_max_length(self) -> int:
        """Unbounded."""
        return -1

    def activate_past_recording(self) -> None:
        """Drop nothing until `crop` is called, so that rejected draft tokens can be taken back exactly.

        Raises CacheError for patterns by which a chunk reads other tokens than one token at a time would.
        """
        self.settle()
        for store in self.stores:
            store.must_take_back()
        self.record_past = True

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last `-tokens_to_remove` columns, then drop what the patterns do not keep."""
        count = abs(int(tokens_to_remove))
        if tokens_to_remove > 0:
            raise CacheError(f"crop({tokens_to_remove}): give a negative number, the columns to take back")
        if count > self.seen:
            raise CacheError(f"crop({tokens_to_remove}): only {self.seen} columns were seen")
        self.settle()
        for store in self.stores:
            store.crop(Columns(self.seen - count, 0, self.start, self.rows) if self.seen else None, count)
        self.seen -= count

    def reset(self) -> None:
        """Forget everything and free the storage."""
        self.steps = None
        for store in self.stores:
            store.reset()
        self.seen, self.start, self.pending, self.is_initialized = 0, None, None, False

    def _rows(self, index: Tensor) -> None:
        if not self.seen:
            return
        self.settle()
        for store in self.stores:
            store.select_rows(index)
        self.rows = [self.rows[i] for i in index.tolist()]
        self.start = None if self.start is None else self.start[index.to(self.start.device)]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Beam search: row i becomes row beam_idx[i]."""
        self._rows(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some rows."""
        self._rows(torch.as_tensor(indices))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row."""
        self._rows(torch.arange(self.batch_size).repeat_interleave(repeats))

    def offload(self) -> None:
        """Refused: headwise caches free memory instead of moving it."""
        raise CacheError("a HeadwiseCache cannot be offloaded; lower the plan's budget instead")

    def prefetch(self) -> None:
        """Nothing is ever offloaded."""


def make_store(pattern: Pattern, heads: tuple[int, ...], dense_prefill: bool) -> Store:
    """The store that a pattern needs."""
    if pattern.keeps_all:
        return FullStore(pattern, heads)
    if isinstance(pattern, Selected):
        return SelectedStore(pattern, heads)
    return WindowStore(pattern, heads, dense_prefill)
