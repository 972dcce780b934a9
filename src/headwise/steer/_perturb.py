"""A degraded forward pass, said as data: which heads, how far, towards what; and how a prediction is pushed away from it.

Letters: B batch, R candidates, L layers, H query heads, N queries, U perturbed heads of a layer, D head dim.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, get_args

import torch
from torch import Tensor, nn

from headwise.attach import HeadCall, attach, fingerprint
from headwise.checks import finite, shown
from headwise.edits import Edit, HeadEdits
from headwise.errors import EditError, UnitError
from headwise.steer._targets import TARGETS, Geodesic, Scope, Target, View, geodesic, place
from headwise.units import Fingerprint, HeadSet


@dataclass(frozen=True, kw_only=True)
class Perturbation:
    """Heads whose attention is degraded: A~ = (1 − u·w) · A + u·w · A', w the weight of the head in its set.

    `target` and `geodesic` name A' and the way to it (the equations stand in `steer/_targets.py`); `scope` says which rows change:
    all, those of image tokens or those of text tokens. `beta` is the inverse temperature of target "temperature" (∞: arg-max). An
    empty set, or u = 0, changes nothing at all. Given to `attach(transforms=[…])` or `guided`; raises EditError for what makes no sense.

    >>> from headwise.hub import load_model
    >>> model, _ = load_model("tiny-random-vit")
    >>> pixels = torch.randn(1, 3, 32, 32)
    >>> with torch.no_grad(), Perturbation(heads=HeadSet.parse("L0H1,L1H2:0.5"), u=0.8).attached(model):
    ...     degraded = model(pixel_values=pixels)
    """

    heads: HeadSet
    u: float = 0.5
    target: Target = "identity"
    geodesic: Geodesic = "linear"
    scope: Scope = "all"
    beta: float = 0.5
    _layers: dict[int, tuple[tuple[int, ...], Tensor | float]] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not isinstance(self.heads, HeadSet) or self.heads.kind != "head":
            raise EditError(
                f"heads is {shown(self.heads)}; it must be a HeadSet of query heads, such as HeadSet.parse('L1H2')"
            )
        object.__setattr__(self, "u", _share(self.u))
        for name, kind in (("target", Target), ("geodesic", Geodesic), ("scope", Scope)):
            if getattr(self, name) not in get_args(kind):
                raise EditError(f"{name} is {shown(getattr(self, name))}; choose {', '.join(get_args(kind))}")
        if self.geodesic != "linear" and self.target != "identity":
            raise EditError(f"geodesic {self.geodesic!r} leads to identity only; target {self.target!r} takes 'linear'")
        if isinstance(self.beta, bool) or not isinstance(self.beta, int | float) or not self.beta >= 0:
            raise EditError(f"beta is {shown(self.beta)}; an inverse temperature is at least 0 (infinite: arg-max)")
        for unit, weight in zip(self.heads, self.heads.weights(), strict=True):
            if not 0 <= weight <= 1:
                raise EditError(f"{unit} has weight {weight}; a strength lies in [0, 1]")
        object.__setattr__(self, "_layers", self._by_layer())

    def _by_layer(self) -> dict[int, tuple[tuple[int, ...], Tensor | float]]:
        found: dict[int, list[tuple[int, float]]] = {}
        for unit, weight in zip(self.heads, self.heads.weights(), strict=True):
            if self.u * weight > 0:
                found.setdefault(unit.layer, []).append((unit.index, self.u * weight))
        return {
            layer: (tuple(h for h, _ in pairs), _one_or_all([s for _, s in pairs])) for layer, pairs in found.items()
        }

    @property
    def in_layers(self) -> Collection[int]:
        """Layers with a perturbed head: the others are left without a hook."""
        return self._layers.keys()

    def __call__(self, call: HeadCall, attend: Callable[[], Tensor]) -> Tensor:
        """The transform: head outputs (B, N, H, D) with those of the chosen heads degraded."""
        chosen = self._layers.get(call.layer)
        if chosen is None:
            return attend()
        heads, strengths = chosen
        if isinstance(strengths, Tensor) and strengths.device != call.q.device:
            strengths = strengths.to(call.q.device)
            self._layers[call.layer] = heads, strengths  # copied once, not at every step
        return perturb(self, call, attend(), heads, strengths)

    def check(self, made_for: Fingerprint) -> None:
        """UnitError for a head that the model lacks."""
        self.heads.check(made_for)

    def attached(self, model: nn.Module, *, stack: str | None = None) -> AbstractContextManager[Any]:
        """`attach` with this perturbation, its heads checked; nothing is attached for an empty set or u = 0."""
        self.check(fingerprint(model, stack))
        return attach(model, transforms=[self], stack=stack) if self._layers else nullcontext()

    def edits(self) -> HeadEdits:
        """The perturbation as an artifact. EditError for targets that no edit expresses."""
        makers = {"identity": Edit.mix_v, "uniform": Edit.mix_uniform}
        if self.target not in makers or self.geodesic != "linear" or self.scope != "all":
            raise EditError(
                f"target {self.target!r}, geodesic {self.geodesic!r}, scope {self.scope!r}: edits express identity and uniform, linear, "
                "over all tokens; keep the HeadSet and these options for others"
            )
        if not len(self.heads):
            return HeadEdits.of(method="softpag")
        return HeadEdits.of(makers[self.target](self.heads, self.u), method="softpag")


@dataclass
class Candidates:
    """Different head sets for different rows of one batch: row r of B = R · M rows belongs to set r // M.

    `strengths` (R, L, H) is u · weight of every head; the rest as in `like`. With `strengths = None` nothing is perturbed, so
    that one attachment serves both passes of a guided step.
    """

    like: Perturbation
    strengths: Tensor | None = None

    def __call__(self, call: HeadCall, attend: Callable[[], Tensor]) -> Tensor:
        """The transform: head outputs (B, N, H, D), each row with its own set degraded."""
        if self.strengths is None:
            return attend()
        table = self.strengths[:, call.layer]  # (R, H)
        heads = tuple(table.gt(0).any(0).nonzero().flatten().tolist())
        if not heads:
            return attend()
        rows = call.q.shape[0] // len(table)
        return perturb(self.like, call, attend(), heads, table[:, list(heads)].repeat_interleave(rows, 0))


def perturb(
    how: Perturbation, call: HeadCall, out: Tensor, heads: tuple[int, ...], strengths: Tensor | float
) -> Tensor:
    """`out` (B, N, H, D) with `heads` moved towards the target by `strengths` (1 or B, U), or one for all, in the rows of the scope.

    Without gradients the rows are changed in place: the tensor was made by this call's own attention. Heads of strength 0 stay
    as they are to the bit, heads of strength 1 become the target to the bit.
    """
    out = out.clone() if torch.is_grad_enabled() else out
    places = place(heads, out.device)
    view = View(call, heads, out[:, :, places], slice(0, out.shape[1]))
    if how.scope != "all":
        view = replace(view, rows=view.part(how.scope))
    if how.geodesic == "linear":
        _move(out, view, places, TARGETS[how.target](view, float(how.beta)), strengths)
    else:
        s = torch.as_tensor(strengths).expand(1, len(heads)) if isinstance(strengths, float) else strengths
        s, old = s.to(out.device)[:, None, :, None], view.out
        out[:, view.rows, places] = torch.where(s > 0, geodesic(view, s, how.geodesic), old)[:, view.rows]
    return out


def _move(out: Tensor, view: View, places: Any, target: Tensor, strengths: Tensor | float) -> None:
    """out = (1 − s) · out + s · target for the heads and rows of the view, in place: one kernel where heads are evenly spaced."""
    old, target = view.out[:, view.rows], target.to(out.dtype)[:, view.rows]
    if isinstance(strengths, Tensor) and strengths.device.type == "cpu":  # of candidates: nothing waits for the device
        strengths = _one_or_all(strengths)
    s: Any = strengths
    if isinstance(strengths, Tensor):
        s = strengths.to(out.device, out.dtype)[:, None, :, None]
    if isinstance(places, slice) and not torch.is_grad_enabled():
        old.lerp_(target, s)
    else:
        out[:, view.rows, places] = torch.lerp(old, target, s)


def _one_or_all(strengths: Tensor | Sequence[float]) -> Tensor | float:
    """One number if all are equal, else the table (1 or B, U)."""
    table = torch.as_tensor(strengths)
    first = float(table.flatten()[0])
    return first if bool((table == first).all()) else table.reshape(-1, table.shape[-1])


def push(pred: Tensor, perturbed: Tensor, w: float) -> Tensor:
    """pred + w · (pred − perturbed), on noise or velocity alike; exactly `pred` at w = 0.

    >>> push(torch.tensor([1.0]), torch.tensor([0.5]), 3.0)
    tensor([2.5000])
    """
    return pred if w == 0 else pred + w * (pred - perturbed)


def push_with_cfg(cond: Tensor, uncond: Tensor, perturbed: Tensor, s: float, w: float) -> Tensor:
    """uncond + s · (cond − uncond) + w · (cond − perturbed): classifier-free guidance of scale s and perturbation guidance of scale w."""
    mixed = uncond + s * (cond - uncond)
    return mixed if w == 0 else mixed + w * (cond - perturbed)


def _share(u: Any) -> float:
    number = finite("u", u, EditError)
    if not 0 <= number <= 1:
        raise EditError(f"u is {u}; the way to the target is a share in [0, 1]")
    return number


def strength_table(sets: Sequence[HeadSet], u: float, made_for: Fingerprint) -> Tensor:
    """(R, L, H) of `Candidates`: u · weight of each head of each set. UnitError for a head that the model lacks."""
    if not sets:
        raise UnitError("no head sets were given; at least one is needed")
    return torch.stack([_share(u) * one.table(made_for.layers, made_for.heads) for one in sets])
