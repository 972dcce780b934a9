"""The page of a circuit: every figure shows the numbers that it is made of, and the command writes it."""

import json

import pytest

pytest.importorskip("plotly", reason="reports are an extra: pip install 'headwise[report]'")

from headwise.cli import main
from headwise.errors import TaskError
from headwise.hub import load_model
from headwise.report.circuit_figures import attribution_bars, circuit_graph, graph_places, scatter, signed_map
from headwise.report.circuit_page import circuit_page, measure


@pytest.fixture(scope="module")
def story():
    return measure(*load_model("tiny-random-mixtral"), count=4, share=0.1, through="q,v")


def test_bars_add_up_to_the_logit_difference(story):
    for most in (3, 100):
        bars = attribution_bars(story.parts, most=most).data[0]
        assert sum(bars.x) == pytest.approx(float(story.parts.model.mean()), abs=1e-3)
        assert [abs(v) for v in bars.x[:3]] == sorted((abs(v) for v in bars.x[:3]), reverse=True)


def test_the_map_is_white_at_zero_and_frames_what_was_kept(story):
    figure = signed_map(story.patched, label="total", kept=story.circuit.heads)
    heat = figure.data[0]
    assert heat.zmin == -heat.zmax and heat.zmax == pytest.approx(float(story.patched.values.abs().max()))
    unit = story.patched.ranking()[0][0]
    assert heat.z[unit.index][unit.layer] == pytest.approx(story.patched[str(unit)])
    assert len(figure.layout.shapes) == len(story.circuit.heads)


def test_the_graph_draws_every_edge_as_wide_as_its_share(story):
    figure = circuit_graph(story.circuit, story.edges)
    lines = [t for t in figure.data if t.mode == "lines" and t.x[0] is not None]
    assert len(lines) == min(40, len(story.edges))
    assert lines[-1].line.width == max(t.line.width for t in lines)  # the strongest is drawn last
    places = graph_places(story.circuit)
    assert len(set(places.values())) == len(places) == len(story.circuit.heads) + 1
    assert all(places[e.sender][0] < places[e.receiver][0] for e in story.edges)


def test_the_scatter_has_a_point_a_head(story):
    figure = scatter(story.written, story.patched, x_title="x", y_title="y", kept=story.circuit.heads)
    points = {
        name: (x, y) for trace in figure.data for name, x, y in zip(trace.customdata, trace.x, trace.y, strict=True)
    }
    assert len(points) == len(story.patched)
    assert points["L2H1"] == (pytest.approx(story.written["L2H1"]), pytest.approx(story.patched["L2H1"]))
    with pytest.raises(TaskError, match="do not match"):
        scatter(story.written, story.experts, x_title="x", y_title="y")


def test_the_page_says_what_was_measured(story):
    text = circuit_page(story, model="tiny")
    assert "Experts, one by one" in text and str(story.patched.ranking()[0][0]) in text
    assert "https://" not in text.split("</style>")[0]


def test_the_command_writes_page_scores_and_json(tmp_path, capsys):
    page, scores = tmp_path / "sub" / "circuit.html", tmp_path / "c.safetensors"
    arguments = ["circuit", "--model", "tiny-random-gpt2", "--task", "induction", "--count", "4", "--share", "0.1"]
    with pytest.raises(SystemExit) as ended:
        main([*arguments, "-o", str(page), "--scores", str(scores), "--json"])
    assert not ended.value.code and page.read_text().endswith("</html>\n") and scores.is_file()
    said = json.loads(capsys.readouterr().out)
    assert said["edges"] and len(said["stages"]) == 2 and "L0H0" in said["parts"]
