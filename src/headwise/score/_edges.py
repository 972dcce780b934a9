"""Path patching from every sender to every receiver, one receiver at a time: the weighted edges of a circuit.

What a receiver reads decides its output alone, so all receivers of a layer are computed in one attention call; then each output is
put into a resumed pass of its own, senders and receivers folded into the batch.

Letters: B pairs, N columns, H query heads, D head dim, U senders in a batch, R receivers of a layer, S senders in all.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from headwise.attach import HeadCall
from headwise.score._paths import Paths, Wave
from headwise.score._receivers import Receive, project, with_parts


class _Caught(Exception):  # noqa: N818 - no error: the pass has shown what it was made for
    pass


class Catch(Receive):
    """The transform of a pass that ends at one layer: `outputs` are those of all heads, each alone reading what was sent to it."""

    outputs: Tensor  # (U · B, N, H, D)

    def __call__(self, call: HeadCall, attend: Callable[[], Tensor]) -> Tensor:
        if self.capturing or call.layer not in self.groups:
            return super().__call__(call, attend)
        sent = self.seen.pop(call.layer)
        changed = {name: self._mixed(getattr(call, name), sent[name]) for name in self.through}
        self.outputs = with_parts(call, changed).attend()
        raise _Caught


@torch.no_grad()
def received(paths: Paths, wave: Wave, layer: int, through: str, copies: int) -> Tensor:
    """Outputs (U, B, N, H, D) of all heads of a layer, each as it would be if only it read what pass A brought there."""
    where = paths.where[:, paths.sweep.start :].repeat(copies, 1)
    change = Catch({layer: range(paths.found.heads)}, through, where)
    hook = project(paths, wave.read[layer], change, copies)
    handle = paths.blocks.attentions[layer].register_forward_pre_hook(hook, with_kwargs=True)
    try:
        with suppress(_Caught):  # the pass ends where the outputs are
            paths.sweep.run(layer, change, copies)
    finally:
        handle.remove()
    return change.outputs.unflatten(0, (copies, len(paths.pairs)))


@torch.no_grad()
def to_each(
    paths: Paths, layer: int, senders: Sequence[int], receivers: Mapping[int, Sequence[int]], through: str
) -> Tensor:
    """LD (U, R, B) of each sender of a layer to each receiver, layer by layer in the order of `receivers`; alone, on the direct path."""
    parts = []
    for some in paths._chunks(senders, paths.sweep.size):
        behind = [l for l in receivers if l > layer]
        wave = paths.send(layer, some, {l: paths.blocks.attentions[l] for l in behind}) if behind else None
        columns = []
        for l, heads in receivers.items():
            if wave is None or l <= layer:  # nothing flows back
                columns.append(paths.base.difference.expand(len(some), len(heads), -1))
                continue
            values = received(paths, wave, l, through, len(some))[:, :, :, list(heads)]  # (U, B, N, R, D)
            flat = values.permute(0, 3, 1, 2, 4).flatten(0, 1)  # (U · R, B, N, D)
            ld = paths.sweep.each(l, list(heads) * len(some), flat)
            columns.append(ld.unflatten(0, (len(some), len(heads))))
        parts.append(torch.cat(columns, 1))
    return torch.cat(parts)


def edges(
    paths: Paths,
    senders: Mapping[int, Sequence[int]],
    receivers: Mapping[int, Sequence[int]],
    through: str,
    track: Callable[[Any], Any] = iter,
) -> Tensor:
    """LD (S, R, B) of all senders to all receivers, in the order of their layers."""
    with paths.sweep.attached():
        return torch.cat([to_each(paths, l, senders[l], receivers, through) for l in track(sorted(senders))])
