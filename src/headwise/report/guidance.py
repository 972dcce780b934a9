"""What guidance does to samples: a grid of pictures, one block of rows a setting, and which heads the search chose.

Letters: B pictures, S pixels a side, L layers, H query heads.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from headwise.errors import TaskError
from headwise.report import figures
from headwise.report.page import Section, Table

if TYPE_CHECKING:
    import plotly.graph_objects as go

    from headwise.steer import Hunt

GREYS = [[0.0, "#000000"], [1.0, "#ffffff"]]


def sample_grid(pictures: Mapping[str, Tensor], *, columns: int = 16) -> go.Figure:
    """Grey pictures (B, 1, S, S) in [-1, 1], a panel of up to `columns` in a row for each name, in the order given.

    >>> sample_grid({"plain": torch.zeros(4, 1, 8, 8), "guided": torch.ones(4, 1, 8, 8)}, columns=4).layout.height
    232
    """
    import plotly.graph_objects as go
    from plotly.subplots import make_subplots

    if not pictures:
        raise TaskError("pictures is empty; give at least one set of samples")
    for name, one in pictures.items():
        if one.ndim != 4 or one.shape[1] != 1:
            raise TaskError(f"pictures {name!r} have shape {tuple(one.shape)}; they must be (B, 1, S, S)")
    figure = make_subplots(
        rows=len(pictures), cols=1, subplot_titles=list(pictures), vertical_spacing=0.3 / len(pictures)
    )
    height = 40
    for row, one in enumerate(pictures.values(), 1):
        tiles = _tiles(one.float().clamp(-1, 1).cpu(), columns)
        heat = go.Heatmap(z=tiles.tolist(), zmin=-1, zmax=1, colorscale=GREYS, showscale=False, hoverinfo="skip")
        figure.add_trace(heat, row, 1)
        axes = figure.get_subplot(row, 1)
        axes.yaxis.update(scaleanchor=axes.xaxis.plotly_name.replace("axis", ""), constrain="domain")
        axes.xaxis.update(constrain="domain")
        height += 40 + max(56, round(720 * tiles.shape[0] / tiles.shape[1] / 4))
    figure.update_yaxes(autorange="reversed", visible=False)
    figure.update_xaxes(visible=False)
    figure.update_layout(
        template="plotly_white", height=height, dragmode=False, margin={"l": 4, "r": 4, "t": 28, "b": 8}
    )
    return figure


def _tiles(pictures: Tensor, columns: int) -> Tensor:
    """One image (rows · S, columns · S) of many (B, 1, S, S), missing ones black."""
    B, _, S, _ = pictures.shape
    columns = min(columns, B)
    rows = math.ceil(B / columns)
    filled = torch.cat([pictures[:, 0], pictures.new_full((rows * columns - B, S, S), -1.0)])
    return filled.view(rows, columns, S, S).transpose(1, 2).reshape(rows * S, columns * S)


def guidance_section(found: Hunt, pictures: Mapping[str, Tensor], *, columns: int = 16) -> Section:
    """A section of a report: the gain of each head alone, the order in which heads were chosen, and samples side by side."""
    scores = found.scores()
    order: list[list[str | int | float | None]] = [
        [place, f"L{l}H{h}", float(scores.values[l, h])] for place, (l, h) in enumerate(found.order, 1)
    ]
    rounds = ", ".join(f"{value:.3g}" for value in found.best)
    return Section(
        title="Which heads to push away from",
        text=[
            f"Without guidance the objective is {found.baseline:.3g}; the best candidate of each round reached {rounds}. "
            "The map shows what guidance by each head alone adds.",
        ],
        figures=[figures.head_map(scores.values, label="gain"), sample_grid(pictures, columns=columns)],
        table=Table(["place", "head", "gain alone"], order),
        command="headwise reproduce headhunter-softpag",
    )
