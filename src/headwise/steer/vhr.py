"""VHR: the heads that look at the picture speak louder (vision-aware head reinforcement, arXiv 2412.13949).

Letters: L layers, B batch, N columns, H query heads, D head dim.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, get_args

import torch
from torch import Tensor

from headwise import storage
from headwise.attach import HeadCall, find_stack, fingerprint
from headwise.attach.divergence import (
    Metric,
    Reference,
    divergence,
    last_rows,
    run_without_images,
    vision_aware,
    without_outliers,
)
from headwise.attach.images import ImageTokens, InLayers, decoder_stack
from headwise.checks import finite, numbers, whole
from headwise.errors import EditError
from headwise.registry import register
from headwise.storage import StrPath, decoding, field
from headwise.units import Fingerprint

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True, kw_only=True)
class VHR:
    """What is done, as data; `attach(model)` does it.

    At each prompt, layer by layer of `layers`: VHD of the last position against the prompt without its images, outliers set
    to 0, heads strictly above the median chosen, their outputs multiplied by `alpha` at all positions at once, so that the
    next layer chooses from what it then sees. The choice is per row of the batch, and stays while its answer is written.
    """

    layers: tuple[int, ...]
    alpha: float = 2.0
    outliers: bool = True
    metric: Metric = "euclidean"
    reference: Reference = "removed"
    fingerprint: Fingerprint | None = None

    def __post_init__(self) -> None:
        alpha = finite("alpha", self.alpha, EditError)
        if alpha <= 0:
            raise EditError(f"alpha is {alpha:g}; it must be above 0 (1 changes nothing, 2 is the paper's)")
        object.__setattr__(self, "alpha", alpha)
        for name, value, allowed in (("metric", self.metric, Metric), ("reference", self.reference, Reference)):
            if value not in get_args(allowed):
                raise EditError(f"{name}={value!r}; choose {', '.join(get_args(allowed))}")
        count = self.fingerprint.layers if self.fingerprint else 2**31
        layers = tuple(sorted({whole("a layer", layer, 0, EditError, high=count - 1) for layer in self.layers}))
        if not layers:
            raise EditError("layers is empty; name at least one layer")
        object.__setattr__(self, "layers", layers)

    def attach(self, model: PreTrainedModel) -> ReinforcedHeads:
        """Put it into a model: a context manager with `detach()`; `heads` tells which heads the last prompt chose."""
        print_ = fingerprint(model, decoder_stack(model))
        if self.fingerprint is not None:
            self.fingerprint.require(print_, "VHR")
        for layer in self.layers:
            whole("a layer", layer, 0, EditError, high=print_.layers - 1)
        return ReinforcedHeads(model, self)

    def save(self, path: StrPath) -> None:
        """Write JSON."""
        plain = {name: getattr(self, name) for name in ("alpha", "outliers", "metric", "reference")}
        print_ = self.fingerprint and self.fingerprint.to_dict()
        storage.write_json(path, "vhr", 1, {**plain, "layers": list(self.layers), "fingerprint": print_})

    @classmethod
    def load(cls, path: StrPath) -> VHR:
        """Read what `save` wrote. Raises ArtifactError."""
        data = storage.read_json(path, "vhr", 1)
        with decoding(path):
            print_ = data.get("fingerprint")
            return cls(
                layers=tuple(field(data, "layers", list)),
                alpha=field(data, "alpha", float),
                outliers=field(data, "outliers", bool),
                metric=field(data, "metric", str),  # type: ignore[arg-type]
                reference=field(data, "reference", str),  # type: ignore[arg-type]
                fingerprint=None if print_ is None else Fingerprint.from_dict(print_),
            )

    def __str__(self) -> str:
        return f"VHR: vision-aware heads times {self.alpha:g} in layers {','.join(map(str, self.layers))}"


class ReinforcedHeads(ImageTokens):
    """VHR at work in a model.

    `divergence[layer]` (B, H) float32 and `heads[layer]` (B, H) bool are of the last prompt; `factors[layer]` (B, 1, H, 1)
    is what the outputs are multiplied by. `choose(layer, divergence) -> (B, H) bool` takes another rule than the median.
    """

    def __init__(self, model: PreTrainedModel, rule: VHR, choose: Callable[[int, Tensor], Tensor] | None = None):
        super().__init__(model)
        self.rule, self.choose = rule, choose or (lambda layer, values: vision_aware(values))
        self.without: dict[int, Tensor] = {}
        self.divergence: dict[int, Tensor] = {}
        self.heads: dict[int, Tensor] = {}
        self.factors: dict[int, Tensor] = {}
        self.attach_with(InLayers(self._transform, rule.layers, counts=True))

    def begin(self, ids: Tensor, mask: Tensor) -> None:
        """One pass of the decoder over the batch without its images, before the pass with them."""
        self.factors = {}
        run_without_images(self.model, self.stack, ids, mask, self.columns, self.rule.reference)

    def _transform(self, call: HeadCall, attend: Callable[[], Tensor]) -> Tensor:
        out = attend()  # (B, N, H, D)
        layer = call.layer
        if self.paused:
            self.without[layer] = last_rows(call, out.detach())[:, 0]
            return out
        self.check_call(call)
        if self.fresh and layer not in self.factors:
            self._choose(layer, last_rows(call, out.detach(), real=self.real)[:, 0])
        factors = self.factors[layer]  # float32, so that the products are too: in float16 they may overflow on the way
        if torch.is_grad_enabled():
            return (out * factors).to(out.dtype)
        return out.mul_(factors)  # one kernel, in place: the tensor was made by this call's own attention

    def _choose(self, layer: int, seen: Tensor) -> None:
        values = divergence(seen, self.without[layer], self.rule.metric)
        if self.rule.outliers:
            values = without_outliers(values, self.without[layer])
        heads = self.choose(layer, values)
        self.divergence[layer], self.heads[layer] = values, heads
        self.factors[layer] = torch.ones_like(values).masked_fill(heads, self.rule.alpha)[:, None, :, None]


@register("steer", "vhr", paper="22")
def vhr(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    alpha: float = 2.0,
    layers: str | None = None,
    outliers: bool = True,
    metric: Metric = "euclidean",
    reference: Reference = "removed",
) -> VHR:
    """Multiply the outputs of the heads that look at the picture by alpha, against hallucination.

        Ã_lh = alpha · A_lh   for heads with VHD_lh > median over h of VHD_l,   layers one after the other

    arXiv 2412.13949. Gives a `VHR`; `with headwise.steer.vhr(model, None).attach(model): model.generate(…)`. Works under
    generate with cache, batches, padding, beams; costs one pass over the prompt without its images, and next to nothing a token.

    alpha: the factor, above 0; 1 changes nothing, and beyond 3 text degenerates: report recall and length next to hallucinations.
    layers: such as 1,18:32; by default the paper's rule, layer 1 and the last 14/32 of the layers.
    outliers: leave out heads that fire because the image is gone.
    metric: how two outputs of a head are compared; the paper's is euclidean.
    reference: the prompt with its image tokens removed, or with them masked.

    Raises EditError for a bad alpha or layer, AttachError for a model without image tokens in its decoder's sequence; when
    running, AttachError for a prompt without an image.

    >>> from headwise.hub import load_model
    >>> model, _ = load_model("tiny-random-llava")
    >>> print(vhr(model, None))
    VHR: vision-aware heads times 2 in layers 1,2,3
    """
    count = find_stack(model, decoder_stack(model)).layers
    chosen = default_layers(count) if layers is None else numbers("layers", layers, EditError, count)
    print_ = fingerprint(model, decoder_stack(model))
    return VHR(layers=chosen, alpha=alpha, outliers=outliers, metric=metric, reference=reference, fingerprint=print_)


def default_layers(count: int) -> tuple[int, ...]:
    """Layer 1 and the last 14/32 of them: {1, 18 … 31} of 32.

    >>> default_layers(32) == (1, *range(18, 32))
    True
    """
    last = max(1, round(14 / 32 * count))
    return tuple(sorted({min(1, count - 1), *range(count - last, count)}))
