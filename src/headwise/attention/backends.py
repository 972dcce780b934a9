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
        """One library call where that serves all heads, else group by group."""
        notes = request.notes
        if "one_call" not in notes:
            notes["one_call"] = _one_call(request)
        is_causal = notes["one_call"]
        if is_causal is None:
            attend = functools.partial(sdpa.attend, need_lse=request.need_lse, dropout=request.dropout)
            return over_groups(attend, request)
        (group,) = request.groups
        out = sdpa.fused(request.q, group.k, group.v, request.scale, dropout=request.dropout, is_causal=is_causal)
        return finish(out, request.active, request.gate), None


def _one_call(request: Request) -> bool | None:
    """`sdpa.one_call` of a single group that holds all heads in order, if nothing but the output is wanted."""
    alone = len(request.groups) == 1 and not request.need_lse and not request.compensated
    if not alone or request.groups[0].heads != tuple(range(request.kv_heads)):
        return None
    return sdpa.one_call(request.groups[0], request.queries)


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
    return finish(out, request.active, request.gate), lse


def finish(out: Tensor, active: Tensor | None, gate: Tensor | None) -> Tensor:
    """Apply gate and active (B, H, N) to an output (B, H, N, Dv) that nobody else holds.

    What is not served is exactly 0, whatever was computed there and whatever the gate says.
    """
    if gate is None and active is None:
        return out
    if gate is not None:
        recorded = torch.is_grad_enabled() and (out.requires_grad or gate.requires_grad)
        factor = gate.unsqueeze(-1)
        out = out * factor.to(out.dtype) if recorded else out.mul_(factor)
    return out if active is None else torch.where(active.unsqueeze(-1), out, 0.0)


def _grouped(kernel: GroupKernel, request: Request) -> tuple[Tensor, Tensor | None]:
    q, groups = request.q, request.groups
    if len(groups) == 1 and groups[0].heads == tuple(range(request.kv_heads)):
        return kernel(q, groups[0], request.queries, request.scale)
    mine, places = _arranged(tuple(tuple(group.heads) for group in groups), q.shape[1] // request.kv_heads)
    found = [
        kernel(take_heads(q, heads), group, request.queries, request.scale)
        for heads, group in zip(mine, groups, strict=True)
    ]
    out = _joined([out for out, _ in found], places)
    lses = [lse for _, lse in found if lse is not None]
    # unasked, only groups with a compensation token have one
    return out, _joined(lses, places) if len(lses) == len(found) else None


def _joined(parts: list[Tensor], places: tuple[int, ...] | None) -> Tensor:
    """Heads (dim 1) of all groups, in order."""
    joined = torch.cat(parts, dim=1)
    return joined if places is None else joined.index_select(1, _index(places, joined.device))


@functools.lru_cache(maxsize=4096)
def _arranged(kv_heads: tuple[tuple[int, ...], ...], G: int) -> tuple[list[tuple[int, ...]], tuple[int, ...] | None]:
    """Query heads of each group, and where each head stands when the groups' outputs are joined; None if in order."""
    mine = [tuple(query_heads(heads, G)) for heads in kv_heads]
    order = [head for heads in mine for head in heads]
    places = tuple(sorted(range(len(order)), key=order.__getitem__))
    return mine, None if order == sorted(order) else places


def take_heads(x: Tensor, heads: Sequence[int]) -> Tensor:
    """Heads (dim 1) of x; neighbouring ones are a view, others are gathered."""
    heads = tuple(heads)
    run = _run(heads)
    return x.index_select(1, _index(heads, x.device)) if run is None else x[:, run]


@functools.lru_cache(maxsize=4096)
def _run(heads: tuple[int, ...]) -> slice | None:
    """Neighbouring heads as a slice."""
    first, last = heads[0], heads[-1]
    return slice(first, last + 1) if heads == tuple(range(first, last + 1)) else None


@functools.lru_cache(maxsize=4096)
def _index(numbers: tuple[int, ...], device: torch.device) -> Tensor:
    """An index on the device, copied there once; a normal tensor, which autograd may keep, wherever it is made."""
    with torch.inference_mode(False):
        return torch.tensor(numbers, device=device)
