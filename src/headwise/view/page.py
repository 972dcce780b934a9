"""The page: every component that exists, in four views. What they do is said in the `on_*` files."""

from __future__ import annotations

from typing import Any

from dash import dcc, html

from headwise.view.explorer import Explorer, check_files
from headwise.view.figures import empty

PROMPT = (
    "The pass key is 71432. Remember it. The grass is green, the sky is blue, and the sun is yellow. "
    "What is the pass key? The pass key is 7143"
)
GRAPH = {"displayModeBar": False, "responsive": True, "scrollZoom": False, "doubleClick": False}
VIEWS = {"heads": "Heads", "compare": "Compare", "budget": "Budget", "files": "Files"}


def layout(explorer: Explorer) -> Any:
    """The whole page."""
    views = {"heads": _heads(explorer), "compare": _compare(), "budget": _budget(explorer), "files": _files(explorer)}
    sections = [html.Main(part, id=f"view-{name}", className="view") for name, part in views.items()]
    return html.Div([_header(explorer), *sections, *_stores(explorer)], id="page")


def graph(name: str, text: str = "") -> Any:
    """A figure that is drawn later."""
    return dcc.Graph(id=name, figure=empty(text), config=GRAPH, className="graph")


def dropdown(name: str, label: str, **options: Any) -> Any:
    """A labelled choice."""
    given = {"options": [], "clearable": False, **options}
    return html.Div([html.Label(label, htmlFor=name), dcc.Dropdown(id=name, **given)], className="field")


def message(name: str) -> Any:
    """Where errors of a part are said."""
    return html.Div(id=name, className="message", role="alert")


def button(text: str, name: str, **options: Any) -> Any:
    """A button."""
    return html.Button(text, id=name, n_clicks=0, type="button", **options)


def card(title: str, *children: Any, **options: Any) -> Any:
    """A part of the page under a heading."""
    return html.Section([html.H2(title), *children], className="card", **options)


def _header(explorer: Explorer) -> Any:
    models = [f"{live.name}: {live.fingerprint}" for live in (explorer.live, explorer.other) if live is not None]
    switch = dcc.RadioItems(
        id="view", value="heads", inline=True, className="switch", options=[{"label": v, "value": k} for k, v in VIEWS.items()]
    )  # fmt: skip
    return html.Header(
        [
            html.H1("headwise explorer"),
            html.P(" · ".join(models) or "no model loaded: files only", className="soft"),
            html.Nav([switch, button("◐", "theme", **{"aria-label": "switch between light and dark"})]),
        ]
    )


def _stores(explorer: Explorer) -> list[Any]:
    ask = None
    if explorer.live is not None:
        ask = {"prompt": PROMPT if not explorer.live.reads_pictures else "", "picture": 0, "upload": ""}
    first = next((item.value for item in explorer.library.of("scores").values() if item.value.kind == "head"), None)
    best = str(first.ranking()[0][0]) if first is not None else "L0H0" if ask is not None else None
    memory: dict[str, Any] = {
        "ran": ask,
        "open": best,
        "cursor": None,
        "toggle": None,
        "selection": [],
        "query": None,
        "narrow": False,
    }
    return [dcc.Store(id=name, data=data) for name, data in memory.items()] + [
        dcc.Store(id="version", data=0),
        dcc.Download(id="download-file"),
        dcc.Interval(id="tick", interval=1000, disabled=True),
    ]


def _heads(explorer: Explorer) -> list[Any]:
    box = html.Div(
        graph("grid", "no table of scores"), id="grid-box", tabIndex=0, role="application",
        **{"aria-label": "Grid of heads: arrow keys move, Enter opens, Space selects", "aria-describedby": "cursor-line"},
    )  # fmt: skip
    grid = card(
        "Every head",
        html.Div([dropdown("score", "Colour by"), dropdown("mark", "Outline", clearable=True)], className="row"),
        message("grid-message"),
        box,
        html.P("Pick a head with the pointer, or with the arrow keys and Enter; Space selects.", className="soft hint"),
        html.P("", id="cursor-line", role="status", className="line"),
    )
    left = html.Div([grid, _selection()], className="column")
    return [html.Div([left, html.Div(_detail(explorer), className="column")], className="columns")]


def _selection() -> Any:
    return card(
        "Selection",
        html.Div(
            [
                html.Label("the best", htmlFor="take-k"),
                dcc.Input(id="take-k", type="number", min=1, step=1, value=10, inputMode="numeric"),
                button("take", "take"),
                button("clear", "clear"),
            ],
            className="row tight",
        ),
        html.Output("nothing selected", id="selection-text", className="units"),
        html.Div(
            [
                html.Label("file", htmlFor="export-name"),
                dcc.Input(id="export-name", type="text", value="heads.safetensors", maxLength=100, spellCheck=False),
                button("write", "export", className="main"),
                button("download", "download"),
            ],
            className="row tight",
        ),
        html.Div("", id="export-line", role="status", className="message"),
    )


def _detail(explorer: Explorer) -> list[Any]:
    facts = card("No head is open", html.Div("Open one on the grid.", id="facts"), id="detail")
    facts.children[0].id = "detail-title"
    if explorer.live is None:
        return [
            facts,
            html.Div([card("On your own prompt", html.P("Start with --model to ask a model.")), *_live(False, False)]),
        ]
    return [facts, *_live(explorer.live.reads_text, explorer.live.reads_pictures)]


