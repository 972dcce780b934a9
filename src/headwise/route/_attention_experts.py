"""Attention layers whose projections are experts: MoA (Zhang et al. 2022) and SwitchHead (Csordás et al. 2023).

Both are causal self-attention over x (B, N, C) without position code of their own, and keep a small KV cache.

Letters: B batch, N tokens, C width, H heads, D head dim, E experts, k slots.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from headwise.attention import attention
from headwise.checks import finite, whole
from headwise.errors import RouteError
from headwise.route._collect import Collector
from headwise.route._experts import routed_linear
from headwise.route._losses import Scope
from headwise.route._router_base import Router
from headwise.route._routing import Routing
from headwise.route._rules import SigmoidTopK, SoftmaxTopK


@dataclass
class KVState:
    """Keys and values (B, K, M, D) of earlier tokens, and which columns are real."""

    k: Tensor | None = None
    v: Tensor | None = None
    real: Tensor | None = None

    def extend(self, k: Tensor, v: Tensor, real: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Append and give all."""
        if self.k is not None and self.v is not None and self.real is not None:
            k, v, real = torch.cat([self.k, k], 2), torch.cat([self.v, v], 2), torch.cat([self.real, real], 1)
        self.k, self.v, self.real = k, v, real
        return k, v, real

    @property
    def bytes(self) -> int:
        """Bytes of keys and values."""
        return sum(t.numel() * t.element_size() for t in (self.k, self.v) if t is not None)


class _Layer(nn.Module):
    def __init__(self, causal: bool, losses: dict[str, float] | None, scope: Scope):
        super().__init__()
        self.causal, self.losses, self.scope = causal, dict(losses or {}), scope
        self.layer, self.state = 0, Collector()

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, real: Tensor | None, cache: KVState | None) -> Tensor:
        B, N = q.shape[0], q.shape[2]
        if cache is not None:
            mine = torch.ones(B, N, dtype=torch.bool, device=q.device) if real is None else real
            k, v, real = cache.extend(k, v, mine)
        if real is None:
            return _tensor(attention(q, k, v, causal=self.causal))
        if not self.causal:
            return _tensor(attention(q, k, v, causal=False, mask=real[:, None, None].expand(-1, 1, N, -1)))
        start = torch.where(real.any(1), real.to(torch.uint8).argmax(1), 0)
        return _tensor(attention(q, k, v, causal=True, start=start))

    def _note(self, routings: list[Routing]) -> None:
        wanted = self.training and any(self.losses.values())
        loss = torch.stack([r.loss(self.losses, self.scope) for r in routings]).mean() if wanted else None
        if self.state.first(self.layer) and loss is not None:
            self.state.add_loss(self.layer, loss)


def _tensor(out: Any) -> Tensor:
    assert isinstance(out, Tensor)
    return out


class MixtureOfAttentionHeads(_Layer):
    """MoA: each token chooses k of E query/output experts; all share one K and one V head. y = Σ_e w_e W_O^e A_e.

    `normalise`: weights are p_e over the stopped sum of the kept p ("stop_gradient", the paper), p_e alone ("none", the
    released file), or over the sum with gradient ("sum"). The KV cache is one head. losses: see `Routing.loss`.

    >>> layer = MixtureOfAttentionHeads(width=16, head_dim=8, experts=6, k=2, generator=torch.Generator().manual_seed(0))
    >>> layer(torch.ones(1, 5, 16)).shape
    torch.Size([1, 5, 16])
    """

    def __init__(
        self,
        *,
        width: int,
        head_dim: int,
        experts: int = 8,
        k: int = 4,
        normalise: str = "stop_gradient",
        causal: bool = True,
        losses: dict[str, float] | None = None,
        scope: Scope = "batch",
        generator: torch.Generator | None = None,
    ):
        super().__init__(causal, losses, scope)
        if normalise not in ("stop_gradient", "none", "sum"):
            raise RouteError(f"normalise is {normalise!r}; it must be 'stop_gradient', 'none' or 'sum'")
        whole("head_dim", head_dim, 1, RouteError)
        self.normalise, self.head_dim = normalise, head_dim
        rule = SoftmaxTopK(k=k, renorm=False)
        self.router = Router(rule, width=width, experts=experts, causal=causal, generator=generator)
        self.W_Q = _weight(experts, head_dim, width, generator=generator)
        self.W_O = _weight(experts, width, head_dim, generator=generator)
        self.W_K = _weight(head_dim, width, generator=generator)
        self.W_V = _weight(head_dim, width, generator=generator)

    def forward(self, x: Tensor, real: Tensor | None = None, cache: KVState | None = None) -> Tensor:
        """x (B, N, C) -> (B, N, C); padded rows give 0."""
        B, N, C = x.shape
        routing = self.router(x, real=real)
        index, weight = routing.index.reshape(B * N, -1), self._weights(routing).reshape(B * N, -1)
        q = routed_linear(x.reshape(B * N, 1, C), self.W_Q, index).reshape(B, N, -1, self.head_dim).transpose(1, 2)
        k, v = (nn.functional.linear(x, w)[:, None] for w in (self.W_K, self.W_V))
        out = self._attend(q, k, v, real, cache).transpose(1, 2).reshape(B * N, -1, self.head_dim)
        y = (routed_linear(out, self.W_O, index) * weight[..., None].to(x.dtype)).sum(1).reshape(B, N, C)
        self._note([routing])
        return y if real is None else y * real[..., None].to(y.dtype)

    def _weights(self, routing: Routing) -> Tensor:
        total = routing.weight.sum(-1, keepdim=True)
        if self.normalise == "none":
            return routing.weight
        return routing.weight / (total.detach() if self.normalise == "stop_gradient" else total)


