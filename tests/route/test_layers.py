"""Gates of one layer, held to the equations of the paper: sums, sparsity, gradients, precision."""

import pytest
import torch
from route_fakes import fake_call
from torch.nn import functional as F

from headwise.errors import AttachError, RouteError
from headwise.route import LayerRoute, RouterConfig
from headwise.route._collect import Collector
from headwise.route._layers import FittedLayer, NormLayer, StaticLayer, TrainedLayer, spread
from headwise.route._losses import balance_loss, select


def layer(cls, route, *, kind=None, width=8, train=True, **options):
    kinds = {TrainedLayer: "trained", NormLayer: "norm", FittedLayer: "fitted", StaticLayer: "static"}
    config = RouterConfig(layers=(route,), kind=kinds[cls], width=width, **options)
    generator = [torch.Generator().manual_seed(1)] if cls in (TrainedLayer, FittedLayer) else []
    made = cls(config, 0, Collector(), *generator).train(train)
    with torch.no_grad():  # the init of std 0.02 hardly distinguishes tokens
        for p in made.parameters():
            p.mul_(40)
    return made


def trained(heads=6, shared=(0, 1), routed=2, **options):
    return layer(TrainedLayer, LayerRoute(heads=heads, shared=shared, routed=routed), **options)


# part A: trained gates


def test_official_gates_sum_to_twice_the_weighted_counts():
    made, call = trained(), fake_call(H=6)
    gates = made(call)
    a = torch.softmax(F.linear(call.hidden, made.W_h), -1)
    torch.testing.assert_close(gates[..., :2].sum(-1), 2 * a[..., 0] * 2)
    torch.testing.assert_close(gates[..., 2:].sum(-1), 2 * a[..., 1] * 2)


def test_official_gates_are_the_equations_written_out():
    made, call = trained(), fake_call(H=6)
    p, s, a = (torch.softmax(F.linear(call.hidden, W), -1) for W in (made.W_r, made.W_s, made.W_h))
    for b in range(2):
        for t in range(5):
            chosen = p[b, t].topk(2).indices.tolist()
            total = sum(p[b, t, i] for i in chosen)
            wanted = [2 * a[b, t, 0] * 2 * s[b, t, i] for i in range(2)]
            wanted += [2 * a[b, t, 1] * 2 * p[b, t, i] / total if i in chosen else torch.tensor(0.0) for i in range(4)]
            torch.testing.assert_close(made(call)[b, t], torch.stack(wanted))


def test_zero_weights_give_active_gates_of_one():
    made, call = trained(), fake_call(H=6)
    with torch.no_grad():
        for p in made.parameters():
            p.zero_()
    gates = made(call)
    assert torch.allclose(gates[gates != 0], torch.ones(()))
    assert (gates != 0).sum(-1).eq(4).all()
    assert (gates[..., :4] != 0).all()  # of equal probabilities the lowest index


def test_paper_gates_sum_to_at_most_one():
    made, call = trained(gate_norm="paper"), fake_call(H=6)
    gates = made(call)
    a = torch.softmax(F.linear(call.hidden, made.W_h), -1)
    torch.testing.assert_close(gates[..., :2].sum(-1), a[..., 0])
    assert (gates[..., 2:].sum(-1) <= a[..., 1] + 1e-6).all()
    p = torch.softmax(F.linear(call.hidden, made.W_r), -1)
    torch.testing.assert_close(gates[..., 2:], a[..., 1:] * p * select(p, 2))


@pytest.mark.parametrize("norm, total", [("official", 4.0), ("paper", 1.0)])
def test_a_fully_shared_layer_has_no_alpha(norm, total):
    made = trained(heads=4, shared=(0, 1, 2, 3), routed=0, gate_norm=norm)
    assert (made.W_r, made.W_h) == (None, None)
    gates = made(fake_call())
    torch.testing.assert_close(gates.sum(-1), torch.full((2, 5), total))


def test_one_shared_head_has_weight_one_with_and_without_routed_heads():
    alone = trained(heads=1, shared=(0,), routed=0)
    assert list(alone.parameters()) == []
    assert (alone(fake_call(H=1)) == 1).all()
    made, call = trained(heads=4, shared=(0,), routed=2), fake_call()
    assert made.W_s is None
    a = torch.softmax(F.linear(call.hidden, made.W_h), -1)
    torch.testing.assert_close(made(call)[..., 0], 2 * a[..., 0])


