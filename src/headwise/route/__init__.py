"""Route: which heads and experts each token uses. Head routers are `HeadRouter`, feed-forward experts `MoELayer`.

Methods stand in one file each; the router zoo, its losses and the layers they serve are plain classes and functions.
"""

from headwise.registry import expose
from headwise.route._attention_experts import KVState, MixtureOfAttentionHeads, SwitchHead
from headwise.route._bam_model import MixedModel, soup
from headwise.route._collect import HeadLoad
from headwise.route._config import LayerRoute, RouterConfig
from headwise.route._experts import Experts
from headwise.route._graph import Graph, GraphCache
from headwise.route._lora_experts import LoRAExperts, add_lora_experts
from headwise.route._moe import MoEHost, MoELayer
from headwise.route._official import OfficialMoH, load_official
from headwise.route._presets import MOH_PRESETS, MoHPreset, moh_preset
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
from headwise.route._rules_stable import Stable
from headwise.route._stability import fluctuation_curve, routing_agreement, routing_entropy, routing_fluctuation
from headwise.route._uoe_attention import SelectiveAttention
from headwise.route._uoe_cache import UnionCacheLayer
from headwise.route._uoe_model import UnionModel
from headwise.route._uoe_select import UnionTopK
from headwise.route._upcycle import from_transformers, merge_experts, moefy, prune_experts, to_dense, upcycle
from headwise.route._whole_model import load_rebuilt
from headwise.route._zoo_heads import HeadZoo

__all__ = [
    "MOH_PRESETS",
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
    "MoHPreset",
    "NoisyTopK",
    "NormTopK",
    "NullExperts",
    "OfficialMoH",
    "Router",
    "RouterConfig",
    "Routing",
    "Rule",
    "SigmoidTopK",
    "SelectiveAttention",
    "Smear",
    "SoftMoE",
    "SoftmaxTopK",
    "Stable",
    "SwitchHead",
    "TopKSoftmax",
    "TopP",
    "UnionCacheLayer",
    "UnionModel",
    "UnionTopK",
    "add_lora_experts",
    "fluctuation_curve",
    "from_transformers",
    "load_official",
    "load_rebuilt",
    "merge_experts",
    "moefy",
    "moh_preset",
    "prune_experts",
    "routing_agreement",
    "routing_entropy",
    "routing_fluctuation",
    "soup",
    "to_dense",
    "upcycle",
]

expose(__name__)
