"""Decode steps whose bookkeeping stands on the device: the same attention as token by token on the host, for every pattern that counts."""

import pytest
import torch

import headwise
import headwise.steps
from headwise import HeadPlan, HeadwiseCache
from headwise.attach.capture import Capture
from headwise.cache import HeadwiseLayer
from headwise.plan import Elastic, Full, SinkWindow
from selected_helper import RULES, Reads
from tiny_helper import allocated, generate, padded, random, tiny, tokens

WINDOWS = {
    "window": SinkWindow(2, 5),
    "no sinks": SinkWindow(0, 4),
    "long": SinkWindow(4, 40),
    "grows": SinkWindow(1, 3, grow=True),
}
RAZOR = {"counted": SinkWindow(2, 5, compensation="count"), "as one": SinkWindow(0, 6, compensation="one")}
PATTERNS = {"full": Full(), **WINDOWS, **RAZOR, **RULES}
B, K, G, D = 3, 3, 2, 8


def layers(pattern, **options):
    """A layer of which kv head 1 has the pattern and the others keep all, and the same once more."""
    return [HeadwiseLayer([(Full(), (0, 2)), (pattern, (1,))], dense_prefill=True, **options) for _ in range(2)]


def read(layer, q, k, v, begin, end, start=None):
    """What `attach` makes of columns begin:end, with the groups or with the table."""
    new = slice(begin, end)
    layer.update(k[:, :, new], v[:, :, new])
    groups, offset, start = layer.take(start, Reads(q[:, :, new], k[:, :, new], begin, start))
    groups = groups if layer.table is None else layer.table.groups()
    return headwise.attention(q[:, :, new], groups=groups, offset=offset, start=start)


def begin(layer, room=None):
    """`begin_steps` of a cache of one layer."""
    cache = HeadwiseCache(HeadPlan.full(layers=1, kv_heads=K))
    cache.layers = [layer]
    return cache.begin_steps(everywhere=True)


def held(layer):
    """Positions held by every (row, kv head), however they are stored."""
    found = {}
    for store in layer.stores:
        parts = getattr(store, "parts", None)
        for row in range(B):
            if parts is not None:
                for part in parts:
                    for place, h in enumerate(part.heads):
                        slots = part.positions[row, place, : part.length].tolist()
                        found[row, store.heads[h]] = sorted(p for p in slots if p >= 0)
            elif getattr(store, "positions", None) is not None:
                slots = store.positions[min(row, len(store.positions) - 1)].tolist()
                found[row, store.heads[0]] = sorted(p for p in slots if p >= 0)
    return found


@pytest.mark.parametrize("prompt", [6, 23])
@pytest.mark.parametrize("pads", [None, (0, 3, 5)])
@pytest.mark.parametrize("name", PATTERNS)
def test_steps_read_and_leave_what_the_host_would(name, pads, prompt, monkeypatch):
    """Prompt, steps (twice, as room ends), a chunk, steps; outputs and what is held agree with token by token at every point."""
    monkeypatch.setattr(headwise.steps, "ROOM", 9)
    monkeypatch.setattr("headwise.cache.ROOM", 9)
    plain, stepping = layers(PATTERNS[name])
    start = None if pads is None else torch.tensor(pads)
    n = prompt + 40
    q, k, v = random(B, K * G, n, D), random(B, K, n, D, seed=1), random(B, K, n, D, seed=2)
    cut = [prompt, *[1] * 24, 3, *[1] * 13]
    at = 0
    for count in cut:
        if count == 1 and stepping.steps is None:
            assert begin(stepping) is not None
        want, have = (read(layer, q, k, v, at, at + count, start) for layer in (plain, stepping))
        torch.testing.assert_close(have, want, rtol=1e-5, atol=1e-5)
        at += count
    stepping.settle()
    assert held(stepping) == held(plain) and stepping.seen == plain.seen == n


