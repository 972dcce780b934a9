"""Attention sinks: tokens with massive activations in a few fixed dimensions of the residual stream (arXiv 2402.17762, 2503.03321).

    phi(x) = max over d in D_sink of |x[d]| / sqrt(mean_k x[k]² + 1e-6),      x: the input of a decoder layer

Letters: L layers, B batch, N tokens, C width of the residual stream, P positions.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from headwise.attach.images import ImageTokens, block, extended, looked_up
from headwise.attach.locate import Stack
from headwise.checks import whole
from headwise.errors import AttachError, EditError

EPS = 1e-6
MOST = 4  # dimensions that are kept


def sink_value(x: Tensor, dims: Sequence[int]) -> Tensor:
    """phi (…) of states x (…, C), in float32 whatever the dtype of x; at most √C.

    >>> x = torch.zeros(16); x[3] = 100.0
    >>> round(float(sink_value(x, [3])), 3), round(float(sink_value(x, [4])), 3)
    (4.0, 0.0)
    """
    wide = x.detach().float()
    rms = (wide.square().mean(-1) + EPS).sqrt()
    return wide[..., list(dims)].abs().amax(-1) / rms


def check_dims(dims: Sequence[int], width: int) -> tuple[int, ...]:
    """The dimensions, if they exist in a residual stream of this width; EditError otherwise."""
    if not len(dims):
        raise EditError("dims is empty; sinks are recognised by at least one dimension")
    return tuple(whole("a sink dimension", d, 0, EditError, high=width - 1) for d in dims)


def check_tau(tau: float, width: int) -> None:
    """Raises EditError for a threshold that no state can pass (phi is at most √C); infinity is a plain "never"."""
    if not tau > 0:
        raise EditError(f"tau is {tau}; it must be a number above 0")
    if tau != float("inf") and tau >= width**0.5:
        raise EditError(
            f"tau is {tau:g}, but phi is at most √C = {width**0.5:.1f} in a model of width {width}: no token could be a sink. "
            f"The papers' 20 was set at width 4096; the same share here is {20 / 64 * width**0.5:.1f}"
        )


@torch.no_grad()
def find_sink_dims(
    model: nn.Module,
    stack: Stack,
    batches: Sequence[Mapping[str, Any]],
    *,
    tau: float = 20.0,
    share: float = 0.9,
    most: int = MOST,
) -> tuple[int, ...]:
    """Dimensions in which some token's |x[d]| / RMS(x) passes tau in at least `share` of the middle layers, the largest first.

    Middle layers are 3 … L-2, in models of fewer than 8 layers 1 … L-1. `batches`: keyword arguments of the model. The
    answer is empty for a model without massive activations.
    """
    layers = range(3, stack.layers - 1) if stack.layers >= 8 else range(1, stack.layers)
    peaks: dict[int, Tensor] = {}

    def look(layer: int, module: nn.Module, args: tuple, kwargs: dict) -> None:
        x = _states(args, kwargs).float()
        ratio = (x.abs() / (x.square().mean(-1, keepdim=True) + EPS).sqrt()).flatten(0, -2).amax(0)
        peaks[layer] = torch.maximum(peaks[layer], ratio) if layer in peaks else ratio

    handles = watch_blocks({layer: block(stack, layer) for layer in layers}, look)
    try:
        for batch in batches:
            model(**{k: v.to(model.device) if isinstance(v, Tensor) else v for k, v in batch.items()})  # type: ignore[arg-type]
    finally:
        for handle in handles:
            handle.remove()
    if not peaks:
        raise AttachError("no layer of the decoder ran: batches must be keyword arguments of the model, at least one")
    table = torch.stack([peaks[layer] for layer in sorted(peaks)])  # (L', C)
    passing = (table > tau).float().mean(0) >= share
    order = table.median(0).values.masked_fill(~passing, -1.0).argsort(descending=True)[:most]
    return tuple(int(d) for d in order if bool(passing[d]))


def watch_blocks(blocks: Mapping[int, nn.Module], see: Any) -> list[Any]:
    """Pre-hooks `see(layer, module, args, kwargs)` on decoder layers, by number; remove the handles when done."""
    return [
        module.register_forward_pre_hook(functools.partial(see, layer), with_kwargs=True)
        for layer, module in blocks.items()
    ]


def _states(args: tuple, kwargs: dict) -> Tensor:
    return kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]


class SinkTokens(ImageTokens):
    """Image tokens, and for each layer the positions of its sinks: found when a prompt is read, kept while decoding.

    A later chunk of a prompt (several columns behind cached ones) adds its own sinks; a token that is decoded never is one.
    """

    def __init__(self, model: nn.Module, dims: Sequence[int], tau: float, layers: Sequence[int]):
        super().__init__(model)
        width = int(self.stack.config.hidden_size)  # type: ignore[attr-defined]
        self.dims = check_dims(dims, width)
        check_tau(tau, width)
        self.tau, self.layers = tau, tuple(layers)
        self._blocks = {layer: block(self.stack, layer) for layer in self.layers}
        self._handles: list[Any] = []
        self.sinks: dict[int, Tensor] = {}  # (B, P) bool by position, of any token
        self.image_sinks: dict[int, Tensor] = {}  # (B,) bool: has the row a sink on an image in this layer?
        self._codes: dict[tuple[int, bool], Tensor] = {}
        self.any_image_sink: dict[int, bool] = {}  # in any row: known on the host, so that decoding waits for nothing

    def attach_with(self, *transforms: Any) -> None:
        """Begin to follow, also the residual stream that enters the layers."""
        self._undo.append(functools.partial(self._watch, False))
        super().attach_with(*transforms)

    def _before(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        super()._before(module, args, kwargs)
        self._watch(self._reading)

    @property
    def _reading(self) -> bool:
        """Does the pass at hand read a prompt, or a chunk of one?"""
        return self.fresh or (self.past > 0 and self.count > 1)

    def _watch(self, wanted: bool) -> None:
        """Hooks on the layers while a prompt is read: in every layer of a decode step they would cost, and see nothing."""
        if wanted and not self._handles:
            self._handles = watch_blocks(self._blocks, self._look)
        elif not wanted:
            while self._handles:
                self._handles.pop().remove()

    def begin(self, ids: Tensor, mask: Tensor) -> None:
        """Forget the sinks of the prompt before."""
        self.sinks, self.image_sinks, self.any_image_sink, self._codes = {}, {}, {}, {}

    def _look(self, layer: int, module: nn.Module, args: tuple, kwargs: dict) -> None:
        if self.paused or not self._reading:
            return
        x = _states(args, kwargs)
        flags = (sink_value(x, self.dims) > self.tau) & self.real.to(x.device)
        old = self.sinks.get(layer, flags.new_zeros(flags.shape[0], 0))
        self.sinks[layer] = extended(old, self.positions.to(x.device), flags, self.past + self.count)
        table = self.table.to(x.device)
        on_image = self.sinks[layer] & looked_up(table, torch.arange(self.sinks[layer].shape[1], device=x.device)[None])
        self.image_sinks[layer] = on_image.any(1)
        self.any_image_sink[layer] = bool(self.image_sinks[layer].any())
        for kind in (False, True):
            self._codes.pop((layer, kind), None)

    def codes(self, layer: int, *, by_position: bool = False) -> Tensor:
        """(B, C) uint8 of the prompt's columns, for kernels: 1 on an image, 2 on a sink, 3 on both; no image in rows without a sink on one.

        Made once a prompt: tokens that are decoded are neither. `by_position`: of positions instead of columns.
        """
        if (layer, by_position) not in self._codes:
            sinks, table = self.sinks[layer], self.table.to(self.sinks[layer].device)
            at = torch.arange(sinks.shape[1], device=sinks.device)[None]
            at = at if self.start is None or by_position else at - self.start.to(at.device)[:, None]
            image = looked_up(table, at) & self.image_sinks[layer][:, None]
            self._codes[layer, by_position] = image.to(torch.uint8) + 2 * looked_up(sinks, at).to(torch.uint8)
        return self._codes[layer, by_position]
