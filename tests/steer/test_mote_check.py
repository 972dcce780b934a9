"""The check behind MoTE: edits of the best experts against random ones, and a model in which two experts write the refusal."""

import json

import pytest
import torch

import headwise
from headwise.errors import EditError, UnitError
from headwise.expert_edits import ExpertEdits
from headwise.papers import _mote_model
from headwise.steer import expert_maps, mote_check
from headwise.units import HeadScores, HeadSet
from tiny_helper import tiny, tokens


def scores_of(model, pairs):
    values = torch.zeros(3, 8)
    for place, (layer, expert) in enumerate(pairs):
        values[layer, expert] = len(pairs) - place
    return HeadScores(values=values, kind="expert", method="x", fingerprint=headwise.fingerprint(model))


def test_controls_are_of_the_same_layers_and_never_the_best():
    model, seen = tiny("qwen3-moe"), []
    ids = tokens(1, 6)

    def measure():
        owner = model.model.__dict__.get("_headwise_experts")
        seen.append(None if owner is None else owner.edits[0].edits[0].units)
        return {"even": model(ids).logits[0].argmax(-1) % 2 == 0}

    best = [(1, 3), (2, 6), (1, 0), (0, 1)]
    check = mote_check(model, scores_of(model, best), measure, doses=(1, 3), draws=4)
    assert seen[0] is None and seen[1] == HeadSet.of(best[:1], "expert") and seen[6] == HeadSet.of(best[:3], "expert")
    for units in seen[7:]:
        assert sorted(unit.layer for unit in units) == [1, 1, 2] and not units & HeadSet.of(best[:3], "expert")
    assert len(check.dose(3).random["even"]) == 4 and "random" in str(check)
    assert json.dumps(check.to_dict())


def test_flips_are_counted_both_ways():
    model = tiny("qwen3-moe")
    answers = iter([[1, 1, 1, 1, 0], [0, 0, 1, 0, 1], [1, 1, 1, 1, 0]])
    check = mote_check(
        model, scores_of(model, [(1, 3)]), lambda: {"x": torch.tensor(next(answers))}, doses=(1,), draws=1
    )
    row = check.dose(1)
    assert (row.lost["x"], row.gained["x"], row.rate["x"], row.random_mean("x")) == (3, 1, 0.4, 0.8)
    assert row.p["x"] == pytest.approx(0.625)
    with pytest.raises(EditError, match="n=2"):
        check.dose(2)


def test_checks_without_sense():
    model = tiny("qwen3-moe")
    measure = lambda: {"x": torch.tensor([1])}
    scores = scores_of(model, [(1, 3)])
    for options, words in (
        ({"doses": ()}, "doses"),
        ({"doses": (0,)}, "doses"),
        ({"draws": 0}, "draws"),
        ({"doses": (24,)}, "left to draw"),
    ):
        with pytest.raises(EditError, match=words):
            mote_check(model, scores, measure, **options)
    with pytest.raises(EditError, match="truth value"):
        mote_check(model, scores, dict, doses=(1,))
    with pytest.raises(UnitError):
        mote_check(model, HeadScores(values=torch.zeros(2, 2), kind="expert", method="x"), measure)


# ground truth: a model in which two experts, and nothing else, write the refusal

PLANTED = [(1, 3), (2, 6)]
TOUCHY, SORRY = range(60, 80), 4  # words that share a direction, and the word of the refusal


@pytest.fixture(scope="module")
def handmade():
    model = _mote_model.build(0, layers=3, experts=8, active=2, width=32).eval()
    with torch.no_grad():
        for module in model.modules():
            for name, parameter in module.named_parameters(recurse=False):
                if name in ("down_proj",) or module is model.lm_head:
                    parameter.zero_()
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.gate.weight[:, :2] = 0
        model.model.embed_tokens.weight *= 20
        model.model.embed_tokens.weight[:, :2] = 0
        model.model.embed_tokens.weight[list(TOUCHY), 0] = 1.0
        for layer, expert in PLANTED:
            block = model.model.layers[layer].mlp
            block.gate.weight[expert] = 0
            block.gate.weight[expert, 0] = 50.0  # asks for them when the touchy word is read
            block.experts.gate_up_proj[expert] = 0
            block.experts.gate_up_proj[expert, [0, 16], 0] = 1.0
            block.experts.down_proj[expert, 1, 0] = 1.0  # and writes into the field that "sorry" is read from
        model.lm_head.weight[SORRY, 1] = 1.0
        model.lm_head.weight[0, 1] = 0.0
    return model


def test_the_experts_that_write_the_refusal_are_found_and_are_the_cause(handmade):
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(20, 60, (40, 6), generator=generator)
    ids[:20, -1] = torch.tensor(list(TOUCHY))
    classes = ["refused" if row < 20 else "answered" for row in range(40)]
    contrast = expert_maps(handmade, None, list(ids), classes, tokens="last").contrast("refused")
    assert set(contrast.scores().top(2).pairs()) == set(PLANTED)

    def measure():
        return {"refused": handmade(ids[:20]).logits[:, -1].argmax(-1) == SORRY}

    check = mote_check(handmade, contrast.scores(), measure, doses=(2,), draws=10)
    row = check.dose(2)
    assert check.intact["refused"] == 1 and row.rate["refused"] == 0 and row.random_mean("refused") == 1
    assert row.lost["refused"] == 20 and row.p["refused"] < 1e-5
    assert not (handmade(ids[20:]).logits[:, -1].argmax(-1) == SORRY).any()


def test_a_ban_ends_it_too_and_rows_are_steered_apart(handmade):
    ids = torch.tensor([[20, 30, TOUCHY[0]], [25, 33, TOUCHY[9]]])
    for op in ("off", "ban"):
        edits = ExpertEdits((headwise.ExpertEdit(units=HeadSet.of(PLANTED, "expert"), op=op, rows=(1,)),))
        with headwise.attach(handmade, edits=edits):
            given = handmade(ids).logits[:, -1]
        assert given[0].argmax() == SORRY and given[1].argmax() != SORRY
