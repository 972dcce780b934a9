"""The router zoo, part 4: StableMoE, whose routing is learnt first and then fixed (Dai et al. 2022, arXiv 2204.08396).

Letters: B batch, N tokens, C width, E units, V token ids, R rank, k chosen.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from headwise.attach.gates import GateRule
from headwise.checks import whole
from headwise.errors import RouteError
from headwise.route._router_base import Rule, Seen, checked_ids, projection
from headwise.route._routing import Routing


@dataclass(frozen=True, kw_only=True)
class Stable(Rule):
    """Two stages. First top-k of l = W x with weights σ(l), while a small router learns to choose alike from the token id alone,
    l' = E' D[id]; after `Router.freeze()` the small one chooses, for good, and the weights stay σ(l) of the experts that it names.

    A token then never changes its experts, whatever the model becomes. Ask for the loss "distil" (mean −log softmax(l') of the
    chosen), beside "balance"; once frozen, neither has a gradient. `rank` R of D (V, R).
    """

    vocabulary: int = 0
    rank: int = 50
    k: int = 1

    def check(self) -> None:
        """See the class."""
        for name in ("vocabulary", "rank", "k"):
            whole(name, getattr(self, name), 1, RouteError)

    def parameters(self, width: int, experts: int, generator: torch.Generator | None) -> dict[str, Tensor]:
        """W (E, C); of the small router D (V, R) and E' (E, R)."""
        return {
            "W": projection(experts, width, generator),
            "student_ids": projection(self.vocabulary, self.rank, generator, 1.0),
            "student_units": projection(experts, self.rank, generator),
        }

    def buffers(self, experts: int) -> dict[str, Tensor]:
        """1 once frozen."""
        return {"frozen": torch.zeros(())}

    def student(self) -> tuple[str, ...]:
        """The parameters that freezing takes out of training."""
        return "student_ids", "student_units"

    def route(self, seen: Seen) -> Routing:
        """See the class; which stage it is needs no wait for the device."""
        ids, weights = checked_ids(seen, self.vocabulary, "stable routing"), seen.weights
        gate, frozen = GateRule(k=self.k, score="sigmoid"), weights["frozen"] > 0
        logits = seen.logits()
        student = weights["student_ids"].to(logits.dtype)[ids] @ weights["student_units"].to(logits.dtype).T
        index = torch.where(frozen, gate.choose(student)[1], gate.choose(logits)[1])
        probs = gate.probs(logits)
        probs, student = (torch.where(frozen, part.detach(), part) for part in (probs, student))
        weight = logits.sigmoid().gather(-1, index)
        return Routing(index, weight, probs, logits, real=seen.real, extra={"student": student})
