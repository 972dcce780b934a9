"""One self-contained page about the heads of a vision transformer: importance, reach and patterns, linked by a click on a head.

Letters: L layers, H query heads, K distances, P patches, C clusters.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from headwise.errors import ScoreError
from headwise.report import figures
from headwise.report.figures import BLUES, COLOURS, PALETTE
from headwise.report.page import Card, Section, Table, render

if TYPE_CHECKING:
    import plotly.graph_objects as go

    from headwise.score.vit_importance import Importance
    from headwise.score.vit_patterns import Atlas
    from headwise.score.vit_strength import Strength

MARGIN = {"l": 44, "r": 8, "t": 40, "b": 36}
TITLE = "Heads of a vision transformer"
QUERY = 0.5
"""Where the query of the shown attention map stands: this share of the rows and of the columns."""


def vit_page(
    importance: Importance,
    strength: Strength,
    atlas: Atlas,
    *,
    metric: str = "js",
    title: str = TITLE,
) -> str:
    """The page as HTML: a click on a head of the map shows its profile, its mean attention and its importance over images.

    All three must be of one model. Raises ScoreError otherwise; TaskError where plotly is missing.
    """
    for name, other in (("strength", strength.made_for), ("atlas", atlas.made_for)):
        if other != importance.made_for:
            raise ScoreError(f"importance and {name} are of two models: {importance.made_for} and {other}")
    scores = importance.scores(metric)
    top = scores.ranking()[:10]
    values = scores.values
    cards = [
        Card(str(top[0][0]), f"matters most: {metric} {top[0][1]:.3g} when it is pruned"),
        Card(
            f"{float((values < 0.1 * values.max()).float().mean()):.0%}", "of the heads change a tenth of that, or less"
        ),
        Card(f"{len({n for row in atlas.names for n in row})}", "kinds of attention pattern"),
    ]
    sections = vit_sections(importance, strength, atlas, metric=metric)
    facts = [
        ("model", str(importance.made_for)),
        ("images", str(importance.values[metric].shape[-1])),
        ("pruning", importance.prune),
    ]
    lead = "Every head is pruned alone, measured over distance, and sorted by its attention pattern."
    return render(title, lead, cards=cards, sections=sections, facts=facts)


def vit_sections(importance: Importance, strength: Strength, atlas: Atlas, *, metric: str = "js") -> list[Section]:
    """The sections, also as chapters of another page."""
    return [
        _linked_section(importance, strength, atlas, metric),
        _depth_section(strength),
        _pattern_section(atlas, importance.scores(metric).values, metric),
        _agreement_section(importance),
    ]


def save_vit_page(path: str | Path, *parts: Any, **options: Any) -> None:
    """Write `vit_page` to a file, and the numbers beside it as JSON."""
    importance, strength, atlas = parts
    Path(path).write_text(vit_page(importance, strength, atlas, **options), encoding="utf-8")
    Path(path).with_suffix(".json").write_text(json.dumps(numbers(importance, strength, atlas)), encoding="utf-8")


def numbers(importance: Importance, strength: Strength, atlas: Atlas) -> dict[str, Any]:
    """Everything the page shows, as plain values."""
    return {
        "importance": {name: table.mean(-1).tolist() for name, table in importance.values.items()},
        "strength": {name: table.tolist() for name, table in strength.tables.items()},
        "patterns": {
            "names": atlas.names,
            "cluster": atlas.of_head().tolist(),
            "content": atlas.content_dependence().tolist(),
        },
        "grid": [importance.grid.rows, importance.grid.columns, importance.grid.prefix],
    }


def _linked_section(importance: Importance, strength: Strength, atlas: Atlas, metric: str) -> Section:
    table = importance.scores(metric)
    rows: list[list[Any]] = [
        [str(unit), value, atlas.names[unit.layer][unit.index], float(strength["distance"][unit.layer, unit.index])]
        for unit, value in table.ranking()
    ]
    return Section(
        title="Which heads matter, and what they look at",
        text=[
            "Above: what pruning each head changes. Click on a head: below stand its attention mass by distance, its mean attention "
            "from the patch in the middle, and how its importance spreads over images.",
        ],
        figures=[_Linked(importance, strength, atlas, metric).pair()],
        table=Table(["head", metric, "pattern", "mean distance"], rows),
        command="headwise score vit-importance --model M -o importance.safetensors",
    )


class _Linked:
    """Four panels in one plotly figure, whose lower three follow a click on the upper one."""

    def __init__(self, importance: Importance, strength: Strength, atlas: Atlas, metric: str):
        self.values = importance.scores(metric).values
        self.spread = importance.values[metric]
        self.mass, self.metric, self.names = strength["mass"], metric, atlas.names
        self.maps = _middle_maps(atlas)

    def figure(self) -> go.Figure:
        import plotly.graph_objects as go
        from plotly.subplots import make_subplots

        L, H = self.values.shape
        best = int(self.values.argmax())
        l, h = divmod(best, H)
        specs = [[{"colspan": 3}, None, None], [{}, {}, {}]]
        titles = ("importance", "attention mass by distance", "mean attention", "over images")
        figure = make_subplots(rows=2, cols=3, specs=specs, subplot_titles=titles, vertical_spacing=0.2)
        text = [[f"L{i}H{j}: {self.names[i][j]}" for i in range(L)] for j in range(H)]
        heat = {"colorscale": BLUES, "showscale": False, "xgap": 1, "ygap": 1}
        figure.add_trace(
            go.Heatmap(z=self.values.T.tolist(), text=text, hovertemplate="%{text}, %{z:.3g}<extra></extra>", **heat),
            1,
            1,
        )
        mass = self.mass[l, h]
        figure.add_trace(go.Bar(x=list(range(len(mass))), y=mass.tolist(), marker_color=COLOURS["score"]), 2, 1)
        figure.add_trace(go.Heatmap(z=self.maps[l, h].tolist(), **heat), 2, 2)
        figure.add_trace(go.Histogram(x=self.spread[l, h].tolist(), marker_color=PALETTE[1], nbinsx=12), 2, 3)
        figure.update_yaxes(autorange="reversed", title="head", row=1, col=1)
        figure.update_yaxes(autorange="reversed", row=2, col=2)
        figure.update_xaxes(title="layer", row=1, col=1)
        figure.update_layout(
            template="plotly_white",
            height=620,
            showlegend=False,
            dragmode=False,
            margin=MARGIN,
        )
        figure.update_layout(title={"text": f"shown: L{l}H{h}", "x": 0.99, "xanchor": "right", "font": {"size": 13}})
        return figure

    def pair(self) -> tuple[go.Figure, str]:
        """The figure, and the script with every head's data that follows a click."""
        data = {"mass": _rounded(self.mass), "maps": _rounded(self.maps), "spread": _rounded(self.spread)}
        script = (
            f"var data={json.dumps(data)};var div=document.getElementById('{{plot_id}}');"
            "div.on('plotly_click',function(e){var p=e.points[0];if(p.curveNumber!==0)return;var l=p.x,h=p.y;"
            "Plotly.restyle(div,{y:[data.mass[l][h]]},[1]);Plotly.restyle(div,{z:[data.maps[l][h]]},[2]);"
            "Plotly.restyle(div,{x:[data.spread[l][h]]},[3]);Plotly.relayout(div,{'title.text':'shown: L'+l+'H'+h});});"
        )
        return self.figure(), script


