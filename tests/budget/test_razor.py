"""RazorAttention: which heads stay, what the others keep, and a compensation token that is exact where it can be."""

import math

import pytest
import torch
from handwired import ECHO, INDUCTION, handwired_induction
from tiny_helper import padded, tiny

import headwise
from headwise.attention import KVGroup, attention
from headwise.attention.groups import Compensation
from headwise.budget import razor
from headwise.cache import HeadwiseCache
from headwise.errors import HeadwiseError, PlanError, UnitError, WrongModelError
from headwise.plan import Full, HeadPlan
from headwise.score import induction_and_echo
from headwise.units import Fingerprint, HeadScores, HeadSet

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


@pytest.mark.parametrize("n, ratio", [(8192, 1.74), (16_384, 2.76), (20_480, 3.12), (32_768, 3.12), (100_000, 3.13)])
def test_compression_of_the_papers_table(n, ratio):
    plan = razor(HeadScores(values=torch.rand(10, 10), kind="kv", method="x"), induction_share=0.15)
    assert 1 / plan.ratio(n) == pytest.approx(ratio, abs=0.035)  # the table's lengths are rounded


# the compensation token through the op


def dense_and_compensated(dropped_k, dropped_v, dtype=torch.float32, keep=6, weight="count", seed=0):
    """(dense over all keys, kept keys and one token for the dropped ones, log-sum-exp merge by hand); G = 2, D = 16."""
    draw = torch.Generator().manual_seed(seed)
    q = torch.randn(2, 4, 3, 16, generator=draw).to(dtype)
    k, v = (torch.randn(2, 2, keep, 16, generator=draw).to(dtype) for _ in range(2))
    count = dropped_k.shape[2]
    k_hat, v_hat = dropped_k.float().mean(2), dropped_v.float().mean(2)
    log_count = torch.full((2, 2), math.log(count) if weight == "count" else 0.0)
    whole = [torch.cat([a, b.to(dtype)], 2) for a, b in ((k, dropped_k), (v, dropped_v))]
    group = KVGroup(heads=(0, 1), k=k, v=v, compensation=Compensation(k_hat, v_hat, log_count))
    o1 = attention(q, k, v, causal=False, return_lse=True)
    extra = (q.float().view(2, 2, 2, 3, 16) @ k_hat[:, :, None, :, None])[..., 0].reshape(2, 4, 3) / 4
    extra = extra + log_count.repeat_interleave(2, 1)[..., None]
    lse = torch.logaddexp(o1.lse, extra)
    merged = (o1.lse - lse).exp()[..., None] * o1.out.float()
    merged = merged + (extra - lse).exp()[..., None] * v_hat.repeat_interleave(2, 1)[:, :, None]
    dense = attention(q, *whole, causal=False, backend="reference")
    return dense, q, group, merged


def run(q, group, backend):
    return attention(q, groups=[group], causal=False, offset=group.k.shape[2], backend=backend, return_lse=True)


@pytest.mark.parametrize("backend", ["reference", "sdpa"])
def test_one_dropped_key_is_exact(backend):
    dense, q, group, _ = dense_and_compensated(torch.randn(2, 2, 1, 16), torch.randn(2, 2, 1, 16))
    torch.testing.assert_close(run(q, group, backend).out, dense, rtol=0, atol=1e-6)


@pytest.mark.parametrize("backend", ["reference", "sdpa"])
@pytest.mark.parametrize("count", [2, 63, 1000])
def test_equal_dropped_keys_are_exact_by_count_and_not_by_one(backend, count):
    k = torch.randn(2, 2, 1, 16).expand(-1, -1, count, -1)
    v = torch.randn(2, 2, count, 16)
    dense, q, group, _ = dense_and_compensated(k, v)
    torch.testing.assert_close(run(q, group, backend).out, dense, rtol=0, atol=2e-6)
    single = dense_and_compensated(k, v, weight="one")[2]
    assert (run(q, single, backend).out - dense).abs().max() > 1e-2


