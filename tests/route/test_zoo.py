"""The router zoo: what every rule promises, padding, causality, gradients, capacity, bad input."""

import math

import pytest
import torch
from zoo_helper import B, C, E, N, inputs, made, seeded

from headwise.errors import RouteError
from headwise.route import (
    Balanced,
    Cosine,
    Dense,
    ExpertChoice,
    Experts,
    Fixed,
    Graph,
    Hash,
    Lory,
    MoELayer,
    NoisyTopK,
    NormTopK,
    NullExperts,
    Router,
    SigmoidTopK,
    Smear,
    SoftmaxTopK,
    SoftMoE,
    Stable,
    TopKSoftmax,
    TopP,
)

CHOOSERS = {
    "dense": Dense(),
    "softmax-topk": SoftmaxTopK(k=2),
    "switch": SoftmaxTopK(k=1, renorm=False),
    "logit-norm": SoftmaxTopK(k=2, logit_norm=1.0),
    "topk-softmax": TopKSoftmax(k=2),
    "sigmoid": SigmoidTopK(k=2, groups=2, top_groups=1, scale=2.5),
    "noisy": NoisyTopK(k=2),
    "cosine": Cosine(k=2, rank=4),
    "fixed": Fixed(k=2),
    "norm": NormTopK(k=2),
    "top-p": TopP(p=0.5, most=4),
    "null": NullExperts(k=3, null=3),
    "expert-choice": ExpertChoice(capacity=1.5),
    "sinkhorn": Balanced(),
    "assignment": Balanced(method="assignment"),
    "hash": Hash(vocabulary=50, k=2),
    "stable": Stable(vocabulary=50, rank=4, k=2),
    "jitter": SoftmaxTopK(k=2, jitter=0.1),
    "graph": Graph(base=SoftmaxTopK(k=2), graph="cosine"),
}
LOOK_AHEAD = {"expert-choice", "sinkhorn", "assignment"}


@pytest.mark.parametrize("name", CHOOSERS)
def test_every_router_gives_a_routing_that_makes_sense(name):
    router = made(CHOOSERS[name]).eval()
    routing = router(**inputs())
    assert routing.index.shape == routing.weight.shape and routing.probs.shape == (B, N, E)
    assert (routing.index >= 0).all() and (routing.index < E).all()
    assert (routing.weight >= 0).all() and routing.weight[~routing.used()].sum() == 0
    if name != "null":
        torch.testing.assert_close(routing.probs.sum(-1), torch.ones(B, N))
    assert routing.mask().sum() == routing.used().sum()  # no unit twice
    again = router(**inputs())
    assert torch.equal(again.index, routing.index) and torch.equal(again.weight, routing.weight)  # eval has no noise
    assert set(routing.statistics()) == {"violation", "variation", "entropy", "effective", "dead", "dropped"}


@pytest.mark.parametrize("name", [n for n in CHOOSERS if n not in LOOK_AHEAD])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_and_batch_do_not_change_a_tokens_routing(name, side):
    router = made(CHOOSERS[name], causal=True).eval()
    given = inputs()
    whole = router(**given)
    pad = 5
    place = slice(pad, None) if side == "left" else slice(0, N)
    padded, real = {}, torch.zeros(B, N + pad, dtype=torch.bool)
    real[:, place] = True
    for key, value in given.items():
        wide = torch.full((B, N + pad, *value.shape[2:]), 3, dtype=value.dtype)
        wide[:, place] = value
        padded[key] = wide
    routing = router(**padded, real=real)
    torch.testing.assert_close(routing.weight[:, place], whole.weight)
    assert torch.equal(routing.index[:, place], whole.index)
    assert routing.load().sum() == whole.load().sum()
    single = router(**{k: v[1:] for k, v in given.items()})
    torch.testing.assert_close(single.weight[0], whole.weight[1])


@pytest.mark.parametrize("name", [n for n in CHOOSERS if n not in LOOK_AHEAD])
def test_routers_allowed_in_causal_models_do_not_see_the_future(name):
    router = made(CHOOSERS[name], causal=True).eval()
    given = inputs()
    whole = router(**given)
    part = router(**{k: v[:, :7] for k, v in given.items()})
    torch.testing.assert_close(whole.weight[:, :7], part.weight)


@pytest.mark.parametrize("rule", [ExpertChoice(), Balanced(), SoftMoE(), Smear(), Lory(strict=False)])
def test_look_ahead_is_refused_in_a_causal_model_unless_asked_for(rule):
    with pytest.raises(RouteError, match="leaks the future"):
        Router(rule, width=C, experts=E)
    assert Router(rule, width=C, experts=E, future=True) is not None
    assert Router(rule, width=C, experts=E, causal=False) is not None


@pytest.mark.parametrize("name", [n for n in CHOOSERS if n not in ("hash", "norm", "fixed", "stable")])
def test_the_task_trains_every_router(name):
    router = made(CHOOSERS[name]).train()
    layer = MoELayer(router, Experts(experts=E, width=C, hidden=4, std=0.5, generator=seeded()))
    given = inputs()
    layer(given["x"], token_ids=given["token_ids"]).square().sum().backward()
    for label, parameter in router.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, label


