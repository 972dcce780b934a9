"""Two tables or plans side by side, measured points of a cache, and the list of files."""

from __future__ import annotations

from statistics import fmean
from typing import Any

from dash import Input, Output, State, html, no_update

from headwise.errors import HeadwiseError, ViewError
from headwise.plan import HeadPlan
from headwise.view import figures
from headwise.view.compare import PlanPair, ScorePair
from headwise.view.explorer import Explorer
from headwise.view.on_heads import table_names
from headwise.view.parts import ask_of, cards, chip, keep, options, said, table
from headwise.view.points import FULL, Points

HIDDEN = {"display": "none"}


def connect(app: Any, explorer: Explorer) -> None:
    """Hang the callbacks of this part into the application."""
    _compare(app, explorer)
    _points(app, explorer)
    _measure(app, explorer)

    @app.callback(Output("file-list", "children"), Input("version", "data"))
    def files(version: Any) -> Any:
        rows = [[item.name, item.kind, item.line] for item in explorer.library.items.values()]
        wrong = [[problem.name, "not read", problem.reason] for problem in explorer.library.problems]
        return (
            table(["file", "kind", "what it is"], rows + wrong) if rows or wrong else "No file of headwise lies here."
        )


def _compare(app: Any, explorer: Explorer) -> None:
    @app.callback(
        Output("compare-a", "options"), Output("compare-a", "value"), Output("compare-b", "options"), Output("compare-b", "value"),
        Input("compare-kind", "value"), Input("ran", "data"), Input("version", "data"),
        State("compare-a", "value"), State("compare-b", "value"),
    )  # fmt: skip
    def choices(kind: Any, ran: Any, version: Any, a: Any, b: Any) -> Any:
        names = list(explorer.library.of("plan")) if kind == "plans" else table_names(explorer, ran)
        second = b if b in names else keep(None, names[1:] or names)
        return options(names), keep(a, names), options(names), second

    @app.callback(
        Output("grid-a", "figure"), Output("grid-b", "figure"), Output("compare-scatter", "figure"), Output("compare-scatter", "style"),
        Output("compare-numbers", "children"), Output("compare-list", "children"), Output("compare-message", "children"),
        Input("compare-a", "value"), Input("compare-b", "value"), Input("compare-tokens", "value"), Input("narrow", "data"),
        State("compare-kind", "value"), State("ran", "data"),
    )  # fmt: skip
    @said(figures.empty(""), figures.empty(""), figures.empty(""), HIDDEN, "", "")
    def compare(a: Any, b: Any, tokens: Any, narrow: Any, kind: Any, ran: Any) -> Any:
        if a is None or b is None:
            return figures.empty("two are needed"), figures.empty(""), figures.empty(""), HIDDEN, "", ""
        if kind == "plans":
            return _two_plans(explorer, a, b, tokens, bool(narrow))
        return _two_scores(explorer, (a, b), ask_of(ran), bool(narrow))


def _two_scores(explorer: Explorer, names: tuple[str, str], ask: Any, narrow: bool) -> tuple[Any, ...]:
    pair = ScorePair.of(explorer.table(names[0], ask), explorer.table(names[1], ask))
    grids = [figures.head_grid(t, upright=narrow, label=t.method) for t in (pair.a, pair.b)]
    note = [html.P(pair.why, className="soft")] if pair.why else []
    if not pair.paired:
        return *grids, figures.depth(zip(names, (pair.a, pair.b), strict=True)), {}, note, ""
    rows = [[chip(unit), a, b, rank_a, rank_b] for unit, a, b, rank_a, rank_b in pair.disagreements()]
    listed = [html.H3("Where they disagree most"), table(["unit", "A", "B", "rank in A", "rank in B"], rows)]
    return *grids, figures.scatter(pair.a, pair.b, names), {}, [*note, cards(pair.numbers(10))], listed


def _two_plans(explorer: Explorer, a: str, b: str, tokens: Any, narrow: bool) -> tuple[Any, ...]:
    if not isinstance(tokens, int) or isinstance(tokens, bool):
        raise ViewError("the number of tokens must be a whole number")
    pair = PlanPair(explorer.library.get(a, HeadPlan), explorer.library.get(b, HeadPlan), tokens)
    changed = pair.changed()
    grids = [figures.head_grid(t, upright=narrow, marked=changed, label="kept") for t in pair.kept()]
    for grid in grids:
        grid.data[0].update(zmin=0.0, zmax=1.0)
    rows = [[str(u), str(p.layer(u.layer)[u.index]), str(q.layer(u.layer)[u.index])] for u in list(changed)[:40]
            for p, q in [(pair.a, pair.b)]]  # fmt: skip
    listed = [html.H3("Kv heads with another pattern"), table(["kv head", "A", "B"], rows)] if rows else ""
    return *grids, figures.empty(""), HIDDEN, cards(pair.numbers()), listed


