"""Sweeps over all heads, or all experts, of a model: some pairs at a time, so that `rows` bounds what is kept and what is folded.

Letters: B pairs, N columns, L layers, U units of a layer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor

from headwise.attach import find_stack
from headwise.attach.experts import find_experts
from headwise.checks import whole
from headwise.errors import ScoreError
from headwise.score._expert_sweep import ExpertSweep, record_parts
from headwise.score._patching import Run, record
from headwise.score._sweep import Sweep

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from headwise.tasks.pairs import PromptPairs

PatchUnit = Literal["head", "expert"]


@dataclass(frozen=True, eq=False)
class Swept:
    """Logit differences of a sweep: `after` (L, U, B), `base` (B,) of the unchanged run, `other` (B,) of the one that lends outputs."""

    after: Tensor
    base: Tensor
    other: Tensor


def units_of(model: PreTrainedModel, unit: str) -> int:
    """Heads or experts of a layer. Raises ScoreError for another kind of unit, AttachError for experts of a dense model."""
    if unit not in get_args(PatchUnit):
        raise ScoreError(f"unit={unit!r}; choose {', '.join(get_args(PatchUnit))}")
    return find_stack(model).heads if unit == "head" else find_experts(model).experts


def chunks(count: int, units: int, rows: int) -> list[slice]:
    """`count` pairs, as many at a time as leave room for all units of a layer in a batch of `rows`."""
    size = max(1, whole("rows", rows, 1, ScoreError) // units)
    return [slice(at, min(at + size, count)) for at in range(0, count, size)]


def sweep_all(
    model: PreTrainedModel,
    unit: str,
    pairs: PromptPairs,
    where: Tensor,
    other: Callable[[Sweep, slice], Run],
    *,
    rows: int,
    track: Callable[[Any], Any] = iter,
) -> Swept:
    """Every unit of every layer replaced once by what `other` gives in its place."""
    found: list[tuple[Tensor, Tensor, Tensor]] = []
    parts = chunks(len(pairs), units_of(model, unit), rows)
    make, several = Sweep if unit == "head" else ExpertSweep, len(parts) > 1
    for part in track(parts) if several else parts:
        sweep = make(model, pairs[part], where[part], rows=rows)
        run = other(sweep, part)
        after = sweep.all_units(run.z.__getitem__, iter if several else track)
        found.append((after, sweep.base.difference, run.difference))
    return Swept(*(torch.cat(tables, -1) for tables in zip(*found, strict=True)))


@torch.no_grad()
def mean_outputs(model: PreTrainedModel, unit: str, pairs: PromptPairs, rows: int) -> Tensor:
    """Mean output of every unit over the real tokens of all prompts: (L, H, D) of heads, (L, E, C) of experts, float32.

    An expert adds nothing to a token that did not choose it, and that counts.
    """
    totals = [_sums(model, unit, pairs[part]) for part in chunks(len(pairs), units_of(model, unit), rows)]
    return torch.stack(totals).sum(0) / pairs.mask.sum()


def _sums(model: PreTrainedModel, unit: str, pairs: PromptPairs) -> Tensor:
    """Sum of every unit's outputs over the real tokens, (L, U, D or C)."""
    if unit == "head":
        real = pairs.mask[..., None, None]
        return torch.stack([(z * real).float().sum((0, 1)) for z in record(model, pairs, pairs.ids).z])
    stack = find_experts(model)
    parts = record_parts(model, stack, pairs).z
    width = next(part for part in parts if part is not None).total.shape[-1]
    none = torch.zeros(stack.experts, width, device=pairs.ids.device)
    return torch.stack([none if part is None else part.sums(stack.experts, pairs.mask) for part in parts])