def test_all_units_chosen_with_renorm_is_the_dense_gate():
    x = inputs()["x"]
    dense, top = made(Dense()), made(SoftmaxTopK(k=E))
    torch.testing.assert_close(top(x).gates(), dense(x).gates())


def test_softmax_then_topk_with_renorm_equals_topk_then_softmax():
    x = inputs()["x"]
    one, other = made(SoftmaxTopK(k=3))(x), made(TopKSoftmax(k=3))(x)
    assert torch.equal(one.index, other.index)
    torch.testing.assert_close(one.weight, other.weight)


def test_sigmoid_bias_moves_the_choice_but_not_the_weights_and_towards_balance():
    router = made(SigmoidTopK(k=2, renorm=False, speed=0.05)).train()
    x = torch.randn(4, 50, C, generator=seeded(5)) + 0.5
    first = router(x).statistics()["violation"]
    router.update_bias()
    assert router.load.sum() == 0 and router.bias.abs().max() <= 0.05 + 1e-6 and not router.bias.requires_grad
    for _ in range(60):
        routing = router(x)
        router.update_bias()
    assert routing.statistics()["violation"] < first / 2
    torch.testing.assert_close(routing.weight, routing.logits.sigmoid().gather(-1, routing.index))
    assert "bias" in router.state_dict()


def test_the_state_of_the_bias_stays_float32_in_a_half_precision_model():
    router = made(SigmoidTopK(k=2)).to(torch.bfloat16).train()
    assert router.W.dtype == torch.bfloat16 and router.load.dtype == router.bias.dtype == torch.float32
    for _ in range(3):
        router(torch.randn(8, 100, C, generator=seeded(5)).bfloat16())
    assert router.load.sum() == 3 * 8 * 100 * 2


