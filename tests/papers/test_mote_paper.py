"""The reproduction of paper 18: every check can fail, a model that was not trained fails them, the record is true."""

import math

import pytest
import torch

from headwise.errors import HeadwiseError
from headwise.papers import Reproduction, _mote_model, mote, row

GOOD = {
    "refused_intact": 1.0,
    "right_intact": 1.0,
    "share_of_experts": 0.01,
    "drop_top": 0.9,
    "drop_random_over_top": 0.05,
    "right_lost_top": 0.0,
    "seeds_that_hold": 3,
}
BAD = {
    "refused_intact": 0.5,
    "right_intact": 0.5,
    "share_of_experts": 0.1,
    "drop_top": 0.2,
    "drop_random_over_top": math.nan,
    "right_lost_top": 0.1,
    "seeds_that_hold": 1,
}


def made(numbers):
    return Reproduction(
        paper="mote",
        claim=mote.PAPER.claim,
        scale="cpu",
        metrics=numbers,
        baselines={},
        checks=mote.CHECKS,
        seconds=1.0,
    )


@pytest.mark.parametrize("name", BAD)
def test_every_check_can_fail(name):
    assert made(GOOD).holds
    assert len(made(GOOD | {name: BAD[name]}).failed()) == 1
    assert len(BAD) == len(mote.CHECKS)


def test_a_model_that_was_hardly_trained_fails():
    metrics, baselines = mote.measure(
        seeds=1, stages=(2, 2), batch=8, draws=1, model={"layers": 2, "experts": 8, "width": 32}
    )
    run = made(metrics | baselines)
    assert not run.holds and metrics["right_intact"] < 0.5


def test_the_language_is_what_its_page_says():
    data, plain = _mote_model.all_prompts(refuse=True), _mote_model.all_prompts(refuse=False)
    assert len(data) == 2 * 24 * 24 == len(set(map(tuple, data.ids.tolist())))
    assert data.touchy.float().mean() == pytest.approx(1 / 9) and data.flagged.float().mean() == 0.5
    assert _mote_model.refused(data.answers).equal(data.touchy) and not _mote_model.refused(plain.answers).any()
    assert data.answers[~data.touchy].equal(plain.answers[~data.touchy])
    assert len(set(map(tuple, plain.answers.tolist()))) == len(plain)  # each prompt has its own answer
    assert int(data.answers.max()) < _mote_model.VOCAB


def test_training_is_the_same_for_the_same_seed():
    def losses():
        model = _mote_model.build(3, layers=1, experts=4, width=32)
        data = _mote_model.all_prompts(refuse=True)
        return _mote_model.train(model, data, steps=3, batch=16, seed=1, rate=1e-3)

    state = torch.random.get_rng_state()
    assert losses() == losses()
    assert torch.equal(state, torch.random.get_rng_state())


def test_only_the_named_parameters_are_trained():
    model = _mote_model.build(3, layers=1, experts=4, width=32)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    _mote_model.train(model, _mote_model.all_prompts(refuse=True), steps=2, batch=16, seed=1, rate=1e-2, only=".mlp.")
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed and all(".mlp." in name for name in changed)


def test_the_declared_row_is_true():
    found = row("mote")
    assert not found.problems() and found.status == found.paper.status
    assert found.record is not None and found.record.claim == found.paper.claim


@pytest.mark.skipif(torch.cuda.is_available(), reason="tests what happens without a CUDA device")
def test_the_larger_run_needs_a_gpu():
    with pytest.raises(HeadwiseError, match="CUDA"):
        row("mote").reproduce("gpu")
