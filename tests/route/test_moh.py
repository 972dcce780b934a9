"""The conversion: how many heads it takes, which are shared, what it refuses; and its effect on a real model."""

import math

import pytest
import torch

import headwise
from headwise import HeadScores, HeadSet, attach, fingerprint
from headwise.errors import RouteError, TaskError, UnitError, WrongModelError
from headwise.hub import load_model
from headwise.route import HeadRouter, moh
from headwise.route._convert import Choice, kept_heads
from headwise.route._fitted import Normal
from headwise.units import Fingerprint

NINE = Fingerprint(architecture="llama", config_hash="x", layers=3, heads=9, kv_heads=3)


def scores(values, fingerprint=None):
    return HeadScores(values=torch.tensor(values), method="taylor", fingerprint=fingerprint)


@pytest.mark.parametrize(
    "share, heads, rounding, kept",
    [
        (0.75, 9, "half-up", 7),
        (0.75, 9, "floor", 6),
        (0.75, 9, "ceil", 7),
        (0.5, 9, "half-up", 5),
        (0.9, 9, "half-up", 8),
        (0.7, 45, "half-up", 32),  # 0.7 * 45 is 31.499999999999996
        (0.75, 32, "floor", 24),
        (0.01, 9, "half-up", 1),
        (1.0, 9, "floor", 9),
    ],
)
def test_how_many_heads_a_share_keeps(share, heads, rounding, kept):
    assert kept_heads(share, heads, rounding) == kept


@pytest.mark.parametrize("share", [0, -0.5, 1.01, math.nan, math.inf, "0.5", None, True])
def test_shares_that_make_no_sense(share):
    with pytest.raises(RouteError, match="active is"):
        kept_heads(share, 9)


def test_the_conversion_says_how_many_heads_it_took(llama):
    router = moh(llama, None, active=0.6)
    assert router.active_counts() == [2, 2, 2]
    assert router.config.meta["kept"] == "2 of 4 (0.500)"
    assert router.config.meta["asked"] == 0.6
    assert "kept 2 of 4 (0.500)" in str(router)


def test_shared_heads_are_the_first_half_by_default():
    route = Choice(active=0.75).routes(NINE)[0]
    assert (route.shared, route.routed) == ((0, 1, 2, 3), 3)


def test_llama3_8b_arithmetic_of_the_paper():
    model = Fingerprint(architecture="llama", config_hash="x", layers=32, heads=32, kv_heads=8)
    route = Choice(active=0.75).routes(model)[0]
    assert (len(route.shared), route.routed, route.shared[-1]) == (16, 8, 15)


def test_few_active_heads_leave_fewer_shared_ones():
    route = Choice(active=2 / 9).routes(NINE)[0]
    assert (route.shared, route.routed) == ((0, 1), 0)


def test_shared_heads_by_importance_differ_by_layer():
    values = [[0.0, 1, 0, 0, 5, 0, 0, 0, 3], [9.0, 0, 0, 0, 0, 0, 0, 0, 8], [1.0] * 9]
    routes = Choice(active=0.5, importance=scores(values), shared_count=2).routes(NINE)
    assert [route.shared for route in routes] == [(4, 8), (0, 8), (0, 1)]
    assert [route.routed for route in routes] == [3, 3, 3]


def test_shared_heads_by_address_and_none():
    routes = Choice(active=0.75, shared_heads=HeadSet.parse("L0H8,L0H2,L2H0")).routes(NINE)
    assert [route.shared for route in routes] == [(2, 8), (), (0,)]
    assert {route.active for route in routes} == {7}
    assert Choice(shared="none").routes(NINE)[0].shared == ()


def test_budgets_by_layer_and_dense_layers():
    routes = Choice(active_heads=[3, 5, 9], shared="none").routes(NINE)
    assert [route.active for route in routes] == [3, 5, 9]
    assert [route.active for route in Choice(active=0.5, dense_layers=2).routes(NINE)] == [9, 9, 5]


