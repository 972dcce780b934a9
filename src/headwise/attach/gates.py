"""The rule by which a router turns logits into experts and their weights, said as data.

One rule covers the routers of transformers' mixture-of-experts classes and the top-k routers of `headwise.route`:

    s = softmax(l) or sigmoid(l)         scores, float32 (or the logits themselves, score "kept")
    S = top-k of (s + b)                 b is a bias of the choice only; with groups, only inside the best groups
    w_e = s_e, over Σ_S s if `renorm`, times `scale`            (score "kept": softmax of the k kept logits)

Letters: T tokens, E experts, k chosen of them, G groups.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from headwise.checks import finite, shown, whole
from headwise.errors import RouteError

Score = Literal["softmax", "sigmoid", "kept"]
TINY = 1e-20  # of the sum of kept scores, as DeepSeek-V3 has it
OUTSIDE = 1e4  # what an expert outside the chosen groups scores less: it is taken only where the groups run out


@dataclass(frozen=True, kw_only=True)
class GateRule:
    """A routing rule. Raises RouteError unless 1 <= k, and 1 <= top_groups <= groups.

    >>> rule = GateRule(k=2, renorm=True)
    >>> weight, index = rule.choose(torch.tensor([[2.0, 0.0, 1.0, -1.0]]))
    >>> index.tolist(), [round(w, 3) for w in weight[0].tolist()]
    ([[0, 2]], [0.731, 0.269])
    """

    k: int
    score: Score = "softmax"
    renorm: bool = False
    scale: float = 1.0
    groups: int = 1
    top_groups: int = 1

    def __post_init__(self) -> None:
        whole("k", self.k, 1, RouteError)
        if self.score not in ("softmax", "sigmoid", "kept"):
            raise RouteError(f"score is {shown(self.score)}; it must be 'softmax', 'sigmoid' or 'kept'")
        finite("scale", self.scale, RouteError)
        whole("top_groups", self.top_groups, 1, RouteError, whole("groups", self.groups, 1, RouteError))

    def check(self, experts: int) -> None:
        """Raises RouteError if there are fewer experts than the rule chooses, or if groups do not divide them."""
        if self.k > experts:
            raise RouteError(f"k is {self.k} but there are {experts} experts; k must be at most that")
        if experts % self.groups:
            raise RouteError(f"groups is {self.groups}, which does not divide {experts} experts")

    def scores(self, logits: Tensor) -> Tensor:
        """Scores (..., E) in float32 or wider: probabilities, sigmoids, or for "kept" the logits."""
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if self.score == "kept":
            return logits
        return logits.sigmoid() if self.score == "sigmoid" else logits.softmax(-1)

    def probs(self, logits: Tensor) -> Tensor:
        """A distribution over experts (..., E) for statistics and losses: sigmoids are divided by their sum."""
        scores = self.scores(logits)
        if self.score == "kept":
            return scores.softmax(-1)
        return scores / (scores.sum(-1, keepdim=True) + TINY) if self.score == "sigmoid" else scores

    def choose(
        self,
        logits: Tensor,
        bias: Tensor | None = None,
        *,
        banned: Tensor | None = None,
        forced: Tensor | None = None,
        floor: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Weights and indices (T, k) for logits (T, E), best first; of equal scores the lowest index wins.

        `bias` (E,) or (T, E) is added for the choice only. `banned` and `forced` (bool, broadcastable to (T, E)) are
        never and always chosen; `floor` is the least score that an expert enters the weights with. Raises RouteError
        where fewer than k experts remain.
        """
        self.check(logits.shape[-1])
        scores = self.scores(logits)
        index = self._select(scores.detach(), bias, banned, forced)
        if floor is not None:
            scores = torch.maximum(scores, floor.to(scores.dtype).expand_as(scores))
        kept = scores.gather(-1, index)
        if self.score == "kept":
            return kept.softmax(-1) * self.scale, index
        if self.renorm:
            kept = kept / (kept.sum(-1, keepdim=True) + TINY)
        return kept * self.scale, index

    def _select(self, scores: Tensor, bias: Tensor | None, banned: Tensor | None, forced: Tensor | None) -> Tensor:
        wanted = scores if bias is None else scores + bias.detach()
        if banned is not None:
            wanted = wanted.masked_fill(banned, -torch.inf)
        if self.groups > 1:
            wanted = self._inside_groups(wanted)
        if forced is not None:
            wanted = torch.where(forced, torch.inf, wanted)
        order = wanted.sort(dim=-1, descending=True, stable=True)
        if banned is not None and bool((order.values[..., : self.k] == -torch.inf).any()):
            raise RouteError(f"fewer than k = {self.k} experts are left to choose from; ban fewer")
        return order.indices[..., : self.k]

    def _inside_groups(self, wanted: Tensor) -> Tensor:
        """Experts outside the `top_groups` groups whose two best scores sum highest come after all others."""
        grouped = wanted.unflatten(-1, (self.groups, -1))  # (..., G, E/G)
        best = grouped.topk(min(2, grouped.shape[-1]), dim=-1).values
        value = best.masked_fill(best == -torch.inf, 0).sum(-1).masked_fill(best[..., 0] == -torch.inf, -torch.inf)
        chosen = value.sort(dim=-1, descending=True, stable=True).indices[..., : self.top_groups]
        inside = torch.zeros_like(value, dtype=torch.bool).scatter(-1, chosen, True)
        return torch.where(inside[..., None], grouped, grouped - OUTSIDE).flatten(-2)


def infer_rule(logits: Tensor, weight: Tensor, index: Tensor, hints: object) -> tuple[GateRule, Tensor | None] | None:
    """The rule (and bias) that explains what a router of unknown code chose; None if none of the known ones does.

    `hints` is anything whose attributes may declare it: `norm_topk_prob`, `routed_scaling_factor`, `num_group`,
    `topk_group`, `e_score_correction_bias`. A rule is taken only if it gives the same weights, token for token. A
    softmax of the kept logits (gpt-oss) is the renormalised softmax of all, and comes back as that.
    """
    groups, top = getattr(hints, "num_group", None) or 1, getattr(hints, "topk_group", None) or 1
    bias = getattr(hints, "e_score_correction_bias", None)
    factor = getattr(hints, "routed_scaling_factor", None)
    scale = 1.0 if factor is None else float(factor)
    k = index.shape[-1]
    if not 1 <= top <= groups or logits.shape[-1] % groups:
        return None
    score: Score
    given = weight.detach().float().sort(dim=-1, descending=True).values
    tolerance = 1e-5 if weight.dtype in (torch.float32, torch.float64) else 2e-2
    for score in ("softmax", "sigmoid"):
        for renorm in (True, False):
            rule = GateRule(k=k, score=score, renorm=renorm, scale=scale, groups=groups, top_groups=top)
            mine = rule.choose(logits.detach(), bias)[0].float().sort(dim=-1, descending=True).values
            if torch.allclose(mine, given, rtol=tolerance, atol=tolerance * scale):
                return rule, bias
    return None
