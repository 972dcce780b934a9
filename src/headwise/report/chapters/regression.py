"""In-context regression seen while it is learned: what becomes of each head, against what theory says.

run = train_regression(heads=2, seeds=3, record=25)
page(Path("regression.html"), run)
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from headwise.models.icl_theory import gd_optimum, gradient_flow
from headwise.models.icl_training import RegressionRun
from headwise.report import figures
from headwise.report.figures import COLOURS, PALETTE, Line
from headwise.report.page import Card, Section, Table, render
from headwise.score.icl_regression import patterns

if TYPE_CHECKING:
    import plotly.graph_objects as go

DIVERGING = [[0.0, "#d9822b"], [0.5, "#f7f8fa"], [1.0, "#2557a7"]]


def page(
    path: str | Path, run: RegressionRun, *others: RegressionRun, lengths: Sequence[int] = (20, 40, 80, 160)
) -> None:
    """Write one HTML page: the dynamics and circuits of `run`, and the risk of all runs against length."""
    text = page_html(run, *others, lengths=lengths)
    Path(path).write_text(text, encoding="utf-8")


def page_html(
    run: RegressionRun, *others: RegressionRun, lengths: Sequence[int] = (20, 40, 80, 160), count: int = 20_000
) -> str:
    """The page as text."""
    runs = (run, *others)
    risks = [[float(r.risk(length=n, count=count, rescale=False).mean()) for n in lengths] for r in runs]
    found = patterns(run.circuits, run.task.dim)
    eta, _ = gd_optimum(**_sizes(run))
    cards = [
        Card(
            f"{float((found.omega * found.mu).sum(1).mean()):.3f}",
            f"step size of the trained heads; theory says {eta:.3f}",
        ),
        Card(
            f"{float((found.mu.sum(1).abs() / found.mu.abs().amax(1)).max()):.3f}",
            "sum of mu over the largest mu, worst seed",
        ),
    ]
    sections = [dynamics_section(run), circuits_section(run), length_section(runs, risks, lengths)]
    facts = [("task", str(run.task)), ("seeds", str(len(run.weights.q))), ("steps", str(int(run.steps[-1])))]
    lead = "A layer with nothing but attention learns to regress, and its heads become a formula."
    return render("In-context regression, head by head", lead, cards=cards, sections=sections, facts=facts)


def _sizes(run: RegressionRun) -> Any:
    return {"dim": run.task.dim, "length": run.task.length, "noise": run.task.noise}


def dynamics_section(run: RegressionRun) -> Section:
    """omega and mu of every head of every seed over the training, and the gradient flow of the approximate loss."""
    return Section(
        title="Heads find their signs",
        text=[
            "omega says how strongly a head compares covariates, mu what it does with the label it finds. From a random start the heads "
            "take opposite signs, and the mu come to sum to zero: together they are a step of gradient descent that ignores the mean.",
            "Below, the same for the gradient flow of the approximate loss, which knows only omega and mu.",
        ],
        figures=[dynamics(run), flow(run)],
        command="headwise reproduce icl-linear-regression",
    )


def dynamics(run: RegressionRun) -> go.Figure:
    """omega and mu over steps; a colour a head, a line a seed."""
    steps = run.steps.tolist()
    panels: dict[str, list[Line]] = {}
    for name, table in (("omega", run.omega()), ("mu", run.mu())):
        R, S, H = table.shape
        panels[name] = [
            Line(
                f"head {h}",
                steps,
                table[:, s, h].tolist(),
                colour=PALETTE[h % len(PALETTE)],
                dash="solid" if s == 0 else "dot",
            )
            for s in range(S)
            for h in range(H)
        ]
    return figures.lines(panels, x_title="step")


def flow(run: RegressionRun, steps: int = 3000) -> go.Figure:
    """Gradient flow of two heads from a small start that is not symmetric."""
    start = torch.tensor([0.10, -0.08], dtype=torch.float64), torch.tensor([0.05, -0.10], dtype=torch.float64)
    omega, mu, loss = gradient_flow(*start, **_sizes(run), steps=steps)
    every = slice(None, None, max(1, steps // 150))
    x = list(range(0, steps + 1))[every]
    colours = PALETTE[:2]
    return figures.lines(
        {
            "omega": [Line(f"head {h}", x, omega[every, h].tolist(), colour=colours[h]) for h in (0, 1)],
            "mu": [Line(f"head {h}", x, mu[every, h].tolist(), colour=colours[h]) for h in (0, 1)],
            "approximate loss": [Line("loss", x, loss[every].tolist(), colour=COLOURS["dense"])],
        },
        x_title="step of 0.01",
    )


def circuits_section(run: RegressionRun) -> Section:
    """KQ of each head of the first seed, and the measures of all seeds."""
    found = patterns(run.circuits, run.task.dim)
    rows = [
        [s, h, *(float(t[s, h]) for t in (found.omega, found.omega_std, found.kq_rest, found.mu, found.ov_rest))]
        for s in range(found.omega.shape[0])
        for h in range(found.omega.shape[1])
    ]
    return Section(
        title="What a head compares",
        text=[
            "Entry (i, j) of KQ weighs covariate i of a pair against covariate j of the question. "
            "All that is left is a multiple of the identity."
        ],
        figures=[circuits(run)],
        table=Table(["seed", "head", "omega", "its spread", "other entries of KQ", "mu", "other entries of OV"], rows),
    )


def circuits(run: RegressionRun, seed: int = 0) -> go.Figure:
    """KQ[:, :d] of each head, one heat map beside the other; blue is positive, orange negative."""
    import plotly.graph_objects as go
    from plotly.subplots import make_subplots

    kq = run.circuits.kq[seed, ..., : run.task.dim].detach().cpu()
    most = float(kq.abs().max())
    figure = make_subplots(rows=1, cols=len(kq), subplot_titles=[f"head {h}" for h in range(len(kq))])
    for h, table in enumerate(kq):
        heat = go.Heatmap(
            z=table.tolist(), zmin=-most, zmax=most, colorscale=DIVERGING, showscale=h == 0, xgap=1, ygap=1
        )
        figure.add_trace(heat, row=1, col=h + 1)
    figure.update_yaxes(autorange="reversed", dtick=1)
    figure.update_xaxes(dtick=1)
    return figures._style(figure, height=260)


def length_section(runs: Sequence[RegressionRun], risks: Sequence[Sequence[float]], lengths: Sequence[int]) -> Section:
    """Risk of each run at lengths that it was not trained at, with the exact risk of gradient descent beside it."""
    task = runs[0].task
    exact = [gd_optimum(dim=task.dim, length=n, noise=task.noise)[1] for n in lengths]
    names = [f"{r.weights.q.shape[1]} {'linear' if r.linear else 'softmax'} heads" for r in runs]
    lines = [
        Line(n, lengths, y, colour=PALETTE[i % len(PALETTE)]) for i, (n, y) in enumerate(zip(names, risks, strict=True))
    ]
    lines.append(Line("gradient descent, best step", lengths, exact, colour=COLOURS["dense"], dash="dash"))
    return Section(
        title="Other lengths",
        text=[
            f"The weights were trained on {task.length} pairs. A softmax normalises itself; bare linear attention does not."
        ],
        figures=[figures.lines({"mean squared error": lines}, x_title="pairs", log_x=True)],
        table=Table(
            ["pairs", *(line.name for line in lines)],
            [list(row) for row in zip(lengths, *(li.y for li in lines), strict=True)],
        ),
    )
