"""The router zoo, part 2: routers whose load is even by construction: expert choice, BASE, Sinkhorn, hash.

Letters: B batch, N tokens, C width, E units, k slots, T tokens that share one choice (a row, or the batch).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from headwise.checks import finite, whole
from headwise.errors import RouteError
from headwise.route._router_base import Rule, Seen, checked_ids
from headwise.route._routing import Routing

Pool = Literal["sequence", "batch"]


@dataclass(frozen=True, kw_only=True)
class ExpertChoice(Rule):
    """Units choose tokens: S = softmax(l) over units, each takes its C = ceil(capacity · T / E) best; weights S (Zhou 2022).

    Over each row, or over all rows of the batch. Even load without a loss, but whether a token is served depends on
    later ones: refused in a causal model.
    """

    capacity: float = 2.0
    over: Pool = "sequence"
    future: ClassVar[bool] = True

    def check(self) -> None:
        """See the class."""
        if finite("capacity", self.capacity, RouteError) <= 0:
            raise RouteError(f"capacity is {self.capacity}; it must be above 0")
        if self.over not in ("sequence", "batch"):
            raise RouteError(f"over is {self.over!r}; it must be 'sequence' or 'batch'")

    def route(self, seen: Seen) -> Routing:
        """See the class; padded tokens are never taken and count for no capacity."""
        logits = seen.logits()
        probs = logits.softmax(-1)
        real = torch.ones(logits.shape[:2], dtype=torch.bool, device=logits.device) if seen.real is None else seen.real
        pool, pooled = probs.detach().masked_fill(~real[..., None], -1.0), real
        if self.over == "batch":
            pool, pooled = pool.reshape(1, -1, seen.experts), real.reshape(1, -1)
        taken = torch.zeros_like(pool, dtype=torch.bool)
        for row, count in enumerate(pooled.sum(-1).tolist()):
            each = min(math.ceil(self.capacity * count / seen.experts), count)
            best = pool[row].sort(dim=0, descending=True, stable=True).indices[:each]
            taken[row].scatter_(0, best, True)
        taken = taken.reshape(probs.shape)
        index = torch.arange(seen.experts, device=logits.device).expand(probs.shape)
        return Routing(index, probs * taken, probs, logits, taken, seen.real)


@dataclass(frozen=True, kw_only=True)
class Balanced(Rule):
    """One unit a token, assigned so that the load is even in training; greedy otherwise; weight σ(l) (BASE, S-BASE).

    "assignment" maximises the sum of the logits over assignments with even load (linear assignment, on the CPU);
    "sinkhorn" takes the best unit of the doubly normalised exp(l), after `steps` steps: fast, nearly even. Both are
    detached: the router learns through σ(l). In training the choice depends on later tokens.
    """

    method: Literal["assignment", "sinkhorn"] = "sinkhorn"
    steps: int = 8
    future: ClassVar[bool] = True

    def check(self) -> None:
        """See the class."""
        whole("steps", self.steps, 1, RouteError)
        if self.method not in ("assignment", "sinkhorn"):
            raise RouteError(f"method is {self.method!r}; it must be 'assignment' or 'sinkhorn'")

    def route(self, seen: Seen) -> Routing:
        """See the class; the load is even over the real tokens of the batch."""
        logits = seen.logits()
        index = logits.detach().argmax(-1)
        if seen.training:
            real = torch.ones_like(index, dtype=torch.bool) if seen.real is None else seen.real
            scores = logits.detach()[real]
            index = index.clone()
            index[real] = _assigned(scores) if self.method == "assignment" else _sinkhorn(scores, self.steps).argmax(-1)
        weight = logits.gather(-1, index[..., None]).sigmoid()
        return Routing(index[..., None], weight, logits.softmax(-1), logits, real=seen.real)


def _assigned(scores: Tensor) -> Tensor:
    """(T,) unit of each token in the best assignment with loads that differ by at most 1. scores (T, E)."""
    from scipy.optimize import linear_sum_assignment

    T, E = scores.shape
    if not T:
        return scores.new_zeros(0, dtype=torch.long)
    places = torch.arange(T, device=scores.device) % E  # T places, the first T % E units have one more
    _, columns = linear_sum_assignment(scores[:, places].double().cpu().numpy(), maximize=True)
    return places[torch.as_tensor(columns, device=scores.device)]


def _sinkhorn(scores: Tensor, steps: int) -> Tensor:
    """(T, E) log of a plan whose rows sum to 1 and whose columns to T / E, nearly."""
    plan = scores.log_softmax(-1)
    for _ in range(steps if len(plan) else 0):
        plan = plan - plan.logsumexp(0, keepdim=True)
        plan = plan - plan.logsumexp(1, keepdim=True)
    return plan - plan.logsumexp(0, keepdim=True)


@dataclass(frozen=True, kw_only=True)
class Hash(Rule):
    """The unit is looked up by token id in a fixed random table with even load; k tables of different units; weight 1/k.

    Nothing is trained and no loss is needed (Roller et al. 2021). `vocabulary` ids are shared out so that every unit
    has as many as the others, give or take one.
    """

    vocabulary: int = 0
    k: int = 1
    seed: int = 0

    def check(self) -> None:
        """See the class."""
        whole("vocabulary", self.vocabulary, 1, RouteError)
        whole("k", self.k, 1, RouteError)

    def parameters(self, width: int, experts: int, generator: torch.Generator | None) -> dict[str, Tensor]:
        """None."""
        return {}

    def buffers(self, experts: int) -> dict[str, Tensor]:
        """table (V, k): units of each token id, different ones."""
        order = torch.randperm(self.vocabulary, generator=torch.Generator().manual_seed(self.seed))
        first = order.argsort() % experts
        return {"table": (first[:, None] + torch.arange(self.k)) % experts}

    def route(self, seen: Seen) -> Routing:
        """See the class."""
        ids = checked_ids(seen, self.vocabulary, "hash routing")
        index = seen.weights["table"][ids]
        weight = torch.full(index.shape, 1 / self.k, dtype=seen.x.dtype, device=index.device)
        probs = torch.zeros(*ids.shape, seen.experts, dtype=seen.x.dtype, device=index.device)
        return Routing(index, weight, probs.scatter(-1, index, 1 / self.k), real=seen.real)
