"""Which expert takes which token in a union of experts: a rule of the zoo, and the list of each expert's tokens.

    s = softmax(W_g x + b_g),   T = top-k of s,   g_e = factor · s_e / Σ_{f in T} s_f  for e in T, else 0

Letters: B batch, N tokens, C width, E experts, k of them, M tokens of the busiest expert.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from headwise.attach.gates import GateRule
from headwise.checks import finite, whole
from headwise.errors import RouteError
from headwise.route._router_base import Rule, Seen
from headwise.route._routing import Routing
from headwise.route._rules import chosen

Over = Literal["token", "patch", "sequence"]
Combine = Literal["gate", "none"]


@dataclass(frozen=True, kw_only=True)
class UnionTopK(Rule):
    """Token choice of a union of experts.

    `combine`: "gate" weighs an expert's output by g; "none" uses g only to choose, as the released code does, and then the
    router learns nothing. `norm`: divide by the sum of the kept ("sum") or not ("none"). `factor` times that; None is k for
    "sum", so that weights are 1 on average and a union of all experts starts as the dense layer.
    `over`: each token chooses, or each patch of `patch` tokens, or each whole sequence, by the mean of its real tokens.
    `capacity`: an expert takes at most this share of a row's real tokens, those of largest g. All but plain token choice
    look at later tokens and are refused in causal models unless asked for.
    """

    k: int = 2
    combine: Combine = "gate"
    norm: Literal["sum", "none"] = "sum"
    factor: float | None = None
    over: Over = "token"
    patch: int = 1
    capacity: float | None = None

    @property
    def future(self) -> bool:  # type: ignore[override]
        """Does the choice for a token depend on later ones?"""
        return self.over != "token" or self.capacity is not None

    def check(self) -> None:
        """See the class."""
        whole("k", self.k, 1, RouteError)
        whole("patch", self.patch, 1, RouteError)
        for name, value, known in (
            ("combine", self.combine, ("gate", "none")),
            ("norm", self.norm, ("sum", "none")),
            ("over", self.over, ("token", "patch", "sequence")),
        ):
            if value not in known:
                raise RouteError(f"{name} is {value!r}; it must be one of {', '.join(known)}")
        if self.patch > 1 and self.over != "patch":
            raise RouteError(f"patch is {self.patch} but over={self.over!r}; patches are chosen with over='patch'")
        if self.k == 1 and self.combine == "gate" and self.norm == "sum":
            raise RouteError(
                "k is 1 and norm 'sum': the weight would be constant and the router untrained; use norm='none'"
            )
        if self.factor is not None and finite("factor", self.factor, RouteError) <= 0:
            raise RouteError(f"factor is {self.factor}; it must be above 0")
        if self.capacity is not None and not 0 < finite("capacity", self.capacity, RouteError) <= 1:
            raise RouteError(f"capacity is {self.capacity}; a share of the tokens lies in (0, 1]")

    def parameters(self, width: int, experts: int, generator: torch.Generator | None) -> dict[str, Tensor]:
        """W_g as for every rule, and b_g."""
        return {**super().parameters(width, experts, generator), "b": torch.zeros(experts)}

    def route(self, seen: Seen) -> Routing:
        """See the class."""
        x = seen.x if self.over == "token" else self._pooled(seen.x, seen.real)
        logits = F.linear(x, seen.weights["W"].to(x.dtype), seen.weights["b"].to(x.dtype))
        routing = chosen(logits, GateRule(k=self.k, renorm=self.norm == "sum"), seen)
        if self.combine == "none":
            routing = replace(routing, weight=torch.ones_like(routing.weight))
        else:
            factor = (self.k if self.norm == "sum" else 1) if self.factor is None else self.factor
            routing = replace(routing, weight=routing.weight * factor)
        return routing if self.capacity is None else self._limited(routing)

    def _pooled(self, x: Tensor, real: Tensor | None) -> Tensor:
        """Every token's x replaced by the mean over the real tokens of its patch or sequence."""
        B, N, C = x.shape
        size = N if self.over == "sequence" else self.patch
        if N % size:
            raise RouteError(f"patch is {self.patch}; it must divide the {N} tokens of a row: pad the rows")
        weight = torch.ones(B, N, device=x.device, dtype=x.dtype) if real is None else real.to(x.dtype)
        parts, counts = (x * weight[..., None]).view(B, -1, size, C).sum(2), weight.view(B, -1, size).sum(2)
        return (parts / counts.clamp(min=1)[..., None]).repeat_interleave(size, dim=1)

    def _limited(self, routing: Routing) -> Routing:
        """The tokens of largest probability of each expert and row, ties to the earlier token; the others are dropped."""
        mask = routing.mask().bool()
        real = mask.any(-1).sum(1) if routing.real is None else routing.real.sum(1)
        room = (self.capacity * real + 1e-6).floor().long()  # type: ignore[operator]
        if bool((room < 1).any()):
            raise RouteError(f"capacity is {self.capacity}: less than one of the {int(real.min())} tokens of a row")
        rank = (
            torch.where(mask, routing.probs.detach(), -1.0).sort(dim=1, descending=True, stable=True).indices.argsort(1)
        )
        fits = mask & (rank < room[:, None, None])
        return replace(routing, active=routing.used() & fits.gather(-1, routing.index))


def compact(mask: Tensor, *, whole: bool = False) -> tuple[Tensor, Tensor]:
    """The tokens of each expert, early to late: mask (B, N, E) bool -> index (B, E, M) and valid (B, E, M).

    M is the length of the longest list, at least 1; the rest of a shorter list is filled up with tokens that are not
    valid. To know it the host waits for the device; with `whole` M is N, and nobody waits.

    >>> index, valid = compact(torch.tensor([[[1, 0], [0, 1], [1, 0]]]).bool())
    >>> index.tolist(), valid.tolist()
    ([[[0, 2], [1, 0]]], [[[True, True], [True, False]]])
    """
    lists = mask.transpose(1, 2)
    lengths = lists.sum(-1)
    longest = mask.shape[1] if whole else max(int(lengths.max()), 1)
    order = (~lists).to(torch.uint8).sort(dim=-1, stable=True).indices[..., :longest]
    return order, torch.arange(longest, device=mask.device) < lengths[..., None]
