"""The figures of the reports, as plotly figures that read well at 360 pixels.

One colour, one meaning, on every figure: blue is what the scores chose, grey is chance, orange is the opposite choice,
dark is the untouched model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    import plotly.graph_objects as go

    from headwise.plan import HeadPlan

COLOURS = {"score": "#2557a7", "random": "#8a94a6", "inverse": "#d9822b", "dense": "#1c2330", "trained": "#1a8f6b"}
PALETTE = ("#2557a7", "#1a8f6b", "#d9822b", "#8e44ad", "#8a94a6", "#c0392b")
BLUES = [[0.0, "#f4f6fa"], [0.15, "#c9d8f0"], [0.5, "#5d8fd6"], [1.0, "#123a7a"]]


@dataclass(frozen=True)
class Line:
    """One series: x and y, with optional lower and upper bounds of y."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None
    colour: str = PALETTE[0]
    dash: str = "solid"


def head_map(values: Tensor, *, unit: str = "head", label: str = "score") -> go.Figure:
    """Heat map of a table (L, U): layers from left to right, heads from top to bottom."""
    import plotly.graph_objects as go

    layers, units = values.shape
    figure = go.Figure(
        go.Heatmap(
            z=values.T.tolist(),
            x=list(range(layers)),
            y=list(range(units)),
            colorscale=BLUES,
            xgap=1,
            ygap=1,
            colorbar={"title": {"text": label, "side": "top"}, "thickness": 10, "len": 0.9},
            hovertemplate=f"layer %{{x}}, {unit} %{{y}}: %{{z:.3f}}<extra></extra>",
        )
    )
    figure.update_yaxes(title=unit, autorange="reversed", dtick=1)
    figure.update_xaxes(title="layer", dtick=1 if layers <= 12 else None)
    return _style(figure, height=110 + 22 * max(units, 5))


def plan_map(plan: HeadPlan, tokens: int) -> go.Figure:
    """What each kv head keeps of `tokens` tokens, as a share."""
    figure = head_map(plan.kept(tokens).float() / tokens, unit="kv head", label="kept")
    figure.data[0].update(zmin=0.0, zmax=1.0)
    return figure


def lines(
    panels: Mapping[str, Sequence[Line]], *, x_title: str, log_y: Sequence[str] = (), log_x: bool = False
) -> go.Figure:
    """Panels stacked over a common x axis; `panels` maps the title of each y axis to its lines."""
    import plotly.graph_objects as go
    from plotly.subplots import make_subplots

    figure = make_subplots(rows=len(panels), cols=1, shared_xaxes=True, vertical_spacing=0.09)
    shown: set[str] = set()
    for row, (title, series) in enumerate(panels.items(), 1):
        for line in series:
            error = None
            if line.low is not None and line.high is not None:
                up = [h - y for h, y in zip(line.high, line.y, strict=True)]
                down = [y - lo for lo, y in zip(line.low, line.y, strict=True)]
                error = {
                    "type": "data",
                    "symmetric": False,
                    "array": up,
                    "arrayminus": down,
                    "thickness": 1,
                    "width": 3,
                }
            figure.add_trace(
                go.Scatter(
                    x=list(line.x),
                    y=list(line.y),
                    name=line.name,
                    legendgroup=line.name,
                    showlegend=line.name not in shown,
                    mode="lines+markers",
                    line={"color": line.colour, "dash": line.dash, "width": 2},
                    error_y=error,
                    hovertemplate=f"{line.name}: %{{y:.3g}} at %{{x:.3g}}<extra></extra>",
                ),
                row=row,
                col=1,
            )
            shown.add(line.name)
        figure.update_yaxes(title=title, row=row, col=1, type="log" if title in log_y else "linear")
    figure.update_xaxes(title=x_title, row=len(panels), col=1)
    if log_x:
        figure.update_xaxes(type="log")
    styled = _style(figure, height=90 + 210 * len(panels))
    if len(shown) > 3:  # a legend of many entries stands below, one a line on narrow screens
        extra = 22 * len(shown)
        styled.update_layout(height=styled.layout.height + 90 + extra, margin={"b": 60 + extra})
        styled.update_layout(legend={"y": -60 / 300, "yanchor": "top"})
    return styled


def bars(
    names: Sequence[str], values: Sequence[float], *, y_title: str, colours: Sequence[str] | None = None
) -> go.Figure:
    """One bar a name."""
    import plotly.graph_objects as go

    colours = list(colours or [COLOURS["score"]] * len(names))
    text = [f"{v:.3g}" for v in values]
    figure = go.Figure(go.Bar(x=list(names), y=list(values), marker_color=colours, text=text, textposition="outside"))
    figure.update_yaxes(title=y_title, rangemode="tozero")
    return _style(figure, height=300)


def _style(figure: go.Figure, *, height: int) -> go.Figure:
    figure.update_layout(
        template="plotly_white",
        height=height,
        margin={"l": 48, "r": 12, "t": 36, "b": 44},
        font={"family": "system-ui, Segoe UI, Roboto, DejaVu Sans, sans-serif", "size": 12, "color": "#1c2330"},
        legend={"orientation": "h", "yanchor": "bottom", "y": 1.02, "xanchor": "left", "x": 0},
        hoverlabel={"font_size": 12},
        dragmode=False,
    )
    return figure
