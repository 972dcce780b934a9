"""What the callbacks share: values that come from the page are checked here before anything else sees them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from dash import html, no_update

from headwise.errors import HeadwiseError, ViewError
from headwise.units import HeadSet, Unit
from headwise.view.explorer import Ask

Cell = str | float | int


def said(*empty: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """A callback whose last output is a message: an error that headwise raises on purpose is said there, and the others become `empty`."""

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def run(*values: Any) -> Any:
            try:
                return (*function(*values), "")
            except HeadwiseError as error:
                return (*empty, str(error))

        return run

    return decorate


def unit_of(text: Any) -> Unit | None:
    """The unit that the page names, if any. Raises UnitError for anything else."""
    return None if text is None else Unit.parse(text)


def ask_of(ran: Any) -> Ask | None:
    """What was run. Raises ViewError for anything that the page would not send."""
    if ran is None:
        return None
    if not isinstance(ran, dict):
        raise ViewError("what was run must be an object")
    prompt, picture, upload = ran.get("prompt", ""), ran.get("picture", 0), ran.get("upload", "")
    if not isinstance(prompt, str) or not isinstance(upload, str) or not isinstance(picture, int):
        raise ViewError("what was run is a text, the number of a picture, and the key of an image")
    return Ask(prompt, picture, upload)


def set_of(selection: Any) -> HeadSet:
    """The selected units, all of one kind."""
    if not isinstance(selection, list) or not all(isinstance(text, str) for text in selection):
        raise ViewError("the selection must be a list of addresses")
    return HeadSet.parse(",".join(selection)) if selection else HeadSet.empty()


def options(names: Sequence[str] | Mapping[str, Any]) -> list[dict[str, str]]:
    """Choices of a dropdown."""
    return [{"label": name, "value": name} for name in names]


def keep(value: Any, names: Sequence[str] | Mapping[str, Any], *, first: bool = True) -> Any:
    """The value of a dropdown whose choices have changed: the old one while it is there, else the first or none."""
    return value if value in names else (next(iter(names), None) if first else None)


def table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> Any:
    """A table; text is escaped by the page."""
    head = html.Thead(html.Tr([html.Th(column) for column in columns]))
    body = html.Tbody([html.Tr([html.Td(cell(value)) for value in row]) for row in rows])
    return html.Div(html.Table([head, body]), className="scroll")


def cell(value: Any) -> Any:
    """Floats with four digits; components and text as they are."""
    return f"{value:.4g}" if isinstance(value, float) else value


def cards(rows: Sequence[tuple[str, str]]) -> Any:
    """(name, value) pairs as cards."""
    return html.Div(
        [html.Div([html.B(value), html.Span(name)], className="fact") for name, value in rows], className="facts"
    )


def chip(unit: Unit, text: str = "") -> Any:
    """A button that opens a unit; the page's script listens to all of them."""
    return html.Button(f"{unit} {text}".strip(), className="chip", type="button", **{"data-unit": str(unit)})


def clicked(data: Any) -> Any:
    """The address that a click on a figure carries, or no_update."""
    points = data.get("points") if isinstance(data, dict) else None
    text: Any = points[0].get("customdata") if points else None
    try:
        return str(Unit.parse(text))
    except HeadwiseError:
        return no_update
