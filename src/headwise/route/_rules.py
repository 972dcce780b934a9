"""The router zoo, part 1: routers by which each token chooses units. One frozen dataclass and one function each.

A rule says which parameters it needs (`parameters`) and what it does (`route`); `Router` holds the parameters. All
arithmetic is float32 or wider. x (B, N, C) are the tokens, l = W x the logits (B, N, E).

Letters: B batch, N tokens, C width, E units, k chosen of them, R rank.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from headwise.attach.gates import TINY, GateRule
from headwise.checks import finite, whole
from headwise.errors import RouteError
from headwise.route._router_base import Rule, Seen, projection
from headwise.route._routing import Routing


def _k(rule: Rule) -> None:
    whole("k", rule.k, 1, RouteError)  # type: ignore[attr-defined]


@dataclass(frozen=True, kw_only=True)
class Dense(Rule):
    """Every unit for every token: w = softmax(l). The reference that no choice is lost in."""

    def route(self, seen: Seen) -> Routing:
        """See the class."""
        logits = seen.logits()
        probs = logits.softmax(-1)
        index = torch.arange(seen.experts, device=logits.device).expand(logits.shape)
        return Routing(index, probs, probs, logits, real=seen.real)


@dataclass(frozen=True, kw_only=True)
class SoftmaxTopK(Rule):
    """p = softmax(l); the k largest. Weights are p itself (Switch), or with `renorm` p / Σ p of the kept (Mixtral).

    `logit_norm` λ > 0 first makes l = λ (l − mean) / std over the units (Skywork-MoE), for sharper choices.
    With k = 1 and `renorm` the weight is 1 and the router would get no gradient from the task: RouteError.
    """

    k: int = 2
    renorm: bool = True
    logit_norm: float = 0.0

    def check(self) -> None:
        """See the class."""
        _k(self)
        if self.k == 1 and self.renorm:
            raise RouteError("k is 1 with renorm: the weight would be 1 and the router untrained; use renorm=False")
        if finite("logit_norm", self.logit_norm, RouteError) < 0:
            raise RouteError(f"logit_norm is {self.logit_norm}; it must be at least 0")

    def plain_gate(self) -> GateRule | None:
        """See `Rule`; a class that adds to this one says so itself."""
        plain = type(self) is SoftmaxTopK and not self.logit_norm and not self.jitter
        return GateRule(k=self.k, renorm=self.renorm) if plain else None

    def route(self, seen: Seen) -> Routing:
        """See the class."""
        logits = seen.logits()
        if self.logit_norm:
            centred = logits - logits.mean(-1, keepdim=True)
            logits = self.logit_norm * centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        return chosen(logits, GateRule(k=self.k, renorm=self.renorm), seen)


@dataclass(frozen=True, kw_only=True)
class TopKSoftmax(Rule):
    """Keep the k largest logits, softmax over them (Shazeer et al. 2017; gpt-oss): the same as `renorm` in exact numbers."""

    k: int = 2

    def check(self) -> None:
        """See the class."""
        _k(self)
        if self.k == 1:
            raise RouteError(
                "k is 1: a softmax over one logit is 1 and the router untrained; use SoftmaxTopK(k=1, renorm=False)"
            )

    def route(self, seen: Seen) -> Routing:
        """See the class."""
        return chosen(seen.logits(), GateRule(k=self.k, score="kept"), seen)


@dataclass(frozen=True, kw_only=True)
class SigmoidTopK(Rule):
    """s = σ(l); top-k of s + b inside the best groups; weights s / Σ s of the kept, times `scale` (DeepSeek-V3).

    b is no parameter: after each optimizer step `Router.update_bias` moves it by `speed` towards even load, so that no
    auxiliary loss is needed. A group's value is the sum of its two best s + b; `top_groups` of `groups` stay.
    """

    k: int = 2
    renorm: bool = True
    scale: float = 1.0
    groups: int = 1
    top_groups: int = 1
    speed: float = 1e-3

    def check(self) -> None:
        """See the class."""
        self.gate()
        if finite("speed", self.speed, RouteError) < 0:
            raise RouteError(f"speed is {self.speed}; it must be at least 0")

    def gate(self) -> GateRule:
        """The rule of the choice."""
        return GateRule(
            k=self.k, score="sigmoid", renorm=self.renorm, scale=self.scale, groups=self.groups, top_groups=self.top_groups
        )  # fmt: skip

    def check_experts(self, experts: int) -> None:
        """See the class."""
        self.gate().check(experts)
        if self.k > self.top_groups * (experts // self.groups):
            raise RouteError(
                f"k is {self.k}, but {self.top_groups} groups hold {self.top_groups * experts // self.groups}"
            )

    def buffers(self, experts: int) -> dict[str, Tensor]:
        """Bias of the choice, and the load since it last moved."""
        return {"bias": torch.zeros(experts), "load": torch.zeros(experts)}

    def route(self, seen: Seen) -> Routing:
        """See the class."""
        return chosen(seen.logits(), self.gate(), seen, seen.weights["bias"])


@dataclass(frozen=True, kw_only=True)
class NoisyTopK(Rule):
    """h = l + ε ⊙ (softplus(W_noise x) + 0.01), ε ~ N(0, 1) in training; softmax over the k largest h (Shazeer et al. 2017).

    W and W_noise start at 0, so that the load is even at first. Gives the load loss what it reads.
    """

    k: int = 2
    floor: float = 1e-2

    def check(self) -> None:
        """See the class."""
        _k(self)
        if finite("floor", self.floor, RouteError) <= 0:
            raise RouteError(f"floor is {self.floor}; the least standard deviation must be above 0")

    def parameters(self, width: int, experts: int, generator: torch.Generator | None) -> dict[str, Tensor]:
        """W and W_noise, zero."""
        return {"W": torch.zeros(experts, width), "W_noise": torch.zeros(experts, width)}

    def route(self, seen: Seen) -> Routing:
        """See the class."""
        clean = seen.logits()
        if not seen.training:
            return chosen(clean, GateRule(k=self.k, score="kept"), seen)
        std = F.softplus(seen.logits("W_noise")) + self.floor
        noisy = clean + seen.noise(clean) * std
        weight, index = GateRule(k=self.k, score="kept").choose(noisy)
        return Routing(index, weight, noisy.softmax(-1), clean, real=seen.real, noise=(noisy, std))


@dataclass(frozen=True, kw_only=True)
class Cosine(Rule):
    """l_e = cos(P x, u_e) / τ with a low-dimensional P and learnt τ; then softmax and top-k (X-MoE).

    Keeps representations from collapsing onto the units' directions. `rank` R of P (R, C); τ never below `least`.
    """

    k: int = 2
    renorm: bool = True
    rank: int = 16
    tau: float = 0.1
    least: float = 0.01

    def check(self) -> None:
        """See the class."""
        _k(self)
        whole("rank", self.rank, 1, RouteError)
        if not 0 < self.least <= finite("tau", self.tau, RouteError):
            raise RouteError(f"tau is {self.tau} and least {self.least}; 0 < least <= tau")
        if self.k == 1 and self.renorm:
            raise RouteError("k is 1 with renorm: the weight would be 1 and the router untrained; use renorm=False")

    def parameters(self, width: int, experts: int, generator: torch.Generator | None) -> dict[str, Tensor]:
        """P (R, C), the units' directions (E, R) and τ."""
        std = width**-0.5
        return {
            "P": projection(self.rank, width, generator, std),
            "W": projection(experts, self.rank, generator, 1.0),
            "tau": torch.tensor(self.tau),
        }

    def route(self, seen: Seen) -> Routing:
        """See the class."""
        low = F.linear(seen.x, seen.weights["P"].to(seen.x.dtype))
        units = seen.weights["W"].to(low.dtype)
        cosine = F.normalize(low, dim=-1) @ F.normalize(units, dim=-1).T
        return chosen(cosine / seen.weights["tau"].clamp(min=self.least), GateRule(k=self.k, renorm=self.renorm), seen)


