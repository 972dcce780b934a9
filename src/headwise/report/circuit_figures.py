"""Figures of a circuit: bars of logit attribution, heat maps of patching, the graph of weighted edges, score against effect.

Blue speaks for the answer, orange against it, on every figure here.

Letters: L layers, U units of a layer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from headwise.errors import TaskError
from headwise.report.figures import COLOURS, _style

if TYPE_CHECKING:
    import plotly.graph_objects as go

    from headwise.score import Attribution, Circuit, Edge
    from headwise.units import HeadScores, HeadSet, Unit

FOR, AGAINST = COLOURS["score"], COLOURS["inverse"]
DIVERGING = [[0.0, AGAINST], [0.5, "#f7f8fa"], [1.0, FOR]]
WIDEST = 9.0  # pixels of the strongest edge


def signed_map(scores: HeadScores, *, label: str, kept: HeadSet | None = None) -> go.Figure:
    """Heat map (L, U) of effects of either sign, white at 0; units of `kept` are framed."""
    import plotly.graph_objects as go

    values = scores.values
    most = max(float(values.abs().max()), 1e-9)
    figure = go.Figure(
        go.Heatmap(
            z=values.T.tolist(),
            x=list(range(scores.layers)),
            y=list(range(scores.units)),
            zmin=-most,
            zmax=most,
            colorscale=DIVERGING,
            xgap=1,
            ygap=1,
            colorbar={"title": {"text": label, "side": "top"}, "thickness": 10, "len": 0.9},
            hovertemplate=f"layer %{{x}}, {scores.kind} %{{y}}: %{{z:+.3f}}<extra></extra>",
        )
    )
    for unit in kept or ():
        box = {"x0": unit.layer - 0.5, "x1": unit.layer + 0.5, "y0": unit.index - 0.5, "y1": unit.index + 0.5}
        figure.add_shape(type="rect", **box, line={"color": COLOURS["dense"], "width": 2})
    figure.update_yaxes(title=scores.kind, autorange="reversed", dtick=max(1, scores.units // 16))
    figure.update_xaxes(title="layer")
    return _style(figure, height=min(620, 110 + 22 * max(scores.units, 5)))


def attribution_bars(parts: Attribution, *, most: int = 14) -> go.Figure:
    """The parts that write the most into the logit difference, of either sign, in logits, and the rest as one bar."""
    import plotly.graph_objects as go

    named = sorted(parts.parts().items(), key=lambda item: -abs(item[1]))
    shown = named[:most]
    if len(named) > most:
        shown = [*shown, (f"{len(named) - most} others", sum(value for _, value in named[most:]))]
    names, values = [name for name, _ in shown], [value for _, value in shown]
    colours = [FOR if value >= 0 else AGAINST for value in values]
    pattern = [
        "" if "H" in name or "E" in name else "/" for name in names
    ]  # heads and experts plain, whole layers hatched
    figure = go.Figure(
        go.Bar(
            x=values,
            y=names,
            orientation="h",
            marker={"color": colours, "pattern": {"shape": pattern, "fgcolor": "#ffffff", "size": 5}},
            text=[f"{value:+.2f}" for value in values],
            textposition="outside",
            cliponaxis=False,
            hovertemplate="%{y}: %{x:+.4f} logits<extra></extra>",
        )
    )
    low, high = min(0.0, *values), max(0.0, *values)
    room = 0.16 * (high - low or 1.0)
    figure.update_xaxes(
        title="logits towards the answer", range=[low - (room if low < 0 else 0), high + room], zerolinewidth=2
    )
    figure.update_yaxes(autorange="reversed")
    styled = _style(figure, height=90 + 22 * len(shown))
    styled.update_layout(margin={"l": 92})
    return styled


def scatter(
    scores: HeadScores, effects: HeadScores, *, x_title: str, y_title: str, kept: HeadSet | None = None, named: int = 8
) -> go.Figure:
    """One point a unit: its score against its causal effect; units of `kept` in blue, the farthest out with their names.

    Raises TaskError for two tables of different shape or kind.
    """
    import plotly.graph_objects as go

    if (scores.kind, scores.values.shape) != (effects.kind, effects.values.shape):
        one, other = (f"{t.kind} {tuple(t.values.shape)}" for t in (scores, effects))
        raise TaskError(f"a scatter compares units one by one: {one} and {other} do not match")
    chosen = {(u.layer, u.index) for u in kept or ()}
    units = [unit for unit, _ in scores.ranking()]
    x, y = {str(u): scores[str(u)] for u in units}, {str(u): effects[str(u)] for u in units}
    wide, high = max(map(abs, x.values())) or 1.0, max(map(abs, y.values())) or 1.0
    far = sorted(x, key=lambda u: -(math.hypot(x[u] / wide, y[u] / high)))[:named]
    figure = go.Figure()
    for name, inside in (("other", False), ("in the circuit", True)):
        mine = [str(u) for u in units if ((u.layer, u.index) in chosen) == inside]
        if not mine:
            continue
        figure.add_trace(
            go.Scatter(
                x=[x[u] for u in mine],
                y=[y[u] for u in mine],
                mode="markers+text",
                name=name if chosen else scores.kind,
                text=[u if u in far else "" for u in mine],
                textposition="top center",
                customdata=mine,
                marker={"color": FOR if inside else COLOURS["random"], "size": 9 if inside else 6, "opacity": 0.85},
                hovertemplate="%{customdata}: %{x:+.3f}, %{y:+.3f}<extra></extra>",
            )
        )
    figure.update_xaxes(title=x_title, zeroline=True)
    figure.update_yaxes(title=y_title, zeroline=True)
    return _style(figure, height=380)


def circuit_graph(circuit: Circuit, edges: Sequence[Edge], *, most: int = 40) -> go.Figure:
    """The heads of a circuit by layer, a row a stage, the logits on the right; edges are as wide as their share, the strongest `most`."""
    import plotly.graph_objects as go

    places = graph_places(circuit)
    drawn = sorted(edges, key=lambda edge: -abs(edge.share))[:most]
    top = max((abs(edge.share) for edge in drawn), default=1.0) or 1.0
    figure = go.Figure()
    for edge in reversed(drawn):  # the strongest on top
        figure.add_trace(_edge_line(places[edge.sender], places[edge.receiver], edge, top))
    middles = [_middle(places[e.sender], places[e.receiver]) for e in drawn]
    figure.add_trace(
        go.Scatter(
            x=[m[0] for m in middles],
            y=[m[1] for m in middles],
            mode="markers",
            marker={"size": 14, "opacity": 0},
            text=[str(edge) for edge in drawn],
            hovertemplate="%{text}<extra></extra>",
            showlegend=False,
        )
    )
    names = {unit: "logits" if unit is None else str(unit) for unit in places}
    figure.add_trace(
        go.Scatter(
            x=[at[0] for at in places.values()],
            y=[at[1] for at in places.values()],
            mode="markers+text",
            text=list(names.values()),
            textposition="middle center",
            marker={
                "symbol": "square",
                "size": 36,
                "color": "#ffffff",
                "line": {"color": COLOURS["dense"], "width": 1.5},
            },
            textfont={"size": 10},
            hoverinfo="skip",
            showlegend=False,
        )
    )
    for name, colour in (("towards the answer", FOR), ("against it", AGAINST)):
        line = {"color": colour, "width": 3}
        figure.add_trace(go.Scatter(x=[None], y=[None], mode="lines", line=line, name=name))
    ticks = sorted({unit.layer for unit in places if unit is not None})
    figure.update_xaxes(
        title="layer", tickvals=[places_x(layer, ticks) for layer in ticks], ticktext=ticks, showgrid=False
    )
    figure.update_yaxes(visible=False)
    rows = max(at[1] for at in places.values()) - min(at[1] for at in places.values())
    return _style(figure, height=int(160 + 62 * max(3.0, rows)))


def places_x(layer: int, layers: Sequence[int]) -> float:
    """Where a layer stands: only layers that hold a head of the circuit take room."""
    return float(list(layers).index(layer))


def graph_places(circuit: Circuit) -> dict[Unit | None, tuple[float, float]]:
    """(x, y) of every head of a circuit and of the logits (None): x by layer, heads of one layer one above the other, the heads that
    later stages found higher up."""
    first: dict[Unit, int] = {}
    for number, stage in enumerate(circuit.stages):
        for unit in stage.kept:
            first.setdefault(unit, number)
    layers = sorted({unit.layer for unit in first})
    places: dict[Unit | None, tuple[float, float]] = {}
    for layer in layers:
        mine = sorted((u for u in first if u.layer == layer), key=lambda u: (first[u], u.index))
        for number, unit in enumerate(mine):
            step = 0.5 * (
                layers.index(layer) % 2
            )  # neighbours do not stand on one line, so that edges between them are seen
            places[unit] = (places_x(layer, layers), number + step + 1.4 * first[unit])
    places[None] = (len(layers) + 0.2, 0.0)
    return places


def _middle(one: tuple[float, float], other: tuple[float, float]) -> tuple[float, float]:
    """A point of the curve between two places: below the straight line, so that it passes under heads in between."""
    return 0.5 * (one[0] + other[0]), 0.5 * (one[1] + other[1]) - 0.16 * max(0.0, other[0] - one[0] - 1)


def _edge_line(one: tuple[float, float], other: tuple[float, float], edge: Edge, top: float) -> go.Scatter:
    import plotly.graph_objects as go

    middle, size = _middle(one, other), abs(edge.share) / top
    return go.Scatter(
        x=[one[0], middle[0], other[0]],
        y=[one[1], middle[1], other[1]],
        mode="lines",
        line={
            "shape": "spline",
            "width": max(0.8, WIDEST * size),
            "color": FOR if edge.share >= 0 else AGAINST,
        },
        opacity=0.35 + 0.55 * size,
        hoverinfo="skip",
        showlegend=False,
    )