class SwitchHead(_Layer):
    """Few heads, each with E experts for V and for O, chosen per token by sigmoid gates; attention is computed per head.

    V_h = Σ_e σ_e(x_src) W_V^{h,e} x_src over the k best, y = Σ_h Σ_e σ'_e(x_dst) W_O^{h,e} a_h; no competition between
    experts and no renormalisation. `drop`: in training experts are left out of the choice with this probability.
    `losses` acts on the selections; SwitchHead regularises with {"spread": …}.

    >>> layer = SwitchHead(width=16, heads=2, head_dim=8, experts=4, k=2, generator=torch.Generator().manual_seed(0))
    >>> layer(torch.ones(1, 5, 16)).shape
    torch.Size([1, 5, 16])
    """

    def __init__(
        self,
        *,
        width: int,
        heads: int = 2,
        head_dim: int = 64,
        experts: int = 4,
        k: int = 2,
        drop: float = 0.0,
        causal: bool = True,
        losses: dict[str, float] | None = None,
        scope: Scope = "batch",
        generator: torch.Generator | None = None,
    ):
        super().__init__(causal, losses, scope)
        for name, size in (("heads", heads), ("head_dim", head_dim)):
            whole(name, size, 1, RouteError)
        if not 0 <= finite("drop", drop, RouteError) < 1:
            raise RouteError(f"drop is {drop}; it must lie in [0, 1)")
        self.heads, self.head_dim, self.experts, self.k, self.drop = heads, head_dim, experts, k, drop
        rule = SigmoidTopK(k=k, renorm=False, speed=0.0)
        made = [
            Router(rule, width=width, experts=experts, causal=causal, generator=generator) for _ in range(2 * heads)
        ]
        self.source, self.target = nn.ModuleList(made[:heads]), nn.ModuleList(made[heads:])
        for router in made:  # equal norms of the rows: no expert starts favoured
            rows = router.W
            assert isinstance(rows, Tensor)
            rows.data = nn.functional.normalize(rows.data, dim=-1) * rows.data.norm(dim=-1).mean()
        self.W_Q = _weight(heads * head_dim, width, generator=generator)
        self.W_K = _weight(heads * head_dim, width, generator=generator)
        self.W_V = _weight(heads * experts, head_dim, width, generator=generator)
        self.W_O = _weight(heads * experts, width, head_dim, generator=generator)

    def forward(
        self,
        x: Tensor,
        real: Tensor | None = None,
        cache: KVState | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """x (B, N, C) -> (B, N, C); padded rows give 0."""
        B, N, C = x.shape
        q, k = (self._heads(nn.functional.linear(x, w)) for w in (self.W_Q, self.W_K))
        sources = [self._select(router, x, real, generator) for router in self.source]
        targets = [self._select(router, x, real, generator) for router in self.target]
        index, weight = self._flat(sources, x)
        v = routed_linear(x.reshape(B * N, 1, C), self.W_V, index) * weight[..., None]
        v = v.reshape(B, N, self.heads, self.k, -1).sum(3).transpose(1, 2)
        out = self._attend(q, k, v, real, cache).transpose(1, 2)  # (B, N, H, D)
        index, weight = self._flat(targets, x)
        slots = out.repeat_interleave(self.k, dim=2).reshape(B * N, self.heads * self.k, -1)
        y = (routed_linear(slots, self.W_O, index) * weight[..., None]).sum(1).reshape(B, N, C)
        self._note([*sources, *targets])
        return y if real is None else y * real[..., None].to(y.dtype)

    def _heads(self, flat: Tensor) -> Tensor:
        return flat.unflatten(-1, (self.heads, self.head_dim)).transpose(1, 2)

    def _select(self, router: nn.Module, x: Tensor, real: Tensor | None, generator: torch.Generator | None) -> Routing:
        routing: Routing = router(x, real=real)
        if not (self.drop and self.training):
            return routing
        assert routing.logits is not None
        device = x.device if generator is None else generator.device
        keep = torch.rand(routing.logits.shape, generator=generator, device=device).to(x.device) >= self.drop
        scores = routing.logits.sigmoid()
        order = torch.where(keep, scores, scores - 2).detach().sort(dim=-1, descending=True, stable=True).indices
        index = order[..., : self.k]
        return Routing(index, scores.gather(-1, index), routing.probs, routing.logits, keep.gather(-1, index), real)

    def _flat(self, routings: list[Routing], x: Tensor) -> tuple[Tensor, Tensor]:
        """Index into the stacked experts of all heads and weight, (B·N, H·k)."""
        index = torch.stack([r.index + h * self.experts for h, r in enumerate(routings)], dim=2)
        weight = torch.stack([r.weight.masked_fill(~r.used(), 0) for r in routings], dim=2)
        flat = x.shape[0] * x.shape[1]
        return index.reshape(flat, -1), weight.reshape(flat, -1).to(x.dtype)


def _weight(*shape: int, generator: torch.Generator | None) -> nn.Parameter:
    return nn.Parameter(torch.zeros(shape).normal_(0.0, shape[-1] ** -0.5, generator=generator))
