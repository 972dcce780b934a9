"""HeadwiseCache under single forward passes: exact for every pattern however the text is cut, and its bytes are real."""

import pytest
import torch
from transformers import DynamicCache, QuantizedCache, StaticCache

import headwise
from headwise import Elastic, Full, HeadPlan, HeadwiseCache, SinkWindow
from headwise.errors import AttachError, CacheError, PlanError
from tiny_helper import allocated, logits, oracle, padded, random, starts, tiny, tokens

PATTERNS = {
    "full": Full(),
    "window": SinkWindow(0, 5),
    "one": SinkWindow(0, 1),
    "sinks and window": SinkWindow(2, 4),
    "elastic": Elastic(1, 2, 0.25),
    "elastic late": Elastic(2, -6, 0.5, minimum=2),
    "longer than the text": SinkWindow(8, 64),
}
MIXED = HeadPlan(
    patterns=(
        (Full(), PATTERNS["sinks and window"]),
        (PATTERNS["elastic"], PATTERNS["window"]),
        (PATTERNS["elastic late"], Full()),
    )
)
CUTS = {
    "one shot": [21],
    "chunks": [6, 7, 8],
    "prompt and steps": [12] + [1] * 9,
    "steps": [1] * 21,
    "chunks and steps": [5, 1, 6, 1, 1, 7],
}
DENSE, PADDED = {"input_ids": tokens(2, 21)}, padded([21, 12, 4])


def run(model, batch, plan, cut, cache=None):
    """Logits of the text cut into passes of these lengths, and the cache."""
    cache = HeadwiseCache(plan) if cache is None else cache
    parts, begin = [], cache.get_seq_length()
    with headwise.attach(model, plan=plan), torch.no_grad():
        for count in cut:
            end = begin + count
            extra = {}
            if "attention_mask" in batch:
                extra = {
                    "attention_mask": batch["attention_mask"][:, :end],
                    "position_ids": batch["position_ids"][:, begin:end],
                }
            parts.append(model(batch["input_ids"][:, begin:end], past_key_values=cache, use_cache=True, **extra).logits)
            begin = end
    return torch.cat(parts, dim=1), cache


def expected(model, batch, plan):
    with oracle(model, patterns=plan.patterns, start=starts(batch) if "attention_mask" in batch else None):
        return logits(model, batch)


def close(batch, got, want, tolerance=2e-5):
    if "attention_mask" in batch:
        real = batch["attention_mask"].bool()[:, : got.shape[1]]
        got, want = got[real], want[:, : got.shape[1]][real]
    torch.testing.assert_close(got, want, atol=tolerance * float(want.abs().max()), rtol=0)


# exact, however the text is cut


@pytest.mark.parametrize("batch", [DENSE, PADDED], ids=["dense", "padded"])
@pytest.mark.parametrize("cut", CUTS.values(), ids=CUTS)
@pytest.mark.parametrize("pattern", [*PATTERNS, "mixed"])
def test_every_cut_of_the_text_is_the_equation(pattern, cut, batch):
    plan = MIXED if pattern == "mixed" else HeadPlan.uniform(PATTERNS[pattern], 3, 2)
    model = tiny()
    got, cache = run(model, batch, plan, cut)
    close(batch, got, expected(model, batch, plan), 1e-4)
    assert cache.get_seq_length() == 21 and cache.nbytes == allocated(cache)


