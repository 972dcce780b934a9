"""Addresses, sets and scores: text round trips, set algebra, order of ties, bad input."""

import itertools
import json
import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy import stats

from headwise.errors import ArtifactError, UnitError, WrongModelError
from headwise.units import Fingerprint, HeadScores, HeadSet, Unit

L, H, K = 5, 6, 3
MODEL = Fingerprint(architecture="LlamaForCausalLM", config_hash="ab12", layers=L, heads=H, kv_heads=K)
WEIGHTS = st.one_of(st.just(1.0), st.floats(allow_nan=False, allow_infinity=False))


@st.composite
def head_sets(draw, kind="head", layers=L, units=H):
    pairs = st.tuples(st.integers(0, layers - 1), st.integers(0, units - 1))
    table = draw(st.dictionaries(pairs, WEIGHTS, max_size=12))
    return HeadSet.of(table.keys(), kind, list(table.values()))


def tables(values=None):
    values = st.floats(-100, 100, width=32) if values is None else values
    row = st.lists(values, min_size=H, max_size=H)
    return st.lists(row, min_size=L, max_size=L).map(lambda rows: HeadScores(values=torch.tensor(rows), method="m"))


def random_scores(seed=0, layers=L, heads=H, **labels):
    values = torch.rand(layers, heads, generator=torch.Generator().manual_seed(seed))
    return HeadScores(values=values, method="test", **labels)


# units


@given(kind=st.sampled_from(["head", "kv", "expert"]), layer=st.integers(0, 10**9 - 1), index=st.integers(0, 10**9 - 1))
def test_unit_text_round_trip(kind, layer, index):
    unit = Unit(kind, layer, index)
    assert Unit.parse(str(unit)) == unit


@pytest.mark.parametrize(
    "text",
    [
        "",
        "L",
        "L1",
        "H1",
        "L1H",
        "L1X2",
        "l1h2",
        "L-1H2",
        "L1H2.0",
        "L١H2",
        "L1H2,L1H3",
        "L" + "9" * 30 + "H1",
        None,
        3,
    ],
)
def test_malformed_addresses(text):
    with pytest.raises(UnitError, match="L11H15"):
        Unit.parse(text)


# fingerprints


def test_fingerprint_round_trip_and_units():
    assert Fingerprint.from_dict(json.loads(json.dumps(MODEL.to_dict()))) == MODEL
    assert [MODEL.units(kind) for kind in ("head", "kv", "expert")] == [H, K, 0]


@pytest.mark.parametrize(
    ("name", "value"),
    [("architecture", "GPT2"), ("config_hash", "x"), ("layers", 9), ("heads", 9), ("kv_heads", 9), ("experts", 9)],
)
def test_wrong_model_names_the_field_that_differs(name, value):
    other = Fingerprint(**{**MODEL.to_dict(), name: value})
    with pytest.raises(WrongModelError, match=f"plan.json was made for .*{name} is"):
        MODEL.require(other, "plan.json")
    MODEL.require(MODEL, "plan.json")


@pytest.mark.parametrize(
    "change", [{"layers": 0}, {"heads": 1.5}, {"layers": True}, {"config_hash": 3}, {"experts": -1}]
)
def test_bad_fingerprints(change):
    with pytest.raises(UnitError):
        Fingerprint(**{**MODEL.to_dict(), **change})


@pytest.mark.parametrize(
    "data", [None, [], {}, {"layers": 1}, {**MODEL.to_dict(), "more": 1}, {**MODEL.to_dict(), "heads": "6"}]
)
def test_bad_fingerprint_data(data):
    with pytest.raises(ArtifactError):
        Fingerprint.from_dict(data)


# sets


@given(head_sets(kind="kv"))
def test_set_text_round_trip(units):
    if units:
        assert HeadSet.parse(str(units)) == units
    assert eval(repr(units)) == units


def test_parse_forgives_spaces_and_sorts():
    found = HeadSet.parse(" L12H3 , L11H15 : -.5e-1 ,L2H10,L2H9 ")
    assert str(found) == "L2H9,L2H10,L11H15:-0.05,L12H3"
    assert list(found)[2] == Unit("head", 11, 15)
    assert found.weights() == (1.0, 1.0, -0.05, 1.0)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "  ",
        ",",
        "L1H1,",
        "L1H1,L1H1",
        "L1H1,L1K1",
        "L1H1:",
        "L1H1:x",
        "L1H1:nan",
        "L1H1:inf",
        "L1H1:1e999",
        "L1H1:1_0",
        None,
    ],
)
def test_malformed_sets(text):
    with pytest.raises(UnitError):
        HeadSet.parse(text)


def test_malformed_pairs_weights_masks():
    bad = [
        lambda: HeadSet.of([(1, 2)], weights=[1.0, 2.0]),
        lambda: HeadSet.of([(1, 2)], weights=[math.nan]),
        lambda: HeadSet.of([(1, 2, 3)]),
        lambda: HeadSet.of([1, 2]),
        lambda: HeadSet.of(3),
        lambda: HeadSet.parse("L9H0").save("unused", fingerprint=MODEL),
        lambda: HeadSet.of([(1, -2)]),
        lambda: HeadSet.of([(1.0, 2)]),
        lambda: HeadSet.of([(1, 2), (1, 2)]),
        lambda: HeadSet.of([(1, 2)], kind="neuron"),
        lambda: HeadSet.from_mask(torch.ones(2, 2)),
        lambda: HeadSet.from_mask(torch.ones(2, dtype=torch.bool)),
        lambda: HeadSet.parse("L1H1") | HeadSet.parse("L1K1"),
        lambda: HeadSet.parse("L1H1").weight("L1H2"),
        lambda: HeadSet.parse("L1H1").to_heads(2),
        lambda: HeadSet.parse("L1K1").to_kv(2),
        lambda: HeadSet.parse("L1H1").to_kv(0),
    ]
    for call in bad:
        with pytest.raises(UnitError):
            call()


