"""`Routing`: what a router says about each token; dispatch, losses and statistics read nothing else.

Letters: B batch, N tokens of a row, T = B·N, E units (heads or experts), k slots a token.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from headwise.checks import finite
from headwise.errors import RouteError
from headwise.route import _losses

Priority = Literal["order", "confidence", "random"]


@dataclass(frozen=True)
class Ready:
    """Losses over the batch that were computed while routing; they are those of this index and these probs only."""

    index: Tensor
    probs: Tensor
    losses: Mapping[str, Tensor]


@dataclass(frozen=True)
class Routing:
    """Units of each token and their weights.

    index (B, N, k) and weight (B, N, k); a slot with `active` (B, N, k) False is not used and has weight 0. probs (B, N, E)
    is the distribution that losses and statistics read, logits (B, N, E) the raw scores where there are any, real (B, N)
    the tokens that are no padding. `noise` holds what the load loss of noisy top-k needs.

    >>> routing = Routing(index=torch.tensor([[[0], [1]]]), weight=torch.ones(1, 2, 1), probs=torch.full((1, 2, 2), 0.5))
    >>> routing.gates().tolist(), routing.load().tolist()
    ([[[1.0, 0.0], [0.0, 1.0]]], [1.0, 1.0])
    """

    index: Tensor
    weight: Tensor
    probs: Tensor
    logits: Tensor | None = None
    active: Tensor | None = None
    real: Tensor | None = None
    noise: tuple[Tensor, Tensor] | None = None  # noisy logits and their std
    extra: Mapping[str, Tensor] = field(default_factory=dict)  # what a router wants to report besides
    ready: Ready | None = field(default=None, repr=False)

    @property
    def experts(self) -> int:
        """Units E."""
        return self.probs.shape[-1]

    @property
    def k(self) -> int:
        """Slots a token."""
        return self.index.shape[-1]

    def used(self) -> Tensor:
        """(B, N, k) bool: slots that do something."""
        used = torch.ones_like(self.index, dtype=torch.bool) if self.active is None else self.active
        return used if self.real is None else used & self.real[..., None]

    def gates(self) -> Tensor:
        """(B, N, E) weight of every unit for every token, 0 where it was not chosen."""
        weight = self.weight.masked_fill(~self.used(), 0)
        return torch.zeros_like(self.probs).to(weight.dtype).scatter_add(-1, self.index, weight)

    def mask(self) -> Tensor:
        """(B, N, E) float: 1 where a token uses a unit."""
        mask = torch.zeros(self.probs.shape, device=self.probs.device)
        return mask.scatter_add(-1, self.index, self.used().float()).clamp(max=1)

    # -- losses ------------------------------------------------------------------------------------------------------

    def loss(self, coefficients: Mapping[str, float], scope: _losses.Scope = "batch") -> Tensor:
        """Weighed sum of auxiliary losses by name: balance, z, importance, load, distil, information, entropy, spread.

        Raises RouteError for an unknown name, or where a router lacks what a loss reads.
        """
        wanted = {name: f for name, f in coefficients.items() if finite(f"coefficient of {name!r}", f, RouteError)}
        parts = [factor * self._one(name, scope) for name, factor in wanted.items()]
        total = parts[0] if parts else self.probs.new_zeros(())
        for part in parts[1:]:
            total = total + part
        return total

    def _one(self, name: str, scope: _losses.Scope) -> Tensor:
        ready = self.ready
        mine = ready is not None and ready.index is self.index and ready.probs is self.probs and self.active is None
        if mine and scope == "batch" and name in ready.losses:  # type: ignore[union-attr]
            return ready.losses[name]  # type: ignore[union-attr]
        if name == "balance":
            return _losses.balance_loss(self.probs, self.mask(), self.real, "unit", scope)
        if name == "importance":
            return _losses.importance_loss(self.gates(), self.real)
        if name == "z" and self.logits is not None:
            return _losses.z_loss(self.logits, self.real)
        if name == "load" and self.logits is not None and self.noise is not None:
            return _losses.load_loss(self.logits, *self.noise, self.k, self.real)
        simple = {
            "information": _losses.information_loss,
            "entropy": _losses.entropy_loss,
            "spread": _losses.spread_loss,
        }
        if name in simple:
            return simple[name](self.probs, self.real)
        if name == "distil" and "student" in self.extra:
            return _losses.distil_loss(self.extra["student"], self.index, self.used())
        if name == "distil":
            raise RouteError("the 'distil' loss needs a router with a second, small one: Stable")
        if name in ("z", "load"):
            raise RouteError(
                f"the {name!r} loss needs {'logits' if name == 'z' else 'a noisy router in training mode'}"
            )
        raise RouteError(
            f"no loss is called {name!r}; there are balance, z, importance, load, distil, {', '.join(simple)}"
        )

    # -- capacity ----------------------------------------------------------------------------------------------------

    def limited(self, capacity: int, priority: Priority = "order", generator: torch.Generator | None = None) -> Routing:
        """At most `capacity` tokens a unit; the slots that find no place are switched off, their weights not spread.

        Tokens are served first by slot (every first choice before any second), then in order of the batch, of the
        weight ("confidence") or at random (which needs a generator).
        """
        used, index = self.used().reshape(-1, self.k), self.index.reshape(-1, self.k)
        T = len(index)
        if priority == "confidence":
            order = self.weight.detach().reshape(-1, self.k)[:, 0].argsort(descending=True, stable=True)
        elif priority == "random":
            if generator is None:
                raise RouteError("priority 'random' needs a generator")
            order = torch.randperm(T, generator=generator, device=generator.device).to(index.device)
        elif priority == "order":
            order = torch.arange(T, device=index.device)
        else:
            raise RouteError(f"priority is {priority!r}; it must be 'order', 'confidence' or 'random'")
        queue, taken = index[order].T.reshape(-1), used[order].T.reshape(-1)  # slot by slot, (k·T,)
        hits = torch.nn.functional.one_hot(queue, self.experts) * taken[:, None]
        place = (hits.cumsum(0) * hits).sum(-1)  # 1 for the first token of a unit
        fits = (taken & (place <= capacity)).reshape(self.k, T).T
        active = torch.empty_like(fits)
        active[order] = fits
        return replace(self, active=active.reshape(self.index.shape))

    # -- statistics --------------------------------------------------------------------------------------------------

    def load(self) -> Tensor:
        """(E,) tokens that use each unit."""
        return self.mask().sum(dim=(0, 1))

    @torch.no_grad()
    def statistics(self) -> dict[str, float]:
        """Load and sureness in numbers: violation (max load / mean − 1), variation, entropy (nats), effective units
        exp H(mean p), dead units, dropped share of slots.
        """
        load = self.load()
        tokens = float(self.index.shape[0] * self.index.shape[1] if self.real is None else self.real.sum())
        mean = load.mean().clamp(min=1e-12)
        numbers = {
            "violation": load.max() / mean - 1,
            "variation": load.std(unbiased=False) / mean,
            "entropy": _losses.entropy_loss(self.probs, self.real),
            "effective": (-_losses.spread_loss(self.probs, self.real)).exp(),
            "dead": (load == 0).sum(),
        }
        dropped = 1 - float(self.used().sum()) / max(tokens * self.k, 1)
        return {**{name: float(value) for name, value in numbers.items()}, "dropped": dropped}

    @torch.no_grad()
    def together(self) -> Tensor:
        """(E, E) how often two units serve the same token; the diagonal is the load."""
        mask = self.mask().flatten(0, 1)
        return mask.T @ mask