@pytest.mark.parametrize("name", ["window", "slides", "pooled"])
def test_rows_may_change_after_steps(name):
    """Beams: rows are put in another order in the middle of steps."""
    plain, stepping = layers(PATTERNS[name])
    q, k, v = random(B, K * G, 40, D), random(B, K, 40, D, seed=1), random(B, K, 40, D, seed=2)
    order = torch.tensor([2, 0, 0])
    for layer in (plain, stepping):
        read(layer, q, k, v, 0, 20)
    begin(stepping)
    for at in range(20, 40):
        if at == 30:
            for layer in (plain, stepping):
                layer.reorder_cache(order)
            assert stepping.steps is None
            begin(stepping)
        want, have = (read(layer, q, k, v, at, at + 1) for layer in (plain, stepping))
        torch.testing.assert_close(have, want, rtol=1e-5, atol=1e-5)


def test_what_cannot_be_counted_is_left_as_it_was():
    """Windows that lengthen, an empty cache, and devices without our kernels: no steps, and the same outputs."""
    layer = layers(Elastic(4, 0, 0.5))[0]
    assert begin(layer) is None
    k = random(B, K, 12, D)
    read(layer, random(B, K * G, 12, D), k, k, 0, 12)
    assert begin(layer) is None and layer.steps is None
    cache = HeadwiseCache(HeadPlan.full(layers=2, kv_heads=K)).fill(random(B, K, 12, D), random(B, K, 12, D))
    assert cache.begin_steps() is None  # on CPU, unless asked for


def test_bytes_count_the_numbers():
    """Nothing that steps allocate is hidden from `nbytes`."""
    cache = HeadwiseCache(HeadPlan.uniform(SinkWindow(2, 6), layers=2, kv_heads=K)).fill(
        random(B, K, 30, D), random(B, K, 30, D)
    )
    before = cache.nbytes
    assert before == allocated(cache)
    steps = cache.begin_steps(everywhere=True)
    assert cache.nbytes == before + steps.nbytes > before


def half(model):
    """Every second kv head keeps all."""
    print_ = headwise.attach.fingerprint(model)
    row = tuple(Full() if h % 2 else SinkWindow(2, 6) for h in range(print_.kv_heads))
    return HeadPlan(patterns=(row,) * print_.layers)


@pytest.mark.parametrize("lengths", [(20, 20), (20, 9)])
@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2"])
def test_generate_in_steps_writes_the_same_text(name, lengths):
    """A whole model under plain generate, with and without padding, and an edit beside the plan: every step through the tables."""
    model = tiny(name)
    batch, plan = padded(lengths), half(model)
    edits = headwise.Edit.scale(headwise.HeadSet.parse("L0H1"), 0.5)
    texts, caches = [], []
    for everywhere in (False, True):
        cache = HeadwiseCache(plan)
        with headwise.attach(model, plan=plan, edits=edits) as attached:
            attached.controller.steps_everywhere = everywhere
            texts.append(generate(model, batch, new=30, past_key_values=cache))
        caches.append(cache)
    assert caches[0].steps is None and caches[1].steps is not None and caches[1].steps.count > 0
    assert torch.equal(*texts)


def test_steps_ask_a_mask_nothing(monkeypatch):
    """Looking at a mask makes the host wait, which a graph forbids: once steps have begun, nobody does.

    While a graph is recorded transformers makes a mask even where causality says it all; so it does here.
    """
    monkeypatch.setattr("transformers.masking_utils._ignore_causal_mask_sdpa", lambda *_, **__: False)
    model, cache, asked = tiny(), HeadwiseCache(half(tiny())), []
    look = headwise.attach.controller._only_causal

    def looked(mask, start, past):
        asked.append(cache.steps is not None)
        return look(mask, start, past)

    monkeypatch.setattr("headwise.attach.controller._only_causal", looked)
    with headwise.attach(model, plan=cache.plan) as attached:
        attached.controller.steps_everywhere = True
        generate(model, padded((20, 9)), new=6, past_key_values=cache)
    assert cache.steps is not None and asked and not any(asked)


