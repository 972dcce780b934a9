"""Put a given attention pattern in the place of a head's own, in one row: what the head reads is said, not what it writes.

Letters: B batch, N queries, M key columns, R keys that are read, H query heads, D head dim.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from headwise.attach.hook import HeadCall
from headwise.errors import AttachError, EditError
from headwise.units import HeadSet


@dataclass(frozen=True, eq=False)
class SetPattern:
    """The transform `attach(model, transforms=[SetPattern(...)])`: in one row, chosen heads read chosen keys by given weights.

        o_h[row] = sum_r w_r v[column_r]          values and output projection as they are

    rows (B,): the column of the query in each row of the batch. columns (B, R): the keys it reads. weights (B, R), each row with sum 1;
    by default all keys alike. Works in prefill and in cached decoding; only the row's output is computed anew, so any attention
    implementation serves. Raises EditError for weights without sum 1 and for keys behind the query or in the padding.

    >>> from headwise.attach import attach
    >>> from headwise.hub import load_model
    >>> model, _ = load_model("tiny-random-llama")
    >>> ids = torch.arange(8)[None]
    >>> look = SetPattern(HeadSet.parse("L1H2"), torch.tensor([7]), torch.tensor([[2, 3]]))
    >>> with attach(model, transforms=[look]):
    ...     changed = model(ids).logits
    >>> (changed != model(ids).logits).any(-1)[0].tolist() == [False] * 7 + [True]
    True
    """

    heads: HeadSet
    rows: Tensor
    columns: Tensor
    weights: Tensor | None = None

    def __post_init__(self) -> None:
        B = len(self.rows)
        if self.rows.ndim != 1 or self.columns.ndim != 2 or len(self.columns) != B:
            shapes = tuple(self.rows.shape), tuple(self.columns.shape)
            raise EditError(f"rows and columns of a pattern are {shapes}; they are (B,) and (B, R)")
        if bool((self.columns > self.rows[:, None]).any()) or bool((self.columns < 0).any()):
            raise EditError("a pattern reads keys behind its query, or columns below 0; a causal row ends at its query")
        if self.weights is None:
            return
        if self.weights.shape != self.columns.shape or bool((self.weights.sum(1) - 1).abs().max() > 1e-3):
            raise EditError(
                f"weights of a pattern are {tuple(self.weights.shape)}; they are (B, R), each row with sum 1"
            )

    def __call__(self, call: HeadCall, attend: Callable[[], Tensor]) -> Tensor:
        out = attend()
        own = [h - call.site.first_head for h in self.heads.by_layer().get(call.layer, ())]
        here = self.rows.to(out.device) - call.past
        batch = torch.nonzero((here >= 0) & (here < out.shape[1]))[:, 0]
        if not own or not len(batch):
            return out
        if len(self.rows) != len(out):
            raise EditError(f"a pattern for {len(self.rows)} rows, this batch has {len(out)}")
        if call.groups is not None:
            raise AttachError(f"layer {call.layer}: a pattern cannot be set on a cache that a KV plan thins out")
        columns = self.columns.to(out.device)[batch]
        self._need_real(call, columns, batch)
        group = call.q.shape[1] // call.k.shape[1]
        values = call.v[batch][:, [h // group for h in own]]  # (b, U, M, D)
        at = (columns - call.first_column)[:, None, :, None].expand(-1, len(own), -1, values.shape[-1])
        read = values.gather(2, at)  # (b, U, R, D)
        weights = (
            torch.full(columns.shape, 1 / columns.shape[1])
            if self.weights is None
            else self.weights.to(batch.device)[batch]
        )
        new = (weights.to(read)[:, None, :, None] * read).sum(2)
        out = out.clone()
        out[batch[:, None], here[batch][:, None], torch.tensor(own, device=out.device)] = new
        return out

    def _need_real(self, call: HeadCall, columns: Tensor, batch: Tensor) -> None:
        start = call.start
        if start is not None and bool((columns < start[batch][:, None]).any()):
            raise EditError(
                f"layer {call.layer}: a pattern reads padding; columns count from the padded row's left end"
            )
