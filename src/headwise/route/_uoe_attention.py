"""Selective multi-head attention: each expert, a kv head and its query heads, runs on the tokens that chose it.

A token is dropped from q, k and v of a head: with a share ρ of the tokens its projections cost ρ and its attention ρ².

    out_t = Σ_{e: t in T_e} g_te W_O^e Attn_e(x[T_e])_t,   T_e the tokens of expert e, early to late

Letters: B batch, N tokens, C width, E experts (kv heads), G query heads of each, H = E·G, D head dim, M tokens of the
busiest expert.
"""

from __future__ import annotations

import sys
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from headwise.arguments import CACHE, bound
from headwise.attention import attention
from headwise.errors import CacheError, RouteError
from headwise.route._moe import MoEState, _detached
from headwise.route._router_base import Router
from headwise.route._routing import Routing
from headwise.route._uoe_cache import UnionCacheLayer
from headwise.route._uoe_select import compact

Positions = Literal["original", "compact"]
PARTS = ("q_proj", "k_proj", "v_proj", "o_proj")
NORMS = ("q_norm", "k_norm")
LONG = 1024  # tokens of the busiest expert from which it pays to ask how long the other lists are
SKEWED = 1.25  # products of lists filled up to the longest over those of their own lengths, from which each goes alone


class SelectiveAttention(nn.Module):
    """Takes the place of a decoder's attention module `dense`, whose projections it uses under the same names.

    `positions`: rotary positions of the tokens in the row ("original"), or their number in the expert's list ("compact").
    `out_bias`: an output bias is added to every token ("all"), or a part E⁻¹ of it by each expert that serves the token
    ("selected"). `whole_lists` (an attribute, False) makes every expert's list as long as the row, which gives the same
    numbers without the savings and keeps nothing for later tokens, so that a CUDA graph of a training step need not wait
    for any length. Raises RouteError for a module that is not made of four linear layers with rotary positions.
    """

    q_proj: nn.Linear
    k_proj: nn.Linear
    v_proj: nn.Linear
    o_proj: nn.Linear
    q_norm: nn.Module
    k_norm: nn.Module

    def __init__(
        self,
        dense: Any,
        router: Router,
        state: MoEState,
        rotary: nn.Module,
        *,
        positions: Positions = "original",
        out_bias: Literal["all", "selected"] = "all",
        losses: dict[str, float] | None = None,
        causal: bool = True,
    ):
        super().__init__()
        check_module(dense)
        for name in (*PARTS, *NORMS):
            if hasattr(dense, name):
                setattr(self, name, getattr(dense, name))
        self.router, self.state = router, state
        self.head_dim, self.groups, self.scaling = dense.head_dim, dense.num_key_value_groups, dense.scaling
        self.experts = dense.k_proj.out_features // dense.head_dim
        self.layer_idx, self.dropout = dense.layer_idx, getattr(dense, "attention_dropout", 0.0)
        self.positions, self.out_bias, self.losses, self.causal = positions, out_bias, dict(losses or {}), causal
        self.whole_lists = False
        self.rope = sys.modules[type(dense).__module__].apply_rotary_pos_emb
        self._aside = (dense, rotary)  # in a tuple, so that they are not submodules a second time

    @property
    def dense(self) -> Any:
        """The module that this one replaced; it shares the projections."""
        return self._aside[0]

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """Called as the dense module is; the mask is not read: causality and padding are known from the tokens."""
        if position_embeddings is None:
            raise RouteError(
                "selective attention needs position_embeddings (cos, sin), as decoders hand them to their layers"
            )
        x, real = hidden_states, self.state.real
        routing = self.router(x, real=real)
        self._note(routing)
        gates, on = routing.gates(), routing.mask().bool()
        if self.whole_lists and not (self.training and torch.is_grad_enabled()):
            raise RouteError("whole_lists is for training steps: it keeps nothing for later tokens; set it to False")
        cache = None if self.whole_lists else self._layer(bound(self, (), kwargs).get(CACHE))
        if cache is None or cache.seen == 0:
            out = self._fresh(x, gates, on, position_embeddings, cache)
        else:
            out = self._continued(x, gates, on, position_embeddings, cache)
        return out + self._bias(on, out) if self.o_proj.bias is not None else out, None

    # -- a whole prompt ------------------------------------------------------------------------------------------------

    def _fresh(self, x: Tensor, gates: Tensor, on: Tensor, rotary: Any, cache: UnionCacheLayer | None) -> Tensor:
        """All tokens at once: gather, project, attend among each expert's own tokens, scatter."""
        B, N, C = x.shape
        index, valid = compact(on, whole=self.whole_lists)  # (B, E, M)
        M, E = index.shape[2], self.experts
        flat = (index + N * torch.arange(B, device=x.device)[:, None, None]).transpose(0, 1).reshape(E, -1)  # (E, B·M)
        rows = x.reshape(B * N, C)[flat]
        q, k, v = (self._expert_heads(rows, getattr(self, name), B) for name in ("q_proj", "k_proj", "v_proj"))
        cos, sin = self._angles(x, rotary, index)
        q, k = (
            t.to(v.dtype) for t in self._turn(q, k, cos.flatten(0, 1), sin.flatten(0, 1))
        )  # autocast: angles are wider
        out = self._attend(q, k, v, valid)  # (E·B, G, M, D)
        if cache is not None:
            self._store(cache, k, v, index, valid, N)
        weight = gates.transpose(1, 2).gather(2, index) * valid  # (B, E, M)
        heads = out.view(E, B, self.groups, M, -1).permute(1, 0, 3, 2, 4) * weight[..., None, None].to(out.dtype)
        # Each expert writes to tokens of its own list only, once: no sum, no atomics. One matmul for all is then faster
        # than one for each expert's rows, whose results would have to be added up at full width.
        places = index[..., None].expand(-1, -1, -1, heads.shape[3] * heads.shape[4])
        placed = heads.new_zeros(B, E, N, places.shape[-1]).scatter(2, places, heads.flatten(3))
        return F.linear(placed.transpose(1, 2).flatten(2), self.o_proj.weight)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, valid: Tensor) -> Tensor:
        """Attention within each list, (E·B, G, M, D); lists of very different lengths are not all filled up to the longest."""
        B, E, M = valid.shape
        mask = None if self.causal else valid.transpose(0, 1).flatten(0, 1)[:, None, None].expand(-1, 1, M, -1)
        drop = self.dropout if self.training else 0.0
        sizes = [M] * E
        if self.causal and M >= LONG and not self.whole_lists:
            sizes = [max(int(size), 1) for size in valid.sum(-1).amax(0).tolist()]
        if SKEWED * sum(size * size for size in sizes) >= E * M * M:
            return _tensor(attention(q, k, v, causal=self.causal, mask=mask, scale=self.scaling, dropout=drop))
        parts = []
        for e, size in enumerate(sizes):
            mine = (t[e * B : (e + 1) * B, :, :size] for t in (q, k, v))
            out = _tensor(attention(*mine, causal=True, scale=self.scaling, dropout=drop))
            parts.append(F.pad(out, (0, 0, 0, M - size)))
        return torch.cat(parts)

    def _expert_heads(self, rows: Tensor, layer: nn.Linear, B: int) -> Tensor:
        """rows (E, B·M, C) through each expert's own slice of a projection -> (E·B, heads, M, D)."""
        E = self.experts
        out = torch.bmm(rows, layer.weight.view(E, -1, layer.in_features).mT)
        if layer.bias is not None:
            out = out + layer.bias.view(E, 1, -1)
        return out.view(E * B, rows.shape[1] // B, -1, self.head_dim).transpose(1, 2)

    def _angles(self, x: Tensor, rotary: tuple[Tensor, Tensor], index: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin (E, B, M, D) of the tokens of each list."""
        B, E, M = index.shape
        if self.positions == "compact":
            cos, sin = self._aside[1](x, torch.arange(M, device=x.device)[None])
            return cos.expand(E, B, M, -1), sin.expand(E, B, M, -1)
        places = index.transpose(0, 1)[..., None]
        cos, sin = (t.expand(E, B, -1, -1).gather(2, places.expand(-1, -1, -1, t.shape[-1])) for t in rotary)
        return cos, sin

    def _turn(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        if hasattr(self, "q_norm"):
            q, k = self.q_norm(q), self.k_norm(k)
        return self.rope(q, k, cos, sin)

    def _store(self, cache: UnionCacheLayer, k: Tensor, v: Tensor, index: Tensor, valid: Tensor, columns: int) -> None:
        B, E, M = index.shape
        real = self.state.real
        if real is not None:
            cache.start = torch.where(real.any(1), real.to(torch.uint8).argmax(1), 0)
        start = 0 if cache.start is None else cache.start[:, None, None]
        k, v = (t.detach().view(E, B, M, -1).transpose(0, 1) for t in (k, v))
        cache.append(k, v, torch.where(valid, index - start, -1), columns)

    # -- tokens after a prompt -----------------------------------------------------------------------------------------

    def _continued(self, x: Tensor, gates: Tensor, on: Tensor, rotary: Any, cache: UnionCacheLayer) -> Tensor:
        """A few new tokens: every head is projected, but stores and serves only the tokens that chose it."""
        N, G = x.shape[1], self.groups
        q, k, v = (
            getattr(self, name)(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for name in ("q_proj", "k_proj", "v_proj")
        )
        if self.positions == "compact":
            q, k = self._turn_compact(q, k, on, cache, x)
        else:
            q, k = self._turn(q, k, *rotary)
        q, k = q.to(v.dtype), k.to(v.dtype)
        places = torch.arange(cache.seen, cache.seen + N, device=x.device)[None]
        places = places if cache.start is None else places - cache.start[:, None]
        offset, taken = cache.seen, on.transpose(1, 2)  # (B, E, N)
        cache.append(k.detach(), v.detach(), torch.where(taken, places[:, None], -1), N)
        active = taken.repeat_interleave(G, dim=1)
        where: dict[str, Any] = {"offset": offset, "start": cache.start, "active": active}
        out = _tensor(attention(q, groups=cache.groups(), causal=True, scale=self.scaling, **where))
        weight = gates.transpose(1, 2).repeat_interleave(G, dim=1)[..., None]
        heads = (out * weight.to(out.dtype)).transpose(1, 2).flatten(2)
        return F.linear(heads, self.o_proj.weight)

    def _turn_compact(
        self, q: Tensor, k: Tensor, on: Tensor, cache: UnionCacheLayer, x: Tensor
    ) -> tuple[Tensor, Tensor]:
        B, N, E, G = *x.shape[:2], self.experts, self.groups
        places = (cache.counts[:, None] + on.cumsum(1) - 1).clamp(min=0).transpose(1, 2)  # (B, E, N)
        cos, sin = self._aside[1](x, places.reshape(B * E, N))
        q, k = q.unflatten(1, (E, G)).flatten(0, 1), k.unflatten(1, (E, 1)).flatten(0, 1)
        q, k = self._turn(q, k, cos, sin)
        return q.view(B, E * G, N, -1), k.view(B, E, N, -1)

    # -- the rest ------------------------------------------------------------------------------------------------------

    def _layer(self, past: Any) -> UnionCacheLayer | None:
        """This layer's part of the model's cache, put there in the place of an empty dense one."""
        if past is None:
            return None
        if not hasattr(past, "layers"):
            raise CacheError(f"a union of experts cannot keep its tokens in a {type(past).__name__}")
        while len(past.layers) <= self.layer_idx:
            past.layers.append(UnionCacheLayer(self.experts))
        layer = past.layers[self.layer_idx]
        if isinstance(layer, UnionCacheLayer):
            return layer
        if layer.get_seq_length() or getattr(layer, "is_compileable", False):
            raise CacheError(
                "the cache holds dense keys, or is a static one; give a union of experts a fresh DynamicCache"
            )
        past.layers[self.layer_idx] = UnionCacheLayer(self.experts)
        return past.layers[self.layer_idx]

    def _bias(self, on: Tensor, like: Tensor) -> Tensor:
        if self.out_bias == "all":
            return self.o_proj.bias
        return self.o_proj.bias * (on.sum(-1, keepdim=True) / self.experts).to(like.dtype)

    def _note(self, routing: Routing) -> None:
        wanted = self.training and any(self.losses.values())
        loss = routing.loss(self.losses) if wanted else None
        mine = -1 - self.layer_idx  # feed-forward layers have the numbers from 0
        if not self.state.first(mine):
            return
        if loss is not None:
            self.state.add_loss(mine, loss)
        if self.state.record is not None:
            self.state.record.setdefault(mine, []).append(_detached(routing))


def _tensor(out: Any) -> Tensor:
    assert isinstance(out, Tensor)
    return out


def check_module(dense: Any) -> None:
    """Raises RouteError for an attention module that cannot be cut into experts."""
    kind = type(dense).__name__
    if not all(isinstance(getattr(dense, name, None), nn.Linear) for name in PARTS):
        raise RouteError(f"{kind} has no linear q_proj, k_proj, v_proj and o_proj to cut into experts")
    if not hasattr(sys.modules[type(dense).__module__], "apply_rotary_pos_emb"):
        raise RouteError(f"{kind} has no rotary positions that headwise knows how to apply")
    for name, value in dense.named_parameters():
        if not name.startswith(PARTS) and (name.split(".")[0] not in NORMS or tuple(value.shape) != (dense.head_dim,)):
            raise RouteError(
                f"{kind} has parameters {name} {tuple(value.shape)} that a union of experts would not read"
            )
    if getattr(dense, "sliding_window", None):
        raise RouteError(
            f"{kind} reads a sliding window of {dense.sliding_window} tokens; selective attention is global"
        )


def naive(layer: SelectiveAttention, x: Tensor, routing: Routing, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """The equation with whole matrices: every head on every token, then masked. The reference of `SelectiveAttention`.

    Original positions, no cache: x (B, N, C), rotary cos and sin (B or 1, N, D) -> (B, N, C).
    """
    N, G = x.shape[1], layer.groups
    q, k, v = (
        getattr(layer, name)(x).unflatten(-1, (-1, layer.head_dim)).transpose(1, 2)
        for name in ("q_proj", "k_proj", "v_proj")
    )
    q, k = layer._turn(q, k, *rotary)
    k, v = (t.repeat_interleave(G, dim=1) for t in (k, v))
    on = routing.mask().bool().transpose(1, 2).repeat_interleave(G, dim=1)  # (B, H, N)
    allowed = on[..., None] & on[..., None, :]
    if layer.causal:
        allowed = allowed & torch.ones(N, N, dtype=torch.bool, device=x.device).tril()
    scores = (q @ k.mT * layer.scaling).masked_fill(~allowed, -torch.inf)
    heads = scores.softmax(-1).nan_to_num(0.0) @ v
    weight = routing.gates().transpose(1, 2).repeat_interleave(G, dim=1)[..., None]
    out = F.linear((heads * weight).transpose(1, 2).flatten(2), layer.o_proj.weight)
    return out if layer.o_proj.bias is None else out + layer._bias(routing.mask().bool(), out)
