"""What a head router is: which heads of each layer are shared, how many others a token uses, how gates are made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal, get_args

from headwise import storage
from headwise.addresses import Fingerprint, read_fingerprint
from headwise.checks import Meta, finite, plain_meta, shown, whole
from headwise.errors import RouteError, WrongModelError

Kind = Literal["trained", "norm", "fitted", "static"]
Scaling = Literal["official", "paper"]
Scope = Literal["selected", "all", "none"]
Features = Literal["hidden", "queries"]

CHOICES: dict[str, tuple[str, ...]] = {
    "kind": get_args(Kind),
    "gate_norm": get_args(Scaling),
    "balance": get_args(Scaling),
    "ste_scope": get_args(Scope),
    "features": get_args(Features),
}


@dataclass(frozen=True, kw_only=True)
class LayerRoute:
    """One layer: of `heads` query heads, `shared` always run and each token chooses `routed` of the others.

    Raises RouteError unless 0 <= routed <= heads - len(shared) and at least one head runs.

    >>> LayerRoute(heads=9, shared=(0, 1, 2, 3), routed=3).active
    7
    >>> LayerRoute(heads=4, shared=(0, 1, 2), routed=2)
    Traceback (most recent call last):
    headwise.errors.RouteError: routed is 2; it must be a whole number from 0 to 1
    """

    heads: int
    shared: tuple[int, ...] = ()
    routed: int = 0

    def __post_init__(self) -> None:
        heads = whole("heads", self.heads, 1, RouteError)
        shared = tuple(whole("a shared head", h, 0, RouteError, heads - 1) for h in self.shared)
        if list(shared) != sorted(set(shared)):
            raise RouteError(f"shared is {shown(self.shared)}; name each shared head once, ascending")
        object.__setattr__(self, "shared", shared)
        whole("routed", self.routed, 0, RouteError, heads - len(shared))
        if not shared and not self.routed:
            raise RouteError("no head of a layer would run: shared is empty and routed is 0")

    @classmethod
    def first(cls, heads: int, shared: int, routed: int) -> LayerRoute:
        """The paper's choice: the first `shared` heads are shared."""
        count = whole("the number of shared heads", shared, 0, RouteError, whole("heads", heads, 1, RouteError))
        return cls(heads=heads, shared=tuple(range(count)), routed=routed)

    @property
    def pool(self) -> tuple[int, ...]:
        """The E = H - h_s heads that tokens choose from."""
        return tuple(h for h in range(self.heads) if h not in self.shared)

    @property
    def active(self) -> int:
        """Heads that run for each token, h_s + K."""
        return len(self.shared) + self.routed

    @property
    def dense(self) -> bool:
        """Do all heads run for every token?"""
        return self.active == self.heads


@dataclass(frozen=True, kw_only=True)
class RouterConfig:
    """Everything about a `HeadRouter` but its weights. Raises RouteError for a value outside its choices or range.

    `kind`: "trained" (part A of the paper: softmax of linear maps of the hidden state), "norm" (part C: norm of the
    query, no parameters), "fitted" (a linear map of the hidden state to each head's output norm), "static" (the same
    heads for every token). `gate_norm` scales the trained gates, `balance` the load loss, which enters the training
    loss times `beta`. `ste_scope`: which heads of 0/1 gates receive a straight-through gradient. `width`: size of
    the hidden state, for kinds that read it. `fill`: size D of the vectors that stand in for heads that do not run; 0 for
    none, only for "fitted". `features`: what a fitted router reads of a token: its hidden state, or also how its queries meet
    two keys (`_local.py`), for which it must know `kv_heads` and `head_dim`.
    """

    layers: tuple[LayerRoute, ...]
    kind: Kind
    width: int = 0
    fill: int = 0
    features: Features = "hidden"
    kv_heads: int = 0
    head_dim: int = 0
    gate_norm: Scaling = "official"
    balance: Scaling = "official"
    ste_scope: Scope = "selected"
    beta: float = 0.01
    eps: float = 1e-6
    fingerprint: Fingerprint | None = None
    meta: Meta = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", tuple(self.layers))
        if not self.layers or not all(isinstance(layer, LayerRoute) for layer in self.layers):
            raise RouteError("layers must be a LayerRoute for each layer of the model, at least one")
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise RouteError(f"{name} is {shown(getattr(self, name))}; it must be one of {', '.join(choices)}")
        if finite("beta", self.beta, RouteError) < 0 or finite("eps", self.eps, RouteError) <= 0:
            raise RouteError(f"beta is {self.beta} and eps {self.eps}; beta must be at least 0, eps above 0")
        whole("width", self.width, 1 if self.kind in ("trained", "fitted") else 0, RouteError)
        if whole("fill", self.fill, 0, RouteError) and self.kind != "fitted":
            raise RouteError(
                f"fill is {self.fill} for a {self.kind!r} router; only a fitted one has vectors for absent heads"
            )
        reads = self.features == "queries"
        for name in ("kv_heads", "head_dim"):
            whole(name, getattr(self, name), 1 if reads else 0, RouteError)
        if reads and self.kind != "fitted":
            raise RouteError(f"features is 'queries' for a {self.kind!r} router; only a fitted one reads them")
        if self.kind == "static" and any(layer.routed for layer in self.layers):
            raise RouteError("a static router chooses no heads per token: give its heads as shared, with routed=0")
        object.__setattr__(self, "meta", plain_meta(self.meta, RouteError))
        if self.fingerprint:
            self.check(self.fingerprint)

    def check(self, fingerprint: Fingerprint) -> None:
        """Raises WrongModelError if the router was made for another model or has other numbers of layers and heads."""
        if self.fingerprint:
            self.fingerprint.require(fingerprint, "the head router")
        heads = {layer.heads for layer in self.layers}
        if len(self.layers) != fingerprint.layers or heads != {fingerprint.heads}:
            raise WrongModelError(
                f"the head router has {len(self.layers)} layers of {sorted(heads)} heads, the model is {fingerprint}"
            )

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        data = {item.name: getattr(self, item.name) for item in fields(self)}
        data["layers"] = [{**asdict(layer), "shared": list(layer.shared)} for layer in self.layers]
        data["fingerprint"] = self.fingerprint and self.fingerprint.to_dict()
        return data

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> RouterConfig:
        """The inverse of `to_dict`. Raises ArtifactError or RouteError for a missing or wrong entry."""
        # adapters written before there were such entries
        data = {"fill": 0, "features": "hidden", "kv_heads": 0, "head_dim": 0, **data}
        sizes = dict.fromkeys(("width", "fill", "kv_heads", "head_dim"), int)
        types: dict[str, type] = sizes | {"beta": float, "eps": float, "meta": dict} | dict.fromkeys(CHOICES, str)
        values: dict[str, Any] = {name: storage.field(data, name, kind) for name, kind in types.items()}
        rows = storage.field(data, "layers", list)
        return cls(layers=tuple(map(_layer, rows)), fingerprint=read_fingerprint(data), **values)


def _layer(row: Any) -> LayerRoute:
    if not isinstance(row, dict):
        raise RouteError(f"a layer is {shown(row)}; it must be an object with heads, shared and routed")
    shared: Sequence[Any] = storage.field(row, "shared", list)
    return LayerRoute(
        heads=storage.field(row, "heads", int), shared=tuple(shared), routed=storage.field(row, "routed", int)
    )
