"""Apply edits to per-head outputs, (1 - s) O + s T, in the exact forms that need no attention matrix.

Partial sums over groups of keys come from running the same attention with other values: sum_j A_ij w_j v_j is the
attention over the values w_j v_j, and the mass of a group is the attention over values 1. So every backend serves.

Letters: B batch, N queries, H query heads, U heads of one edit, K kv heads, D head dim.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from headwise.edits import Edit, HeadEdits
from headwise.errors import AttachError, EditError
from headwise.selection import TokenSelection

if TYPE_CHECKING:
    from headwise.attach.hook import HeadCall
    from headwise.attach.locate import Stack
    from headwise.attach.site import Site


@dataclass(frozen=True)
class Applied:
    """The part of an edit that concerns one layer on this rank."""

    edit: Edit
    heads: tuple[int, ...]  # local numbers of the query heads
    rows: tuple[int, ...]  # their places in the edit's tensor
    group_size: int
    first: bool  # no earlier edit touches these heads

    @property
    def kv_heads(self) -> list[int]:
        """Local kv heads that these heads read, ascending."""
        return sorted({h // self.group_size for h in self.heads})

    @property
    def counts(self) -> bool:
        """Is the edit one of outputs alone, the same at every token?"""
        return self.edit.op in ("zero", "scale", "replace", "mix_vector", "mix_v") and self.edit.tokens.kind == "all"

    def places(self) -> list[int]:
        """Where the heads stand among the query heads of `kv_heads`."""
        at = {kv: i for i, kv in enumerate(self.kv_heads)}
        return [at[h // self.group_size] * self.group_size + h % self.group_size for h in self.heads]

    def concerns(self, call: HeadCall) -> bool:
        """Is this the edit's phase?"""
        return self.edit.phase == "all" or (self.edit.phase == "decode") == call.decoding

    def by_query(self, call: HeadCall) -> bool:
        """A uniform head is a head whose query is 0; no second attention is needed where nothing else comes before."""
        alone = self.first and call.site.router is None and not call.site.transforms
        return self.edit.op == "uniform" and alone and set(self.edit.strengths().tolist()) == {1.0}


def localize(edits: HeadEdits, site: Site, stack: Stack) -> Iterable[Applied]:
    """The edits of one layer, with global head numbers turned into those of this rank."""
    size = stack.heads // stack.kv_heads
    local = site.kv_heads * size
    touched: set[int] = {h for a in site.edits for h in a.heads} if site.edits else set()
    for edit in edits.for_layer(site.layer):
        numbers = [unit.index - site.first_head for unit in edit.units]
        rows = tuple(i for i, h in enumerate(numbers) if 0 <= h < local)
        heads = tuple(numbers[i] for i in rows)
        if heads:
            yield Applied(edit, heads, rows, size, first=not touched & set(heads))
            touched |= set(heads)


def apply_query_edits(edits: tuple[Applied, ...], call: HeadCall) -> Tensor:
    """Queries (B, H, N, D) with those of uniform heads set to 0."""
    q = call.q
    for applied in edits:
        if applied.by_query(call) and applied.concerns(call):
            _need_plain_softmax(call, applied.edit)
            chosen = q[:, list(applied.heads)]
            mask = token_mask(applied.edit.tokens, call)
            empty = torch.zeros_like(chosen) if mask is None else chosen.masked_fill(mask[:, None, :, None], 0.0)
            q = q.index_copy(1, torch.tensor(applied.heads, device=q.device), empty)
    return q


def apply_output_edits(edits: tuple[Applied, ...], call: HeadCall, out: Tensor) -> Tensor:
    """Outputs (B, N, H, D) after all edits of this layer, in order."""
    for applied in edits:
        if applied.concerns(call) and not applied.by_query(call):
            out = _apply(applied, call, out)
    return out


def _apply(applied: Applied, call: HeadCall, out: Tensor) -> Tensor:
    old = out[:, :, list(applied.heads)]  # (B, N, U, D)
    target = TARGETS[applied.edit.op](applied, call, old)
    s = applied.edit.strengths()[list(applied.rows)].to(device=out.device, dtype=out.dtype)[:, None]
    new = torch.where(s == 1, target, (1 - s) * old + s * target)
    mask = token_mask(applied.edit.tokens, call)
    if mask is not None:
        new = torch.where(mask[:, :, None, None], new, old)
    return out.index_copy(2, torch.tensor(applied.heads, device=out.device), new.to(out.dtype))


def token_mask(tokens: TokenSelection, call: HeadCall) -> Tensor | None:
    """Which query tokens are selected, (1 or B, N) bool; None for all of them."""
    if tokens.kind == "all":
        return None
    positions = _real_positions(call)
    return tokens.mask(positions, last=positions.max(dim=1, keepdim=True).values)


def _real_positions(call: HeadCall) -> Tensor:
    positions, real = call.positions(), call.real_tokens()
    return positions if real is None else positions.masked_fill(~real, -1)


