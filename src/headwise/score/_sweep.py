"""The patching engine: what a model answers when one head's output is taken from another run, all heads in few passes.

A clean pass keeps the outputs of the heads and what enters each layer. A patched run differs from it only from the head's
layer on, so the run starts there (`attach/resume.py`), with the heads of a layer as copies in the batch. Pairs that are too many
to be kept at once are swept some at a time.

Letters: B pairs, N columns, L layers, H query heads, D head dim, U heads folded into the batch.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from headwise.attach import HeadCall, attach, find_stack
from headwise.attach.resume import Resume
from headwise.checks import whole
from headwise.errors import ScoreError
from headwise.score._blocks import first, replaced, with_first
from headwise.score._patching import ROWS, SHORT, Asked, Prefix, Run, answer, read_prefix, record

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from headwise.score._blocks import Kept
    from headwise.tasks.pairs import PromptPairs


class Sweep:
    """Runs of one model on one batch of prompts, each with some heads' outputs replaced at some columns.

    `base` is the run that is changed. `rows` bounds the rows of a folded batch (B at least); results do not depend on it. `watch`
    keeps what passes through the layers in the same clean pass.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        pairs: PromptPairs,
        where: Tensor,
        *,
        stack: str | None = None,
        rows: int = ROWS,
        watch: Kept | None = None,
    ):
        self.model, self.pairs, self.where, self.stack = model, pairs, where, stack
        self.found = find_stack(model, stack)
        self.rows = whole("rows", rows, 1, ScoreError)
        self.change: Callable[[HeadCall, Callable[[], Tensor]], Tensor] | None = None
        self._open = False
        self.resume = Resume(model, range(1, self.found.layers), stack)
        with self.resume.recording(), watch.recording() if watch is not None else contextlib.nullcontext():
            self.base = self.record(pairs)
        self._check_resumed()
        self.prefix = self._find_prefix()
        self.asked = Asked.of(pairs, self.start)

    def record(self, pairs: PromptPairs, ids: Tensor | None = None) -> Run:
        """One pass over the prompts, or over other ids (B, N) in their place, with the outputs of all units."""
        return record(self.model, pairs, pairs.ids if ids is None else ids, self.stack)

    @property
    def units(self) -> int:
        """Units of a layer: heads."""
        return self.found.heads

    def lent(self, means: Tensor | None) -> Run:
        """A run that gives every unit its row of `means` (L, H, D) everywhere, or zeros."""
        z = [
            torch.zeros_like(own) if means is None else means[layer].to(own).expand_as(own)
            for layer, own in enumerate(self.base.z)
        ]
        return Run(z, self.base.logits, self.base.difference)

    def where_lent(self, other: Run, real: Tensor) -> Run:
        """Another run's outputs where it has a real token (B, N), and this one's own elsewhere."""
        z = [torch.where(real[..., None, None], lent, own) for lent, own in zip(other.z, self.base.z, strict=True)]
        return Run(z, other.logits, other.difference)

    @property
    def size(self) -> int:
        """Heads that are folded into one batch: the more the fewer columns a pass has.

        A copy costs the columns that it computes and, one layer at a time, the keys and values that it reads.
        """
        columns = self.pairs.ids.shape[1]
        cost = max((columns - self.start) / columns, self.found.kv_heads / (3 * self.found.heads))
        return max(1, int(self.rows / cost) // len(self.pairs))

    @property
    def start(self) -> int:
        """First column that a pass reads."""
        return 0 if self.prefix is None else self.prefix.columns

    @torch.no_grad()
    def _find_prefix(self) -> Prefix | None:
        """The columns before the first patched one, where a decoder's cache proves that they need not be read again."""
        at = self.where.float().argmax(1)
        columns = int(torch.minimum(at, self.pairs.last).min())
        if columns < SHORT or not self.found.causal or not self.resume.kept:
            return None
        prefix = read_prefix(self.model, self.pairs, columns)
        again = answer(self.model, self.pairs, self.pairs.ids, 1, prefix.copied(1, 0))[0]
        return prefix if self._same(again) else None

    def _same(self, logits: Tensor) -> bool:
        exact = self.model.dtype in (torch.float32, torch.float64)
        allowed = (1e-4 if exact else 2e-2) * float(self.base.logits.abs().max())
        return bool((logits - self.base.logits).abs().max() <= allowed)

    @torch.no_grad()
    def _check_resumed(self) -> None:
        """A model that hands more than hidden states from layer to layer runs whole each time."""
        middle = self.found.layers // 2
        if not middle:
            return
        with self.resume.from_layer(middle):
            again = answer(self.model, self.pairs, self.pairs.ids)[0]
        if not self._same(again):
            self.resume.kept.clear()

    @contextlib.contextmanager
    def attached(self) -> Iterator[None]:
        """The model attached once for all passes inside the block."""
        if self._open:
            yield
            return
        self._open = True
        try:
            with attach(self.model, transforms=[self._transform], stack=self.stack):
                yield
        finally:
            self._open = False

    def _transform(self, call: HeadCall, attend: Callable[[], Tensor]) -> Tensor:
        return attend() if self.change is None else self.change(call, attend)

    @torch.no_grad()
    def layer(self, layer: int, units: Sequence[int], outputs: Any) -> Tensor:
        """Logit differences (U, B) with each of `units` of a layer replaced, alone, by its slice of outputs (B, N, H, D)."""
        own = self.base.z[layer]
        values = torch.where(self.where[..., None, None], outputs, own)[:, self.start :].permute(2, 0, 1, 3)
        return self.each(layer, units, values[list(units)])

    @torch.no_grad()
    def each(self, layer: int, heads: Sequence[int], values: Tensor) -> Tensor:
        """Logit differences (U, B) with heads[u] alone giving values[u], (U, B, N, D) of the columns from `start` on."""
        parts, own = [], self.base.z[layer][:, self.start :]
        for at in range(0, len(heads), self.size):
            some = list(heads[at : at + self.size])
            change = Fold(layer, own, some, values[at : at + self.size])
            parts.append(self.run(layer, change, len(some)).view(len(some), -1))
        return torch.cat(parts)

    @torch.no_grad()
    def run(self, layer: int, change: Any, copies: int, forwards: dict[nn.Module, Callable] | None = None) -> Tensor:
        """LD (copies · B,) of a pass from `layer` on, under a transform of the attention and with other forwards of modules."""
        prefix = None if self.prefix is None else self.prefix.copied(copies, layer)
        self.change = change
        try:
            with self.attached(), _folded(self.resume, layer, copies, self.start), replaced(forwards or {}):
                return answer(self.model, self.pairs, self.pairs.ids, copies, prefix, self.asked)[1]
        finally:
            self.change = None

    def all_units(self, outputs: Callable[[int], Any], track: Callable[[Any], Any] = iter) -> Tensor:
        """Logit differences (L, U, B), one unit replaced at a time; `outputs(layer)` is what `layer` takes."""
        units = range(self.units)
        with self.attached():
            return torch.stack([self.layer(layer, units, outputs(layer)) for layer in track(range(self.found.layers))])


@dataclass(frozen=True, eq=False)
class Fold:
    """The transform of a resumed pass: a layer's recorded outputs, once per copy, each with one head's outputs in the place of its own."""

    layer: int
    base: Tensor  # (B, N, H, D)
    heads: Sequence[int]  # U of them
    values: Tensor  # (U, B, N, D)

    def __call__(self, call: HeadCall, attend: Callable[[], Tensor]) -> Tensor:
        if call.layer != self.layer:
            return attend()
        out = self.base.repeat(len(self.heads), 1, 1, 1).unflatten(0, (len(self.heads), len(self.base)))
        heads = torch.tensor(list(self.heads), device=out.device)
        out[torch.arange(len(heads), device=out.device), :, :, heads] = self.values.to(out.dtype)
        return out.flatten(0, 1)


@contextlib.contextmanager
def _folded(resume: Resume, layer: int, copies: int, start: int) -> Iterator[None]:
    """A pass from `layer` on whose batch is the recorded one, `copies` times over, from column `start` on."""
    kept = resume.kept
    point = layer if layer in kept else 0
    resume.kept = {point: repeated(kept[point], copies, start)} if point else {}
    try:
        with resume.from_layer(point):
            yield
    finally:
        resume.kept = kept


def repeated(output: Any, copies: int, start: int) -> Any:
    """What a layer gave back, `copies` times over, from column `start` on."""
    return with_first(output, first(output)[:, start:].repeat(copies, 1, 1))
