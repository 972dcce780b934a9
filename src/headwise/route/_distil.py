"""Learn from another model's predictions: the loss gets the Kullback-Leibler distance to what a frozen teacher says.

Letters: B batch, N tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from headwise.checks import finite
from headwise.errors import RouteError
from headwise.modes import evaluating
from headwise.route._collect import join_loss


@contextmanager
def distilling(model: Any, teacher: Any, weight: float) -> Iterator[None]:
    """Inside, and in training mode, `weight` · mean over tokens of KL(teacher ‖ model) is added to the model's loss.

    The teacher reads the same tokens without a gradient. Raises RouteError for a negative weight or a teacher that is the model.

    >>> from headwise.hub import load_model
    >>> (model, _), (teacher, _) = load_model("tiny-random-llama"), load_model("tiny-random-llama")
    >>> ids = torch.arange(8)[None]
    >>> with distilling(model.train(), teacher, 1.0):
    ...     same = model(ids, labels=ids).loss
    >>> torch.allclose(same, model(ids, labels=ids).loss)  # a twin has nothing to teach
    True
    """
    if finite("weight", weight, RouteError) < 0:
        raise RouteError(f"weight is {weight}; it must be at least 0")
    if teacher is model:
        raise RouteError("the teacher is the model itself: its predictions would move along")
    causal = bool(model.can_generate())

    def hook(module: Any, args: tuple, kwargs: dict, output: Any) -> Any:
        if not module.training or getattr(output, "loss", None) is None:
            return output
        ids = kwargs["input_ids"] if "input_ids" in kwargs else args[0]
        mask = kwargs.get("attention_mask")
        real = mask.bool() if isinstance(mask, Tensor) and mask.ndim == 2 else None
        extra = weight * divergence(output.logits, predictions(teacher, ids, mask), real)
        return join_loss(output, extra, kwargs, causal)

    handle = model.register_forward_hook(hook, with_kwargs=True)
    try:
        with evaluating(teacher):
            yield
    finally:
        handle.remove()


@torch.no_grad()
def predictions(teacher: Any, ids: Tensor, mask: Tensor | None = None) -> Tensor:
    """Logits (B, N, V) of the teacher, in the mixed precision of a training on this device."""
    with torch.autocast(ids.device.type, dtype=torch.bfloat16, enabled=ids.device.type == "cuda"):
        return teacher(input_ids=ids, attention_mask=mask, use_cache=False).logits


def divergence(logits: Tensor, teacher: Tensor, real: Tensor | None = None) -> Tensor:
    """Mean over real tokens (B, N) of KL(teacher ‖ model) in nats, of logits (B, N, V); row by row: float32 copies stay small.

    >>> round(float(divergence(torch.zeros(1, 1, 2), torch.tensor([[[0.0, 100.0]]]))), 4)  # ln 2
    0.6931
    """
    total = logits.new_zeros((), dtype=torch.float32)
    for row, (mine, other) in enumerate(zip(logits, teacher, strict=True)):
        if real is not None:
            mine, other = mine[real[row]], other[real[row]]
        p = F.log_softmax(other.float(), dim=-1)
        total = total + F.kl_div(F.log_softmax(mine.float(), dim=-1), p, reduction="sum", log_target=True)
    tokens = logits.shape[0] * logits.shape[1] if real is None else real.sum().clamp(min=1)
    return total / tokens
