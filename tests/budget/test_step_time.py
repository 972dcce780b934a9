"""Step times: the fit finds the line that points lie on, budgets meet their target, and nonsense is refused."""

import json
from dataclasses import replace

import pytest
import torch

import headwise
from headwise.addresses import Fingerprint
from headwise.budget import StepTime, _step_time, duo, snapkv, step_time
from headwise.budget._step_time import Point, kept_at, lookup
from headwise.errors import ArtifactError, PlanError, WrongModelError
from headwise.plan import Budget
from headwise.units import HeadScores

MODEL = Fingerprint(architecture="Toy", config_hash="0", layers=4, heads=8, kv_heads=4)
LABELS = {"device": "toy", "dtype": "bfloat16", "head_dim": 64, "fingerprint": MODEL}


def line(nbytes, batch, fixed=3.0, row=0.5, rate=2e6, floor=0.0):
    return max(floor, fixed + row * batch + nbytes / rate)


def points(**how):
    sizes = [(b, t) for b in (1, 4, 8) for t in (512, 8192, 65536)]
    return [Point(b, t, 2048 * b * t, line(2048 * b * t, b, **how)) for b, t in sizes]


def test_the_fit_finds_the_line():
    timed = StepTime.fit(points(), **LABELS)
    assert dict(timed.empty_ms) == pytest.approx({1: 3.5, 4: 5.0, 8: 7.0}, rel=1e-6)
    assert timed.rate == pytest.approx(2e6, rel=1e-6) and timed.worst < 1e-6
    assert [timed.empty(batch) for batch in (1, 2, 6, 8, 10)] == pytest.approx([3.5, 4.0, 6.0, 7.0, 8.0], rel=1e-6)


def test_a_batch_that_is_dearer_than_the_line_between_its_neighbours_is_kept_as_measured():
    """Products of four rows may be slower than those of eight; a line through all batches would promise too much."""
    timed = StepTime.fit([replace(p, ms=p.ms + 0.9 * (p.batch == 4)) for p in points()], **LABELS)
    assert timed.empty(4) == pytest.approx(5.9, rel=1e-6) and timed.empty(8) == pytest.approx(7.0, rel=1e-6)
    assert StepTime.fit([p for p in points() if p.batch == 4], **LABELS).empty(1) == pytest.approx(5.0, rel=1e-6)


def test_a_host_that_is_waited_for_is_a_floor_not_a_part_of_the_line():
    timed = StepTime.fit(points(floor=9.0), **LABELS)
    assert timed.floor_ms == 9.0 and timed.rate == pytest.approx(2e6, rel=1e-6) and timed.ms(0) == 9.0
    with pytest.raises(PlanError, match=r"takes 9 ms on toy before any key is read"):
        timed.within("8ms", context=1000)


@pytest.mark.parametrize("target", ["40ms", "0.04s", 40, Budget.latency(40)])
@pytest.mark.parametrize("batch", [1, 4])
def test_a_plan_made_for_a_target_is_predicted_to_meet_it(target, batch):
    timed, scores = StepTime.fit(points(), **LABELS), HeadScores(values=torch.rand(4, 4), kind="kv", method="random")
    budget = timed.within(target, context=32768, batch=batch)
    plan = duo(scores, budget=budget, context=32768, batch=batch, head_dim=64, dtype_bytes=2)
    assert 0 < len(plan.full_heads()) < 16
    assert 20 < timed.of_plan(plan, length=32768, batch=batch) <= 40
    more = headwise.HeadPlan.from_set(scores.top(len(plan.full_heads()) + 1), headwise.SinkWindow(64, 256), 4, 4)
    assert timed.of_plan(more, length=32768, batch=batch) > 40


def test_a_target_that_the_whole_cache_meets_is_the_whole_cache():
    assert StepTime.fit(points(), **LABELS).within(1e6, context=1000) == Budget.ratio(1.0)


def test_a_latency_alone_is_refused_by_every_planner_with_the_way_out():
    scores = HeadScores(values=torch.rand(4, 4), kind="kv", method="random")
    for call in (lambda: duo(scores, budget="12ms"), lambda: snapkv(MODEL, budget="12ms")):
        with pytest.raises(PlanError, match=r"12 ms a step depends on the machine.*step_time"):
            call()


def test_files(tmp_path, monkeypatch):
    timed = StepTime.fit(points(), **LABELS)
    timed.save(tmp_path / "a.json")
    assert StepTime.load(tmp_path / "a.json") == timed
    for name, value in (
        ("rate", 0.0),
        ("points", []),
        ("dtype", "bfloat"),
        ("points", [[1, 2, 3]]),
        ("head_dim", 0),
        ("empty_ms", [[1]]),
        ("empty_ms", [[1, 0.5], [1, 0.5]]),
        ("points", [[1, 64, 1000, 0.0]]),
    ):
        broken = json.loads((tmp_path / "a.json").read_text()) | {name: value}
        (tmp_path / "b.json").write_text(json.dumps(broken))
        with pytest.raises(ArtifactError):
            StepTime.load(tmp_path / "b.json")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(PlanError, match="headwise calibrate"):
        lookup(MODEL, "toy")
    timed.save(kept_at("toy", MODEL, "bfloat16"))
    assert lookup(MODEL, "toy") == timed


@pytest.mark.parametrize(
    "call, word",
    [
        (lambda t: t.within("25%", context=10), "target latency is"),
        (lambda t: t.within("12ms", context=0), "context is 0"),
        (lambda t: t.within("12ms", context=10, batch=0), "batch is 0"),
        (lambda t: Budget.parse("0ms"), "above 0"),
        (lambda t: Budget.latency(float("nan")), "finite"),
        (
            lambda t: StepTime.fit([Point(1, 1, 10, 5.0), Point(1, 2, 20, 5.0), Point(1, 4, 40, 4.0)], **LABELS),
            "same time",
        ),
        (lambda t: step_time(headwise.load_model("tiny-random-llama")[0], batches=(1,), lengths=(64,)), "two at least"),
        (lambda t: step_time(headwise.load_model("tiny-random-llama")[0], lengths=(0,)), "a length is 0"),
    ],
)
def test_bad_input(call, word):
    with pytest.raises(PlanError, match=word):
        call(StepTime.fit(points(), **LABELS))


def test_measured_on_a_model_which_is_left_as_it_was(monkeypatch):
    def steady(*arguments, real=_step_time._measured):
        point = real(*arguments)  # real steps; the times are replaced, as other work on this machine may bend them
        return replace(point, ms=line(point.nbytes, point.batch))

    monkeypatch.setattr(_step_time, "_measured", steady)
    model, _ = headwise.load_model("tiny-random-llama")
    before = (model.config._attn_implementation, [len(m._forward_pre_hooks) for m in model.modules()])
    timed = step_time(model, batches=(1, 8), lengths=(64, 16384), repeats=2)
    assert before == (model.config._attn_implementation, [len(m._forward_pre_hooks) for m in model.modules()])
    assert [(p.batch, p.tokens) for p in timed.points] == [(1, 64), (1, 16384), (8, 64), (8, 16384)]
    assert timed.points[1].nbytes > 20 * timed.points[0].nbytes and timed.rate == pytest.approx(2e6, rel=1e-6)
    other = HeadScores(values=torch.rand(4, 4), kind="kv", method="random", fingerprint=MODEL)
    with pytest.raises(WrongModelError):
        other.fingerprint.require(timed.fingerprint, "the scores")
