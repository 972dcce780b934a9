"""Dense layers that become mixtures, mixtures that become smaller, LoRA experts, attention experts."""

import pytest
import torch

from headwise.errors import RouteError
from headwise.route import (
    Experts,
    KVState,
    LoRAExperts,
    MixtureOfAttentionHeads,
    MoELayer,
    Router,
    SigmoidTopK,
    SoftmaxTopK,
    SwitchHead,
    add_lora_experts,
    merge_experts,
    moefy,
    prune_experts,
    to_dense,
    upcycle,
)
from headwise.route._upcycle import balanced_clusters
from tiny_helper import tiny, tokens

C = 16


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@torch.no_grad()
def logits(model):
    return model(tokens(2, 15)).logits


@pytest.mark.parametrize("name", ["llama", "qwen3", "mistral", "gemma3"])
@pytest.mark.parametrize("how", [{"how": "copy"}, {"how": "virtual", "shards": 2, "experts": 8, "k": 4}])
def test_upcycling_leaves_the_model_as_it_was_at_step_0(name, how):
    model = tiny(name)
    before = logits(model)
    upcycle(model, **how)
    torch.testing.assert_close(logits(model), before, rtol=1e-4, atol=1e-4)
    assert all(isinstance(block.mlp, MoELayer) for block in model.model.layers)


def test_noise_and_drop_make_experts_differ_and_keep_their_statistics():
    model, same, dropped = tiny("llama"), tiny("llama"), tiny("llama")
    before = logits(model)
    upcycle(model, noise=0.05)
    assert not torch.allclose(logits(model), before)
    upcycle(same, how="drop", drop=0.0)
    torch.testing.assert_close(logits(same), before, rtol=1e-4, atol=1e-4)
    gate = dropped.model.layers[0].mlp.gate_proj.weight.clone()
    host = upcycle(dropped, how="drop", drop=0.5, layers=[0])
    mine = host.layers[0].experts.gate_up_proj[:, : len(gate)]
    kept = (mine == gate).all(-1).float().mean(-1)
    assert kept.tolist() == [0.5] * 8 and not torch.equal(mine[0] == gate, mine[1] == gate)
    torch.testing.assert_close(mine.std(), gate.std(), rtol=0.05, atol=0)
    assert not isinstance(dropped.model.layers[1].mlp, MoELayer)