@dataclass(frozen=True, kw_only=True)
class Fixed(Rule):
    """Top-k of the logits, every chosen unit with weight 1 (MoEfication): the parts of one layer are added, not mixed.

    The router has no gradient from the task; it is made, not trained.
    """

    k: int = 2

    def check(self) -> None:
        """See the class."""
        _k(self)

    def route(self, seen: Seen) -> Routing:
        """See the class."""
        logits = seen.logits()
        weight, index = GateRule(k=self.k).choose(logits)
        return Routing(index, torch.ones_like(weight), logits.softmax(-1), logits, real=seen.real)


@dataclass(frozen=True, kw_only=True)
class NormTopK(Rule):
    """No parameters: the score of a unit is the norm of its own features u_e, weights a softmax over the k kept.

    For heads u_e is the query (MoH part C); for experts what comes out of the first rows of W_gate^e (Autonomy of
    Experts). The caller gives `units` (B, N, E, D).
    """

    k: int = 2

    def check(self) -> None:
        """See the class."""
        _k(self)

    def parameters(self, width: int, experts: int, generator: torch.Generator | None) -> dict[str, Tensor]:
        """None."""
        return {}

    def route(self, seen: Seen) -> Routing:
        """See the class."""
        if seen.units is None:
            raise RouteError("routing by norm needs units=(B, N, E, D): the features of each unit for each token")
        norms = torch.linalg.vector_norm(seen.units.to(seen.x.dtype), dim=-1)
        return chosen(norms, GateRule(k=self.k, score="kept"), seen)