@pytest.mark.parametrize("name", ["mistral", "gemma3", "gpt2", "qwen3", "qwen3-moe"])
def test_other_architectures(name):
    """Also models with windows of 32 of their own, of which nothing beyond is kept."""
    model, batch = tiny(name), {"input_ids": tokens(2, 48)}
    layers, kv_heads = headwise.find_stack(model).layers, headwise.find_stack(model).kv_heads
    rows = [
        [SinkWindow(2, 6), *[Full()] * (kv_heads - 1)] if layer % 2 else [Full()] * kv_heads for layer in range(layers)
    ]
    plan = HeadPlan(patterns=rows)
    want = expected(model, batch, plan)
    assert not torch.allclose(want, logits(model, batch), atol=1e-3)
    for cut in ([48], [20, 20, 8], [40] + [1] * 8):
        close(batch, run(model, batch, plan, cut)[0], want, 1e-4)
    if name == "gemma3":
        with headwise.attach(model, plan=HeadPlan.full(layers, kv_heads)), torch.no_grad():
            cache = model(batch["input_ids"]).past_key_values
        assert [layer.stores[0].slots for layer in cache.layers] == [32, 32, 32, 48]


def test_a_row_of_which_the_first_chunk_is_all_padding():
    """Its sinks are its first real tokens, which come chunks later."""
    model, batch, plan = tiny(), padded([20, 3]), HeadPlan.uniform(SinkWindow(1, 2), 3, 2)
    want = expected(model, batch, plan)
    for cut in ([5, 5, 10], [6, 6, 6, 1, 1], [1] * 20):
        close(batch, run(model, batch, plan, cut)[0], want, 1e-4)


def test_a_padded_row_is_the_row_alone():
    model, plan = tiny(), MIXED
    both, _ = run(model, PADDED, plan, [15, 1, 1, 4])
    alone, _ = run(model, {"input_ids": PADDED["input_ids"][1:2, 9:]}, plan, [6, 1, 1, 4])
    torch.testing.assert_close(both[1:2, 9:], alone, atol=1e-4, rtol=0)


def test_bfloat16():
    model = tiny(dtype=torch.bfloat16)
    whole, cache = run(model, PADDED, MIXED, [12] + [1] * 9)
    assert {t.dtype for layer in cache.layers for store in layer.stores for t in (store.k, store.v)} == {torch.bfloat16}
    want, real = expected(tiny(), PADDED, MIXED), PADDED["attention_mask"].bool()
    assert (whole[real].float() - want[real]).norm() < 0.05 * want[real].norm()


# a dense prefill: the prompt reads all, then the pattern rules


@pytest.mark.parametrize("pattern", [SinkWindow(2, 4), Elastic(1, 2, 0.25)], ids=str)
@pytest.mark.parametrize("batch", [DENSE, PADDED], ids=["dense", "padded"])
def test_dense_prefill(pattern, batch):
    """Prompt = the model without a plan; a step then is the pattern over the very keys that the prompt left."""
    model, plan = tiny(), HeadPlan.uniform(pattern, 3, 2, prefill="dense")
    got, cache = run(model, batch, plan, [12, *[1] * 9])
    close(batch, got[:, :12], logits(model, batch)[:, :12])
    twin, _ = run_dense_then_masked(model, batch, pattern, 12)
    close(batch, got, twin, 1e-4)
    assert cache.nbytes == allocated(cache)


def run_dense_then_masked(model, batch, pattern, prompt):
    """Oracle with the model's own cache: all keys are kept, rows behind the prompt are masked by the pattern."""

    class Behind:
        def reads(self, q_pos, k_pos):
            width = q_pos.shape[-2]
            return Full().reads(q_pos, k_pos) if width > 1 else pattern.reads(q_pos, k_pos)

    cache, parts, start = DynamicCache(config=model.config), [], starts(batch) if "attention_mask" in batch else None
    with oracle(model, patterns=[[Behind()] * 2] * 3, start=start), torch.no_grad():
        for begin, end in [(0, prompt), *((i, i + 1) for i in range(prompt, 21))]:
            extra = {}
            if start is not None:
                extra = {
                    "attention_mask": batch["attention_mask"][:, :end],
                    "position_ids": batch["position_ids"][:, begin:end],
                }
            parts.append(model(batch["input_ids"][:, begin:end], past_key_values=cache, use_cache=True, **extra).logits)
    return torch.cat(parts, dim=1), cache


