"""DuoAttention's split of the kv heads, and its deployment: permuted heads, chunked prefill, decoding, padding, real bytes."""

import copy
import gc

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from headwise.attach import attach, fingerprint
from headwise.budget import duo, permute_kv_heads
from headwise.cache import HeadwiseCache
from headwise.errors import AttachError, PlanError, WrongModelError
from headwise.hub import load_model
from headwise.plan import Budget, Full, HeadPlan, SinkWindow
from headwise.units import HeadScores, HeadSet

ROPE = ["llama", "qwen3", "mistral"]


def scores(values, **labels) -> HeadScores:
    return HeadScores(values=torch.as_tensor(values, dtype=torch.float32), kind="kv", method="duo-gates", **labels)


def drawn(layers: int, heads: int, seed: int, levels: int = 0) -> HeadScores:
    values = torch.rand(layers, heads, generator=torch.Generator().manual_seed(seed))
    return scores((values * levels).round() / levels if levels else values)


# which heads stay full


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


# deployment


def tokens(rows: int = 1, count: int = 60, seed: int = 0) -> torch.Tensor:
    return torch.randint(256, (rows, count), generator=torch.Generator().manual_seed(seed))


def feed(model, plan, ids, sizes, mask=None):
    """Logits of ids (B, N) read in pieces, and the cache."""
    cache, outs, start = HeadwiseCache(plan), [], 0
    mask = torch.ones_like(ids) if mask is None else mask
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad(), attach(model, plan=plan):
        for size in sizes:
            stop = min(start + size, ids.shape[1])
            part = dict(attention_mask=mask[:, :stop], position_ids=positions[:, start:stop])
            outs.append(model(ids[:, start:stop], past_key_values=cache, use_cache=True, **part).logits)
            start = stop
    assert start == ids.shape[1]
    return torch.cat(outs, 1), cache


def mixed(model, prefill="masked", sinks=3, window=9) -> HeadPlan:
    L, K = fingerprint(model).layers, fingerprint(model).kv_heads
    return duo(drawn(L, K, 5), sparsity=0.5, sinks=sinks, window=window, prefill=prefill)


