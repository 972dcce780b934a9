"""The one hook: an attention function and its mask function, registered with transformers under `headwise_<base>`.

A model keeps its own attention (`base`: sdpa, eager, flash, flex); headwise stands in front of it. `HeadCall` is what
every intervention sees: q, k, v after RoPE, the mask, where the tokens stand, and `attend`, which runs the base
attention or, under a KV plan, the headwise op on the layer's ragged cache.

Letters: B batch, H query heads, K kv heads, G = H/K, N queries, M key columns, D head dim.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from headwise.attention import KVGroup, Queries, split_by_pattern
from headwise.attention.backends import Request, choose, serve, take_heads
from headwise.attention.groups import Table, key_positions, query_heads
from headwise.errors import AttachError
from headwise.plan import Full, Pattern

if TYPE_CHECKING:
    from headwise.attach.site import Site

PREFIX = "headwise_"
PLAN_BASES = ("sdpa", "eager")  # bases whose mask is a tensor that the op can read
INEXPRESSIBLE = ("softcap", "s_aux", "position_bias")  # arguments by which a model changes the softmax itself


def register(base: str) -> str:
    """Register attention and mask together for one base (alone, an attention function would lose causality)."""
    name = PREFIX + base
    if base != "eager" and base not in ALL_ATTENTION_FUNCTIONS:
        raise AttachError(f"attention implementation {base!r} is not registered with transformers")
    if base not in ALL_MASK_ATTENTION_FUNCTIONS:
        raise AttachError(
            f"attention implementation {base!r} has no mask function; load the model with 'sdpa' or 'eager'"
        )
    AttentionInterface.register(name, headwise_attention)
    AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[base])
    return name


def base_function(module: nn.Module, base: str) -> Callable:
    """The attention function that the model would have used without headwise."""
    if base != "eager":
        return ALL_ATTENTION_FUNCTIONS[base]
    function = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    if function is None:
        raise AttachError(
            f"{type(module).__name__} has no eager_attention_forward; load the model with attn_implementation='sdpa'"
        )
    return function


def inexpressible(base: str, options: Mapping[str, object]) -> str | None:
    """Why the headwise op cannot stand in for the base attention of calls with these options; None where it can."""
    if base not in PLAN_BASES:
        return f"the model has attn_implementation {base!r}; it must be one of {PLAN_BASES}, whose mask can be read"
    used = [name for name in INEXPRESSIBLE if options.get(name) is not None]
    return f"the model passes {used} to its attention, which the headwise op cannot express" if used else None


def headwise_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: object
) -> tuple[Tensor, Tensor | None]:
    """transformers' attention function: out (B, N, H, D) and, from eager bases, the weights."""
    site: Site | None = module.__dict__.get("_headwise_site")
    if site is not None and not site.active:
        return site.base(module, query, key, value, attention_mask, **kwargs)
    if site is None:
        base = str(module.config._attn_implementation).removeprefix(PREFIX)  # type: ignore[union-attr]
        return base_function(module, base)(module, query, key, value, attention_mask, **kwargs)
    return site.run(module, query, key, value, attention_mask, kwargs)


