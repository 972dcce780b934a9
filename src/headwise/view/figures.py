"""The explorer's figures: transparent, so that the page's style sheet decides light or dark; every mark carries its address as text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from statistics import fmean
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from headwise.report.figures import COLOURS
from headwise.units import HeadScores, HeadSet, Unit
from headwise.view.live import Effect
from headwise.view.points import FULL, Points
from headwise.view.samples import Sample

if TYPE_CHECKING:
    import plotly.graph_objects as go

# Opaque blue over any ground: weak on white and weak on black, so one scale serves both themes.
RAMP = [
    [0.0, "rgba(64,128,224,0.06)"],
    [0.15, "rgba(64,128,224,0.30)"],
    [0.5, "rgba(58,124,226,0.70)"],
    [1.0, "rgb(38,110,232)"],
]
SIGNED = [[0.0, "rgb(217,130,43)"], [0.5, "rgba(128,128,128,0.08)"], [1.0, "rgb(38,110,232)"]]
MARK = "#d9822b"
KINDS = {"by score": COLOURS["score"], "random": COLOURS["random"], "the opposite": COLOURS["inverse"], FULL: "#7a8599"}


def head_grid(
    scores: HeadScores,
    *,
    upright: bool = False,
    marked: HeadSet | None = None,
    selected: HeadSet | None = None,
    label: str = "",
) -> go.Figure:
    """Layers × units, coloured by score; `marked` units get a square, `selected` a dot. `upright`: layers downwards, for narrow screens."""
    import plotly.graph_objects as go

    layers, units = scores.layers, scores.units
    names = [[str(Unit(scores.kind, layer, unit)) for unit in range(units)] for layer in range(layers)]
    values = scores.values.tolist()
    rows, columns = (layers, units) if upright else (units, layers)
    if not upright:
        names, values = [list(column) for column in zip(*names, strict=True)], scores.values.T.tolist()
    scale = {"colorscale": SIGNED, "zmid": 0.0} if float(scores.values.min()) < 0 else {"colorscale": RAMP}
    figure = go.Figure(
        go.Heatmap(
            z=values, customdata=names, xgap=1, ygap=1, **scale,
            colorbar={"thickness": 8, "len": 1.0, "outlinewidth": 0, "title": {"text": safe(label), "side": "right"}},
            hovertemplate="%{customdata}: %{z:.4g}<extra></extra>",
        )
    )  # fmt: skip
    for chosen, symbol in ((marked, "square-open"), (selected, "circle")):
        if chosen is not None and len(chosen):
            places = [(u.index, u.layer) if upright else (u.layer, u.index) for u in chosen]
            _add_marks(figure, places, symbol, small=max(rows, columns) > 40)
    unit_name = {"head": "head", "kv": "kv head", "expert": "expert"}[scores.kind]
    across, down = (unit_name, "layer") if upright else ("layer", unit_name)
    figure.update_xaxes(
        title=across, side="top" if upright else "bottom", range=[-0.5, columns - 0.5], tick0=0, dtick=_every(columns)
    )
    figure.update_yaxes(title=down, range=[rows - 0.5, -0.5], tick0=0, dtick=_every(rows))
    figure.update_layout(meta={"layers": layers, "units": units, "kind": scores.kind, "upright": upright})
    per_row = 17 if upright else 24
    return plain(figure, height=min(90 + per_row * max(rows, 4), 1200), left=46, top=52 if upright else 12)


def _every(count: int) -> int:
    """Units from one label of an axis to the next."""
    return next(step for step in (1, 5, 10, 50, 10**9) if count <= 20 * step)


def _add_marks(figure: go.Figure, places: Sequence[tuple[int, int]], symbol: str, *, small: bool) -> None:
    size = {"square-open": 15, "circle": 7}[symbol] // (2 if small else 1)
    marker = {"symbol": symbol, "size": size, "color": MARK, "line": {"width": 2, "color": MARK}}
    x, y = [x for x, _ in places], [y for _, y in places]
    figure.add_scatter(x=x, y=y, mode="markers", hoverinfo="skip", showlegend=False, marker=marker)


def token_map(map_: Tensor, sample: Sample, query: int) -> go.Figure:
    """A head's attention (N, N): queries from top to bottom, keys from left to right."""
    import plotly.graph_objects as go

    names = [short(label) for label in sample.labels]
    many = sample.tokens > 60
    figure = go.Figure(
        go.Heatmap(
            z=rounded(map_), customdata=[[f"{q} → {k}" for k in names] for q in names], colorscale=RAMP, zmin=0,
            showscale=False, hovertemplate="%{customdata}: %{z:.3f}<extra></extra>",
        )
    )  # fmt: skip
    ticks = {"tickvals": list(range(sample.tokens)), "ticktext": names} if not many else {}
    figure.update_xaxes(title="key", side="top", tickangle=-60, tickfont={"size": 9}, **ticks)
    figure.update_yaxes(title="query", autorange="reversed", tickfont={"size": 9}, **ticks)
    figure.update_layout(meta={"query": query})
    return plain(figure, height=420 if many else min(110 + 13 * sample.tokens, 720), left=64, top=70, bottom=8)


