"""The reproduction of paper 01: what it measures on a tiny model, and that its verdict can be false."""

from dataclasses import replace

import pytest
import torch

from headwise.errors import HeadwiseError
from headwise.hub import load_model
from headwise.papers import Reproduction
from headwise.papers import moh as paper
from headwise.papers._moh_conversion import measure_conversion, shuffled
from headwise.papers._moh_dialects import measure_dialects
from headwise.route._fit_steps import FitRecipe, fit_heads

TINY = replace(
    paper.SCALES["cpu"],
    eval_tokens=512,
    fit=FitRecipe(tokens=1024, **paper.BEST),
    passkeys=1,
    steps=1,
    batch_size=1,
    window=64,
    rules=("first", "fitted"),
)


def test_conversion_is_measured_for_every_rule_and_count():
    routed, dense = measure_conversion("tiny-random-llama", TINY)
    static = {f"ppl_{n}of9_static_{s}" for n in (7, 6) for s in ("layer", "global")}
    assert static | {"ppl_dense", "ppl_code_dense", "ppl_stories_dense", "passkey_dense"} <= set(dense)
    assert {f"ppl_{n}of9_{r}" for n in (7, 6) for r in ("first", "none", "importance", "fitted")} <= set(routed)
    for n in (7, 6, 5):
        grown = routed[f"ppl_stories_{n}of9_fitted"] / dense["ppl_stories_dense"] - 1
        assert routed[f"growth_stories_{n}of9"] == pytest.approx(grown)
    assert dense["ppl_stories_7of9_shuffled"] != routed["ppl_stories_7of9_fitted"]


def test_the_shuffled_control_keeps_everything_but_the_choice():
    model, tokenizer = load_model("tiny-random-llama")
    router = fit_heads(model, tokenizer, TINY.fit).dealt(6)
    other = shuffled(router, 0)
    assert other.active_counts() == router.active_counts()
    for mine, theirs in zip(router.layers, other.layers, strict=True):
        assert torch.equal(mine.W.sort(0).values, theirs.W.sort(0).values)
        assert torch.equal(mine.fill, theirs.fill)
    assert any(not torch.equal(a.W, b.W) for a, b in zip(router.layers, other.layers, strict=True))


def test_recovery_trains_dense_and_converted_alike():
    routed, dense = paper.measure_recovery("tiny-random-llama", TINY)
    assert set(routed) == {"ppl_trained_first", "ppl_trained_fitted"}
    assert set(dense) == {"ppl_trained_dense"}
    assert routed["ppl_trained_first"] != dense["ppl_trained_dense"]


def test_the_share_of_the_gap_that_is_closed():
    metrics, baselines = (
        {"ppl_7of9_first": 40.0, "ppl_trained_first": 10.0},
        {"ppl_dense": 10.0, "ppl_trained_dense": 10.0},
    )
    assert paper.gap_closed(metrics, baselines, "first") == pytest.approx(1)
    assert paper.gap_closed({**metrics, "ppl_trained_first": 20.0}, baselines, "first") == pytest.approx(0.5)
    assert paper.gap_closed({**metrics, "ppl_trained_first": 40.0}, baselines, "first") == pytest.approx(0)


def test_dialects_are_measured_with_a_shuffled_control():
    found = measure_dialects(steps=4)
    assert {name for name in found if "loss" in name} == {
        f"dialects_loss_{name}" for name in ("dense", "75pct", "50pct", "75pct_unshared", "75pct_unbalanced")
    }
    assert found["dialects_shuffled_75pct"] >= 0
    assert found == measure_dialects(steps=4)


def test_the_verdict_can_be_false():
    names = {side for check in paper.CHECKS for side in (check.left, check.right) if isinstance(side, str)}
    same = Reproduction("moh", paper.PAPER.claim, "cpu", dict.fromkeys(names, 1.0), {}, paper.CHECKS, 1.0)
    assert not same.holds
    assert len(same.failed()) == 12


def test_unknown_scales_are_refused():
    with pytest.raises(HeadwiseError, match="scale is 'tpu'"):
        paper.reproduce("tpu")