def _rounded(table: Tensor) -> list[Any]:
    """Nested lists of four significant digits: a page of a ViT-B stays small."""
    flat = [float(f"{value:.4g}") for value in table.flatten().tolist()]
    return torch.tensor(flat, dtype=torch.float64).view(table.shape).tolist()


def _middle_maps(atlas: Atlas) -> Tensor:
    """(L, H, rows, columns): mean attention from the patch in the middle."""
    grid = atlas.grid
    query = int(grid.rows * QUERY) * grid.columns + int(grid.columns * QUERY)
    return atlas.mean[:, :, query].unflatten(-1, (grid.rows, grid.columns))


def _depth_section(strength: Strength) -> Section:
    mean, spread = strength.layer_trend()
    hops = [k for k in (0, 1, 2, mean.shape[1] - 1) if k < mean.shape[1]]
    lines = [
        figures.Line(
            f"hop {k}",
            list(range(len(mean))),
            mean[:, k].tolist(),
            (mean[:, k] - spread[:, k]).tolist(),
            (mean[:, k] + spread[:, k]).tolist(),
            colour=PALETTE[place % len(PALETTE)],
        )
        for place, k in enumerate(dict.fromkeys(hops))
    ]
    reach = (strength["distance"] / strength["mass"].sum(-1).clamp(min=1e-12)).tolist()
    return Section(
        title="How far heads look, layer by layer",
        text=[
            "Attention weight per neighbour at a distance (in patches), mean over heads; bars are one standard deviation between heads."
        ],
        figures=[figures.lines({"weight per neighbour": lines}, x_title="layer")],
        table=Table(
            ["layer", *[f"head {h}" for h in range(len(reach[0]))]], [[layer, *row] for layer, row in enumerate(reach)]
        ),
        command="headwise score vit-strength --model M -o strength.safetensors",
    )


def _pattern_section(atlas: Atlas, importance: Tensor, metric: str) -> Section:
    import plotly.graph_objects as go

    L, H = importance.shape
    home, points = atlas.of_head(), atlas.plane.mean(0)
    sizes = 8 + 20 * (importance / importance.max().clamp(min=1e-12)).clamp(min=0)
    figure = go.Figure()
    for c in home.unique().tolist():
        inside = [(l, h) for l in range(L) for h in range(H) if home[l, h] == c]
        figure.add_trace(
            go.Scatter(
                x=[float(points[p][0]) for p in inside],
                y=[float(points[p][1]) for p in inside],
                text=[f"L{l}H{h}: {atlas.names[l][h]}" for l, h in inside],
                mode="markers",
                marker={
                    "color": PALETTE[c % len(PALETTE)],
                    "size": [float(sizes[p]) for p in inside],
                },
                name=f"cluster {c}",
                hovertemplate="%{text}<extra></extra>",
            )
        )
    figure.update_layout(
        template="plotly_white", height=420, margin={"l": 40, "r": 8, "t": 24, "b": 36}, legend={"orientation": "h"}
    )
    return Section(
        title="What heads have learned",
        text=[
            "Each point is a head in the plane of the auto-encoder's latents: near heads attend alike, large points matter more. "
            f"The auto-encoder explains {atlas.r2:.0%} of the variance of patterns that it was not trained on.",
        ],
        figures=[figure],
        table=Table(
            ["cluster", f"mean {metric}", "mean layer", "heads"], [list(row) for row in atlas.table(importance)]
        ),
        command="headwise score vit-patterns --model M -o patterns.safetensors",
    )


def _agreement_section(importance: Importance) -> Section:
    rows = [[a, b, value if value == value else None] for (a, b), value in importance.correlations().items()]
    return Section(
        title="Do the metrics agree?",
        text=[
            "Rank correlation over heads of each pair of metrics. Label-free ones (js, kl, embedding, flip) need no classes."
        ],
        table=Table(["metric", "metric", "rank correlation"], rows),
    )