def test_upcycling_is_repeatable_and_trains():
    one, other = tiny("llama"), tiny("llama")
    for model in (one, other):
        upcycle(model, noise=0.05, seed=3, losses={"balance": 0.01})
    assert torch.equal(logits(one), logits(other))
    ids = tokens(4, 15)
    optimizer = torch.optim.AdamW(one.parameters(), 3e-3)
    found = []
    for _ in range(8):
        loss = one.train()(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(float(loss.detach()))
    assert found[-1] < found[0]


def test_models_without_gated_layers_are_refused_and_left_alone():
    model = tiny("gpt2")
    before = logits(model)
    with pytest.raises(RouteError, match="no gated feed-forward"):
        upcycle(model)
    assert torch.equal(logits(model), before)
    for options, text in (
        ({"k": 9}, "k is 9"),
        ({"how": "split"}, "how is 'split'"),
        ({"how": "virtual", "shards": 3}, "shards is 3"),
        ({"drop": 2.0}, "drop is 2.0"),
        ({"noise": -1.0}, "noise -1.0"),
        ({"layers": [7]}, "layers is 7"),
    ):
        with pytest.raises(RouteError, match=text):
            upcycle(tiny("llama"), **options)


def test_moefication_with_all_experts_is_the_dense_model():
    model = tiny("llama")
    before = logits(model)
    moefy(model, experts=8, k=8)
    torch.testing.assert_close(logits(model), before, rtol=1e-4, atol=1e-4)
    with pytest.raises(RouteError, match="must divide the 128 hidden units"):
        moefy(tiny("llama"), experts=7)


def test_clusters_are_of_one_size_and_find_planted_groups():
    centres = torch.eye(4) * 10
    rows = centres.repeat_interleave(6, 0) + 0.1 * torch.randn(24, 4, generator=seeded(1))
    found = balanced_clusters(rows[torch.randperm(24, generator=seeded(2))], 4)
    assert found.bincount().tolist() == [6] * 4
    ordered = balanced_clusters(rows, 4, seed=1).reshape(4, 6)
    assert sum(len(group.unique()) == 1 for group in ordered) >= 2


def mixture(rule=None, experts=4):
    made = Experts(experts=experts, width=C, hidden=8, std=0.4, generator=seeded(1))
    router = Router(rule or SoftmaxTopK(k=2), width=C, experts=experts, generator=seeded(2))
    return MoELayer(router, made)


def test_pruning_an_expert_that_nobody_uses_changes_nothing():
    layer, x = mixture(SigmoidTopK(k=2)), torch.randn(2, 9, C, generator=seeded(3))
    layer.router.bias[2] = -10.0
    small = prune_experts(layer, [0, 1, 3])
    torch.testing.assert_close(small(x), layer(x))
    assert small.experts.experts == 3 and layer.experts.experts == 4
    with pytest.raises(RouteError, match="name each expert"):
        prune_experts(layer, [0, 0])


def test_merging_permuted_copies_loses_nothing_but_only_if_aligned():
    layer, x = mixture(), torch.randn(2, 9, C, generator=seeded(3))
    with torch.no_grad():
        order = torch.randperm(8, generator=seeded(5))
        halves = layer.experts.gate_up_proj[0].reshape(2, 8, C)[:, order]
        layer.experts.gate_up_proj[1] = halves.reshape(16, C)
        layer.experts.down_proj[1] = layer.experts.down_proj[0][:, order]
    torch.testing.assert_close(layer.experts.one(1, x), layer.experts.one(0, x))
    merged = merge_experts(layer, [[0, 1], [2], [3]])
    torch.testing.assert_close(merged.experts.one(0, x), layer.experts.one(0, x))
    bad = merge_experts(layer, [[0, 1], [2], [3]], align=False)
    assert not torch.allclose(bad.experts.one(0, x), layer.experts.one(0, x), atol=1e-2)
    torch.testing.assert_close(merged.router.W[0], layer.router.W[:2].mean(0))
    weighed = merge_experts(layer, [[0, 2], [1], [3]], torch.tensor([1.0, 1, 0, 1]))
    torch.testing.assert_close(weighed.experts.one(0, x), layer.experts.one(0, x))
    with pytest.raises(RouteError, match="must hold each of the 4 experts once"):
        merge_experts(layer, [[0, 1], [2]])


def test_a_mixture_of_copies_becomes_the_dense_layer_again():
    model = tiny("llama")
    mlp = model.model.layers[0].mlp
    x = torch.randn(2, 5, 64, generator=seeded(1))
    expected = mlp(x)
    layer = upcycle(model, layers=[0]).layers[0]
    torch.testing.assert_close(to_dense(layer).one(0, x), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rule", [None, SoftmaxTopK(k=2)])
def test_lora_experts_start_as_the_layer_and_equal_their_formula(rule):
    base = torch.nn.Linear(C, 6)
    layer, x = LoRAExperts(base, experts=3, rank=2, alpha=4.0, rule=rule, generator=seeded()), torch.randn(2, 5, C)
    assert torch.equal(layer(x), base(x))
    torch.nn.init.normal_(layer.B, generator=seeded(1))
    gates = layer.router(x).gates()
    extra = torch.einsum("bne,eor,erc,bnc->bno", gates, layer.B, layer.A, x)
    torch.testing.assert_close(layer(x), base(x) + 2.0 * extra)
    layer(x).square().sum().backward()
    assert base.weight.grad is None and layer.router.W.grad.abs().sum() > 0


def test_lora_experts_in_a_model():
    model = tiny("llama")
    before = logits(model)
    layers = add_lora_experts(model, r"\.(q_proj|down_proj)$", experts=3, rank=2)
    assert len(layers) == 6 and torch.equal(logits(model), before)
    assert all(".A" in n or ".B" in n or "router" in n for n, p in model.named_parameters() if p.requires_grad)
    with pytest.raises(RouteError, match="no linear layer's path matches"):
        add_lora_experts(model, "nothing")
    with pytest.raises(RouteError, match="must be an nn.Linear"):
        LoRAExperts(torch.nn.ReLU())


# attention experts


def moa(**options):
    layer = MixtureOfAttentionHeads(width=C, head_dim=8, experts=5, k=2, generator=seeded(), **options)
    torch.nn.init.normal_(layer.router.W, generator=seeded(4))
    return layer


def causal_softmax(q, k):
    N = q.shape[-2]
    return (q @ k.mT / q.shape[-1] ** 0.5).masked_fill(~torch.ones(N, N).tril().bool(), -1e30).softmax(-1)


@pytest.mark.parametrize("normalise", ["stop_gradient", "none", "sum"])
def test_mixture_of_attention_heads_equals_its_formula(normalise):
    layer, x = moa(normalise=normalise), torch.randn(2, 9, C, generator=seeded(1))
    p = (x @ layer.router.W.T).softmax(-1)
    kept = p * torch.zeros_like(p).scatter(-1, p.topk(2).indices, 1.0)
    weight = kept if normalise == "none" else kept / kept.sum(-1, keepdim=True)
    k, v = x @ layer.W_K.T, x @ layer.W_V.T
    expected = sum(
        weight[..., e, None] * (causal_softmax(x @ layer.W_Q[e].T, k) @ v @ layer.W_O[e].T) for e in range(5)
    )
    torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-4)
    layer(x).square().sum().backward()
    assert layer.router.W.grad.abs().sum() > 0


def switch(**options):
    layer = SwitchHead(width=C, heads=2, head_dim=8, experts=4, k=2, generator=seeded(), **options)
    for router in (*layer.source, *layer.target):
        torch.nn.init.normal_(router.W, generator=seeded(4))
    return layer


def test_switch_head_equals_its_formula():
    layer, x = switch(), torch.randn(2, 9, C, generator=seeded(1))

    def gates(router):
        s = (x @ router.W.T).sigmoid()
        return s * torch.zeros_like(s).scatter(-1, s.topk(2).indices, 1.0)

    expected = 0
    for h in range(2):
        q, k = (x @ w[h * 8 : h * 8 + 8].T for w in (layer.W_Q, layer.W_K))
        source, target = gates(layer.source[h]), gates(layer.target[h])
        v = sum(source[..., e, None] * (x @ layer.W_V[h * 4 + e].T) for e in range(4))
        a = causal_softmax(q, k) @ v
        expected = expected + sum(target[..., e, None] * (a @ layer.W_O[h * 4 + e].T) for e in range(4))
    torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-4)