def test_static_choice_within_layers_and_over_the_model():
    values = [[9.0, 8, 7, 6, 5, 4, 3, 2, 1], [0.1] * 9, [0.2, 0.3, 0.1, 0, 0, 0, 0, 0, 0]]
    by_layer = Choice(active=1 / 3, importance=scores(values)).static(NINE)
    assert [route.shared for route in by_layer] == [(0, 1, 2), (0, 1, 2), (0, 1, 2)]
    overall = Choice(active=1 / 3, importance=scores(values), scope="global").static(NINE)
    assert [route.shared for route in overall] == [(0, 1, 2, 3, 4, 5, 6), (0,), (1,)]  # no layer is left without a head
    dense = Choice(active=1 / 3, importance=scores(values), scope="global", dense_layers=1).static(NINE)
    assert [len(route.shared) for route in dense] == [9, 4, 2]


@pytest.mark.parametrize(
    "options, error, problem",
    [
        ({"active": 0.75, "shared_count": 8}, RouteError, "8 shared heads are more than the 7"),
        ({"shared_count": -1}, RouteError, "shared_count is -1"),
        ({"shared_count": 10}, RouteError, "shared_count is 10"),
        ({"shared": "best"}, RouteError, "shared is 'best'"),
        ({"shared": "importance"}, RouteError, "shared='importance' needs importance="),
        ({"shared": "none", "shared_count": 2}, RouteError, "leave it out"),
        ({"shared_heads": HeadSet.parse("L0H9")}, UnitError, "L0H9 does not exist"),
        ({"shared_heads": HeadSet.parse("L0H1"), "shared": "first"}, RouteError, "leave shared"),
        ({"active_heads": [7, 7]}, RouteError, "names 2 layers, the model has 3"),
        ({"active_heads": [7, 7, 10]}, RouteError, "active heads is 10"),
        ({"active_heads": [0, 7, 7]}, RouteError, "active heads is 0"),
        ({"dense_layers": 4}, RouteError, "dense_layers is 4"),
        ({"rounding": "even"}, RouteError, "rounding is 'even'"),
        ({"importance": scores([[1.0] * 9] * 2)}, UnitError, "scores have shape"),
    ],
)
def test_choices_that_make_no_sense(options, error, problem):
    with pytest.raises(error, match=problem):
        Choice(**options).routes(NINE)


def test_static_choices_that_make_no_sense():
    with pytest.raises(RouteError, match="router='static' needs importance="):
        Choice().static(NINE)
    with pytest.raises(RouteError, match="scope is 'all'"):
        Choice(importance=scores([[1.0] * 9] * 3), scope="all").static(NINE)
    kv = HeadScores(values=torch.ones(3, 3), kind="kv", method="x")
    with pytest.raises(RouteError, match="of kind 'kv'"):
        Choice(importance=kv).routes(NINE)


def test_scores_of_another_model_are_refused(llama):
    other = fingerprint(load_model("tiny-random-qwen3")[0])
    with pytest.raises(WrongModelError, match="taylor scores"):
        moh(llama, None, importance=scores([[1.0] * 4] * 3, other))


# every kind of router on every kind of model


@pytest.mark.parametrize("kind", ["norm", "trained", "static"])
@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2", "bert", "vit"])
def test_conversion_of_any_model(name, kind, ids):
    model, _ = load_model(f"tiny-random-{name}")
    x = torch.randn(1, 3, 32, 32) if name == "vit" else ids
    table = torch.arange(fingerprint(model).layers * 4.0).view(-1, 4)
    router = moh(model, None, active=0.5, router=kind, importance=HeadScores(values=table, method="order"))
    assert router.share == 0.5
    with attach(model, router=router), torch.no_grad():
        assert model(x).logits.isfinite().all()


def test_the_seed_decides_the_trained_router(llama):
    one, two, other = (moh(llama, None, router="trained", seed=s).layers[0].W_r for s in (1, 1, 2))
    assert torch.equal(one, two)
    assert not torch.equal(one, other)
    assert 0.015 < one.detach().std().item() < 0.025


# the fitted router


