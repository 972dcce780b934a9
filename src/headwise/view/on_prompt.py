"""The model on the user's own prompt: where a head looks, what is lost without it, what plans and edits do to it."""

from __future__ import annotations

from statistics import fmean
from typing import Any

from dash import Input, Output, State, html, no_update

from headwise.edits import HeadEdits
from headwise.errors import HeadwiseError, ViewError
from headwise.plan import HeadPlan
from headwise.units import Unit
from headwise.view import figures
from headwise.view.explorer import Ask, Explorer
from headwise.view.live import Effect, distance_profile, lost_mass
from headwise.view.parts import ask_of, cards, chip, keep, options, said, table, unit_of
from headwise.view.samples import Sample


def connect(app: Any, explorer: Explorer) -> None:
    """Hang the callbacks of this part into the application."""
    _run(app, explorer)
    _look(app, explorer)
    _effect(app, explorer)
    _under(app, explorer)


def _run(app: Any, explorer: Explorer) -> None:
    @app.callback(
        Output("ran", "data"), Output("run-message", "children"),
        Input("run", "n_clicks"), Input("upload", "contents"), State("prompt", "value"), State("picture", "value"),
        prevent_initial_call=True,
    )  # fmt: skip
    @said(no_update)
    def run(clicks: Any, upload: Any, prompt: Any, picture: Any) -> Any:
        key = explorer.keep(upload) if isinstance(upload, str) and upload else ""
        ran = {"prompt": prompt or "", "picture": 0 if picture is None else picture, "upload": key}
        ask = ask_of(ran)
        assert ask is not None
        explorer.sample(ask)
        return (ran,)


def _opened(explorer: Explorer, opened: Any, ran: Any) -> tuple[Unit, Ask] | None:
    """The head that is open, and what was run; None while one of them is missing."""
    unit, ask = unit_of(opened), ask_of(ran)
    if unit is None or ask is None or explorer.live is None:
        return None
    if unit.kind != "head":
        raise ViewError(f"{unit} is no query head; attention is looked at head by head: open one of its query heads")
    return unit, ask


def _look(app: Any, explorer: Explorer) -> None:
    @app.callback(
        Output("strip", "children"), Output("map", "figure"), Output("distance", "figure"), Output("look-message", "children"),
        Input("open", "data"), Input("ran", "data"), Input("query", "data"),
    )  # fmt: skip
    @said([], figures.empty(""), figures.empty(""))
    def look(opened: Any, ran: Any, query: Any) -> Any:
        found = _opened(explorer, opened, ran)
        if found is None:
            return [], figures.empty("open a head"), figures.empty("")
        unit, ask = found
        sample, map_ = explorer.sample(ask), explorer.maps(ask, unit)
        place = query if isinstance(query, int) and 0 <= query < sample.tokens else _first_query(sample)
        drawn = (
            figures.token_map(map_, sample, place) if sample.side is None else figures.patch_map(map_, sample, place)
        )
        profile = distance_profile(map_, sample)
        far = figures.distances(profile, patches=sample.side is not None)
        return _strip(sample, map_[place].tolist(), place), drawn, far

    @app.callback(Output("nearest", "children"), Input("open", "data"), Input("ran", "data"))
    def nearest(opened: Any, ran: Any) -> Any:
        try:
            found = _opened(explorer, opened, ran)
            return [chip(unit, f"{r:.2f}") for unit, r in explorer.nearest(found[1], found[0])] if found else []
        except HeadwiseError:
            return []  # said once, beside the map