def test_switch_head_leaves_experts_out_in_training_only():
    layer, x = switch(drop=0.6), torch.randn(2, 9, C, generator=seeded(1))
    torch.testing.assert_close(layer.eval()(x), switch()(x))
    a, b = (layer.train()(x, generator=seeded(s)) for s in (1, 2))
    assert not torch.allclose(a, b) and torch.equal(a, layer(x, generator=seeded(1)))


@pytest.mark.parametrize("make", [moa, switch])
def test_attention_experts_respect_padding_decode_and_reach_their_losses(make):
    layer, x = make(losses={"spread": 1.0}), torch.randn(2, 9, C, generator=seeded(1))
    layer.eval()
    whole = layer(x)
    wide, real = torch.full((2, 13, C), 3.0), torch.zeros(2, 13, dtype=torch.bool)
    wide[:, 4:], real[:, 4:] = x, True
    padded = layer(wide, real)
    torch.testing.assert_close(padded[:, 4:], whole, rtol=1e-4, atol=1e-5)
    assert not padded[:, :4].any()
    cache = KVState()
    parts = [layer(x[:, a:b], cache=cache) for a, b in ((0, 5), (5, 6), (6, 9))]
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-4, atol=1e-5)
    assert cache.bytes == 2 * 2 * 9 * 8 * 4 * (1 if make is moa else 2)
    layer.train()
    layer.state.begin()
    layer(x)
    layer.state.mean_loss().backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for n, p in layer.named_parameters() if n.endswith(".W"))


def test_attention_experts_refuse_bad_options():
    with pytest.raises(RouteError, match="normalise is 'mean'"):
        moa(normalise="mean")
    with pytest.raises(RouteError, match="drop is 1.0"):
        switch(drop=1.0)
    with pytest.raises(RouteError, match="k is 6"):
        MixtureOfAttentionHeads(width=C, head_dim=8, experts=5, k=6)
