"""Fitted routers beyond output norms: importance, mean outputs for absent heads, heads dealt out to layers."""

import itertools
import json

import pytest
import torch

from headwise.attach import attach, find_stack
from headwise.attach.projection import head_weights, hidden_width, output_projection
from headwise.errors import RouteError
from headwise.hub import load_model
from headwise.route import HeadRouter, LayerRoute, RouterConfig, moh, moh_preset
from headwise.route._absent import Means
from headwise.route._allocate import Costs, allocate, gradient_covariance
from headwise.route._fit_steps import _shrunk
from headwise.route._fitted import read

IDS = torch.randint(0, 256, (2, 40), generator=torch.Generator().manual_seed(5))


@pytest.fixture(scope="module")
def tiny():
    return load_model("tiny-random-llama")


@pytest.fixture(scope="module")
def fitted(tiny):
    return moh(*tiny, router="fitted", active=0.5, fit_tokens=1024, absent="mean", target="importance")


def outputs_of(model, ids):
    """Hidden states and head outputs of each layer, of the model as it is."""
    seen = []

    class Watch:
        needs_hidden = True

        def __call__(self, call, out):
            seen.append((call.hidden.clone(), out.clone()))

    with torch.no_grad(), attach(model, observers=[Watch()]):
        model(ids)
    return seen


def test_the_mean_output_of_each_head(tiny):
    model, _ = tiny
    means = Means(find_stack(model))
    read(model, IDS, means)
    for layer in range(3):
        both = torch.cat([outputs_of(model, row[None])[layer][1][0] for row in IDS])  # (80, H, D)
        torch.testing.assert_close(means.table[layer], both.mean(0), rtol=1e-4, atol=1e-5)


def test_an_absent_head_gives_its_mean_and_a_present_one_its_own(tiny, fitted):
    model, _ = tiny
    fill = fitted.layers[1].fill
    seen = []
    with torch.no_grad(), attach(model, router=fitted, observers=[lambda call, out: seen.append((call.layer, out))]):
        model(IDS)
    out = dict(seen)[1]
    absent = (out == fill).all(-1)  # (B, N, H)
    assert (absent.sum(-1) == 2).all()
    assert fill.abs().sum() > 0


def test_gradients_of_every_token_by_themselves(tiny):
    model, _ = tiny
    model.eval()
    wanted = [p.requires_grad for p in model.parameters()]
    metric = gradient_covariance(model, find_stack(model), IDS)
    projection = output_projection(find_stack(model), 1)
    naive = torch.zeros(64, 64)
    for row in IDS:
        kept = []
        handle = projection.register_forward_hook(lambda m, a, out, kept=kept: kept.append(out))
        logits = model(row[None]).logits[0, :-1]
        handle.remove()
        loss = -torch.log_softmax(logits, -1)[torch.arange(39), row[1:]].sum()
        for g in torch.autograd.grad(loss, kept[0])[0][0]:
            naive += torch.outer(g, g) / IDS.numel()
    torch.testing.assert_close(metric[1], naive, rtol=1e-3, atol=1e-9)
    assert [p.requires_grad for p in model.parameters()] == wanted
    assert all(p.grad is None for p in model.parameters())


def test_costs_are_those_of_the_heads_of_lowest_score(tiny):
    model, _ = tiny
    stack = find_stack(model)
    generator = torch.Generator().manual_seed(0)
    A, W = torch.randn(3, 64, 64, generator=generator), torch.randn(4, 64, generator=generator)
    metric, fill = A @ A.mT, torch.randn(3, 4, 16, generator=generator)
    costs = Costs(stack, [lambda call: call.hidden @ W.t()] * 3, metric, fill[:, None].expand(3, 5, 4, 16))
    read(model, IDS[:1], costs)
    hidden, out = outputs_of(model, IDS[:1])[2]
    weights = head_weights(output_projection(stack, 2), 4)
    naive = torch.zeros(5)
    for t in range(40):
        order = (W @ hidden[0, t]).argsort()
        for k in range(1, 5):
            d = sum((out[0, t, h] - fill[2, h]) @ weights[h] for h in order[:k])
            naive[k] += (d @ metric[2] @ d).detach() / 40
    torch.testing.assert_close(costs.table[2].float(), naive, rtol=1e-3, atol=1e-4)


def test_heads_are_dealt_out_at_the_least_cost():
    generator = torch.Generator().manual_seed(1)
    for _ in range(5):
        costs = torch.cat([torch.zeros(3, 1), torch.rand(3, 4, generator=generator).cumsum(1)], 1)
        for total in (3, 6, 9, 12):
            counts = allocate(costs, total)
            every = [c for c in itertools.product(range(1, 5), repeat=3) if sum(c) == total]
            best = min(sum(float(costs[layer, 4 - n]) for layer, n in enumerate(c)) for c in every)
            found = sum(float(costs[layer, 4 - n]) for layer, n in enumerate(counts))
            assert sum(counts) == total
            assert found == pytest.approx(best)