def _points(app: Any, explorer: Explorer) -> None:
    @app.callback(
        Output("points", "options"), Output("points", "value"), Output("measure-score", "options"), Output("measure-score", "value"),
        Input("version", "data"), State("points", "value"), State("measure-score", "value"),
    )  # fmt: skip
    def choices(version: Any, value: Any, score: Any) -> Any:
        points, scores = explorer.library.of("points"), explorer.library.of("scores")
        fitting = [name for name, item in scores.items() if item.value.kind != "expert"]
        return options(points), keep(value, points), options(fitting), keep(score, fitting)

    @app.callback(
        Output("full", "min"),
        Output("full", "max"),
        Output("full", "marks"),
        Output("full", "value"),
        Input("points", "value"),
    )
    def slider(name: Any) -> Any:
        try:
            counts = explorer.points(name).counts()
        except HeadwiseError:
            return 0, 1, {}, 0
        marks = {place: str(count) for place, count in enumerate(counts)}  # a stop each, whatever lies between
        return 0, len(counts) - 1, marks, max(0, len(counts) - 2)

    @app.callback(
        Output("budget-figure", "figure"), Output("budget-cards", "children"), Output("budget-message", "children"),
        Input("full", "value"), Input("points", "value"),
    )  # fmt: skip
    @said(figures.empty(""), "")
    def show(stop: Any, name: Any) -> Any:
        if name is None:
            return figures.empty("no measured points: a demo's report.json, or: headwise sweep"), ""
        points = explorer.points(name)
        counts = points.counts()
        chosen = counts[stop] if isinstance(stop, int) and 0 <= stop < len(counts) else counts[-1]
        return figures.budget(points, chosen), [html.P(points.how, className="soft"), _point_table(points, chosen)]


def _point_table(points: Points, full: int) -> Any:
    rows = []
    for kind in figures.KINDS:
        runs = [run for run in points.at(full) if run.kind == kind] + ([points.full] if kind == FULL else [])
        if runs:
            rows.append([
                kind if len(runs) == 1 or kind == FULL else f"{kind}, mean of {len(runs)}",
                runs[0].full_heads,
                f"{fmean(run.tokens for run in runs):.0%}",
                f"{fmean(run.exact for run in runs) * runs[0].prompts:.3g} of {runs[0].prompts}",
                fmean(run.perplexity for run in runs),
                f"{fmean(run.cache_bytes for run in runs) / 2**20:.2f} MiB",
                f"{fmean(points.share(run) for run in runs):.0%}",
            ])  # fmt: skip
    return table(["kv heads kept by", "full", "digits", "prompts exact", "perplexity", "cache", "of full"], rows)


def _measure(app: Any, explorer: Explorer) -> None:
    @app.callback(
        Output("tick", "disabled"), Output("job-line", "children"),
        Input("measure", "n_clicks"), State("measure-score", "value"),
        State("measure-counts", "value"), State("measure-length", "value"), State("measure-keys", "value"), prevent_initial_call=True,
    )  # fmt: skip
    def start(clicks: Any, score: Any, counts: Any, length: Any, keys: Any) -> Any:
        try:
            how = {"length": _whole("tokens a prompt", length, 64, 8192), "prompts": _whole("prompts", keys, 1, 64)}
            wanted = [_whole("full kv heads", part, 0, 10**6) for part in str(counts or "").split(",")]
            explorer.measure(score, full_heads=wanted, **how)
        except HeadwiseError as error:
            return True, html.Span(str(error), className="error")
        return False, "measuring …"

    @app.callback(
        Output("tick", "disabled", allow_duplicate=True), Output("job-line", "children", allow_duplicate=True),
        Output("version", "data", allow_duplicate=True), Output("points", "value", allow_duplicate=True),
        Input("tick", "n_intervals"), State("version", "data"), prevent_initial_call=True,
    )  # fmt: skip
    def follow(ticks: Any, version: Any) -> Any:
        job = explorer.job
        if job is None or not job.done:
            return False, f"measuring: {job.line if job else ''} …", no_update, no_update
        if job.failed:
            return True, html.Span(job.line, className="error"), no_update, no_update
        return True, job.line, version + 1, job.name


def _whole(name: str, text: Any, low: int, high: int) -> int:
    try:
        number = int(str(text).strip())
    except ValueError:
        number = low - 1
    if not low <= number <= high:
        raise ViewError(f"{name} is {str(text)[:40]!r}; it must be a whole number from {low} to {high}")
    return number