def test_a_growing_window_is_cut_at_the_end_of_the_prompt_not_of_its_first_chunk():
    pattern = SinkWindow(1, 4, grow=True)
    model, plan = tiny(), HeadPlan.uniform(pattern, 3, 2)
    whole, one = run(model, DENSE, plan, [15, *[1] * 6])
    parts, many = run(model, DENSE, plan, [6, 4, 5, *[1] * 6])
    close(DENSE, parts, whole, 1e-4)
    assert {store.slots for cache in (one, many) for layer in cache.layers for store in layer.stores} == {1 + 4 + 6}


# rows


@pytest.mark.parametrize("prefill", ["masked", "dense"])
def test_rows_can_be_selected_repeated_and_reordered(prefill):
    model = tiny()
    plan = (
        MIXED
        if prefill == "masked"
        else HeadPlan.uniform(SinkWindow(1, 3, compensation="count"), 3, 2, prefill="dense")
    )
    order = torch.tensor([2, 0, 0, 1])
    want, _ = run(model, PADDED, plan, [15, 1, 1, 4])
    for how in ("reorder", "select", "repeat"):
        _, cache = run(model, PADDED, plan, [15, 1])
        if how == "repeat":
            cache.batch_repeat_interleave(2)
            rows = torch.tensor([0, 0, 1, 1, 2, 2])
        else:
            getattr(cache, {"reorder": "reorder_cache", "select": "batch_select_indices"}[how])(order)
            rows = order
        batch = {name: x[rows] for name, x in PADDED.items()}
        got, _ = run(model, batch, plan, [1, 4], cache)
        real = batch["attention_mask"].bool()[:, 16:]
        torch.testing.assert_close(got[real], want[rows][:, 16:][real], atol=1e-4, rtol=0)
        assert cache.nbytes == allocated(cache)


# taking back


@pytest.mark.parametrize("name", ["window", "sinks and window", "elastic", "elastic late", "full"])
@pytest.mark.parametrize("batch", [DENSE, PADDED], ids=["dense", "padded"])
def test_recorded_columns_can_be_taken_back_exactly(name, batch):
    """Draft, reject some, go on: the numbers are those of the text that was kept, and what is held shrinks again."""
    model, plan = tiny(), HeadPlan.uniform(PATTERNS[name], 3, 2)
    want = expected(model, batch, plan)
    wrong = dict(
        batch, input_ids=torch.cat([batch["input_ids"][:, :12], (batch["input_ids"][:, 12:] + 5) % 256], dim=1)
    )
    _, cache = run(model, batch, plan, [12])
    before = cache.nbytes
    cache.activate_past_recording()
    for _ in range(3):
        run(model, wrong, plan, [4], cache)
        cache.crop(-4)
        assert cache.get_seq_length() == 12
        assert name == "full" or cache.nbytes == before
    got, _ = run(model, batch, plan, [5], cache)
    cache.crop(0)
    close({k: v[:, 12:] for k, v in batch.items()}, got, want[:, 12:17], 1e-4)
    more, _ = run(model, batch, plan, [4], cache)
    close({k: v[:, 17:] for k, v in batch.items()}, more, want[:, 17:], 1e-4)


def test_crop_refuses_what_would_lose_tokens():
    model, plan = tiny(), HeadPlan.uniform(SinkWindow(1, 4), 3, 2)
    _, cache = run(model, DENSE, plan, [12, 1])
    with pytest.raises(CacheError, match=r"crop\(-1\).*already dropped.*activate_past_recording"):
        cache.crop(-1)
    with pytest.raises(CacheError, match="negative"):
        cache.crop(5)
    with pytest.raises(CacheError, match="only 13 columns"):
        cache.crop(-14)
    cache.crop(0)
    close(DENSE, run(model, DENSE, plan, [3], cache)[0], expected(model, DENSE, plan)[:, 13:16], 1e-4)


