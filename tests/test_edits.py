"""Edits as data: what is refused, how they combine, and the pair of files that they are saved to."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from headwise.edits import Edit, HeadEdits, KeyGroup, TokenSelection
from headwise.errors import ArtifactError, EditError, HeadwiseError, UnitError, WrongModelError
from headwise.units import Fingerprint, HeadScores, HeadSet

MODEL = Fingerprint(architecture="LlamaForCausalLM", config_hash="ab12", layers=4, heads=4, kv_heads=2)
HEADS = HeadSet.parse("L1H2,L0H3:0.5,L2H0")
SINKS, REST = KeyGroup("sinks", "0:4", 0.5), KeyGroup("image", (5, 7, 6), 2.0)


def some_edits(patch=False):
    edits = [
        Edit.zero(HEADS, tokens="last", phase="decode"),
        Edit.scale(HEADS, 1.5, tokens=(3, 1)),
        Edit.uniform(HEADS, phase="prefill"),
        Edit.replace(HEADS, torch.randn(3, 8)),
        Edit.mix_v(HEADS, 0.8, tokens=slice(2, None)),
        Edit.mix_uniform(HEADS, 0.3),
        Edit.mix_vector(HEADS, 0.25, torch.randn(3, 8, dtype=torch.bfloat16)),
        Edit.reweight(HEADS, [SINKS, REST], renormalize=False),
        Edit.move(HEADS, 0.6, SINKS, REST),
        Edit.move(HEADS, 0.6, SINKS),
    ]
    return edits + ([Edit.patch(HEADS, torch.randn(3, 2, 5, 8))] if patch else [])


# token selections

SELECTIONS = st.one_of(
    st.sampled_from([TokenSelection.all(), TokenSelection.last()]),
    st.lists(st.integers(0, 30), min_size=1, max_size=5).map(TokenSelection.of),
    st.tuples(st.integers(0, 30), st.none() | st.integers(1, 30)).map(
        lambda pair: TokenSelection("range", start=pair[0], stop=pair[1] and pair[0] + pair[1])
    ),
)


@given(SELECTIONS)
def test_selection_text_round_trip(selection):
    assert TokenSelection.of(str(selection)) == selection == TokenSelection.of(selection)
    assert hash(TokenSelection.of(str(selection))) == hash(selection)


@given(selection=SELECTIONS, padding=st.integers(0, 4), n=st.integers(1, 40))
def test_selection_never_takes_padding(selection, padding, n):
    positions = torch.arange(-padding, n).view(1, -1)
    chosen = positions[selection.mask(positions, last=torch.tensor([[n - 1]]))].tolist()
    if selection.kind == "all":
        assert chosen == list(range(n))
    elif selection.kind == "last":
        assert chosen == [n - 1]
    elif selection.kind == "range":
        assert chosen == list(range(n))[selection.start : selection.stop]
    else:
        assert chosen == [place for place in selection.positions if place < n]


def test_selection_from_python_values():
    assert (
        TokenSelection.of(3)
        == TokenSelection.of([3, 3])
        == TokenSelection.of("3")
        == TokenSelection.of(torch.tensor(3))
    )
    assert TokenSelection.of(range(2, 5)) == TokenSelection.of("2 : 5") == TokenSelection.of(slice(2, 5))
    assert TokenSelection.of(slice(None)).start == 0
    assert str(TokenSelection.of((5, 1))) == "1,5"


@pytest.mark.parametrize(
    "tokens",
    [
        "",
        "first",
        "-1",
        "1:0",
        "3:3",
        ":4",
        "1:2:3",
        (),
        [-1],
        1.5,
        [None],
        slice(0, 9, 2),
        range(5, 0, -1),
        slice(-3, None),
        True,
        2**40,
        None,
    ],
)
def test_bad_selections(tokens):
    with pytest.raises(EditError):
        TokenSelection.of(tokens)


def test_last_needs_the_length_of_the_row():
    with pytest.raises(EditError, match="newest token"):
        TokenSelection.last().mask(torch.arange(3))


# edits


def test_strength_is_amount_times_weight():
    assert torch.allclose(Edit.mix_v(HEADS, 0.5).strengths(), torch.tensor([0.25, 0.5, 0.5]))  # in the order of the set
    assert Edit.zero(HEADS).strengths().tolist() == [0.5, 1.0, 1.0]


def test_one_vector_serves_all_units():
    edit = Edit.replace(HEADS, torch.arange(4.0))
    assert edit.tensor.shape == (3, 4) and torch.equal(edit.tensor[2], torch.arange(4.0))


def test_edit_of_one_layer_has_only_its_units():
    vectors = torch.randn(3, 8)
    part = Edit.replace(HEADS, vectors).for_layer(1)
    assert str(part.units) == "L1H2" and torch.equal(part.tensor, vectors[1:2])
    assert Edit.zero(HEADS).for_layer(3) is None
    assert str(Edit.zero(HEADS).for_layer(0).units) == "L0H3:0.5"


def test_gradients_reach_the_vectors():
    vectors = torch.randn(3, 8, requires_grad=True)
    Edit.replace(HEADS, vectors).for_layer(2).tensor.sum().backward()
    assert vectors.grad.sum(1).tolist() == [0.0, 0.0, 8.0]


@pytest.mark.parametrize(
    "make",
    [
        lambda: Edit.zero(HeadSet.empty()),
        lambda: Edit.zero(HeadSet.parse("L1K1")),
        lambda: Edit.zero("L1H1"),
        lambda: Edit.zero(HeadSet.parse("L1H1:2")),
        lambda: Edit.zero(HeadSet.parse("L1H1:-1")),
        lambda: Edit.zero(HEADS, phase="train"),
        lambda: Edit.zero(HEADS, tokens="first"),
        lambda: Edit(units=HEADS, op="double"),
        lambda: Edit(units=HEADS, op="scale"),
        lambda: Edit(units=HEADS, op="zero", value=1.0),
        lambda: Edit(units=HEADS, op="zero", tensor=torch.ones(3, 8)),
        lambda: Edit(units=HEADS, op="zero", keys=(SINKS,)),
        lambda: Edit(units=HEADS, op="replace"),
        lambda: Edit.scale(HEADS, math.nan),
        lambda: Edit.scale(HEADS, "2"),
        lambda: Edit.mix_v(HEADS, 1.1),
        lambda: Edit.mix_v(HEADS, -0.1),
        lambda: Edit.mix_v(HEADS, math.nan),
        lambda: Edit.mix_v(HEADS, None),
        lambda: Edit.replace(HEADS, torch.ones(2, 8)),
        lambda: Edit.replace(HEADS, torch.ones(3, 0)),
        lambda: Edit.replace(HEADS, torch.ones(3, 8, dtype=torch.int64)),
        lambda: Edit.replace(HEADS, torch.full((3, 8), math.inf)),
        lambda: Edit.replace(HEADS, torch.ones(3, 8).to(torch.float8_e4m3fn)),
        lambda: Edit.replace(HEADS, [1.0, 2.0]),
        lambda: Edit.patch(HEADS, torch.ones(3, 8)),
        lambda: Edit.reweight(HEADS, []),
        lambda: Edit.reweight(HEADS, ["0:4"]),
        lambda: Edit.reweight(HEADS, [SINKS, SINKS]),
        lambda: Edit.reweight(HEADS, [SINKS], renormalize=1),
        lambda: Edit.move(HEADS, 1.5, SINKS),
        lambda: KeyGroup("", "all"),
        lambda: KeyGroup("a", "all", -1.0),
        lambda: KeyGroup("a", "all", math.inf),
        lambda: HeadEdits(("zero",)),
        lambda: HeadEdits.of(method=3),
        lambda: HeadEdits.of(meta={"x": None}),
    ],
)
def test_bad_edits(make):
    with pytest.raises((EditError, UnitError)):
        make()


# lists of edits


def test_sequence():
    edits = HeadEdits.of(*some_edits(), fingerprint=MODEL, method="ablate")
    more = edits + Edit.zero(HeadSet.parse("L3H3"))
    assert len(more) == len(edits) + 1 and more[-1].op == "zero" and more.fingerprint == MODEL
    assert [edit.op for edit in more.for_layer(3)] == ["zero"]
    assert len(more.for_layer(1)) == len(edits)
    assert list(edits) == list(edits.edits) and (HeadEdits(()) + edits).edits == edits.edits
    assert "mix_v" in str(edits) and str(HeadEdits(())) == "no edits"


def test_edits_of_another_model():
    edits = HeadEdits.of(Edit.zero(HEADS), fingerprint=MODEL)
    edits.check(MODEL)
    other = Fingerprint(**{**MODEL.to_dict(), "config_hash": "x"})
    with pytest.raises(WrongModelError):
        edits.check(other)
    with pytest.raises(WrongModelError):
        edits + HeadEdits.of(fingerprint=other)
    with pytest.raises(UnitError, match="L9H0"):
        HeadEdits.of(Edit.zero(HeadSet.parse("L9H0"))).check(MODEL)
    with pytest.raises(UnitError, match="L9H0"):
        HeadEdits.of(Edit.zero(HeadSet.parse("L9H0")), fingerprint=MODEL)


def test_files_round_trip(tmp_path):
    edits = HeadEdits.of(*some_edits(patch=True), fingerprint=MODEL, method="all", meta={"seed": 3})
    edits.save(tmp_path / "e.json", patches=True)
    assert HeadEdits.load(tmp_path / "e.json") == edits
    assert sorted(path.name for path in tmp_path.iterdir()) == ["e.json", "e.safetensors"]
    plain = HeadEdits.of(Edit.zero(HEADS))
    plain.save(tmp_path / "plain.json")
    assert HeadEdits.load(tmp_path / "plain.json") == plain != edits
    assert not (tmp_path / "plain.safetensors").exists()


def test_patches_are_written_only_when_asked(tmp_path):
    edits = HeadEdits.of(*some_edits(patch=True))
    with pytest.raises(EditError, match="patches=True"):
        edits.save(tmp_path / "e.json")
    assert not list(tmp_path.iterdir())


def test_pair_of_files(tmp_path):
    edits = HeadEdits.of(*some_edits())
    with pytest.raises(EditError, match=r"\.json"):
        edits.save(tmp_path / "e.safetensors")
    edits.save(tmp_path / "a.json")
    HeadEdits.of(*some_edits()).save(tmp_path / "b.json")
    (tmp_path / "b.safetensors").replace(tmp_path / "a.safetensors")
    with pytest.raises(ArtifactError, match="another list of edits"):
        HeadEdits.load(tmp_path / "a.json")
    (tmp_path / "a.safetensors").unlink()
    with pytest.raises(ArtifactError, match="does not exist"):
        HeadEdits.load(tmp_path / "a.json")


def test_saving_never_overwrites_another_artifact(tmp_path):
    scores = HeadScores(values=torch.ones(4, 4), method="m")
    scores.save(tmp_path / "s.safetensors")
    with pytest.raises(ArtifactError, match="something else"):
        HeadEdits.of(*some_edits()).save(tmp_path / "s.json")
    HeadEdits.of(Edit.zero(HEADS)).save(tmp_path / "s.json")
    assert HeadScores.load(tmp_path / "s.safetensors") == scores


def test_an_edit_in_a_file_with_the_wrong_parts(tmp_path):
    path = tmp_path / "e.json"
    HeadEdits.of(Edit.scale(HEADS, 2.0), Edit.reweight(HEADS, [SINKS])).save(path)
    text = path.read_text()
    for old, new in [
        ('"scale"', '"zero"'),
        ('"all"', '"some"'),
        ("L1H2", "L1K2"),
        ('"tensor": null', '"tensor": ["x"]'),
        ('"tensor": null', '"tensor": "edit0"'),
        ('"0:4"', "4"),
        ("2.0", "true"),
    ]:
        assert old in text
        path.write_text(text.replace(old, new))
        with pytest.raises(HeadwiseError, match=r"e\.(json|safetensors)"):
            HeadEdits.load(path)
