"""Route: which heads and experts each token uses. Head routers are `HeadRouter`, feed-forward experts `MoELayer`.

Methods stand in one file each; the router zoo, its losses and the layers they serve are plain classes and functions.
"""

from headwise.registry import expose
from headwise.route._attention_experts import KVState, MixtureOfAttentionHeads, SwitchHead
from headwise.route._collect import HeadLoad
from headwise.route._config import LayerRoute, RouterConfig
from headwise.route._experts import Experts
from headwise.route._graph import Graph, GraphCache
from headwise.route._lora_experts import LoRAExperts, add_lora_experts
from headwise.route._moe import MoEHost, MoELayer
from headwise.route._router import HeadRouter
from headwise.route._router_base import Router, Rule
from headwise.route._routing import Routing
from headwise.route._rules import (
    Cosine,
    Dense,
    Fixed,
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
from headwise.route._stability import fluctuation_curve, routing_agreement, routing_entropy, routing_fluctuation
from headwise.route._upcycle import from_transformers, merge_experts, moefy, prune_experts, to_dense, upcycle
from headwise.route._zoo_heads import HeadZoo
from headwise.route.bam import MixedModel, soup

__all__ = [
    "Balanced",
    "Cosine",
    "Dense",
    "ExpertChoice",
    "Experts",
    "Fixed",
    "Graph",
    "GraphCache",
    "Hash",
    "HeadLoad",
    "HeadRouter",
    "HeadZoo",
    "KVState",
    "LayerRoute",
    "LoRAExperts",
    "Lory",
    "MixedModel",
    "MixtureOfAttentionHeads",
    "MoEHost",
    "MoELayer",
    "NoisyTopK",
    "NormTopK",
    "NullExperts",
    "Router",
    "RouterConfig",
    "Routing",
    "Rule",
    "SigmoidTopK",
    "Smear",
    "SoftMoE",
    "SoftmaxTopK",
    "SwitchHead",
    "TopKSoftmax",
    "TopP",
    "add_lora_experts",
    "fluctuation_curve",
    "from_transformers",
    "merge_experts",
    "moefy",
    "prune_experts",
    "routing_agreement",
    "routing_entropy",
    "routing_fluctuation",
    "soup",
    "to_dense",
    "upcycle",
]

expose(__name__)
