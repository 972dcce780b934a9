"""The published configurations of mixture-of-head attention as data: heads, shared and chosen ones, layer by layer.

Sources: the released code (ViT: the four TransNeXt builders, DiT: the eight DiT builders, LLaMA3: its constants) and,
for language models trained from scratch, appendix B of the paper.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from headwise.checks import shown, whole
from headwise.errors import RouteError
from headwise.route._config import Kind, LayerRoute


@dataclass(frozen=True, kw_only=True)
class MoHPreset:
    """One published model: its routes, the kind of its router, and the share of heads that its name promises.

    `widths`: size of the hidden state of each layer; `head_dim`: size of a head. `note` says what was not published.

    >>> preset = moh_preset("dit-xl/2-90")
    >>> preset.active, preset.heads, round(preset.share, 4), preset.nominal
    (403, 448, 0.8996, 0.9)
    """

    name: str
    layers: tuple[LayerRoute, ...]
    widths: tuple[int, ...]
    head_dim: int
    nominal: float
    kind: Kind = "trained"
    note: str = ""

    @property
    def active(self) -> int:
        """Heads that run for a token, summed over layers."""
        return sum(route.active for route in self.layers)

    @property
    def heads(self) -> int:
        """Heads of all layers."""
        return sum(route.heads for route in self.layers)

    @property
    def share(self) -> float:
        """Share of the heads that run, exactly; `nominal` is what the name says."""
        return self.active / self.heads

    def routes(self, layers: int, heads: int) -> tuple[LayerRoute, ...]:
        """The routes for a model of so many layers and heads a layer. Raises RouteError if the preset has others."""
        if len(self.layers) != layers or {route.heads for route in self.layers} != {heads}:
            raise RouteError(
                f"preset {self.name} has {len(self.layers)} layers of {sorted({r.heads for r in self.layers})} heads, the "
                f"model {layers} of {heads}; moh_preset({self.name!r}).scaled({layers}, {heads}) carries its budget over"
            )
        return self.layers

    def scaled(self, layers: int, heads: int) -> MoHPreset:
        """The same budget on a model of another shape: by relative depth, and by share of the heads.

        Counts are rounded half up, the number of running heads first; a layer in which all heads run stays so.

        >>> [route.active for route in moh_preset("vit-b-75").scaled(4, 12).layers]
        [12, 9, 9, 8]
        """
        whole("layers", layers, 1, RouteError)
        whole("heads", heads, 1, RouteError)
        places = [int((i + 0.5) * len(self.layers) / layers) for i in range(layers)]
        routes = tuple(_scaled(self.layers[place], heads) for place in places)
        note = f"scaled from {len(self.layers)} layers" + (f"; {self.note}" if self.note else "")
        return MoHPreset(
            name=f"{self.name} on {layers} x {heads}",
            layers=routes,
            widths=tuple(heads * self.head_dim for _ in routes),
            head_dim=self.head_dim,
            nominal=self.nominal,
            kind=self.kind,
            note=note,
        )


def moh_preset(name: str) -> MoHPreset:
    """A published configuration by name; `MOH_PRESETS` lists them. Raises RouteError for an unknown name.

    >>> moh_preset("llama3-8b-75").layers[0].active
    24
    """
    found = MOH_PRESETS.get(name.lower()) if isinstance(name, str) else None
    if found is None:
        raise RouteError(f"preset is {shown(name)}; it must be one of {', '.join(MOH_PRESETS)}")
    return found


def _scaled(route: LayerRoute, heads: int) -> LayerRoute:
    active = max(1, int(route.active / route.heads * heads + 0.5))
    shared = min(active, int(len(route.shared) / route.heads * heads + 0.5))
    if route.routed and shared == active < heads:
        shared -= 1  # a layer that lets tokens choose still does
    return LayerRoute.first(heads, shared, active - shared)


def _spread(values: Sequence[int], depths: Sequence[int]) -> list[int]:
    """One value a stage to one value a layer."""
    return [value for value, depth in zip(values, depths, strict=True) for _ in range(depth)]


def _preset(
    name: str, nominal: float, heads: list[int], shared: list[int], routed: list[int], **more: object
) -> MoHPreset:
    routes = tuple(LayerRoute.first(*row) for row in zip(heads, shared, routed, strict=True))
    return MoHPreset(name=name, layers=routes, nominal=nominal, **more)  # type: ignore[arg-type]


def _vit(name: str, nominal: float, size: str, shared: Sequence[int], routed: Sequence[int]) -> MoHPreset:
    """TransNeXt: four stages, heads of 24 dimensions; the width doubles from stage to stage."""
    heads, depths = {"b": ((4, 8, 16, 32), (5, 5, 23, 5)), "s": ((3, 6, 12, 24), (5, 5, 22, 5))}[size]
    wide = _spread(heads, depths)
    widths = tuple(24 * h for h in wide)
    return _preset(name, nominal, wide, _spread(shared, depths), _spread(routed, depths), widths=widths, head_dim=24)


def _deep_dit(
    name: str, nominal: float, depths: Sequence[int], head_dim: int, shared: Sequence[int], routed: Sequence[int]
) -> MoHPreset:
    """DiT-XL and L: 8, 16 and 24 heads in the thirds of the depth; the hidden state is 16 heads wide throughout."""
    heads = _spread((8, 16, 24), depths)
    widths = (16 * head_dim,) * len(heads)
    return _preset(
        name, nominal, heads, _spread(shared, depths), _spread(routed, depths), widths=widths, head_dim=head_dim
    )


def _dit(name: str, nominal: float, heads: int, shared: list[int], routed: list[int]) -> MoHPreset:
    """DiT-B and S: 12 layers, one number of heads."""
    return _preset(name, nominal, [heads] * 12, shared, routed, widths=(64 * heads,) * 12, head_dim=64)


_OURS = (
    "the paper gives the share of heads that run, not how they divide: half of them shared (rounded up) is our choice"
)


def _lm(name: str, nominal: float, layers: int, heads: int, head_dim: int, shared: int, routed: int) -> MoHPreset:
    widths = (heads * head_dim,) * layers
    more = {"widths": widths, "head_dim": head_dim, "note": _OURS}
    return _preset(name, nominal, [heads] * layers, [shared] * layers, [routed] * layers, **more)


_ALL = (
    _vit("vit-b-75", 0.75, "b", (4, 8, 4, 5), (0, 0, 8, 16)),
    _vit("vit-b-50", 0.50, "b", (2, 2, 2, 4), (2, 4, 6, 8)),
    _vit("vit-s-80", 0.80, "s", (3, 6, 3, 8), (0, 0, 6, 12)),
    _vit("vit-s-75", 0.75, "s", (3, 6, 3, 4), (0, 0, 6, 12)),
    _deep_dit("dit-xl/2-90", 0.90, (9, 10, 9), 72, (8, 16, 16), (0, 0, 3)),
    _deep_dit("dit-xl/2-75", 0.75, (9, 10, 9), 72, (8, 10, 14), (0, 2, 2)),
    _deep_dit("dit-l/2-90", 0.90, (8, 8, 8), 64, (8, 16, 16), (0, 0, 3)),
    _deep_dit("dit-l/2-75", 0.75, (8, 8, 8), 64, (8, 8, 12), (0, 4, 4)),
    _dit("dit-b/2-90", 0.90, 12, [6] * 5 + [7] * 5 + [12] * 2, [4] * 10 + [0] * 2),
    _dit("dit-b/2-75", 0.75, 12, [4] * 2 + [6] * 8 + [12] * 2, [2] * 2 + [3] * 8 + [0] * 2),
    _dit("dit-s/2-90", 0.90, 6, [3] * 8 + [6] * 4, [2] * 8 + [0] * 4),
    _dit("dit-s/2-75", 0.75, 6, [2] * 2 + [3] * 8 + [6] * 2, [1] * 6 + [2] * 4 + [0] * 2),
    _lm("llm-s-75", 0.75, 12, 12, 64, 5, 4),
    _lm("llm-s-50", 0.50, 12, 12, 64, 3, 3),
    _lm("llm-b-75", 0.75, 24, 16, 96, 6, 6),
    _lm("llm-b-50", 0.50, 24, 16, 96, 4, 4),
    _preset("llama3-8b-75", 0.75, [32] * 32, [16] * 32, [8] * 32, widths=(4096,) * 32, head_dim=128, kind="norm"),
)

MOH_PRESETS: dict[str, MoHPreset] = {preset.name: preset for preset in _ALL}
"""Every published configuration by name."""
