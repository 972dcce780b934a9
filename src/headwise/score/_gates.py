"""DuoAttention's gates: heads that mix full and streaming attention, and the optimisation of one gate per kv head.

Letters: L layers, B rows, N tokens, H query heads, K kv heads, D head dim, C hidden size. Gates alpha are (L, K).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from headwise import modes
from headwise.attach import HeadCall, attach, find_stack
from headwise.errors import AttachError
from headwise.plan import HeadPlan, SinkWindow

MixSource = Literal["teacher", "self"]
CHECKPOINT = ("gradient_checkpointing", "_gradient_checkpointing_func")
"""Attributes by which transformers' blocks know that they are to be recomputed."""


class GateMix:
    """A transform for `attach`: the heads of kv head j of layer l give (1 - a) stream + a full, a = clamp(alpha[l, j], 0, 1).

    `full` is what the heads would give by themselves, or, with `teacher`, what they gave in another run: a list of L tensors
    (B, N, H, D). The mix is made in alpha's dtype (float32), so that a gate near 1 is not rounded to it in bf16.
    """

    def __init__(self, alpha: Tensor, pattern: SinkWindow, teacher: Sequence[Tensor] | None = None):
        self.alpha, self.pattern, self.teacher = alpha, pattern, teacher

    def __call__(self, call: HeadCall, attend: Callable[[], Tensor]) -> Tensor:
        """(B, N, H, D) of one layer."""
        stream = call.attend_pattern(self.pattern)
        full = attend() if self.teacher is None else self.teacher[call.layer]
        gates = self.alpha[call.layer].clamp(0, 1)  # (K,)
        gates = gates.repeat_interleave(stream.shape[2] // len(gates))[:, None]  # (H, 1)
        return ((1 - gates) * stream + gates * full).to(stream.dtype)


def need_gates(model: nn.Module) -> tuple[int, int]:
    """(L, K) of a model whose kv heads can each be full or streaming; raises `AttachError` with the reason where they cannot."""
    stack = find_stack(model)
    with attach(model, plan=HeadPlan.full(stack.layers, stack.kv_heads)) as handle:
        if any(site.kv_heads != stack.kv_heads for site in handle.controller.sites):
            raise AttachError("gates of a tensor-parallel model are not supported: score it on one device")
    return stack.layers, stack.kv_heads


@contextmanager
def frozen(model: nn.Module, *, checkpointing: bool = False) -> Iterator[None]:
    """No weight asks for a gradient, no dropout; afterwards, also after an error, the model is as it was.

    `checkpointing` recomputes the activations of each block in the backward pass. Transformers does so only in training mode,
    so the blocks themselves are put into it, and nothing below them.
    """
    blocks = [m for m in model.modules() if checkpointing and isinstance(m, GradientCheckpointingLayer)]
    before = [{name: vars(m)[name] for name in CHECKPOINT if name in vars(m)} for m in blocks]
    if checkpointing and not blocks:
        raise AttachError(f"{type(model).__name__} has no blocks to checkpoint; pass gradient_checkpointing=False")
    with modes.frozen(model):
        try:
            for block in blocks:
                block.training = block.gradient_checkpointing = True
                block._gradient_checkpointing_func = functools.partial(checkpoint, use_reentrant=False)
            yield
        finally:
            for block, old in zip(blocks, before, strict=True):
                for name in CHECKPOINT:
                    vars(block).pop(name, None)
                vars(block).update(old)


def trapezoid(step: int, steps: int) -> float:
    """Factor on the learning rate at step 0..steps-1: a fifth of warm-up from 0.1, a plateau at 1, a fifth of decay to 0.1.

    min(1, max((k + 1) / n, 0.1), max((steps - k) / n, 0.1)) with n = steps // 5, as in DuoAttention's training script.

    >>> [trapezoid(k, 10) for k in range(10)]
    [0.5, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.5]
    """
    n = max(1, steps // 5)
    return min(1.0, max((step + 1) / n, 0.1), max((steps - step) / n, 0.1))


@dataclass(frozen=True)
class GateStep:
    """What one step saw: the two losses before it, its learning rate, the gates (L, K) after it."""

    distill: float
    penalty: float
    lr: float
    alpha: Tensor


class GateOptimiser:
    """Learns alpha by  distill + l1 · mean |alpha|,  distill = mean over labelled tokens and C of (h_full - h_mix)².

    h are the last hidden states after the final norm; the model is frozen (`frozen` around all steps is the caller's part).
    The paper's double batch is run as two passes over the same rows, the same function: the full one without gradients, which
    records each layer's head outputs (4 · L · B · N · H · D bytes in float32), then the mixed one, so that the
    full stream costs no backward.
    """

    def __init__(
        self, model: nn.Module, pattern: SinkWindow, *, steps: int, lr: float, l1: float, mix_source: MixSource
    ):
        self.model, self.pattern, self.mix_source = model, pattern, mix_source
        self.steps, self.lr, self.l1, self.taken = steps, lr, l1, 0
        device = next(model.parameters()).device
        self.alpha = torch.ones(need_gates(model), device=device, requires_grad=True)
        self.adam = torch.optim.AdamW([self.alpha], lr=lr, weight_decay=0.0)

    def backward(self, ids: Tensor, labelled: Tensor) -> tuple[float, float]:
        """(distill, mean |alpha|) of ids (B, N) at the tokens `labelled` (B, N) bool; the gradient is added to `alpha.grad`."""
        teacher: list[Tensor] = []
        with torch.no_grad(), attach(self.model, observers=[lambda call, out: teacher.append(out)]):
            full = self._hidden(ids)[labelled].float()
        mix = GateMix(self.alpha, self.pattern, teacher if self.mix_source == "teacher" else None)
        with torch.enable_grad(), attach(self.model, transforms=[mix]):  # checkpoints recompute inside backward
            mixed = self._hidden(ids)[labelled].float()
            distill = (full - mixed).square().mean()
            penalty = self.alpha.abs().mean()
            (distill + self.l1 * penalty).backward()
        return distill.item(), penalty.item()

    def _hidden(self, ids: Tensor) -> Tensor:
        """Last hidden states (B, N, C), after the final norm and before any head."""
        backbone = getattr(self.model, "base_model", self.model)
        return backbone(input_ids=ids, use_cache=False).last_hidden_state

    def step(self, ids: Tensor, labelled: Tensor) -> GateStep:
        """One projected step: gradient, AdamW, and alpha back into [0, 1], where the next step finds it."""
        rate = self.lr * trapezoid(self.taken, self.steps)
        for group in self.adam.param_groups:
            group["lr"] = rate
        self.adam.zero_grad()
        distill, penalty = self.backward(ids, labelled)
        self.adam.step()
        with torch.no_grad():
            self.alpha.clamp_(0, 1)
        self.taken += 1
        return GateStep(distill, penalty, rate, self.alpha.detach().clone())
