"""One page about a measured claim: every check against its bound, all numbers, and the figures of the paper's own module.

`headwise reproduce circuit-reuse --page page.html` writes it. A module of `headwise.papers` may define
`sections(result, *, seed=0, progress=False) -> list[Section]`; what it gives stands behind the checks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from headwise.report.figures import COLOURS, _style
from headwise.report.page import Card, Section, Table, render

if TYPE_CHECKING:
    import plotly.graph_objects as go

    from headwise.papers.catalogue import Row
    from headwise.papers.reproduction import Check, Reproduction


def paper_page(row: Row, result: Reproduction, *, seed: int = 0, progress: bool = False) -> str:
    """The page as HTML. Raises TaskError where plotly is missing."""
    own = getattr(row.module, "sections", None)
    sections = [_claim(row, result, seed), *(own(result, seed=seed, progress=progress) if own is not None else ())]
    failed = len(result.failed())
    cards = [
        Card("holds" if result.holds else "does not hold", "what the numbers of this run say of the claim"),
        Card(f"{len(result.checks) - failed} of {len(result.checks)}", "checks are true"),
        Card(f"{result.seconds:.0f} s", f"scale {result.scale}"),
    ]
    facts = [("paper", f"{row.id} {row.title}, arXiv {row.arxiv}"), ("seed", str(seed)), *result.environment.items()]
    return render(row.title, result.claim, cards=cards, sections=sections, facts=[(k, str(v)) for k, v in facts])


def _claim(row: Row, result: Reproduction, seed: int) -> Section:
    failed = result.failed()
    numbers: list[list[Any]] = [[name, "measured", value] for name, value in result.metrics.items()]
    numbers += [[name, "to compare with", value] for name, value in result.baselines.items()]
    wrong = ", ".join(check.name for check in failed)
    return Section(
        title="What was asked, and what came out",
        text=[
            "One pair of bars a check: above what was measured, below what it is held against, both as shares of the larger one. "
            + ("Every check is true." if not failed else f"Not true: {wrong}."),
        ],
        figures=[check_bars(result.checks, result.numbers)],
        table=Table(["number", "", "value"], numbers),
        command=f"headwise reproduce {row.slug} --scale {result.scale} --seed {seed} --page page.html",
    )


def check_bars(checks: Sequence[Check], numbers: dict[str, float]) -> go.Figure:
    """A pair of bars for each check, as shares of the larger of its two sides; orange where the check is not true."""
    import plotly.graph_objects as go

    figure = go.Figure()
    names = [f"{'' if check.holds(numbers) else '✗ '}{check.name} ({check.op})" for check in checks]
    for side, colour in (("left", COLOURS["score"]), ("right", COLOURS["random"])):
        values = [_value(getattr(check, side), numbers) for check in checks]
        most = [max(abs(_value(c.left, numbers)), abs(_value(c.right, numbers))) or 1.0 for c in checks]
        lit = [colour if side == "right" or c.holds(numbers) else COLOURS["inverse"] for c in checks]
        figure.add_trace(
            go.Bar(
                x=[value / top for value, top in zip(values, most, strict=True)],
                y=names,
                orientation="h",
                name="measured" if side == "left" else "held against",
                marker_color=lit,
                text=[f"{value:.3g}" for value in values],
                textposition="auto",
                hovertext=[str(getattr(check, side)) for check in checks],
                hovertemplate="%{hovertext}: %{text}<extra></extra>",
            )
        )
    figure.update_layout(barmode="group", bargap=0.3)
    figure.update_xaxes(showticklabels=False, zerolinewidth=2)
    figure.update_yaxes(autorange="reversed", automargin=True)
    return _style(figure, height=110 + 46 * len(checks))


def _value(side: Any, numbers: dict[str, float]) -> float:
    value = float(numbers[side]) if isinstance(side, str) else float(side)
    return value if abs(value) < float("inf") else 0.0  # a broken number has no bar, and its check is not true