@pytest.mark.parametrize("arch", [*ROPE, "gpt2"])
@pytest.mark.parametrize("prefill", ["masked", "dense"])
@pytest.mark.parametrize("sizes", [[60], [17] * 4, [20] + [1] * 40])
def test_all_retrieval_heads_equal_the_dense_model(arch, prefill, sizes):
    model, _ = load_model(f"tiny-random-{arch}")
    if arch == "mistral":
        model.config.sliding_window = None
        for layer in model.model.layers:
            if hasattr(layer.self_attn, "sliding_window"):
                layer.self_attn.sliding_window = None
    ids = tokens()
    plan = duo(drawn(fingerprint(model).layers, fingerprint(model).kv_heads, 0), sparsity=0.0, prefill=prefill)
    with torch.no_grad():
        dense = model(ids).logits
    torch.testing.assert_close(feed(model, plan, ids, sizes)[0], dense, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("sizes", [[60], [17] * 4, [20] + [1] * 40])
def test_short_texts_are_dense_exactly(sizes):
    model, _ = load_model("tiny-random-llama")
    ids = tokens()
    with torch.no_grad():
        dense = model(ids).logits
    plan = duo(drawn(3, 2, 0), sparsity=1.0, sinks=10, window=50)
    torch.testing.assert_close(feed(model, plan, ids, sizes)[0], dense, rtol=1e-5, atol=1e-4)


def lambda_model(model, plan, chunks=None):
    """The same model with an explicit mask per layer, for one row: an oracle without a cache; `chunks`: (begin, size), read densely."""

    def transform(call, attend):
        N = call.q.shape[2]
        i, j = torch.arange(N)[:, None], torch.arange(N)
        masks = []
        for pattern in plan.layer(call.layer):
            seen = j <= i
            if not pattern.keeps_all:
                near = (j < pattern.sinks) | (i - j < pattern.recent)
                if chunks is not None:
                    begins = torch.tensor([b for b, size in chunks for _ in range(size)])[:, None]
                    kept = (j < pattern.sinks) | (j >= begins - pattern.recent)
                    near = torch.where(torch.tensor([s > 1 for _, s in chunks for _ in range(s)])[:, None], kept, near)
                seen = seen & near
            masks.append(seen)
        G = call.q.shape[1] // call.k.shape[1]
        mask = torch.stack(masks).repeat_interleave(G, 0)
        k, v = (x.repeat_interleave(G, 1) for x in (call.k, call.v))
        logits = (call.q @ k.transpose(-1, -2) * call.scale).masked_fill(~mask, -torch.inf)
        return (logits.softmax(-1) @ v).transpose(1, 2)

    return attach(model, transforms=[transform])


@pytest.mark.parametrize("arch", ["llama", "qwen3", "gpt2"])
@pytest.mark.parametrize("sizes", [[1] * 60, [60], [13] * 5, [30] + [1] * 30])
def test_masked_prefill_and_decoding_equal_the_lambda_mask(arch, sizes):
    model, _ = load_model(f"tiny-random-{arch}")
    ids, plan = tokens(), mixed(model)
    assert 0 < len(plan.full_heads()) < plan.layers * plan.kv_heads
    with torch.no_grad(), lambda_model(model, plan):
        wanted = model(ids, use_cache=False).logits
    torch.testing.assert_close(feed(model, plan, ids, sizes)[0], wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("sizes", [[60], [25, 25, 10], [7] * 8 + [4], [40] + [1] * 20])
def test_dense_prefill_is_that_of_the_reference(sizes):
    """First chunk dense, later chunks read first s + last r of what came before and themselves; then decoding."""
    model, _ = load_model("tiny-random-llama")
    ids, plan = tokens(), mixed(model, "dense")
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    with torch.no_grad(), lambda_model(model, plan, list(zip(starts, sizes, strict=True))):
        wanted = model(ids, use_cache=False).logits
    torch.testing.assert_close(feed(model, plan, ids, sizes)[0], wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("prefill", ["masked", "dense"])
def test_padded_rows_of_a_batch_equal_their_single_runs(prefill):
    model, _ = load_model("tiny-random-llama")
    plan, pads, sizes = mixed(model, prefill), (0, 7, 31), [40, *[1] * 20]
    rows = tokens(3)
    mask = torch.ones_like(rows)
    for row, pad in enumerate(pads):
        mask[row, :pad] = 0
    batch, cache = feed(model, plan, rows, sizes, mask)
    for row, pad in enumerate(pads):
        single, _ = feed(model, plan, rows[row : row + 1, pad:], [40 - pad, *[1] * 20])
        torch.testing.assert_close(batch[row, pad:], single[0], rtol=1e-4, atol=1e-4)
    window = next(s for layer in cache.layers for s in layer.stores if not s.pattern.keeps_all)
    assert all({0, 1, 2} <= set(held) for held in window.positions.tolist())  # sinks are the first real tokens


def test_bytes_are_those_of_the_tensors_and_of_the_formula():
    model, _ = load_model("tiny-random-llama")
    plan, ids = mixed(model, sinks=4, window=12), tokens(2, 300)
    _, cache = feed(model, plan, ids, [300])
    full = len(plan.full_heads())
    b, D, B, T, s, r = 4, 16, 2, 300, 4, 12
    formula = 2 * b * D * B * (full * T + (6 - full) * (s + r))
    stores = [store for layer in cache.layers for store in layer.stores]
    tensors = [t for store in stores for t in store.tensors()]
    keys = sum(t.untyped_storage().nbytes() for t in tensors if t.is_floating_point())
    assert keys == formula == int(plan.bytes(T, head_dim=D, dtype=torch.float32, batch=B).sum())
    positions = sum(t.untyped_storage().nbytes() for t in tensors if not t.is_floating_point())
    assert cache.nbytes == keys + positions and positions < 0.01 * keys
    everything = feed(model, HeadPlan.full(3, 2), ids, [300])[1]
    assert cache.nbytes < 0.56 * everything.nbytes


def live_bytes() -> int:
    """Bytes of the storages of all tensors that are alive."""
    gc.collect()
    tensors = [x for x in gc.get_objects() if issubclass(type(x), torch.Tensor)]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def test_the_memory_is_really_given_back():
    """Not what the cache says of itself: what the process still holds once the logits are gone."""
    model, _ = load_model("tiny-random-llama")
    held, caches = [], []
    for sparsity in (0.0, 1.0):
        before = live_bytes()
        caches.append(
            feed(model, duo(drawn(3, 2, 0), sparsity=sparsity, sinks=4, window=12), tokens(4, 1000), [500, 500])[1]
        )
        held.append(live_bytes() - before)
    assert held[0] >= 4 * 6 * 1000 * 32 * 4 and held[1] < 0.03 * held[0]
    assert [h <= 1.05 * c.nbytes + 4096 for h, c in zip(held, caches, strict=True)] == [True, True]


def test_a_longer_text_costs_a_streaming_layer_nothing():
    model, _ = load_model("tiny-random-llama")
    plan = duo(drawn(3, 2, 0), sparsity=1.0, sinks=4, window=12)
    sizes = [feed(model, plan, tokens(1, n), [64] * (n // 64))[1].nbytes for n in (128, 512, 1024)]
    assert sizes[0] == sizes[1] == sizes[2]


def test_generate_runs_unchanged_under_the_plan():
    model, tokenizer = load_model("tiny-random-llama")
    batch = tokenizer(
        ["Some text that is rather longer than the window of the heads.", "Short."], return_tensors="pt", padding=True
    )
    plan = mixed(model, "dense")
    with attach(model, plan=plan):
        both = model.generate(**batch, max_new_tokens=8, do_sample=False)
        alone = model.generate(batch.input_ids[:1], max_new_tokens=8, do_sample=False)
    assert both.shape[0] == 2 and torch.equal(both[0, -8:], alone[0, -8:])


# permutation


def with_biases(arch: str):
    model, _ = load_model(f"tiny-random-{arch}")
    generator = torch.Generator().manual_seed(3)
    for layer in model.model.layers:
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            linear = getattr(layer.self_attn, name)
            linear.bias = torch.nn.Parameter(torch.randn(linear.out_features, generator=generator) * 0.1)
    return model


@pytest.mark.parametrize("arch", [*ROPE, "gemma3", "qwen3-moe"])
def test_permuting_kv_heads_changes_nothing_but_their_order(arch):
    model = with_biases(arch) if arch == "llama" else load_model(f"tiny-random-{arch}")[0]
    ids, before = tokens(2), copy.deepcopy(model.state_dict())
    L, K = fingerprint(model).layers, fingerprint(model).kv_heads
    keep = HeadSet.of([(layer, K - 1) for layer in range(L)], "kv")
    plan = HeadPlan.from_set(keep, SinkWindow(3, 9), L, K, fingerprint=fingerprint(model))
    with torch.no_grad():
        dense = model(ids).logits
    sparse, _ = feed(model, plan, ids, [30, *[1] * 30])
    ordered, undo = permute_kv_heads(model, plan)
    assert [unit.index for unit in ordered.full_heads()] == [0] * L
    assert any(not torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, dense, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(feed(model, ordered, ids, [30, *[1] * 30])[0], sparse, rtol=1e-4, atol=1e-4)
    with pytest.raises(WrongModelError):
        attach(model, plan=plan)
    undo()
    undo()
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    attach(model, plan=plan).detach()


def test_a_permuted_model_is_an_ordinary_checkpoint(tmp_path):
    model, _ = load_model("tiny-random-llama")
    ids, plan = tokens(), HeadPlan.from_set(HeadSet.parse("L0K1,L2K1"), SinkWindow(3, 9), 3, 2)
    with torch.no_grad():
        dense = model(ids).logits
    ordered, _ = permute_kv_heads(model, plan)
    model.save_pretrained(tmp_path)
    ordered.save(tmp_path / "plan.json")
    loaded, back = AutoModelForCausalLM.from_pretrained(tmp_path).eval(), HeadPlan.load(tmp_path / "plan.json")
    assert back == ordered and str(back.full_heads()) == "L0K0,L2K0"
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, dense, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(feed(loaded, back, ids, [60])[0], feed(model, ordered, ids, [60])[0])


def test_norms_over_all_heads_move_with_them():
    from transformers import Olmo2Config, Olmo2ForCausalLM

    config = Olmo2Config(
        vocab_size=320,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    model = Olmo2ForCausalLM(config).eval()
    for layer in model.model.layers:
        torch.nn.init.normal_(layer.self_attn.q_norm.weight)
        torch.nn.init.normal_(layer.self_attn.k_norm.weight)
    ids = tokens()
    with torch.no_grad():
        dense = model(ids).logits
        permute_kv_heads(model, HeadPlan.from_set(HeadSet.parse("L0K1,L1K1"), SinkWindow(3, 9), 2, 2))
        torch.testing.assert_close(model(ids).logits, dense, rtol=1e-5, atol=1e-5)


def test_what_cannot_be_permuted_is_refused_untouched():
    plan = HeadPlan.from_set(HeadSet.parse("L0K1"), SinkWindow(3, 9), 3, 2)
    model, _ = load_model("tiny-random-llama")
    with attach(model, plan=plan), pytest.raises(AttachError, match="something is attached"):
        permute_kv_heads(model, plan)
    permute_kv_heads(model, plan)
    with pytest.raises(AttachError, match="already reordered"):
        permute_kv_heads(model, plan)
    fused, _ = load_model("tiny-random-gpt2")
    with pytest.raises(AttachError, match="no linear q_proj"):
        permute_kv_heads(fused, HeadPlan.uniform(Full(), 3, 4))
    strange, _ = load_model("tiny-random-llama")
    weight = strange.model.layers[0].self_attn.q_proj.weight.clone()
    strange.model.layers[2].self_attn.temperature = torch.nn.Parameter(torch.ones(7))
    with pytest.raises(AttachError, match="temperature"):
        permute_kv_heads(strange, plan)
    assert torch.equal(weight, strange.model.layers[0].self_attn.q_proj.weight)
    with pytest.raises(PlanError, match=r"\(2, 2\)"):
        permute_kv_heads(load_model("tiny-random-llama")[0], HeadPlan.full(2, 2))