def test_crop_while_nothing_was_dropped_needs_no_recording():
    model, plan = tiny(), HeadPlan.uniform(SinkWindow(4, 20), 3, 2)
    _, cache = run(model, DENSE, plan, [10, 1, 1])
    cache.crop(-5)
    got, _ = run(model, DENSE, plan, [1, 6, 7], cache)
    close(DENSE, got, expected(model, DENSE, plan)[:, 7:], 1e-4)


def test_recording_is_refused_where_chunks_are_read_otherwise():
    for plan in (
        HeadPlan.uniform(SinkWindow(1, 4), 3, 2, prefill="dense"),
        HeadPlan.uniform(SinkWindow(1, 4, grow=True), 3, 2),
    ):
        with pytest.raises(CacheError, match="assisted generation needs"):
            HeadwiseCache(plan).activate_past_recording()
    HeadwiseCache(HeadPlan.full(3, 2, prefill="dense")).activate_past_recording()


# reset, reuse, misuse


def test_reset_frees_all_and_the_cache_can_be_used_again():
    model, plan = tiny(), MIXED
    want, cache = run(model, PADDED, plan, [15, 6])
    cache.reset()
    assert cache.nbytes == allocated(cache) == 0 and cache.get_seq_length() == 0
    again, _ = run(model, PADDED, plan, [15, 6], cache)
    assert torch.equal(again, want)
    cache.reset()
    other, _ = run(model, DENSE, plan, [21], cache)
    close(DENSE, other, expected(model, DENSE, plan), 1e-4)


def test_a_cache_of_another_batch_is_refused():
    model, plan = tiny(), MIXED
    _, cache = run(model, DENSE, plan, [21])
    held = cache.nbytes
    with headwise.attach(model, plan=plan), torch.no_grad():
        with pytest.raises(CacheError, match=r"batch of 2 rows and 21 tokens.*batch of 3.*reset\(\)"):
            model(tokens(3, 5), past_key_values=cache)
        with pytest.raises(CacheError, match=r"covers 7 columns.*21 \+ 5.*another prompt"):
            model(tokens(2, 5), attention_mask=torch.tensor([[0] + [1] * 6, [1] * 7]), past_key_values=cache)
        assert cache.nbytes == held
        model(tokens(2, 5), past_key_values=cache)  # what was refused did no harm
    assert model.config._attn_implementation == "sdpa"


def test_a_pass_that_broke_off_is_noticed():
    model, cache = tiny(), HeadwiseCache(MIXED)

    def fail(call, out):
        if call.layer == 1:
            raise ZeroDivisionError

    with headwise.attach(model, plan=MIXED), torch.no_grad():
        with headwise.attach(model, observers=[fail]), pytest.raises(ZeroDivisionError):
            model(tokens(1, 5), past_key_values=cache)
        with pytest.raises(CacheError, match=r"broke off.*reset\(\)"):
            model(tokens(1, 5), past_key_values=cache)
        cache.reset()
        model(tokens(1, 5), past_key_values=cache)


def test_a_model_that_is_not_attached_is_noticed():
    model, cache = tiny(), HeadwiseCache(MIXED)
    with torch.no_grad():
        model(tokens(1, 5), past_key_values=cache)
        with pytest.raises(CacheError, match="not attached"):
            model(tokens(1, 1), past_key_values=cache)
        with (
            headwise.attach(model, edits=headwise.Edit.zero(headwise.HeadSet.parse("L0H0"))),
            pytest.raises(CacheError, match="not attached"),
        ):
            model(tokens(1, 1), past_key_values=cache)


