"""Mixtures of dense models: what `bam` and `train_bam` build. See `headwise.route.bam`."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from headwise.attach import find_stack
from headwise.checks import finite, whole
from headwise.errors import RouteError
from headwise.route._bam_checks import check_attention, check_parallel, check_sources
from headwise.route._bam_fold import KV, SoftOutput, fold, unfold
from headwise.route._experts import Experts
from headwise.route._moe import MoEHost, MoELayer, MoEState
from headwise.route._router_base import Router, Rule, Seen
from headwise.route._routing import Routing
from headwise.route._rules import Dense, SoftmaxTopK
from headwise.route._upcycle import _activation, _block, _dense
from headwise.route._whole_model import READERS, read_whole, save_whole
from headwise.storage import StrPath

KIND = "bam"


@dataclass(frozen=True, kw_only=True)
class ScaledTopK(SoftmaxTopK):
    """N·p of the k largest: a router that knows nothing yet gives each expert weight 1, not 1/N."""

    renorm: bool = False

    def route(self, seen: Seen) -> Routing:
        """See the class."""
        routing = super().route(seen)
        return replace(routing, weight=routing.weight * seen.experts)


@dataclass(frozen=True)
class Recipe:
    """How models are mixed; see `bam`."""

    experts: int
    attention: Literal["soft", "average"] = "soft"
    attention_k: int | None = None
    kv: KV = "expert"
    ffn_top_k: int = 1
    ffn_gate: Literal["prob", "renorm", "scale-n"] = "prob"
    balance: float = 0.01
    z: float = 0.001
    router_std: float = 0.02

    def check(self) -> None:
        """Raises RouteError for options out of range."""
        whole("ffn_top_k", self.ffn_top_k, 1, RouteError, self.experts)
        if self.attention_k is not None:
            whole("attention_k", self.attention_k, 1, RouteError, self.experts)
            if self.attention == "average":
                raise RouteError("attention_k chooses attention experts; attention='average' has none")
        for name, value, known in (
            ("attention", self.attention, ("soft", "average")),
            ("kv", self.kv, ("expert", "shared")),
            ("ffn_gate", self.ffn_gate, ("prob", "renorm", "scale-n")),
        ):
            if value not in known:
                raise RouteError(f"{name} is {value!r}; it must be one of {', '.join(known)}")
        for name in ("balance", "z", "router_std"):
            if finite(name, getattr(self, name), RouteError) < 0:
                raise RouteError(f"{name} is {getattr(self, name)}; it must be at least 0")

    def ffn_rule(self) -> Rule:
        """The feed-forward router's rule."""
        if self.ffn_gate == "scale-n":
            return ScaledTopK(k=self.ffn_top_k)
        return SoftmaxTopK(k=self.ffn_top_k, renorm=self.ffn_gate == "renorm")

    def attention_rule(self) -> Rule:
        """The attention router's rule: all experts, or a top-k of them for the ablation."""
        return Dense() if self.attention_k is None else SoftmaxTopK(k=self.attention_k, renorm=False)


@dataclass
class MixedModel:
    """What `bam` returns: the mixture as a transformers model, and what belongs to it.

    `model` trains, generates and moves between devices as any other; in training its loss holds the routers' losses.
    `config` is that of the dense models. `save_pretrained`, `from_pretrained` write and read a folder.
    """

    model: Any
    host: MoEHost
    recipe: Recipe
    config: Any
    parallel: bool
    tokenizer: Any = None

    def __str__(self) -> str:
        """One line."""
        mix = {"soft": f"soft attention experts with {self.recipe.kv} kv", "average": "averaged attention (BTX)"}
        block = "parallel" if self.parallel else "sequential"
        size = sum(p.numel() for p in self.model.parameters())
        return (
            f"{self.recipe.experts} experts in {len(self.host.layers)} {block} layers: {mix[self.recipe.attention]}, "
            f"top-{self.recipe.ffn_top_k} feed-forward experts, {size:,} parameters"
        )

    def attention_outputs(self) -> dict[int, SoftOutput]:
        """The mixing output projection of each layer; empty for averaged attention."""
        found = find_stack(self.model)
        outputs = {n: module.o_proj for n, module in enumerate(found.modules)}
        return {n: output for n, output in outputs.items() if isinstance(output, SoftOutput)}

    @contextmanager
    def recording(self) -> Iterator[tuple[dict[int, list[Any]], dict[int, list[Tensor]]]]:
        """Inside, the routing of every pass is kept by layer: feed-forward `Routing`s, and attention gates (B, T, N)."""
        outputs = self.attention_outputs()
        gates: dict[int, list[Tensor]] = {n: [] for n in outputs}
        for n, output in outputs.items():
            output.record = gates[n]
        try:
            with self.host.recording() as experts:
                yield experts, gates
        finally:
            for output in outputs.values():
                output.record = None

    @torch.no_grad()
    def expert(self, number: int) -> Any:
        """Expert `number` taken out as a dense model: its own experts' tensors, and what all of them share."""
        whole("number", number, 0, RouteError, self.recipe.experts - 1)
        dense = _like(self.model, self.config)
        mine, theirs = self.model.state_dict(), dense.state_dict()
        for name, value in theirs.items():
            if name in mine and mine[name].shape == value.shape:
                value.copy_(mine[name])
        soft = self.recipe.attention == "soft"
        for n, (here, there) in enumerate(zip(find_stack(self.model).modules, find_stack(dense).modules, strict=True)):
            if soft:
                unfold(here, number, self.recipe.kv, there)
            experts, mlp = self.host.layers[n].experts, _blocks(dense)[n].mlp
            gate, up = experts.gate_up_proj[number].chunk(2)
            for name, value in (("gate_proj", gate), ("up_proj", up), ("down_proj", experts.down_proj[number])):
                getattr(mlp, name).weight.copy_(value)
        return dense

    def save_pretrained(self, folder: StrPath) -> None:
        """Write the mixture, and its tokenizer, to a folder."""
        save_whole(folder, KIND, self.model, self.config, asdict(self.recipe), self.tokenizer)

    @classmethod
    def from_pretrained(cls, folder: StrPath) -> MixedModel:
        """Read what `save_pretrained` wrote. Raises ArtifactError."""

        def build(dense: Any, options: dict[str, Any]) -> MixedModel:
            recipe = Recipe(**options)
            return mix([dense] * recipe.experts, recipe, None, 0)

        return read_whole(folder, KIND, build)


