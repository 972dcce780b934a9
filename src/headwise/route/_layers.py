"""The modules that give each token a gate per head, one class a kind of router.

Letters: B batch, N tokens, C width of the hidden state, H query heads, S shared heads, E routed heads, K chosen.
Routing is token-local (causal) and computed in float32 or wider, autocast or not.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from headwise.attach.hook import HeadCall
from headwise.errors import AttachError
from headwise.route._collect import Collector
from headwise.route._config import LayerRoute, RouterConfig
from headwise.route._fused_heads import HeadRule, fused_heads, fused_heads_work
from headwise.route._local import count, local_features
from headwise.route._losses import balance_loss, select


class RouterLayer(nn.Module):
    """Common to all kinds: place shared and routed gates, note balance loss and load. Called with a `HeadCall`."""

    needs_hidden = False
    order: Tensor
    pool: Tensor

    def __init__(self, config: RouterConfig, layer: int, collector: Collector):
        super().__init__()
        self.config, self.layer, self.collector = config, layer, collector
        self.route: LayerRoute = config.layers[layer]
        order = torch.tensor([*self.route.shared, *self.route.pool]).argsort()
        self.register_buffer("order", order, persistent=False)
        self.register_buffer("pool", torch.tensor(self.route.pool, dtype=torch.long), persistent=False)

    def forward(self, call: HeadCall) -> Tensor:
        """Gates (B, N, H) of the heads on this tensor-parallel rank."""
        with torch.autocast(call.q.device.type, enabled=False):
            gates, loss = self.balanced(call)
        self._note(call, gates, loss)
        return gates[..., call.site.first_head : call.site.first_head + call.q.shape[1]]

    def balanced(self, call: HeadCall) -> tuple[Tensor, Tensor | None]:
        """Gates (B, N, H) in head order, and the balance loss where one is wanted."""
        shared, routed, probs, mask = self.gates(call)
        gates = torch.cat([shared, routed], dim=-1)
        if self.route.shared != tuple(range(len(self.route.shared))):
            gates = gates.index_select(-1, self.order)
        if not self.learns:
            return gates, None
        return gates, balance_loss(probs, mask, call.real_tokens(), self.config.balance)

    @property
    def learns(self) -> bool:
        """Is a balance loss wanted: in training, where tokens choose?"""
        return self.training and self.route.routed > 0

    def gates(self, call: HeadCall) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Gates of shared (B, N, S) and routed heads (B, N, E), probabilities and 0/1 choice of the routed ones."""
        raise NotImplementedError

    def constant(self) -> Tensor | None:
        """The gates (H,), if they are the same for every token."""
        raise NotImplementedError

    def _note(self, call: HeadCall, gates: Tensor, loss: Tensor | None) -> None:
        """The loss is computed in every run and kept from the first: a recomputation must save the tensors of the run it repeats."""
        if (loss is None and self.collector.load is None) or not self.collector.first(self.layer):
            return
        if loss is not None:
            self.collector.add_loss(self.layer, loss)
        if self.collector.load is not None:
            self.collector.load.add(self.layer, gates, call.real_tokens())


class TrainedLayer(RouterLayer):
    """Part A of the paper: routed gates from softmax(W_r x), shared ones from softmax(W_s x), weighed by softmax(W_h x).

    "official" (equations of the released code): shared g = 2 a1 · S s_i, routed g = 2 a2 · K p_i m_i / sum_j p_j m_j, so
    that the mean gate is 1. "paper" (equations 5 and 6): shared g = a1 s_i, routed g = a2 p_i m_i. Without shared heads
    there is no a; without routed ones neither, and g = S s_i or s_i. On CUDA by kernels of our own (`_fused_heads.py`).
    """

    needs_hidden = True
    place: Tensor

    def __init__(
        self, config: RouterConfig, layer: int, collector: Collector, generator: torch.Generator | None = None
    ):
        super().__init__(config, layer, collector)
        S, E, K = len(self.route.shared), len(self.route.pool), self.route.routed
        self.W_r = _projection(E if K else 0, config.width, generator)
        self.W_s = _projection(S if S > 1 else 0, config.width, generator)
        self.W_h = _projection(2 if K and S else 0, config.width, generator)
        self.register_buffer("place", torch.tensor([*self.route.shared, *self.route.pool]), persistent=False)
        official = config.gate_norm == "official"
        self.rules = HeadRule(S, E, K, official), HeadRule(S, E, K, official, config.balance)

    def balanced(self, call: HeadCall) -> tuple[Tensor, Tensor | None]:
        """By the kernels where they work."""
        x, rule = call.hidden, self.rules[self.learns]
        if x is None or not fused_heads_work(x, rule):
            return super().balanced(call)
        real = call.real_tokens() if rule.balance else None
        real = None if real is None else real.flatten()
        gates, loss = fused_heads(x.flatten(0, 1), self.W_r, self.W_s, self.W_h, rule, self.place, real)
        return gates.unflatten(0, x.shape[:2]), loss

    def gates(self, call: HeadCall) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """See the class."""
        assert call.hidden is not None
        x = _wide(call.hidden)
        S, E, K = len(self.route.shared), len(self.route.pool), self.route.routed
        official = self.config.gate_norm == "official"
        shared = _softmax(x, self.W_s) if self.W_s is not None else x.new_ones(*x.shape[:2], S)
        if official:
            shared = shared * S
        if self.W_r is None:
            routed = x.new_zeros(*x.shape[:2], E)
            return shared, routed, routed, routed
        probs = _softmax(x, self.W_r)
        mask = select(probs, K)
        routed = probs * mask
        if official:
            routed = routed * (K / routed.sum(-1, keepdim=True).clamp(min=torch.finfo(routed.dtype).eps))
        if self.W_h is not None:
            a = _softmax(x, self.W_h) * (2 if official else 1)
            shared, routed = shared * a[..., :1], routed * a[..., 1:]
        return shared, routed, probs, mask

    def constant(self) -> Tensor | None:
        """Only a single shared head has a gate that depends on no token."""
        if self.route.routed or len(self.route.shared) > 1:
            return None
        return _fixed(self.route)


