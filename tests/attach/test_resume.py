"""A pass that starts at a later layer gives what the whole pass gives, with edits behind the point as without."""

import pytest
import torch

import headwise
from headwise.attach.resume import Resume
from headwise.errors import AttachError
from headwise.units import HeadSet
from tiny_helper import logits, padded, state, tiny


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2", "mixtral", "deepseek-v3"])
def test_resumed_passes_equal_whole_ones(name):
    model, batch = tiny(name), padded([24, 9])
    before = state(model)
    resume = Resume(model, [0, 1, 2])
    with torch.no_grad(), resume.recording():
        whole = logits(model, batch)
    for point in (0, 1, 2):
        units = HeadSet.parse(f"L{point}H1,L2H0")
        with headwise.ablate(model, units):
            wanted = logits(model, batch)
            with resume.from_layer(point):
                given = logits(model, batch)
        assert torch.equal(given, wanted) and not torch.equal(given, whole)
    assert state(model) == before


def test_the_skipped_layers_do_not_run():
    model, batch, seen = tiny(), padded([12]), []
    resume = Resume(model, [2])
    with resume.recording():
        logits(model, batch)
    hook = model.model.layers[1].mlp.register_forward_hook(lambda *_: seen.append(1))
    with resume.from_layer(2):
        logits(model, batch)
    hook.remove()
    assert not seen


def test_check_sees_a_model_that_passes_more_than_hidden_states():
    model, batch = tiny(), padded([12])
    run = lambda: logits(model, batch)
    assert Resume(model, [1, 2]).check(run) == 0
    secret = {}
    model.model.layers[0].register_forward_hook(lambda *_: secret.update(x=secret.get("x", 0) + 1))
    model.model.norm.register_forward_hook(lambda _, __, out: out + secret["x"])
    assert Resume(model, [1]).check(run) > 0.1


def test_errors_leave_the_model_alone():
    model = tiny()
    before = state(model)
    with pytest.raises(AttachError, match="layers of this model are 0 to 2"):
        Resume(model, [3])
    resume = Resume(model, [1])
    with pytest.raises(AttachError, match="nothing was recorded for layer 1"), resume.from_layer(1):
        pass
    with resume.recording():
        logits(model, padded([5]))
    with pytest.raises(RuntimeError, match="stop"), resume.from_layer(1):
        raise RuntimeError("stop")
    with resume.from_layer(1), pytest.raises(AttachError, match="replaced already"), resume.from_layer(1):
        pass
    assert state(model) == before
