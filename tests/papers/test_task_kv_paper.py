"""Paper 11: the run on a tiny model has every number its checks ask for, and `holds` is computed from them."""

import dataclasses

import pytest
import torch

import headwise
from headwise.errors import HeadwiseError
from headwise.papers import task_kv
from headwise.papers._one_prefill import Prefill
from headwise.papers.reproduction import Reproduction
from headwise.plan import Selected, SinkWindow
from tiny_helper import logits, tiny, tokens


@pytest.fixture(scope="module")
def measured():
    return task_kv.measure("tiny-random-gpt2", each=2, seeds=2, length=560)


def record(metrics, baselines):
    return Reproduction(
        paper="task-kv", claim=task_kv.PAPER.claim, scale="cpu", metrics=metrics, baselines=baselines, checks=task_kv.CHECKS, seconds=1.0
    )  # fmt: skip


def test_a_random_model_does_not_bear_out_the_claim(measured):
    run = record(*measured)
    assert not run.holds and any("recall_full" in str(check) for check in run.failed())


def test_holds_can_be_true_and_every_check_can_fail(measured):
    good = {c.left: 1.0 if c.op in (">", ">=") else 0.0 for c in task_kv.CHECKS}
    good |= {c.right: 0.5 for c in task_kv.CHECKS if isinstance(c.right, str)}
    good |= {"recall_task_kv": 1.0, "recall_snapkv": 1.0}
    base = record(*measured)
    metrics = {name: good.get(name, value) for name, value in base.metrics.items()}
    baselines = {name: good.get(name, value) for name, value in base.baselines.items()}
    assert record(metrics, baselines).holds
    for check in task_kv.CHECKS:
        bad = float("nan")
        broken = {**metrics, check.left: bad} if check.left in metrics else metrics
        other = {**baselines, check.left: bad} if check.left in baselines else baselines
        assert not record(broken, other).holds, check


def test_the_bytes_are_equal_within_a_percent(measured):
    metrics, baselines = measured
    for name in ("adakv", "snapkv", "headkv", "random_tokens"):
        assert baselines[f"bytes_{name}"] == pytest.approx(metrics["bytes_task_kv"], rel=0.02)
    assert metrics["bytes_task_kv"] < 0.45 * baselines["bytes_full"]


def test_controls_are_the_same_plan_with_other_heads():
    plan = task_kv.plans_of(tiny("gpt2"), _scores(), 560)["task_kv"]
    near = task_kv.reordered(plan, "near")
    assert near.kept(512).equal(plan.kept(512)) and near.patterns != plan.patterns
    assert near.patterns[0][0].split.endswith(",order=near)")
    assert task_kv.replace_split(SinkWindow(1, 2), "order=near") == SinkWindow(1, 2)


def _scores():
    fingerprint = headwise.fingerprint(tiny("gpt2"))
    return headwise.HeadScores(values=torch.rand(3, 4), kind="kv", method="x", fingerprint=fingerprint)


def test_one_prefill_serves_every_plan_as_the_attached_model_would():
    """Prompt once, then tokens behind it: the logits of a plan are those of the model that read the prompt under the plan."""
    model, ids = tiny(), tokens(1, 60)[0]
    prefill = Prefill.read(model, ids[:50], window=8)
    for pattern in (Selected(2, 4, 9, by="observation(window=8)", grow=True), SinkWindow(2, 8, grow=True)):
        plan = headwise.HeadPlan.uniform(pattern, 3, 2, prefill="dense")
        got, size = prefill.log_probs(model, ids[50:], plan)
        cache = headwise.HeadwiseCache(plan)
        with headwise.attach(model, plan=plan), torch.no_grad():
            model(ids[None, :50], past_key_values=cache)
            assert cache.nbytes == size
            want = [model(ids[None, i : i + 1], past_key_values=cache).logits[0] for i in range(50, 60)]
        torch.testing.assert_close(got, torch.cat(want).log_softmax(-1), atol=1e-4, rtol=1e-3)
    dense, _ = prefill.log_probs(model, ids[50:], None)
    torch.testing.assert_close(
        dense, logits(model, {"input_ids": ids[None]})[0, 50:].log_softmax(-1), atol=1e-4, rtol=1e-3
    )
    again, _ = prefill.log_probs(model, ids[50:], None)
    assert torch.equal(dense, again)


def test_jaccard():
    a, b = torch.tensor([[True, False, False]]), torch.tensor([[False, True, False]])
    assert task_kv.jaccard({"x": [a, a], "y": [b]}) == (1.0, 0.0)


def test_a_gpu_run_needs_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(HeadwiseError, match="CUDA"):
        task_kv.reproduce("gpu")
    assert dataclasses.asdict(task_kv.PAPER)["slug"] == "task-kv"