@dataclass
class HeadCall:
    """One attention call of one layer, as interventions see it.

    q (B, H, N, D); k, v (B, K, M, D) as the model gives them (under a KV plan only the new columns, M = N).
    """

    site: Site
    module: nn.Module
    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor | None
    options: dict[str, object]
    groups: list[KVGroup] | None = None  # set under a KV plan
    table: Table | None = None  # then in a decode step whose addresses stand on the device, in the place of groups
    past: int = 0  # columns before the first query
    first_column: int = 0  # of k and v as given: a sliding cache has let go of the columns before it
    hidden: Tensor | None = None  # (B, N, C) input of the attention module, where a router or observer `needs_hidden`
    _start: Tensor | None = field(default=None, repr=False)
    _start_known: bool = False

    @property
    def layer(self) -> int:
        """Layer number."""
        return self.site.layer

    @property
    def decoding(self) -> bool:
        """One new token after others: the decode phase. A prompt's first token or a chunk is prefill."""
        return self.q.shape[2] == 1 and self.past > 0

    @property
    def start(self) -> Tensor | None:
        """First real column of each row (B,), None without left padding."""
        if not self._start_known:
            self._start, self._start_known = self.site.controller.row_start(self.mask), True
        return self._start

    def positions(self) -> Tensor:
        """Positions of the queries among the real tokens of their row, (1 or B, N)."""
        return self.queries().positions(self.q.device)

    def real_tokens(self) -> Tensor | None:
        """Which query columns are no padding (B, N) bool; None if all are."""
        return self.site.controller.real_columns(self.mask, self.past, self.q.shape[2], self.q.shape[0])

    def queries(self) -> Queries:
        """Where the queries stand, with the model's mask as bool."""
        mask = None if self.mask is None or self.table is not None else as_bool(self.mask)
        if mask is not None and self.first_column:
            mask = nn.functional.pad(mask, (self.first_column, 0))
        return Queries(self.q.shape[2], self.past, self.start, mask, self.causal)

    @property
    def causal(self) -> bool:
        """Does a token see only what came before it?"""
        stated = self.options.get("is_causal")
        return bool(getattr(self.module, "is_causal", True) if stated is None else stated)

    @property
    def scale(self) -> float:
        """Factor on the logits."""
        scale = self.options.get("scaling")
        return float(scale) if scale is not None else self.q.shape[-1] ** -0.5  # type: ignore[arg-type]

    @property
    def own_values(self) -> Tensor:
        """Values of the query tokens themselves, (B, K, N, Dv)."""
        N = self.q.shape[2]
        at = 0 if self.v.shape[2] == N else self.past - self.first_column
        return self.v[:, :, at : at + N]

    def key_groups(self) -> list[KVGroup]:
        """What the queries read, as the op takes it; one dense group without a plan."""
        if self.table is not None:
            return self.table.groups()
        if self.groups is not None:
            return self.groups
        if self.first_column:
            return self.dense_groups([Full()] * self.k.shape[1])
        return [KVGroup(tuple(range(self.k.shape[1])), self.k, self.v)]

    def dense_groups(self, patterns: Sequence[Pattern]) -> list[KVGroup]:
        """Groups of kv heads with equal patterns over the keys as the model gives them."""
        groups = split_by_pattern(self.k, self.v, patterns)
        if not self.first_column:
            return groups
        positions = self._column_positions()
        return [replace(group, positions=positions, tail=self.k.shape[2]) for group in groups]

    @property
    def inexpressible(self) -> str | None:
        """Why the headwise op cannot stand in for the base attention of this call; None where it can."""
        return inexpressible(self.site.controller.base, self.options)

    def need_expressible(self, what: str) -> None:
        """Refuse a call whose softmax or mask the headwise op cannot reproduce; `what` needs it."""
        if why := self.inexpressible:
            raise AttachError(f"layer {self.layer}: {what} cannot be had, because {why}")

    def attend_pattern(self, pattern: Pattern) -> Tensor:
        """Attention output (B, N, H, Dv) in which every head reads its keys by `pattern`, differentiable, by the headwise op."""
        self.need_expressible(f"pattern {pattern}")
        if self.groups is not None:
            raise AttachError(
                f"layer {self.layer}: pattern {pattern} cannot be read from a cache that a KV plan has already thinned out"
            )
        return replace(self, groups=self.dense_groups([pattern] * self.k.shape[1])).attend()

    def attend(
        self,
        q: Tensor | None = None,
        *,
        key_weight: Callable[[Tensor], Tensor] | None = None,
        ones: bool = False,
        kv_heads: Sequence[int] | None = None,
    ) -> Tensor:
        """Attention output (B, N, H, Dv) by the base attention, or by the op under a plan.

        `q` replaces the queries. `key_weight` maps key positions (.., M) to factors on the values, so that the result
        is sum_j A_ij w_j v_j with the softmax untouched; with `ones` the values are all 1 and the result is the
        probability mass sum_j A_ij w_j. `kv_heads` restricts the work to some kv heads and their query heads.
        """
        return self._attend(self.q if q is None else q, key_weight, ones, kv_heads)[0]

    def attend_served(self, q: Tensor, gates: Tensor) -> Tensor | None:
        """gates (B, N, H) times the attention output (B, N, H, Dv), by a kernel that skips queries whose gate is 0.

        None where there is no such kernel or it would not pay: then `attend` and multiply.
        """
        if not q.is_cuda or self.groups is not None or self.first_column or self.past or self.mask is not None:
            return None
        if self.inexpressible:
            return None
        gate = gates.transpose(1, 2)
        groups, dropout = tuple(self.key_groups()), float(self.options.get("dropout") or 0.0)  # type: ignore[arg-type]
        request = Request(
            q, groups, self.queries(), self.scale, gate != 0, gate, dropout=dropout, whole=(self.k, self.v)
        )
        backend, _ = choose(request, "auto")
        return backend.run(request)[0].transpose(1, 2) if backend.name == "triton" else None

    def _attend(
        self,
        q: Tensor,
        key_weight: Callable[[Tensor], Tensor] | None = None,
        ones: bool = False,
        kv_heads: Sequence[int] | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        if self.groups is not None:
            return self._attend_groups(q, key_weight, ones, kv_heads).transpose(1, 2).contiguous(), None
        k, v = self.k, self.v
        if key_weight is not None or ones:
            v = _weighted(v, self._column_positions(), key_weight, ones)
        if kv_heads is not None:
            q, k, v = _query_slice(q, kv_heads, k.shape[1]), k[:, list(kv_heads)], v[:, list(kv_heads)]
        return self.site.base(self.module, q, k, v, self.mask, **self.options)

    def _attend_groups(
        self, q: Tensor, key_weight: Callable | None, ones: bool, kv_heads: Sequence[int] | None
    ) -> Tensor:
        plain, queries = key_weight is None and not ones, self.queries()
        dropout = float(self.options.get("dropout") or 0.0)  # type: ignore[arg-type]
        table = self.table if plain and not dropout else None
        groups = [] if table is not None else self.key_groups()
        if not plain:
            groups = [g.with_values(_weighted(g.v, key_positions(g, queries), key_weight, ones)) for g in groups]
            if any(g.compensation is not None for g in groups):
                raise AttachError("key groups cannot be re-weighted under a plan with compensation tokens")
        out, _ = serve(Request(q, tuple(groups), queries, self.scale, dropout=dropout, table=table))
        return out if kv_heads is None else _query_slice(out, kv_heads, self.site.kv_heads)

    def _column_positions(self) -> Tensor:
        columns = torch.arange(self.k.shape[2], device=self.k.device)[None, None] + self.first_column
        return columns if self.start is None else columns - self.start[:, None, None]


def as_bool(mask: Tensor) -> Tensor:
    """True = visible, from the boolean mask of sdpa or the additive one of eager."""
    return mask if mask.dtype == torch.bool else mask == 0


def _weighted(v: Tensor, positions: Tensor, key_weight: Callable | None, ones: bool) -> Tensor:
    values = torch.ones_like(v) if ones else v
    if key_weight is None:
        return values
    return values * key_weight(positions)[..., None].to(v.dtype)


def _query_slice(x: Tensor, kv_heads: Sequence[int], total: int) -> Tensor:
    """Query heads (dim 1) of some of `total` kv heads."""
    return take_heads(x, query_heads(tuple(kv_heads), x.shape[1] // total))
