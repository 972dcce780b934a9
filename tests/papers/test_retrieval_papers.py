"""The reproductions of papers 13 and 30: every check can fail, a model that cannot retrieve fails them, and records are true."""

import math

import pytest
import torch

from headwise.errors import HeadwiseError
from headwise.papers import Reproduction, razorattention, retrieval_head, row
from headwise.units import HeadSet

GOOD = {
    "retrieval-head": {
        "recall_intact": 1.0,
        "share_above_0.1": 0.06,
        "share_zero": 0.9,
        "correlation_of_halves": 0.95,
        "recall_without_top": 0.0,
        "recall_lost_to_random": 0.0,
        "ppl_ratio_top": 1.05,
    },
    "razorattention": {
        "recall_full": 1.0,
        "recall_loss": 0.05,
        "recall_random": 0.3,
        "cache_share": 0.35,
        "correlation_with_retrieval": 0.9,
        "jaccard_over_seeds": 0.87,
        "kl_razor_1024": 0.04,
        "kl_random_1024": 0.3,
        "kl_no_token_1024": 0.05,
        "kl_razor_2048": 0.02,
        "kl_no_token_2048": 0.03,
    },
}
BAD = {
    "retrieval-head": {
        "recall_intact": 0.5,
        "share_above_0.1": 0.3,
        "share_zero": 0.1,
        "correlation_of_halves": math.nan,
        "recall_without_top": 0.6,
        "recall_lost_to_random": 0.2,
        "ppl_ratio_top": 2.0,
    },
    "razorattention": {
        "recall_full": 0.5,
        "recall_loss": 0.3,
        "recall_random": 0.9,
        "cache_share": 1.0,
        "correlation_with_retrieval": 0.1,
        "jaccard_over_seeds": 0.5,
        "kl_random_1024": 0.03,
        "kl_no_token_1024": 0.03,
        "kl_no_token_2048": 0.01,
    },
}
MODULES = {"retrieval-head": retrieval_head, "razorattention": razorattention}
CASES = [(slug, name, value) for slug, values in BAD.items() for name, value in values.items()]


def made(slug, numbers):
    module = MODULES[slug]
    return Reproduction(
        paper=slug,
        claim=module.PAPER.claim,
        scale="cpu",
        metrics=numbers,
        baselines={},
        checks=module.CHECKS,
        seconds=1.0,
    )


@pytest.mark.parametrize("slug, name, value", CASES)
def test_every_check_can_fail(slug, name, value):
    assert made(slug, GOOD[slug]).holds
    assert len(made(slug, GOOD[slug] | {name: value}).failed()) == 1


@pytest.mark.parametrize("slug", GOOD)
def test_the_bad_values_reach_every_check(slug):
    hit = {str(made(slug, GOOD[slug] | {name: value}).failed()[0]) for name, value in BAD[slug].items()}
    assert hit == set(map(str, MODULES[slug].CHECKS))


def test_a_random_model_has_no_retrieval_heads_to_find():
    metrics, baselines = retrieval_head.measure(
        "tiny-random-llama", tests=4, prompts=2, draws=1, length=280, text=256, success="any"
    )
    run = made("retrieval-head", metrics | baselines)
    assert not run.holds and run.numbers["recall_intact"] == 0


def test_a_random_model_retrieves_with_no_plan():
    metrics, baselines = razorattention.measure(
        "tiny-random-llama", prompts=1, texts=1, draws=1, length=600, success="any"
    )
    numbers = metrics | baselines | {"kl_razor_1024": 1.0, "kl_random_1024": 1.0, "kl_no_token_1024": 1.0}
    numbers |= {"kl_razor_2048": 1.0, "kl_no_token_2048": 1.0}
    run = made("razorattention", numbers)
    assert not run.holds and run.numbers["recall_full"] < 0.9
    assert 0 < metrics["kl_razor_600"] < math.inf
    assert metrics["cache_bytes_razor"] < baselines["cache_bytes_full"]
    assert baselines["kl_random_600"] >= 0 and metrics["kl_razor_1200"] > 0


def test_agreement_is_the_worst_pair():
    one, two, three = HeadSet.parse("L0K0,L0K1"), HeadSet.parse("L0K0,L0K1"), HeadSet.parse("L0K1,L1K0")
    assert razorattention.agreement([one, two])["jaccard_over_seeds"] == 1
    assert razorattention.agreement([one, two, three])["jaccard_over_seeds"] == pytest.approx(1 / 3)


@pytest.mark.parametrize("slug", GOOD)
def test_the_declared_row_is_true(slug):
    found = row(slug)
    assert not found.problems()
    assert found.status == found.paper.status
    assert found.record is not None and found.record.claim == found.paper.claim


@pytest.mark.skipif(torch.cuda.is_available(), reason="tests what happens without a CUDA device")
@pytest.mark.parametrize("slug", GOOD)
def test_the_larger_run_needs_a_gpu(slug):
    with pytest.raises(HeadwiseError, match="CUDA"):
        row(slug).reproduce("gpu")