def test_ridge_regression_finds_a_linear_map():
    generator = torch.Generator().manual_seed(0)
    W, b = torch.randn(3, 5, generator=generator), torch.randn(3, generator=generator)
    x = torch.randn(400, 5, generator=generator)
    normal = Normal(5, 3, torch.device("cpu"))
    for part in x.split(100):
        normal.add(part, part @ W.t() + b)
    got_W, got_b, r2 = normal.solve(1e-9)
    torch.testing.assert_close(got_W.float(), W, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(got_b.float(), b, rtol=1e-4, atol=1e-4)
    assert r2 > 0.9999
    assert normal.solve(1.0)[2] < r2


def test_a_fitted_router_predicts_norms_better_than_their_mean(tmp_path):
    model, tokenizer = load_model("tiny-random-llama")
    router = moh(model, tokenizer, router="fitted", fit_tokens=2048, features="hidden", fit_text="english")
    assert router.config.meta["r2_lowest"] > 0.3
    assert router.shared_heads() == HeadSet.empty()
    router.save_pretrained(tmp_path)
    again = HeadRouter.from_pretrained(tmp_path)
    assert torch.equal(again.layers[1].W, router.layers[1].W)
    with pytest.raises(RouteError, match="64 tokens cannot fit 65 unknowns"):
        moh(model, tokenizer, router="fitted", fit_tokens=64, features="hidden", fit_text="english")
    with pytest.raises(TaskError, match="no causal language model"):
        moh(load_model("tiny-random-bert")[0], tokenizer, router="fitted")


# a real model


def test_a_fitted_router_takes_the_best_options_that_a_model_allows():
    model, tokenizer = load_model("tiny-random-llama")
    router = moh(model, tokenizer, router="fitted", active=0.6, fit_tokens=512)
    assert (router.config.features, router.config.fill) == ("queries", 16)
    assert sum(router.active_counts()) == 7 and router.config.meta["kept"] == "7 of 12 over 3 layers (0.583)"
    assert (router.config.meta["target"], router.config.meta["absent"]) == ("importance", "rest")
    for given in ({"active_heads": [2, 3, 2]}, {"dense_layers": 1}, {"shared": "first"}):
        routed = moh(model, tokenizer, router="fitted", active=0.5, fit_tokens=512, **given)
        wanted = given.get("active_heads", [4, 2, 2] if "dense_layers" in given else [2, 2, 2])
        assert routed.active_counts() == wanted
    latent = moh(*load_model("tiny-random-deepseek-v3"), router="fitted", fit_tokens=512, active=0.5)
    assert latent.config.features == "hidden"


@pytest.mark.parametrize("kind", ["norm", "trained"])
@pytest.mark.parametrize(
    "option", [{"target": "norm"}, {"features": "hidden"}, {"absent": "zero"}, {"allocate": "uniform"}]
)
def test_options_of_a_fit_are_refused_where_nothing_is_fitted(kind, option):
    with pytest.raises(RouteError, match=f"{next(iter(option))} is .* only router='fitted' takes it"):
        moh(*load_model("tiny-random-llama"), router=kind, **option)


def test_a_model_that_reads_text_is_fitted_unless_the_papers_choice_is_asked_for(llama):
    model, tokenizer = load_model("tiny-random-llama")
    assert moh(model, tokenizer, fit_tokens=512).config.kind == "fitted"
    assert moh(model, tokenizer, router="norm").config.kind == "norm"
    assert moh(model, tokenizer, shared="first").config.kind == "norm"
    assert moh(model, None).config.kind == "norm"
    bert, words = load_model("tiny-random-bert")
    assert moh(bert, words or tokenizer).config.kind == "norm"


@pytest.mark.smollm2
@pytest.mark.slow
def test_shared_heads_by_taylor_score_make_conversion_far_better():
    model, tokenizer = load_model("smollm2")
    ids = headwise.tasks.texts.encode(tokenizer, headwise.tasks.english("eval")[:6000])
    taylor = headwise.score.taylor(model, tokenizer, tokens=256, window=256)
    found = {}
    for name, options in {"first": {"shared": "first"}, "taylor": {"importance": taylor}}.items():
        with attach(model, router=moh(model, tokenizer, active=0.75, **options)):
            found[name] = headwise.tasks.perplexity(model, ids, window=256, tokens=512)
    assert found["taylor"] < 0.6 * found["first"]
