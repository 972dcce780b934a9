"""One call of a layer's experts, and what expert edits make of it.

Letters: B rows, N columns, T = B·N tokens, C width, E experts, k chosen a token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from headwise.attach.gates import GateRule, infer_rule
from headwise.errors import AttachError, EditError
from headwise.expert_edits import ExpertEdit


@dataclass
class ExpertCall:
    """One call of a layer's experts: hidden (T, C), logits (T, E), index and weight (T, k), positions (B, N), -1 = padding."""

    layer: int
    hidden: Tensor
    logits: Tensor | None
    index: Tensor
    weight: Tensor
    positions: Tensor
    decoding: bool
    fresh_rows: bool
    router: nn.Module
    original: tuple[Tensor, Tensor] = field(repr=False)  # index and weight as the router gave them

    def rule(self) -> tuple[GateRule, Tensor | None]:
        """The router's rule and bias, inferred from what it declares and proved by what it chose for these tokens."""
        if self.logits is None:
            raise AttachError(f"layer {self.layer}: {type(self.router).__name__} gave no logits of all experts")
        found = infer_rule(self.logits, self.original[1], self.original[0], self.router)
        if found is None:
            raise AttachError(
                f"layer {self.layer}: the rule of {type(self.router).__name__} is none that headwise knows, so its choice "
                "cannot be made again; 'off' and 'scale' and recording without probs still work"
            )
        return found

    def probs(self) -> Tensor:
        """(T, E) the router's distribution over experts."""
        rule, _ = self.rule()
        assert self.logits is not None
        return rule.probs(self.logits)


def touched(edit: ExpertEdit, call: ExpertCall) -> Tensor:
    """(T, 1) bool: which tokens of this call the edit concerns."""
    positions = call.positions
    if edit.phase != "all" and (edit.phase == "decode") != call.decoding:
        return torch.zeros(positions.numel(), 1, dtype=torch.bool, device=positions.device)
    mask = edit.tokens.mask(positions, positions.max(dim=1, keepdim=True).values)
    if edit.rows is not None:
        if edit.rows[-1:] and edit.rows[-1] >= len(positions):
            raise EditError(f"an edit names row {edit.rows[-1]}, the batch has rows 0 to {len(positions) - 1}")
        rows = torch.zeros(len(positions), 1, dtype=torch.bool, device=positions.device)
        rows[list(edit.rows)] = True
        mask = mask & rows
    return mask.reshape(-1, 1)


def apply_edits(call: ExpertCall, edits: Sequence[tuple[ExpertEdit, list[int]]]) -> ExpertCall:
    """The call with its routing edited; tokens that no edit concerns keep the model's own numbers, bit for bit."""
    choice = [(edit, experts) for edit, experts in edits if edit.op in ("ban", "force", "favour")]
    if choice:
        call = _choose_again(call, choice)
    off = [(edit, experts) for edit, experts in edits if edit.op == "off"]
    if off:
        call = _without(call, off)
    for edit, experts in edits:
        if edit.op == "scale":
            factors = _table(call, edit, experts, 1.0, lambda value, w: 1 + w * (value - 1))
            scaled = call.weight * factors[call.index].to(call.weight.dtype)
            call = replace(call, weight=torch.where(touched(edit, call), scaled, call.weight))
    return call


def _choose_again(call: ExpertCall, edits: list[tuple[ExpertEdit, list[int]]]) -> ExpertCall:
    rule, bias = call.rule()
    logits = call.logits
    assert logits is not None
    some = torch.zeros(len(logits), 1, dtype=torch.bool, device=logits.device)
    banned, forced = torch.zeros_like(logits, dtype=torch.bool), torch.zeros_like(logits, dtype=torch.bool)
    wanted = torch.zeros_like(logits, dtype=torch.float32) if bias is None else bias.float().expand_as(logits).clone()
    floor = torch.full_like(logits, -torch.inf, dtype=torch.float32)
    for edit, experts in edits:
        where = touched(edit, call)
        mine = torch.zeros(logits.shape[-1], dtype=torch.bool, device=logits.device)
        mine[experts] = True
        some = some | where
        if edit.op == "ban":
            banned |= where & mine
        elif edit.op == "force":
            forced |= where & mine
            floor = torch.where(where & mine, -torch.inf if edit.value is None else edit.value, floor)
        else:
            wanted += where * _table(call, edit, experts, 0.0, lambda value, w: w * value)
    _check_choice(call, rule, banned, forced)
    weight, index = rule.choose(logits, wanted, banned=banned, forced=forced, floor=floor)
    index = torch.where(some, index.to(call.index.dtype), call.index)
    return replace(call, index=index, weight=torch.where(some, weight.to(call.weight.dtype), call.weight))


def _check_choice(call: ExpertCall, rule: GateRule, banned: Tensor, forced: Tensor) -> None:
    if bool((forced & banned).any()):
        raise EditError(f"layer {call.layer}: an expert is both banned and forced on for the same token")
    if int(forced.sum(-1).max()) > rule.k:
        raise EditError(f"layer {call.layer}: {int(forced.sum(-1).max())} experts are forced on, a token has {rule.k}")
    if int((~banned).sum(-1).min()) < rule.k:
        raise EditError(f"layer {call.layer}: {int((~banned).sum(-1).min())} experts are left, a token needs {rule.k}")


def _without(call: ExpertCall, edits: list[tuple[ExpertEdit, list[int]]]) -> ExpertCall:
    """Take the weight of experts away and give it to the others; their slots point to an expert that runs, weight 0."""
    off = torch.zeros(len(call.index), _experts(call), dtype=torch.bool, device=call.index.device)  # (T, E)
    for edit, experts in edits:
        off[:, experts] |= touched(edit, call)
    gone = off.gather(-1, call.index)
    kept = call.weight.masked_fill(gone, 0.0)
    before, after = call.weight.sum(-1, keepdim=True), kept.sum(-1, keepdim=True)
    ratio = torch.where(after == 0, torch.zeros_like(after), before / torch.where(after == 0, 1.0, after))
    weight = torch.where(gone.any(-1, keepdim=True), kept * ratio, call.weight)
    best = call.index.gather(-1, (~gone).to(torch.uint8).argmax(-1, keepdim=True))
    runs = (~off).to(torch.uint8).argmax(-1, keepdim=True).to(best.dtype)  # for tokens that lost all their experts
    stand_in = torch.where(gone.all(-1, keepdim=True), runs, best)
    return replace(call, weight=weight, index=torch.where(gone, stand_in, call.index))


def _experts(call: ExpertCall) -> int:
    if call.logits is not None:
        return call.logits.shape[-1]
    raise AttachError(f"layer {call.layer}: {type(call.router).__name__} gave no logits of all experts")


def _table(
    call: ExpertCall, edit: ExpertEdit, experts: list[int], fill: float, f: Callable[[float, float], float]
) -> Tensor:
    """(E,) float32: `f(value, weight of the unit)` for the experts of the edit, `fill` for the others."""
    table = torch.full((_experts(call),), fill)
    assert edit.value is not None
    for unit, weight in zip(edit.units, edit.units.weights(), strict=True):
        if unit.layer == call.layer:
            table[unit.index] = f(edit.value, weight)
    return table.to(call.index.device)