def test_without_shared_heads_the_routed_gates_sum_to_their_number():
    made = trained(heads=4, shared=(), routed=3)
    assert (made.W_s, made.W_h) == (None, None)
    torch.testing.assert_close(made(fake_call()).sum(-1), torch.full((2, 5), 3.0))


def test_shared_heads_may_stand_anywhere():
    made, call = trained(heads=6, shared=(2, 5), routed=1), fake_call(H=6)
    gates = made(call)
    assert (gates[..., [2, 5]] > 0).all()
    assert ((gates[..., [0, 1, 3, 4]] != 0).sum(-1) == 1).all()
    p = torch.softmax(F.linear(call.hidden, made.W_r), -1)
    assert torch.equal((gates[..., [0, 1, 3, 4]] != 0).float(), select(p, 1))


@pytest.mark.parametrize("cls", [TrainedLayer, NormLayer, FittedLayer])
def test_exactly_the_asked_number_of_gates_is_not_zero(cls):
    made = layer(cls, LayerRoute(heads=6, shared=(0, 3), routed=3))
    gates = made(fake_call(H=6, N=33))
    assert ((gates != 0).sum(-1) == 5).all()
    assert (gates[..., [0, 3]] != 0).all()


def test_gradient_reaches_every_router_weight():
    made, call = trained(), fake_call(H=6)
    (made(call) * torch.randn(6, generator=torch.Generator().manual_seed(5))).sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in made.parameters())


# part C: 0/1 gates


def test_binary_gates_are_exactly_zero_and_one_also_in_training():
    made = layer(NormLayer, LayerRoute(heads=6, shared=(0,), routed=2), ste_scope="all")
    gates = made(fake_call(H=6))
    assert set(gates.unique().tolist()) == {0.0, 1.0}


def test_norm_ranking_survives_scaling_and_rotation():
    made = layer(NormLayer, LayerRoute(heads=4, routed=2))
    call = fake_call(D=6)
    once = made(call)
    scaled = made(fake_call(q=call.q * 37.0))
    angle = torch.linspace(0, 3, 5)[:, None].expand(5, 3)
    x, y = call.q[..., :3], call.q[..., 3:]
    turned = torch.cat([x * angle.cos() - y * angle.sin(), x * angle.sin() + y * angle.cos()], -1)
    assert torch.equal(once, scaled)
    assert torch.equal(once, made(fake_call(q=turned)))


@pytest.mark.parametrize("scope", ["selected", "all", "none"])
def test_straight_through_gradient(scope):
    made = layer(NormLayer, LayerRoute(heads=4, shared=(0,), routed=1), ste_scope=scope)
    q = torch.randn(1, 4, 3, 6, requires_grad=True)
    upstream = torch.randn(1, 3, 4)
    gates = made(fake_call(q=q))
    if scope == "none":
        assert not gates.requires_grad
        return
    (gates * upstream).sum().backward()
    n = q.detach().clone().requires_grad_()
    norms = n[:, 1:].norm(dim=-1).transpose(1, 2)
    p = torch.softmax(norms / norms.std(-1, keepdim=True), -1)
    weight = upstream[..., 1:] * (gates[..., 1:].detach() if scope == "selected" else 1)
    (p * weight).sum().backward()
    torch.testing.assert_close(q.grad, n.grad, rtol=1e-4, atol=1e-6)
    assert q.grad[:, 1:].abs().sum() > 0
    assert (q.grad[:, 0] == 0).all()


def test_equal_norms_give_no_nan():
    q = torch.ones(1, 4, 3, 6, requires_grad=True)
    made = layer(NormLayer, LayerRoute(heads=4, routed=2))
    gates = made(fake_call(q=q))
    assert gates[0, 0].tolist() == [1, 1, 0, 0]
    (gates.sum() + made.collector.losses[0]).backward()
    assert q.grad.isfinite().all()
    zero = torch.zeros(1, 4, 3, 6, requires_grad=True)
    made(fake_call(q=zero)).sum().backward()
    assert zero.grad.isfinite().all()


def test_a_single_routed_head_has_no_spread():
    assert spread(torch.tensor([[3.0]]), 1e-6).tolist() == [[1.0]]
    gates = layer(NormLayer, LayerRoute(heads=4, shared=(0, 1, 2), routed=1))(fake_call())
    assert (gates == 1).all()


