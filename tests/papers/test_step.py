"""A training step gives the numbers of the loop it stands for, and on CUDA a replayed one those of an eager one."""

import pytest
import torch

from headwise.papers import _step
from headwise.papers._small_lm import Size, batches, mixture_lm, small_lm
from headwise.papers._step import Step, seeded
from headwise.route import NoisyTopK, SigmoidTopK, SoftmaxTopK

TINY = Size(width=64, layers=2, heads=2, hidden=32, experts=4, steps=8, batch=4, length=64)


def test_a_step_is_adamw_on_the_clipped_gradient():
    mine, other = small_lm(TINY, 32, 0), small_lm(TINY, 32, 0)
    optimizer = torch.optim.AdamW(other.parameters(), lr=0.0, betas=(0.9, 0.95), weight_decay=0.1)
    step = Step(mine)
    for turn, ids in enumerate(batches(TINY, 3, 1)):
        step(ids, 1e-3 * turn)
        optimizer.param_groups[0]["lr"] = 1e-3 * turn
        other(ids, labels=ids).loss.backward()
        torch.nn.utils.clip_grad_norm_(other.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    assert all(torch.equal(a, b) for a, b in zip(mine.parameters(), other.parameters(), strict=True))
    assert not step.replays


def test_the_random_state_is_as_before():
    state = torch.random.get_rng_state()
    with seeded(torch.device("cpu"), 3):
        one = torch.rand(2)
    with seeded(torch.device("cpu"), 3):
        assert torch.equal(one, torch.rand(2))
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.gpu
@pytest.mark.parametrize("rule", [SoftmaxTopK(k=2), SigmoidTopK(k=2), NoisyTopK(k=2), None], ids=str)
def test_a_replayed_step_trains_as_an_eager_one(rule, monkeypatch):
    losses = []
    for warm in (_step.WARM, 10**6):
        monkeypatch.setattr(_step, "WARM", warm)
        with seeded(torch.device("cuda"), 1):
            if rule is None:
                model, host = small_lm(TINY, 64, 0, "cuda"), None
            else:
                model, host = mixture_lm(TINY, 0, "cuda", rule=rule, losses={"balance": 0.01})
            step = Step(model.train(), after=None if host is None else host.update_bias)
            for ids in batches(TINY, 12, 1):
                step(ids, 3e-3)
        assert step.replays is (warm < 100)
        with torch.no_grad():
            held = [model.eval()(ids.cuda(), labels=ids.cuda()).loss for ids in batches(TINY, 2, 9)]
        losses.append(float(sum(held)))
        del step
    noise = 0.05 if isinstance(rule, NoisyTopK) else 0.01  # replayed noise differs
    assert losses[0] == pytest.approx(losses[1], rel=noise)
