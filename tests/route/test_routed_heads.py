"""Routed models whose heads leave queries out: the same outputs and gradients as all heads multiplied by their gates."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from headwise import attach
from headwise.attach.hook import HeadCall
from headwise.attention import attention
from headwise.attention.own import Own
from headwise.route import HeadRouter, LayerRoute, RouterConfig

CASES = [("trained", {}), ("norm", {}), ("norm", {"ste_scope": "all"}), ("fitted", {"fill": 32}), ("static", {})]


def llama(heads=4, kv_heads=2, dim=32, layers=2):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=96, hidden_size=heads * dim, intermediate_size=64, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=kv_heads, initializer_range=0.1,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def router_of(model, kind, options):
    heads, width = model.config.num_attention_heads, model.config.hidden_size
    route = LayerRoute(heads=heads, shared=(0, 2), routed=0 if kind == "static" else heads // 2 - 1)
    width = width if kind in ("trained", "fitted") else 0
    router = HeadRouter(
        RouterConfig(layers=(route,) * model.config.num_hidden_layers, kind=kind, width=width, **options)
    )
    with torch.no_grad():
        for p in router.parameters():
            p.normal_(generator=torch.Generator(p.device).manual_seed(3))
    return router


def step(model, router, ids):
    """Loss, logits and all gradients of a training step."""
    model.zero_grad()
    router.zero_grad()
    with attach(model.train(), router=router):
        out = model(ids, labels=ids)
        out.loss.backward()
    grads = {
        name: p.grad.clone()
        for name, p in (*model.named_parameters(), *router.named_parameters())
        if p.grad is not None
    }
    return out.logits.detach(), grads


def by_the_op(calls, **options):
    """In the place of the kernel: the op's own answer, with the choice as data."""

    def served(self, q, gates):
        calls.append(gates)
        gate = gates.transpose(1, 2)
        return attention(q, self.k, self.v, active=gate != 0, gate=gate, scale=self.scale, **options).transpose(1, 2)

    return served


@pytest.mark.parametrize("kind, options", CASES)
def test_leaving_queries_out_trains_as_multiplying_does(monkeypatch, kind, options):
    model, ids = llama().double(), torch.randint(0, 96, (2, 19), generator=torch.Generator().manual_seed(1))
    router = router_of(model, kind, options).double()
    wanted, grads = step(model, router, ids)
    calls: list = []
    monkeypatch.setattr(HeadCall, "attend_served", by_the_op(calls, backend="reference"))
    found, mine = step(model, router, ids)
    assert len(calls) == (0 if "ste_scope" in options else 2)  # a head that is left out but learns must be computed
    torch.testing.assert_close(found, wanted, rtol=1e-8, atol=1e-10)
    assert mine.keys() == grads.keys()
    for name, grad in grads.items():
        torch.testing.assert_close(
            mine[name], grad, rtol=1e-6, atol=1e-8, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_a_transform_sees_every_head(monkeypatch):
    model, calls = llama(), []
    monkeypatch.setattr(HeadCall, "attend_served", by_the_op(calls))
    with attach(model, router=router_of(model, "norm", {}), transforms=[lambda call, attend: attend()]):
        model(torch.arange(9)[None])
    assert not calls


def test_on_a_cpu_heads_are_multiplied(monkeypatch):
    model, seen, served = llama(), [], HeadCall.attend_served
    monkeypatch.setattr(HeadCall, "attend_served", lambda self, q, gates: seen.append(served(self, q, gates)))
    with attach(model, router=router_of(model, "norm", {})):
        model(torch.arange(9)[None])
    assert seen == [None, None]


@pytest.mark.gpu
@pytest.mark.parametrize("kind, options", [c if c[0] != "fitted" else ("fitted", {"fill": 64}) for c in CASES])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 2e-3), (torch.bfloat16, 6e-2)])
def test_the_kernel_serves_a_routed_model(monkeypatch, kind, options, dtype, tolerance):
    """From a size on that a table sets to nothing here, so that the kernel is taken; the dense way is the oracle."""
    model = llama(heads=8, kv_heads=2, dim=64, layers=1).cuda()  # one layer: rounding may change what a second chooses
    ids = torch.randint(0, 96, (2, 130), generator=torch.Generator().manual_seed(1)).cuda()
    router = router_of(model, kind, options).to("cuda")
    monkeypatch.setattr(HeadCall, "attend_served", lambda self, q, gates: None)
    with torch.autocast("cuda", dtype=dtype, enabled=dtype != torch.float32):
        wanted, grads = step(model, router, ids)
    monkeypatch.undo()
    ran = []
    run = Own.run
    monkeypatch.setattr(Own, "run", lambda self, request: ran.append(request.active is not None) or run(self, request))
    monkeypatch.setattr(Own, "prefer", lambda self, request: "asked for by a test")
    with torch.autocast("cuda", dtype=dtype, enabled=dtype != torch.float32):
        found, mine = step(model, router, ids)
    assert ran == ([] if "ste_scope" in options else [True])
    assert (found - wanted).abs().max() <= tolerance * wanted.abs().max()
    assert mine.keys() == grads.keys()
    for name, grad in grads.items():
        assert (mine[name] - grad).norm() <= tolerance * grad.norm() + 1e-6, name
