"""`MoELayer`: Router → Dispatch → Experts → Combine → Losses, in the place of a feed-forward layer.

    y_t = Σ_j weight_tj · f_{index_tj}(x_t) + Σ_s shared_s(x_t)

Letters: B batch, N tokens, C width, E experts, k slots, I hidden width of an expert.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from headwise.arguments import bound
from headwise.attach import Attachment, HeadCall, attach
from headwise.attach.experts import locate_tokens
from headwise.checks import finite
from headwise.errors import AttachError, RouteError
from headwise.route._collect import Collector, join_loss
from headwise.route._experts import Experts
from headwise.route._graph import GraphCache
from headwise.route._losses import Scope
from headwise.route._names import Backend
from headwise.route._router_base import Router
from headwise.route._routing import Priority, Routing


@dataclass
class MoEState(Collector):
    """What the layers of one model share in a forward pass: losses, which tokens are real, their ids; and a record.

    `qk`: q and k of each layer's attention, where a router reads them; `caches`: what routers keep while decoding.
    """

    real: Tensor | None = None
    token_ids: Tensor | None = None
    qk: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    caches: dict[int, GraphCache] | None = None
    record: dict[int, list[Any]] | None = None


class MoELayer(nn.Module):
    """Experts behind a router, with shared experts that always run. Called like a feed-forward layer, x (B, N, C).

    `shared`: an `Experts` of one (wide) expert, times σ(W x) with `shared_gate`. `capacity` (train, eval) factors limit
    an expert to ceil(factor · k · tokens / E) tokens, served by `priority`; None drops nothing. `losses`: coefficients by
    name, see `Routing.loss`, over `scope`. Padded tokens give 0 and count nowhere. Raises RouteError where sizes differ.

    >>> from headwise.route._rules import SoftmaxTopK
    >>> seeded = torch.Generator().manual_seed(0)
    >>> layer = MoELayer(
    ...     Router(SoftmaxTopK(k=2), width=8, experts=4, generator=seeded),
    ...     Experts(experts=4, width=8, hidden=16, generator=seeded),
    ... )
    >>> layer(torch.ones(2, 3, 8)).shape
    torch.Size([2, 3, 8])
    """

    def __init__(
        self,
        router: Router,
        experts: Experts,
        *,
        shared: Experts | None = None,
        shared_gate: bool = False,
        capacity: tuple[float | None, float | None] = (None, None),
        priority: Priority = "order",
        losses: Mapping[str, float] | None = None,
        scope: Scope = "batch",
        backend: Backend = "auto",
        norm_rank: int = 8,
        layer: int = 0,
        state: MoEState | None = None,
    ):
        super().__init__()
        if router.experts != experts.experts or router.width != experts.width:
            raise RouteError(
                f"the router is for {router.experts} experts of width {router.width}, they are {experts.experts} of {experts.width}"
            )
        if shared is not None and shared.width != experts.width:
            raise RouteError(f"shared experts have width {shared.width}, the others {experts.width}")
        for factor in capacity:
            if factor is not None and finite("capacity", factor, RouteError) <= 0:
                raise RouteError(f"capacity is {factor}; a factor must be above 0, or None for no limit")
        self.router, self.experts, self.shared = router, experts, shared
        self.shared_gate = nn.Parameter(torch.zeros(1, experts.width)) if shared_gate else None
        self.capacity, self.priority, self.backend, self.scope = capacity, priority, backend, scope
        self.losses, self.norm_rank = dict(losses or {}), norm_rank
        self.layer, self.state = layer, state if state is not None else MoEState()

    def route(self, x: Tensor, real: Tensor | None = None, token_ids: Tensor | None = None, **more: Any) -> Any:
        """The routing of x (B, N, C) after capacity: what `forward` follows. `more` goes to the router."""
        units = None
        if not list(self.router.parameters()) and "table" not in self.router._buffers:
            rows = self.experts.gate_up_proj[:, : self.norm_rank]
            units = torch.einsum("bnc,edc->bned", x, rows.to(x.dtype))
        routing = self.router(x, real=real, token_ids=token_ids, units=units, **more)
        factor = self.capacity[0 if self.training else 1]
        if factor is None or not isinstance(routing, Routing):
            return routing
        tokens = x.shape[0] * x.shape[1] if real is None else int(real.sum())
        limit = math.ceil(factor * routing.k * tokens / self.experts.experts)
        return routing.limited(limit, self.priority, more.get("generator"))

    def forward(self, x: Tensor, real: Tensor | None = None, token_ids: Tensor | None = None, **more: Any) -> Tensor:
        """Experts' output for x (B, N, C)."""
        real = self.state.real if real is None else real
        token_ids = self.state.token_ids if token_ids is None else token_ids
        routing = self.route(x, real, token_ids, **self._from_host(), **more)
        out = self.combine(routing, x)
        if self.shared is not None:
            always = self.shared.one(0, x)
            out = out + (always if self.shared_gate is None else F.linear(x, self.shared_gate).sigmoid() * always)
        if real is not None:
            out = out * real[..., None].to(out.dtype)
        self._note(routing)
        return out

    def _from_host(self) -> dict[str, Any]:
        """What the host holds for this layer's router."""
        found: dict[str, Any] = {}
        if self.router.rule.reads_heads and self.layer in self.state.qk:
            found["qk"] = self.state.qk.pop(self.layer)
        if self.router.rule.decodes and self.state.caches is not None:
            found["cache"] = self.state.caches.setdefault(self.layer, GraphCache())
        return found

    def combine(self, routing: Any, x: Tensor) -> Tensor:
        """Run the experts that the routing names: x (B, N, C) -> (B, N, C)."""
        if not isinstance(routing, Routing):
            return routing.apply(self.experts, x)
        flat = x.reshape(-1, x.shape[-1])
        index, weight = (part.reshape(len(flat), -1) for part in (routing.index, routing.weight))
        used = None if routing.active is None and routing.real is None else routing.used().reshape(len(flat), -1)
        return self.experts(flat, index, weight, used, self.backend).reshape(x.shape)

    def _note(self, routing: Any) -> None:
        # Computed in every run, kept from the first: checkpointing must save the same tensors in both.
        wanted = self.training and any(self.losses.values()) and isinstance(routing, Routing)
        loss = routing.loss(self.losses, self.scope) if wanted else None
        if not self.state.first(self.layer):
            return
        if loss is not None:
            self.state.add_loss(self.layer, loss)
        if self.state.record is not None:
            self.state.record.setdefault(self.layer, []).append(_detached(routing))


