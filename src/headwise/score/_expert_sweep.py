"""Experts as units of patching: what each routed expert adds to its layer, and runs in which one adds something else.

An experts module gives sum_j w_j f_{e_j}(x) for the k choices of a token. Called with one choice at a time it gives the summands, so
an expert's part c_e is their sum where e_j = e, and 0 for tokens that chose others. The router and the other experts of the
layer keep what they gave; everything behind the layer is live, routing included.

Letters: B pairs, N columns, T = B·N tokens, k choices of a token, E experts, U experts folded into the batch, C width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from headwise.attach.expert_stack import ExpertStack, find_experts
from headwise.errors import AttachError
from headwise.score._blocks import constant
from headwise.score._patching import Run, answer
from headwise.score._sweep import Sweep
from headwise.tasks.pairs import PromptPairs

TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-4}  # relative; other dtypes are rough
ROUGH = 5e-2


@dataclass(frozen=True, eq=False)
class Parts:
    """What the experts of a layer added in a run: one summand a choice, (B, N, k, C), and who was chosen, (B, N, k); `total` (B, N, C)."""

    choices: Tensor
    index: Tensor
    total: Tensor

    def of(self, experts: Sequence[int]) -> Tensor:
        """The part of each of some experts, (U, B, N, C)."""
        wanted = torch.tensor(list(experts), device=self.index.device).view(-1, 1, 1, 1)
        return torch.einsum("ubnk,bnkc->ubnc", (self.index == wanted).to(self.choices.dtype), self.choices)

    def sums(self, experts: int, real: Tensor) -> Tensor:
        """Sum of every expert's part over the real tokens (B, N): (E, C) float32."""
        _, _, k, C = self.choices.shape
        table = self.choices.new_zeros(experts, C, dtype=torch.float32)
        chosen = self.index[real].reshape(-1).long()
        return table.index_add(0, chosen, self.choices[real].reshape(-1, C).float())


@dataclass(frozen=True, eq=False)
class Given:
    """One vector an expert, (E, C), in the place of its part, whoever chose it."""

    table: Tensor

    def of(self, experts: Sequence[int]) -> Tensor:
        """(U, 1, 1, C)."""
        return self.table[list(experts)][:, None, None]


class ExpertSweep(Sweep):
    """As `Sweep`, with experts as the units: `base.z[layer]` are `Parts`, None in a layer without experts."""

    @property
    def units(self) -> int:
        """Experts of a layer."""
        return self.experts.experts

    @property
    def experts(self) -> ExpertStack:
        """The mixture-of-experts layers. Raises AttachError for a dense model."""
        if not hasattr(self, "_experts"):
            self._experts = find_experts(self.model)
            if self._experts.depth != self.found.layers:
                raise AttachError(f"{self._experts.depth} layers with experts beside {self.found.layers} of attention")
        return self._experts

    def record(self, pairs: PromptPairs, ids: Tensor | None = None) -> Run:
        """One pass, with the parts of all experts."""
        return record_parts(self.model, self.experts, pairs, ids, self.found.layers)

    def lent(self, means: Tensor | None) -> Run:
        """A run in which every expert adds its row of `means` (L, E, C) to every token, or nothing."""
        empty = next(part for part in self.base.z if part is not None).total.new_zeros(self.units, 1)
        z = [Given(empty if means is None else means[layer]) for layer in range(self.found.layers)]
        return Run(z, self.base.logits, self.base.difference)

    def where_lent(self, other: Run, real: Tensor) -> Run:
        """Another run's parts where it has a real token (B, N), and this one's own elsewhere."""
        z = [
            None if own is None else Parts(
                torch.where(real[..., None, None], lent.choices, own.choices),
                torch.where(real[..., None], lent.index, own.index),
                own.total,
            )
            for lent, own in zip(other.z, self.base.z, strict=True)
        ]  # fmt: skip
        return Run(z, other.logits, other.difference)

    @torch.no_grad()
    def layer(self, layer: int, units: Sequence[int], outputs: Any) -> Tensor:
        """Logit differences (U, B) with the part of each of `units` of a layer replaced, alone, by `outputs.of(units)`."""
        module = next((one.experts for one in self.experts.layers if one.layer == layer), None)
        if module is None:
            return self.base.difference.expand(len(units), -1)
        parts = []
        for at in range(0, len(units), self.size):
            some = list(units[at : at + self.size])
            changed = self.changed(layer, some, outputs)[:, :, self.start :]
            forwards: dict[nn.Module, Callable] = {module: constant(changed.flatten(0, 2))}
            parts.append(self.run(layer, None, len(some), forwards).view(len(some), -1))
        return torch.cat(parts)

    def changed(self, layer: int, units: Sequence[int], outputs: Any) -> Tensor:
        """What the experts of a layer give together, with each of `units` replaced at the patched columns: (U, B, N, C)."""
        base = self.base.z[layer]
        moved = outputs.of(units).to(base.total.dtype) - base.of(units)
        return base.total + moved * self.where[..., None].to(moved.dtype)


