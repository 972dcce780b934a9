"""What a token is worth to a kv head, and how heads share their room: functions that a `Selected` pattern names.

    @key_scorer("observation")
    def observation(ask: Ask, *, window: int = 32, ...) -> Tensor:      # scores (B, Kg, S)
    @splitter("pooled")
    def pooled(ask: Ask, scores, candidates, room, *, floor: float = 0.2) -> Tensor:      # tokens (B, Kg), at most `room` (B,) a row

A cache calls them once for each chunk of a prompt, with everything that is held at that moment, and knows none of them. Options
are keyword-only, `int`, `float` or `str`, with defaults, and are written in brackets: "observation(window=16,pool=avg)".

Letters: B batch, H query heads, Kg kv heads of one group, G query heads a kv head, N queries, S slots, D head dim.
"""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

from headwise import registry
from headwise.attention.groups import KVGroup, Queries, key_positions, visible
from headwise.errors import PlanError
from headwise.plan import Pattern, Selected

ELEMENTS = 1 << 25  # of one block of logits


@dataclass(frozen=True)
class Ask:
    """What a key scorer may look at, when a chunk of the prompt has been read.

    q (B, Kg · G, N, D) are the chunk's queries; `group` holds all keys at hand, k, v (B, Kg, S, D), in order of position, empty slots
    and padding first. `queries` says where the queries stand; `seen` are the real tokens that each row has seen. `layer` counts from 0.
    """

    q: Tensor | None
    group: KVGroup
    queries: Queries
    scale: float
    layer: int
    pattern: Selected
    seen: tuple[int, ...]
    _masses: dict[int, Tensor] = field(default_factory=dict, repr=False)

    @property
    def positions(self) -> Tensor:
        """Position of every slot, (B, Kg, S) int64; negative for empty slots and padding."""
        return key_positions(self.group, self.queries).expand(*self.group.k.shape[:3])

    @property
    def lengths(self) -> Tensor:
        """`seen` as a tensor, (B, 1, 1) int64."""
        return torch.tensor(self.seen, device=self.group.k.device)[:, None, None]

    def masses(self, window: int) -> Tensor:
        """Attention that each query head pays to each key, the mean over the last `window` queries: (B, Kg, G, S) float32.

            c_j = 1/L Σ_i softmax_j(scale · q_i·k_j),   i the last L = min(window, N) real queries of the row

        Keys that a query cannot see, padding and empty slots get exactly 0.
        """
        if window not in self._masses:
            self._masses[window] = self._mass(window)
        return self._masses[window]

    def _mass(self, window: int) -> Tensor:
        if self.q is None:
            raise PlanError(f"the key scorer of {self.pattern} needs queries, and none were given")
        B, Kg, S, D = self.group.k.shape
        N, Hg = self.q.shape[2], self.q.shape[1]
        last = self.queries.rows(max(0, N - window), N)
        q = self.q[:, :, N - last.count :].float().view(B, Kg, Hg // Kg, last.count, D) * self.scale
        seen = visible(self.group, last).expand(B, -1, -1, -1).expand(-1, Kg, -1, -1)  # (B, Kg, L, S)
        step = max(1, ELEMENTS // max(1, B * Hg // Kg * last.count * S))
        parts = [self._block(q[:, at : at + step], seen[:, at : at + step], at, step) for at in range(0, Kg, step)]
        return torch.cat(parts, dim=1)

    def _block(self, q: Tensor, seen: Tensor, at: int, step: int) -> Tensor:
        """The same for some kv heads, so that no block of logits gets large."""
        k = self.group.k[:, at : at + step].float()
        logits = (q @ k.transpose(-1, -2)[:, :, None]).masked_fill(~seen[:, :, None], -torch.inf)  # (B, kg, G, L, S)
        shares = logits.softmax(-1).masked_fill(~seen[:, :, None], 0.0)  # a padding query sees nothing: its NaN go
        count = seen.any(-1).sum(-1).clamp(min=1)  # (B, kg): real queries
        return shares.sum(-2) / count[..., None, None]


Scorer = Callable[[Ask], Tensor]
Split = Callable[[Ask, Tensor, Tensor, Tensor], Tensor]
F_ = TypeVar("F_", bound=Callable[..., Tensor])

_named: dict[tuple[str, str], Callable[..., Tensor]] = {}


def key_scorer(name: str) -> Callable[[F_], F_]:
    """Decorator: `Selected(by=name)` finds this function, scores (B, Kg, S) of the keys held; higher is kept."""
    return functools.partial(_add, "by", name)


def splitter(name: str) -> Callable[[F_], F_]:
    """Decorator: `Selected(split=name)` finds this function, tokens (B, Kg) int64 that each head may choose."""
    return functools.partial(_add, "split", name)


def _add(kind: str, name: str, function: F_) -> F_:
    _named[kind, name] = function
    return function


def names(kind: str) -> list[str]:
    """Names that `by` or `split` of a `Selected` pattern may have."""
    registry.load_all()
    return sorted(name for k, name in _named if k == kind)


def resolve(pattern: Selected) -> tuple[Scorer, Split]:
    """The two functions that a pattern names, with its options. Raises PlanError for an unknown name or option."""
    return _function("by", pattern.by), _function("split", pattern.split)


def check(pattern: Pattern) -> None:
    """Raises PlanError if the pattern names what does not exist."""
    if isinstance(pattern, Selected):
        resolve(pattern)


@functools.lru_cache(maxsize=256)
def _function(kind: str, text: str) -> Callable[..., Tensor]:
    name, _, inside = text.removesuffix(")").partition("(")
    if (kind, name) not in _named:
        registry.load_all()  # a method's own scorer stands in the method's file
    function = _named.get((kind, name))
    if function is None:
        raise PlanError(f"{kind} is {text!r}; there are {', '.join(names(kind))}")
    parameters = inspect.signature(function).parameters
    options = {n: p.default for n, p in parameters.items() if p.kind is inspect.Parameter.KEYWORD_ONLY}
    given: dict[str, Any] = {}
    for item in filter(None, inside.split(",")):
        option, _, value = item.partition("=")
        if option not in options:
            raise PlanError(f"{kind} is {text!r}; {name} has the options {', '.join(options) or 'none'}")
        given[option] = _value(f"{option} of {text!r}", value, type(options[option]))
    return functools.partial(function, **given)


def _value(what: str, text: str, kind: type) -> int | float | str:
    pattern = {int: r"-?[0-9]{1,10}", float: r"-?[0-9]{1,10}(\.[0-9]*)?(e-?[0-9]{1,3})?", str: ".*"}[kind]
    if not re.fullmatch(pattern, text):
        raise PlanError(f"{what} is {text!r}; it must be of type {kind.__name__}")
    return kind(text)


# -- key scorers -----------------------------------------------------------------------------------------------------------


@key_scorer("observation")
def observation(ask: Ask, *, window: int = 32, kernel: int = 7, pool: str = "max", group: str = "mean") -> Tensor:
    """Attention from the last `window` queries, pooled over `kernel` neighbouring keys (SnapKV, arXiv 2404.14469).

    The keys of the window itself are left out of the pooling. `pool` is "max" or "avg"; `group` says how the query heads of a kv head
    are joined, "mean" or "max".
    """
    _one_of("pool", pool, ("max", "avg"))
    _one_of("group", group, ("mean", "max"))
    if window < 1 or kernel < 1 or kernel % 2 == 0:
        raise PlanError(f"window is {window} and kernel {kernel}; both must be at least 1, and the kernel odd")
    mass = ask.masses(window)
    own = ask.positions >= ask.lengths - window
    mass = pooled_over_keys(mass.masked_fill(own[:, :, None], 0.0), kernel, pool)
    return mass.mean(2) if group == "mean" else mass.amax(2)


@key_scorer("observation-values")
def observation_values(
    ask: Ask, *, window: int = 32, kernel: int = 7, pool: str = "max", group: str = "mean"
) -> Tensor:
    """`observation` times the norm of the value: what a key is paid, and how much it then says."""
    scores = observation(ask, window=window, kernel=kernel, pool=pool, group=group)
    return scores * ask.group.v.float().norm(dim=-1)


@key_scorer("key-norm")
def key_norm(ask: Ask) -> Tensor:
    """Keys of small norm are kept (Devoto et al. 2024, arXiv 2406.11430): they tend to be the ones attended to."""
    return -ask.group.k.float().norm(dim=-1)


@key_scorer("random")
def random(ask: Ask, *, seed: int = 0) -> Tensor:
    """A number drawn for each (layer, head, position): the control. The same whatever the batch and its padding."""
    positions, size = ask.positions, max(ask.seen)
    rows = []
    for head in ask.group.heads:
        generator = torch.Generator().manual_seed((seed * 1_000_003 + ask.layer * 1_009 + head) % 2**31)
        rows.append(torch.rand(max(1, size), generator=generator))
    table = torch.stack(rows).to(positions.device).expand(positions.shape[0], -1, -1)
    return table.gather(2, positions.clamp(min=0))


def pooled_over_keys(x: Tensor, kernel: int, pool: str) -> Tensor:
    """Each key's number joined with its neighbours' along the last axis, of the same size; what lies outside counts as 0."""
    flat = x.reshape(-1, 1, x.shape[-1])
    out = (F.max_pool1d if pool == "max" else F.avg_pool1d)(flat, kernel, stride=1, padding=kernel // 2)
    return out.view(x.shape)


def _one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise PlanError(f"{name} is {value!r}; it must be {' or '.join(map(repr, allowed))}")


# -- splits ----------------------------------------------------------------------------------------------------------------


@splitter("even")
def even(ask: Ask, scores: Tensor, candidates: Tensor, room: Tensor) -> Tensor:
    """Every head the same."""
    return (room // scores.shape[1])[:, None].expand(scores.shape[:2])


@splitter("pooled")
def pooled(ask: Ask, scores: Tensor, candidates: Tensor, room: Tensor, *, floor: float = 0.2) -> Tensor:
    """The best keys of all heads of the group together (AdaKV, arXiv 2407.11550), after a share `floor` of the even room for each head."""
    if not 0 <= floor <= 1:
        raise PlanError(f"floor is {floor}; it must lie in [0, 1]")
    B, Kg, S = scores.shape
    least = (room * floor).long() // Kg
    sure = candidates & (ranks(scores, candidates) < least[:, None, None])
    rest = candidates & ~sure
    left = (room - sure.sum((1, 2)))[:, None]
    won = rest.view(B, -1) & (ranks(scores.reshape(B, -1), rest.view(B, -1)) < left)
    return sure.sum(-1) + won.view(B, Kg, S).sum(-1)


def ranks(scores: Tensor, candidates: Tensor) -> Tensor:
    """Place of each entry along the last axis, best first, 0 the best; equal scores in order of place, no candidates last."""
    order = scores.masked_fill(~candidates, -torch.inf).sort(dim=-1, descending=True, stable=True).indices
    places = torch.arange(scores.shape[-1], device=scores.device).expand_as(order)
    return torch.empty_like(order).scatter_(-1, order, places)


def choose(ask: Ask, scorer: Scorer, split: Split) -> Tensor:
    """Which slots stay, (B, Kg, S) bool: sinks, the window, and the best of the rest, as many as the split gives each head."""
    pattern, positions, lengths = ask.pattern, ask.positions, ask.lengths
    always = (positions >= 0) & ((positions < pattern.sinks) | (positions >= lengths - pattern.recent))
    candidates = (positions >= 0) & ~always
    counts = [pattern.room(n, positions.shape[1]) for n in ask.seen]
    if not any(counts):
        return always
    scores = scorer(ask).float()
    if scores.shape != candidates.shape:
        raise PlanError(f"by={pattern.by!r} gave scores {tuple(scores.shape)}; they must be {tuple(candidates.shape)}")
    room = torch.tensor(counts, device=positions.device)
    given = split(ask, scores, candidates, room)
    return always | (candidates & (ranks(scores, candidates) < given[..., None]))
