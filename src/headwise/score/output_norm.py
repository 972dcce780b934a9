"""How much each head writes into the residual stream: the mean norm of W_O^h o_h.

Letters: L layers, B batch, N tokens, H query heads, D head dim, C width of the model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from headwise.attach import HeadCall, Stack, attach, find_stack, fingerprint
from headwise.attach.projection import head_weights, output_projection
from headwise.checks import whole
from headwise.errors import TaskError
from headwise.modes import evaluating
from headwise.progress import track
from headwise.registry import register
from headwise.tasks.calibration import calibration_rows
from headwise.units import HeadScores

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@register("score", "output-norm", paper="01")
def output_norm(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    tokens: int = 2048,
    window: int = 512,
    text: str | None = None,
    batches: Sequence[Mapping[str, Any]] | None = None,
    stack: str | None = None,
    seed: int = 0,
    progress: bool = False,
) -> HeadScores:
    """Mean norm of what a head adds to its layer's output: mean over tokens of |W_O^h o_h|.

    Norms grow with depth: compare heads of one layer with it, not heads of different layers.

    tokens: of the text that is read.
    window: tokens of one forward pass.
    text: what to read; by default the packaged English, from a place that the seed chooses.
    `batches`: instead of text, keyword arguments of the model.

    Returns values (L, H) in units of the residual stream.

    >>> from headwise.hub import load_model
    >>> output_norm(*load_model("tiny-random-llama"), tokens=64, window=32).values.shape
    torch.Size([3, 4])
    """
    found = find_stack(model, stack)
    if batches is None:
        rows = calibration_rows(model, tokenizer, text=text, tokens=tokens, window=window, seed=seed)
        batches = [{"input_ids": row[None]} for row in rows]
        data = f"{rows.numel()} tokens of {'packaged English' if text is None else 'text'}"
    else:
        data = f"{whole('the number of batches', len(batches), 1, TaskError)} batches"
    norms = _Norms(found)
    with evaluating(model), attach(model, observers=[norms], stack=stack), torch.no_grad():
        for batch in track(batches, "output norm", progress):
            model(**{k: v.to(model.device) if isinstance(v, Tensor) else v for k, v in batch.items()})
    values = norms.total / max(norms.count, 1)
    return HeadScores(values=values, method="output-norm", data=data, fingerprint=fingerprint(model, stack))


class _Norms:
    """Sums of |W_O^h o_h| over real tokens, from Gram matrices: |W o|^2 = o^T (W W^T) o costs H·N·D^2, not H·N·D·C."""

    def __init__(self, stack: Stack):
        self.total, self.count = torch.zeros(stack.layers, stack.heads, dtype=torch.float64), 0
        self.grams = []
        for layer in range(stack.layers):
            W = head_weights(output_projection(stack, layer), stack.heads).detach().float()  # (H, D, C)
            self.grams.append(W @ W.transpose(1, 2))

    def __call__(self, call: HeadCall, out: Tensor) -> None:
        norms = contribution_norms(out, self.grams[call.layer])
        real = call.real_tokens()
        if real is not None:
            norms = norms * real[..., None]
        self.total[call.layer] += norms.double().sum(dim=(0, 1)).cpu()
        if call.layer == 0:
            self.count += int(real.sum()) if real is not None else norms.shape[0] * norms.shape[1]


def contribution_norms(out: Tensor, gram: Tensor) -> Tensor:
    """|W_O^h o_h| (B, N, H) from head outputs (B, N, H, D) and W_O^h W_O^h^T (H, D, D)."""
    wide = out.detach().float()
    squared = torch.einsum("bnhd,hde,bnhe->bnh", wide, gram, wide)
    return squared.clamp(min=0).sqrt()
