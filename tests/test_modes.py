"""Whatever happens inside, a model leaves as it came: each module in its own mode, each weight with its own wish for a gradient."""

import pytest
import torch
from torch import nn

from headwise.modes import evaluating, frozen


def made():
    """Training, with a part that somebody has put into eval mode and frozen."""
    model = nn.Sequential(nn.Linear(2, 2), nn.Dropout(), nn.BatchNorm1d(2).eval()).train()
    model[2].eval().requires_grad_(False)
    return model


def state(model):
    return [m.training for m in model.modules()], [p.requires_grad for p in model.parameters()]


@pytest.mark.parametrize("mode", [evaluating, frozen])
@pytest.mark.parametrize("broken", [False, True])
def test_all_comes_back(mode, broken):
    model = made()
    before = state(model)
    try:
        with mode(model):
            assert not any(m.training for m in model.modules())
            assert any(p.requires_grad for p in model.parameters()) == (mode is evaluating)
            if broken:
                raise KeyError("broken on purpose")
    except KeyError:
        assert broken
    assert state(model) == before
    assert before[0][2:] == [True, False]


def test_an_eval_model_with_a_training_part_keeps_it():
    model = made().eval()
    model[1].train()
    with evaluating(model):
        torch.testing.assert_close(model(torch.ones(3, 2)), model(torch.ones(3, 2)))
    assert [m.training for m in model] == [False, True, False]


def test_they_nest():
    model = made()
    before = state(model)
    with frozen(model), frozen(model), evaluating(model):
        assert not any(p.requires_grad for p in model.parameters())
    assert state(model) == before
