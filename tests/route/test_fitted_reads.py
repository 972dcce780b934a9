"""Fitted routers that read more than the hidden state, and what stands in for heads that a token does without."""

from dataclasses import replace

import pytest
import torch

from headwise.attach import attach, find_stack
from headwise.errors import AttachError, RouteError
from headwise.hub import load_model
from headwise.plan import HeadPlan, SinkWindow
from headwise.route import HeadRouter, RouterConfig, moh
from headwise.route._absent import PRIOR, RestMeans, without
from headwise.route._fit_steps import FitRecipe, fit_heads, measure_fit
from headwise.route._fitted import read
from headwise.route._local import count, local_features
from headwise.route._losses import select

IDS = torch.randint(0, 256, (2, 40), generator=torch.Generator().manual_seed(5))


@pytest.fixture(scope="module")
def tiny():
    return load_model("tiny-random-llama")


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


# what a router reads of a token besides its hidden state


@pytest.fixture(scope="module")
def reading(tiny):
    return moh(*tiny, router="fitted", active=0.5, fit_tokens=2048, features="queries", absent="rest")


def calls_of(model, ids, **kwargs):
    """One call a layer, of the model as it is."""
    seen = []
    with torch.no_grad(), attach(model, observers=[lambda call, out: seen.append(call)]):
        model(ids, **kwargs)
    return seen