def test_routing_is_in_float32_in_half_precision_and_under_autocast():
    made, call = trained(train=False), fake_call(H=6)
    wanted = made(call)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(made(call), wanted)
    half = made(fake_call(H=6, hidden=call.hidden.bfloat16()))
    assert half.dtype == torch.float32
    assert trained().double()(fake_call(H=6, hidden=call.hidden.double())).dtype == torch.float64


def test_token_local_routing_sees_no_neighbour():
    for cls in (TrainedLayer, NormLayer, FittedLayer):
        made = layer(cls, LayerRoute(heads=4, shared=(0,), routed=2), train=False)
        call = fake_call()
        single = fake_call(hidden=call.hidden[:, 2:3], q=call.q[:, :, 2:3])
        assert torch.equal(made(call)[:, 2:3], made(single))


def test_a_tensor_parallel_rank_gets_its_own_gates():
    made, call = trained(train=False), fake_call(H=6)
    everything = made(call)
    part = made(fake_call(H=6, hidden=call.hidden, q=call.q[:, 3:], first_head=3))
    assert torch.equal(part, everything[..., 3:])
    with pytest.raises(AttachError, match="compares all 6 heads"):
        layer(NormLayer, LayerRoute(heads=6, routed=2))(fake_call(q=call.q[:, 3:]))


def test_static_gates_are_the_same_for_all_tokens():
    gates = layer(StaticLayer, LayerRoute(heads=4, shared=(1, 2)))(fake_call())
    assert gates.unique(dim=1).shape[1] == 1
    assert gates[0, 0].tolist() == [0, 1, 1, 0]


# choosing and balancing


def test_of_equal_scores_the_lowest_index_wins():
    scores = torch.tensor([[2.0, 2, 2, 2], [1, 3, 3, 0]])
    assert select(scores, 2).tolist() == [[1, 1, 0, 0], [0, 1, 1, 0]]
    assert select(scores, 0).sum() == 0
    assert select(scores, 4).min() == 1


@pytest.mark.parametrize("scaling, wanted", [("official", 3.0), ("paper", 3.0 / 8)])
def test_balance_loss_at_uniform_routing(scaling, wanted):
    probs = torch.full((2, 8, 8), 1 / 8)
    mask = torch.stack([torch.roll(torch.tensor([1.0] * 3 + [0] * 5), t) for t in range(8)]).expand(2, -1, -1)
    assert balance_loss(probs, mask, scaling=scaling).item() == pytest.approx(wanted, abs=1e-6)


def test_balance_loss_of_one_overused_head():
    probs, mask = torch.tensor([[[0.7, 0.1, 0.1, 0.1]]]), torch.tensor([[[1.0, 0, 0, 0]]])
    assert balance_loss(probs, mask).item() == pytest.approx(4 * 0.7)


def test_balance_gradient_pushes_the_overused_head_down_and_stops_at_the_choice():
    logits = torch.tensor([[[2.0, 0.0, 0.0]]], requires_grad=True)
    mask = torch.tensor([[[1.0, 0, 0]]], requires_grad=True)
    balance_loss(torch.softmax(logits, -1), mask).backward()
    assert logits.grad[0, 0, 0] > 0  # descent lowers it
    assert (logits.grad[0, 0, 1:] < 0).all()
    assert mask.grad is None


def test_padded_tokens_do_not_count_in_the_balance_loss():
    probs = torch.softmax(torch.randn(2, 6, 4), -1)
    mask = select(probs, 2)
    real = torch.ones(2, 6, dtype=torch.bool)
    real[1, :4] = False
    kept = torch.cat([probs[0], probs[1, 4:]])[None], torch.cat([mask[0], mask[1, 4:]])[None]
    torch.testing.assert_close(balance_loss(probs, mask, real), balance_loss(*kept))
    assert balance_loss(probs, mask, torch.zeros_like(real)) == 0


def test_bad_input_of_choice_and_balance():
    with pytest.raises(RouteError, match="floating point"):
        select(torch.arange(4), 2)
    with pytest.raises(RouteError, match="5 heads cannot be chosen of 4"):
        select(torch.ones(4), 5)
    with pytest.raises(RouteError, match="scaling is 'sum'"):
        balance_loss(torch.ones(1, 1, 2), torch.ones(1, 1, 2), scaling="sum")
