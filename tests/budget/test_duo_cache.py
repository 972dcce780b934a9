"""DuoAttention deployed: chunked prefill, decoding, padding, real bytes, against the dense model and an explicit mask."""

import gc

import pytest
import torch
from duo_helper import ROPE, drawn, feed, tokens

from headwise.attach import attach, fingerprint
from headwise.budget import duo
from headwise.hub import load_model
from headwise.plan import HeadPlan


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
