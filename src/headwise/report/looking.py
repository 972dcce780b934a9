"""Where a vision-language model looks while it answers: attention on the picture by layer, as it is and under VAR, and VHD by head.

Letters: B pictures, L layers, H query heads, N queries, M keys, S patches a side.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

import headwise
from headwise.attach import HeadCall, attach
from headwise.attach.images import ImageTokens
from headwise.attach.maps import attention_map
from headwise.errors import TaskError
from headwise.report import figures
from headwise.report.page import Section, Table

if TYPE_CHECKING:
    import plotly.graph_objects as go
    from transformers import PreTrainedModel

    from headwise.steer.var import VAR


@torch.no_grad()
def image_attention(model: PreTrainedModel, inputs: Mapping[str, Tensor], rule: VAR | None = None) -> Tensor:
    """(B, L, S, S): weight of the last token on each patch of its picture, mean over heads; under a rule of VAR if one is given.

    One square picture a row, as many patches in each; TaskError otherwise.

    >>> from headwise.hub import load_model
    >>> from headwise.tasks.pictures import picture_batches
    >>> model, tokenizer = load_model("tiny-random-llava")
    >>> image_attention(model, picture_batches(model, tokenizer, 2)[0]).shape
    torch.Size([2, 4, 4, 4])
    """
    rows = {k: v.to(model.device) if isinstance(v, Tensor) else v for k, v in inputs.items()}
    running = ImageTokens(model) if rule is None else rule.attach(model)
    if rule is None:
        running.attach_with()
    maps: dict[int, Tensor] = {}
    with running, attach(model, observers=[_keep(maps, running, rule)], stack=running.stack.pattern):
        model(**rows)
        where = running.table
    counts = set(where.sum(1).tolist())
    side = math.isqrt(next(iter(counts)))
    if len(counts) != 1 or side * side not in counts:
        raise TaskError(f"the rows have {sorted(counts)} image tokens; attention is drawn for one square picture a row")
    table = torch.stack([maps[layer] for layer in sorted(maps)], dim=1)[..., : where.shape[1]]  # (B, L, M)
    picked = table[where[:, None].expand(-1, table.shape[1], -1)]
    return picked.view(len(where), table.shape[1], side, side).cpu()


def _keep(maps: dict[int, Tensor], running: Any, rule: VAR | None) -> Any:
    """An observer: the last real row of every layer, mean over heads, as VAR leaves it where it acts."""
    from headwise.attach.divergence import last_rows
    from headwise.steer.var import redistribute_map

    def see(call: HeadCall, out: Tensor) -> None:
        rows = last_rows(call, attention_map(call).transpose(1, 2)).transpose(1, 2)  # (B, H, 1, M)
        if rule is not None and call.layer in rule.layers:
            image, sinks = running.table, running.sinks[call.layer]
            options = {name: getattr(rule, name) for name in ("move", "rho", "minimum_mass", "centric")}
            rows = redistribute_map(rows, image[:, : rows.shape[-1]], sinks[:, : rows.shape[-1]], **options)
        maps[call.layer] = rows[:, :, 0].mean(1)

    return see


def attention_panels(pictures: Tensor, maps: Mapping[str, Tensor]) -> go.Figure:
    """A row a picture: the picture (B, 3, P, P) in [-1, 1], then one panel (B, S, S) for each name, on one scale a row."""
    import plotly.graph_objects as go
    from plotly.subplots import make_subplots

    if not len(pictures) or any(len(one) != len(pictures) for one in maps.values()):
        raise TaskError(f"{len(pictures)} pictures and maps of {[len(one) for one in maps.values()]}; as many of each")
    figure = make_subplots(
        rows=len(pictures),
        cols=1 + len(maps),
        column_titles=["picture", *maps],
        horizontal_spacing=0.01,
        vertical_spacing=0.02,
    )
    for row, picture in enumerate(pictures, 1):
        dots = ((picture.float().clamp(-1, 1) + 1) * 127.5).to(torch.uint8).permute(1, 2, 0)
        figure.add_trace(go.Image(z=dots.tolist(), hoverinfo="skip"), row, 1)
        top = max(float(one[row - 1].max()) for one in maps.values())
        for column, one in enumerate(maps.values(), 2):
            heat = go.Heatmap(
                z=one[row - 1].tolist(), zmin=0, zmax=top, colorscale=figures.BLUES, showscale=False,
                hovertemplate="%{z:.3f}<extra></extra>",
            )  # fmt: skip
            figure.add_trace(heat, row, column)
            axes = figure.get_subplot(row, column)
            axes.yaxis.update(scaleanchor=axes.xaxis.plotly_name.replace("axis", ""), constrain="domain")
            axes.xaxis.update(constrain="domain")
    figure.update_yaxes(autorange="reversed", visible=False)
    figure.update_xaxes(visible=False)
    styled = figures._style(figure, height=60 + 130 * len(pictures))
    styled.update_layout(margin={"l": 4, "r": 4, "t": 32, "b": 8})
    return styled


def looking_section(
    model: PreTrainedModel,
    inputs: Mapping[str, Tensor],
    rule: VAR | None = None,
    *,
    layer: int | None = None,
    said: Sequence[tuple[str, str]] = (),
) -> Section:
    """A section of a report: attention on the pictures of `inputs` in one layer (by default the last), under `rule` beside it, and the
    divergence of every head. `said`: (label, text) of answers to show.
    """
    plain = image_attention(model, inputs)
    at = plain.shape[1] - 1 if layer is None else range(plain.shape[1])[layer]
    maps = {f"layer {at}": plain[:, at]}
    if rule is not None:
        maps |= {"under VAR": image_attention(model, inputs, rule)[:, at]}
    scores = headwise.score.vhd(model, None, batches=[inputs])
    masses = plain.sum((2, 3)).mean(0).tolist()
    return Section(
        title="Where the model looks",
        text=[
            "Weight of the last token on the patches of its picture, mean over heads; one scale a row. Below: how far the output of each "
            "head moves when the picture is taken away (VHD).",
        ],
        figures=[attention_panels(inputs["pixel_values"].cpu(), maps), figures.head_map(scores.values, label="VHD")],
        table=Table(["layer", "attention on the picture"], [[n, mass] for n, mass in enumerate(masses)]),
        quotes=list(said),
        command="headwise score vhd --model scene-vlm-0 -o vhd.safetensors",
    )
