"""Scores: order of ties, statistics, files, bad input."""

import math

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from scipy import stats

from headwise.errors import ArtifactError, UnitError, WrongModelError
from headwise.units import Fingerprint, HeadScores, HeadSet

L, H, K = 5, 6, 3
MODEL = Fingerprint(architecture="LlamaForCausalLM", config_hash="ab12", layers=L, heads=H, kv_heads=K)


def tables(values=None):
    values = st.floats(-100, 100, width=32) if values is None else values
    row = st.lists(values, min_size=H, max_size=H)
    return st.lists(row, min_size=L, max_size=L).map(lambda rows: HeadScores(values=torch.tensor(rows), method="m"))


def random_scores(seed=0, layers=L, heads=H, **labels):
    values = torch.rand(layers, heads, generator=torch.Generator().manual_seed(seed))
    return HeadScores(values=values, method="test", **labels)


# scores


def test_ties_go_to_the_lowest_address():
    scores = HeadScores(values=torch.tensor([[1.0, 2.0, 1.0], [2.0, 1.0, 0.0]]), method="m")
    assert str(scores.top(3)) == "L0H0,L0H1,L1H0"
    assert str(scores.bottom(2)) == "L0H0,L1H2"
    assert [str(unit) for unit, _ in scores.ranking()] == ["L0H1", "L1H0", "L0H0", "L0H2", "L1H1", "L1H2"]


@given(tables(st.integers(-3, 3).map(float)), st.integers(0, L * H))
def test_top_and_bottom(scores, k):
    top, bottom = scores.top(k), scores.bottom(L * H - k)
    assert len(top) == k and len(bottom) == L * H - k
    assert min((scores[u] for u in top), default=9) >= max((scores[u] for u in top.complement(L, H)), default=-9)
    assert max((scores[u] for u in bottom), default=-9) <= min((scores[u] for u in bottom.complement(L, H)), default=9)
    assert {u for u, _ in scores.ranking()[:k]} == set(top)
    assert scores.top(k) == scores.top(k) and scores.at_least(2.0) == HeadSet.from_mask(scores.values >= 2)


def test_fraction_threshold_quantile():
    scores = random_scores()
    assert len(scores.top_fraction(0.14)) == round(0.14 * 30)
    assert len(scores.top_fraction(0)) == 0 and len(scores.top_fraction(1)) == 30
    assert len(random_scores(layers=1, heads=2).top_fraction(0.25)) == 0  # 0.5 rounds to even
    for q in (0, 0.1, 0.37, 0.5, 1):
        assert scores.quantile(q) == pytest.approx(float(scores.values.double().quantile(q)))
    exact = HeadScores(values=torch.tensor([[0.1, 0.05]]), method="m")
    assert str(exact.at_least(0.1)) == "L0H0"  # 0.1 in float32 counts as 0.1


@pytest.mark.parametrize(
    "call",
    [
        lambda s: s.top(-1),
        lambda s: s.top(31),
        lambda s: s.bottom(1.5),
        lambda s: s.top_fraction(1.1),
        lambda s: s.top_fraction(math.nan),
        lambda s: s.at_least(math.nan),
        lambda s: s.quantile(-0.1),
        lambda s: s["L5H0"],
        lambda s: s["L0K0"],
        lambda s: s[3],
        lambda s: s.to_kv(4),
        lambda s: s.to_kv(3, "median"),
        lambda s: s.to_kv(3).to_kv(3),
        lambda s: s.normalized("min"),
        lambda s: s.overlap(s, 0),
        lambda s: s.correlation(random_scores(heads=3)),
        lambda s: s.correlation(s.to_kv(6)),
        lambda s: s.correlation(HeadScores(values=torch.ones(L, H), method="m")),
        lambda s: HeadScores.mean([]),
        lambda s: HeadScores.mean([s, random_scores(heads=3)]),
        lambda s: s.random_sets(16, 1, generator=torch.Generator()),
        lambda s: s.check(Fingerprint(**{**MODEL.to_dict(), "heads": 9})),
    ],
)
def test_bad_questions_to_scores(call):
    with pytest.raises(UnitError):
        call(random_scores())


@pytest.mark.parametrize(
    "values",
    [
        torch.tensor([[math.nan]]),
        torch.tensor([[math.inf]]),
        torch.tensor([[1e300]], dtype=torch.float64),
        torch.ones(2),
        torch.ones(2, 0),
        torch.ones(2, 2, dtype=torch.bool),
        torch.ones(2, 2, dtype=torch.complex64),
        [[1.0]],
    ],
)
def test_bad_values(values):
    with pytest.raises(UnitError, match="values"):
        HeadScores(values=values, method="m")


def test_bad_labels():
    for change in (
        {"kind": "neuron"},
        {"method": None},
        {"meta": {"x": [1]}},
        {"meta": {"x": math.nan}},
        {"meta": {1: 1}},
    ):
        with pytest.raises(UnitError):
            HeadScores(**{"values": torch.ones(1, 1), "method": "m", **change})
    with pytest.raises(UnitError, match=r"\(5, 3\) kv"):
        HeadScores(values=torch.ones(L, H), method="m", kind="kv", fingerprint=MODEL)


