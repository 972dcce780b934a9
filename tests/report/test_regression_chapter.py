"""The page of the regression layer: every figure has the numbers of the run, and the page stands alone."""

import pytest

from headwise.models.icl_training import train_regression
from headwise.tasks.regression import Regression

pytest.importorskip("plotly")
from headwise.report.chapters import regression


@pytest.fixture(scope="module")
def runs():
    task = Regression(dim=3, length=8)
    return train_regression(task, heads=2, seeds=2, steps=6, record=2), train_regression(
        task, heads=1, steps=3, linear=True
    )


def test_the_figures_show_the_run(runs):
    run = runs[0]
    traces = regression.dynamics(run).data
    assert len(traces) == 8 and list(traces[0].x) == [0, 2, 4, 6]
    assert traces[1].y[-1] == pytest.approx(run.omega()[-1, 0, 1].item())
    maps = regression.circuits(run).data
    assert len(maps) == 2 and maps[1].z[0][0] == pytest.approx(run.circuits.kq[0, 1, 0, 0].item())
    losses = regression.flow(run, steps=50).data[-1].y
    assert list(losses) == sorted(losses, reverse=True)


def test_the_page_stands_alone(runs, tmp_path):
    regression.page(tmp_path / "page.html", *runs, lengths=(4, 8))
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert text.count("<section") == 3 and "1 linear heads" in text and "2 softmax heads" in text