def _live(text: bool, pictures: bool) -> list[Any]:
    shown = {} if text or pictures else {"style": {"display": "none"}}
    value = PROMPT if text and not pictures else ""
    ask = card(
        "Your own picture" if pictures and not text else "Your own prompt",
        html.Div(_ask(text, pictures, value)),
        message("run-message"),
    )
    look = card(
        "Where it looks",
        html.P("Choose the token that looks; the others are shaded by how much it looks at them.", className="soft"),
        html.Div([], id="strip", role="listbox", **{"aria-label": "tokens; arrow keys choose the one that looks"}),
        message("look-message"),
        dcc.Loading(graph("map"), delay_show=300),
        html.H3("How far"),
        graph("distance"),
        html.H3("Heads that look alike"),
        html.Div(id="nearest", className="chips"),
    )
    return [html.Div([ask, look, _effect(), _under()], **shown)]


def _ask(text: bool, pictures: bool, value: str) -> list[Any]:
    prompt = dcc.Textarea(id="prompt", value=value, maxLength=20_000, spellCheck=False, placeholder="type a prompt")
    picture = html.Div(
        [
            html.Label("drawn picture", htmlFor="picture"),
            dcc.Input(id="picture", type="number", min=0, step=1, value=0, inputMode="numeric"),
            dcc.Upload(html.Button("or your own image", type="button"), id="upload", accept="image/*", max_size=6 * 2**20),
        ],
        className="row tight",
        style={} if pictures else {"display": "none"},
    )  # fmt: skip
    label = html.Label("prompt", htmlFor="prompt", className="hidden")
    return [
        html.Div([label, prompt], style={} if text else {"display": "none"}),
        picture,
        button("run", "run", className="main"),
    ]


def _effect() -> Any:
    modes = {"zero": "output zero", "uniform": "looks everywhere alike"}
    return card(
        "Without it",
        html.Div(
            [dropdown("mode", "Taken out as", value="zero", options=[{"label": v, "value": k} for k, v in modes.items()])],
            className="row",
        ),
        message("effect-message"),
        dcc.Loading(html.Div(id="effect"), delay_show=300),
        graph("losses"),
        button("compare with 8 random heads", "chance"),
        dcc.Loading(html.P("", id="chance-line", role="status"), delay_show=300),
    )  # fmt: skip


def _under() -> Any:
    return card(
        "Under a plan and edits",
        html.Div(
            [dropdown("under-plan", "Plan", clearable=True), dropdown("under-edits", "Edits", clearable=True)],
            className="row",
        ),
        message("under-message"),
        dcc.Loading(html.Div("Choose a file.", id="under"), delay_show=300),
    )


def _compare() -> list[Any]:
    kinds = {"scores": "scores", "plans": "plans"}
    return [
        card(
            "Two side by side",
            dcc.RadioItems(
                id="compare-kind", value="scores", inline=True, className="switch",
                options=[{"label": v, "value": k} for k, v in kinds.items()],
            ),
            html.Div([dropdown("compare-a", "A"), dropdown("compare-b", "B")], className="row"),
            html.Div(
                [
                    html.Label("tokens seen, for plans", htmlFor="compare-tokens"),
                    dcc.Input(id="compare-tokens", type="number", step=1, value=4096, inputMode="numeric"),
                ],
                className="row tight",
            ),
            message("compare-message"),
            html.Div(id="compare-numbers"),
            html.Div([graph("grid-a"), graph("grid-b")], className="pair"),
            graph("compare-scatter"),
            html.Div(id="compare-list"),
        )
    ]  # fmt: skip


def _budget(explorer: Explorer) -> list[Any]:
    measured = card(
        "What a budget buys",
        html.P("Only measured points can be chosen; lines join them for the eye.", className="soft"),
        dropdown("points", "Measured points"),
        html.P("full kv heads", className="soft", id="full-label"),
        html.Div(
            dcc.Slider(id="full", min=0, max=1, step=1, marks={}, value=0, allow_direct_input=False),
            **{"aria-labelledby": "full-label"},
        ),
        message("budget-message"),
        html.Div(id="budget-cards"),
        graph("budget-figure", "no measured points"),
    )
    hidden = {} if explorer.live is not None and explorer.live.reads_text else {"style": {"display": "none"}}
    fields = {"counts": ("full kv heads", "9,23"), "length": ("tokens a prompt", "512"), "keys": ("prompts", "2")}
    again = card(
        "Measure more",
        html.P(
            "Passkeys are read through each plan's own cache: heads by score, by lot, and the worst. This takes minutes.",
            className="soft",
        ),
        dropdown("measure-score", "Heads by"),
        html.Div(
            [
                html.Div([html.Label(text, htmlFor=f"measure-{n}"), dcc.Input(id=f"measure-{n}", type="text", value=v)])
                for n, (text, v) in fields.items()
            ],
            className="row",
        ),
        button("measure", "measure", className="main"),
        html.P("", id="job-line", role="status"),
        **hidden,
    )
    return [measured, again]


def _files(explorer: Explorer) -> list[Any]:
    wrong = [html.Li(text) for text in check_files(explorer)]
    return [
        card("Files", html.Div(id="file-list", className="scroll")),
        card("Made for another model", html.Ul(wrong), style={} if wrong else {"display": "none"}),
    ]