def test_values_are_a_copy():
    table = torch.ones(2, 2)
    scores = HeadScores(values=table, method="m")
    table.zero_()
    assert scores.values.sum() == 4


@given(tables())
def test_to_kv(scores):
    groups = scores.values.view(L, K, 2)
    assert torch.equal(scores.to_kv(K, "max").values, groups.amax(-1))
    assert torch.allclose(scores.to_kv(K, "mean").values, groups.mean(-1))
    assert torch.allclose(scores.to_kv(K, "sum").values, groups.sum(-1))
    assert scores.to_kv(K).kind == "kv" and scores.to_kv(H).values.equal(scores.values)


@given(tables(st.integers(-4, 4).map(float)), tables())
def test_correlations_equal_scipy(a, b):
    assume(a.values.unique().numel() > 1 and b.values.std() > 1e-3)
    x, y = a.values.double().flatten().numpy(), b.values.double().flatten().numpy()
    assert a.correlation(b) == pytest.approx(stats.pearsonr(x, y).statistic, abs=1e-9)
    assert a.rank_correlation(b) == pytest.approx(stats.spearmanr(x, y).statistic, abs=1e-9)
    assert a.rank_correlation(b) == pytest.approx(b.rank_correlation(a), abs=1e-12)
    assert a.rank_correlation(a) == pytest.approx(1.0)


def test_overlap_mean_normalized():
    a, b = random_scores(0, fingerprint=MODEL), random_scores(1)
    assert a.overlap(a, 5) == 1 and a.overlap(b, 30) == 1
    assert 0 <= a.overlap(b, 5) < 1
    assert torch.allclose(HeadScores.mean([a, b]).values, (a.values + b.values) / 2)
    assert HeadScores.mean([a, b]).fingerprint == MODEL and HeadScores.mean([a, b]).meta["tables"] == 2
    assert a.normalized("max").values.max() == 1
    assert float(a.normalized("sum").values.sum()) == pytest.approx(1)
    z = a.normalized("zscore").values
    assert float(z.mean()) == pytest.approx(0, abs=1e-6) and float(z.std(correction=0)) == pytest.approx(1)
    with pytest.raises(UnitError, match="divisor"):
        HeadScores(values=torch.zeros(2, 2), method="m").normalized("zscore")
    other = random_scores(1, fingerprint=Fingerprint(**{**MODEL.to_dict(), "config_hash": "x"}))
    with pytest.raises(WrongModelError):
        HeadScores.mean([a, other])


def test_random_sets_do_not_hold_the_top():
    scores = random_scores()
    sets = scores.random_sets(5, 20, generator=torch.Generator().manual_seed(1))
    assert len(sets) == 20 and len(set(sets)) > 1
    assert all(len(units) == 5 and not units & scores.top(5) for units in sets)
    free = scores.random_sets(30, 1, exclude=HeadSet.empty(), generator=torch.Generator())
    assert len(free[0]) == 30


def test_score_text_and_files(tmp_path):
    scores = random_scores(
        data="needle", fingerprint=MODEL, meta={"tests": 20, "mode": "set", "share": 0.5, "ok": True}
    )
    assert len(str(scores).splitlines()) == 11 and "needle" in str(scores)
    scores.save(tmp_path / "s.safetensors")
    assert HeadScores.load(tmp_path / "s.safetensors") == scores != random_scores()
    scores.check(MODEL)
    with pytest.raises(WrongModelError, match="experts"):
        scores.check(Fingerprint(**{**MODEL.to_dict(), "experts": 2}))


def test_retrieval_json_round_trip(tmp_path):
    scores = random_scores()
    scores.to_retrieval_json(tmp_path / "s.json")
    found = HeadScores.from_retrieval_json(tmp_path / "s.json", L, H)
    assert found.method == "retrieval" and torch.equal(found.values, scores.values)
    (tmp_path / "t.json").write_text('{"0-1": [0.5, 1, 0], "0-0": [0.25]}')
    assert HeadScores.from_retrieval_json(tmp_path / "t.json", 1, 2).values.tolist() == [[0.25, 0.5]]


@pytest.mark.parametrize(
    "text",
    [
        '{"0-0": [1]}',
        '{"0-0": [1], "0-2": [1]}',
        '{"0-0": [1], "0-01": [1]}',
        '{"0-0": [1], "0-1": []}',
        '{"0-0": [1], "0-1": ["x"]}',
        '{"0-0": [1], "0-1": 1}',
        "[]",
    ],
)
def test_bad_retrieval_json(tmp_path, text):
    (tmp_path / "t.json").write_text(text)
    with pytest.raises(ArtifactError, match=r"t\.json"):
        HeadScores.from_retrieval_json(tmp_path / "t.json", 1, 2)
