"""The rules of the router zoo by name, and byte models whose feed-forward layers follow one: built, saved, read back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from headwise.errors import RouteError
from headwise.route._graph import Graph
from headwise.route._moe import MoEHost
from headwise.route._router_base import Rule
from headwise.route._rules import (
    Cosine,
    Dense,
    NoisyTopK,
    NormTopK,
    NullExperts,
    SigmoidTopK,
    SoftmaxTopK,
    TopKSoftmax,
    TopP,
)
from headwise.route._rules_balanced import Balanced, ExpertChoice, Hash
from headwise.route._rules_soft import Lory, Smear, SoftMoE
from headwise.route._upcycle import upcycle
from headwise.route._whole_model import READERS, read_whole, save_whole
from headwise.storage import StrPath

KIND = "moe-lm"


def _softmax(k: int) -> Rule:
    return SoftmaxTopK(k=k, renorm=k > 1)


RULES: dict[str, Callable[[int, int, int], Rule]] = {  # of (k, experts, vocabulary)
    "softmax": lambda k, experts, ids: _softmax(k),
    "topk-softmax": lambda k, experts, ids: TopKSoftmax(k=k),
    "sigmoid": lambda k, experts, ids: SigmoidTopK(k=k),
    "noisy": lambda k, experts, ids: NoisyTopK(k=k),
    "cosine": lambda k, experts, ids: Cosine(k=k, renorm=k > 1),
    "norm": lambda k, experts, ids: NormTopK(k=k),
    "top-p": lambda k, experts, ids: TopP(most=min(2 * k, experts)),
    "null": lambda k, experts, ids: NullExperts(k=min(2 * k, experts), null=experts),
    "hash": lambda k, experts, ids: Hash(vocabulary=ids, k=k),
    "dense": lambda k, experts, ids: Dense(),
    "lory": lambda k, experts, ids: Lory(segment=16),
    "similarity": lambda k, experts, ids: Graph(base=_softmax(k), graph="similarity"),
    "attention": lambda k, experts, ids: Graph(base=_softmax(k), graph="attention"),
    "expert-choice": lambda k, experts, ids: ExpertChoice(capacity=float(k)),
    "sinkhorn": lambda k, experts, ids: Balanced(),
    "soft": lambda k, experts, ids: SoftMoE(),
    "smear": lambda k, experts, ids: Smear(),
}
WITHOUT_LOSS = ("hash", "dense", "lory", "sigmoid")
"""Rules that need no balance loss, or have nothing that one could move."""


@dataclass(frozen=True)
class Mixture:
    """How a dense model becomes a mixture of fresh experts."""

    rule: str
    experts: int
    k: int
    balance: float
    z: float
    seed: int

    def losses(self) -> dict[str, float]:
        """Coefficients by name; the z-loss only where there are logits."""
        if self.rule == "noisy":
            return {"importance": self.balance, "load": self.balance, "z": self.z}
        if self.rule in WITHOUT_LOSS:
            return {}
        return {"balance": self.balance, "z": self.z if self.rule in ("softmax", "topk-softmax") else 0.0}

    def build(self, dense: Any) -> MoEHost:
        """Put the experts in place: each drawn anew from the statistics of the dense layer, nothing is copied."""
        if self.rule not in RULES:
            raise RouteError(f"rule is {self.rule!r}; it must be one of {', '.join(RULES)}")
        rule = RULES[self.rule](self.k, self.experts, dense.config.vocab_size)
        make = partial(upcycle, experts=self.experts, k=self.k, how="drop", drop=1.0, seed=self.seed)
        return make(dense, rule=rule, losses=self.losses())


@dataclass
class MixtureLM:
    """A language model of experts from a folder: `model` generates as any other, `host` has its layers."""

    model: Any
    host: MoEHost
    mixture: Mixture
    tokenizer: Any = None

    def save_pretrained(self, folder: StrPath) -> None:
        """Write the whole model, and its tokenizer."""
        save_whole(folder, KIND, self.model, self.model.config, asdict(self.mixture), self.tokenizer)

    @classmethod
    def from_pretrained(cls, folder: StrPath) -> MixtureLM:
        """Read what `save_pretrained` wrote. Raises ArtifactError."""

        def build(dense: Any, options: dict[str, Any]) -> MixtureLM:
            mixture = Mixture(**options)
            return cls(dense, mixture.build(dense), mixture)

        return read_whole(folder, KIND, build)


READERS[KIND] = MixtureLM.from_pretrained
