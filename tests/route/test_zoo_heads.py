"""Rules of the zoo over attention heads: the same record, applied through the attention interface."""

import pytest
import torch

import headwise
from headwise.errors import AttachError, RouteError, WrongModelError
from headwise.route import ExpertChoice, Graph, HeadZoo, NormTopK, SigmoidTopK, SoftmaxTopK
from tiny_helper import padded, tiny, tokens


@torch.no_grad()
def logits(model, **batch):
    return model(**batch).logits


def zoo(model, rule, **options):
    made = HeadZoo.of(model, rule, **options)
    for layer in made.layers:
        for parameter in layer.parameters():
            torch.nn.init.normal_(parameter, std=0.5, generator=torch.Generator().manual_seed(3))
    return made


def test_gates_are_k_times_the_weights_before_the_output_projection():
    model, ids, seen = tiny("llama"), tokens(2, 9), {}
    router = zoo(model, SoftmaxTopK(k=2))
    with headwise.attach(model, observers=[lambda call, out: seen.update({call.layer: out})]):
        logits(model, input_ids=ids)
        before = seen[0]
        with headwise.attach(model, router=router):
            logits(model, input_ids=ids)
    out = seen[0]
    hidden = model.model.layers[0].input_layernorm(model.model.embed_tokens(ids))
    gates = router.layers[0].router(hidden).gates() * 2
    torch.testing.assert_close(out, before * gates[..., None])
    assert (gates == 0).sum() == gates.numel() / 2


@pytest.mark.parametrize("rule", [SoftmaxTopK(k=2), SigmoidTopK(k=3), NormTopK(k=2), Graph(graph="attention")])
def test_padding_changes_nobody_and_detaching_restores(rule):
    model = tiny("llama")
    batch, before = padded([5, 12]), logits(model, **padded([5, 12]))
    with headwise.attach(model, router=zoo(model, rule)):
        whole = logits(model, **batch)
        alone = logits(model, input_ids=batch["input_ids"][:1, 7:])
        torch.testing.assert_close(whole[0, 7:], alone[0], rtol=1e-3, atol=1e-3)
        assert not torch.allclose(whole, before)
    assert torch.equal(logits(model, **batch), before)
    assert not any("headwise_router" in name for name, _ in model.named_modules())


def test_losses_train_the_routers_through_the_model():
    model, ids = tiny("llama"), tokens(2, 9)
    router = zoo(model, SoftmaxTopK(k=2), losses={"balance": 0.5})
    with headwise.attach(model.train(), router=router):
        loss = model(ids, labels=ids).loss
        loss.backward()
        task = model.eval()(ids, labels=ids).loss
    assert loss > task + 0.4
    assert all(layer.router.W.grad.abs().sum() > 0 for layer in router.layers)


def test_generation_with_cache_and_refusals():
    model, ids = tiny("llama"), tokens(1, 6)
    with headwise.attach(model, router=zoo(model, SoftmaxTopK(k=2))):
        out = model.generate(ids, max_new_tokens=4, min_new_tokens=4, do_sample=False)
        assert torch.equal(logits(model, input_ids=out[:, :-1])[0, -4:].argmax(-1), out[0, -4:])
    with headwise.attach(model, router=zoo(model, Graph(graph="cosine"))), pytest.raises(AttachError, match="no cache"):
        model.generate(ids, max_new_tokens=3, do_sample=False)
    with pytest.raises(RouteError, match="leaks the future"):
        zoo(model, ExpertChoice())
    with pytest.raises(WrongModelError, match="3 layers of 4 heads"):
        headwise.attach(tiny("gemma3"), router=zoo(model, SoftmaxTopK(k=2)))
