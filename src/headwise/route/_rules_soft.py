"""The router zoo, part 3: routers that mix instead of choosing. Soft MoE mixes tokens, SMEAR and Lory mix experts.

They give their own records, which know how to combine experts; there is nothing to dispatch.

Letters: B batch, N tokens, C width, E experts, S slots an expert, G segments of a row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from headwise.checks import whole
from headwise.errors import RouteError
from headwise.route._router_base import Rule, Seen, projection

if TYPE_CHECKING:
    from headwise.route._experts import Experts


@dataclass(frozen=True)
class Slots:
    """Soft MoE: dispatch and combine weights (B, N, E, S); padded tokens have neither."""

    dispatch: Tensor
    combine: Tensor
    logits: Tensor

    def apply(self, experts: Experts, x: Tensor) -> Tensor:
        """Y = combine · f(dispatchᵀ X): x (B, N, C) -> (B, N, C)."""
        B, _, E, S = self.dispatch.shape
        slots = torch.einsum("bnes,bnc->ebsc", self.dispatch.to(x.dtype), x)
        done = experts.every(slots.reshape(E, B * S, -1)).reshape(E, B, S, -1)
        return torch.einsum("bnes,ebsc->bnc", self.combine.to(x.dtype), done)


@dataclass(frozen=True)
class Merge:
    """SMEAR and Lory: one mixture of experts for each segment: weights (B, G, E), `length` tokens a segment."""

    weights: Tensor
    length: int

    def apply(self, experts: Experts, x: Tensor) -> Tensor:
        """Every segment through its merged expert: x (B, N, C) -> (B, N, C)."""
        B, N, C = x.shape
        G = self.weights.shape[1]
        padded = F.pad(x, (0, 0, 0, G * self.length - N)).reshape(B * G, self.length, C)
        done = experts.merged(self.weights.reshape(B * G, -1).to(x.dtype), padded)
        return done.reshape(B, G * self.length, C)[:, :N]


@dataclass(frozen=True, kw_only=True)
class SoftMoE(Rule):
    """l = s · norm(x) · norm(Φ); dispatch = softmax over tokens, combine = softmax over all slots (Puigcerver et al. 2024).

    `slots` S an expert. No choice, so no balance loss and nothing dropped; every output depends on every token: refused
    in a causal model.
    """

    slots: int = 1
    future: ClassVar[bool] = True

    def check(self) -> None:
        """See the class."""
        whole("slots", self.slots, 1, RouteError)

    def parameters(self, width: int, experts: int, generator: torch.Generator | None) -> dict[str, Tensor]:
        """Φ (C, E, S) and the scale s."""
        phi = projection(experts * self.slots, width, generator, width**-0.5)
        return {"phi": phi.T.reshape(width, experts, self.slots).clone(), "s": torch.ones(())}

    def route(self, seen: Seen) -> Any:
        """See the class."""
        phi = F.normalize(seen.weights["phi"].to(seen.x.dtype), dim=0) * seen.weights["s"]
        logits = torch.einsum("bnc,ces->bnes", F.normalize(seen.x, dim=-1), phi)
        hidden = logits
        if seen.real is not None:
            hidden = logits.masked_fill(~seen.real[..., None, None], torch.finfo(logits.dtype).min)
        combine = logits.flatten(2).softmax(-1).reshape(logits.shape)
        dispatch = hidden.softmax(1)
        if seen.real is not None:
            dispatch, combine = (w * seen.real[..., None, None] for w in (dispatch, combine))
        return Slots(dispatch, combine, logits)


@dataclass(frozen=True, kw_only=True)
class Smear(Rule):
    """One merged expert a row: p = softmax(W mean(x)), θ = Σ p_e θ_e (Muqeeth et al. 2024); refused in a causal model."""

    future: ClassVar[bool] = True

    def route(self, seen: Seen) -> Any:
        """See the class; padding does not enter the mean."""
        N = seen.x.shape[1]
        return Merge(_mixture(seen, _segments(seen, N)), N)


@dataclass(frozen=True, kw_only=True)
class Lory(Rule):
    """One merged expert a segment, by the mean of the segment before: causal (Zhong et al. 2024).

    The first segment uses its own mean with a stopped gradient, as the paper does to start; `strict` gives it the even
    mixture instead, so that no token of it sees a later one.
    """

    segment: int = 64
    strict: bool = True

    def check(self) -> None:
        """See the class."""
        whole("segment", self.segment, 1, RouteError)

    @property
    def future(self) -> bool:  # type: ignore[override]
        """Only the start that the paper uses looks ahead, inside the first segment."""
        return not self.strict

    def route(self, seen: Seen) -> Any:
        """See the class."""
        means = _segments(seen, self.segment)  # (B, G, C)
        weights = _mixture(seen, means)
        even = torch.full_like(weights[:, :1], 1 / seen.experts)
        first = even if self.strict else _mixture(seen, means[:, :1].detach()).detach()
        return Merge(torch.cat([first, weights[:, :-1]], dim=1), self.segment)


def _mixture(seen: Seen, means: Tensor) -> Tensor:
    return F.linear(means, seen.weights["W"].to(means.dtype)).softmax(-1)


def _segments(seen: Seen, length: int) -> Tensor:
    """Mean of the real tokens of each segment, (B, G, C); 0 where a segment has none."""
    x = seen.x if seen.real is None else seen.x * seen.real[..., None]
    B, N, C = x.shape
    count = torch.ones(B, N, dtype=x.dtype, device=x.device) if seen.real is None else seen.real.to(x.dtype)
    rest = -N % length
    x, count = F.pad(x, (0, 0, 0, rest)), F.pad(count, (0, rest))
    total = x.reshape(B, -1, length, C).sum(2)
    return total / count.reshape(B, -1, length).sum(-1, keepdim=True).clamp(min=1)
