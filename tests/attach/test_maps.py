"""Attention maps against the eager weights of transformers and the dense oracle: GQA, left padding, plans, encoders."""

import pytest
import torch

from headwise.attach import attach
from headwise.attach.maps import attention_map, each_map
from headwise.errors import AttachError
from headwise.patterns import Elastic, SinkWindow
from headwise.plan import HeadPlan
from tiny_helper import inputs, oracle, padded, starts, tiny, tokens


def maps_of(model, batch, **attached):
    found = {}
    with torch.no_grad(), attach(model, observers=[each_map(found.__setitem__)], **attached):
        model(**batch)
    return [found[layer] for layer in sorted(found)]


@pytest.mark.parametrize("name", ["llama", "qwen3", "mistral", "gpt2", "bert", "vit"])
def test_maps_are_the_eager_weights(name):
    model, batch = tiny(name, "eager"), inputs(name)
    with torch.no_grad():
        wanted = model(**batch, output_attentions=True).attentions
    for mine, theirs in zip(maps_of(model, batch), wanted, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-4)


def test_columns_are_positions_in_padded_rows():
    model, batch = tiny("llama"), padded([9, 5])
    alone = maps_of(model, {"input_ids": batch["input_ids"][1:, 4:]})
    both = maps_of(model, batch)
    for a, b in zip(alone, both, strict=True):
        torch.testing.assert_close(b[1, :, 4:, :5], a[0], atol=1e-5, rtol=1e-4)
        assert (b[1, :, :4] == 0).all()


@pytest.mark.parametrize("pattern", [SinkWindow(1, 3), Elastic(1, 0, 0.25, minimum=2)], ids=str)
def test_under_a_plan_a_map_is_the_oracles(pattern):
    model, batch = tiny("llama", "eager"), padded([12, 8])
    plan = HeadPlan.uniform(pattern, 3, 2)
    seen = {}
    with torch.no_grad(), oracle(model, patterns=plan.patterns, start=starts(batch), seen=seen):
        model(**batch)
    for layer, mine in enumerate(maps_of(model, batch, plan=plan)):
        torch.testing.assert_close(mine[0], seen[layer][0][0].float(), atol=1e-5, rtol=1e-4)


def test_a_compensation_token_takes_its_share_out_of_the_row():
    model, batch = tiny("llama"), {"input_ids": tokens(1, 16)}
    plan = HeadPlan.uniform(SinkWindow(1, 4, compensation="count", grow=True), 3, 2, prefill="dense")
    sums = []
    with torch.no_grad(), attach(model, plan=plan, observers=[lambda call, out: sums.append(attention_map(call))]):
        model.generate(batch["input_ids"], max_new_tokens=3, min_new_tokens=3, do_sample=False)
    dense, last = sums[0].sum(-1), sums[-1].sum(-1)
    torch.testing.assert_close(dense, torch.ones_like(dense))
    assert (last < 1 - 1e-4).all()
    assert (last > 0).all()


def test_a_softmax_that_the_op_cannot_express_is_refused():
    model = tiny("llama")
    with pytest.raises(AttachError, match="softcap"):
        with attach(model, observers=[lambda call, out: call.options.update(softcap=1.0) or attention_map(call)]):
            model(tokens(1, 4))