def test_groups_limit_where_a_token_may_go():
    routing = made(SigmoidTopK(k=3, groups=2, top_groups=1))(inputs()["x"])
    assert ((routing.index // 3) == (routing.index[..., :1] // 3)).all()
    scores = routing.logits.sigmoid().unflatten(-1, (2, 3))
    best = scores.topk(2, dim=-1).values.sum(-1).argmax(-1)
    assert torch.equal(routing.index[..., 0] // 3, best)


def test_noise_acts_in_training_only_and_follows_its_generator():
    router = made(NoisyTopK(k=2)).train()
    x = inputs()["x"]
    a, b, c = (router(x, generator=seeded(s)) for s in (1, 1, 2))
    assert torch.equal(a.index, b.index) and not torch.equal(a.index, c.index)
    assert torch.equal(router.eval()(x, generator=seeded(1)).index, router(x, generator=seeded(2)).index)
    fresh = Router(NoisyTopK(k=2), width=C, experts=E)
    assert fresh.W.abs().sum() == 0 and fresh.W_noise.abs().sum() == 0


def test_jitter_acts_in_training_only():
    router = made(SoftmaxTopK(k=2, jitter=0.2))
    x = inputs()["x"]
    assert not torch.equal(router.train()(x, generator=seeded(1)).weight, router(x, generator=seeded(2)).weight)
    assert torch.equal(router.eval()(x).weight, made(SoftmaxTopK(k=2)).eval()(x).weight)


def test_hash_is_fixed_balanced_and_free_of_weights():
    router = made(Hash(vocabulary=50, k=2, seed=3))
    given = inputs()
    table = router.table
    for slot in range(2):
        counts = table[:, slot].bincount(minlength=E)
        assert counts.max() - counts.min() <= 1
    assert (table[:, 0] != table[:, 1]).all() and not list(router.parameters())
    assert torch.equal(router(**given).index, table[given["token_ids"]])
    assert torch.equal(Router(Hash(vocabulary=50, k=2, seed=3), width=C, experts=E).table, table)
    assert not torch.equal(Router(Hash(vocabulary=50, k=2, seed=4), width=C, experts=E).table, table)
    with pytest.raises(RouteError, match="token_ids"):
        router(given["x"])
    with pytest.raises(RouteError, match="the table has 50 ids"):
        router(given["x"], token_ids=torch.full((B, N), 50))


def test_top_p_takes_the_smallest_set_that_reaches_p():
    routing = made(TopP(p=0.6, most=E))(inputs()["x"])
    ordered = routing.probs.sort(-1, descending=True).values
    needed = (ordered.cumsum(-1) < 0.6).sum(-1) + 1
    assert torch.equal(routing.used().sum(-1), needed) and len(needed.unique()) > 1


def test_null_experts_let_tokens_use_fewer():
    routing = made(NullExperts(k=3, null=6))(inputs()["x"])
    counts = routing.used().sum(-1)
    assert counts.min() < 3
    torch.testing.assert_close(routing.weight.sum(-1)[counts > 0], torch.ones(int((counts > 0).sum())))
    torch.testing.assert_close(routing.probs.sum(-1) + routing.extra["null"], torch.ones(B, N))


def test_norm_router_follows_norms_and_has_no_parameters():
    given = inputs()
    router = made(NormTopK(k=2))
    assert not list(router.parameters())
    assert torch.equal(router(**given).index, given["units"].norm(dim=-1).topk(2).indices)
    with pytest.raises(RouteError, match="needs units"):
        router(given["x"])


def test_cosine_router_ignores_the_length_of_tokens_and_tau_has_a_floor():
    router = made(Cosine(k=2, rank=4))
    x = inputs()["x"]
    torch.testing.assert_close(router(x).weight, router(x * 5).weight)
    router.tau.data.fill_(-1.0)
    assert router(x).weight.isfinite().all()


def test_ties_go_to_the_lowest_index():
    router = Router(SoftmaxTopK(k=2), width=C, experts=E)
    torch.nn.init.zeros_(router.W)
    assert (router(inputs()["x"]).index == torch.tensor([0, 1])).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_routing_is_float32_whatever_the_tokens_are(dtype):
    router = made(SoftmaxTopK(k=2))
    x = inputs()["x"].to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        routing = router(x)
    assert routing.probs.dtype == torch.float32
    torch.testing.assert_close(routing.weight, router(x.float()).weight)


def test_capacity_is_never_exceeded_and_served_in_the_order_asked_for():
    routing = made(SoftmaxTopK(k=2), spread=3.0)(torch.randn(1, 40, C, generator=seeded(4)))
    tight = routing.limited(8)
    assert tight.load().max() <= 8 and tight.statistics()["dropped"] > 0
    first = routing.index[0, :, 0]
    for expert in range(E):  # first choices in order of the row, before any second choice
        tokens = (first == expert).nonzero()[:, 0][:8]
        assert tight.used()[0, tokens, 0].all()
    sure = routing.limited(3, "confidence")
    expert = int(first.bincount(minlength=E).argmax())
    tokens = (first == expert).nonzero()[:, 0]
    kept = sure.used()[0, tokens, 0]
    weights = routing.weight[0, tokens, 0]
    assert weights[kept].min() >= weights[~kept].max()
    assert routing.limited(3, "random", seeded(1)).load().max() <= 3
    assert torch.equal(routing.limited(1000).gates(), routing.gates())
    with pytest.raises(RouteError, match="needs a generator"):
        routing.limited(3, "random")
    with pytest.raises(RouteError, match="priority is"):
        routing.limited(3, "last")


def test_padded_tokens_use_no_capacity():
    x = torch.randn(1, 20, C, generator=seeded(4))
    real = torch.arange(20)[None] >= 10
    router = made(SoftmaxTopK(k=1, renorm=False))
    limited = router(x, real=real).limited(2)
    alone = router(x[:, 10:]).limited(2)
    assert torch.equal(limited.used()[:, 10:], alone.used())


@pytest.mark.parametrize(
    "make, text",
    [
        (lambda: Router(SoftmaxTopK(k=7), width=C, experts=E), "k is 7 but there are 6 experts"),
        (lambda: Router(SoftmaxTopK(), width=C, experts=0), "experts is 0"),
        (lambda: Router(SoftmaxTopK(), width=0, experts=E), "width is 0"),
        (lambda: Router("topk", width=C, experts=E), "rule is a str"),
        (lambda: SoftmaxTopK(k=0), "k is 0"),
        (lambda: SoftmaxTopK(k=1), "router untrained"),
        (lambda: TopKSoftmax(k=1), "router untrained"),
        (lambda: SoftmaxTopK(jitter=1.0), "jitter is 1.0"),
        (lambda: Router(SigmoidTopK(groups=4), width=C, experts=E), "does not divide 6 experts"),
        (lambda: Router(SigmoidTopK(k=3, groups=3, top_groups=1), width=C, experts=E), "groups hold 2"),
        (lambda: NoisyTopK(floor=0.0), "floor is 0.0"),
        (lambda: Cosine(tau=-1.0), "tau is -1.0"),
        (lambda: TopP(p=0.0), "p is 0.0"),
        (lambda: Router(TopP(most=7), width=C, experts=E), "most is 7"),
        (lambda: NullExperts(null=0), "null is 0"),
        (lambda: ExpertChoice(capacity=-1.0), "capacity is -1.0"),
        (lambda: Balanced(method="greedy"), "method is 'greedy'"),
        (lambda: Hash(), "vocabulary is 0"),
        (lambda: SoftMoE(slots=0), "slots is 0"),
        (lambda: Lory(segment=0), "segment is 0"),
        (lambda: made(SoftmaxTopK())(torch.zeros(2, C)), "x has shape"),
        (lambda: made(SoftmaxTopK())(torch.zeros(1, 2, C), real=torch.ones(1, 3).bool()), "real has shape"),
        (lambda: made(SoftmaxTopK())(torch.full((1, 2, C), math.nan)), "logits are not finite"),
        (lambda: made(SoftmaxTopK()).update_bias(), "no bias to update"),
    ],
)
def test_bad_input_names_what_is_wrong(make, text):
    with pytest.raises(RouteError, match=text):
        make()
