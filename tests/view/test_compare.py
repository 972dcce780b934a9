"""Pairs of tables and plans, nearest units, measured points, and figures that carry their addresses."""

import pytest
import torch

pytest.importorskip("plotly")

from headwise.attach import fingerprint
from headwise.errors import ViewError
from headwise.hub import load_model
from headwise.plan import HeadPlan, SinkWindow
from headwise.units import HeadScores, HeadSet, Unit
from headwise.view import figures
from headwise.view.compare import PlanPair, ScorePair, nearest_by_scores
from headwise.view.points import FULL, Points, measure_points

LLAMA = "tiny-random-llama"


def scores(values, **labels):
    return HeadScores(values=torch.as_tensor(values, dtype=torch.float32), method="m", **labels)


def test_two_tables_of_one_shape_are_paired():
    a, b = scores([[0.0, 1.0, 2.0, 3.0]]), scores([[3.0, 1.0, 2.0, 0.0]])
    pair = ScorePair.of(a, b)
    numbers = dict(pair.numbers(2))
    assert numbers["Spearman"] == "-0.800"
    assert numbers["top 2 in common (Jaccard)"] == "0.33"
    assert pair.disagreements(1) == [(Unit("head", 0, 0), 0.0, 3.0, 4, 1)]
    assert dict(ScorePair.of(a, scores([[1.0, 1.0, 1.0, 1.0]])).numbers(2))["Pearson"].startswith("undefined")


def test_tables_of_two_shapes_or_kinds_are_not_paired():
    for other in (scores([[0.0, 1.0]]), scores([[0.0, 1.0, 2.0, 3.0]], kind="kv")):
        pair = ScorePair.of(scores([[0.0, 1.0, 2.0, 3.0]]), other)
        assert not pair.paired
        assert "cannot be paired" in pair.why
        assert pair.numbers(3) == pair.disagreements() == []


def test_two_models_of_one_shape_are_paired_with_a_warning():
    a, b = (fingerprint(load_model(f"tiny-random-{name}")[0]) for name in ("llama", "qwen3"))
    values = torch.rand(3, 4)
    assert ScorePair.of(scores(values, fingerprint=a), scores(values, fingerprint=a)).why == ""
    assert "two models" in ScorePair.of(scores(values, fingerprint=a), scores(values, fingerprint=b)).why


def test_two_plans():
    a = HeadPlan.from_set(HeadSet.parse("L0K1"), SinkWindow(4, 28), 2, 2)
    b = HeadPlan.from_set(HeadSet.parse("L1K0"), SinkWindow(4, 28), 2, 2)
    pair = PlanPair(a, b, 320)
    assert pair.changed() == HeadSet.parse("L0K1,L1K0")
    assert torch.allclose(pair.kept()[0].values, torch.tensor([[0.1, 1.0], [0.1, 0.1]]))
    assert dict(pair.numbers())["full in A, in B, in both"] == "1, 1, 0"
    with pytest.raises(ViewError, match="side by side"):
        PlanPair(a, HeadPlan.full(3, 2), 10)
    with pytest.raises(ViewError, match="tokens is 0"):
        PlanPair(a, b, 0)


def test_nearest_by_scores_uses_every_table_of_the_shape():
    tables = {"a": scores([[0.0, 0.1, 5.0]]), "b": scores([[0.0, 9.0, 0.1]]), "kv": scores([[1.0]], kind="kv")}
    gaps = dict(nearest_by_scores(tables, Unit("head", 0, 0)))
    wanted = {}
    for other in (1, 2):
        parts = [
            (float(t.values[0, other] - t.values[0, 0]) / float(t.values.std(correction=0))) ** 2
            for t in (tables["a"], tables["b"])
        ]
        wanted[Unit("head", 0, other)] = (sum(parts) / 2) ** 0.5
    assert gaps == pytest.approx(wanted)
    with pytest.raises(ViewError, match="no table"):
        nearest_by_scores(tables, Unit("head", 5, 0))


@pytest.mark.parametrize("upright", [False, True])
def test_every_cell_of_a_grid_names_its_head_and_shows_its_score(upright):
    table = scores(torch.arange(6.0).view(2, 3))
    figure = figures.head_grid(table, upright=upright, marked=HeadSet.parse("L1H0"), selected=HeadSet.parse("L0H2"))
    (heat, *marks) = figure.data
    for names, values in zip(heat.customdata, heat.z, strict=True):
        for name, value in zip(names, values, strict=True):
            assert table[name] == value
    places = [(mark.y[0], mark.x[0]) if upright else (mark.x[0], mark.y[0]) for mark in marks]
    assert places == [(1, 0), (0, 2)]


def test_tokens_cannot_become_tags():
    assert figures.short("<a href='x'>\n y") == "‹a␣href='x'…"
    assert "<" not in figures.safe("<b>&lt;")
    assert "&" not in figures.safe("<b>&lt;")


def test_points_are_measured_at_the_counts_asked_for():
    model, tokenizer = load_model(LLAMA)
    kv = scores(torch.rand(3, 2), kind="kv")
    lines = []
    points = measure_points(
        model,
        tokenizer,
        kv,
        full_heads=[0, 2, 6],
        sinks=1,
        window=8,
        prompts=2,
        length=300,
        tokens=128,
        draws=2,
        step=lines.append,
    )
    found = [(run.kind, run.full_heads) for run in points.runs]
    assert found == [(FULL, 6), ("by score", 0), ("by score", 2), ("the opposite", 2), ("random", 2), ("random", 2)]
    assert len(lines) == 6
    by_score = next(run for run in points.runs if run.full_heads == 2)
    assert points.share(points.full) == 1
    assert 0.3 < points.share(by_score) < 0.45
    again = measure_points(model, tokenizer, kv, full_heads=[2], sinks=1, window=8, prompts=2, length=300, tokens=128)
    assert again.at(2)[0].perplexity == by_score.perplexity
    figure = figures.budget(points, 2)
    shares = {round(100 * points.share(run), 6) for run in points.runs}
    assert {round(x, 6) for trace in figure.data for x in trace.x} <= shares


@pytest.mark.parametrize("counts", [[], [7], [-1]])
def test_points_outside_the_model(counts):
    with pytest.raises(ViewError, match="full_heads"):
        measure_points(*load_model(LLAMA), scores(torch.rand(3, 2), kind="kv"), full_heads=counts)


def test_points_keep_their_numbers_on_disk(tmp_path):
    row = {
        "kind": FULL,
        "full_heads": 6,
        "exact": 1.0,
        "tokens": 0.5,
        "prompts": 2,
        "perplexity": 3.25,
        "cache_bytes": 100,
        "tokens_per_s": 1.0,
    }
    points = Points.from_report({"budgets": [row]}, "x")
    points.save(tmp_path / "p.json")
    assert Points.load(tmp_path / "p.json") == points
