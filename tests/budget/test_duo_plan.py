"""DuoAttention's split of the kv heads: which stay full, by scores, sparsity, threshold and budget."""

import pytest
import torch
from duo_helper import drawn, scores
from hypothesis import given, settings
from hypothesis import strategies as st

from headwise.attach import attach, fingerprint
from headwise.budget import duo
from headwise.errors import PlanError, WrongModelError
from headwise.hub import load_model
from headwise.plan import Budget, SinkWindow
from headwise.units import HeadScores, HeadSet


def test_a_mix_is_the_weighted_mean_of_the_tables_over_their_largest():
    a, b = drawn(4, 3, 0), scores(100 * torch.rand(4, 3, generator=torch.Generator().manual_seed(1)))
    for share in (0.0, 0.3, 1.0):
        by_hand = scores((1 - share) * a.values / a.values.max() + share * b.values / b.values.max())
        plan = duo(a, mix=b, mix_share=share, sparsity=0.5)
        assert plan.full_heads() == duo(by_hand, sparsity=0.5).full_heads()
    assert duo(a, mix=b, mix_share=0.0, sparsity=0.5).full_heads() == duo(a, sparsity=0.5).full_heads()
    assert duo(a, mix=b, mix_share=0.3, sparsity=0.5).meta["scores"] == "0.7 duo-gates + 0.3 duo-gates"


def test_bad_mixes():
    a = drawn(4, 3, 0)
    with pytest.raises(PlanError, match="mix_share is 1.5"):
        duo(a, mix=a, mix_share=1.5, sparsity=0.5)
    with pytest.raises(PlanError, match="mix holds scores of 2 × 3"):
        duo(a, mix=drawn(2, 3, 0), sparsity=0.5)
    with pytest.raises(PlanError, match="mix must be HeadScores"):
        duo(a, mix="b", sparsity=0.5)
    llama, qwen = (
        scores(drawn(3, 2, 0).values, fingerprint=fingerprint(load_model(f"tiny-random-{n}")[0]))
        for n in ("llama", "qwen3")
    )
    with pytest.raises(WrongModelError, match="scores to mix with"):
        duo(llama, mix=qwen, sparsity=0.5)


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 9), st.integers(1, 8), st.integers(0, 99), st.sampled_from([0, 1, 3]), st.data())
def test_counts_are_exact_and_higher_sparsity_keeps_a_subset(layers, heads, seed, levels, data):
    table = drawn(layers, heads, seed, levels)
    shares = sorted(data.draw(st.lists(st.floats(0, 1), min_size=2, max_size=4)), reverse=True)
    kept = [duo(table, sparsity=rho).full_heads() for rho in shares]
    assert [len(k) for k in kept] == [round((1 - rho) * layers * heads) for rho in shares]
    for fewer, more in zip(kept, kept[1:], strict=False):
        assert set(fewer) <= set(more)
    best = kept[-1].mask(layers, heads)
    if best.any() and not best.all():
        assert table.values[best].min() >= table.values[~best].max()


def test_all_layers_are_ranked_together():
    plan = duo(scores([[0.9, 0.8], [0.7, 0.1], [0.2, 0.3]]), sparsity=0.5, sinks=4, window=8)
    assert plan.full_heads() == HeadSet.parse("L0K0,L0K1,L1K0")
    assert plan.layer(2) == (SinkWindow(4, 8), SinkWindow(4, 8)) and plan.prefill == "masked"
    assert (plan.meta["full_heads"], plan.meta["of_heads"]) == (3, 6)


def test_equal_scores_are_spread_and_reproducible():
    table = scores(torch.ones(20, 4))
    one, again, other = (duo(table, sparsity=0.5, seed=seed).full_heads() for seed in (0, 0, 1))
    assert one == again != other
    assert len({unit.layer for unit in one}) > 12


def test_the_threshold_is_inclusive():
    table = scores([[1.0, 0.5], [0.49, 0.0]])
    assert duo(table, threshold=0.5).full_heads() == HeadSet.parse("L0K0,L0K1")
    assert duo(table, threshold=2.0).full_heads() == HeadSet.empty("kv")
    assert len(duo(table, threshold=0.0).full_heads()) == 4


def test_gates_near_one_show_why_a_threshold_is_a_poor_choice():
    crowded = scores(1 - 0.1 * drawn(32, 8, 0).values)
    assert duo(crowded, threshold=0.5).ratio(32768) == 1.0
    assert duo(crowded, sparsity=0.5).ratio(32768) == pytest.approx(0.505, abs=0.001)


@pytest.mark.parametrize("budget", ["50%", 0.5, "600tok", "1MiB"])
def test_a_budget_is_met_at_its_context(budget):
    table, options = drawn(6, 4, 1), dict(context=2000, sinks=4, window=60, head_dim=16)
    amount = Budget.ratio(budget) if isinstance(budget, float) else budget
    plan = duo(table, budget=amount, **options)
    wanted = (amount if isinstance(amount, Budget) else Budget.parse(amount)).slots(
        context=2000, layers=6, kv_heads=4, token_bytes=2 * 16 * 2
    )
    used, step = int(plan.slots(2000).sum()), 2000 - 64
    assert used <= wanted < used + step
    assert plan.full_heads() == table.top(len(plan.full_heads()))


def test_scores_of_query_heads_count_by_their_best_if_the_model_is_known():
    model, _ = load_model("tiny-random-llama")
    values = torch.zeros(3, 4)
    values[1, 3], values[2, 0] = 1.0, 0.5
    heads = HeadScores(values=values, method="retrieval", fingerprint=fingerprint(model))
    assert duo(heads, sparsity=1 - 2 / 6).full_heads() == HeadSet.parse("L1K1,L2K0")
    with pytest.raises(PlanError, match="to_kv"):
        duo(HeadScores(values=values, method="retrieval"), sparsity=0.5)


@pytest.mark.parametrize(
    "options, text",
    [
        ({}, "exactly one of budget=, sparsity= and threshold=, not none"),
        ({"sparsity": 0.5, "threshold": 0.5}, "not sparsity and threshold"),
        ({"sparsity": 0.5, "budget": "50%"}, "not budget and sparsity"),
        ({"sparsity": -0.1}, "sparsity is -0.1"),
        ({"sparsity": 1.1}, "sparsity is 1.1"),
        ({"sparsity": float("nan")}, "sparsity is nan"),
        ({"threshold": float("inf")}, "threshold is inf"),
        ({"sparsity": 0.5, "sinks": -1}, "sinks is -1"),
        ({"sparsity": 0.5, "window": 0}, "window is 0"),
        ({"sparsity": 0.5, "prefill": "lazy"}, "prefill is 'lazy'"),
        ({"sparsity": 0.5, "seed": -1}, "seed is -1"),
        ({"budget": "1MiB"}, "head_dim"),
        ({"budget": "50%", "context": 320}, "saves nothing"),
        ({"budget": "1%"}, "raise the budget"),
        ({"budget": "some"}, "no budget"),
    ],
)
def test_bad_options_are_refused(options, text):
    with pytest.raises(ValueError, match=text):
        duo(drawn(3, 2, 0), **options)
    with pytest.raises(PlanError, match="HeadScores"):
        duo(torch.ones(3, 2), sparsity=0.5)


def test_a_plan_of_another_shape_is_refused_by_the_model():
    model, _ = load_model("tiny-random-llama")
    with pytest.raises(ValueError, match=r"\(3, 3\)"):
        attach(model, plan=duo(drawn(3, 3, 0), sparsity=0.5))
