"""Path patching: what reaches a receiver from a sender on the direct path, and what the receiver makes of it.

Pass A: the sender's output comes from the other run, every other head keeps the clean one, MLPs answer live or are frozen
too. With attention frozen nothing passes from column to column, so pass A runs on the patched columns alone. Pass B: only what
the receivers read (q, k or v) is taken from pass A, everything else is live, from the lowest receiver's layer on.

Letters: B pairs, N columns, P patched columns of a row, L layers, H query heads, D head dim, U senders in a batch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from headwise.attach import HeadCall, find_stack
from headwise.attach.projection import head_weights, output_projection
from headwise.errors import ScoreError
from headwise.score._blocks import (
    Blocks,
    Kept,
    at_columns,
    constant,
    first,
    hidden_of,
    replaced,
    with_first,
    with_hidden,
)
from headwise.score._patching import Run, difference, quiet
from headwise.score._sweep import Sweep
from headwise.units import HeadSet

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from headwise.tasks.pairs import PromptPairs

COMPONENTS = ("q", "k", "v")
NO_CACHE = {"past_key_values": None}  # the projections of a layer are looked at; the cache is not to grow by them


@dataclass(frozen=True, eq=False)
class Wave:
    """What a batch of senders sends, on the patched columns: to watched attention modules `read`, layer -> (U · B, P, C), or, where
    none is watched, `logits` (U · B, V) of each row's last token."""

    read: Mapping[int, Tensor]
    logits: Tensor | None


class Paths:
    """Path patching of one batch of pairs at one set of columns: `one column a row`, or all real columns."""

    made_of: type[Sweep] = Sweep

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
        with quiet(model), torch.no_grad():
            self.found = find_stack(model, stack)
            self.blocks = Blocks(model, self.found, stack)
            self.kept = Kept(self.blocks)
            self.sweep = self.made_of(model, pairs, where, stack=stack, rows=rows, watch=self.kept)
            self.base = self.sweep.base
            self.other: Run = self.sweep.record(pairs, pairs.corrupt)

    def differences(self, receivers: HeadSet | None, through: str = "q", track: Callable[[Any], Any] = iter) -> Tensor:
        """LD (L, U, B) when each unit of each layer reaches the receivers alone, None for the logits."""
        units, after = range(self.sweep.units), []
        with quiet(self.model), self.sweep.attached():
            for layer in track(range(self.found.layers)):
                if self.base.z[layer] is None:  # a layer without experts
                    after.append(self.base.difference.expand(len(units), -1))
                elif receivers is None:
                    after.append(self.to_logits(layer, units))
                else:
                    after.append(self.to_heads(layer, units, receivers, through))
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
    def send(self, layer: int, heads: Sequence[int], watch: Sequence[int] = ()) -> Wave:
        """Pass A of several senders of one layer, on the patched columns only; `watch` lists the layers whose attention reads."""
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
        end = max(watch) + 1 if watch else self.found.layers
        for l in (*range(layer), *range(end, self.found.layers)):  # nobody looks at what these would do
            forwards[self.blocks.blocks[l]] = constant(with_first(self.kept.outputs[l], start))
        read: dict[int, Tensor] = {}
        with ExitStack() as inside:
            inside.enter_context(replaced(forwards))
            for l in watch:
                hook = _reader(read, l)
                handle = self.blocks.attentions[l].register_forward_pre_hook(hook, with_kwargs=True)
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
    def to_heads(self, layer: int, heads: Sequence[int], receivers: HeadSet, through: str) -> Tensor:
        """LD (U, B) when the senders reach the model only through q, k or v (`through`) of the receivers."""
        groups = receivers.by_layer()
        behind = [l for l in sorted(groups) if l > layer]
        if not behind:
            return self.base.difference.expand(len(heads), -1)
        parts = []
        for some in self._chunks(heads, self.sweep.size):
            wave = self.send(layer, some, behind)
            parts.append(self._receive(wave, {l: groups[l] for l in behind}, through, len(some)).view(len(some), -1))
        return torch.cat(parts)

    def _receive(self, wave: Wave, groups: Mapping[int, Sequence[int]], through: str, copies: int) -> Tensor:
        """Pass B: LD (U · B,) with the receivers' q, k or v computed from what they read in pass A."""
        change = Receive(groups, through, self.where[:, self.sweep.start :].repeat(copies, 1))
        with ExitStack() as inside:
            for l in groups:
                hook = self._project(wave.read[l], change, copies)
                handle = self.blocks.attentions[l].register_forward_pre_hook(hook, with_kwargs=True)
                inside.callback(handle.remove)
            return self.sweep.run(min(groups), change, copies)

    def _project(self, read: Tensor, change: Receive, copies: int) -> Callable:
        """Before a receiving layer runs, run it once on what pass A read, only to see the q, k, v that it makes."""
        columns = (self.columns - self.sweep.start).repeat(copies, 1)

        def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
            if change.capturing:
                return
            hidden = hidden_of(args, kwargs)
            sent = hidden.scatter(1, columns[..., None].expand(-1, -1, hidden.shape[-1]), read.to(hidden.dtype))
            args, kwargs = with_hidden(args, kwargs | NO_CACHE, sent)
            change.capturing = True
            try:
                module(*args, **kwargs)
            finally:
                change.capturing = False

        return hook


