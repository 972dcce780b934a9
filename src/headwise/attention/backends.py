"""Backends of the op: what each can do, when it is the right one, and how it runs.

A backend says why it refuses a request, or why it would be chosen unasked. `auto` takes the first that would; `sdpa`
always would. Adding a backend is one class and its place in `backends`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from torch import Tensor

from headwise.attention import reference, sdpa
from headwise.attention.groups import KVGroup, Queries, Table, query_heads
from headwise.errors import AttentionError

GroupKernel = Callable[[Tensor, KVGroup, Queries, float], tuple[Tensor, Tensor | None]]


@dataclass(frozen=True)
class Ran:
    """Which backend ran, and why that one."""

    backend: str
    reason: str


@dataclass(frozen=True)
class Request:
    """One call of the op, checked: q (B, H, N, D), groups that hold each kv head once, and what is wanted of it."""

    q: Tensor
    groups: tuple[KVGroup, ...]
    queries: Queries
    scale: float
    active: Tensor | None = None
    gate: Tensor | None = None
    need_lse: bool = False
    dropout: float = 0.0
    whole: tuple[Tensor, Tensor] | None = None  # k, v of all kv heads in order, where the groups were split from such
    table: Table | None = None  # in the place of groups: a decode step whose addresses stand on the device
    notes: dict = field(default_factory=dict, compare=False, repr=False)  # what a backend found out about this call

    @property
    def kv_heads(self) -> int:
        """Number of kv heads over all groups."""
        if self.table is not None:
            return self.table.filled.shape[1]
        return sum(len(g.heads) for g in self.groups)

    @property
    def needs_grad(self) -> bool:
        """Will somebody ask for gradients?"""
        tensors = [self.q, *(t for g in self.groups for t in (g.k, g.v))]
        return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)

    @property
    def compensated(self) -> bool:
        """Does a group carry compensation tokens?"""
        return any(g.compensation is not None for g in self.groups)

    @property
    def selected(self) -> bool:
        """Do lists say which keys are read?"""
        return any(g.selection is not None for g in self.groups)


class Backend(Protocol):
    """What `attention` needs of a backend."""

    name: str

    def refuse(self, request: Request) -> str | None:
        """Why it cannot serve this request; None if it can."""

    def prefer(self, request: Request) -> str | None:
        """Why it should serve this request unasked; None if another should."""

    def run(self, request: Request) -> tuple[Tensor, Tensor | None]:
        """out (B, H, N, Dv) with inactive queries 0 and gates applied; lse (B, H, N) if wanted."""


class Reference:
    """The oracle: dense masks, any device, slow."""

    name = "reference"

    def refuse(self, request: Request) -> str | None:
        """No dropout."""
        return "it has no dropout" if request.dropout else None

    def prefer(self, request: Request) -> str | None:
        """Never unasked."""
        return None

    def run(self, request: Request) -> tuple[Tensor, Tensor | None]:
        """Group by group."""
        return over_groups(reference.attend, request)


class Sdpa:
    """Library kernels over groups of like heads."""

    name = "sdpa"

    def refuse(self, request: Request) -> str | None:
        """Serves everything but dropout together with log-sum-exp."""
        if request.dropout and (request.need_lse or request.compensated):
            return "dropout and log-sum-exp do not go together"
        return None

    def prefer(self, request: Request) -> str | None:
        """Always: the default."""
        if request.need_lse or request.compensated:
            return "log-sum-exp is needed: logits of a few rows at a time"
        kinds = {"full" if g.pattern.keeps_all else "window" for g in request.groups}
        served = f"{len(request.groups)} group(s) of like heads ({', '.join(sorted(kinds))})"
        return f"library kernels over {served} on {request.q.device.type}"

    def run(self, request: Request) -> tuple[Tensor, Tensor | None]:
        """Group by group."""
        return over_groups(functools.partial(sdpa.attend, need_lse=request.need_lse, dropout=request.dropout), request)


class Flex:
    """FlexAttention, when asked for: compiling takes tens of seconds."""

    name = "flex"

    def refuse(self, request: Request) -> str | None:
        """Dense keys only, no log-sum-exp, no backward on CPU."""
        if request.dropout:
            return "it has no dropout"
        if request.need_lse or request.compensated or any(g.positions is not None for g in request.groups):
            return "it takes dense keys without compensation or log-sum-exp"
        if request.selected or request.queries.packed:
            return "it takes no lists of selected keys and no packed rows"
        if not request.q.is_cuda and request.needs_grad:
            return "it has no backward on CPU"
        return None

    def prefer(self, request: Request) -> str | None:
        """Never unasked."""
        return None

    def run(self, request: Request) -> tuple[Tensor, Tensor | None]:
        """Group by group."""
        from headwise.attention import flex

        return over_groups(flex.attend, request)


@functools.cache
def backends() -> tuple[Backend, ...]:
    """All backends, in the order in which `auto` asks them."""
    from headwise.attention.own import Own

    return Own(), Sdpa(), Flex(), Reference()


def choose(request: Request, name: str) -> tuple[Backend, Ran]:
    """The backend for a request and the reason. Raises `AttentionError` for an unknown or unable one."""
    for backend in backends():
        if name == backend.name:
            why_not = backend.refuse(request)
            if why_not is not None:
                raise AttentionError(f"backend={name!r} cannot serve this call: {why_not}; use backend='auto'")
            return backend, Ran(name, "asked for")
        if name == "auto" and backend.refuse(request) is None:
            reason = backend.prefer(request)
            if reason is not None:
                return backend, Ran(backend.name, reason)
    if name == "auto":
        refusals = "; ".join(f"{b.name}: {b.refuse(request)}" for b in backends())
        raise AttentionError(f"no backend can serve this call ({refusals})")
    raise AttentionError(f"backend={name!r} is unknown; choose auto, {', '.join(b.name for b in backends())}")


def serve(request: Request) -> tuple[Tensor, Tensor | None]:
    """(out, lse) of a request that is known to be sound, by the backend of choice; `op.attention` checks one first."""
    if request.table is not None:
        own = backends()[0]
        if own.refuse(request) is None:
            return own.run(request)
        request = replace(request, groups=tuple(request.table.groups()), table=None)
    return choose(request, "auto")[0].run(request)


def over_groups(kernel: GroupKernel, request: Request) -> tuple[Tensor, Tensor | None]:
    """Run every group on its own query heads, put the heads back in order, apply `active` and `gate`."""
    out, lse = _grouped(kernel, request)
    if request.active is not None:
        out = torch.where(request.active[..., None], out, torch.zeros((), dtype=out.dtype, device=out.device))
    if request.gate is not None:
        out = out * request.gate[..., None].to(out.dtype)
    return out, lse


def _grouped(kernel: GroupKernel, request: Request) -> tuple[Tensor, Tensor | None]:
    q, groups = request.q, request.groups
    G = q.shape[1] // request.kv_heads
    if len(groups) == 1 and groups[0].heads == tuple(range(request.kv_heads)):
        return kernel(q, groups[0], request.queries, request.scale)
    order: list[int] = []
    outs, lses = [], []
    for group in groups:
        heads = query_heads(group.heads, G)
        out, lse = kernel(take_heads(q, heads), group, request.queries, request.scale)
        order += heads
        outs.append(out)
        lses.append(lse)
    out = _in_order(torch.cat(outs, dim=1), order)
    found = [lse for lse in lses if lse is not None]
    if len(found) < len(lses):  # unasked, only groups with a compensation token have one
        return out, None
    return out, _in_order(torch.cat(found, dim=1), order)


def take_heads(x: Tensor, heads: Sequence[int]) -> Tensor:
    """Heads (dim 1) of x; neighbouring ones are a view, others are gathered."""
    if list(heads) == list(range(heads[0], heads[-1] + 1)):
        return x[:, heads[0] : heads[-1] + 1]
    return x.index_select(1, _index(tuple(heads), x.device))


def _in_order(x: Tensor, order: list[int]) -> Tensor:
    """Undo an order of heads (dim 1)."""
    if order == sorted(order):
        return x
    places = sorted(range(len(order)), key=order.__getitem__)
    return x.index_select(1, _index(tuple(places), x.device))


@functools.lru_cache(maxsize=4096)
def _index(numbers: tuple[int, ...], device: torch.device) -> Tensor:
    """An index on the device, copied there once; a normal tensor, which autograd may keep, wherever it is made."""
    with torch.inference_mode(False):
        return torch.tensor(numbers, device=device)
