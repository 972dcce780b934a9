"""What every `reproduce` does alike: scales that cannot run are refused before anything is measured, checks decide, time is kept."""

import pytest
import torch

from headwise.errors import ArtifactError, HeadwiseError
from headwise.papers import Check, Paper
from headwise.papers._run import device_of, mean_of, reproduces

PAPER = Paper(slug="moh", status="partial", api="headwise.route.moh", claim="better than chance")
CHECKS = (Check("beats chance", "reached", ">", "chance"),)


def made(reached, **options):
    calls = []

    @reproduces(PAPER, CHECKS, **options)
    def reproduce(scale="cpu", *, seed=0, progress=False):
        """Measure it."""
        calls.append((scale, seed, progress))
        return {"reached": reached}, {"chance": 0.5}

    return reproduce, calls


@pytest.mark.parametrize("reached, holds", [(0.6, True), (0.4, False), (float("nan"), False)])
def test_the_numbers_decide(reached, holds):
    reproduce, calls = made(reached, published={"published": 0.9})
    run = reproduce(seed=3)
    assert run.holds is holds
    assert (run.paper, run.claim, run.scale) == ("moh", "better than chance", "cpu")
    assert run.baselines == {"chance": 0.5, "published": 0.9}
    assert calls == [("cpu", 3, False)]
    assert run.seconds >= 0
    assert reproduce.__doc__ == "Measure it."
    assert reproduce.__module__ == __name__


def test_checks_may_come_with_the_numbers():
    @reproduces(PAPER)
    def reproduce(scale="cpu", *, seed=0, progress=False):
        return {"reached": 0.6}, {"chance": 0.5}, [Check("far above", "reached", ">=", 0.9)]

    assert [check.name for check in reproduce().failed()] == ["far above"]


def test_a_claim_without_checks_is_refused():
    @reproduces(PAPER)
    def reproduce(scale="cpu", *, seed=0, progress=False):
        return {"reached": 0.6}, {"chance": 0.5}

    with pytest.raises(ArtifactError, match="no check"):
        reproduce()


def test_a_scale_that_cannot_run_is_refused_before_measuring(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    reproduce, calls = made(0.6)
    for scale, why in (("tpu", "'cpu' or 'gpu'"), ("gpu", "needs a CUDA device")):
        with pytest.raises(HeadwiseError, match=why):
            reproduce(scale)
        with pytest.raises(HeadwiseError, match=why):
            device_of(scale)
    assert calls == []


def test_means_need_the_same_numbers_of_every_run():
    assert mean_of([{"a": 1.0, "b": 2.0}, {"b": 4.0, "a": 3.0}]) == {"a": 2.0, "b": 3.0}
    with pytest.raises(KeyError):
        mean_of([{"a": 1.0}, {"b": 1.0}])
