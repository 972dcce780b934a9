"""Graph of tokens, and the measures of steadiness: the facts that can be proved of them."""

import pytest
import torch

from headwise.errors import RouteError
from headwise.route import (
    Graph,
    GraphCache,
    Router,
    SoftmaxTopK,
    fluctuation_curve,
    routing_agreement,
    routing_entropy,
    routing_fluctuation,
)
from tiny_helper import padded, tiny

B, N, C, E, H, K, D = 2, 14, 8, 6, 4, 2, 8
BASE = SoftmaxTopK(k=2)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def made(graph="similarity", *, causal=True, **options):
    router = Router(Graph(base=BASE, graph=graph, **options), width=C, experts=E, causal=causal, generator=seeded())
    torch.nn.init.normal_(router.W, generator=seeded(7))
    if "W_s" in dict(router.named_parameters()):
        torch.nn.init.normal_(router.W_s, generator=seeded(8))
    return router.eval()


def plain(causal=True):
    router = Router(BASE, width=C, experts=E, causal=causal)
    torch.nn.init.normal_(router.W, generator=seeded(7))
    return router.eval()


def hidden(seed=1, rows=B, length=N):
    return torch.randn(rows, length, C, generator=seeded(seed))


def qk(seed=2, length=N):
    g = seeded(seed)
    return torch.randn(B, H, length, D, generator=g), torch.randn(B, K, length, D, generator=g)