@pytest.mark.parametrize("backend", ["reference", "sdpa"])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.bfloat16, 2e-2)])
def test_the_merge_of_log_sum_exps_is_the_explicit_softmax(backend, dtype, tolerance):
    """bf16 outputs near 1 are spaced 8e-3 apart; the float32 inside is held to 2e-3 below."""
    k, v = torch.randn(2, 2, 500, 16), torch.randn(2, 2, 500, 16)
    _, q, group, merged = dense_and_compensated(k, v, dtype)
    torch.testing.assert_close(run(q, group, backend).out.float(), merged, rtol=0, atol=tolerance)


def test_bf16_agrees_with_float32_of_the_same_numbers():
    k, v = torch.randn(2, 2, 500, 16), torch.randn(2, 2, 500, 16)
    _, q, group, _ = dense_and_compensated(k, v, torch.bfloat16)
    wide = KVGroup(heads=(0, 1), k=group.k.float(), v=group.v.float(), compensation=group.compensation)
    fine, coarse = run(q.float(), wide, "sdpa"), run(q, group, "sdpa")
    torch.testing.assert_close(coarse.lse, fine.lse, rtol=0, atol=2e-3)
    relative = (coarse.out.float() - fine.out).norm() / fine.out.norm()
    assert relative < 5e-3


@pytest.mark.parametrize("backend", ["reference", "sdpa"])
def test_a_million_dropped_keys_stay_finite_in_bf16(backend):
    _, q, group, _ = dense_and_compensated(torch.randn(2, 2, 1, 16), torch.randn(2, 2, 1, 16), torch.bfloat16)
    given = group.compensation
    many = Compensation(given.k, given.v, torch.full((2, 2), 1e6).log())
    none = Compensation(given.k, given.v, torch.full((2, 2), 0.0).log())
    for compensation in (many, none):
        one = KVGroup(heads=(0, 1), k=group.k, v=group.v, compensation=compensation)
        result = run(q, one, backend)
        assert result.out.isfinite().all() and result.lse.isfinite().all()
    torch.testing.assert_close(
        run(q, KVGroup(heads=(0, 1), k=group.k, v=group.v, compensation=none), backend).out.float(),
        attention(q, group.k, group.v, causal=False).float(),
        rtol=0,
        atol=2e-2,
    )


# through the cache and a model


def plan_for(model, share=0.0, **options):
    """Scores at random, nothing kept whole unless told."""
    print_ = headwise.fingerprint(model)
    scores = table(0, "kv", (print_.layers, print_.kv_heads), print_)
    return razor(scores, induction_share=share, **{"sinks": 2, "s0": 8, "c": 5, **options})


@torch.no_grad()
def feed(model, batch, sizes, plan=None):
    """Logits (B, N, V) of rows read in pieces, and the cache."""
    ids, mask, positions = batch["input_ids"], batch["attention_mask"], batch["position_ids"]
    cache, start, seen = None, 0, []
    handle = None if plan is None else headwise.attach(model, plan=plan)
    for size in sizes:
        stop = start + size
        out = model(
            ids[:, start:stop],
            attention_mask=mask[:, :stop],
            position_ids=positions[:, start:stop],
            past_key_values=cache,
            use_cache=True,
        )
        cache, start = out.past_key_values, stop
        seen.append(out.logits)
    if handle is not None:
        handle.detach()
    return torch.cat(seen, 1), cache


def stores(cache):
    return [store for layer in cache.layers for store in layer.stores if not store.pattern.keeps_all]


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2", "mixtral"])
def test_all_heads_retrieval_is_the_dense_model(name):
    model, batch = tiny(name), padded([40, 31])
    got, cache = feed(model, batch, [30, *[1] * 10], plan_for(model, 1.0))
    want, _ = feed(model, batch, [30, *[1] * 10])
    real = batch["attention_mask"].bool()
    torch.testing.assert_close(got[real], want[real], rtol=0, atol=1e-5)
    assert not stores(cache)


def test_texts_up_to_the_buffer_are_left_alone():
    model, batch = tiny(), padded([36])
    plan = plan_for(model, s0=40, sliding=True)
    got, cache = feed(model, batch, [30, *[1] * 6], plan)
    want, _ = feed(model, batch, [30, *[1] * 6], HeadPlan.full(3, 2))
    assert all(float(store.folded[2].max()) == 0 for store in stores(cache) if store.folded is not None)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)
    first, _ = feed(model, batch, [36], plan)
    bare, _ = feed(model, batch, [36])
    assert first.equal(bare)  # the prompt is read by the model's own kernel: not a bit differs


