"""The trained head router by kernels: every output and gradient equals the composed layer, alone and inside a model."""

import pytest
import torch
from route_fakes import fake_call
from transformers import LlamaConfig, LlamaForCausalLM

from headwise import attach
from headwise.attention.triton import _host
from headwise.route import HeadRouter, LayerRoute, RouterConfig, _losses
from headwise.route._collect import Collector
from headwise.route._fused_heads import HeadRule, fused_heads, fused_heads_work
from headwise.route._layers import RouterLayer, TrainedLayer

KERNELS = _host.triton_available() and (torch.cuda.is_available() or _host.interpreting())
needs_kernels = pytest.mark.skipif(not KERNELS, reason="needs Triton and a CUDA device, or TRITON_INTERPRET=1")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {torch.float32: (1e-4, 1e-5), torch.float16: (2e-3, 1e-4), torch.bfloat16: (1e-2, 1e-3)}


def layer(route, *, width=40, spread=30.0, **options):
    """A trained layer whose router distinguishes tokens (the initial std of 0.02 hardly does)."""
    config = RouterConfig(layers=(route,), kind="trained", width=width, **options)
    made = TrainedLayer(config, 0, Collector(), torch.Generator().manual_seed(1)).to(DEVICE)
    with torch.no_grad():
        for p in made.parameters():
            p.mul_(spread)
    return made


def hidden(B, N, C, dtype=torch.float32, seed=2):
    return torch.randn(B, N, C, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype).requires_grad_()


