"""Batches of questions with known answers, and what a model makes of them: losses and exact matches, row by row.

Letters: B rows, N columns, A answer tokens, T tokens that are asked for, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from headwise.tasks.icl import Item


class Batch(NamedTuple):
    """Right-padded rows of prompt and answer: ids and mask (B, N), `ends` (B,) the column of the last prompt token,
    `labels` (B, N - 1): the token that column + 1 should be, -100 outside the answers."""

    ids: Tensor
    mask: Tensor
    ends: Tensor
    labels: Tensor


def pack(items: Sequence[Item], device: Any, *, answer: bool = True) -> Batch:
    """Rows of prompts, each with its answer behind it less the last token, which nothing is asked after."""
    rows = [torch.cat([i.ids, i.answer[:-1]]) if answer else i.ids for i in items]
    ids = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=0)
    mask = nn.utils.rnn.pad_sequence([torch.ones_like(r) for r in rows], batch_first=True, padding_value=0)
    ends = torch.tensor([len(i.ids) - 1 for i in items])
    labels = torch.full_like(ids, -100)
    for row, item in enumerate(items):
        wanted = item.answer if answer else item.answer[:1]
        labels[row, len(item.ids) - 1 : len(item.ids) - 1 + len(wanted)] = wanted
    return Batch(*(t.to(device) for t in (ids, mask, ends, labels)))


def answer_logits(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """(row of the batch (T,), logits (T, V), labels (T,)) of the tokens that are asked for, and of no others."""
    asked = batch.labels != -100
    columns = asked.any(0).nonzero()[:, 0]  # logits of the other columns are not made
    logits = model(input_ids=batch.ids, attention_mask=batch.mask, use_cache=False, logits_to_keep=columns).logits
    chosen = asked[:, columns]
    return chosen.nonzero()[:, 0], logits[chosen].float(), batch.labels[:, columns][chosen]


def row_losses(model: nn.Module, batch: Batch) -> Tensor:
    """(B,) mean cross-entropy (nats) of each row's answer tokens."""
    row, logits, labels = answer_logits(model, batch)
    losses = nn.functional.cross_entropy(logits, labels, reduction="none")
    total = losses.new_zeros(len(batch.ids)).index_add(0, row, losses)
    return total / torch.bincount(row, minlength=len(batch.ids)).clamp(min=1)


@torch.no_grad()
def exact_rows(model: nn.Module, batch: Batch) -> Tensor:
    """(B,) bool: every answer token is the arg-max, which is when greedy decoding would give the answer."""
    row, logits, labels = answer_logits(model, batch)
    wrong = torch.bincount(row, weights=(logits.argmax(-1) != labels).double(), minlength=len(batch.ids))
    return wrong == 0
