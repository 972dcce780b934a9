"""Image-centric heads: heads whose text queries look at the image, and at more of it than its sinks (arXiv 2503.03321).

Letters: L layers, B batch, N columns, H query heads.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor

from headwise.attach import HeadCall, find_stack, fingerprint
from headwise.attach.images import decoder_stack, looked_up
from headwise.attach.observe import row_statistics
from headwise.attach.sinks import SinkTokens, find_sink_dims
from headwise.checks import finite, numbers
from headwise.errors import EditError, ScoreError
from headwise.progress import track
from headwise.registry import register
from headwise.tasks.pictures import picture_batches
from headwise.units import HeadScores

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Measure = Literal["centric", "mass", "sink-share"]


@register("score", "image-heads", paper="33")
def image_heads(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    measure: Measure = "centric",
    rho: float = 0.8,
    minimum_mass: float = 0.2,
    tau: float = 20.0,
    dims: str | None = None,
    samples: int = 32,
    batch_size: int = 16,
    batches: Sequence[Mapping[str, Any]] | None = None,
    seed: int = 0,
    progress: bool = False,
) -> HeadScores:
    """How often a head is image-centric: the share of text queries behind an image whose attention rests on the image.

        centric:     mean over queries of [ P_image ≥ 0.2  and  P_rest / P_image ≥ rho ],   P_rest = P_image − P_image sinks
        mass:        mean of P_image
        sink-share:  mean of P_image sinks over mean of P_image

    arXiv 2503.03321, step 4, here over all layers. A model without massive activations has no sinks: then P_rest = P_image.
    Gives HeadScores (L, H) in [0, 1].

    measure: one of the three.
    rho: least share of the attention on the image that is not on sinks.
    minimum_mass: least attention on the image.
    tau: a token whose phi passes it is a sink.
    dims: sink dimensions such as 1415,2533; by default they are found in the model.
    samples: prompts that are made, packaged scenes drawn for the model's picture size.
    batch_size: prompts a pass; the scores do not depend on it.
    `batches`: instead, keyword arguments of the model with input_ids and pictures, as its processor gives them.

    Raises AttachError for a model or a prompt without image tokens, ScoreError for a measure that does not exist.

    >>> from headwise.hub import load_model
    >>> scores = image_heads(*load_model("tiny-random-llava"), measure="mass", samples=2)
    >>> scores.values.shape, bool((scores.values > 0).all())
    (torch.Size([4, 4]), True)
    """
    if measure not in get_args(Measure):
        raise ScoreError(f"measure={measure!r}; choose {', '.join(get_args(Measure))}")
    for name, value in (("rho", rho), ("minimum_mass", minimum_mass)):
        if finite(name, value, ScoreError) < 0:
            raise ScoreError(f"{name} is {value:g}; it must be at least 0")
    own = batches is not None
    if batches is None:
        batches = picture_batches(model, tokenizer, samples, batch_size=batch_size, seed=seed)
    stack = find_stack(model, decoder_stack(model))
    width = int(stack.config.hidden_size)  # type: ignore[attr-defined]
    if dims is None:
        found = find_sink_dims(model, stack, batches[:1], tau=tau)
    else:
        found = numbers("dims", dims, EditError, width)
    with _Masses(model, found, tau if found else float("inf"), rho, minimum_mass) as record, torch.no_grad():
        for batch in track(batches, "image heads", progress):
            model(**{k: v.to(model.device) if isinstance(v, Tensor) else v for k, v in batch.items()})
    return HeadScores(
        values=record.values(measure),
        method=f"image-heads-{measure}",
        data=f"{record.queries} queries of {'own prompts' if own else 'scenes'}",
        fingerprint=fingerprint(model, stack.pattern),
        meta={"rho": rho, "minimum_mass": minimum_mass, "tau": tau, "dims": ",".join(map(str, found)), "seed": seed},
    )


class _Masses(SinkTokens):
    """Sums over text queries behind an image: image-centric or not, mass on the image, mass on its sinks; (L, H) each."""

    def __init__(self, model: PreTrainedModel, dims: Sequence[int], tau: float, rho: float, minimum_mass: float):
        layers = range(find_stack(model, decoder_stack(model)).layers)
        super().__init__(model, dims or (0,), tau, layers)
        self.rho, self.minimum_mass = rho, minimum_mass
        shape = (self.stack.layers, self.stack.heads)
        self.centric, self.mass, self.sink_mass = (torch.zeros(shape, dtype=torch.float64) for _ in range(3))
        self.queries = 0
        self.attach_with(self._see)

    def _see(self, call: HeadCall, attend: Callable[[], Tensor]) -> Tensor:
        self.check_call(call)
        layer, sinks, image = call.layer, self.sinks[call.layer], self.table
        tests = {
            "image": lambda queries, keys: looked_up(image, keys),
            "rest": lambda queries, keys: looked_up(image, keys) & ~looked_up(sinks, keys),
        }
        masses = row_statistics(call, (), tests, None)  # (B, H, N) each
        chosen = self.text_queries()[:, None]
        on_image, rest = masses["image"] * chosen, masses["rest"] * chosen
        centric = chosen & (on_image >= self.minimum_mass) & (rest >= self.rho * on_image)
        heads = slice(call.site.first_head, call.site.first_head + on_image.shape[1])
        for total, part in ((self.centric, centric), (self.mass, on_image), (self.sink_mass, on_image - rest)):
            total[layer, heads] += part.double().sum((0, 2)).cpu()
        self.queries += int(chosen.sum()) if layer == 0 else 0
        return attend()

    def values(self, measure: Measure) -> Tensor:
        """(L, H) of one measure."""
        if not self.queries:
            raise ScoreError("no text query stands behind an image in these batches: put the question behind the image")
        if measure == "sink-share":
            return self.sink_mass / self.mass.clamp(min=1e-12)
        return (self.centric if measure == "centric" else self.mass) / self.queries
