"""Prompts of several lengths as one batch, padded on either side.

Letters: B batch, N tokens of the longest prompt, A tokens of an answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch.nn import functional as F

from headwise.tasks.prompts import Prompt

Padding = Literal["left", "right"]


@dataclass(frozen=True)
class Batch:
    """Prompts padded on the left, with answers of one length: ids and mask (B, N), answers (B, A)."""

    ids: torch.Tensor
    mask: torch.Tensor
    answers: torch.Tensor

    def with_answers(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids and mask (B, N + A - 1): the last answer token is only predicted, never read."""
        fed = self.answers[:, :-1]
        return torch.cat([self.ids, fed], 1), torch.cat([self.mask, torch.ones_like(fed)], 1)

    def padded_right(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The same rows with the padding behind their answers, and the column (B,) of each prompt's last token."""
        ids, mask = self.with_answers()
        order = mask.argsort(dim=1, descending=True, stable=True)
        return ids.gather(1, order), mask.gather(1, order), self.mask.sum(1) - 1


def groups(prompts: Sequence[Prompt], batch_size: int) -> list[list[int]]:
    """Indices of the prompts of each batch: equal answer lengths, and prompts of like lengths together."""
    order = sorted(range(len(prompts)), key=lambda i: (len(prompts[i].answer_ids), len(prompts[i].ids)))
    made: list[list[int]] = []
    for i in order:
        last = made[-1] if made else []
        if last and len(last) < batch_size and len(prompts[last[0]].answer_ids) == len(prompts[i].answer_ids):
            last.append(i)
        else:
            made.append([i])
    return made


def collate(prompts: Sequence[Prompt], device: torch.device) -> Batch:
    """One batch, padded on the left with token 0."""
    ids, mask = padded([p.ids for p in prompts])
    answers = torch.stack([p.answer_ids for p in prompts])
    return Batch(ids.to(device), mask.to(device), answers.to(device))


def padded(rows: Sequence[torch.Tensor], side: Padding = "left", value: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and mask (B, N) of rows of token ids (n,).

    >>> padded([torch.tensor([5, 6]), torch.tensor([7])])
    (tensor([[5, 6],
            [0, 7]]), tensor([[1, 1],
            [0, 1]]))
    """
    longest = max(len(row) for row in rows)
    fill = [(longest - len(row), 0) if side == "left" else (0, longest - len(row)) for row in rows]
    ids = torch.stack([F.pad(row, gap, value=value) for row, gap in zip(rows, fill, strict=True)])
    mask = torch.stack([F.pad(torch.ones_like(row), gap) for row, gap in zip(rows, fill, strict=True)])
    return ids, mask