@dataclass(frozen=True, kw_only=True)
class TopP(Rule):
    """The smallest set of units whose probabilities reach `p`, at most `most`: hard tokens get more of them.

    Huang et al. 2024; the entropy loss keeps sets small. Weights are the probabilities, or with `renorm` their shares.
    """

    p: float = 0.6
    most: int = 4
    renorm: bool = False

    def check(self) -> None:
        """See the class."""
        whole("most", self.most, 1, RouteError)
        if not 0 < finite("p", self.p, RouteError) <= 1:
            raise RouteError(f"p is {self.p}; it must lie in (0, 1]")

    def check_experts(self, experts: int) -> None:
        """See the class."""
        if self.most > experts:
            raise RouteError(f"most is {self.most} but there are {experts} experts; most must be at most that")

    def route(self, seen: Seen) -> Routing:
        """See the class."""
        logits = seen.logits()
        probs = logits.softmax(-1)
        weight, index = GateRule(k=self.most).choose(logits)
        before = weight.detach().cumsum(-1) - weight.detach()  # mass of the better ones
        active = before < self.p
        weight = weight * active
        if self.renorm:
            weight = weight / (weight.sum(-1, keepdim=True) + TINY)
        return Routing(index, weight, probs, logits, active, seen.real)


@dataclass(frozen=True, kw_only=True)
class NullExperts(Rule):
    """Top-k among the units and `null` empty ones, so that easy tokens use fewer (AdaMoE); weights over the real ones.

    `probs` are those of the real units; what went to empty slots is reported as `extra["null"]` (B, N).
    """

    k: int = 3
    null: int = 4

    def check(self) -> None:
        """See the class."""
        _k(self)
        whole("null", self.null, 1, RouteError)

    def check_experts(self, experts: int) -> None:
        """See the class."""
        if self.k > experts + self.null:
            raise RouteError(f"k is {self.k}, but there are {experts} experts and {self.null} empty ones")

    def parameters(self, width: int, experts: int, generator: torch.Generator | None) -> dict[str, Tensor]:
        """W has a row for each unit and each empty one."""
        return {"W": projection(experts + self.null, width, generator)}

    def route(self, seen: Seen) -> Routing:
        """See the class."""
        logits = seen.logits()
        probs = logits.softmax(-1)
        weight, index = GateRule(k=self.k).choose(logits)
        active = index < seen.experts
        weight = weight * active
        weight = weight / (weight.sum(-1, keepdim=True) + TINY)
        real, null = probs.split([seen.experts, self.null], dim=-1)
        index = torch.where(active, index, 0)
        return Routing(
            index, weight, real, logits, active, seen.real, extra={"null": null.sum(-1)}
        )  # fmt: skip


def chosen(logits: Tensor, gate: GateRule, seen: Seen, bias: Tensor | None = None) -> Routing:
    """The routing that a gate rule makes of logits (B, N, E)."""
    weight, index = gate.choose(logits, bias)
    return Routing(index, weight, gate.probs(logits), logits, real=seen.real)
