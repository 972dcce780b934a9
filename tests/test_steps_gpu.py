"""Decode steps by our kernels, and as CUDA graphs: the same texts and outputs as on the host."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import headwise
import headwise.steps
from headwise import HeadPlan, HeadwiseCache
from headwise.plan import Full, SinkWindow
from tiny_helper import generate, padded, tokens

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
LAYERS, H, K, D = 3, 8, 4, 32


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=300, hidden_size=H * D, intermediate_size=512, num_hidden_layers=LAYERS, num_attention_heads=H, num_key_value_heads=K,
        head_dim=D, pad_token_id=256,
    )  # fmt: skip
    return LlamaForCausalLM(config).to("cuda", torch.float32).eval()


PLANS = {
    "full": HeadPlan.full(layers=LAYERS, kv_heads=K),
    "half": HeadPlan(patterns=((Full(), SinkWindow(2, 9), Full(), SinkWindow(0, 5)),) * LAYERS),
}


def cuda(batch):
    return {name: x.cuda() for name, x in batch.items()}


@pytest.mark.parametrize("lengths", [(40, 40), (40, 13, 1)])
@pytest.mark.parametrize("name", ["full", "half"])
def test_logits_of_every_step_agree(model, name, lengths, monkeypatch):
    """Host, device, graph: logits of 70 greedy steps, with room ending in between."""
    monkeypatch.setattr("headwise.cache.ROOM", 16)
    plan, batch, found = PLANS[name], cuda(padded(lengths)), {}
    follow = tokens(len(lengths), 70, seed=5).cuda()
    for how in ("host", "device", "graph"):
        cache, rows = HeadwiseCache(plan), []
        attached = headwise.attach(model, plan=plan, capture=how == "graph")
        with attached, torch.no_grad(), monkeypatch.context() as patch:
            if how == "host":
                patch.setattr(HeadwiseCache, "begin_steps", lambda self, **_: None)
            model(**batch, past_key_values=cache)
            mask, position = batch["attention_mask"], batch["position_ids"][:, -1:]
            for t in range(follow.shape[1]):
                mask = torch.nn.functional.pad(mask, (0, 1), value=1)
                position = position + 1
                out = model(follow[:, t : t + 1], attention_mask=mask, position_ids=position, past_key_values=cache)
                rows.append(out.logits)
            capture = attached.controller._capture
            assert how != "graph" or (capture.refused is None and capture.replays >= 60)
        assert (cache.steps is None) == (how == "host")
        cache.settle()
        found[how] = torch.cat(rows, 1), cache
    for how in ("device", "graph"):
        torch.testing.assert_close(found[how][0], found["host"][0], rtol=2e-4, atol=2e-4)
        assert found[how][1].get_seq_length() == found["host"][1].get_seq_length()


@pytest.mark.parametrize("lengths", [(33,), (33, 12)])
def test_generate_under_capture(model, lengths):
    """Plain generate: greedy, sampled with a seed, and beams, which reorder the cache and so end the steps every time."""
    plan, batch = PLANS["half"], cuda(padded(lengths))
    for options in ({}, {"do_sample": True}, {"num_beams": 2}):
        texts = []
        for capture in (False, True):
            torch.manual_seed(3)
            with headwise.attach(model, plan=plan, capture=capture):
                texts.append(generate(model, batch, new=40, **options))
        assert torch.equal(*texts), options


def test_attaching_more_ends_the_graph(model):
    """An edit attached between two steps acts at once; detaching it too; the model is as it was afterwards."""
    plan, ids = PLANS["half"], tokens(2, 30).cuda()
    edit = headwise.Edit.zero(headwise.HeadSet.parse("L0H0,L1H3,L2H5"))
    forward = dict(vars(model.model))
    found = {}
    for capture in (False, True):
        rows, cache = [], HeadwiseCache(plan)
        with headwise.attach(model, plan=plan, capture=capture), torch.no_grad():
            model(ids[:, :10], past_key_values=cache)
            for t in range(10, 30):
                if t == 16:
                    more = headwise.attach(model, edits=edit)
                if t == 22:
                    more.detach()
                rows.append(model(ids[:, t : t + 1], past_key_values=cache).logits)
        found[capture] = torch.cat(rows, 1)
    torch.testing.assert_close(found[True], found[False], rtol=2e-4, atol=2e-4)
    assert set(vars(model.model)) == set(forward) and "forward" not in vars(model.model)


def test_a_model_that_waits_for_the_host_runs_eagerly(model, caplog):
    """A step that cannot be captured says so once and goes on, with the right numbers."""
    plan, ids = PLANS["half"], tokens(1, 20).cuda()
    handle = model.model.layers[1].register_forward_hook(lambda *_: torch.ones(1, device="cuda").item() and None)
    try:
        found = []
        for capture in (False, True):
            cache = HeadwiseCache(plan)
            with headwise.attach(model, plan=plan, capture=capture), torch.no_grad():
                model(ids[:, :8], past_key_values=cache)
                found.append(
                    torch.cat([model(ids[:, t : t + 1], past_key_values=cache).logits for t in range(8, 20)], 1)
                )
        torch.testing.assert_close(*found, rtol=2e-4, atol=2e-4)
        assert caplog.text.count("cannot be captured") == 1
    finally:
        handle.remove()


@pytest.mark.parametrize("how", ["device", "graph"])
@pytest.mark.parametrize("name", ["snapkv", "adakv", "streaming_llm"])
def test_plans_by_content_step_too(model, name, how):
    """Chosen tokens in storages of their own lengths: steps on the device write the same text as on CPU."""
    options = {"sinks": 2} if name == "streaming_llm" else {"window": 8}
    plan = getattr(headwise.budget, name)(model, budget="24 tokens", **options)
    batch, texts = padded((60, 31)), []
    with headwise.attach(model.cpu(), plan=plan):
        texts.append(generate(model, batch, new=24))
    model.cuda()
    with headwise.attach(model, plan=plan, capture=how == "graph"):
        texts.append(generate(model, cuda(batch), new=24).cpu())
    assert torch.equal(*texts)


@pytest.mark.parametrize("how", ["device", "graph"])
def test_what_leaves_is_averaged_on_the_device(model, how):
    """A compensation token through steps and graphs: the text of the host."""
    row = (Full(), SinkWindow(2, 9, compensation="count"), Full(), SinkWindow(0, 5, compensation="one"))
    plan = HeadPlan(patterns=(row,) * LAYERS, prefill="dense")
    batch, texts = padded((40, 13)), []
    with headwise.attach(model.cpu(), plan=plan):
        texts.append(generate(model, batch, new=30))
    model.cuda()
    with headwise.attach(model, plan=plan, capture=how == "graph"):
        texts.append(generate(model, cuda(batch), new=30).cpu())
    assert torch.equal(*texts)
