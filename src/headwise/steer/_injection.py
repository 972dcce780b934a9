"""One place where vectors are mixed into head outputs, row by row: what soft injection trains and function vectors measure with.

    x'[b, p_b, l, h] = (1 - alpha[b, l, h]) · x[b, p_b, l, h] + alpha[b, l, h] · t[b, l, h]

only at one token p_b of each row; x is the head's output before the output projection, after all that lower layers changed. `HeadEdits`
say the same for one task with constant numbers (`Edit.mix_vector`); here rows may differ and alpha may have a gradient.

Letters: B batch, R rows (B, or 1 for all), N columns, L layers, H query heads, D head dim.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from headwise.attach import Attachment, HeadCall, attach, find_stack
from headwise.errors import AttachError, EditError
from headwise.tasks.icl import Item
from headwise.tasks.icl_batch import pack


@dataclass
class Injection:
    """A transform for `attach(transforms=[…])`.

    alpha (R, L, H) in [0, 1], may require a gradient; vectors (R, L, H, D). columns (B,): the column of p in each row; None: the last
    real token of each pass over a prompt, and nothing while tokens are generated one by one.
    """

    alpha: Tensor
    vectors: Tensor
    columns: Tensor | None = None
    seen: dict[int, Tensor] = field(
        default_factory=dict, repr=False
    )  # layer -> x'[b, p_b] (B, H, D), for tests and records
    record: bool = False

    def __post_init__(self) -> None:
        if self.vectors.ndim != 4 or self.alpha.shape[1:] != self.vectors.shape[1:3]:
            raise EditError(
                f"alpha {tuple(self.alpha.shape)} and vectors {tuple(self.vectors.shape)} must be (R, L, H) and (R, L, H, D)"
            )

    def set(self, alpha: Tensor, vectors: Tensor, columns: Tensor | None) -> None:
        """Other rows for the next pass of a model that this stays attached to."""
        self.alpha, self.vectors, self.columns = alpha, vectors, columns
        self.__post_init__()

    def __call__(self, call: HeadCall, attend: Callable[[], Tensor]) -> Tensor:
        """Head outputs (B, N, H, D) with the mixture in place."""
        out = attend()
        if self.columns is None and call.decoding:
            return out
        rows = torch.arange(out.shape[0], device=out.device)
        columns = last_column(call) if self.columns is None else self.columns.to(out.device)
        old = out[rows, columns]  # (B, H, D)
        heads = slice(call.site.first_head, call.site.first_head + out.shape[2])
        alpha = self._rows(self.alpha, out)[:, call.layer, heads, None].to(out)
        new = (1 - alpha) * old + alpha * self._rows(self.vectors, out)[:, call.layer, heads].to(out)
        if self.record:
            self.seen[call.layer] = new.detach()
        return out.index_put((rows, columns), new)

    def _rows(self, table: Tensor, out: Tensor) -> Tensor:
        if table.shape[0] not in (1, out.shape[0]):
            raise AttachError(
                f"the injection is for {table.shape[0]} rows, this batch has {out.shape[0]}: give one task a row of the batch"
            )
        return table.expand(out.shape[0], *table.shape[1:])


def last_column(call: HeadCall) -> Tensor:
    """Column of the last real token of each row, (B,), from the mask."""
    B, N = call.q.shape[0], call.q.shape[2]
    columns, real = torch.arange(N, device=call.q.device).expand(B, -1), call.real_tokens()
    return (columns if real is None else columns.masked_fill(~real, 0)).amax(dim=1)


@torch.no_grad()
def last_outputs(model: nn.Module, items: Sequence[Item], batch_size: int = 8) -> Tensor:
    """(M, L, H, D) float32 on the CPU: head outputs at the last token of each prompt."""
    stack, found = find_stack(model), []
    device = next(model.parameters()).device
    for begin in range(0, len(items), batch_size):
        batch = pack(items[begin : begin + batch_size], device, answer=False)
        kept: dict[int, Tensor] = {}

        def keep(call: HeadCall, out: Tensor, ends: Tensor = batch.ends, kept: dict[int, Tensor] = kept) -> None:
            kept[call.layer] = out[torch.arange(len(out), device=out.device), ends].float().cpu()

        with attach(model, observers=[keep]):
            model(input_ids=batch.ids, attention_mask=batch.mask, use_cache=False, logits_to_keep=1)
        found.append(torch.stack([kept[layer] for layer in range(stack.layers)], dim=1))
    return torch.cat(found)


def inject(model: nn.Module, injection: Injection) -> Attachment:
    """Attach it; a context manager."""
    stack = find_stack(model)
    wanted = (stack.layers, stack.heads)
    if injection.vectors.shape[1:3] != wanted:
        raise EditError(f"vectors are (R, L, H, D) = {tuple(injection.vectors.shape)}; the model has (L, H) = {wanted}")
    return attach(model, transforms=[injection])