def test_a_cache_of_another_plan_is_refused():
    model, other = tiny(), HeadwiseCache(HeadPlan.uniform(SinkWindow(1, 4), 3, 2))
    for plan in (HeadPlan.full(3, 2), HeadPlan.uniform(SinkWindow(1, 4), 3, 2, prefill="dense")):
        with headwise.attach(model, plan=plan), pytest.raises(AttachError, match="another plan"):
            model(tokens(1, 5), past_key_values=other)
    with headwise.attach(model, plan=HeadPlan.full(3, 2)), pytest.raises(AttachError, match="another plan"):
        model(tokens(1, 5), past_key_values=HeadwiseCache(HeadPlan.full(2, 2)))


def test_caches_that_a_plan_cannot_use_are_refused_by_name():
    model = tiny()
    filled = DynamicCache(config=model.config)
    with torch.no_grad():
        model(tokens(1, 3), past_key_values=filled)
    caches = [
        StaticCache(config=model.config, max_cache_len=16),
        DynamicCache(config=model.config, offloading=True),
        filled,
    ]
    with headwise.attach(model, plan=MIXED):
        for cache in caches:
            with pytest.raises(
                AttachError, match=f"{type(cache).__name__}.*static, offloaded, quantised or already filled"
            ):
                model(tokens(1, 5), past_key_values=cache)
        quantized = QuantizedCache.__new__(QuantizedCache)  # its backends are not installed; the type is what counts
        with pytest.raises(AttachError, match="QuantizedCache"):
            model(tokens(1, 5), past_key_values=quantized)
    with pytest.raises(CacheError, match="cannot be offloaded"):
        HeadwiseCache(MIXED).layers[0].offload()


def test_a_compensation_token_needs_a_dense_prefill():
    with pytest.raises(PlanError, match="prefill='dense'"):
        HeadwiseCache(HeadPlan.uniform(SinkWindow(1, 4, compensation="count"), 1, 1))


def test_the_wrong_number_of_kv_heads():
    cache = HeadwiseCache(HeadPlan.full(1, 3))
    with pytest.raises(CacheError, match="3 kv heads.*gives 2"):
        cache.update(random(1, 2, 4, 8), random(1, 2, 4, 8), 0)
    with pytest.raises(CacheError, match="nothing to read"):
        cache.layers[0].take(None)


def test_beyond_the_context_of_the_model():
    """A plan bounds memory, not positions: rotary positions go on counting as the model's would, learned ones end."""
    model = tiny("gpt2")
    plan = HeadPlan.uniform(SinkWindow(1, 4), 3, 4)
    with headwise.attach(model, plan=plan), torch.no_grad(), pytest.raises(IndexError):
        model(tokens(1, 4097))
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("lengths", [(30, 30), (30, 17)])
def test_chunks_need_no_mask_where_it_says_nothing(lengths, monkeypatch):
    """A chunk behind its past reads by causality and the rows' starts: the model's own mask is dropped when it says just that."""
    model, seen = tiny(), []
    plan = HeadPlan.full(3, 2)
    library = headwise.attention.sdpa.attend
    monkeypatch.setattr(
        headwise.attention.sdpa,
        "attend",
        lambda q, g, queries, *a, **o: seen.append(queries.mask) or library(q, g, queries, *a, **o),
    )
    batch = padded(lengths)
    with torch.no_grad():
        want = model(**batch).logits
        for hide in (False, True):
            mask, cache = batch["attention_mask"].clone(), HeadwiseCache(plan)
            mask[1, 25] = 0 if hide else 1
            seen.clear()
            with headwise.attach(model, plan=plan):
                parts = [
                    model(
                        batch["input_ids"][:, a:b],
                        attention_mask=mask[:, :b],
                        position_ids=batch["position_ids"][:, a:b],
                        past_key_values=cache,
                    )
                    for a, b in ((0, 22), (22, 30))
                ]
            assert all((m is not None) == hide for m in seen[-3:])
            if not hide:
                real = batch["attention_mask"].bool()
                torch.testing.assert_close(
                    torch.cat([p.logits for p in parts], 1)[real], want[real], rtol=1e-4, atol=1e-4
                )
