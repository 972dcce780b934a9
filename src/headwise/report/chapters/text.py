"""Text for the measurements of the chapters."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from headwise.tasks import english
from headwise.tasks.texts import encode


def held_out(tokenizer: Any, tokens: int) -> Tensor:
    """English that no score, fit or training of the story has read, (tokens,)."""
    return torch.tensor(encode(tokenizer, english("eval")[: 12 * tokens])[:tokens])
