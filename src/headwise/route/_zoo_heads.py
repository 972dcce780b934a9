"""Any rule of the zoo as a router of attention heads: the same `Routing`, with heads as its units.

Letters: L layers, B batch, N tokens, H query heads, D head dim, k heads a token.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from headwise.attach import HeadCall, Stack, find_stack
from headwise.attach.controller import tensor_parallel
from headwise.errors import AttachError, RouteError, WrongModelError
from headwise.route._collect import Collector, join_loss
from headwise.route._losses import Scope
from headwise.route._router_base import Router, Rule
from headwise.route._routing import Routing
from headwise.units import Fingerprint


class HeadZoo(nn.Module):
    """Routers of the zoo for the heads of a model: `headwise.attach(model, router=HeadZoo.of(model, SoftmaxTopK(k=3)))`.

    A chosen head's output is multiplied by k times its weight, so that even gates are 1; others give 0. `NormTopK`
    reads the queries, graphs of tokens the block's q and k. In training mode the mean of the losses is added to
    `output.loss`. Raises RouteError for soft mixtures, which name no heads.

    >>> from headwise.attach import attach
    >>> from headwise.hub import load_model
    >>> from headwise.route._rules import SoftmaxTopK
    >>> model, _ = load_model("tiny-random-llama")
    >>> with attach(model, router=HeadZoo.of(model, SoftmaxTopK(k=2))):
    ...     _ = model(torch.arange(9)[None])
    """

    def __init__(
        self,
        rule: Rule,
        *,
        layers: int,
        heads: int,
        width: int,
        causal: bool = True,
        losses: Mapping[str, float] | None = None,
        scope: Scope = "batch",
        generator: torch.Generator | None = None,
    ):
        super().__init__()
        self.collector, self.heads = Collector(), heads
        generator = torch.Generator().manual_seed(0) if generator is None else generator
        self.layers = nn.ModuleList(
            _ZooLayer(rule, n, heads, width, causal, dict(losses or {}), scope, self.collector, generator)
            for n in range(layers)
        )
        self._handles: list[Any] = []
        self._causal = causal

    @classmethod
    def of(cls, model: nn.Module, rule: Rule, **options: Any) -> HeadZoo:
        """Routers of the model's sizes, causal as the model is."""
        found = find_stack(model)
        width = int(found.config.hidden_size)  # type: ignore[attr-defined]
        return cls(rule, layers=found.layers, heads=found.heads, width=width, causal=found.causal, **options)

    def check(self, fingerprint: Fingerprint) -> None:
        """Raises WrongModelError for a model with other numbers of layers or heads."""
        if (fingerprint.layers, fingerprint.heads) != (len(self.layers), self.heads):
            raise WrongModelError(
                f"the router is for {len(self.layers)} layers of {self.heads} heads, the model is {fingerprint}"
            )

    def for_layer(self, layer: int) -> nn.Module:
        """The router of a layer."""
        return self.layers[layer]

    def install(self, model: nn.Module, stack: Stack) -> None:
        """Move to the model's device, follow its mode, and add the losses to its loss."""
        if self._handles:
            raise AttachError("this router is already attached to a model; detach it there first")
        if tensor_parallel(stack.modules[0])[1] > 1:
            raise AttachError("routers of the zoo compare all heads of a layer; tensor-parallel ranks hold a part each")
        for router, module in zip(self.layers, stack.modules, strict=True):
            router.to(next(module.parameters()).device).train(module.training)
            module.add_module("headwise_router", router)
        self._handles = [
            stack.owner.register_forward_pre_hook(lambda owner, args: self.collector.begin()),
            model.register_forward_hook(self._add_loss, with_kwargs=True),
        ]

    def uninstall(self, model: nn.Module, stack: Stack) -> None:
        """Undo `install`."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        for router, module in zip(self.layers, stack.modules, strict=True):
            if module._modules.get("headwise_router") is router:
                del module._modules["headwise_router"]
        self.collector.begin()

    def _add_loss(self, model: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
        extra = self.collector.mean_loss() if model.training else None
        return output if extra is None else join_loss(output, extra, kwargs, self._causal)


class _ZooLayer(nn.Module):
    needs_hidden = True

    def __init__(
        self,
        rule: Rule,
        layer: int,
        heads: int,
        width: int,
        causal: bool,
        losses: dict[str, float],
        scope: Scope,
        collector: Collector,
        generator: torch.Generator,
    ):
        super().__init__()
        self.layer, self.losses, self.scope, self.collector = layer, losses, scope, collector
        self.router = Router(rule, width=width, experts=heads, causal=causal, generator=generator)

    def forward(self, call: HeadCall) -> Tensor:
        """Gates (B, N, H)."""
        assert call.hidden is not None
        more: dict[str, Any] = {"qk": (call.q, call.k)} if self.router.rule.reads_heads else {}
        if self.router.rule.decodes and call.past:
            raise AttachError("graphs of tokens over heads keep no cache: call the model with use_cache=False")
        routing = self.router(call.hidden, real=call.real_tokens(), units=call.q.transpose(1, 2), **more)
        if not isinstance(routing, Routing):
            raise RouteError(f"{type(self.router.rule).__name__} mixes instead of choosing: it gives heads no gates")
        wanted = self.training and any(self.losses.values())
        loss = routing.loss(self.losses, self.scope) if wanted else None
        if self.collector.first(self.layer) and loss is not None:
            self.collector.add_loss(self.layer, loss)
        return routing.gates() * routing.k