def test_local_features_are_the_equations_written_out(tiny):
    model, _ = tiny
    call, first = calls_of(model, IDS)[1], torch.randn(2, 16, generator=torch.Generator().manual_seed(2))
    found = local_features(call, first)
    assert found.shape == (2, 40, count(4, 2))
    for b, t in ((0, 0), (1, 7), (1, 39)):
        q, k, v = call.q[b, :, t], call.k[b, :, t], call.v[b, :, t]
        a = torch.stack([q[h] @ k[h // 2] / 4 for h in range(4)])
        s = torch.stack([q[h] @ first[h // 2] / 4 for h in range(4)])
        place = torch.tensor(float(t)).log1p()
        wanted = [a, s, q.norm(dim=-1), (s - 4).sigmoid(), (s - 2).sigmoid(), s.sigmoid(), (s - a).sigmoid()]
        wanted += [(s - place).sigmoid(), v.norm(dim=-1), k.norm(dim=-1), place[None]]
        torch.testing.assert_close(found[b, t], torch.cat(wanted))


def test_the_first_key_is_the_mean_over_first_tokens(tiny, reading):
    model, tokenizer = tiny
    rows = FitRecipe(tokens=2048, text="mixed").rows(model, tokenizer)
    for layer in range(3):
        keys = torch.stack([calls_of(model, row[None])[layer].k[0, :, 0] for row in rows])
        torch.testing.assert_close(reading.layers[layer].first, keys.mean(0), rtol=1e-4, atol=1e-5)


def test_features_of_queries_predict_better_than_the_hidden_state(tiny):
    same = {"target": "norm", "absent": "zero", "allocate": "uniform", "fit_text": "english", "fit_tokens": 2048}
    queries, hidden = (moh(*tiny, router="fitted", active=0.5, features=f, **same) for f in ("queries", "hidden"))
    assert queries.config.meta["r2_median"] > hidden.config.meta["r2_median"] + 0.05


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_reading_router_with_padding(tiny, reading, side):
    model, _ = tiny
    at = slice(7, 47) if side == "left" else slice(0, 40)
    mask = torch.zeros(1, 47, dtype=torch.long)
    mask[:, at] = 1
    padded = torch.zeros(1, 47, dtype=torch.long)
    padded[:, at] = IDS[:1]
    with torch.no_grad(), attach(model, router=reading):
        whole = model(IDS[:1]).logits
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        found = model(padded, attention_mask=mask, position_ids=positions).logits[:, at]
    torch.testing.assert_close(found, whole, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("steps", [(30, 40), (13, 20, 39, 40)])
def test_a_reading_router_decodes_with_a_cache(tiny, reading, steps):
    model, _ = tiny
    with torch.no_grad(), attach(model, router=reading):
        whole = model(IDS[:1]).logits
        past, start, parts = None, 0, []
        for stop in steps:
            out = model(IDS[:1, start:stop], past_key_values=past, use_cache=True)
            past, start = out.past_key_values, stop
            parts.append(out.logits)
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-4, atol=1e-4)


def test_a_reading_router_beside_a_plan(tiny, reading):
    """The tokens' own keys are those of the call, not those of the cache that the plan thins out."""
    model, _ = tiny
    plan = HeadPlan.uniform(SinkWindow(sinks=4, window=20), 3, 2)
    with torch.no_grad(), attach(model, plan=plan, router=reading):
        whole = model(IDS[:1]).logits
        out = model(IDS[:1, :25], use_cache=True)
        rest = model(IDS[:1, 25:], past_key_values=out.past_key_values, use_cache=True).logits
    torch.testing.assert_close(torch.cat([out.logits, rest], 1), whole, rtol=1e-4, atol=1e-4)


def test_a_reading_router_is_saved_whole(tiny, reading, tmp_path):
    model, _ = tiny
    reading.save_pretrained(tmp_path)
    again = HeadRouter.from_pretrained(tmp_path)
    assert again.config == reading.config
    logits = []
    for router in (reading, again):
        with torch.no_grad(), attach(model, router=router):
            logits.append(model(IDS).logits)
    assert torch.equal(*logits)


def test_a_reading_router_of_other_sizes_is_refused(tiny, reading):
    call = calls_of(tiny[0], IDS)[0]
    with pytest.raises(AttachError, match="needs all heads in one place"):
        local_features(call, torch.zeros(1, 16))
    with pytest.raises(RouteError, match="features is 'queries' for a 'norm' router"):
        moh(tiny[0], None, router="norm", features="queries")
    with pytest.raises(RouteError, match="features is 'scent'"):
        moh(*tiny, router="fitted", features="scent")
    with pytest.raises(RouteError, match="kv_heads is 0"):
        RouterConfig(layers=reading.config.layers, kind="fitted", width=64, features="queries")


@pytest.mark.parametrize("name", ["gpt2", "qwen3", "gemma3", "mistral"])
def test_reading_routers_of_other_architectures(name):
    model, tokenizer = load_model(f"tiny-random-{name}")
    router = moh(model, tokenizer, router="fitted", active=0.5, fit_tokens=1024, features="queries", absent="rest")
    with torch.no_grad(), attach(model, router=router), router.recording() as load:
        assert model(IDS).logits.isfinite().all()
    assert load.skip_rate() == pytest.approx(torch.full((len(router.layers),), 0.5, dtype=torch.float64))


def test_latent_keys_are_not_read():
    with pytest.raises(RouteError, match="features='queries' expects keys of 4 heads x 16 dimensions"):
        moh(*load_model("tiny-random-deepseek-v3"), router="fitted", fit_tokens=1024, features="queries")


# what stands in for heads that a token does without


def test_without_is_the_complement_of_the_choice():
    scores = torch.randint(0, 3, (5, 7, 6), generator=torch.Generator().manual_seed(0)).float()  # full of ties
    absent = without(scores)
    for k in range(7):
        assert torch.equal(absent[..., k, :], 1 - select(scores, 6 - k))


def test_means_over_the_tokens_that_do_without(tiny):
    model, _ = tiny
    W = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))

    class Rest(RestMeans):
        needs_hidden = True

    rest = Rest(find_stack(model), [lambda call: call.hidden @ W.t()] * 3)
    read(model, IDS, rest)
    both = [outputs_of(model, row[None])[1] for row in IDS]
    hidden, out = (torch.cat([pair[i][0] for pair in both]) for i in (0, 1))  # (80, C), (80, H, D)
    scores = hidden @ W.t()
    for k in range(5):
        absent = 1 - select(scores, 4 - k)
        for h in range(4):
            halves = [out[at][absent[at, h] == 1, h] for at in (slice(0, 40), slice(40, 80))]  # the two calls
            one, other = (rows.sum(0) / max(1, len(rows)) for rows in halves)
            common = max(0.0, 2 * float(one @ other) / max(1e-30, float(one @ one + other @ other)))
            wanted = common * sum(rows.sum(0) for rows in halves) / (sum(map(len, halves)) + PRIOR)
            torch.testing.assert_close(rest.table[1, k, h], wanted, rtol=1e-4, atol=1e-6)


def test_stand_ins_are_what_two_halves_of_the_text_agree_on(tiny):
    model, _ = tiny
    scores = [lambda call: torch.zeros(*call.hidden.shape[:2], 4)] * 3  # the last heads are left out
    same, alone, against = (RestMeans(find_stack(model), scores) for _ in range(3))
    read(model, IDS[:1].repeat(2, 1), same)
    read(model, IDS[:1], alone)
    torch.testing.assert_close(same.agreement[:, 2, 2:], torch.ones(3, 2, dtype=torch.float64))
    torch.testing.assert_close(same.agreement[:, 2, :2], torch.zeros(3, 2, dtype=torch.float64))  # never left out
    assert not alone.table.any()  # one half says nothing of another text
    against.sums = torch.stack([same.sums[0], -same.sums[0]])
    against.tokens = same.tokens
    assert not against.table.any()


def test_an_absent_head_gives_its_rest(tiny, reading):
    model, _ = tiny
    seen = {}

    def watch(call, out):
        seen[call.layer] = out

    with torch.no_grad(), attach(model, router=reading, observers=[watch]):
        model(IDS)
    for layer, out in seen.items():
        assert ((out == reading.layers[layer].fill).all(-1).sum(-1) == 2).all()
    mean = moh(*tiny, router="fitted", active=0.5, fit_tokens=2048, features="queries", absent="mean")
    assert not torch.allclose(mean.layers[1].fill, reading.layers[1].fill, rtol=0.1)


def test_shared_heads_have_no_stand_in(tiny):
    router = moh(*tiny, router="fitted", active=0.75, fit_tokens=512, shared="first", shared_count=2, absent="rest")
    fill = router.layers[1].fill
    assert not fill[:2].any()
    assert fill[2:].abs().sum() > 0


def test_stand_ins_are_trained_with_the_router(tiny, reading):
    assert {name.split(".")[-1] for name, _ in reading.named_parameters()} == {"W", "b", "fill"}


# one fit, any number of heads


def test_one_fit_serves_every_number_of_heads(tiny):
    model, tokenizer = tiny
    options = {"tokens": 512, "text": "mixed", "absent": "rest", "allocate": "sensitivity"}
    template = HeadRouter(moh(model, tokenizer, router="fitted", active=0.5, fit_tokens=512).config)
    fitted = measure_fit(template, model, tokenizer, FitRecipe(**options))
    assert [sum(fitted.dealt(n).active_counts()) for n in (3, 5, 12)] == [3, 5, 12]
    assert fitted.uniform().active_counts() == [2, 2, 2]
    assert fitted.uniform(3).config.meta["kept"] == "3 of 4 (0.750)"
    assert torch.equal(fitted.uniform(3).layers[1].fill, fitted.fills[1, 1])
    with pytest.raises(RouteError, match="costs of layers were not measured"):
        measure_fit(template, model, tokenizer, FitRecipe(tokens=512)).dealt(5)


def test_dealing_out_meets_the_share_to_one_head(tiny):
    router = moh(*tiny, router="fitted", active=0.6, fit_tokens=512, allocate="sensitivity")
    assert sum(router.active_counts()) == 7  # of 12; layer by layer it would be 2 of 4


def test_every_layer_keeps_two_heads_where_the_total_allows_it(tiny):
    options = {"tokens": 512, "absent": "rest", "allocate": "sensitivity"}
    fitted = fit_heads(*tiny, FitRecipe(**options))
    starving = replace(fitted, costs=torch.tensor([[0.0, 9, 20, 40, 80], [0, 9, 20, 40, 80], [0, 0, 0, 0, 1]]))
    assert starving.dealt(8).active_counts() == [3, 3, 2]
    assert starving.dealt(8, least=1).active_counts() in ([4, 3, 1], [3, 4, 1])
    assert starving.dealt(4).active_counts() in ([2, 1, 1], [1, 2, 1])


def test_a_second_round_reads_what_the_first_router_made_of_the_model(tiny):
    model, tokenizer = tiny
    plain = {"target": "norm", "features": "hidden", "absent": "zero", "allocate": "uniform", "fit_text": "english"}
    one, two = (
        moh(model, tokenizer, router="fitted", active=0.5, fit_tokens=1024, fit_rounds=n, **plain) for n in (1, 2)
    )
    assert torch.allclose(
        one.layers[0].W, two.layers[0].W, rtol=1e-3, atol=1e-5
    )  # nothing stands below the first layer
    assert not torch.allclose(one.layers[2].W, two.layers[2].W, rtol=1e-2)
    assert two.config.ste_scope == "selected"
    assert two.config.meta["rounds"] == 2
    with pytest.raises(RouteError, match="fit_rounds is 0"):
        moh(model, tokenizer, router="fitted", fit_tokens=1024, fit_rounds=0)


def test_reading_under_a_router_sees_the_heads_that_it_leaves_out(tiny, reading):
    model, _ = tiny
    seen = []
    read(model, IDS, lambda call, out: seen.append(out), under=reading)
    with torch.no_grad(), attach(model, observers=[lambda call, out: seen.append(out)]):
        model(IDS[:1])
    torch.testing.assert_close(seen[0], seen[6])  # layer 0 of the first row: as if nothing were attached
    assert not torch.allclose(seen[2], seen[8])