READERS[KIND] = MixedModel.from_pretrained


@torch.no_grad()
def mix(models: Sequence[Any], recipe: Recipe, parallel: bool | None, seed: int) -> MixedModel:
    sources = [_blocks(model) for model in models]
    attentions = [find_stack(model).modules for model in models]
    is_parallel = check_parallel(sources[0], parallel)
    for n, block in enumerate(sources[0]):
        _dense(block, n)
        if recipe.attention == "soft":
            check_attention(attentions[0][n], n)
    config, merged = copy.deepcopy(models[0].config), _mean(models)
    blocks, found, state = _blocks(merged), find_stack(merged), MoEState()
    generator, layers = torch.Generator().manual_seed(seed), {}
    for n, block in enumerate(blocks):
        like = block.mlp.gate_proj.weight
        layers[n] = _feed_forward([blocks_[n].mlp for blocks_ in sources], recipe, len(blocks), generator, state)
        block.mlp = layers[n].to(like.device, like.dtype).train(block.training)
        if recipe.attention == "soft":
            router = _router(recipe.attention_rule(), like.shape[1], recipe, found.causal, generator)
            fold(
                found.modules[n], [modules[n] for modules in attentions], recipe.kv, router.to(like.device, like.dtype)
            )
    if recipe.attention == "soft":
        _tell_config(merged.config, found.modules[0])
    host = MoEHost(merged, found.owner, layers, found.causal, state).install()
    return MixedModel(merged, host, recipe, config, is_parallel)


def _tell_config(config: Any, attention: Any) -> None:
    """The merged model has more heads: whoever reads its config, as caches and `attach` do, must know."""
    config.head_dim = attention.head_dim
    config.num_attention_heads = attention.q_proj.out_features // attention.head_dim
    config.num_key_value_heads = attention.k_proj.out_features // attention.head_dim


def _feed_forward(
    layers: Sequence[Any], recipe: Recipe, depth: int, generator: torch.Generator, state: MoEState
) -> MoELayer:
    """The experts of one block behind a new router; losses are means over layers, so their coefficients are times depth."""
    hidden, width = layers[0].gate_proj.weight.shape
    made = Experts(experts=len(layers), width=width, hidden=hidden, activation=_activation(layers[0]))
    made.gate_up_proj.data = torch.stack([torch.cat([m.gate_proj.weight, m.up_proj.weight]) for m in layers])
    made.down_proj.data = torch.stack([m.down_proj.weight for m in layers])
    router = _router(recipe.ffn_rule(), width, recipe, True, generator)
    return MoELayer(router, made, losses={"balance": depth * recipe.balance, "z": depth * recipe.z}, state=state)


def _router(rule: Rule, width: int, recipe: Recipe, causal: bool, generator: torch.Generator) -> Router:
    router = Router(rule, width=width, experts=recipe.experts, causal=causal, generator=generator)
    router.get_parameter("W").normal_(0.0, recipe.router_std, generator=generator)
    return router


@torch.no_grad()
def _mean(models: Sequence[Any]) -> Any:
    """A copy of the first model with the mean of all models' tensors, summed in float32 and cast back."""
    merged = copy.deepcopy(models[0])
    states = [model.state_dict() for model in models]
    for name, value in merged.state_dict().items():
        if value.is_floating_point():
            wide = torch.promote_types(value.dtype, torch.float32)
            value.copy_(torch.stack([state[name].to(value.device, wide) for state in states]).mean(0))
    return merged


def soup(models: Sequence[Any]) -> Any:
    """The uniform average of models that branched from one seed: the baseline without any expert."""
    check_sources(models, None)
    return _mean(models)


def _like(model: Any, config: Any) -> Any:
    """A dense model of the class, dtype and device of a mixture."""
    with torch.random.fork_rng(devices=[]):
        made = type(model)(copy.deepcopy(config))
    return made.to(next(model.parameters()).device, next(model.parameters()).dtype).train(model.training)


def _blocks(model: Any) -> list[Any]:
    found = find_stack(model)
    return [model.get_submodule(_block(found.pattern, n)) for n in range(found.layers)]
