"""First-order importance of heads: what the loss would change by if a head's output were taken away, to first order.

Letters: L layers, B batch, N tokens, H query heads, D head dim.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from headwise.attach import HeadCall, attach, find_stack, fingerprint
from headwise.checks import whole
from headwise.errors import TaskError
from headwise.modes import frozen
from headwise.progress import track
from headwise.registry import register
from headwise.tasks.calibration import calibration_rows
from headwise.units import HeadScores

if TYPE_CHECKING:
    from collections.abc import Callable

    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@register("score", "taylor", paper="01")
def taylor(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    tokens: int = 512,
    window: int = 512,
    text: str | None = None,
    batches: Sequence[Mapping[str, Any]] | None = None,
    stack: str | None = None,
    seed: int = 0,
    progress: bool = False,
) -> HeadScores:
    """First-order importance: mean over tokens of |sum_d o_d · dL/do_d|, one backward pass.

    o is the head's output before the output projection, L the summed loss in nats: the score of a head is the mean size of the
    loss change, per token and to first order, were its output zeroed at that token alone (Michel et al., arXiv
    1905.10650; Molchanov et al., arXiv 1611.06440). No weight gets a gradient; the model is left as it was.

    tokens: of the text that is read.
    window: tokens of one forward and backward pass.
    text: what to read; by default the packaged English, from a place that the seed chooses.
    `batches`: instead of text, keyword arguments of the model with labels (any model whose output has a mean loss).

    Returns values (L, H) in nats per token. Raises TaskError without a causal language model or labels.

    >>> from headwise.hub import load_model
    >>> scores = taylor(*load_model("tiny-random-llama"), tokens=64, window=32)
    >>> scores.values.shape, bool((scores.values > 0).all())
    (torch.Size([3, 4]), True)
    """
    found = find_stack(model, stack)
    if batches is None:
        rows = calibration_rows(model, tokenizer, text=text, tokens=tokens, window=window, seed=seed)
        batches = [{"input_ids": row[None], "labels": row[None]} for row in rows]
        data = f"{rows.numel()} tokens of {'packaged English' if text is None else 'text'}"
    else:
        data = f"{whole('the number of batches', len(batches), 1, TaskError)} batches"
    gates = _Gates(found.layers, found.heads)
    with frozen(model), attach(model, transforms=[gates], stack=stack), torch.enable_grad():
        for batch in track(batches, "taylor", progress):
            gates.add(lambda batch=batch: _summed_loss(model, batch))  # type: ignore[misc]
    return HeadScores(
        values=gates.total / max(gates.count, 1),
        method="taylor",
        data=data,
        fingerprint=fingerprint(model, stack),
        meta={"window": window} if text is None else {},
    )


class _Gates:
    """A factor of 1 on every head output; its gradient is sum_d o_d · dL/do_d."""

    def __init__(self, layers: int, heads: int):
        self.total, self.count = torch.zeros(layers, heads, dtype=torch.float64), 0
        self.live: list[tuple[int, int, Tensor, Tensor | None]] = []

    def __call__(self, call: HeadCall, attend: Callable[[], Tensor]) -> Tensor:
        out = attend()  # (B, N, H, D)
        gate = torch.ones(out.shape[:3], dtype=out.dtype, device=out.device, requires_grad=True)
        self.live.append((call.layer, call.site.first_head, gate, call.real_tokens()))
        return out * gate[..., None]

    def add(self, loss: Callable[[], Tensor]) -> None:
        self.live = []
        grads = torch.autograd.grad(loss(), [gate for _, _, gate, _ in self.live])
        for (layer, first, _, real), grad in zip(self.live, grads, strict=True):
            size = grad.double().abs() if real is None else grad.double().abs() * real[..., None]
            self.total[layer, first : first + size.shape[-1]] += size.sum(dim=(0, 1)).cpu()
            if layer == 0:
                self.count += int(real.sum()) if real is not None else size.shape[0] * size.shape[1]
        self.live = []


def _summed_loss(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    """The model's mean loss times the number of tokens (or rows) that it is the mean of."""
    device = next(model.parameters()).device
    inputs = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}
    loss = getattr(model(**inputs), "loss", None)
    if loss is None:
        raise TaskError(f"{type(model).__name__} gave no loss: every batch needs the labels that this model takes")
    labels = inputs.get("labels")
    return loss.float() * (
        int((labels != -100).sum()) if isinstance(labels, Tensor) and not labels.is_floating_point() else 1
    )
