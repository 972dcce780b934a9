"""Vision-aware head divergence: how far each head's output moves when the images are taken out of the prompt (arXiv 2412.13949).

    VHD[l,h] = ‖ A_lh(image, text) − A_lh(text) ‖₂        at the last position, before the output projection

The reference reads the same prompt with its image tokens deleted, so that later positions move up; one extra pass of the decoder for
the whole batch. Letters: L layers, B batch, N columns, H query heads, D head dim, T last rows.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor, nn

from headwise.attach.hook import HeadCall
from headwise.attach.images import text_only
from headwise.attach.locate import Stack
from headwise.checks import whole
from headwise.errors import AttachError, EditError

Metric = Literal["euclidean", "cosine", "relative"]
Reference = Literal["removed", "masked"]


def divergence(with_image: Tensor, without: Tensor, metric: Metric = "euclidean") -> Tensor:
    """Distance (…) of head outputs (…, D), in float32: the norm of the difference, 1 − cosine, or the norm over that of `without`."""
    if metric not in get_args(Metric):
        raise EditError(f"metric={metric!r}; choose {', '.join(get_args(Metric))}")
    a, b = with_image.float(), without.float()
    if metric == "cosine":
        return 1 - nn.functional.cosine_similarity(a, b, dim=-1)
    distance = (a - b).norm(dim=-1)
    return distance / b.norm(dim=-1).clamp(min=1e-6) if metric == "relative" else distance


def without_outliers(values: Tensor, without: Tensor, unbiased: bool = True) -> Tensor:
    """VHD (…, H) with 0 for heads that fire *because* the image is gone: those for which VHD and ‖A(text)‖² (of `without`
    (…, H, D)) both lie more than one standard deviation above the mean of their layer.

    >>> vhd = torch.tensor([1.0, 1, 1, 9]); text = torch.tensor([[0.0], [0], [0], [5]])
    >>> without_outliers(vhd, text).tolist(), without_outliers(vhd, text * 0).tolist()
    ([1.0, 1.0, 1.0, 0.0], [1.0, 1.0, 1.0, 9.0])
    """
    energy = without.float().square().sum(-1)
    return values.masked_fill(_high(values, unbiased) & _high(energy, unbiased), 0.0)


def _high(x: Tensor, unbiased: bool) -> Tensor:
    if x.shape[-1] < 2:
        return torch.zeros_like(x, dtype=torch.bool)
    return x > x.mean(-1, keepdim=True) + x.std(-1, keepdim=True, correction=int(unbiased))


def vision_aware(values: Tensor) -> Tensor:
    """Heads (…, H) strictly above the (lower) median of their layer: half of an even number of distinct values, none if all are equal.

    >>> vision_aware(torch.tensor([0.0, 3, 1, 2])).tolist()
    [False, True, False, True]
    """
    return values > values.median(dim=-1, keepdim=True).values


def top_sum(values: Tensor, k: int) -> Tensor:
    """T-VHD (…) of VHD (…, L, H): the sum over layers of the k largest per layer. Raises EditError for k outside 1 … H."""
    whole("k", k, 1, EditError, high=values.shape[-1])
    return values.topk(k, dim=-1).values.sum((-1, -2))


def last_rows(call: HeadCall, out: Tensor, count: int = 1, real: Tensor | None = None) -> Tensor:
    """Outputs (B, T, H, D) of the last T real tokens of each row, padded left or right; (B, N, H, D) given.

    `real` (B, N): which columns are no padding, where the caller knows; else what the call says.
    """
    real = call.real_tokens() if real is None else real.to(out.device)
    B, N = out.shape[:2]
    if real is None:
        return out[:, N - count :]
    columns = torch.arange(N, device=out.device).expand(B, -1).masked_fill(~real, -1)
    last = columns.amax(1, keepdim=True)
    places = (last + torch.arange(1 - count, 1, device=out.device)).clamp(min=0)
    return out.gather(1, places[:, :, None, None].expand(-1, -1, *out.shape[2:]))


def run_without_images(
    model: nn.Module, stack: Stack, ids: Tensor, real: Tensor, image: Tensor, reference: Reference = "removed"
) -> None:
    """Run the decoder on the prompts (B, N) without their image tokens, aligned on the right; what is attached records it.

    "removed": the tokens are deleted and later positions move up, as if no image had been given. "masked": they stay, no
    query sees them, and every text token keeps its position (an ablation; not for models with positions on several axes).
    """
    if reference not in get_args(Reference):
        raise EditError(f"reference={reference!r}; choose {', '.join(get_args(Reference))}")
    rope = getattr(stack.config, "rope_parameters", None) or {}
    if reference == "masked" and "mrope_section" in rope:
        raise AttachError("reference='masked' needs one position a token; this model has M-RoPE: use 'removed'")
    positions = (real.long().cumsum(1) - 1).clamp(min=0)
    keep = real & ~image
    short = (~keep.any(1)).nonzero()[:, 0].tolist()
    if short:
        raise AttachError(
            f"rows {short} of the prompt hold nothing but image tokens: without them there is no text to compare"
        )
    if reference == "removed":
        order = keep.long().argsort(dim=1, stable=True)[:, -int(keep.sum(1).max()) :]
        ids, keep = ids.gather(1, order), keep.gather(1, order)
        positions = (keep.long().cumsum(1) - 1).clamp(min=0)
    with torch.no_grad(), text_only(model):
        embedded = model.get_input_embeddings()(ids)  # type: ignore[operator]
        stack.owner(inputs_embeds=embedded, attention_mask=keep.long(), position_ids=positions, use_cache=False)
