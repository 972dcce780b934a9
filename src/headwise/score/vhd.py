"""Vision-aware head divergence: how much each head's output depends on the picture (arXiv 2412.13949).

Letters: L layers, B batch, T answer tokens, H query heads, D head dim.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from headwise.attach import HeadCall, fingerprint
from headwise.attach.divergence import (
    Metric,
    Reference,
    divergence,
    last_rows,
    run_without_images,
    top_sum,
    without_outliers,
)
from headwise.attach.images import ImageTokens, decoder_stack
from headwise.checks import whole
from headwise.errors import ScoreError
from headwise.progress import track
from headwise.registry import register
from headwise.tasks.pictures import picture_batches
from headwise.units import HeadScores

if TYPE_CHECKING:
    from collections.abc import Callable

    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@register("score", "vhd", paper="22")
def vhd(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    samples: int = 32,
    batch_size: int = 16,
    batches: Sequence[Mapping[str, Any]] | None = None,
    outliers: bool = True,
    metric: Metric = "euclidean",
    reference: Reference = "removed",
    seed: int = 0,
    progress: bool = False,
) -> HeadScores:
    """How far each head's output moves when the picture is taken out of the prompt, in the mean over prompts.

        VHD[l,h] = ‖ A_lh(picture, text) − A_lh(text) ‖₂   at the last position, before the output projection

    arXiv 2412.13949, eq. 4 and its outlier rule. One pass with and one without pictures for each batch. Gives HeadScores (L, H).

    samples: prompts that are made, packaged scenes drawn for the model's picture size.
    batch_size: prompts a pass; the scores do not depend on it.
    `batches`: instead, keyword arguments of the model with input_ids and pictures, as its processor gives them.
    outliers: give 0 to heads that fire because the picture is gone.
    metric: euclidean (the paper's), cosine, or relative to the norm without picture.
    reference: the prompt with its image tokens removed (the paper's), or with them masked and all positions kept.

    Raises AttachError for a model or a prompt without image tokens, TaskError where pictures cannot be made for the model.

    >>> from headwise.hub import load_model
    >>> scores = vhd(*load_model("tiny-random-llava"), samples=4)
    >>> scores.values.shape, bool((scores.values >= 0).all())
    (torch.Size([4, 4]), True)
    """
    stack = decoder_stack(model)
    own = batches is not None
    if batches is None:
        batches = picture_batches(model, tokenizer, samples, batch_size=batch_size, seed=seed)
    if not len(batches):
        raise ScoreError("batches is empty; at least one is needed")
    tables = [
        vhd_samples(model, batch, outliers=outliers, metric=metric, reference=reference)
        for batch in track(batches, "vhd", progress)
    ]
    values = torch.cat(tables).mean(0)
    return HeadScores(
        values=values.cpu(),
        method="vhd",
        data=f"{sum(map(len, tables))} {'own prompts' if own else 'scenes'}",
        fingerprint=fingerprint(model, stack),
        meta={"metric": metric, "reference": reference, "outliers": outliers, "seed": seed},
    )


@torch.no_grad()
def vhd_samples(
    model: PreTrainedModel,
    inputs: Mapping[str, Any],
    *,
    last: int = 1,
    outliers: bool = True,
    metric: Metric = "euclidean",
    reference: Reference = "removed",
) -> Tensor:
    """VHD of every prompt by itself, (B, L, H) float32; with `last` = T > 1 of the T last positions, (B, T, L, H).

    `inputs`: keyword arguments of the model. The model is left as it was.
    """
    whole("last", last, 1, ScoreError)
    with _Outputs(model, last, reference) as record:
        model(**{k: v.to(model.device) if isinstance(v, Tensor) else v for k, v in inputs.items()})
    layers = range(record.stack.layers)
    seen, without = (torch.stack([table[layer] for layer in layers], dim=2) for table in (record.seen, record.without))
    values = divergence(seen, without, metric)  # (B, T, L, H)
    values = without_outliers(values, without) if outliers else values
    return values[:, 0] if last == 1 else values


def token_vhd(
    model: PreTrainedModel,
    inputs: Mapping[str, Any],
    *,
    tokens: int,
    k: int = 4,
    outliers: bool = False,
    reference: Reference = "removed",
) -> Tensor:
    """T-VHD (B, T) of the last T tokens of each row: sum over layers of the k largest VHD at the position that predicts each token.

    Low values mean that the token came from the habit of speech rather than the picture. `inputs` are prompts with their
    answers, teacher-forced in two passes. Raises EditError for k outside 1 … H, ScoreError for tokens < 1.

    >>> from headwise.hub import load_model
    >>> from headwise.tasks.pictures import picture_batches
    >>> model, tokenizer = load_model("tiny-random-llava")
    >>> token_vhd(model, picture_batches(model, tokenizer, 2)[0], tokens=3).shape
    torch.Size([2, 3])
    """
    whole("tokens", tokens, 1, ScoreError)
    table = vhd_samples(model, inputs, last=tokens + 1, outliers=outliers, reference=reference)
    return top_sum(table[:, :-1], k)


class _Outputs(ImageTokens):
    """Head outputs of the last T positions, with the images (`seen`) and without: layer -> (B, T, H, D)."""

    def __init__(self, model: PreTrainedModel, last: int, reference: Reference):
        super().__init__(model)
        self.last, self.reference = last, reference
        self.seen: dict[int, Tensor] = {}
        self.without: dict[int, Tensor] = {}
        self.attach_with(self._record)

    def begin(self, ids: Tensor, mask: Tensor) -> None:
        run_without_images(self.model, self.stack, ids, mask, self.columns, self.reference)

    def _record(self, call: HeadCall, attend: Callable[[], Tensor]) -> Tensor:
        out = attend()
        table = self.without if self.paused else self.seen
        real = None if self.paused else self.real
        table[call.layer] = last_rows(call, out.detach(), self.last, real).clone()
        return out
