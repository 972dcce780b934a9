"""Transforms, which give a layer's head outputs in place of its own attention, and the output projection."""

import pytest
import torch

from headwise.attach import attach, find_stack
from headwise.attach.controller import controllers
from headwise.attach.projection import head_weights, output_projection
from headwise.cache import HeadwiseCache
from headwise.errors import AttachError
from headwise.hub import load_model
from headwise.plan import HeadPlan, SinkWindow

STREAM = SinkWindow(4, 16)


@pytest.fixture
def model():
    return load_model("tiny-random-llama")[0]


def tokens(rows: int = 1, count: int = 64) -> torch.Tensor:
    return torch.randint(256, (rows, count), generator=torch.Generator().manual_seed(0))


def test_transforms_nest_and_go_in_any_order(model):
    ids = tokens()
    plain = model(ids).logits
    doubled = attach(model, transforms=[lambda call, run: 2 * run()])
    halved = attach(model, transforms=[lambda call, run: run() / 2])
    assert torch.equal(model(ids).logits, plain)
    doubled.detach()
    assert not torch.allclose(model(ids).logits, plain)
    halved.detach()
    assert torch.equal(model(ids).logits, plain) and not controllers(model)


def test_a_transform_of_the_wrong_shape_raises(model):
    with (
        attach(model, transforms=[lambda call, run: run()[:, :1]]),
        pytest.raises(AttachError, match="a transform gave"),
    ):
        model(tokens())


def test_a_pattern_cannot_be_read_from_a_thinned_cache(model):
    plan = HeadPlan.uniform(STREAM, 3, 2)
    with attach(model, plan=plan), attach(model, transforms=[lambda call, run: call.attend_pattern(STREAM)]):
        with pytest.raises(AttachError, match="already thinned"):
            model(tokens(), past_key_values=HeadwiseCache(plan), use_cache=True)


def test_head_weights_are_rows_of_the_output_projection():
    for arch, name in (("llama", "o_proj"), ("gpt2", "c_proj")):
        stack = find_stack(load_model(f"tiny-random-{arch}")[0])
        projection = output_projection(stack, 0)
        assert projection is getattr(stack.modules[0], name)
        out = torch.randn(5, stack.heads, stack.head_dim)
        summed = torch.einsum("nhd,hdc->nc", out, head_weights(projection, stack.heads))
        bias = 0 if projection.bias is None else projection.bias
        torch.testing.assert_close(summed + bias, projection(out.flatten(1)))