@given(head_sets(), head_sets(), head_sets())
def test_set_algebra(a, b, c):
    assert (a | b) | c == a | (b | c)
    assert (a & b) & c == a & (b & c)
    assert a | a == a & a == a
    assert a - a == HeadSet.empty()
    assert set((a | b).pairs()) == set(a.pairs()) | set(b.pairs())
    assert set((a & b).pairs()) == set(a.pairs()) & set(b.pairs())
    assert (a - b) | (a & b) == a
    assert len(a | b) == len(a) + len(b) - len(a & b)
    assert all((a | b).weight(unit) == a.weight(unit) for unit in a)
    assert all((b | a).weight(unit) == b.weight(unit) for unit in b)


@given(head_sets())
def test_masks_tables_layers_complement(units):
    mask, table = units.mask(L, H), units.table(L, H, fill=-7.0)
    assert HeadSet.from_mask(mask).pairs() == units.pairs()
    assert mask.sum() == len(units)
    for unit in itertools.starmap(lambda l, h: Unit("head", l, h), itertools.product(range(L), range(H))):
        assert bool(mask[unit.layer, unit.index]) == (unit in units) == (str(unit) in units)
        expected = units.weight(unit) if unit in units else -7.0
        assert table[unit.layer, unit.index] == torch.tensor(expected, dtype=torch.float32)
    assert [(l, h) for l, heads in units.by_layer().items() for h in heads] == list(units.pairs())
    rest = units.complement(L, H)
    assert not rest & units and len(rest | units) == L * H


@given(head_sets())
def test_kv_heads_of_heads_and_back(units):
    groups = units.to_kv(H // K)
    assert set(groups.pairs()) == {(l, h // 2) for l, h in units.pairs()}
    assert set(units.pairs()) <= set(groups.to_heads(H // K).pairs())
    assert groups.to_heads(H // K).to_kv(H // K) == groups
    assert all(groups.weight(Unit("kv", l, h // 2)) >= weight for l, h, weight in units.entries)


def test_sets_are_hashable_and_of_one_kind():
    assert len({HeadSet.parse("L1H1,L2H2"), HeadSet.parse("L2H2,L1H1"), HeadSet.parse("L1K1,L2K2")}) == 2
    assert "L1K1" not in HeadSet.parse("L1H1")
    assert 3 not in HeadSet.parse("L1H1")


def test_a_unit_that_does_not_exist_is_named_with_the_valid_range():
    with pytest.raises(UnitError, match="L1H6 does not exist; valid: L0H0 to L4H5"):
        HeadSet.parse("L0H0,L1H6").check(MODEL)
    with pytest.raises(UnitError, match="L5H0"):
        HeadSet.parse("L5H0").mask(L, H)
    with pytest.raises(UnitError, match="no expert units"):
        HeadSet.parse("L0E0").check(MODEL)
    HeadSet.parse("L4H5").check(MODEL)


@given(units=head_sets(), exclude=head_sets(), seed=st.integers(0, 99))
def test_random_control(units, exclude, seed):
    assume(len(units) + len(units | exclude) <= L * H)
    control = units.random_control(L, H, exclude=exclude, generator=torch.Generator().manual_seed(seed))
    again = units.random_control(L, H, exclude=exclude, generator=torch.Generator().manual_seed(seed))
    assert control == again and len(control) == len(units)
    assert not control & units and not control & exclude
    control.mask(L, H)


def test_random_control_is_uniform_and_says_when_too_few_remain():
    generator = torch.Generator().manual_seed(0)
    units = HeadSet.of([(0, 0)])
    hits = sum(units.random_control(1, 4, generator=generator).table(1, 4) for _ in range(600))
    assert hits[0, 0] == 0 and (hits[0, 1:] > 150).all()
    with pytest.raises(UnitError, match="4 random units wanted but only 3 remain"):
        units.random_control(1, 4, size=4, generator=generator)
    with pytest.raises(UnitError, match="Generator"):
        units.random_control(1, 4, generator=None)


@settings(max_examples=20, deadline=None)
@given(units=head_sets())
def test_set_files(tmp_path_factory, units):
    path = tmp_path_factory.getbasetemp() / "set.safetensors"
    units.save(path)
    assert HeadSet.load(path, fingerprint=MODEL) == units
    units.save(path, fingerprint=MODEL)
    assert HeadSet.load(path, fingerprint=MODEL) == HeadSet.load(path) == units


def test_set_file_of_another_model(tmp_path):
    HeadSet.parse("L4H5").save(tmp_path / "a", fingerprint=MODEL)
    with pytest.raises(WrongModelError, match="config_hash"):
        HeadSet.load(tmp_path / "a", fingerprint=Fingerprint(**{**MODEL.to_dict(), "config_hash": "other"}))
    HeadSet.parse("L4H7").save(tmp_path / "b")
    with pytest.raises(UnitError, match="L4H7"):
        HeadSet.load(tmp_path / "b", fingerprint=MODEL)


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
