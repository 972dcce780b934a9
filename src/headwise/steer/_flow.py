"""A sampler for rectified flows that serves many head sets at once, and computes once what they share.

dx/dt = v(x, t) from noise at t = 1 to an image at t = 0, in equal Euler steps. Candidates start from the same latents, so the plain
prediction of the first guided step, and every step before it, is the same for all of them.

Letters: B rows of a batch, R candidates, M prompt-seed pairs, L layers, H query heads.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from headwise.attach import attach, fingerprint
from headwise.checks import finite, whole
from headwise.errors import EditError
from headwise.steer._guide import prediction
from headwise.steer._perturb import Candidates, Perturbation, push, push_with_cfg

Velocity = Callable[..., Any]


@dataclass
class FlowSampler:
    """Images from M noises and conditions, guided away from the passes that R head sets degrade.

    velocity: f(x (B, …), t (B,), **conditions) -> v, any output that `prediction` reads; by default the model itself.
    noise (M, …); conditions: tensors (M, …) by name; null: the same names without a condition, for classifier-free guidance.
    w, cfg: scales of perturbation guidance and of classifier-free guidance (None: off). start, stop: share of the steps, from the noise,
    in which perturbation guidance is active.

    `sampler(strengths)` with strengths (R, L, H), or None for no guidance, gives images (R, M, …).
    """

    model: nn.Module
    noise: Tensor
    conditions: Mapping[str, Tensor] = field(default_factory=dict)
    null: Mapping[str, Tensor] | None = None
    velocity: Velocity | None = None
    steps: int = 20
    w: float = 3.0
    cfg: float | None = None
    start: float = 0.0
    stop: float = 1.0
    like: Perturbation | None = None
    stack: str | None = None
    _shared: Any = field(default=None, init=False, repr=False)
    passes: int = field(default=0, init=False)  # rows · forward passes so far: what a search costs

    def __post_init__(self) -> None:
        whole("steps", self.steps, 1, EditError)
        finite("w", self.w, EditError)
        if not 0 <= self.start <= self.stop <= 1:
            raise EditError(f"start={self.start}, stop={self.stop}: shares of the steps, 0 <= start <= stop <= 1")
        if self.cfg is not None and self.null is None:
            raise EditError("cfg needs null=, the conditions of the unconditional branch")
        for name, value in {**self.conditions, **(self.null or {})}.items():
            if len(value) != len(self.noise):
                raise EditError(f"condition {name!r} has {len(value)} rows, the noise has {len(self.noise)}")

    @property
    def pairs(self) -> int:
        """M."""
        return len(self.noise)

    @torch.no_grad()
    def __call__(self, strengths: Tensor | None, like: Perturbation | None = None) -> Tensor:
        """Images (R, M, …) of R head sets; (1, M, …) without guidance for None."""
        R = 1 if strengths is None else len(strengths)
        guide = None if strengths is None or self.w == 0 or not bool(strengths.any()) else strengths
        first = int(self.start * self.steps)
        last = self.steps if guide is None else max(int(self.stop * self.steps), first + 1)
        how = Candidates(like or self.like or Perturbation(heads=_empty()))
        with attach(self.model, transforms=[how], stack=self.stack):
            x, plain = self._prefix(first, how)
            x = _repeat(x, R)
            for step in range(first, self.steps):
                active = guide is not None and step < last
                own = _repeat_parts(plain, R) if step == first else self._branches(x, step, R)
                degraded = None
                if active:
                    how.strengths = guide
                    degraded = self._predict(x, step, self.conditions, R)
                    how.strengths = None
                x = x - self._combined(own, degraded) / self.steps
        return x.unflatten(0, (R, self.pairs))

    def _prefix(self, first: int, how: Candidates) -> tuple[Tensor, tuple[Tensor, Tensor | None]]:
        """Latents before the first guided step and the plain predictions there: the same for every candidate, kept."""
        if self._shared is None:
            x = self.noise
            for step in range(first):
                x = x - self._combined(self._branches(x, step, 1), None) / self.steps
            self._shared = x, self._branches(x, first, 1)
        return self._shared

    def _branches(self, x: Tensor, step: int, R: int) -> tuple[Tensor, Tensor | None]:
        cond = self._predict(x, step, self.conditions, R)
        return cond, None if self.cfg is None else self._predict(x, step, self.null or {}, R)

    def _predict(self, x: Tensor, step: int, conditions: Mapping[str, Tensor], R: int) -> Tensor:
        self.passes += len(x)
        t = torch.full((len(x),), 1 - step / self.steps, device=x.device, dtype=x.dtype)
        rows = {name: _repeat(value, R) for name, value in conditions.items()}
        return prediction((self.velocity or self.model)(x, t, **rows))

    def _combined(self, own: tuple[Tensor, Tensor | None], degraded: Tensor | None) -> Tensor:
        cond, uncond = own
        if uncond is not None and self.cfg is not None:
            return push_with_cfg(
                cond, uncond, cond if degraded is None else degraded, self.cfg, 0 if degraded is None else self.w
            )
        return cond if degraded is None else push(cond, degraded, self.w)

    def made_for(self) -> Any:
        """Fingerprint of the denoiser."""
        return fingerprint(self.model, self.stack)


def _repeat(x: Tensor, R: int) -> Tensor:
    """(M, …) to (R · M, …), set after set."""
    return x if R == 1 else x.repeat(R, *[1] * (x.ndim - 1))


def _repeat_parts(parts: tuple[Tensor, Tensor | None], R: int) -> tuple[Tensor, Tensor | None]:
    return _repeat(parts[0], R), None if parts[1] is None else _repeat(parts[1], R)


def _empty() -> Any:
    from headwise.units import HeadSet

    return HeadSet.empty()
