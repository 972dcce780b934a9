"""The reproduction of LongHeads: every check can fail, the control is one, the short model is trained on short texts."""

import math

import pytest
import torch

from headwise.attach import attach
from headwise.budget import longheads as make
from headwise.errors import HeadwiseError
from headwise.papers import Reproduction, longheads, row
from headwise.papers._short_model import ShortTask, trained_model
from tiny_helper import tiny, tokens

GOOD = {
    "recall_dense": 1.0,
    "recall_longheads": 0.9,
    "recall_window": 0.1,
    "recall_random_chunks_best": 0.2,
    "ppl_longheads": 15.0,
    "ppl_random_chunks": 16.0,
    "recall_in_range": 0.95,
    "recall_dense_8x": 0.1,
    "recall_longheads_8x": 0.7,
    "kept_4x": 0.9,
    "kept_8x": 0.7,
    "recall_window_8x": 0.1,
    "recall_random_8x": 0.1,
}
BAD = {
    "recall_dense": 0.5,
    "recall_longheads": 0.15,
    "recall_window": 0.9,
    "recall_random_chunks_best": 0.95,
    "ppl_longheads": 17.0,
    "recall_in_range": 0.3,
    "recall_dense_8x": 0.8,
    "kept_4x": 0.5,
    "kept_8x": math.nan,
    "recall_window_8x": 0.9,
    "recall_random_8x": 0.9,
}
ALL = longheads.CHECKS + longheads.LONG_CHECKS


def reproduction(numbers):
    return Reproduction(
        paper="longheads", claim="c", scale="gpu", metrics=numbers, baselines={}, checks=ALL, seconds=1.0
    )


def test_good_numbers_hold():
    assert reproduction(GOOD).holds


@pytest.mark.parametrize("name", BAD)
def test_every_check_can_fail(name):
    assert not reproduction(GOOD | {name: BAD[name]}).holds


def test_random_chunks_are_as_many_and_others():
    model, ids = tiny(), tokens(1, 200)
    far, outs = make(model, chunk=8, window=40), []
    for transform in (far, longheads.RandomChunks.like(far, 0), longheads.RandomChunks.like(far, 1)):
        with torch.no_grad(), attach(model, transforms=[transform]):
            outs.append(model(ids).logits)
    assert all(torch.allclose(outs[0][:, :40], out[:, :40], atol=1e-5) for out in outs)
    assert not torch.allclose(outs[0], outs[1], atol=1e-2) and not torch.allclose(outs[1], outs[2], atol=1e-2)


def test_a_random_model_bears_nothing_out():
    metrics, baselines = longheads.measure("tiny-random-llama", prompts=1, draws=1, windows=1, length=320, window=128)
    found = Reproduction(
        paper="longheads",
        claim="c",
        scale="cpu",
        metrics=metrics,
        baselines=baselines,
        checks=longheads.CHECKS,
        seconds=1.0,
    )
    assert not found.holds


def test_the_short_task_never_shows_more_than_its_length():
    task, generator = ShortTask(length=64, words=50), torch.Generator().manual_seed(0)
    ids, wanted = task.training_rows(3, generator)
    assert ids.shape == wanted.shape == (3, 64) and not wanted[:, :32].any()
    first, second = ids[0, :32].view(-1, 8).tolist(), ids[0, 32:].view(-1, 8).tolist()
    assert sorted(first) == sorted(second) and wanted[0, 32:40].tolist() == [False] * 3 + [True] * 5
    rows = task.test_rows(256, 4, generator)
    for row_ in rows:
        spans = row_.unfold(0, 8, 1)
        assert int((spans == row_[-8:]).all(1).sum()) >= 2


def test_training_moves_the_loss_and_the_extension_is_measured():
    task = ShortTask(length=32, words=16, passage=4, cue=1)
    model = trained_model(task, steps=3, batch=2, device="cpu", seed=0)
    assert not model.training and 0 <= task.recall(model, 64, 3, 0) <= 1
    again = trained_model(task, steps=3, batch=2, device="cpu", seed=0)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    metrics, baselines = longheads.measure_extension(steps=1, batch=1, tests=1)
    assert {"recall_in_range", "recall_longheads_4x", "kept_8x"} <= set(metrics)
    assert {f"recall_{name}_{t}x" for name in ("dense", "window", "few", "random") for t in (4, 8)} == set(baselines)


def test_scales_and_the_row(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(HeadwiseError, match="CUDA"):
        longheads.reproduce("gpu")
    assert row("longheads").problems() == []


def test_the_record_is_of_this_claim_with_these_checks():
    record = row("longheads").record
    if record is None:
        pytest.skip("not recorded yet")
    assert record.claim == longheads.PAPER.claim and record.checks[: len(longheads.CHECKS)] == longheads.CHECKS
