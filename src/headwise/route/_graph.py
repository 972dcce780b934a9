"""Graph of tokens (Nguyen et al. 2025): a token's experts follow a weighed average of other tokens' routing.

    Π = S R,   R_j = softmax(l_j) of the base router,   S_ij = how much token i follows token j;   top-k of Π

| graph | S |
|---|---|
| similarity | softmax_j(u_i W_s u_jᵀ / (τ √C)); with `rank` W_s = A Bᵀ and √rank |
| cosine | softmax_j(cos(u_i, u_j) / τ), no parameters |
| attention | mean over heads of the attention of the block's own heads, from its q and k |
| posterior | the same, each head's row times N(u_i; ū_j, σ² I) and normalised again; ū_j is what source j writes |

S is never made: the attention op runs with the routing probabilities as values, so memory stays linear in N. A blend
λ I + (1 − λ) S is Π' = λ R + (1 − λ) Π. Probabilities are averaged, not logits, and top-k comes after.

Letters: B batch, N tokens, M keys, C width, H heads, K kv heads, D head dim, E units.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from headwise.attach.gates import TINY
from headwise.attention import attention as attend
from headwise.checks import finite, whole
from headwise.errors import RouteError
from headwise.route._router_base import Rule, Seen
from headwise.route._routing import Routing
from headwise.route._rules import SoftmaxTopK

Kind = Literal["similarity", "cosine", "attention", "posterior"]
BLOCK = 1 << 22  # entries of S that statistics hold at once


@dataclass
class GraphCache:
    """What decoding keeps of earlier tokens: probabilities R (B, M, E), keys of the similarity, and which were real."""

    probs: Tensor | None = None
    keys: Tensor | None = None
    real: Tensor | None = None

    def extend(self, name: str, new: Tensor) -> Tensor:
        """Append along the tokens and give all."""
        old = getattr(self, name)
        setattr(self, name, new if old is None else torch.cat([old, new], dim=1))
        return getattr(self, name)


@dataclass(frozen=True, kw_only=True)
class Graph(Rule):
    """A router whose tokens share decisions. `base` gives R; any rule with a distribution over units serves.

    `tau` sharpens (below 1) or flattens S; `blend` λ in [0, 1] keeps that much of the token's own routing (1 is the base
    router); `detach_graph` stops gradients through S; `exclude_sink` leaves the first tokens of each row out of S, which
    attention sinks would otherwise make everyone follow; `renorm` as in SoftmaxTopK. In a causal model S is too.
    """

    base: Rule = field(default_factory=lambda: SoftmaxTopK(k=2))
    graph: Kind = "similarity"
    rank: int = 0
    tau: float = 1.0
    blend: float = 0.0
    sigma: float = 1.0
    detach_graph: bool = False
    exclude_sink: int = 0
    renorm: bool = True
    decodes: ClassVar[bool] = True

    def check(self) -> None:
        """See the class."""
        if self.graph not in get_args(Kind):
            raise RouteError(f"graph is {self.graph!r}; it must be one of {', '.join(get_args(Kind))}")
        for name in ("tau", "sigma"):
            if finite(name, getattr(self, name), RouteError) <= 0:
                raise RouteError(f"{name} is {getattr(self, name)}; it must be above 0")
        if not 0 <= finite("blend", self.blend, RouteError) <= 1:
            raise RouteError(f"blend is {self.blend}; it must lie in [0, 1]")
        whole("rank", self.rank, 0, RouteError)
        whole("exclude_sink", self.exclude_sink, 0, RouteError)

    @property
    def future(self) -> bool:  # type: ignore[override]
        """As the base router; S itself is causal in a causal model."""
        return self.base.future

    @property
    def reads_heads(self) -> bool:
        """The attention graphs do."""
        return self.graph in ("attention", "posterior")

    def check_experts(self, experts: int) -> None:
        """As the base router."""
        self.base.check_experts(experts)

    def parameters(self, width: int, experts: int, generator: torch.Generator | None) -> dict[str, Tensor]:
        """Those of the base, and W_s (C, C) or A, B (C, rank): near the identity, a cosine-like start."""
        mine: dict[str, Tensor] = {}
        if self.graph == "similarity" and self.rank:
            for name in ("A", "B"):
                mine[name] = torch.zeros(width, self.rank).normal_(0.0, width**-0.5, generator=generator)
            mine["B"] = mine["A"].clone()
        elif self.graph == "similarity":
            mine["W_s"] = torch.eye(width)
        return self.base.parameters(width, experts, generator) | mine

    def buffers(self, experts: int) -> dict[str, Tensor]:
        """Those of the base."""
        return self.base.buffers(experts)

    def route(
        self,
        seen: Seen,
        *,
        qk: tuple[Tensor, Tensor] | None = None,
        attention: Tensor | None = None,
        sources: Tensor | None = None,
        mask: Tensor | None = None,
        cache: GraphCache | None = None,
        statistics: bool = False,
    ) -> Routing:
        """See the class. `qk`: q (B, H, N, D) and k (B, K, M, D) after RoPE; or `attention` (B, H, N, M), for short rows.

        `sources` (B, H, M, C): what each key's token writes, for "posterior". `mask` (B, 1, N, M) bool replaces the
        causal rule, for packed rows. `cache`: decode behind earlier calls. `statistics` adds `extra`:
        concentration (mean Σ_j S_ij²) and sink_share (mean share of the first real token).
        """
        own = self.base(seen)
        R, real = own.probs, seen.real
        if cache is not None:
            R = cache.extend("probs", R)
            real = real if real is None and cache.real is None else cache.extend("real", _all_real(seen))
        edges = self._edges(seen, qk, sources, cache, R.shape[1]) if attention is None else None
        self._check_shapes(seen, edges, attention, R.shape[1])
        look = _Look(edges, attention, _visible(seen, real, mask, R.shape[1]), self.detach_graph)
        mixed = self._mixed(look, R, real, own.probs)
        if self.blend:
            mixed = self.blend * own.probs + (1 - self.blend) * mixed
        extra = {**own.extra, **(look.statistics(real) if statistics else {})}
        return self._chosen(own, mixed, extra)

    def _chosen(self, own: Routing, mixed: Tensor, extra: dict[str, Tensor]) -> Routing:
        order = mixed.detach().sort(dim=-1, descending=True, stable=True).indices[..., : own.k]
        weight = mixed.gather(-1, order)
        if self.renorm:
            weight = weight / (weight.sum(-1, keepdim=True) + TINY)
        return replace(own, index=order, weight=weight, probs=mixed, active=None, extra=extra)

    def _mixed(self, look: _Look, R: Tensor, real: Tensor | None, own: Tensor) -> Tensor:
        """Π (B, N, E); rows that see only excluded tokens keep their own routing."""
        if not self.exclude_sink:
            return look.mix(R)
        places = torch.arange(R.shape[1], device=R.device)[None] if real is None else real.long().cumsum(1) - 1
        counts = (places >= self.exclude_sink).to(R.dtype)[..., None].expand(len(R), -1, 1)
        both = look.mix(torch.cat([R * counts, counts], dim=-1))
        part, mass = both[..., :-1], both[..., -1:]
        return torch.where(mass > 1e-6, part / mass.clamp(min=1e-6), own)

    def _edges(
        self, seen: Seen, qk: tuple[Tensor, Tensor] | None, sources: Tensor | None, cache: GraphCache | None, M: int
    ) -> tuple[Tensor, Tensor, float]:
        """q (B, H, N, D), k (B, K, M, D) and the scale whose softmax is S."""
        u, weights = seen.x, seen.weights
        if self.graph == "cosine":
            q = k = F.normalize(u, dim=-1)
            scale = 1 / self.tau
        elif self.graph == "similarity" and self.rank:
            q, k = u @ weights["A"].to(u.dtype), u @ weights["B"].to(u.dtype)
            scale = 1 / (self.tau * self.rank**0.5)
        elif self.graph == "similarity":
            q, k, scale = u @ weights["W_s"].to(u.dtype), u, 1 / (self.tau * u.shape[-1] ** 0.5)
        else:
            return self._attention_edges(u, qk, sources)
        k = k if cache is None else cache.extend("keys", k)
        return q[:, None], k[:, None], scale

    def _attention_edges(
        self, u: Tensor, qk: tuple[Tensor, Tensor] | None, sources: Tensor | None
    ) -> tuple[Tensor, Tensor, float]:
        if qk is None:
            raise RouteError(
                f"graph {self.graph!r} needs qk=(q, k) of the block's attention, or attention=(B, H, N, M)"
            )
        q, k = (part.to(u.dtype) for part in qk)
        scale = q.shape[-1] ** -0.5 / self.tau
        if self.graph == "attention":
            return q, k, scale
        if sources is None or sources.ndim != 4 or sources.shape[-1] != u.shape[-1]:
            raise RouteError(f"graph 'posterior' needs sources=(B, H, M, {u.shape[-1]}): what each head writes per key")
        k, to = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1), sources.to(u.dtype)
        seen_u = u[:, None].expand(-1, q.shape[1], -1, -1) / self.sigma**2
        q = torch.cat([q * scale, seen_u, torch.ones_like(q[..., :1])], dim=-1)
        return q, torch.cat([k, to, -to.square().sum(-1, keepdim=True) / (2 * self.sigma**2)], dim=-1), 1.0

    def _check_shapes(self, seen: Seen, edges: tuple | None, attention: Tensor | None, M: int) -> None:
        B, N, _ = seen.x.shape
        if attention is not None:
            if attention.ndim != 4 or (attention.shape[0], *attention.shape[2:]) != (B, N, M):
                raise RouteError(f"attention has shape {tuple(attention.shape)}; it must be ({B}, heads, {N}, {M})")
            return
        assert edges is not None
        q, k, _ = edges
        if (q.shape[0], q.shape[2]) != (B, N) or (k.shape[0], k.shape[2]) != (B, M) or q.shape[1] % k.shape[1]:
            raise RouteError(
                f"q {tuple(q.shape)} and k {tuple(k.shape)} must be ({B}, H, {N}, D) and ({B}, K, {M}, D), H a multiple of K"
            )


@dataclass
class _Look:
    """S as something that mixes values, without being made."""

    edges: tuple[Tensor, Tensor, float] | None
    matrix: Tensor | None
    visible: dict[str, Any]
    detached: bool

    def mix(self, values: Tensor) -> Tensor:
        """Σ_j S_ij values_j: values (B, M, F) -> (B, N, F)."""
        if self.matrix is not None:
            S = self.matrix.to(values.dtype).mean(1)
            return (S.detach() if self.detached else S) @ values
        assert self.edges is not None
        q, k, scale = self.edges
        if self.detached:
            q, k = q.detach(), k.detach()
        # Fused kernels want one size of head for q, k and v: zeros change neither logits nor the part that is read.
        size = -(-max(q.shape[-1], values.shape[-1]) // 8) * 8
        q, k = (F.pad(part, (0, size - part.shape[-1])) for part in (q, k))
        v = F.pad(values, (0, size - values.shape[-1]))[:, None].expand(-1, k.shape[1], -1, -1)
        out = attend(q, k, v, scale=scale, **self.visible)
        assert isinstance(out, Tensor)
        return out.mean(1)[..., : values.shape[-1]]

    @torch.no_grad()
    def statistics(self, real: Tensor | None) -> dict[str, Tensor]:
        """Means over real rows, from a few rows of S at a time."""
        squares, sinks = [], []
        for S in self._rows():
            squares.append(S.square().sum(-1))
            first = torch.zeros(len(S), dtype=torch.long) if real is None else real.to(torch.uint8).argmax(1).cpu()
            sinks.append(S[torch.arange(len(S)), :, first.to(S.device)])
        concentration, sink = torch.cat(squares, dim=1), torch.cat(sinks, dim=1)
        rows = torch.ones_like(sink, dtype=torch.bool) if real is None else real[:, -sink.shape[1] :]
        return {"concentration": concentration[rows].mean(), "sink_share": sink[rows].mean()}

    def _rows(self) -> Any:
        """Blocks (B, n, M) of S."""
        if self.matrix is not None:
            yield self.matrix.float().mean(1)
            return
        assert self.edges is not None
        q, k, scale = self.edges
        k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
        N, M = q.shape[2], k.shape[2]
        step = max(1, BLOCK // (q.shape[0] * q.shape[1] * M))
        for begin in range(0, N, step):
            end = min(begin + step, N)
            logits = (q[:, :, begin:end] @ k.mT * scale).masked_fill(~self._mask(begin, end, N, M, q.device), -1e30)
            yield logits.softmax(-1).mean(1)

    def _mask(self, begin: int, end: int, N: int, M: int, device: torch.device) -> Tensor:
        """Which keys the queries begin..end see, (B or 1, 1, n, M)."""
        if self.visible.get("mask") is not None:
            return self.visible["mask"][:, :, begin:end]
        columns = torch.arange(M, device=device)
        sees = torch.ones(1, 1, end - begin, M, dtype=torch.bool, device=device)
        if self.visible["causal"]:
            sees = columns <= torch.arange(begin, end, device=device)[:, None] + M - N
            sees = sees[None, None]
        start = self.visible.get("start")
        return sees if start is None else sees & (columns >= start[:, None, None, None])


def _all_real(seen: Seen) -> Tensor:
    return torch.ones(seen.x.shape[:2], dtype=torch.bool, device=seen.x.device) if seen.real is None else seen.real


def _visible(seen: Seen, real: Tensor | None, mask: Tensor | None, M: int) -> dict[str, Any]:
    """Who may be followed, as the attention op takes it: causal and from the first real token on, or a mask of keys."""
    if mask is not None:
        keys = mask if real is None else mask & real[:, None, None]
        own = torch.eye(mask.shape[2], M, dtype=torch.bool, device=mask.device)  # no row of S may be empty
        return {"causal": seen.causal, "mask": keys | (own if mask.shape[2] == M else torch.zeros_like(own))}
    if real is None:
        return {"causal": seen.causal}
    if seen.causal:
        return {"causal": True, "start": torch.where(real.any(1), real.to(torch.uint8).argmax(1), 0)}
    return {"causal": False, "mask": real[:, None, None].expand(-1, 1, seen.x.shape[1], -1)}