@pytest.mark.parametrize("total", [2, 13])
def test_heads_that_cannot_be_dealt_out(total):
    with pytest.raises(RouteError, match=f"{total} heads cannot be dealt out to 3 layers of 4"):
        allocate(torch.zeros(3, 5), total)


def test_allocation_keeps_the_budget_and_the_fit(tiny):
    model, tokenizer = tiny
    before = {name: value.clone() for name, value in model.state_dict().items()}
    uniform = moh(model, tokenizer, router="fitted", active=0.5, fit_tokens=512, allocate="uniform")
    dealt = moh(model, tokenizer, router="fitted", active=0.5, fit_tokens=512, allocate="sensitivity")
    assert sum(dealt.active_counts()) == sum(uniform.active_counts()) == 6
    assert dealt.config.meta["allocated"] == " ".join(map(str, dealt.active_counts()))
    assert dealt.config.meta["kept"].endswith("(0.500)")
    assert torch.equal(dealt.layers[0].W, uniform.layers[0].W)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_importance_and_norm_are_different_fits(tiny):
    one, other = (
        moh(*tiny, router="fitted", fit_tokens=512, target=name, allocate="uniform") for name in ("norm", "importance")
    )
    assert not torch.allclose(one.layers[1].W, other.layers[1].W, rtol=0.1)
    assert (one.config.meta["target"], other.config.meta["target"]) == ("norm", "importance")


def test_saved_and_read_again_with_its_means(tiny, fitted, tmp_path):
    model, _ = tiny
    fitted.save_pretrained(tmp_path)
    again = HeadRouter.from_pretrained(tmp_path)
    assert again.config.fill == 16
    results = []
    for router in (fitted, again):
        with torch.no_grad(), attach(model, router=router):
            results.append(model(IDS).logits)
    assert torch.equal(*results)


def test_adapters_of_before_there_were_means_still_load(tiny, tmp_path):
    moh(*tiny, router="fitted", fit_tokens=512, absent="zero").save_pretrained(tmp_path)
    path = tmp_path / "router_config.json"
    payload = json.loads(path.read_text())
    del payload["fill"]
    path.write_text(json.dumps(payload))
    assert HeadRouter.from_pretrained(tmp_path).config.fill == 0


def test_cached_decoding_and_padding_with_means(tiny, fitted):
    model, _ = tiny
    with torch.no_grad(), attach(model, router=fitted):
        whole = model(IDS[:1]).logits
        cache = model(IDS[:1, :30], use_cache=True)
        rest = model(IDS[:1, 30:], past_key_values=cache.past_key_values).logits
        torch.testing.assert_close(rest, whole[:, 30:], rtol=1e-4, atol=1e-4)
        padded = torch.cat([torch.zeros(1, 7, dtype=torch.long), IDS[:1]], 1)
        mask = (torch.arange(47) >= 7).long()[None]
        left = model(padded, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp(min=0)).logits
    torch.testing.assert_close(left[:, 7:], whole, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "options, problem",
    [
        ({"target": "size"}, "target is 'size'"),
        ({"absent": "noise"}, "absent is 'noise'"),
        ({"allocate": "even"}, "allocate is 'even'"),
        ({"fit_text": "french"}, "fit_text is 'french'"),
        ({"allocate": "sensitivity", "active_heads": [2, 2, 2]}, "leave active_heads"),
        ({"allocate": "sensitivity", "dense_layers": 1}, "leave active_heads"),
        ({"allocate": "sensitivity", "shared": "first"}, "use shared='none'"),
    ],
)
def test_fits_that_make_no_sense(tiny, options, problem):
    with pytest.raises(RouteError, match=problem):
        moh(*tiny, router="fitted", fit_tokens=512, **options)


def test_only_fitted_routers_have_means():
    routes = (LayerRoute(heads=4, shared=(0,), routed=2),)
    with pytest.raises(RouteError, match="fill is 8 for a 'norm' router"):
        RouterConfig(layers=routes, kind="norm", fill=8)


def test_a_fitted_preset_and_the_width_of_a_host(tiny):
    preset = moh_preset("llm-s-75").scaled(3, 4)
    router = moh(*tiny, preset=preset, router="fitted", fit_tokens=512)
    assert router.active_counts() == [3, 3, 3]
    assert hidden_width(find_stack(tiny[0])) == 64


def test_shrinking_keeps_the_trace_and_halves_what_differs():
    metric = torch.diag(torch.tensor([6.0, 2.0]))[None]
    metric[0, 0, 1] = metric[0, 1, 0] = 1.0
    assert _shrunk(metric)[0].tolist() == [[5.0, 0.5], [0.5, 3.0]]
