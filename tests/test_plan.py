"""Patterns, plans and budgets: each rule against a token-by-token simulation, and bad input."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from headwise.errors import ArtifactError, PlanError, UnitError, WrongModelError
from headwise.plan import Budget, Elastic, Full, HeadPlan, Pattern, SinkWindow, parse_pattern
from headwise.units import Fingerprint, HeadSet

MODEL = Fingerprint(architecture="LlamaForCausalLM", config_hash="ab12", layers=3, heads=8, kv_heads=4)
SMALL = st.integers(0, 12)
OPTIONS = {"compensation": st.sampled_from(["none", "count", "one"]), "grow": st.booleans()}
WINDOWS = st.builds(SinkWindow, SMALL, st.integers(1, 12), **OPTIONS)
SPANS = st.builds(Elastic, SMALL, st.integers(-20, 20), st.floats(0, 1), minimum=st.integers(1, 12), **OPTIONS)
PATTERNS = st.just(Full()) | WINDOWS | SPANS


def simulate(pattern, n, prompt):
    """The tokens that are left when a row reads `prompt` tokens at once and then one by one up to n."""
    held = set(range(min(n, prompt)))
    for seen in range(min(n, prompt), n + 1):
        held |= {seen - 1} if seen else set()
        if not pattern.grow or seen <= prompt:
            held = {token for token in held if token < pattern.sinks or token >= seen - pattern.window(seen)}
    return held


@given(pattern=PATTERNS, n=st.integers(0, 40), prompt=st.integers(0, 40))
def test_kept_and_reads_equal_the_simulation(pattern, n, prompt):
    held = simulate(pattern, n, prompt)
    assert pattern.kept(n, prompt=prompt) == len(held)
    if n:
        row = pattern.reads(torch.tensor([n - 1]), torch.arange(-2, n + 3), prompt=prompt)
        assert {token for token, seen in zip(range(-2, n + 3), row.tolist(), strict=True) if seen} == held


@given(pattern=PATTERNS, n=st.integers(1, 60))
def test_no_pattern_wants_a_token_back(pattern, n):
    assert n + 1 - pattern.window(n + 1) >= n - pattern.window(n)
    assert pattern.kept(n) <= pattern.kept(n + 1) <= pattern.kept(n) + 1
    assert pattern.kept(n) <= n and pattern.window(n) >= 1
    assert pattern.kept(n) == n or not pattern.keeps_all
    assert pattern.slots(n) == pattern.kept(n) + (pattern.compensated and pattern.kept(n) < n)


@given(pattern=PATTERNS, top=st.integers(1, 50))
def test_windows_of_a_tensor_and_masks_broadcast(pattern, top):
    n = torch.arange(top)
    assert pattern.windows(n).tolist() == [pattern.window(int(i)) for i in n]
    q, k = torch.arange(top).view(1, -1, 1), torch.arange(top).view(1, 1, -1).expand(2, 1, -1)
    reads = pattern.reads(q.int(), k)
    assert reads.shape == (2, top, top)
    assert reads[0].sum(-1).tolist() == [pattern.kept(i + 1) for i in range(top)]


@given(PATTERNS)
def test_pattern_round_trips(pattern):
    assert parse_pattern(str(pattern)) == pattern
    assert Pattern.from_dict(pattern.to_dict()) == pattern
    assert len({pattern, Pattern.from_dict(pattern.to_dict())}) == 1


def test_moa_and_razor_spans():
    razor = Elastic(4, 0, 1 / 5, minimum=4000, compensation="count")
    assert [razor.window(n) for n in (100, 4000, 20_000, 20_004, 20_005, 10**9)] == [
        100,
        4000,
        4000,
        4000,
        4001,
        2 * 10**8,
    ]
    moa = Elastic(64, -512, 0.25)
    assert [moa.window(n) for n in (100, 2048, 2052, 2056, 8192)] == [1, 1, 1, 2, 1536]
    assert Elastic(0, 0, 0.29).window(100) == 29  # 0.29 * 100 = 28.999999999999996 in floats
    assert Elastic(0, 0, 1 / 3).window(3 * 10**8) == 10**8
    assert Elastic(2, -2, 1.0).keeps_all and not Elastic(2, -3, 1.0).keeps_all and not SinkWindow(0, 10**6).keeps_all


def test_growing_patterns_keep_what_comes_after_the_prompt():
    pattern = SinkWindow(1, 2, grow=True)
    assert pattern.grows and pattern.kept(10, prompt=6) == 7 and pattern.kept(10) == 3
    prompts = torch.tensor([6, 4]).view(2, 1, 1)
    reads = pattern.reads(torch.tensor([[[9]]]), torch.arange(10), prompt=prompts)
    assert reads.int().tolist() == [[[1, 0, 0, 0, 1, 1, 1, 1, 1, 1]], [[1, 0, 1, 1, 1, 1, 1, 1, 1, 1]]]


def test_text_forms():
    assert str(SinkWindow(16, 128)) == "sinks16+window128"
    assert str(SinkWindow(4, 60, compensation="one", grow=True)) == "sinks4+window60+one+grow"
    assert str(Elastic(4, 0, 0.2, minimum=4000)) == "sinks4+max(4000,0.2n)"
    assert str(Elastic(64, -512, 0.25)) == "sinks64+max(1,-512+0.25n)"
    assert parse_pattern(" sinks4 + max(4000, 1n) + count ") == Elastic(4, 0, 1.0, minimum=4000, compensation="count")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "Full",
        "sinks4",
        "window4",
        "sinks4+window0",
        "sinks-1+window4",
        "sinks4+max(1,2n)",
        "sinks4+window4+grow+count",
        "sinks4+window99999999999",
        None,
    ],
)
def test_malformed_pattern_texts(text):
    with pytest.raises(PlanError):
        parse_pattern(text)


@pytest.mark.parametrize(
    "make",
    [
        lambda: SinkWindow(-1, 4),
        lambda: SinkWindow(4, 0),
        lambda: SinkWindow(4, 2.0),
        lambda: SinkWindow(True, 4),
        lambda: SinkWindow(4, 2**40),
        lambda: SinkWindow(4, 10**5000),
        lambda: SinkWindow(4, 4, compensation="mean"),
        lambda: SinkWindow(4, 4, grow=1),
        lambda: Elastic(4, 0, 1.01),
        lambda: Elastic(4, 0, -0.1),
        lambda: Elastic(4, 0, math.nan),
        lambda: Elastic(4, 0.5, 0.1),
        lambda: Elastic(4, 0, 0.1, minimum=0),
        lambda: Full().kept(-1),
        lambda: SinkWindow(1, 1).kept(2.5),
        lambda: SinkWindow(1, 1, grow=True).kept(9, prompt=-1),
    ],
)
def test_bad_patterns(make):
    with pytest.raises(PlanError):
        make()


@pytest.mark.parametrize(
    "data",
    [
        None,
        3,
        {},
        {"pattern": "half"},
        {"pattern": "full", "x": 1},
        {"pattern": "sink-window", "sinks": 1},
        {**SinkWindow(1, 1).to_dict(), "grow": 0},
        {"pattern": ["full"]},
    ],
)
def test_bad_pattern_data(data):
    with pytest.raises(ArtifactError):
        Pattern.from_dict(data)


# plans


def mixed_plan(**labels):
    return HeadPlan.from_set(HeadSet.parse("L0K1,L2K0,L2K3"), SinkWindow(2, 6), 3, 4, **labels)


@st.composite
def plans(draw):
    layers, kv_heads = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    few = draw(st.lists(PATTERNS, min_size=1, max_size=3))
    rows = tuple(tuple(draw(st.sampled_from(few)) for _ in range(kv_heads)) for _ in range(layers))
    prefill = draw(st.sampled_from(["masked", "dense"]))
    return HeadPlan(
        patterns=rows,
        prefill=prefill,
        method=draw(st.text(max_size=5)),
        meta=draw(st.dictionaries(st.text(max_size=3), st.integers(-9, 9) | st.text(max_size=3), max_size=2)),
    )


@settings(max_examples=30, deadline=None)
@given(plan=plans(), n=st.integers(1, 50))
def test_plan_files_and_numbers(tmp_path_factory, plan, n):
    path = tmp_path_factory.getbasetemp() / "plan.json"
    plan.save(path)
    assert HeadPlan.load(path) == plan
    kept, slots = plan.kept(n), plan.slots(n)
    assert kept.dtype == torch.int64 and kept.shape == (plan.layers, plan.kv_heads)
    assert kept.tolist() == [[p.kept(n) for p in plan.layer(layer)] for layer in range(plan.layers)]
    assert plan.ratio(n) == pytest.approx(float(slots.double().mean()) / n)
    expected = slots.sum(1) * (16 + 8) * 4 * 3
    assert torch.equal(plan.bytes(n, head_dim=16, value_dim=8, dtype=torch.float32, batch=3), expected)
    for layer in range(plan.layers):
        groups = plan.groups(layer)
        assert sorted(head for _, heads in groups for head in heads) == list(range(plan.kv_heads))
        assert all(plan.layer(layer)[head] == pattern for pattern, heads in groups for head in heads)
        assert [heads[0] for _, heads in groups] == sorted(heads[0] for _, heads in groups)


def test_plan_of_a_set():
    plan = mixed_plan(method="duo", fingerprint=MODEL)
    assert str(plan.full_heads()) == "L0K1,L2K0,L2K3"
    assert plan.groups(2) == [(Full(), (0, 3)), (SinkWindow(2, 6), (1, 2))]
    assert plan.kept(100).tolist() == [[8, 100, 8, 8], [8] * 4, [100, 8, 8, 100]]
    assert "9 × sinks2+window6, 3 × full" in str(plan) and "duo" in str(plan)
    assert len(plan.table(100).splitlines()) == 4 and "full: 0 3" in plan.table(100)
    assert plan.table(0)
    plan.check(MODEL)


def test_uniform_and_full_plans():
    assert HeadPlan.full(3, 4).ratio(77) == 1.0
    plan = HeadPlan.uniform(
        SinkWindow(2, 6, compensation="count"), 3, 4, prefill="dense", method="razor", meta={"share": 0.15}
    )
    assert plan.slots(100).unique().tolist() == [9] and plan.kept(100).unique().tolist() == [8]
    assert plan.prefill == "dense" and len(plan.full_heads()) == 0
    assert (
        HeadPlan.full(32, 8).bytes(131072, head_dim=128, dtype=torch.bfloat16).sum() == 16 * 2**30
    )  # Llama-3-8B at 128k


def test_plans_hash_and_copy():
    import copy
    import pickle

    plan = mixed_plan(meta={"a": 1})
    assert len({plan, mixed_plan(meta={"a": 1})}) == 1
    assert copy.deepcopy(plan) == plan == pickle.loads(pickle.dumps(plan))


def test_plan_file_is_one_row_a_layer(tmp_path):
    mixed_plan().save(tmp_path / "plan.json")
    assert '"heads": [\n  [0, 1, 0, 0],\n  [0, 0, 0, 0],\n  [1, 0, 0, 1]\n ]' in (tmp_path / "plan.json").read_text()


def test_another_models_plan():
    other = Fingerprint(**{**MODEL.to_dict(), "config_hash": "x"})
    with pytest.raises(WrongModelError, match="the plan of method 'duo'"):
        mixed_plan(method="duo", fingerprint=MODEL).check(other)
    with pytest.raises(PlanError, match=r"\(3, 4\)"):
        mixed_plan().check(Fingerprint(**{**MODEL.to_dict(), "layers": 2}))
    with pytest.raises(PlanError, match="layers, kv heads"):
        HeadPlan.full(3, 5, fingerprint=MODEL)


@pytest.mark.parametrize(
    "make",
    [
        lambda: HeadPlan(patterns=()),
        lambda: HeadPlan(patterns=((),)),
        lambda: HeadPlan(patterns=((Full(),), (Full(), Full()))),
        lambda: HeadPlan(patterns=(("full",),)),
        lambda: HeadPlan.full(2, 2, prefill="sparse"),
        lambda: HeadPlan.full(2, 2, method=None),
        lambda: HeadPlan.full(2, 2, meta={"x": []}),
        lambda: HeadPlan.full(0, 2),
        lambda: HeadPlan.uniform("full", 2, 2),
        lambda: HeadPlan.from_set(HeadSet.parse("L0H0"), SinkWindow(1, 1), 2, 2),
        lambda: HeadPlan.full(2, 2).layer(2),
        lambda: HeadPlan.full(2, 2).layer(-1),
        lambda: HeadPlan.full(2, 2).ratio(0),
        lambda: HeadPlan.full(2, 2).kept(-1),
        lambda: HeadPlan.full(2, 2).bytes(9, head_dim=0, dtype=torch.float16),
        lambda: HeadPlan.full(2, 2).bytes(9, head_dim=8, dtype=torch.float16, batch=0),
    ],
)
def test_bad_plans(make):
    with pytest.raises(PlanError):
        make()


def test_keeping_a_head_that_does_not_exist():
    with pytest.raises(UnitError, match="L2K0"):
        HeadPlan.from_set(HeadSet.parse("L2K0"), SinkWindow(1, 1), 2, 2)


# budgets


@pytest.mark.parametrize(
    ("text", "budget"),
    [
        ("0.5", Budget.ratio(0.5)),
        ("1", Budget.ratio(1.0)),
        (" 25 % ", Budget.ratio(0.25)),
        ("512tok", Budget.tokens(512)),
        ("64MiB", Budget.bytes(64 * 2**20)),
        ("1.5 kb", Budget.bytes(1500)),
        ("2GiB", Budget.bytes(2 * 2**30)),
        ("100B", Budget.bytes(100)),
    ],
)
def test_budget_texts(text, budget):
    assert Budget.parse(text) == budget and str(budget)


@pytest.mark.parametrize(
    "text",
    ["", "0", "0%", "1.01", "101%", "-0.5", "0tok", "1.5tok", "0MiB", "5XB", "nan", "inf", "1e3", "tok", "0.1B", None],
)
def test_bad_budget_texts(text):
    with pytest.raises(PlanError):
        Budget.parse(text)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Budget.ratio(0),
        lambda: Budget.ratio(1.1),
        lambda: Budget.ratio(math.nan),
        lambda: Budget.tokens(0),
        lambda: Budget.tokens(1.5),
        lambda: Budget.bytes(-1),
        lambda: Budget("heads", 3),
    ],
)
def test_bad_budgets(make):
    with pytest.raises(PlanError):
        make()


SHAPE = {"layers": 4, "kv_heads": 3, "head_dim": 8, "dtype_bytes": 2}


@given(
    ratio=st.floats(0.05, 1),
    context=st.integers(20, 300),
    window=st.integers(1, 10),
    compensation=OPTIONS["compensation"],
)
def test_full_heads_is_the_most_that_fits(ratio, context, window, compensation):
    other = SinkWindow(1, window, compensation=compensation)
    size = {heads: heads * context + (12 - heads) * other.slots(context) for heads in range(13)}
    budgets = [
        Budget.ratio(ratio),
        Budget.tokens(max(1, int(ratio * context))),
        Budget.bytes(int(ratio * 12 * context * 16 * 2 * 5)),
    ]
    for budget in budgets:
        allowed = budget.slots(context=context, layers=4, kv_heads=3, token_bytes=16 * 2 * 5)
        fitting = [heads for heads, tokens in size.items() if tokens <= allowed]
        if fitting:
            assert budget.full_heads(context=context, other=other, batch=5, **SHAPE) == max(fitting)
        else:
            with pytest.raises(PlanError, match="raise the budget"):
                budget.full_heads(context=context, other=other, batch=5, **SHAPE)


def test_budget_and_plan_agree():
    other, keep = SinkWindow(4, 28, compensation="count"), HeadSet.parse("L0K0,L0K1,L0K2,L1K0,L1K1,L1K2,L2K0,L2K1")
    plan = HeadPlan.from_set(keep, other, 4, 3)
    used = int(plan.bytes(1000, head_dim=8, dtype=torch.float16, batch=2).sum())
    count = {"context": 1000, "other": other, "batch": 2, **SHAPE}
    assert Budget.bytes(used).full_heads(**count) == 8 and Budget.bytes(used - 1).full_heads(**count) == 7
    assert Budget.ratio(1.0).full_heads(**count) == 12
    assert (
        Budget.ratio(0.3).full_heads(
            context=10**4, other=SinkWindow(0, 1), layers=10, kv_heads=10, head_dim=8, dtype_bytes=2
        )
        == 29
    )


def test_budgets_that_cannot_be_met():
    with pytest.raises(PlanError, match="stores 50 of 50 tokens, so it saves nothing"):
        Budget.ratio(0.5).full_heads(context=50, other=SinkWindow(20, 60), **SHAPE)
    with pytest.raises(PlanError, match="saves nothing"):
        Budget.ratio(0.5).full_heads(context=50, other=Full(), **SHAPE)
    with pytest.raises(
        PlanError, match=r"allows 120 tokens over 12 kv heads.*240 at 100 tokens \(7680 bytes\).*0\.2000"
    ):
        Budget.tokens(10).full_heads(context=100, other=SinkWindow(4, 16), **SHAPE)
    with pytest.raises(PlanError, match="context"):
        Budget.ratio(0.5).full_heads(context=0, other=SinkWindow(4, 16), **SHAPE)
