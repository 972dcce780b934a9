"""The grid, the cursor, the selection and its export; what the files say about the head that is open."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from dash import ClientsideFunction, Input, Output, State, ctx, dcc, html, no_update

from headwise.errors import HeadwiseError, ViewError
from headwise.units import HeadScores, HeadSet, Unit
from headwise.view import figures
from headwise.view.compare import nearest_by_scores
from headwise.view.explorer import Explorer
from headwise.view.page import VIEWS
from headwise.view.parts import ask_of, chip, clicked, keep, options, said, set_of, table, unit_of


def connect(app: Any, explorer: Explorer) -> None:
    """Hang the callbacks of this part into the application."""
    app.clientside_callback(
        ClientsideFunction("headwise", "show"),
        [Output(f"view-{name}", "hidden") for name in VIEWS],
        Input("view", "value"),
    )
    app.clientside_callback(ClientsideFunction("headwise", "narrow"), Output("narrow", "data"), Input("view", "id"))
    app.clientside_callback(
        ClientsideFunction("headwise", "theme"), Output("theme", "title"), Input("theme", "n_clicks")
    )
    _choices(app, explorer)
    _grid(app, explorer)
    _selection(app, explorer)
    _facts(app, explorer)


def _choices(app: Any, explorer: Explorer) -> None:
    @app.callback(
        Output("score", "options"), Output("score", "value"), Output("mark", "options"), Output("mark", "value"),
        Input("ran", "data"), Input("version", "data"), State("score", "value"), State("mark", "value"),
    )  # fmt: skip
    def choices(ran: Any, version: Any, score: Any, mark: Any) -> Any:
        names, marks = table_names(explorer, ran), explorer.marks()
        return options(names), keep(score, names), options(marks), keep(mark, marks, first=False)


def table_names(explorer: Explorer, ran: Any) -> list[str]:
    """Names of the tables that can be drawn; a prompt that cannot be read takes only the measured ones away."""
    try:
        return list(explorer.tables(ask_of(ran)))
    except HeadwiseError:
        return list(explorer.tables())


def _grid(app: Any, explorer: Explorer) -> None:
    @app.callback(
        Output("grid", "figure"), Output("grid-message", "children"),
        Input("score", "value"), Input("mark", "value"), Input("selection", "data"), Input("narrow", "data"), State("ran", "data"),
    )  # fmt: skip
    @said(figures.empty("nothing to draw"))
    def grid(score: Any, mark: Any, selection: Any, narrow: Any, ran: Any) -> Any:
        if score is None:
            return (figures.empty("no scores here: give a folder with scores, or a model and a prompt"),)
        scores = explorer.table(score, ask_of(ran))
        chosen = set_of(selection)
        shown = chosen if chosen.kind == scores.kind else None
        marked = explorer.marked(mark, scores)
        return (figures.head_grid(scores, upright=bool(narrow), marked=marked, selected=shown, label=scores.method),)

    @app.callback(
        Output("open", "data"), Input("grid", "clickData"), Input("compare-scatter", "clickData"),
        Input("grid-a", "clickData"), Input("grid-b", "clickData"), prevent_initial_call=True,
    )  # fmt: skip
    def pick(*given: Any) -> Any:
        return clicked(ctx.triggered[0]["value"])

    @app.callback(
        Output("cursor-line", "children"),
        Input("cursor", "data"),
        Input("open", "data"),
        Input("score", "value"),
        State("ran", "data"),
    )
    def line(cursor: Any, opened: Any, score: Any, ran: Any) -> str:
        try:
            unit = unit_of(cursor if ctx.triggered_id == "cursor" else opened)
            scores = explorer.table(score, ask_of(ran)) if unit and score else None
            return _line(scores, unit) if scores and unit and unit.kind == scores.kind else ""
        except HeadwiseError as error:
            return str(error)


def _line(scores: HeadScores, unit: Unit) -> str:
    value = scores[unit]
    better = int((scores.values > value).sum())
    same = int((scores.values == value).sum()) - 1
    ties = f", as {same} others" if same else ""
    return f"{unit}: {value:.4g}, rank {better + 1} of {len(scores)}{ties}"


def _selection(app: Any, explorer: Explorer) -> None:
    @app.callback(
        Output("selection", "data"),
        Input("toggle", "data"), Input("take", "n_clicks"), Input("clear", "n_clicks"),
        State("selection", "data"), State("take-k", "value"), State("score", "value"), State("ran", "data"),
        prevent_initial_call=True,
    )  # fmt: skip
    def select(toggle: Any, take: Any, clear: Any, selection: Any, k: Any, score: Any, ran: Any) -> Any:
        if ctx.triggered_id == "clear":
            return []
        try:
            if ctx.triggered_id == "take":
                return [str(unit) for unit in explorer.table(score, ask_of(ran)).top(k)]
            return [str(unit) for unit in _toggled(set_of(selection), Unit.parse(toggle["unit"]))]
        except (HeadwiseError, TypeError, KeyError):
            return no_update

    @app.callback(Output("selection-text", "children"), Input("selection", "data"))
    def text(selection: Any) -> str:
        chosen = set_of(selection)
        return f"{len(chosen)}: {chosen}" if len(chosen) else "nothing selected"

    @app.callback(
        Output("version", "data", allow_duplicate=True), Output("export-line", "children"),
        Input("export", "n_clicks"), State("selection", "data"), State("export-name", "value"), State("version", "data"),
        prevent_initial_call=True,
    )  # fmt: skip
    def export(clicks: Any, selection: Any, name: Any, version: Any) -> Any:
        try:
            path = explorer.export(set_of(selection), name)
        except HeadwiseError as error:
            return no_update, html.Span(str(error), className="error")
        return version + 1, f"written: {path.name}"

    @app.callback(
        Output("download-file", "data"), Output("export-line", "children", allow_duplicate=True),
        Input("download", "n_clicks"), State("selection", "data"), State("export-name", "value"), prevent_initial_call=True,
    )  # fmt: skip
    def download(clicks: Any, selection: Any, name: Any) -> Any:
        try:
            chosen = set_of(selection)
            if not len(chosen):
                raise ViewError("nothing is selected")
            return dcc.send_bytes(
                _as_file(chosen), Path(str(name)).name or "heads.safetensors"
            ), "handed to the browser"
        except HeadwiseError as error:
            return no_update, html.Span(str(error), className="error")


def _toggled(chosen: HeadSet, unit: Unit) -> HeadSet:
    """The selection with a unit more or less; units of another kind start a new one."""
    one = HeadSet.of([(unit.layer, unit.index)], unit.kind)
    if not len(chosen) or chosen.kind != unit.kind:
        return one
    return chosen - one if unit in chosen else chosen | one


def _as_file(chosen: HeadSet) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "set.safetensors"
        chosen.save(path)
        return path.read_bytes()


def _facts(app: Any, explorer: Explorer) -> None:
    @app.callback(
        Output("detail-title", "children"),
        Output("facts", "children"),
        Input("open", "data"),
        Input("version", "data"),
        State("ran", "data"),
    )
    def facts(opened: Any, version: Any, ran: Any) -> Any:
        try:
            unit = unit_of(opened)
            if unit is None:
                return "No head is open", "Open one on the grid."
            return _title(unit), _known(explorer, unit, ran)
        except HeadwiseError as error:
            return "No head is open", html.Span(str(error), className="error")


def _title(unit: Unit) -> str:
    return f"{unit}: {dict(head='head', kv='kv head', expert='expert')[unit.kind]} {unit.index} of layer {unit.layer}"


def _known(explorer: Explorer, unit: Unit, ran: Any) -> list[Any]:
    names, rows = table_names(explorer, ran), []
    tables = explorer.tables(ask_of(ran) if len(names) > len(explorer.tables()) else None)
    for name, scores in tables.items():
        if scores.kind == unit.kind and unit.layer < scores.layers and unit.index < scores.units:
            value = scores[unit]
            rows.append([name, value, f"{int((scores.values > value).sum()) + 1} of {len(scores)}"])
    parts: list[Any] = [table(["scores", "value", "rank"], rows)] if rows else [html.P("No table has this unit.")]
    if rows:
        near = nearest_by_scores(tables, unit)
        parts += [
            html.H3("Units that score alike"),
            html.Div([chip(u, f"{gap:.2f} σ") for u, gap in near], className="chips"),
        ]
    return parts + _relatives(explorer, unit)


def _relatives(explorer: Explorer, unit: Unit) -> list[Any]:
    """The query heads of a kv head, or the kv head of a query head."""
    group = explorer.group()
    if unit.kind == "kv" and group is not None:
        heads = [Unit("head", unit.layer, unit.index * group + member) for member in range(group)]
        return [html.H3("Its query heads"), html.Div([chip(head) for head in heads], className="chips")]
    return []
