"""Run a model once, then again from a later layer on: runs that differ only behind layer l share everything before it.

    with resume.recording(): model(ids)                   # the whole model; what enters the chosen layers is kept
    with resume.from_layer(6), attach(model, edits=...): model(ids)   # layers 0 to 5 give what they gave before

The model's own code runs each time, with its own masks and positions; only the layers before the point are skipped. That
is right where nothing but the hidden states passes from layer to layer; `check` proves it on given inputs.
"""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from headwise.attach.locate import find_stack
from headwise.errors import AttachError


class Resume:
    """Keeps what enters the layers `points` of a model in one pass, and starts later passes there. Point 0 is a whole pass.

    >>> from headwise.hub import load_model
    >>> model, _ = load_model("tiny-random-llama")
    >>> ids, resume = torch.arange(9)[None], Resume(model, [1])
    >>> with torch.no_grad(), resume.recording():
    ...     whole = model(ids).logits
    >>> with torch.no_grad(), resume.from_layer(1):
    ...     again = model(ids).logits
    >>> torch.equal(whole, again)
    True
    """

    def __init__(self, model: nn.Module, points: Sequence[int], stack: str | None = None):
        self.blocks = _blocks(model, stack)
        outside = [p for p in points if not 0 <= p < len(self.blocks)]
        if outside:
            raise AttachError(f"points={list(points)}: layers of this model are 0 to {len(self.blocks) - 1}")
        self.points = sorted({*points} - {0})
        self.kept: dict[int, Any] = {}

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        """Keep what enters the chosen layers in the pass that runs inside the block."""
        self.kept = {}
        handles = [self.blocks[p - 1].register_forward_hook(functools.partial(self._keep, p)) for p in self.points]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _keep(self, point: int, block: nn.Module, args: Any, output: Any) -> None:
        self.kept[point] = output

    @contextlib.contextmanager
    def from_layer(self, point: int) -> Iterator[None]:
        """Passes inside the block skip the layers before `point`; the inputs must be those of the recorded pass."""
        if point and point not in self.kept:
            raise AttachError(f"nothing was recorded for layer {point}; recorded: {sorted(self.kept)}")
        skipped = self.blocks[:point]
        if any("forward" in vars(block) for block in skipped):
            raise AttachError(
                "a layer's forward is replaced already (a wrapper, or another resumed pass); undo that first"
            )
        for block in skipped:
            block.forward = functools.partial(_given, self.kept[point])
        try:
            yield
        finally:
            for block in skipped:
                del block.forward

    def check(self, run: Callable[[], Tensor]) -> float:
        """Largest difference, over the points, between a whole pass `run()` and the resumed ones; 0 or rounding is right."""
        with torch.no_grad(), self.recording():
            whole = run()
        worst = 0.0
        for point in self.points:
            with torch.no_grad(), self.from_layer(point):
                worst = max(worst, float((run() - whole).abs().max()))
        return worst


def _given(output: Any, *args: Any, **kwargs: Any) -> Any:
    return output


def _blocks(model: nn.Module, stack: str | None) -> list[nn.Module]:
    """The layers that hold the attention modules of a stack, in order."""
    found = find_stack(model, stack)
    before, star, _ = found.pattern.partition("*")
    if not star:
        raise AttachError(f"stack {found.pattern} has no list of layers to resume in")
    path = re.sub(r"\.$", "", before)
    layers = model.get_submodule(path)
    return [layers.get_submodule(str(i)) for i in range(found.layers)]