@torch.no_grad()
def record_parts(
    model: nn.Module, stack: ExpertStack, pairs: PromptPairs, ids: Tensor | None = None, layers: int | None = None
) -> Run:
    """One pass over the prompts, or other ids (B, N), with the `Parts` of every layer with experts, None for the others."""
    seen: dict[int, tuple[Any, ...]] = {}
    with watching(stack, seen):
        logits, ld = answer(model, pairs, pairs.ids if ids is None else ids)
    parts: list[Any] = [None] * (layers or stack.depth)
    for one in stack.layers:
        parts[one.layer] = split_parts(one.layer, one.experts, *seen[one.layer], shape=tuple(pairs.ids.shape))
    return Run(parts, logits, ld)


@contextmanager
def watching(stack: ExpertStack, into: dict[int, tuple[Any, ...]]) -> Iterator[None]:
    """Notes (hidden, index, weight, output) of the experts of every layer in the pass inside the block."""
    handles = []

    def keep(layer: int) -> Callable:
        def hook(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
            into[layer] = (*[*args, *kwargs.values()][:3], output)

        return hook

    for one in stack.layers:
        handles.append(one.experts.register_forward_hook(keep(one.layer), with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def each_choice(experts: Callable[..., Tensor], hidden: Tensor, index: Tensor, weight: Tensor) -> Tensor:
    """What an experts module gives for one choice of each token at a time, (T, k, C)."""
    alone = [
        experts(hidden, index[:, j : j + 1].contiguous(), weight[:, j : j + 1].contiguous())
        for j in range(index.shape[1])
    ]
    return torch.stack(alone, 1)


def split_parts(
    layer: int, module: nn.Module, hidden: Tensor, index: Tensor, weight: Tensor, output: Any, *, shape: tuple[int, ...]
) -> Parts:
    """What a layer's experts gave as the sum of what each choice gave. Raises AttachError where it is no such sum."""
    if not isinstance(output, Tensor) or output.shape != hidden.shape or index.shape != weight.shape:
        raise AttachError(
            f"layer {layer}: {type(module).__name__} takes {tuple(index.shape)} choices with {tuple(weight.shape)} weights and "
            f"gives {type(output).__name__}; experts are told apart where one vector (T, C) is the sum over a token's choices"
        )
    choices = each_choice(module, hidden, index, weight)
    error = float((choices.sum(1) - output).abs().max())
    if error > TOLERANCE.get(output.dtype, ROUGH) * max(1e-6, float(choices.abs().max())):
        raise AttachError(
            f"layer {layer}: the choices of {type(module).__name__} add up to its output only within {error:.2g}: its experts "
            "do not act one beside the other, and cannot be patched alone"
        )
    return Parts(choices.unflatten(0, shape), index.unflatten(0, shape), output.unflatten(0, shape))
