"""Dialects: synthetic sequences in which a first token says how far back the answer stands.

A row is [dialect d, x_1, …, x_N]; after x_t a model of dialect d is to say x_(t-d). A head that looks one token back is
of use to dialect 1 only, so a model whose heads are chosen per token can give each dialect heads of its own.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from headwise.checks import finite, whole
from headwise.errors import TaskError


class Dialects(NamedTuple):
    """`ids` (B, N + 1); `labels` (B, N + 1) for a causal language model (shifted inside it), -100 where nothing is asked;
    `dialect` (B,) from 0."""

    ids: Tensor
    labels: Tensor
    dialect: Tensor


def make_dialects(
    count: int,
    *,
    length: int = 32,
    dialects: int = 4,
    vocabulary: int = 32,
    noise: float = 0.1,
    generator: torch.Generator,
) -> Dialects:
    """`count` rows of `length` random tokens after the token of their dialect; a share `noise` of the answers is random.

    Tokens 0 … vocabulary - 1 are words, the next `dialects` ones name the dialects. With a share p of random answers no
    model does better than the entropy of the answer: about 0.65 nats for p = 0.1 and 32 words.

    >>> made = make_dialects(2, length=6, noise=0.0, generator=torch.Generator().manual_seed(0))
    >>> row, d = made.ids[0], int(made.dialect[0]) + 1
    >>> bool((made.labels[0, 1 + d + 1 :] == row[1 : 6 - d]).all())
    True
    """
    whole("count", count, 1, TaskError)
    whole("length", length, dialects + 2, TaskError)
    if not 0 <= finite("noise", noise, TaskError) <= 1:
        raise TaskError(f"noise is {noise}; it must lie in [0, 1]")
    words = torch.randint(vocabulary, (count, length), generator=generator)
    dialect = torch.randint(dialects, (count,), generator=generator)
    ids = torch.cat([vocabulary + dialect[:, None], words], dim=1)
    back = (
        torch.arange(length + 1) - 1 - (dialect[:, None] + 1)
    )  # labels are shifted: the answer to ids[t] is labels[t + 1]
    answers = ids.gather(1, back.clamp(min=0))
    random = torch.randint(vocabulary, answers.shape, generator=generator)
    answers = torch.where(torch.rand(answers.shape, generator=generator) < noise, random, answers)
    return Dialects(ids, answers.masked_fill(back < 1, -100), dialect)