class BinaryLayer(RouterLayer):
    """0/1 gates with a straight-through gradient: g = m + (p - stop_grad(p)), p = softmax(z / std(z)).

    m chooses the K routed heads of largest score z. Dividing by a positive number changes no ranking; it sets the
    temperature of gradient and balance loss. `ste_scope` "selected" gives gradient to chosen heads only, "all" to all,
    "none" to none.
    """

    @property
    def gradient_at_zero(self) -> bool:
        """Do heads that are left out receive gradient? Then no kernel may leave their queries out."""
        return self.config.ste_scope == "all" and torch.is_grad_enabled()

    def scores(self, call: HeadCall) -> Tensor:
        """Scores (B, N, E) of the routed heads."""
        raise NotImplementedError

    def gates(self, call: HeadCall) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """See the class."""
        z = self.scores(call)
        shared = z.new_ones(*z.shape[:2], len(self.route.shared))
        mask = select(z, self.route.routed)
        if not self.training and not torch.is_grad_enabled():
            return shared, mask, z, mask
        probs = torch.softmax(z / spread(z, self.config.eps), dim=-1)
        if self.config.ste_scope == "none":
            return shared, mask, probs, mask
        surplus = probs - probs.detach()
        routed = mask + (surplus * mask if self.config.ste_scope == "selected" else surplus)
        return shared, routed, probs, mask

    def constant(self) -> Tensor | None:
        """Constant where all heads run or none is chosen per token."""
        return _fixed(self.route) if self.route.dense or not self.route.routed else None


class NormLayer(BinaryLayer):
    """Part C of the paper, no parameters: the score of a head is the norm of its query (rotary positions keep norms)."""

    def scores(self, call: HeadCall) -> Tensor:
        """See the class."""
        if call.q.shape[1] != self.route.heads:
            raise AttachError(
                f"layer {self.layer}: routing by query norm compares all {self.route.heads} heads, this tensor-parallel "
                f"rank has {call.q.shape[1]} of them; use router='fitted' or 'static'"
            )
        q = _wide(call.q.index_select(1, self.pool))
        return torch.linalg.vector_norm(q, dim=-1).transpose(1, 2)


class FittedLayer(BinaryLayer):
    """The score of a head is a linear map of what `features` says, fitted to the log of what the head contributes; trainable.

    With `fill` in the configuration, a head that does not run gives a vector of its own, not 0.
    """

    needs_hidden = True
    fill: nn.Parameter | None
    first: Tensor | None

    def __init__(
        self, config: RouterConfig, layer: int, collector: Collector, generator: torch.Generator | None = None
    ):
        super().__init__(config, layer, collector)
        E, heads, local = len(self.route.pool), self.route.heads, config.features == "queries"
        self.W = _projection(E, config.width + (count(heads, config.kv_heads) if local else 0), generator)
        self.b = nn.Parameter(torch.zeros(E)) if E else None
        self.fill = nn.Parameter(torch.zeros(heads, config.fill)) if config.fill else None
        self.register_buffer("first", torch.zeros(config.kv_heads, config.head_dim) if local else None)

    def inputs(self, call: HeadCall) -> Tensor:
        """What is read of each token (B, N, F): the hidden state, and the local features where they are asked for."""
        assert call.hidden is not None
        x = _wide(call.hidden)
        if self.first is None:
            return x
        return torch.cat([x, local_features(call, self.first).to(x.dtype)], dim=-1)

    def scores(self, call: HeadCall) -> Tensor:
        """See the class."""
        x = self.inputs(call)
        if self.W is None or self.b is None:
            return x.new_zeros(*x.shape[:2], 0)
        return F.linear(x, self.W.to(x.dtype), self.b.to(x.dtype))


class StaticLayer(RouterLayer):
    """The control: the same heads for every token, gates 1 and 0."""

    def gates(self, call: HeadCall) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """See the class."""
        B, _, N, _ = call.q.shape
        x = _wide(call.q)
        off = x.new_zeros(B, N, len(self.route.pool))
        return x.new_ones(B, N, len(self.route.shared)), off, off, off

    def constant(self) -> Tensor | None:
        """Always constant."""
        return _fixed(self.route)


def spread(z: Tensor, eps: float) -> Tensor:
    """Unbiased standard deviation of z (..., E) over E, never 0 and with a finite gradient; 1 for a single head."""
    if z.shape[-1] < 2:
        return torch.ones_like(z)
    return (z.var(dim=-1, keepdim=True) + eps**2).sqrt()


def _softmax(x: Tensor, weight: Tensor) -> Tensor:
    return torch.softmax(F.linear(x, weight.to(x.dtype)), dim=-1)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _fixed(route: LayerRoute) -> Tensor:
    gates = torch.ones(route.heads) if route.dense else torch.zeros(route.heads)
    gates[list(route.shared)] = 1.0
    return gates


def _projection(rows: int, width: int, generator: torch.Generator | None) -> nn.Parameter | None:
    """A weight (rows, C), truncated normal of std 0.02 as in the released ViT code; None without rows."""
    if rows == 0:
        return None
    weight = torch.zeros(rows, width)
    nn.init.trunc_normal_(weight, std=0.02, generator=generator)
    return nn.Parameter(weight)


CLASSES: dict[str, type[RouterLayer]] = {
    "trained": TrainedLayer,
    "norm": NormLayer,
    "fitted": FittedLayer,
    "static": StaticLayer,
}