def padding(B, N):
    """Rows of which the first starts late and the others end early."""
    columns = torch.arange(N)[None].expand(B, N)
    return torch.cat([columns[:1] >= N // 3, columns[1:] < N - N // 4]).to(DEVICE)


def both_ways(made, x, rule, real=None):
    """(gates, balance) by the kernels and from torch operations."""
    flat = None if real is None else real.flatten()
    gates, loss = fused_heads(x.flatten(0, 1), made.W_r, made.W_s, made.W_h, rule, made.place, flat)
    shared, routed, probs, mask = made.gates(fake_call(hidden=x))
    wanted = torch.cat([shared, routed], -1).index_select(-1, made.order)
    balance = None if rule.balance is None else _losses.balance_loss(probs, mask, real, rule.balance)
    return (gates.view_as(wanted), loss), (wanted, balance)


def grads(outs, weights, inputs):
    used = [(out, weight) for out, weight in zip(outs, weights, strict=True) if weight is not None]
    return torch.autograd.grad([o for o, _ in used], inputs, [w for _, w in used], retain_graph=True)


def rule_of(made, balance="official"):
    route = made.route
    official = made.config.gate_norm == "official"
    return HeadRule(len(route.shared), len(route.pool), route.routed, official, balance if route.routed else None)


ROUTES = {
    "none shared": LayerRoute(heads=6, routed=2),
    "one shared": LayerRoute(heads=4, shared=(0,), routed=2),
    "two shared": LayerRoute(heads=12, shared=(0, 1), routed=4),
    "shared anywhere": LayerRoute(heads=7, shared=(2, 5), routed=1),
    "one shared, last": LayerRoute(heads=9, shared=(8,), routed=3),
    "all of the pool": LayerRoute(heads=5, shared=(1, 3), routed=3),
    "all, none shared": LayerRoute(heads=3, routed=3),
    "many": LayerRoute(heads=37, shared=(0, 4, 30), routed=13),
    "no choice": LayerRoute(heads=5, shared=(0, 1, 4)),
    "one head": LayerRoute(heads=1, routed=1),
}


@needs_kernels
@pytest.mark.parametrize("norm", ["official", "paper"])
@pytest.mark.parametrize("name", ROUTES)
def test_gates_balance_and_gradients_equal_the_composed_layer(name, norm):
    made, x = layer(ROUTES[name], gate_norm=norm), hidden(2, 37, 40)
    rule, real = rule_of(made), padding(2, 37)
    mine, want = both_ways(made, x, rule, real)
    assert torch.equal(mine[0] != 0, want[0] != 0)
    torch.testing.assert_close(mine, want, rtol=1e-4, atol=1e-5)
    above = torch.randn(mine[0].shape, generator=torch.Generator().manual_seed(3)).to(DEVICE)
    inputs = [x, *made.parameters()]
    one = torch.tensor(2.5, device=DEVICE)
    for weights in [(above, None), (above, one), (None, one)][: 3 if rule.balance else 1]:
        inputs = [x, made.W_r] if weights[0] is None else inputs
        pairs = zip(grads(mine, weights, inputs), grads(want, weights, inputs), strict=True)
        for a, b in pairs:
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


@needs_kernels
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("scaling", ["official", "paper", "unit"])
def test_each_scaling_of_the_balance_loss(scaling, padded):
    made, x = layer(ROUTES["two shared"]), hidden(3, 50, 40)
    mine, want = both_ways(made, x, rule_of(made, scaling), padding(3, 50) if padded else None)
    torch.testing.assert_close(mine[1], want[1], rtol=1e-4, atol=1e-6)
    pair = (torch.autograd.grad(out[1], [x, made.W_r]) for out in (mine, want))
    for a, b in zip(*pair, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-6)


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("weights", ["float32", "like x"])
def test_half_precision_states_are_routed_in_float32(dtype, weights):
    made, x = layer(ROUTES["shared anywhere"], width=100), hidden(1, 70, 100, dtype)
    if weights == "like x":
        made.to(dtype)
    mine, want = both_ways(made, x, rule_of(made))
    assert mine[0].dtype == torch.float32
    torch.testing.assert_close(mine, want, rtol=1e-4, atol=1e-5)
    above = torch.randn(mine[0].shape, generator=torch.Generator().manual_seed(3)).to(DEVICE)
    inputs = [x, *made.parameters()]
    for a, b, given in zip(grads(mine, (above, None), inputs), grads(want, (above, None), inputs), inputs, strict=True):
        assert a.dtype == given.dtype
        rtol, atol = TOLERANCE[given.dtype]
        torch.testing.assert_close(a, b, rtol=10 * rtol, atol=10 * atol)


@needs_kernels
def test_a_single_token_a_wide_state_and_rows_in_several_tiles():
    for B, N, C in ((1, 1, 40), (1, 1, 300), (2, 97, 17)):
        made, x = layer(ROUTES["one shared"], width=C), hidden(B, N, C)
        mine, want = both_ways(made, x, rule_of(made))
        torch.testing.assert_close(mine, want, rtol=1e-4, atol=1e-5)


@needs_kernels
def test_of_equal_heads_the_lowest_of_the_pool_runs():
    for route in (LayerRoute(heads=6, shared=(0, 2), routed=2), LayerRoute(heads=6, shared=(4,), routed=3)):
        made = layer(route, spread=0.0)
        mine, want = both_ways(made, hidden(1, 5, 40), rule_of(made))
        runs = {*route.shared, *route.pool[: route.routed]}
        torch.testing.assert_close(mine[0], want[0])
        assert set(mine[0][0, 3].nonzero().flatten().tolist()) == runs
    made, x = layer(LayerRoute(heads=6, routed=2)), hidden(1, 64, 40)
    with torch.no_grad():  # small whole numbers: logits are exact in any order of summing; heads 2, 3 and 5 are alike
        x.copy_(x.round())
        made.W_r.copy_(made.W_r.mul(8).round() / 32)
        made.W_r[[3, 5]] = made.W_r[2].clone()
    mine, want = both_ways(made, x, rule_of(made))
    torch.testing.assert_close(mine, want, rtol=1e-4, atol=1e-5)
    runs = mine[0][0] != 0
    assert torch.equal(runs, want[0][0] != 0)
    assert (runs[:, 2] & runs[:, 3]).any() and (runs[:, 2] & ~runs[:, 3]).any() and not runs[:, 5].any()


@needs_kernels
def test_broken_states_give_broken_gates_for_their_token_alone():
    made, x = layer(ROUTES["two shared"]), hidden(1, 6, 40)
    with torch.no_grad():
        x[0, 2, 7] = torch.nan
    gates = both_ways(made, x, rule_of(made))[0][0]
    assert gates[0, 2].isnan().all() and gates[0, [0, 1, 3, 4, 5]].isfinite().all()


@needs_kernels
def test_nothing_is_kept_or_summed_that_nobody_asked_for():
    made, x = layer(ROUTES["two shared"]), hidden(1, 6, 40)
    gates, loss = both_ways(made, x, rule_of(made, None))[0]
    assert loss is None and gates.requires_grad
    with torch.no_grad():
        gates, loss = both_ways(made, x, rule_of(made))[0]
    assert loss is not None and not gates.requires_grad and not loss.requires_grad
    frozen = made.requires_grad_(False)
    gates, _ = both_ways(frozen, x, rule_of(made))[0]
    gates[..., 0].sum().backward()
    assert x.grad is not None and x.grad.abs().sum() > 0 and made.W_r.grad is None


@needs_kernels
def test_second_derivatives_are_refused():
    made, x = layer(ROUTES["two shared"]), hidden(1, 6, 40)
    gates = both_ways(made, x, rule_of(made))[0][0]
    (first,) = torch.autograd.grad(gates.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


def test_what_the_kernels_do_not_take():
    rule, x = HeadRule(2, 6, 3), torch.ones(4, 8, device=DEVICE)
    assert fused_heads_work(x, rule) is KERNELS
    assert not fused_heads_work(x.double(), rule) and not fused_heads_work(x[:0], rule)
    assert fused_heads_work(x, HeadRule(2, 60, 3)) is KERNELS and not fused_heads_work(x, HeadRule(2, 61, 3))
    assert fused_heads_work(x, HeadRule(0, 64, 3)) is KERNELS
    assert not fused_heads_work(x, HeadRule(1, 3, 0))  # nothing to learn
    assert [HeadRule(2, 6, 3).columns, HeadRule(0, 6, 3).columns, HeadRule(4, 2, 0).columns] == [10, 6, 6]


# -- inside a model ----------------------------------------------------------------------------------------------------


def llama(layers=2, heads=6, dim=16):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=96, hidden_size=heads * dim, intermediate_size=64, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=heads // 2, initializer_range=0.1,
    )  # fmt: skip
    return LlamaForCausalLM(config).to(DEVICE).train()


def router_of(model, **options):
    config = model.config
    routes = (LayerRoute(heads=config.num_attention_heads, shared=(0, 3), routed=2),) * config.num_hidden_layers
    made = HeadRouter(RouterConfig(layers=routes, kind="trained", width=config.hidden_size, beta=0.3, **options))
    with torch.no_grad():
        for p in made.parameters():
            p.mul_(10)
    return made.to(DEVICE)


def composed_only(monkeypatch):
    monkeypatch.setattr("headwise.route._layers.fused_heads_work", lambda *_: False)


def count_launches(monkeypatch):
    calls = []

    def counted(*args):
        calls.append(args[0].shape)
        return fused_heads(*args)

    monkeypatch.setattr("headwise.route._layers.fused_heads", counted)
    return calls


def step(model, router, ids, mask):
    model.zero_grad()
    router.zero_grad()
    with attach(model, router=router):
        out = model(ids, attention_mask=mask, labels=ids)
        out.loss.backward()
    named = (*model.named_parameters(), *router.named_parameters())
    return out.loss.detach(), {name: p.grad.clone() for name, p in named if p.grad is not None}


@needs_kernels
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_training_step_has_the_same_loss_and_gradients(checkpointing, monkeypatch):
    model = llama()
    router = router_of(model)
    ids = torch.randint(96, (2, 21), generator=torch.Generator().manual_seed(4)).to(DEVICE)
    mask = torch.ones_like(ids)
    mask[0, :6] = 0
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    calls = count_launches(monkeypatch)
    loss, found = step(model, router, ids, mask)
    assert len(calls) == 2 * (1 + checkpointing) and calls[0] == (42, 96)
    composed_only(monkeypatch)
    other, wanted = step(model, router, ids, mask)
    assert len(calls) == 2 * (1 + checkpointing)
    torch.testing.assert_close(loss, other, rtol=1e-5, atol=1e-6)
    assert found.keys() == wanted.keys() and any("W_h" in name for name in found)
    for name, grad in found.items():
        torch.testing.assert_close(
            grad, wanted[name], rtol=2e-3, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
        )


@needs_kernels
def test_loads_logits_and_generation_are_the_same_in_evaluation(monkeypatch):
    model = llama().eval()
    router = router_of(model)
    ids = torch.randint(1, 96, (2, 9), generator=torch.Generator().manual_seed(4)).to(DEVICE)
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    runs = []
    for fused in (True, False):
        if not fused:
            composed_only(monkeypatch)
        with torch.no_grad(), attach(model, router=router), router.recording() as load:
            logits = model(ids, attention_mask=mask).logits
            tokens = model.generate(ids, attention_mask=mask, max_new_tokens=4, do_sample=False, pad_token_id=0)
        assert router.loss() is None
        runs.append((logits[0], logits[1, 4:], load.share(), tokens))
    for a, b in zip(*runs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@needs_kernels
def test_a_rank_takes_the_gates_of_its_own_heads():
    made = layer(ROUTES["shared anywhere"]).eval()
    x = hidden(1, 5, 40)
    whole = made(fake_call(H=7, hidden=x, q=torch.zeros(1, 7, 5, 6, device=DEVICE)))
    part = made(fake_call(hidden=x, q=torch.zeros(1, 3, 5, 6, device=DEVICE), first_head=4))
    assert torch.equal(part, whole[..., 4:])
    assert torch.allclose(whole, RouterLayer.balanced(made, fake_call(hidden=x))[0], rtol=1e-4, atol=1e-5)


@pytest.mark.gpu
@needs_kernels
def test_a_captured_training_step_equals_the_eager_one():
    model = llama()
    router = router_of(model)
    ids = torch.randint(96, (2, 32), generator=torch.Generator().manual_seed(4)).to(DEVICE)
    weights = [*model.parameters(), *router.parameters()]
    with attach(model, router=router):

        def run():
            for p in weights:
                p.grad = None
            out = model(ids, labels=ids, use_cache=False)
            out.loss.backward()
            return out.loss.detach()

        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                loss = run()
            eager = loss.clone(), [p.grad.clone() for p in weights if p.grad is not None]
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            captured = run()
        graph.replay()
        torch.cuda.synchronize()
        torch.testing.assert_close(captured, eager[0])
        for a, b in zip([p.grad for p in weights if p.grad is not None], eager[1], strict=True):
            torch.testing.assert_close(a, b)
        with torch.no_grad():  # other weights, the same graph
            for p in router.parameters():
                p.mul_(-1)
        graph.replay()
        changed = captured.clone()
        assert not torch.allclose(changed, eager[0])
        torch.testing.assert_close(changed, run())
