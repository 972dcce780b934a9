"""RazorAttention: which heads stay, what the others keep, and a compensation token that is exact where it can be."""

import pytest
import torch

import headwise
from headwise.budget import razor
from headwise.errors import HeadwiseError, PlanError, UnitError, WrongModelError
from headwise.plan import HeadPlan
from headwise.units import Fingerprint, HeadScores, HeadSet
from tiny_helper import tiny

MODEL = Fingerprint(architecture="llama", config_hash="0", layers=10, heads=40, kv_heads=10)


def table(seed=0, kind="kv", shape=(10, 10), fingerprint=None):
    values = torch.rand(*shape, generator=torch.Generator().manual_seed(seed))
    return HeadScores(values=values, kind=kind, method=f"t{seed}", fingerprint=fingerprint)


# which heads


@pytest.mark.parametrize("shares", [(0.14, 0.01), (0.3, 0.3), (0.0, 0.1), (0.005, 0.0), (1.0, 0.5)])
def test_the_set_is_the_union_of_both_tops(shares):
    one, two = table(1), table(2)
    plan = razor(one, echo=two, induction_share=shares[0], echo_share=shares[1])
    first, second = one.top(round(shares[0] * 100)), two.top(round(shares[1] * 100))
    assert plan.full_heads() == first | second
    assert len(plan.full_heads()) == len(first) + len(second) - len(first & second)
    assert plan.method == "razor" and plan.prefill == "dense" and plan.meta["full_heads"] == len(first | second)


def test_without_echo_scores_only_induction_heads_stay():
    assert razor(table(1)).full_heads() == table(1).top(14)


def test_ties_are_broken_by_address():
    flat = HeadScores(values=torch.ones(10, 10), kind="kv", method="flat")
    assert razor(flat, induction_share=0.03).full_heads() == HeadSet.parse("L0K0,L0K1,L0K2")


def test_a_kv_head_is_worth_its_best_query_head():
    heads = table(3, "head", (10, 40), MODEL)
    plan = razor(heads)
    assert plan.full_heads() == heads.to_kv(10, "max").top(14) and plan.fingerprint == MODEL
    unknown = table(3, "head", (10, 40))
    assert razor(unknown, kv_heads=10).full_heads() == plan.full_heads()
    with pytest.raises(PlanError, match="kv_heads="):
        razor(unknown)


@pytest.mark.parametrize("echoed", [False, True])
@pytest.mark.parametrize("budget", ["30%", "0.9", "2000tok", "1MiB"])
def test_a_budget_is_met_and_used(budget, echoed):
    echo = table(2) if echoed else None
    plan = razor(
        table(1), echo=echo, budget=budget, context=4096, s0=256, c=16, sliding=True, head_dim=8, dtype_bytes=2
    )
    allowed = headwise.Budget.parse(budget).slots(context=4096, layers=10, kv_heads=10, token_bytes=32)
    used, full = int(plan.slots(4096).sum()), len(plan.full_heads())
    spare = 4096 - plan.patterns[0][0].slots(4096) if not plan.patterns[0][0].keeps_all else 4096
    assert used <= allowed and (allowed - used < 4096 or spare == 4096)
    if echoed and 14 < full < 100:
        assert len(plan.full_heads() & table(2).top(round(full / 15))) == round(full / 15)


# what the others keep


def test_buffer_follows_the_paper():
    other = razor(table(1), induction_share=0.0).patterns[0][0]
    assert [other.kept(n) for n in (100, 4000, 4004, 4005, 20_000, 50_000)] == [100, 4000, 4004, 4004, 4004, 10_004]
    assert other.slots(20_000) == 4005 and other.slots(4004) == 4004
    assert other.kept(50_100, prompt=50_000) == 10_104  # grows by every new token
    assert razor(table(1), induction_share=0.0, sliding=True).patterns[0][0].kept(50_000) == 10_004


def test_memory_at_the_shape_of_llama_3_8b():
    """36 induction and 3 echo heads of 256 kv heads, 131072 tokens: 5.15 GiB instead of 16.00."""
    one, two = torch.zeros(32, 8), torch.zeros(32, 8)
    one.view(-1)[:36], two.view(-1)[36:39] = 1.0, 1.0
    plan = razor(
        HeadScores(values=one, kind="kv", method="a"), echo=HeadScores(values=two, kind="kv", method="b"), weight="none"
    )
    assert len(plan.full_heads()) == 39
    n, full = 131_072, 16.0 * 2**30
    assert HeadPlan.full(32, 8).bytes(n, head_dim=128, dtype=torch.bfloat16).sum() == full
    got = int(plan.bytes(n, head_dim=128, dtype=torch.bfloat16).sum()) / 2**30
    assert got == pytest.approx(5.15, abs=0.01)


@pytest.mark.parametrize("n, ratio", [(8000, 1.74), (16_000, 2.76), (20_000, 3.12), (32_000, 3.12), (100_000, 3.13)])
def test_compression_of_the_papers_table(n, ratio):
    plan = razor(HeadScores(values=torch.rand(10, 10), kind="kv", method="x"), induction_share=0.15)
    assert 1 / plan.ratio(n) == pytest.approx(ratio, abs=0.006)


# bad input


@pytest.mark.parametrize(
    "options, word",
    [
        ({"induction_share": 1.2}, "induction_share is 1.2"),
        ({"echo_share": -0.1}, "echo_share is -0.1"),
        ({"induction_share": float("nan")}, "induction_share"),
        ({"c": 0.5}, "c is 0.5"),
        ({"s0": -1}, "s0 is -1"),
        ({"sinks": -1}, "sinks is -1"),
        ({"weight": "two"}, "weight is 'two'"),
        ({"budget": "10MiB"}, "head_dim"),
        ({"budget": "0"}, "budget"),
        ({"budget": "150%"}, "budget"),
        ({"budget": "1%", "context": 4096}, "raise the budget"),
        ({"budget": "50%", "context": 2000}, "saves nothing"),
        ({"echo": table(2, "kv", (10, 5))}, "echo is a table"),
        ({"echo": "echo.safetensors"}, "echo must be HeadScores"),
    ],
)
def test_what_cannot_be_planned_is_named(options, word):
    with pytest.raises(PlanError, match=word):
        razor(table(1), **options)


def test_tables_that_do_not_belong_together():
    other = Fingerprint(architecture="llama", config_hash="1", layers=10, heads=40, kv_heads=10)
    with pytest.raises(WrongModelError):
        razor(table(1, fingerprint=MODEL), echo=table(2, fingerprint=other))
    with pytest.raises(PlanError, match="HeadScores"):
        razor("scores")
    with pytest.raises(PlanError, match="kind 'expert'"):
        razor(table(1, "expert"))
    with pytest.raises(UnitError, match="kv_heads"):
        razor(table(1, "head", (10, 40)), kv_heads=7)


def test_a_plan_of_another_model_is_refused():
    plan = razor(table(1, fingerprint=MODEL))
    with pytest.raises(HeadwiseError, match="llama"):
        headwise.attach(tiny(), plan=plan)


def test_a_zero_buffer_keeps_the_newest_token():
    assert razor(table(1), induction_share=0.0, s0=0, c=100).patterns[0][0].kept(50) == 5
