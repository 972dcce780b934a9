"""What LongHeads remembers of a text: one summary a finished chunk and kv head, and the queries of the open chunk.

Letters: B batch, H query heads, K kv heads, G = H/K, N new columns, M all columns, C chunks, w tokens of a chunk, D head dim.
Chunk c of a row holds its real tokens c·w … (c+1)·w - 1, whatever the padding before them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from headwise.budget._longheads_rotary import Rotation
from headwise.errors import CacheError

ENTRIES = 1 << 24  # of attention inside chunks that are in memory at a time


@dataclass(frozen=True, eq=False)
class Chunks:
    """State after `seen` columns: `keys` (B, K, C, D) float32, zeros where a row has fewer chunks; `queries` (B, H, T, D), the latest T.

    `starts`: first real column of each row, None without padding.
    """

    seen: int
    keys: Tensor
    queries: Tensor
    starts: tuple[int, ...] | None

    @classmethod
    def empty(cls, q: Tensor, k: Tensor, starts: tuple[int, ...] | None) -> Chunks:
        """Nothing seen yet."""
        return cls(0, k.new_zeros(*k.shape[:2], 0, k.shape[3], dtype=torch.float32), q[:, :, :0], starts)

    def finished(self, w: int) -> list[int]:
        """Complete chunks of each row."""
        return [max(0, self.seen - start) // w for start in self.starts or (0,)]

    def extended(
        self, q: Tensor, k: Tensor, v: Tensor, *, w: int, scale: float, rotation: Rotation, shift: Tensor
    ) -> Chunks:
        """The state with N new columns: q (B, H, N, D) of these, k and v (B, K, M, D) of all; `shift` (B or 1,) as in `summaries`."""
        after = replace(self, seen=k.shape[2], queries=torch.cat([self.queries, q], dim=2))
        old, new = self.finished(w), after.finished(w)
        count = max(b - a for a, b in zip(old, new, strict=True))
        if count:
            first = torch.tensor(old, device=q.device)[:, None]
            index = first + torch.arange(count, device=q.device)  # (B or 1, count)
            few = max(1, ENTRIES // (q.shape[0] * q.shape[1] * w * w))
            parts = [after._summaries(part, k, v, w, scale, rotation, shift) for part in index.split(few, dim=1)]
            fresh = torch.cat(parts, dim=2)
            after = replace(after, keys=_put(after.keys, fresh, index, torch.tensor(new, device=q.device)))
        keep = min(2 * w, after.queries.shape[2])  # the open chunk, and one more so that a crop can reopen it
        return replace(after, queries=after.queries[:, :, after.queries.shape[2] - keep :].contiguous())

    def _summaries(
        self, index: Tensor, k: Tensor, v: Tensor, w: int, scale: float, rotation: Rotation, shift: Tensor
    ) -> Tensor:
        """Chunk keys (B, K, count, D) of the chunks `index` (B or 1, count)."""
        B, K = k.shape[:2]
        columns = chunk_columns(index, self.starts, w, k.device)  # (B or 1, count, w)
        behind = k.shape[2] - self.queries.shape[2]  # column of the first query that is kept
        q = take(self.queries, (columns - behind).clamp(0, self.queries.shape[2] - 1))
        k, v = (take(x, columns.clamp(max=k.shape[2] - 1)) for x in (k, v))  # (B, K, count, w, D)
        steps = -(index[:, None, :, None] * w + shift[:, None, None, None])
        return chunk_keys(q.unflatten(1, (K, -1)), k, v, rotation.turn(k.float(), steps), scale)

    def rows(self, index: Tensor) -> Chunks:
        """Row i becomes row index[i]."""
        index = index.to(self.keys.device)
        starts = None if self.starts is None else tuple(self.starts[i] for i in index.tolist())
        return replace(self, keys=self.keys[index], queries=self.queries[index], starts=starts)

    def cropped(self, seen: int, w: int) -> Chunks:
        """The state after only `seen` columns; raises CacheError where that reopens a chunk whose queries are gone."""
        first = self.seen - self.queries.shape[2]
        left = replace(self, seen=seen, queries=self.queries[:, :, : max(0, seen - first)])
        opened = [start + c * w for start, c in zip(self.starts or (0,), left.finished(w), strict=True)]
        if seen and min(opened) < first:
            raise CacheError(
                f"LongHeads cannot take back {self.seen - seen} columns: the queries of the chunk that this reopens are "
                f"gone (up to one chunk, {w} columns, can be taken back)"
            )
        return replace(left, keys=self.keys[:, :, : max(left.finished(w))])

    @property
    def nbytes(self) -> int:
        """Bytes of summaries and queries."""
        return sum(t.untyped_storage().nbytes() for t in (self.keys, self.queries))


def chunk_keys(q: Tensor, k: Tensor, v: Tensor, local: Tensor, scale: float) -> Tensor:
    """LongHeads' chunk keys R (…, D), from q (B, K, G, C, w, D), k, v (B, K, C, w, D) and `local`, the keys at positions 0..w-1.

        O = softmax(q k^T · scale) v, not causal;  m = mean of O over the w rows (and the group);  R = softmax(m local^T · scale) local

    q and k may stand at any common offset: their products depend on distances alone.
    """
    weights = torch.softmax((q.float() @ k.float().mT[:, :, None]) * scale, dim=-1)
    m = (weights.mean(dim=(2, 4))[..., None, :] @ v.float()).squeeze(
        -2
    )  # mean over rows and group, then values: the same
    return (torch.softmax((m[..., None, :] @ local.mT) * scale, dim=-1) @ local).squeeze(-2)


def chunk_columns(index: Tensor, starts: tuple[int, ...] | None, w: int, device: torch.device) -> Tensor:
    """Columns (B or 1, …, w) of the chunks `index` (B or 1, …)."""
    columns = index[..., None] * w + torch.arange(w, device=device)
    if starts is None:
        return columns
    first = torch.tensor(starts, device=device).view(-1, *[1] * (columns.ndim - 1))
    return columns + first


def take(x: Tensor, columns: Tensor) -> Tensor:
    """x (B, U, M, D) at `columns` (B or 1, …): (B, U, …, D), the same columns for all units."""
    B, U, _, D = x.shape
    flat = columns.flatten(1).expand(B, -1)
    picked = x.gather(2, flat[:, None, :, None].expand(B, U, -1, D))
    return picked.view(B, U, *columns.shape[1:], D)


def _put(keys: Tensor, fresh: Tensor, index: Tensor, finished: Tensor) -> Tensor:
    """keys (B, K, C, D) grown to hold `fresh` (B, K, n, D) at the chunks `index` (B or 1, n), where those are finished."""
    B, K, n, D = fresh.shape
    total = max(int(finished.max()), keys.shape[2])
    grown = torch.cat(
        [keys, keys.new_zeros(B, K, total + n - keys.shape[2], D)], dim=2
    )  # room for what is not finished
    done = (index < finished[:, None]).expand(B, n)[:, None, :, None]
    places = index.expand(B, n)[:, None, :, None].expand(B, K, n, D)
    return grown.scatter(2, places, torch.where(done, fresh, grown.gather(2, places)))[:, :, :total].contiguous()


class ChunkLayer(DynamicLayer):
    """A transformers cache layer that keeps all keys and values, as before, and LongHeads' state beside them.

    It takes the place of the `DynamicLayer` of a cache at the first pass, so that beam search, batches and crops keep both together.
    """

    chunks: Chunks | None = None
    w: int = 0

    @classmethod
    def adopt(cls, layer: DynamicLayer, w: int) -> ChunkLayer:
        """A layer with the contents of `layer`."""
        made = cls()
        made.__dict__.update(layer.__dict__)
        made.w = w
        return made

    @property
    def nbytes(self) -> int:
        """Bytes of keys, values, chunk keys and the queries of the open chunk."""
        held = sum(t.nbytes for t in (self.keys, self.values) if isinstance(t, Tensor))
        return held + (self.chunks.nbytes if self.chunks else 0)

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self.chunks = None

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last `-tokens_to_remove` columns."""
        left = max(0, self.get_seq_length() - abs(tokens_to_remove))
        chunks = self.chunks.cropped(left, self.w) if self.chunks else None
        super().crop(tokens_to_remove)
        self.chunks = chunks

    def _pick(self, index: Tensor) -> None:
        self.chunks = self.chunks.rows(index) if self.chunks else None

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Beam search: row i becomes row beam_idx[i]."""
        super().reorder_cache(beam_idx)
        self._pick(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some rows."""
        super().batch_select_indices(indices)
        self._pick(torch.as_tensor(indices))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row."""
        rows = 0 if self.chunks is None else self.chunks.keys.shape[0]
        super().batch_repeat_interleave(repeats)
        self._pick(torch.arange(rows).repeat_interleave(repeats))
