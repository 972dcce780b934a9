"""Path patching: what reaches a receiver from a sender on the direct path, and what the receiver makes of it.

Pass A: the sender's output comes from the other run, every other head keeps the clean one, MLPs answer live or are frozen
too. With attention frozen nothing passes from column to column, so pass A runs on the patched columns alone. Pass B
(`_receivers.py`): only what the receivers read is taken from pass A, everything else is live, from the lowest receiver's layer on.

Letters: B pairs, N columns, P patched columns of a row, L layers, H query heads, D head dim, U senders in a batch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from headwise.attach import find_stack
from headwise.attach.projection import head_weights, output_projection
from headwise.errors import ScoreError
from headwise.modes import evaluating
from headwise.score._blocks import (
    Blocks,
    Kept,
    at_columns,
    constant,
    first,
    replaced,
    with_first,
    with_hidden,
)
from headwise.score._patching import Run, difference
from headwise.score._receivers import expert_blocks, receive_experts, receive_heads
from headwise.score._sweep import Sweep
from headwise.units import HeadSet

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from headwise.tasks.pairs import PromptPairs


@dataclass(frozen=True, eq=False)
class Wave:
    """What a batch of senders sends, on the patched columns: to watched modules `read`, layer -> the arguments of their call, hidden
    states (U · B, P, C) among them, or, where none is watched, `logits` (U · B, V) of each row's last token."""

    read: Mapping[int, tuple[tuple, dict]]
    logits: Tensor | None