def test_the_prompt_is_read_densely_whatever_is_dropped_behind_it():
    model, batch = tiny(), padded([50, 22])
    real = batch["attention_mask"].bool()
    got, _ = feed(model, batch, [50], plan_for(model))
    torch.testing.assert_close(got[real], feed(model, batch, [50])[0][real], rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_one_dropped_token_costs_nothing(name):
    """N = sinks + s0 + 1 tokens: one is folded, and decoding is still the dense model's."""
    model, batch = tiny(name), padded([16])
    got, cache = feed(model, batch, [11, *[1] * 5], plan_for(model))
    want, _ = feed(model, batch, [11, *[1] * 5])
    assert all(float(store.folded[2].max()) == 1 for store in stores(cache))
    torch.testing.assert_close(got, want, rtol=0, atol=2e-5)
    bare, _ = feed(model, batch, [11, *[1] * 5], plan_for(model, weight="none"))
    assert (bare[:, 11:] - want[:, 11:]).abs().max() > 1e-3


def by_hand(keys, n, lengths, sinks=2, s0=8, c=5):
    """Mean of what each padded row has dropped after n columns, and how many that is; keys (B, K, N, D)."""
    means, counts = [], []
    width = keys.shape[2]
    for row, length in enumerate(lengths):
        seen = n - (width - length)
        real = keys[row, :, width - length : width - length + seen]
        stop = seen - max(s0, seen // c)
        dropped = real[:, sinks : max(stop, sinks)]
        counts.append(dropped.shape[1])
        means.append(dropped.float().mean(1) if dropped.shape[1] else torch.zeros_like(real[:, 0]))
    return torch.stack(means), counts


@pytest.mark.parametrize("sizes", [[60], [35, *[1] * 25], [20, 20, *[1] * 20], [1] * 60])
def test_sliding_folds_what_leaves_as_recomputing_the_mean_would(sizes):
    """Rows of unequal lengths: n, buffer and dropped tokens are those of each row, sinks its first real tokens."""
    model, lengths = tiny(), [60, 41, 12]
    batch = padded(lengths)
    _, cache = feed(model, batch, sizes, plan_for(model, sliding=True))
    with torch.no_grad():
        full = model(**batch, use_cache=True).past_key_values.layers[0]  # keys of layer 0 depend on no other
    store = cache.layers[0].stores[0]
    for kept, name in ((full.keys, 0), (full.values, 1)):
        means, counts = by_hand(kept, 60, lengths)
        torch.testing.assert_close(store.folded[name], means, rtol=0, atol=1e-5)
        assert store.folded[2].flatten().tolist() == counts


@pytest.mark.parametrize("sizes", [[40, *[1] * 20], [20, 20, *[1] * 20]])
def test_a_growing_buffer_is_cut_once_at_the_end_of_the_prompt(sizes):
    model, lengths = tiny(), [60, 41]
    batch = padded(lengths)
    _, cache = feed(model, batch, sizes, plan_for(model))
    with torch.no_grad():
        full = model(**batch, use_cache=True).past_key_values.layers[0]
    store = cache.layers[0].stores[0]
    means, counts = by_hand(full.keys, 40, lengths)
    torch.testing.assert_close(store.folded[0], means, rtol=0, atol=1e-5)
    assert store.folded[2].flatten().tolist() == counts == [30, 11]
    assert (store.positions >= 0).sum(1).tolist() == [2 + 8 + 20] * 2


def test_decoding_reads_what_the_equation_says():
    """One layer by hand: dense attention of the last query over kept keys and one more with logit + log N_d."""
    model, batch = tiny(), padded([60, 33])
    seen = {}

    def watch(call, out):
        if call.layer == 0 and call.decoding:
            seen["q"], seen["out"] = call.q, out

    with torch.no_grad():
        full = model(**batch, use_cache=True).past_key_values.layers[0]
    with headwise.attach(model, observers=[watch]):
        feed(model, batch, [59, 1], plan_for(model, sliding=True))
    for row, length in enumerate((60, 33)):
        k, v = (x[row, :, 60 - length :].repeat_interleave(2, 0).double() for x in (full.keys, full.values))
        stop = length - max(8, length // 5)
        keep = [*range(2), *range(stop, length)]
        k_hat, v_hat = (x[:, 2:stop].mean(1, keepdim=True) for x in (k, v))
        logits = (torch.cat([k[:, keep], k_hat], 1) @ seen["q"][row, :, 0, :, None].double())[..., 0] / 4
        logits[:, -1] += math.log(stop - 2)
        wanted = (torch.softmax(logits, -1)[:, None] @ torch.cat([v[:, keep], v_hat], 1))[:, 0]
        torch.testing.assert_close(seen["out"][row, 0].double(), wanted, rtol=0, atol=1e-5)


def test_rows_of_a_batch_do_not_know_each_other():
    model, lengths = tiny(), [60, 41, 12]
    batch = padded(lengths)
    together, _ = feed(model, batch, [50, *[1] * 10], plan_for(model, 0.4, sliding=True))
    for row, length in enumerate(lengths):
        ids = batch["input_ids"][row : row + 1, 60 - length :]
        mask = torch.ones_like(ids)
        alone = {"input_ids": ids, "attention_mask": mask, "position_ids": torch.arange(length)[None]}
        if length == 12:
            alone_sizes = [2, *[1] * 10]
        else:
            alone_sizes = [length - 10, *[1] * 10]
        got, _ = feed(model, alone, alone_sizes, plan_for(model, 0.4, sliding=True))
        torch.testing.assert_close(together[row, -10:], got[0, -10:], rtol=0, atol=2e-5)


def test_generate_runs_under_the_plan_in_bf16_and_frees_memory():
    model = tiny(dtype="bfloat16")
    plan = plan_for(model, 0.2)
    cache = HeadwiseCache(plan)
    ids = torch.randint(0, 256, (2, 400), generator=torch.Generator().manual_seed(0))
    with headwise.attach(model, plan=plan):
        out = model.generate(ids, max_new_tokens=8, min_new_tokens=8, do_sample=False, past_key_values=cache)
    assert out.shape == (2, 408)
    full = 2 * 3 * 2 * 2 * 408 * 16 * 2
    assert cache.nbytes < 0.6 * full
    assert all(store.folded[0].isfinite().all() for store in stores(cache))


@pytest.mark.parametrize("name", ["mistral", "gemma3"])
def test_layers_with_their_own_window_are_left_alone(name):
    """A compensation token would stand for tokens that such a layer never reads."""
    model, batch = tiny(name), padded([80])
    plan = plan_for(model, sliding=True)
    if name == "gemma3":  # its last layer reads everything
        plan = HeadPlan(patterns=(*plan.patterns[:3], (Full(), Full())), prefill="dense")
    got, cache = feed(model, batch, [60, *[1] * 20], plan)
    want, _ = feed(model, batch, [60, *[1] * 20])
    torch.testing.assert_close(got, want, rtol=0, atol=2e-5)
    assert all(store.folded is None for store in stores(cache))


def test_the_wired_model_still_copies_with_its_two_heads_and_not_without():
    """The head that looks back one token, and the one that copies; sinks 1, buffer 12."""
    model = handwired_induction()
    one, two = induction_and_echo(model, None, length=16, repeats=4)
    assert (one.top(1), two.top(1)) == (HeadSet.of([INDUCTION]), HeadSet.of([ECHO]))
    ids = torch.randperm(31, generator=torch.Generator().manual_seed(1))
    ids = torch.cat([ids, ids[:8]])[None]

    def answers(plan):
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "position_ids": torch.arange(39)[None]}
        logits, _ = feed(model, batch, [31, *[1] * 8], plan)
        return int((logits[0, 31:38].argmax(-1) == ids[0, 32:39]).sum())

    options = {"sinks": 1, "s0": 12, "c": 5}
    assert answers(razor(one, echo=two, induction_share=1 / 8, echo_share=1 / 8, **options)) == 7
    assert answers(razor(one.normalized("zscore"), induction_share=0.0, **options)) == 0


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