def patch_map(map_: Tensor, sample: Sample, query: int) -> go.Figure:
    """Where one query of a picture model looks: its attention over the patches, beside the picture."""
    import plotly.graph_objects as go
    from plotly.subplots import make_subplots

    assert sample.side is not None and sample.picture is not None
    first = sample.tokens - sample.side**2
    figure = make_subplots(rows=1, cols=2, horizontal_spacing=0.06)
    figure.add_trace(go.Image(z=(sample.picture * 255).to(torch.uint8).tolist(), hoverinfo="skip"), row=1, col=1)
    grid = map_[query, first:].view(sample.side, sample.side)
    names = [[sample.labels[first + r * sample.side + c] for c in range(sample.side)] for r in range(sample.side)]
    figure.add_trace(
        go.Heatmap(
            z=rounded(grid), customdata=names, colorscale=RAMP, zmin=0, showscale=False,
            hovertemplate="patch %{customdata}: %{z:.3f}<extra></extra>",
        ),
        row=1, col=2,
    )  # fmt: skip
    figure.update_xaxes(showticklabels=False)
    figure.update_yaxes(showticklabels=False, autorange="reversed")
    figure.update_yaxes(scaleanchor="x2", row=1, col=2)
    figure.update_layout(meta={"query": query})
    return plain(figure, height=260, left=8, bottom=8, top=8)


def distances(profile: Sequence[tuple[str, float, float]], *, patches: bool) -> go.Figure:
    """Share of attention by distance, beside what an even look would give."""
    import plotly.graph_objects as go

    names = [name for name, _, _ in profile]
    figure = go.Figure(go.Bar(x=names, y=[share for _, share, _ in profile], name="this head", marker_color="#266ee8"))
    figure.add_scatter(
        x=names, y=[even for _, _, even in profile], name="everywhere alike", mode="lines+markers",
        line={"color": "#8a94a6", "dash": "dot"},
    )  # fmt: skip
    figure.update_xaxes(title="patches away" if patches else "tokens back", type="category")
    figure.update_yaxes(title="share of attention", rangemode="tozero")
    return plain(figure, height=230)


def loss_changes(effect: Effect, sample: Sample) -> go.Figure:
    """Change of the loss of every token that was predicted."""
    import plotly.graph_objects as go

    assert effect.after.losses is not None and effect.before.losses is not None
    change = effect.after.losses - effect.before.losses
    names = [short(label) for label in sample.labels[-len(change) :]]
    colours = [MARK if value > 0 else "#266ee8" for value in change.tolist()]
    figure = go.Figure(go.Bar(x=list(range(len(change))), y=rounded(change), marker_color=colours, customdata=names))
    figure.update_traces(hovertemplate="%{customdata}: %{y:+.3f} nats<extra></extra>")
    ticks = {"tickvals": list(range(len(names))), "ticktext": names} if len(names) <= 60 else {}
    figure.update_xaxes(tickangle=-60, tickfont={"size": 9}, **ticks)
    figure.update_yaxes(title="change of loss, nats", zeroline=True)
    return plain(figure, height=230, bottom=64)


def scatter(a: HeadScores, b: HeadScores, names: tuple[str, str]) -> go.Figure:
    """One dot a unit: its score in `a` and in `b`."""
    import plotly.graph_objects as go

    units = [str(unit) for unit in HeadSet.empty(a.kind).complement(a.layers, a.units)]
    layers = [unit.layer for unit in HeadSet.empty(a.kind).complement(a.layers, a.units)]
    figure = go.Figure(
        go.Scatter(
            x=a.values.flatten().tolist(), y=b.values.flatten().tolist(), customdata=units, mode="markers",
            marker={"size": 7, "color": layers, "colorscale": [[0, "#8ab4f8"], [1, "#d9822b"]], "opacity": 0.8,
                    "colorbar": {"title": {"text": "layer", "side": "right"}, "thickness": 8, "outlinewidth": 0}},
            hovertemplate="%{customdata}: %{x:.4g}, %{y:.4g}<extra></extra>",
        )
    )  # fmt: skip
    figure.update_xaxes(title=safe(names[0]))
    figure.update_yaxes(title=safe(names[1]))
    return plain(figure, height=360)


