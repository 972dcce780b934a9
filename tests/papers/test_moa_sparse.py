"""The reproduction of MoA: every check can fail, controls have the same bytes, and a model that cannot retrieve fails."""

import math

import pytest
import torch

from headwise.errors import HeadwiseError
from headwise.papers import Reproduction, moa_sparse, row
from headwise.plan import Elastic, Full, HeadPlan, SinkWindow

GOOD = {
    "recall_full": 1.0,
    "cache_share_50": 0.5,
    "recall_ratio_50": 3.0,
    "recall_moa_50": 0.9,
    "recall_shuffled_50_best": 0.2,
    "recall_inverse_50": 0.0,
    "ppl_moa_50": 14.0,
    "ppl_uniform_50": 14.1,
    "recall_moa_75": 1.0,
    "recall_uniform_75": 0.5,
    "recall_moa_50_beyond": 0.8,
    "recall_uniform_50_beyond": 0.1,
}
BAD = {
    "recall_full": 0.5,
    "cache_share_50": 0.51,
    "recall_ratio_50": 1.2,
    "recall_shuffled_50_best": 0.9,
    "recall_inverse_50": 1.0,
    "ppl_moa_50": 15.0,
    "recall_moa_75": 0.4,
    "recall_moa_50_beyond": math.nan,
}
PLAN = HeadPlan(
    patterns=((Full(), Elastic(64, 0, 0.5)), (SinkWindow(64, 64), SinkWindow(64, 64)), (Full(), Elastic(64, 0, 0.25)))
)


def reproduction(numbers):
    return Reproduction(
        paper="moa-sparse", claim="c", scale="cpu", metrics=numbers, baselines={}, checks=moa_sparse.CHECKS, seconds=1.0
    )


def test_good_numbers_hold():
    assert reproduction(GOOD).holds


@pytest.mark.parametrize("name", BAD)
def test_every_check_can_fail(name):
    assert not reproduction(GOOD | {name: BAD[name]}).holds


def test_controls_have_the_bytes_of_the_plan():
    n, generator = 1024, torch.Generator().manual_seed(0)
    for control in (moa_sparse.shuffled(PLAN, generator), moa_sparse.inverse(PLAN, n)):
        assert sorted(control.kept(n).flatten().tolist()) == sorted(PLAN.kept(n).flatten().tolist())
        assert control.patterns != PLAN.patterns
    window = moa_sparse.uniform(PLAN, n, 64)
    assert 0 <= int(window.kept(n).sum() - PLAN.kept(n).sum()) < 6
    turned = moa_sparse.inverse(PLAN, n)
    assert turned.patterns[1] == (Full(), Full()) and turned.kept(n)[0, 0] == 128


def test_a_random_model_bears_nothing_out():
    metrics, baselines = moa_sparse.measure(
        "tiny-random-llama", lengths=(512,), samples=1, prompts=1, beyond=1, windows=1, shuffles=1
    )
    found = Reproduction(
        paper="moa-sparse",
        claim="c",
        scale="cpu",
        metrics=metrics,
        baselines=baselines,
        checks=moa_sparse.CHECKS,
        seconds=1.0,
    )
    assert not found.holds and "recall_full" in found.baselines
    assert metrics["cache_share_50"] <= 0.5 and metrics["cache_share_50_beyond"] <= 0.5


def test_scales_and_the_row(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(HeadwiseError, match="CUDA"):
        moa_sparse.reproduce("gpu")
    assert row("moa-sparse").problems() == []


def test_the_record_is_of_this_claim_with_these_checks():
    record = row("moa-sparse").record
    if record is None:
        pytest.skip("not recorded yet")
    assert record.claim == moa_sparse.PAPER.claim and record.checks == moa_sparse.CHECKS
