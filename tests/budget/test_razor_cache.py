"""The compensation token, through the op, the cache and whole models: exact where it can be, and as the equation says elsewhere.

Plans are those of `budget.razor`, for tiny models: 2 sinks, a buffer of max(8, N / 5).
"""

import math

import pytest
import torch

import headwise
from handwired import ECHO, INDUCTION, handwired_induction
from headwise.attention import KVGroup, attention
from headwise.attention.groups import Compensation
from headwise.budget import razor
from headwise.cache import HeadwiseCache
from headwise.plan import Full, HeadPlan
from headwise.score import induction_and_echo
from headwise.units import HeadScores, HeadSet
from tiny_helper import padded, tiny

# through the op


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
    made_for = headwise.fingerprint(model)
    values = torch.rand(made_for.layers, made_for.kv_heads, generator=torch.Generator().manual_seed(0))
    scores = HeadScores(values=values, kind="kv", method="random", fingerprint=made_for)
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
    ids = torch.cat([ids, ids[5:13]])[None]  # far outside the last 12 tokens of the first 31

    def answers(plan):
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "position_ids": torch.arange(39)[None]}
        logits, _ = feed(model, batch, [31, *[1] * 8], plan)
        return int((logits[0, 31:38].argmax(-1) == ids[0, 32:39]).sum())

    options = {"sinks": 1, "s0": 12, "c": 5}
    assert answers(razor(one, echo=two, induction_share=1 / 8, echo_share=1 / 8, **options)) == 7
    assert answers(razor(one, induction_share=0.0, **options)) == 0