class Receive:
    """The transform of pass B: at the receivers, q, k or v of the patched columns are those that pass A makes."""

    def __init__(self, groups: Mapping[int, Sequence[int]], through: str, where: Tensor):
        checked_through(through)
        self.groups, self.through, self.where = groups, through, where[:, None, :, None]
        self.capturing = False
        self.seen: dict[int, dict[str, Tensor]] = {}

    def __call__(self, call: HeadCall, attend: Callable[[], Tensor]) -> Tensor:
        if call.layer not in self.groups:
            return attend()
        if self.capturing:
            self.seen[call.layer] = {name: getattr(call, name) for name in self.through}
            B, H, N = call.q.shape[:3]
            return call.v.new_zeros(B, N, H, call.v.shape[-1])
        sent = self.seen.pop(call.layer)
        changed = {name: self._mixed(getattr(call, name), sent[name]) for name in self.through}
        out = attend().clone()
        mine = list(self.groups[call.layer])
        group = call.q.shape[1] // call.k.shape[1]
        kv_heads = sorted({h // group for h in mine})
        theirs = with_parts(call, changed).attend(kv_heads=kv_heads)
        places = [kv_heads.index(h // group) * group + h % group for h in mine]
        out[:, :, mine] = theirs[:, :, places]
        return out

    def _mixed(self, own: Tensor, sent: Tensor) -> Tensor:
        """Own q, k or v, with those of the patched columns from pass A; keys of a prefix stand before the columns."""
        before = own.shape[2] - sent.shape[2]
        mixed = torch.where(self.where, sent, own[:, :, before:])
        return torch.cat([own[:, :, :before], mixed], 2) if before else mixed


def with_parts(call: HeadCall, parts: Mapping[str, Tensor]) -> HeadCall:
    """A call with other queries, keys or values, by the names q, k, v."""
    q, k, v = (parts.get(name, getattr(call, name)) for name in COMPONENTS)
    return replace(call, q=q, k=k, v=v)


def chosen_columns(where: Tensor, mask: Tensor) -> Tensor:
    """Columns (B, P) of the patched tokens: one a row, or all of them."""
    if bool((where.sum(1) == 1).all()):
        return where.float().argmax(1)[:, None]
    if torch.equal(where, mask.bool()):
        return torch.arange(where.shape[1], device=where.device).expand(len(where), -1)
    raise ScoreError(
        "path patching freezes the heads of one token a row, or of all: tokens='last', 'all', or one column a row"
    )


def _reader(into: dict[int, Tensor], layer: int) -> Callable:
    def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
        into[layer] = hidden_of(args, kwargs)

    return hook


def _entry(hidden: Tensor) -> Callable:
    def hook(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        return with_hidden(args, kwargs, hidden)

    return hook


def checked_receivers(receivers: HeadSet | None, fingerprint: Any, name: str = "receivers") -> HeadSet | None:
    """Receivers that the model has; None stands for the logits."""
    if receivers is not None:
        receivers.check(fingerprint)
        if not len(receivers):
            raise ScoreError(f"{name} is empty; name heads, or leave out receivers= for the logits")
    return receivers


def checked_through(through: str) -> str:
    """Some of the letters q, k, v."""
    if not isinstance(through, str) or not through or set(through) - set(COMPONENTS):
        raise ScoreError(f"through={through!r}; write some of the letters {', '.join(COMPONENTS)}")
    return through
