"""Unions of experts: what `uoe` and `train_uoe` build. See `headwise.route.uoe`."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from headwise.attach import find_stack
from headwise.errors import RouteError
from headwise.modes import evaluating
from headwise.route._experts import Experts
from headwise.route._moe import MoEHost, MoELayer, MoEState
from headwise.route._router_base import Router, Rule
from headwise.route._uoe_attention import Positions, SelectiveAttention, check_module
from headwise.route._uoe_cache import UnionCacheLayer
from headwise.route._uoe_select import Combine, Over, UnionTopK
from headwise.route._upcycle import _activation, _block, _dense
from headwise.route._whole_model import READERS, read_whole, save_whole
from headwise.storage import StrPath

KIND = "uoe"


@dataclass(frozen=True)
class Cut:
    """How a model is cut; see `uoe`."""

    attention_k: int
    mlp_experts: int = 4
    mlp_k: int = 2
    combine: Combine = "gate"
    over: Over = "token"
    patch: int = 1
    capacity: float | None = None
    positions: Positions = "original"
    out_bias: Literal["all", "selected"] = "all"
    balance: float = 0.0
    allow_noncausal: bool = False

    def rule(self, k: int) -> Rule:
        """The rule of one router; one expert a token is weighed by its probability, or the router would not learn."""
        norm: Literal["sum", "none"] = "none" if k == 1 and self.combine == "gate" else "sum"
        return UnionTopK(k=k, combine=self.combine, norm=norm, over=self.over, patch=self.patch, capacity=self.capacity)


@dataclass
class UnionModel:
    """What `uoe` returns: the model, which is now a union of experts, and what belongs to it.

    `model` trains and generates as before; its caches hold, per kv head, only the tokens that the head took.
    """

    model: Any
    host: MoEHost
    attention: dict[int, SelectiveAttention]
    dense_mlps: dict[int, Any]
    blocks: list[Any]
    cut: Cut
    config: Any
    tokenizer: Any = None

    def __str__(self) -> str:
        """One line."""
        experts = next(iter(self.attention.values())).experts
        mlp = f", {self.cut.mlp_k} of {self.cut.mlp_experts} feed-forward slices" if self.cut.mlp_experts else ""
        whose = "each token" if self.cut.over == "token" else f"each {self.cut.over}"
        return (
            f"union of experts in {len(self.attention)} layers: {whose} takes {self.cut.attention_k} of {experts} kv heads "
            f"({self.cut.attention_k / experts:.3f}){mlp}"
        )

    @contextmanager
    def recording(self) -> Iterator[dict[int, list[Any]]]:
        """Inside, every router's `Routing` is kept: layer n's feed-forward under n, its attention under -1 - n."""
        with self.host.recording() as record:
            yield record

    def kv_ratio(self, cache: Any) -> float:
        """Bytes of keys and values in a cache of this model over those of dense attention on the same columns."""
        held = whole_ = 0
        for layer in cache.layers:
            if not isinstance(layer, UnionCacheLayer) or not layer.is_initialized:
                raise RouteError("this cache was not filled by a union of experts")
            row = layer.k[0]
            held += layer.kv_bytes
            whole_ += 2 * row.shape[0] * layer.seen * layer.experts * row.shape[2] * row.element_size()
        return held / whole_

    @torch.no_grad()
    def restore(self) -> Any:
        """Make the model dense again, with the weights as they are now; routers are lost. Gives the model."""
        self.host.remove()
        for block, module in zip(self.blocks, self.attention.values(), strict=True):
            _replace(block, module, module.dense.train(module.training))
        for n, layer in self.host.layers.items():
            gate, up = layer.experts.gate_up_proj.unflatten(1, (2, -1)).unbind(1)
            mlp = self.dense_mlps[n]
            mlp.gate_proj.weight.copy_(gate.flatten(0, 1))
            mlp.up_proj.weight.copy_(up.flatten(0, 1))
            mlp.down_proj.weight.copy_(layer.experts.down_proj.permute(1, 0, 2).flatten(1))
            self.blocks[n].mlp = mlp.train(layer.training)
        return self.model

    def save_pretrained(self, folder: StrPath) -> None:
        """Write the union, and its tokenizer, to a folder."""
        save_whole(folder, KIND, self.model, self.config, asdict(self.cut), self.tokenizer)

    @classmethod
    def from_pretrained(cls, folder: StrPath) -> UnionModel:
        """Read what `save_pretrained` wrote. Raises ArtifactError."""
        return read_whole(folder, KIND, lambda dense, options: cut_model(dense, Cut(**options), 0))


READERS[KIND] = UnionModel.from_pretrained


@torch.no_grad()
def cut_model(model: Any, cut: Cut, seed: int) -> UnionModel:
    config, found = copy.deepcopy(model.config), find_stack(model)
    if cut.positions not in ("original", "compact") or cut.out_bias not in ("all", "selected"):
        raise RouteError(
            f"positions is {cut.positions!r}, out_bias {cut.out_bias!r}; they must be 'original' or 'compact', 'all' or 'selected'"
        )
    rotary = getattr(found.owner, "rotary_emb", None)
    if rotary is None or not found.causal:
        raise RouteError(
            f"{type(model).__name__} is no decoder with rotary positions; a union of experts is cut from one"
        )
    blocks: list[Any] = [model.get_submodule(_block(found.pattern, n)) for n in range(found.layers)]
    modules: list[Any] = list(found.modules)
    for n, module in enumerate(modules):
        check_module(module)
        if cut.mlp_experts:
            _dense(blocks[n], n)
    state, mlps = MoEState(), {n: block.mlp for n, block in enumerate(blocks) if cut.mlp_experts}
    attentions, layers = _made(modules, mlps, cut, state, found.owner.rotary_emb, seed)
    _check_same(modules[0], attentions[0], rotary)
    for n, block in enumerate(blocks):
        _replace(block, modules[n], attentions[n])
        if n in layers:
            block.mlp = layers[n]
    host = MoEHost(model, found.owner, layers, found.causal, state).install()
    return UnionModel(model, host, attentions, mlps, blocks, cut, config)


def _made(
    modules: list[Any], mlps: dict[int, Any], cut: Cut, state: MoEState, rotary: Any, seed: int
) -> tuple[dict[int, SelectiveAttention], dict[int, MoELayer]]:
    """The layers that take the places of attention modules and feed-forward layers."""
    generator, attentions, layers = torch.Generator().manual_seed(seed), {}, {}
    for n, module in enumerate(modules):
        like, experts = module.q_proj.weight, module.k_proj.out_features // module.head_dim
        attentions[n] = SelectiveAttention(
            module,
            _router(cut, cut.attention_k, experts, like, generator),
            state,
            rotary,
            positions=cut.positions,
            out_bias=cut.out_bias,
            losses={"balance": cut.balance},
        ).train(module.training)
        if n in mlps:
            layers[n] = _sliced(mlps[n], cut, _router(cut, cut.mlp_k, cut.mlp_experts, like, generator), state)
    return attentions, layers


def _router(cut: Cut, k: int, experts: int, like: Tensor, generator: torch.Generator) -> Router:
    rule, width = cut.rule(k), like.shape[1]
    router = Router(rule, width=width, experts=experts, future=cut.allow_noncausal, generator=generator)
    return router.to(like.device, like.dtype)


def _sliced(mlp: Any, cut: Cut, router: Router, state: MoEState) -> MoELayer:
    """The feed-forward layer as E slices of its hidden units, in order."""
    hidden, width = mlp.gate_proj.weight.shape
    E = cut.mlp_experts
    if hidden % E:
        raise RouteError(f"mlp_experts is {E}; it must divide the {hidden} hidden units of the layer")
    made = Experts(experts=E, width=width, hidden=hidden // E, activation=_activation(mlp))
    gate, up = (getattr(mlp, name).weight.view(E, hidden // E, width) for name in ("gate_proj", "up_proj"))
    made.gate_up_proj.data = torch.cat([gate, up], dim=1)
    made.down_proj.data = mlp.down_proj.weight.view(width, E, -1).permute(1, 0, 2).contiguous()
    return MoELayer(router, made, losses={"balance": cut.balance}, state=state).train(mlp.training)


@torch.no_grad()
def _check_same(dense: Any, union: Any, rotary: Any) -> None:
    """With all experts the cut layer must compute what the dense one does: nothing in its forward went unseen."""
    weight = union.q_proj.weight
    x = torch.randn(1, 6, weight.shape[1], generator=torch.Generator().manual_seed(0)).to(weight.device, weight.dtype)
    angles = rotary(x, torch.arange(6, device=x.device)[None])
    ones = torch.ones(1, 6, union.experts, device=x.device)
    mask = torch.zeros(1, 1, 6, 6, device=x.device, dtype=x.dtype)
    mask = mask.masked_fill(~torch.ones(6, 6, dtype=torch.bool, device=x.device).tril(), torch.finfo(x.dtype).min)
    with evaluating(dense):
        want = dense(x, position_embeddings=angles, attention_mask=mask)[0]
    mine = union._fresh(x, ones, ones.bool(), angles, None)
    mine = mine if union.o_proj.bias is None else mine + union.o_proj.bias
    if union.positions == "original" and not torch.allclose(mine, want, rtol=0.05, atol=float(0.02 * want.abs().max())):
        raise RouteError(f"{type(dense).__name__} computes something that selective attention does not")


def _replace(block: nn.Module, old: nn.Module, new: nn.Module) -> None:
    name = next(name for name, child in block.named_children() if child is old)
    setattr(block, name, new)
