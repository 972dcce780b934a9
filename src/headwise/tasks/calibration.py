"""Calibration text: windows of ordinary text for scores, fits and short trainings."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from headwise.checks import whole
from headwise.errors import TaskError
from headwise.tasks.texts import draw_tokens, encode, english, windows


def calibration_rows(
    model: Any, tokenizer: Any, *, text: str | None, tokens: int, window: int, seed: int, split: str = "haystack"
) -> Tensor:
    """Token ids (n, window) of `text`, or of the packaged English from a place that the seed chooses; a last short row is dropped.

    Raises TaskError for a model that is no causal language model, a missing tokenizer, or too few tokens.
    """
    if tokenizer is None or not model.can_generate():
        raise TaskError(
            f"{type(model).__name__} is no causal language model with a tokenizer: pass batches= with labels"
        )
    whole("window", window, 2, TaskError)
    whole("tokens", tokens, window, TaskError)
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if limit and window > limit:
        raise TaskError(f"window is {window}; the model's context is {limit} tokens")
    if text is None:
        generator = torch.Generator().manual_seed(seed)
        ids = draw_tokens(tokenizer, english(split), tokens, generator)
    else:
        ids = encode(tokenizer, text)[:tokens]
    return windows(torch.tensor(ids, dtype=torch.long), window)
