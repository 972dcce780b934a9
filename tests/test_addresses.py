"""Units, sets and fingerprints: text round trips, set algebra, bad input."""

import itertools
import json
import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from headwise.errors import ArtifactError, UnitError, WrongModelError
from headwise.units import Fingerprint, HeadSet, Unit

L, H, K = 5, 6, 3
MODEL = Fingerprint(architecture="LlamaForCausalLM", config_hash="ab12", layers=L, heads=H, kv_heads=K)
WEIGHTS = st.one_of(st.just(1.0), st.floats(allow_nan=False, allow_infinity=False))


@st.composite
def head_sets(draw, kind="head", layers=L, units=H):
    pairs = st.tuples(st.integers(0, layers - 1), st.integers(0, units - 1))
    table = draw(st.dictionaries(pairs, WEIGHTS, max_size=12))
    return HeadSet.of(table.keys(), kind, list(table.values()))


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