def test_masks_with_a_rule_of_their_own_end_the_steps():
    """A token that is hidden behind the prompt: steps end, and the outputs are those without them."""
    model = tiny()
    plan = half(model)
    ids, found = tokens(2, 24), []
    for everywhere in (False, True):
        cache, seen = HeadwiseCache(plan), []
        with headwise.attach(model, plan=plan) as attached, torch.no_grad():
            attached.controller.steps_everywhere = everywhere
            for begin, end in ((0, 20), (20, 21), (21, 22), (22, 23)):
                mask = torch.ones(2, end, dtype=torch.long)
                mask[0, 21:22] = 0
                out = model(ids[:, begin:end], attention_mask=mask, past_key_values=cache).logits
                seen.append(out)
                assert (cache.steps is not None) == (everywhere and end == 21)
        found.append(torch.cat(seen, 1))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)


def test_capture_names_what_it_needs():
    """No silent eager run where a graph was asked for."""
    model = tiny()
    with pytest.raises(headwise.errors.AttachError, match="no plan"):
        headwise.attach(model, capture=True)
    with pytest.raises(headwise.errors.AttachError, match="on cpu"):
        headwise.attach(model, plan=half(model), capture=True)


def counted(function, calls):
    """The same function, which notes its calls."""
    return lambda **options: calls.append(options) or function(**options)


def test_beams_do_not_move_the_books_at_every_token():
    """Rows that change at every token end the steps at once: after the second time they stay on the host, and the text is the same."""
    model, texts, begun = tiny(), [], []
    plan, batch = half(model), padded((20, 9))
    for everywhere in (False, True):
        cache = HeadwiseCache(plan)
        cache.begin_steps = counted(cache.begin_steps, begun)
        with headwise.attach(model, plan=plan) as attached:
            attached.controller.steps_everywhere = everywhere
            texts.append(generate(model, batch, new=12, num_beams=3, past_key_values=cache))
    assert torch.equal(*texts) and 0 < len(begun) <= 4


def test_a_graph_needs_to_be_told_where_tokens_stand_and_leaves_other_forwards_alone():
    """Positions that a model finds out by itself would be those of one step; a forward pass that another tool hung there comes back."""
    model = tiny()
    owner = model.model
    other = owner.forward
    owner.__dict__["forward"] = other
    capture, position = Capture(owner, lambda: None), {"position_ids": torch.zeros(2, 1)}
    even, padded_ = (HeadwiseCache(half(model)).fill(random(2, 2, 9, D), random(2, 2, 9, D)) for _ in range(2))
    padded_.layers[0].start = torch.tensor([0, 4])
    assert capture.placed({}, even) and capture.placed(position, padded_) and not capture.placed({}, padded_)
    capture.remove()
    assert owner.__dict__["forward"] == other
    del owner.__dict__["forward"]
    assert "forward" not in owner.__dict__
    blind = Capture(Blind(), lambda: None)
    assert not blind.placed(position, even)
    blind.remove()
    assert "forward" not in blind.owner.__dict__


class Blind(torch.nn.Module):
    """A model that takes no positions."""

    def forward(self, input_ids):
        return input_ids


def test_a_dropped_cache_is_freed_at_once():
    """No ring of references: gigabytes must not wait for the garbage collector."""
    import gc
    import weakref

    keys = torch.randn(1, K, 12, D)
    plan = HeadPlan.uniform(SinkWindow(2, 5), layers=2, kv_heads=K)
    gc.disable()
    try:
        cache = HeadwiseCache(plan).fill(keys, keys)
        steps = cache.begin_steps(everywhere=True)
        assert steps is not None and steps.tables[0].groups()
        held = weakref.ref(cache), weakref.ref(steps), weakref.ref(cache.layers[0].stores[0])
        del cache, steps
        assert [ref() for ref in held] == [None] * 3
    finally:
        gc.enable()