def _first_query(sample: Sample) -> int:
    """Text: the last token. Pictures: the patch in the middle."""
    if sample.side is None:
        return sample.tokens - 1
    return sample.tokens - sample.side**2 + (sample.side // 2) * sample.side + sample.side // 2


def _strip(sample: Sample, weights: list[float], place: int) -> list[Any]:
    """One button a token, shaded by its share of the row; one of them takes the focus, arrow keys go on from there."""
    most = max(max(weights), 1e-9)
    return [
        html.Button(
            figures.short(label, 24), type="button", className="token", role="option", title=f"{weights[i]:.3f}",
            tabIndex=0 if i == place else -1, style={"--w": f"{weights[i] / most:.3f}"},
            **{"data-place": str(i), "aria-selected": "true" if i == place else "false"},
        )
        for i, label in enumerate(sample.labels)
    ]  # fmt: skip


def _effect(app: Any, explorer: Explorer) -> None:
    @app.callback(
        Output("effect", "children"), Output("losses", "figure"), Output("losses", "style"), Output("effect-message", "children"),
        Input("open", "data"), Input("ran", "data"), Input("mode", "value"),
    )  # fmt: skip
    @said("", figures.empty(""), {"display": "none"})
    def effect(opened: Any, ran: Any, mode: Any) -> Any:
        found = _opened(explorer, opened, ran)
        if found is None:
            return "Open a head.", figures.empty(""), {"display": "none"}
        unit, ask = found
        done = explorer.without(ask, unit, mode)
        if done.after.losses is None:
            return effect_parts(done), figures.empty(""), {"display": "none"}
        return effect_parts(done), figures.loss_changes(done, explorer.sample(ask)), {}

    @app.callback(
        Output("chance-line", "children"),
        Input("chance", "n_clicks"), Input("open", "data"), Input("ran", "data"), Input("mode", "value"), prevent_initial_call=True,
    )  # fmt: skip
    def chance(clicks: Any, opened: Any, ran: Any, mode: Any) -> Any:
        from dash import ctx

        if ctx.triggered_id != "chance":
            return ""  # another head: what was said is stale
        try:
            found = _opened(explorer, opened, ran)
            if found is None:
                return "Open a head."
            changes = explorer.chance(found[1], found[0], mode)
            own = explorer.without(found[1], found[0], mode).change
        except HeadwiseError as error:
            return html.Span(str(error), className="error")
        above = sum(own > change for change in changes)
        return (
            f"Without it {own:+.4f}; without one of {len(changes)} random heads {fmean(changes):+.4f} on average, from "
            f"{min(changes):+.4f} to {max(changes):+.4f}: it matters more than {above} of them."
        )


def effect_parts(effect: Effect) -> list[Any]:
    """Cards of loss and divergence, and the most likely continuations before and after."""
    facts = [("KL of the last prediction, nats", f"{effect.kl:.4f}")]
    if effect.before.loss is not None and effect.after.loss is not None:
        change = effect.after.loss - effect.before.loss
        facts = [
            ("mean loss, nats", f"{effect.before.loss:.3f} → {effect.after.loss:.3f}"),
            ("change", f"{change:+.4f}"),
            *facts,
        ]
    before, after = ([(figures.short(t, 20), p) for t, p in side.top] for side in (effect.before, effect.after))
    rows = [[f"{b[0]}", f"{b[1]:.1%}", f"{a[0]}", f"{a[1]:.1%}"] for b, a in zip(before, after, strict=True)]
    return [cards(facts), table(["before", "", "after", ""], rows)]


def _under(app: Any, explorer: Explorer) -> None:
    @app.callback(
        Output("under-plan", "options"), Output("under-plan", "value"), Output("under-edits", "options"), Output("under-edits", "value"),
        Input("version", "data"), State("under-plan", "value"), State("under-edits", "value"),
    )  # fmt: skip
    def files(version: Any, plan: Any, edits: Any) -> Any:
        plans, steps = explorer.library.of("plan"), explorer.library.of("edits")
        return options(plans), keep(plan, plans, first=False), options(steps), keep(edits, steps, first=False)

    @app.callback(
        Output("under", "children"), Output("under-message", "children"),
        Input("under-plan", "value"), Input("under-edits", "value"), Input("open", "data"), Input("ran", "data"),
    )  # fmt: skip
    @said("")
    def under(plan: Any, edits: Any, opened: Any, ran: Any) -> Any:
        found = _opened(explorer, opened, ran)
        if not plan and not edits:
            return ("Choose a plan or edits of this folder.",)
        if found is None:
            return ("Open a head.",)
        unit, ask = found
        parts = _plan_facts(explorer, ask, unit, plan) if plan else []
        parts += _edit_facts(explorer, unit, edits) if edits else []
        return ([*parts, html.H3("The whole model under them"), *effect_parts(explorer.under(ask, plan, edits))],)


def _plan_facts(explorer: Explorer, ask: Ask, unit: Unit, name: str) -> list[Any]:
    live, plan = explorer.need(), explorer.library.get(name, HeadPlan)
    plan.check(live.fingerprint)
    group = live.fingerprint.heads // live.fingerprint.kv_heads
    sample, pattern = explorer.sample(ask), plan.layer(unit.layer)[unit.index // group]
    kept = pattern.kept(sample.tokens)
    facts = [
        (f"its kv head, L{unit.layer}K{unit.index // group}, keeps", str(pattern)),
        ("tokens kept of this prompt", f"{kept} of {sample.tokens}"),
    ]
    lost = lost_mass(explorer.maps(ask, unit), plan, unit, group)
    if lost is not None:
        facts.append(("of its attention falls on what is gone", f"{float(lost.mean()):.1%}"))
    return [cards(facts)]


def _edit_facts(explorer: Explorer, unit: Unit, name: str) -> list[Any]:
    edits = explorer.library.get(name, HeadEdits)
    edits.check(explorer.need().fingerprint)
    mine = [str(edit)[:300] for edit in edits.for_layer(unit.layer) if unit in edit.units]
    text = (
        "Edits of this head:"
        if mine
        else f"No edit of {name} names this head; others may reach it through earlier layers."
    )
    return [html.P(text), html.Ul([html.Li(line) for line in mine])]