def _need_plain_softmax(call: HeadCall, edit: Edit) -> None:
    used = [name for name in ("s_aux", "position_bias") if call.options.get(name) is not None]
    if used:
        raise AttachError(
            f"layer {call.layer}: {edit.op!r} needs a plain softmax, but the model passes {used} to its attention"
        )


def _zero(applied: Applied, call: HeadCall, old: Tensor) -> Tensor:
    return torch.zeros_like(old)


def _scale(applied: Applied, call: HeadCall, old: Tensor) -> Tensor:
    return old * float(applied.edit.value)  # type: ignore[arg-type]


def _vector(applied: Applied, call: HeadCall, old: Tensor) -> Tensor:
    tensor = applied.edit.tensor
    assert tensor is not None
    if tensor.shape[-1] != old.shape[-1]:
        raise EditError(
            f"layer {call.layer}: vectors of {applied.edit.units} have {tensor.shape[-1]} entries, heads have {old.shape[-1]}"
        )
    return tensor[list(applied.rows)].to(old).expand_as(old)


def _patch(applied: Applied, call: HeadCall, old: Tensor) -> Tensor:
    tensor = applied.edit.tensor
    assert tensor is not None
    other = tensor[list(applied.rows)].movedim(0, 2)  # (B, N, U, D)
    if other.shape != old.shape:
        raise EditError(
            f"layer {call.layer}: patch of {applied.edit.units} is (B, N, U, D) = {tuple(other.shape)}, this run has {tuple(old.shape)}"
        )
    return other.to(old)


def _own_value(applied: Applied, call: HeadCall, old: Tensor) -> Tensor:
    if call.k.shape[2] < call.q.shape[2] or not hasattr(call.module, "layer_idx") and not call.causal and call.past:
        raise AttachError(f"layer {call.layer}: mix_v needs self-attention; these queries have no keys of their own")
    values = call.own_values[:, [h // applied.group_size for h in applied.heads]].transpose(1, 2)
    if values.shape != old.shape:
        raise AttachError(
            f"layer {call.layer}: values {tuple(values.shape)} and head outputs {tuple(old.shape)} differ in shape"
        )
    return values


def _uniform(applied: Applied, call: HeadCall, old: Tensor) -> Tensor:
    _need_plain_softmax(call, applied.edit)
    return call.attend(torch.zeros_like(call.q), kv_heads=applied.kv_heads)[:, :, applied.places()]


def _reweight(applied: Applied, call: HeadCall, old: Tensor) -> Tensor:
    last = _real_positions(call).max(dim=1).values[:, None, None]
    groups = applied.edit.keys

    def weight(positions: Tensor) -> Tensor:
        factor = torch.ones_like(positions, dtype=torch.float32)
        for group in reversed(groups):  # a key in two groups belongs to the first
            factor = factor.masked_fill(group.tokens.mask(positions, last=last), group.weight)
        return factor

    total = _partial(applied, call, weight)
    if not applied.edit.renormalize:
        return total
    mass = _partial(applied, call, weight, ones=True)
    return torch.where(mass > 0, total / mass.clamp(min=torch.finfo(mass.dtype).tiny), torch.zeros_like(total))


def _move(applied: Applied, call: HeadCall, old: Tensor) -> Tensor:
    last = _real_positions(call).max(dim=1).values[:, None, None]
    source = applied.edit.keys[0].tokens
    target = applied.edit.keys[1].tokens if len(applied.edit.keys) > 1 else None

    def from_keys(positions: Tensor) -> Tensor:
        return source.mask(positions, last=last)

    def to_keys(positions: Tensor) -> Tensor:
        chosen = ~from_keys(positions)
        return chosen if target is None else chosen & target.mask(positions, last=last)

    o_s, p_s = _partial(applied, call, from_keys), _partial(applied, call, from_keys, ones=True)
    o_n, p_n = _partial(applied, call, to_keys), _partial(applied, call, to_keys, ones=True)
    moved = old - o_s + p_s / p_n.clamp(min=torch.finfo(p_n.dtype).tiny) * o_n
    return torch.where(p_n > 0, moved, old)


def _partial(applied: Applied, call: HeadCall, weight: Callable[[Tensor], Tensor], ones: bool = False) -> Tensor:
    _need_no_dropout(call)
    if call.site.transforms:
        raise AttachError(
            f"layer {call.layer}: {applied.edit.op!r} moves weights of the layer's own attention, but a transform has put something "
            "else in its place; detach one of them"
        )
    return call.attend(key_weight=weight, ones=ones, kv_heads=applied.kv_heads)[:, :, applied.places()]


def _need_no_dropout(call: HeadCall) -> None:
    if call.options.get("dropout"):
        raise AttachError(
            "key groups are re-weighted from several attention calls, which dropout would make disagree: call model.eval()"
        )


TARGETS: dict[str, Callable[[Applied, HeadCall, Tensor], Tensor]] = {
    "zero": _zero,
    "scale": _scale,
    "uniform": _uniform,
    "mix_uniform": _uniform,
    "replace": _vector,
    "mix_vector": _vector,
    "mix_v": _own_value,
    "patch": _patch,
    "reweight": _reweight,
    "move": _move,
}