def _detached(routing: Any) -> Any:
    values = {name: v.detach() if isinstance(v, Tensor) else v for name, v in vars(routing).items() if name != "ready"}
    return type(routing)(**values)


@dataclass
class MoEHost:
    """The MoE layers of a model, and the hooks by which the model tells them about padding and gets their losses.

    While installed, in training mode the mean over layers of the auxiliary losses is added to the model's `output.loss`.
    """

    model: nn.Module
    owner: nn.Module
    layers: Mapping[int, MoELayer]  # by the number of the model's layer
    causal: bool = True
    state: MoEState = field(default_factory=MoEState)
    handles: list[Any] = field(default_factory=list)
    heads: Attachment | None = None

    def install(self) -> MoEHost:
        """Put the hooks in place; raises AttachError if they are."""
        if self.handles:
            raise AttachError("these MoE layers are already installed; remove() them first")
        for number, layer in self.layers.items():
            layer.state, layer.layer = self.state, number
        if any(layer.router.rule.reads_heads for layer in self.layers.values()):
            self.heads = attach(self.model, observers=[self._heads])
        self.handles = [
            self.owner.register_forward_pre_hook(self._begin, with_kwargs=True),
            self.model.register_forward_hook(self._add_loss, with_kwargs=True),
        ]
        return self

    def remove(self) -> None:
        """Take the hooks away; the layers stay."""
        for handle in self.handles:
            handle.remove()
        self.handles = []
        if self.heads is not None:
            self.heads.detach()
        self.heads = self.state.real = self.state.token_ids = self.state.caches = None
        self.state.begin()
        self.state.qk = {}

    def loss(self) -> Tensor | None:
        """Mean over layers of the last pass' auxiliary losses, None outside training."""
        return self.state.mean_loss()

    def update_bias(self) -> None:
        """`Router.update_bias` of every layer that has a bias: call it after each optimizer step."""
        for layer in self.layers.values():
            if "bias" in layer.router._buffers:
                layer.router.update_bias()

    def freeze_routing(self) -> None:
        """`Router.freeze` of every layer: the second stage of StableMoE."""
        for layer in self.layers.values():
            layer.router.freeze()

    @contextmanager
    def recording(self) -> Iterator[dict[int, list[Any]]]:
        """Inside, every layer's routing is kept: number of the layer -> one record a forward pass."""
        record: dict[int, list[Any]] = {}
        self.state.record = record
        try:
            yield record
        finally:
            self.state.record = None

    def _begin(self, owner: nn.Module, args: tuple, kwargs: dict) -> None:
        given = bound(owner, args, kwargs)
        places = locate_tokens(given)
        self.state.begin()
        self.state.real = places.positions >= 0 if given.get("attention_mask") is not None else None
        if places.fresh_rows:
            self.state.caches = None if torch.is_grad_enabled() else {}
        elif self.state.caches is None and any(layer.router.rule.decodes for layer in self.layers.values()):
            raise AttachError("cached tokens came before the routers kept theirs: run the prompt under torch.no_grad()")
        self.state.token_ids = given.get("input_ids")

    def _heads(self, call: HeadCall, out: Tensor) -> None:
        layer = self.layers.get(call.layer)
        if layer is not None and layer.router.rule.reads_heads:
            self.state.qk[call.layer] = (call.q, call.k)

    def _add_loss(self, model: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
        extra = self.loss() if model.training else None
        return output if extra is None else join_loss(output, extra, kwargs, self.causal)