def weights_of(q, k, scale, causal=True, real=None):
    """The attention matrix, written out: (B, H, N, M)."""
    logits = q @ k.repeat_interleave(q.shape[1] // k.shape[1], 1).mT * scale
    sees = torch.ones(logits.shape[-2:], dtype=torch.bool)
    sees = sees.tril() if causal else sees
    sees = sees[None, None] if real is None else sees & real[:, None, None]
    return logits.masked_fill(~sees, -1e30).softmax(-1)


def test_full_blend_is_the_base_router():
    for graph in ("similarity", "cosine"):
        one, other = made(graph, blend=1.0)(hidden()), plain()(hidden())
        assert torch.equal(one.index, other.index)
        torch.testing.assert_close(one.weight, other.weight, rtol=1e-6, atol=1e-6)


def test_a_sharp_cosine_graph_is_the_base_router():
    one, other = made("cosine", tau=1e-4)(hidden()), plain()(hidden())
    torch.testing.assert_close(one.weight, other.weight, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("causal", [True, False])
def test_similarity_equals_its_formula(causal):
    router, u = made(causal=causal), hidden()
    S = weights_of((u @ router.W_s)[:, None], u[:, None], C**-0.5, causal)[:, 0]
    R = (u @ router.W.T).softmax(-1)
    routing = router(u, statistics=True)
    torch.testing.assert_close(routing.probs, S @ R, rtol=1e-5, atol=1e-5)
    top = (S @ R).topk(2)
    assert torch.equal(routing.index, top.indices)
    torch.testing.assert_close(routing.weight, top.values / top.values.sum(-1, keepdim=True), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(routing.extra["concentration"], S.square().sum(-1).mean())
    torch.testing.assert_close(routing.extra["sink_share"], S[..., 0].mean())


def test_low_rank_similarity_equals_its_formula():
    router, u = made(rank=3), hidden()
    S = weights_of((u @ router.A)[:, None], (u @ router.B)[:, None], 3**-0.5)[:, 0]
    torch.testing.assert_close(router(u).probs, S @ (u @ router.W.T).softmax(-1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("causal", [True, False])
def test_values_in_the_attention_op_equal_the_mean_attention_matrix_with_gqa(causal):
    router, u, (q, k) = made("attention", causal=causal), hidden(), qk()
    A = weights_of(q, k, D**-0.5, causal)
    R = (u @ router.W.T).softmax(-1)
    torch.testing.assert_close(router(u, qk=(q, k)).probs, A.mean(1) @ R, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(router(u, attention=A).probs, A.mean(1) @ R, rtol=1e-5, atol=1e-5)


def test_posterior_weighs_each_source_by_what_it_writes():
    router, u, (q, k) = made("posterior", sigma=1.5), hidden(), qk()
    sources = torch.randn(B, H, N, C, generator=seeded(5))
    A = weights_of(q, k, D**-0.5)
    distance = (u[:, None, :, None] - sources[:, :, None]).square().sum(-1)
    joint = A * (-distance / (2 * 1.5**2)).exp()
    S = (joint / joint.sum(-1, keepdim=True)).mean(1)
    found = router(u, qk=(q, k), sources=sources).probs
    torch.testing.assert_close(found, S @ (u @ router.W.T).softmax(-1), rtol=1e-4, atol=1e-5)


def test_mixtures_stay_within_what_is_mixed_and_rows_sum_to_one():
    u = hidden()
    R, mixed = plain()(u).probs, made(causal=False)(u).probs
    torch.testing.assert_close(mixed.sum(-1), torch.ones(B, N))
    assert (mixed <= R.amax(1, keepdim=True) + 1e-6).all() and (mixed >= R.amin(1, keepdim=True) - 1e-6).all()


def test_entropy_lies_between_its_two_bounds():
    router, u = made(), hidden()
    S = weights_of((u @ router.W_s)[:, None], u[:, None], C**-0.5)[:, 0]
    entropy = lambda p: -torch.special.xlogy(p, p).sum(-1)  # noqa: E731
    R, mixed = (u @ router.W.T).softmax(-1), router(u).probs
    average = (S * entropy(R)[:, None]).sum(-1)
    assert (entropy(mixed) >= average - 1e-5).all()
    assert (entropy(mixed) <= average + entropy(S) + 1e-5).all()


def test_routing_noise_is_divided_by_the_size_of_the_neighbourhood():
    router, u = made(causal=False), hidden(rows=1, length=24)
    S = weights_of((u @ router.W_s)[:, None], u[:, None], C**-0.5, causal=False)[:, 0]
    R = (u @ router.W.T).softmax(-1)
    noise = 0.01 * torch.randn(4000, 1, 24, E, generator=seeded(3))
    spread = (S @ (R + noise)).var(0).mean(-1)
    torch.testing.assert_close(spread, 1e-4 * S.square().sum(-1), rtol=0.15, atol=0)


def test_a_uniform_graph_routes_all_tokens_alike_and_twins_are_routed_alike():
    u = hidden()
    router = made(causal=False)
    torch.nn.init.zeros_(router.W_s)
    probs = router(u).probs
    torch.testing.assert_close(probs, probs[:, :1].expand_as(probs))
    u[:, 5] = u[:, 2]
    probs = made(causal=False)(u).probs
    torch.testing.assert_close(probs[:, 5], probs[:, 2])


def test_tokens_may_be_permuted():
    order, u, router = torch.randperm(N, generator=seeded(1)), hidden(), made(causal=False)
    torch.testing.assert_close(router(u[:, order]).probs, router(u).probs[:, order])


@pytest.mark.parametrize("graph", ["similarity", "cosine", "attention"])
def test_the_future_and_other_rows_do_not_matter_and_decoding_equals_the_full_pass(graph):
    router, u, (q, k) = made(graph), hidden(), qk()
    given = {"qk": (q, k)} if graph == "attention" else {}
    whole = router(u, **given).probs
    part = {"qk": (q[:1, :, :9], k[:1, :, :9])} if graph == "attention" else {}
    torch.testing.assert_close(router(u[:1, :9], **part).probs, whole[:1, :9], rtol=1e-5, atol=1e-5)
    cache, found = GraphCache(), []
    for begin, end in ((0, 6), (6, 7), (7, 11), (11, N)):
        part = {"qk": (q[:, :, begin:end], k[:, :, :end])} if graph == "attention" else {}
        found.append(router(u[:, begin:end], cache=cache, **part).probs)
    torch.testing.assert_close(torch.cat(found, 1), whole, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nobody(causal, side):
    router, u = made(causal=causal), hidden()
    place = slice(5, None) if side == "left" else slice(0, N)
    wide, real = torch.full((B, N + 5, C), 3.0), torch.zeros(B, N + 5, dtype=torch.bool)
    wide[:, place], real[:, place] = u, True
    padded = router(wide, real=real, statistics=True)
    alone = router(u, statistics=True)
    torch.testing.assert_close(padded.probs[:, place], alone.probs, rtol=1e-5, atol=1e-5)
    for name in ("concentration", "sink_share"):
        torch.testing.assert_close(padded.extra[name], alone.extra[name], rtol=1e-4, atol=1e-5)


def test_packed_rows_do_not_mix():
    router, u = made(), hidden(rows=1)
    row = torch.tensor([0] * 6 + [1] * (N - 6))
    mask = ((row[:, None] == row[None]) & torch.ones(N, N).tril().bool())[None, None]
    packed = router(u, mask=mask).probs
    torch.testing.assert_close(packed[:, :6], router(u[:, :6]).probs, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(packed[:, 6:], router(u[:, 6:]).probs, rtol=1e-5, atol=1e-5)


def test_sinks_can_be_left_out():
    router, u = made(exclude_sink=2), hidden()
    S = weights_of((u @ router.W_s)[:, None], u[:, None], C**-0.5)[:, 0]
    R = (u @ router.W.T).softmax(-1)
    S[..., :2] = 0
    expected = S @ R / S.sum(-1, keepdim=True)
    expected[:, :2] = R[:, :2]
    torch.testing.assert_close(router(u).probs, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("graph", ["similarity", "attention"])
def test_gradients_reach_the_graph_unless_detached(graph):
    for detached in (False, True):
        router, (q, k) = made(graph, detach_graph=detached), qk()
        q.requires_grad_()
        given = {"qk": (q, k)} if graph == "attention" else {}
        router(hidden(), **given).weight[..., 0].sum().backward()
        assert router.W.grad.abs().sum() > 0
        grad = q.grad if graph == "attention" else router.W_s.grad
        assert (grad is None or grad.abs().sum() == 0) == detached


def test_gradients_are_those_of_finite_differences():
    router = made().double()
    u = hidden(length=6).double()

    def value():
        return (router(u).probs * torch.arange(E)).sum()

    value().backward()
    with torch.no_grad():
        for name in ("W_s", "W"):
            weight, grad = getattr(router, name), getattr(router, name).grad
            weight[1, 2] += 1e-6
            above = value()
            weight[1, 2] -= 2e-6
            below = value()
            weight[1, 2] += 1e-6
            torch.testing.assert_close(grad[1, 2], (above - below) / 2e-6, rtol=1e-4, atol=1e-7)


def test_fluctuation_at_its_ends_and_between():
    a = torch.tensor([[0, 1], [2, 3], [4, 5]])
    for mode in ("soft", "strict"):
        assert routing_fluctuation(a, a.flip(1), mode) == 0
        assert routing_fluctuation(a, (a + 2) % 6, mode) == 1
    b = torch.tensor([[0, 2], [2, 3], [4, 5]])
    assert routing_fluctuation(a, b) == pytest.approx(1 / 6) == pytest.approx(routing_fluctuation(b, a))
    assert routing_fluctuation(a, b, "strict") == pytest.approx(1 / 3)
    assert routing_fluctuation(a, a.flip(1), "top1") == 1
    assert routing_agreement(a, b) == pytest.approx(5 / 6)
    assert fluctuation_curve([a, a, b]) == pytest.approx([0, 1 / 6])


def test_fluctuation_leaves_padding_out_and_reads_routings():
    real = torch.ones(B, N, dtype=torch.bool)
    real[:, :5] = False
    one, other = plain()(hidden(), real=real), plain()(hidden(), real=real)
    other.index[:, :5] = 5 - other.index[:, :5]
    assert routing_fluctuation(one, other) == 0
    assert routing_fluctuation(plain()(hidden()), plain()(hidden(seed=9))) > 0


def test_entropy_of_records_and_routings():
    routing = plain()(hidden())
    assert routing_entropy(routing) == pytest.approx(routing_entropy(routing.probs), rel=1e-6)
    assert 0 < routing_entropy(routing, fraction=True) < 1


@pytest.mark.parametrize(
    "make, text",
    [
        (lambda: Graph(tau=-1.0), "tau is -1.0"),
        (lambda: Graph(sigma=0.0), "sigma is 0.0"),
        (lambda: Graph(blend=1.5), "blend is 1.5"),
        (lambda: Graph(graph="tree"), "graph is 'tree'"),
        (lambda: made("attention")(hidden()), "needs qk="),
        (lambda: made("attention")(hidden(), attention=torch.ones(B, H, N, N - 1)), "attention has shape"),
        (lambda: made("attention")(hidden(), qk=qk(length=N - 1)), "k .* must be"),
        (lambda: made("posterior")(hidden(), qk=qk()), "needs sources="),
        (lambda: routing_fluctuation(torch.zeros(3, 2).long(), torch.zeros(4, 2).long()), "they must agree"),
        (lambda: routing_fluctuation(torch.zeros(3, 2), torch.zeros(3, 2)), "must be integers"),
        (lambda: routing_fluctuation(torch.zeros(3, 2).long(), torch.zeros(3, 2).long(), "hard"), "mode is"),
        (lambda: fluctuation_curve([torch.zeros(3, 2).long()]), "at least two"),
        (lambda: routing_entropy(torch.ones(3, 4)), "do not sum to 1"),
    ],
)
def test_bad_input_names_what_is_wrong(make, text):
    with pytest.raises(RouteError, match=text):
        make()


def test_dropout_of_the_attention_does_not_reach_the_routing():
    from headwise.route import upcycle

    model = tiny("llama")
    model.config.attention_dropout = 0.5
    for block in model.model.layers:
        block.self_attn.attention_dropout = 0.5
    with torch.no_grad():  # so that the experts of the first layer read the same tokens in every pass
        model.model.layers[0].self_attn.o_proj.weight.zero_()
    host = upcycle(model, experts=4, noise=0.3, rule=Graph(base=BASE, graph="attention"))
    model.train()
    with host.recording() as record, torch.no_grad():
        for _ in range(2):
            model(torch.arange(20)[None])
    first, again = record[0]
    assert torch.equal(first.probs, again.probs)
    assert not torch.equal(record[2][0].probs, record[2][1].probs)  # dropout was at work


@pytest.mark.parametrize("graph", ["similarity", "attention"])
def test_a_model_with_graph_routers_decodes_as_it_reads_and_keeps_padding_out(graph):
    from headwise.route import upcycle

    model = tiny("llama")
    rule = Graph(base=SoftmaxTopK(k=2), graph=graph)
    host = upcycle(model, experts=4, noise=0.3, rule=rule, layers=[0, 2])
    for layer in host.layers.values():
        torch.nn.init.normal_(layer.router.W, generator=seeded(3))
    batch = padded([6, 15])
    with torch.no_grad():
        whole = model(**batch).logits
        alone = model(input_ids=batch["input_ids"][:1, 9:]).logits
        torch.testing.assert_close(whole[0, 9:], alone[0], rtol=1e-3, atol=1e-3)
        first = {k: v[:, :11] for k, v in batch.items()}
        cache = model(**first, use_cache=True).past_key_values
        rest = {k: v[:, 11:] for k, v in batch.items()} | {"attention_mask": batch["attention_mask"]}
        torch.testing.assert_close(model(**rest, past_key_values=cache).logits, whole[:, 11:], rtol=1e-3, atol=1e-3)
    ids = batch["input_ids"][1:]
    out = model.generate(ids, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    with torch.no_grad():
        assert torch.equal(model(out[:, :-1]).logits[0, -4:].argmax(-1), out[0, -4:])
    model.train()(ids, labels=ids).loss.backward()
    weight = model.model.layers[2].self_attn.q_proj.weight
    assert weight.grad.abs().sum() > 0
    host.remove()
    if graph == "attention":
        with pytest.raises(RouteError, match="needs qk="):
            model(ids)
