"""The reproduction of paper 28: every check can fail, a random model fails them, the record is true."""

import math

import pytest
import torch

from headwise.errors import HeadwiseError
from headwise.papers import Reproduction, attentioninfluence, row
from headwise.tasks import stories

GOOD = {
    "lookup_tokens_intact": 0.9,
    "lookup_tokens_without_top": 0.3,
    "lookup_tokens_without_random": 0.9,
    "auc_maths": 0.9,
    "auc_code": 0.9,
    "auc_reference": 0.8,
    "p_all": 0.001,
    "auc_all": 0.9,
    "auc_all_random": 0.6,
    "stories_among_selected": 0.0,
}
BAD = {
    "lookup_tokens_intact": 0.5,
    "lookup_tokens_without_top": 0.9,
    "lookup_tokens_without_random": 0.5,
    "auc_maths": 0.5,
    "auc_code": math.nan,
    "auc_reference": 0.4,
    "p_all": 0.2,
    "auc_all_random": 0.95,
    "stories_among_selected": 0.5,
}


def made(numbers):
    paper = attentioninfluence.PAPER
    return Reproduction(
        paper=paper.slug,
        claim=paper.claim,
        scale="cpu",
        metrics=numbers,
        baselines={},
        checks=attentioninfluence.CHECKS,
        seconds=1.0,
    )


@pytest.mark.parametrize("name", BAD)
def test_every_check_can_fail(name):
    assert made(GOOD).holds
    assert len(made(GOOD | {name: BAD[name]}).failed()) == 1


def test_the_bad_values_reach_every_check():
    assert len({str(made(GOOD | {name: value}).failed()[0]) for name, value in BAD.items()}) == len(made(GOOD).checks)


@pytest.mark.slow
def test_a_random_model_looks_nothing_up():
    metrics, baselines = attentioninfluence.measure(
        "tiny-random-llama", samples=1, checks=1, length=1200, documents=2, tokens=48, draws=2
    )
    assert set(GOOD) <= {*metrics, *baselines}
    assert not made(metrics | baselines).holds and metrics["lookup_tokens_intact"] < 0.5


def test_the_texts_are_of_four_kinds_and_of_one_length():
    texts = attentioninfluence.texts(8)
    assert {kind: len(set(members)) for kind, members in texts.items()} == dict.fromkeys(texts, 8)
    assert min(len(text) for members in texts.values() for text in members) > 1000
    assert sum("def " in text for text in texts["code"]) >= 4 and texts["stories"] == list(stories()[:8])


def test_the_declared_row_is_true():
    """A row that declares "works" without a record has a problem."""
    found = row("attentioninfluence")
    assert not found.problems() and found.status == found.paper.status
    assert found.record is None or found.record.claim == found.paper.claim


@pytest.mark.skipif(torch.cuda.is_available(), reason="tests what happens without a CUDA device")
def test_the_larger_run_needs_a_gpu():
    with pytest.raises(HeadwiseError, match="CUDA"):
        row("attentioninfluence").reproduce("gpu")
