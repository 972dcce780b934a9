"""A self-contained HTML page: cards, sections with figures, the numbers behind each figure and the command to repeat it.

Everything is inside the one file, plotly's script included; nothing is fetched. Text is escaped.
"""

from __future__ import annotations

import html
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from headwise.errors import TaskError

Cell = str | int | float | None


@dataclass(frozen=True)
class Card:
    """A headline: one figure and what it says."""

    value: str
    label: str


@dataclass(frozen=True)
class Table:
    """Rows of numbers; floats are shown with three significant digits, kept in full in the JSON."""

    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]

    def to_html(self) -> str:
        """A table that scrolls sideways on narrow screens."""
        head = "".join(f"<th>{html.escape(str(c))}</th>" for c in self.columns)
        body = "".join("<tr>" + "".join(f"<td>{_cell(c)}</td>" for c in row) + "</tr>" for row in self.rows)
        return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


@dataclass(frozen=True)
class Section:
    """One step of a story. `text`: paragraphs of plain text; `figures`: plotly figures; `quotes`: (label, model text).

    A figure may be a pair (figure, script): the script runs when the figure stands, with its element's id for `{plot_id}`.
    """

    title: str
    text: Sequence[str]
    figures: Sequence[Any] = ()
    table: Table | None = None
    command: str = ""
    quotes: Sequence[tuple[str, str]] = ()
    notes: Sequence[str] = field(default=())

    def to_html(self, number: int) -> str:
        """The section as HTML."""
        parts = [f'<section id="s{number}"><h2><span>{number}</span>{html.escape(self.title)}</h2>']
        parts += [f"<p>{_prose(p)}</p>" for p in self.text]
        parts += [_figure(figure) for figure in self.figures]
        parts += [
            f'<figure class="quote"><figcaption>{html.escape(label)}</figcaption><blockquote>{html.escape(text)}</blockquote></figure>'
            for label, text in self.quotes
        ]
        parts += [f'<p class="note">{html.escape(note)}</p>' for note in self.notes]
        if self.table is not None:
            parts.append(f"<details><summary>The numbers</summary>{self.table.to_html()}</details>")
        if self.command:
            parts.append(f'<p class="again">Repeat it</p><pre><code>{html.escape(self.command)}</code></pre>')
        return "\n".join([*parts, "</section>"])


def render(
    title: str, lead: str, *, cards: Sequence[Card], sections: Sequence[Section], facts: Sequence[tuple[str, str]]
) -> str:
    """The whole page. `facts` are (name, value) rows of the footer: model, versions, seeds, time.

    >>> text = render("T", "L", cards=[Card("3", "heads")], sections=[Section("A <b>", ["x"])], facts=[("seed", "0")])
    >>> "A &lt;b&gt;" in text and "https://" not in text
    True
    """
    has_figures = any(s.figures for s in sections)
    script = f"<script>{_plotly_script()}</script>" if has_figures else ""
    top = "".join(
        f'<div class="card"><b>{html.escape(c.value)}</b><span>{html.escape(c.label)}</span></div>' for c in cards
    )
    body = "\n".join(s.to_html(i) for i, s in enumerate(sections, 1))
    rows = "".join(f"<dt>{html.escape(k)}</dt><dd>{html.escape(v)}</dd>" for k, v in facts)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><title>{html.escape(title)}</title>'
        f"<style>{STYLE}</style>{script}</head><body><main><header><h1>{html.escape(title)}</h1>"
        f'<p class="lead">{html.escape(lead)}</p><div class="cards">{top}</div></header>\n{body}\n'
        f"<footer><dl>{rows}</dl></footer></main></body></html>\n"
    )


def _prose(text: str) -> str:
    """Escaped text in which `words in backticks` are code."""
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", html.escape(text))


def _cell(value: Cell) -> str:
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return html.escape(str(value))


def _figure(figure: Any) -> str:
    import plotly.io

    figure, script = figure if isinstance(figure, tuple) else (figure, None)
    inner = plotly.io.to_html(
        figure,
        full_html=False,
        include_plotlyjs=False,
        post_script=script,
        config={"displayModeBar": False, "responsive": True, "scrollZoom": False},
    )
    return f'<div class="figure">{inner}</div>'


def _plotly_script() -> str:
    try:
        import plotly
    except ImportError as error:
        raise TaskError("reports need plotly: pip install 'headwise[report]'") from error
    return (Path(plotly.__file__).parent / "package_data" / "plotly.min.js").read_text(encoding="utf-8")


STYLE = """
:root{--ink:#1c2330;--soft:#5b6576;--line:#e3e7ee;--accent:#2557a7;--paper:#fff;--wash:#f5f7fa}
*{box-sizing:border-box}html{-webkit-text-size-adjust:100%}
body{margin:0;background:var(--wash);color:var(--ink);font:17px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,"DejaVu Sans",sans-serif}
main{max-width:960px;margin:0 auto;padding:24px 16px 64px}
h1{font-size:clamp(1.6rem,5vw,2.4rem);line-height:1.15;margin:.4em 0 .3em;letter-spacing:-.02em}
.lead{color:var(--soft);font-size:1.1rem;max-width:44em;margin:0 0 20px}
.cards{display:grid;grid-template-columns:repeat(auto-fit,minmax(150px,1fr));gap:12px;margin-bottom:8px}
.card{background:var(--paper);border:1px solid var(--line);border-radius:10px;padding:14px 16px}
.card b{display:block;font-size:1.55rem;letter-spacing:-.02em;color:var(--accent)}
.card span{color:var(--soft);font-size:.88rem;line-height:1.35;display:block}
section{background:var(--paper);border:1px solid var(--line);border-radius:12px;padding:20px clamp(14px,3vw,28px);margin-top:20px}
h2{font-size:1.25rem;margin:.1em 0 .5em;line-height:1.25}
h2 span{display:inline-block;min-width:1.7em;color:var(--accent)}
p{margin:.5em 0;max-width:46em}
.figure{margin:10px 0;min-width:0;overflow:hidden}
.note{color:var(--soft);font-size:.92rem}
details{margin:10px 0}summary{cursor:pointer;color:var(--accent)}
.scroll{overflow-x:auto}table{border-collapse:collapse;font-size:.86rem;margin:8px 0;font-variant-numeric:tabular-nums}
th,td{padding:4px 12px 4px 0;text-align:right;border-bottom:1px solid var(--line);white-space:nowrap}
th:first-child,td:first-child{text-align:left}th{color:var(--soft);font-weight:600}
.again{color:var(--soft);font-size:.85rem;margin:.9em 0 .2em}
pre{background:#111827;color:#e6edf6;border-radius:8px;padding:10px 14px;overflow-x:auto;font-size:.84rem;line-height:1.45;margin:0}
.quote{margin:12px 0}.quote figcaption{color:var(--soft);font-size:.88rem}
blockquote{margin:4px 0;padding:8px 14px;border-left:3px solid var(--accent);background:var(--wash)}
blockquote{white-space:pre-wrap;overflow-wrap:anywhere;font-size:.94rem}
p code{background:var(--wash);padding:1px 4px;border-radius:4px;font-size:.9em;overflow-wrap:anywhere}
footer{color:var(--soft);font-size:.86rem;margin-top:28px}
dl{display:grid;grid-template-columns:max-content 1fr;gap:2px 16px;margin:0}dd{margin:0;overflow-wrap:anywhere}
"""