class Paths:
    """Path patching of one batch of pairs at one set of columns: `one column a row`, or all real columns."""

    made_of: type[Sweep] = Sweep
    after_experts = 0  # layers above the senders' own from which experts read them

    def __init__(
        self,
        model: PreTrainedModel,
        pairs: PromptPairs,
        where: Tensor,
        *,
        freeze_mlps: bool = False,
        stack: str | None = None,
        rows: int = 64,
    ):
        self.model, self.pairs, self.where, self.stack, self.freeze = model, pairs, where, stack, freeze_mlps
        self.columns = chosen_columns(where, pairs.mask)
        self.proved = False  # that a layer's experts are a sum, before any of them receives
        with evaluating(model), torch.no_grad():
            self.found = find_stack(model, stack)
            self.blocks = Blocks(model, self.found, stack)
            self.kept = Kept(self.blocks)
            self.sweep = self.made_of(model, pairs, where, stack=stack, rows=rows, watch=self.kept)
            self.base = self.sweep.base
            self.other: Run = self.sweep.record(pairs, pairs.corrupt)

    def differences(self, receivers: HeadSet | None, through: str = "q", track: Callable[[Any], Any] = iter) -> Tensor:
        """LD (L, U, B) when each unit of each layer reaches the receivers alone, None for the logits."""
        units, after = range(self.sweep.units), []
        with evaluating(self.model), self.sweep.attached():
            for layer in track(range(self.found.layers)):
                if self.base.z[layer] is None:  # a layer without experts
                    after.append(self.base.difference.expand(len(units), -1))
                elif receivers is None:
                    after.append(self.to_logits(layer, units))
                else:
                    after.append(self.to_units(layer, units, receivers, through))
        return torch.stack(after)

    def delta(self, layer: int, heads: Sequence[int]) -> Tensor:
        """What the senders add to the residual at the patched columns: (z' − z) W_O^h, (U, B, P, C)."""
        weight = head_weights(output_projection(self.found, layer), self.found.heads)  # (H, D, C)
        z, other = self.base.z[layer], self.other.z[layer]
        moved = (other - z).flatten(2)  # (B, N, H·D)
        moved = at_columns(moved, self.columns).unflatten(-1, z.shape[2:])[:, :, list(heads)]
        real = self.where.gather(1, self.columns)[..., None, None]
        return torch.einsum("bpud,udc->ubpc", moved * real, weight[list(heads)].to(z))

    @torch.no_grad()
    def send(self, layer: int, heads: Sequence[int], watch: Mapping[int, nn.Module] | None = None) -> Wave:
        """Pass A of several senders of one layer, on the patched columns only; `watch`: modules that read, by layer."""
        U = len(heads)
        attentions, mlps = self.kept.attention, self.kept.mlp
        forwards: dict[nn.Module, Callable] = {}
        for l in range(layer, self.found.layers):
            frozen = at_columns(first(attentions[l]), self.columns, U)
            forwards[self.blocks.attentions[l]] = constant(with_first(attentions[l], frozen))
            if self.freeze:
                same = at_columns(first(mlps[l]), self.columns, U)
                forwards[self.blocks.mlps[l]] = constant(with_first(mlps[l], same))
        self._sending(forwards, layer, heads)
        start = at_columns(self.kept.entered[layer], self.columns, U)
        watch = watch or {}
        end = max(watch) + 1 if watch else self.found.layers
        for l in (*range(layer), *range(end, self.found.layers)):  # nobody looks at what these would do
            forwards[self.blocks.blocks[l]] = constant(with_first(self.kept.outputs[l], start))
        read: dict[int, tuple[tuple, dict]] = {}
        with ExitStack() as inside:
            inside.enter_context(replaced(forwards))
            for l, module in watch.items():
                handle = module.register_forward_pre_hook(_reader(read, l), with_kwargs=True)
                inside.callback(handle.remove)
            entry = self.blocks.blocks[layer].register_forward_pre_hook(_entry(start), with_kwargs=True)
            inside.callback(entry.remove)
            ids = self.pairs.ids.gather(1, self.columns).repeat(U, 1)
            if watch:
                self.found.owner(input_ids=ids, use_cache=False)
                return Wave(read, None)
            columns, at = self._last()
            out = self.model(input_ids=ids, use_cache=False, logits_to_keep=columns).logits
        return Wave({}, out[torch.arange(len(out), device=out.device), at.repeat(U)].float())

    def _sending(self, forwards: dict[nn.Module, Callable], layer: int, units: Sequence[int]) -> None:
        """Put what the senders add into the frozen outputs of their layer."""
        output = self.kept.attention[layer]
        sent = at_columns(first(output), self.columns, len(units)) + self.delta(layer, units).flatten(0, 1)
        forwards[self.blocks.attentions[layer]] = constant(with_first(output, sent))

    def _last(self) -> tuple[Tensor, Tensor]:
        """Places among the patched columns where the answer is read: the distinct ones, and which is each row's."""
        hit = self.columns == self.pairs.last[:, None]
        place = hit.float().argmax(1)  # where a row's last token is not patched its logits are not asked for
        return torch.unique(place, return_inverse=True)

    def to_logits(self, layer: int, heads: Sequence[int]) -> Tensor:
        """LD (U, B) when the senders' outputs reach the logits on the direct path only."""
        hit = (self.columns == self.pairs.last[:, None]) & self.where.gather(1, self.columns)
        if not bool(hit.any(1).all()):
            raise ScoreError(
                "logits are read at each row's last token, which tokens= does not select: nothing arrives there directly"
            )
        parts = []
        size = self.sweep.rows * self.pairs.ids.shape[1] // self.columns.numel()  # a row is only P columns long here
        for some in self._chunks(heads, max(1, size)):
            logits = self.send(layer, some).logits
            assert logits is not None
            parts.append(difference(logits, self.pairs, len(some)).view(len(some), -1))
        return torch.cat(parts)

    def _chunks(self, heads: Sequence[int], size: int) -> list[list[int]]:
        return [list(heads[at : at + size]) for at in range(0, len(heads), size)]

    @torch.no_grad()
    def to_units(self, layer: int, senders: Sequence[int], receivers: HeadSet, through: str) -> Tensor:
        """LD (U, B) when the senders reach the model only through q, k or v (`through`) of heads, or x or w of experts."""
        groups, experts = receivers.by_layer(), receivers.kind == "expert"
        first_behind = layer + (self.after_experts if experts else 1)
        behind = {l: groups[l] for l in sorted(groups) if l >= first_behind}
        if not behind:
            return self.base.difference.expand(len(senders), -1)
        modules = expert_blocks(self, behind) if experts else {l: self.blocks.attentions[l] for l in behind}
        receive, parts = receive_experts if experts else receive_heads, []
        for some in self._chunks(senders, self.sweep.size):
            wave = self.send(layer, some, modules)
            parts.append(receive(self, wave, behind, through, len(some)).view(len(some), -1))
        return torch.cat(parts)


def chosen_columns(where: Tensor, mask: Tensor) -> Tensor:
    """Columns (B, P) of the patched tokens: one a row, or all of them."""
    if bool((where.sum(1) == 1).all()):
        return where.float().argmax(1)[:, None]
    if torch.equal(where, mask.bool()):
        return torch.arange(where.shape[1], device=where.device).expand(len(where), -1)
    raise ScoreError(
        "path patching freezes the heads of one token a row, or of all: tokens='last', 'all', or one column a row"
    )


def _reader(into: dict[int, tuple[tuple, dict]], layer: int) -> Callable:
    def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
        into[layer] = args, kwargs

    return hook


def _entry(hidden: Tensor) -> Callable:
    def hook(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        return with_hidden(args, kwargs, hidden)

    return hook