def depth(tables: Iterable[tuple[str, HeadScores]]) -> go.Figure:
    """The mean and the best score of every layer by relative depth, for tables whose heads cannot be paired."""
    import plotly.graph_objects as go

    figure = go.Figure()
    for (name, scores), colour in zip(tables, ("#266ee8", MARK), strict=True):
        x = [layer / max(1, scores.layers - 1) for layer in range(scores.layers)]
        for what, values, dash in (("best", scores.values.amax(1), "solid"), ("mean", scores.values.mean(1), "dot")):
            line = {"color": colour, "dash": dash}
            figure.add_scatter(x=x, y=values.tolist(), mode="lines+markers", name=f"{safe(name)}, {what}", line=line)
    figure.update_xaxes(title="depth: 0 first layer, 1 last")
    return plain(figure, height=340)


def budget(points: Points, chosen: int) -> go.Figure:
    """Recall and perplexity over the share of the cache: measured points only; lines join them for the eye."""
    import plotly.graph_objects as go
    from plotly.subplots import make_subplots

    figure = make_subplots(rows=2, cols=1, shared_xaxes=True, vertical_spacing=0.08)
    for kind in [kind for kind in KINDS if kind != FULL and any(run.kind == kind for run in points.runs)]:
        counts = sorted({run.full_heads for run in points.runs if run.kind == kind} | {points.full.full_heads})
        groups = [[run for run in points.at(count) if run.kind in (kind, FULL)] for count in counts]
        x = [100 * fmean(points.share(run) for run in group) for group in groups]
        for row, name in ((1, "tokens"), (2, "perplexity")):
            y = [fmean(getattr(run, name) for run in group) for group in groups]
            figure.add_trace(
                go.Scatter(
                    x=x, y=y, name=kind, legendgroup=kind, showlegend=row == 1, mode="lines+markers",
                    line={"color": KINDS[kind], "width": 1, "dash": "dot"},
                    marker={"size": [15 if count == chosen else 8 for count in counts], "color": KINDS[kind]},
                    hovertemplate=f"{kind}: %{{y:.3g}} at %{{x:.3g}} %<extra></extra>",
                ),
                row=row, col=1,
            )  # fmt: skip
    figure.update_yaxes(title="digits recalled", row=1, col=1, rangemode="tozero")
    figure.update_yaxes(title="perplexity", row=2, col=1)
    figure.update_xaxes(title="share of the full KV cache, %", row=2, col=1)
    return plain(figure, height=440)


def empty(text: str) -> go.Figure:
    """A figure that says why it is empty."""
    import plotly.graph_objects as go

    figure = go.Figure()
    figure.add_annotation(text=text, showarrow=False, xref="paper", yref="paper", x=0.5, y=0.5)
    figure.update_xaxes(visible=False)
    figure.update_yaxes(visible=False)
    return plain(figure, height=140)


def plain(figure: go.Figure, *, height: int, left: int = 48, top: int = 28, bottom: int = 40) -> go.Figure:
    """What all figures share. Colours of text and lines come from the style sheet."""
    figure.update_layout(
        template="none", height=height, margin={"l": left, "r": 10, "t": top, "b": bottom}, dragmode=False,
        paper_bgcolor="rgba(0,0,0,0)", plot_bgcolor="rgba(0,0,0,0)",
        font={"family": "system-ui, Segoe UI, Roboto, DejaVu Sans, sans-serif", "size": 12},
        legend={"orientation": "h", "yanchor": "bottom", "y": 1.0, "xanchor": "left", "x": 0},
    )  # fmt: skip
    lines = not any(trace.type in ("heatmap", "image") for trace in figure.data)
    figure.update_xaxes(fixedrange=True, zeroline=False, title_standoff=4, showgrid=lines)
    figure.update_yaxes(fixedrange=True, zeroline=False, title_standoff=4, showgrid=lines)
    return figure


def short(label: str, most: int = 12) -> str:
    """A token that is seen: blanks and line ends shown, long ones cut, tags made harmless."""
    return safe(label.replace("\n", "⏎").replace("\t", "⇥").replace(" ", "␣"), most) or "∅"


def safe(text: str, most: int = 60) -> str:
    """Text that plotly takes literally: it reads some tags, links among them."""
    text = text.replace("<", "‹").replace(">", "›").replace("&", "＆")
    return text if len(text) <= most else text[: most - 1] + "…"


def rounded(values: Tensor) -> Any:
    """Nested lists with four digits behind the point: maps are sent to the page as text."""
    return (values.double() * 1e4).round().div(1e4).tolist()
