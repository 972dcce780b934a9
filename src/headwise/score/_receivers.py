"""Pass B of path patching: what receivers read is what pass A brought them, everything else is live.

A head receives through its q, k or v; keys and values are those of one query head, unless its whole group is named. A
routed expert receives through x, the hidden states that it computes on, or w, the weight with which its router chose it.

Letters: B pairs, N columns, P patched columns of a row, U senders in a batch, T tokens, k choices of a token, C width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from headwise.arguments import with_cache
from headwise.attach import HeadCall, fingerprint
from headwise.attach.expert_stack import ExpertLayer, find_experts
from headwise.errors import AttachError, ScoreError
from headwise.score._blocks import hidden_of, with_hidden
from headwise.score._expert_sweep import each_choice, record_parts
from headwise.units import HeadSet

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from headwise.score._paths import Paths, Wave

COMPONENTS = ("q", "k", "v")
LETTERS = {"head": "qkv", "kv": "kv", "expert": "xw"}


def receive_heads(paths: Paths, wave: Wave, groups: Mapping[int, Sequence[int]], through: str, copies: int) -> Tensor:
    """LD (U · B,) with the receiving heads' q, k or v computed from what they read in pass A."""
    change = Receive(groups, through, paths.where[:, paths.sweep.start :].repeat(copies, 1))
    with ExitStack() as inside:
        for l in groups:
            hook = project(paths, wave.read[l], change, copies)
            handle = paths.blocks.attentions[l].register_forward_pre_hook(hook, with_kwargs=True)
            inside.callback(handle.remove)
        return paths.sweep.run(min(groups), change, copies)


def project(paths: Paths, read: tuple[tuple, dict], change: Receive, copies: int) -> Callable:
    """Before a receiving layer runs, run it once on what pass A read, only to see the q, k, v that it makes."""
    columns, arrived = (paths.columns - paths.sweep.start).repeat(copies, 1), hidden_of(*read)

    def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
        if change.capturing:
            return
        hidden = hidden_of(args, kwargs)
        sent = hidden.scatter(1, columns[..., None].expand(-1, -1, hidden.shape[-1]), arrived.to(hidden.dtype))
        # the projections are looked at; the cache is not to grow by them
        args, kwargs = with_cache(module, *with_hidden(args, kwargs, sent), None)
        change.capturing = True
        try:
            module(*args, **kwargs)
        finally:
            change.capturing = False

    return hook


class Receive:
    """The transform of pass B: at the receivers, q, k or v of the patched columns are those that pass A makes."""

    def __init__(self, groups: Mapping[int, Sequence[int]], through: str, where: Tensor):
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


# experts


def expert_blocks(paths: Paths, groups: Mapping[int, Sequence[int]]) -> dict[int, nn.Module]:
    """The module of each receiving layer that holds router and experts, proved to give the sum of its experts' parts."""
    stack = find_experts(paths.model)
    if not paths.proved:
        record_parts(paths.model, stack, paths.pairs)
        paths.proved = True
    return {one.layer: one.block for one in stack.layers if one.layer in groups}


@torch.no_grad()
def receive_experts(paths: Paths, wave: Wave, groups: Mapping[int, Sequence[int]], through: str, copies: int) -> Tensor:
    """LD (U · B,) with the receiving experts computing on (x), or chosen by (w), what pass A brought to their layer."""
    layers = {one.layer: one for one in find_experts(paths.model).layers}
    calls = {l: _call(layers[l], wave.read.get(l)) for l in groups}
    with ExitStack() as inside:
        for l, experts in groups.items():
            hook = _added(paths, calls[l], experts, through, copies)
            handle = layers[l].experts.register_forward_hook(hook, with_kwargs=True)
            inside.callback(handle.remove)
        return paths.sweep.run(min(groups), None, copies)


def _call(layer: ExpertLayer, read: tuple[tuple, dict] | None) -> tuple[Tensor, Tensor, Tensor]:
    """(hidden, index, weight) that a layer's experts are given when router and experts read what pass A brought."""
    seen: list[tuple[Tensor, Tensor, Tensor]] = []
    handle = layer.experts.register_forward_pre_hook(_keep(seen), with_kwargs=True)
    try:
        if read is not None:
            layer.block(*read[0], **read[1])
    finally:
        handle.remove()
    if len(seen) != 1:
        raise AttachError(
            f"layer {layer.layer}: {type(layer.block).__name__} does not hand what it reads to its router and experts once a pass; "
            "these experts cannot receive"
        )
    return seen[0]


def _keep(into: list) -> Callable:
    def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
        into.append(tuple([*args, *kwargs.values()][:3]))

    return hook


def _added(
    paths: Paths, sent: tuple[Tensor, Tensor, Tensor], experts: Sequence[int], through: str, copies: int
) -> Callable:
    """Behind the experts of a layer: their sum, with the parts of the receivers at the patched columns computed anew."""
    columns, real = paths.columns - paths.sweep.start, paths.where.gather(1, paths.columns)
    width = paths.pairs.ids.shape[1] - paths.sweep.start
    rows = torch.arange(len(columns) * copies, device=columns.device)[:, None]
    at, real = (rows * width + columns.repeat(copies, 1)).flatten(), real.repeat(copies, 1).flatten()

    def hook(module: nn.Module, args: tuple, kwargs: dict, output: Tensor) -> Tensor:
        x, index, weight = (part[at] for part in [*args, *kwargs.values()][:3])
        own = _part(module, x, index, weight, experts)
        if "x" in through:
            x = sent[0]
        if "w" in through:
            index, weight = sent[1:]
        moved = _part(module, x, index, weight, experts) - own
        return output.index_add(0, at, (moved * real[:, None]).to(output.dtype))

    return hook


def _part(module: Any, hidden: Tensor, index: Tensor, weight: Tensor, experts: Sequence[int]) -> Tensor:
    """What some experts add to each token together, (T, C); the module's hooks do not see it."""
    mine = torch.isin(index, torch.tensor(list(experts), device=index.device))
    choices = each_choice(module.forward, hidden, index, weight)
    return torch.where(mine[..., None], choices, torch.zeros((), dtype=choices.dtype, device=choices.device)).sum(1)


# what is asked for


def checked_receivers(receivers: HeadSet | None, model: PreTrainedModel, name: str = "receivers") -> HeadSet | None:
    """Receivers that the model has, kv heads as the query heads that read them; None stands for the logits."""
    if receivers is None:
        return None
    made_for = fingerprint(model)
    receivers.check(made_for)
    if not len(receivers):
        raise ScoreError(f"{name} is empty; name heads, or leave out receivers= for the logits")
    if receivers.kind == "expert":
        stack = find_experts(model)
        for unit in receivers:
            stack.weights(unit)  # raises for a dense layer
    return receivers.to_heads(made_for.heads // made_for.kv_heads) if receivers.kind == "kv" else receivers


def checked_through(through: str, kind: str = "head") -> str:
    """Some of the letters q, k, v for heads, k, v for kv heads, x, w for experts."""
    letters = LETTERS[kind]
    if not isinstance(through, str) or not through or set(through) - set(letters):
        means = " (x: the hidden states it computes on, w: its weight)" if kind == "expert" else ""
        raise ScoreError(
            f"through={through!r}; receivers of kind {kind!r} take the letters {', '.join(letters)}{means}"
        )
    return through
