"""What the stores of a HeadwiseCache hold: exact means of what was dropped, and real bytes that are really freed."""

import gc
import weakref

import pytest
import torch

import headwise
from headwise import Elastic, Full, HeadPlan, HeadwiseCache, SinkWindow
from headwise.attention import KVGroup
from headwise.cache import HeadwiseLayer
from tiny_helper import allocated, random

# compensation tokens and growing windows, against explicit means


@pytest.mark.parametrize(
    "pattern", [SinkWindow(2, 4), SinkWindow(0, 3), Elastic(1, 2, 0.25), Elastic(2, -3, 0.5)], ids=str
)
@pytest.mark.parametrize("compensation", ["count", "one"])
@pytest.mark.parametrize("grow", [False, True], ids=["sliding", "grow"])
@pytest.mark.parametrize("start", [None, [0, 9, 3]], ids=["dense", "padded"])
def test_compensation_is_the_mean_of_what_was_dropped(pattern, compensation, grow, start):
    """One layer by hand: after a prompt of 14 each step's groups are softmax over kept keys and one mean key of the rest."""
    pattern = type(pattern)(**_fields(pattern) | {"compensation": compensation, "grow": grow})
    layer = HeadwiseLayer([(pattern, (0, 1))], dense_prefill=True)
    k, v, q = (random(3, 2, 30, 8, seed=s) for s in range(3))
    first = torch.tensor(start) if start else None
    for begin, end in [(0, 14), *((i, i + 1) for i in range(14, 30))]:
        layer.update(k[:, :, begin:end], v[:, :, begin:end])
        groups, offset, row_start = layer.take(first)
        got = headwise.attention(q[:, :, begin:end], groups=groups, offset=offset, start=row_start)
        for row in range(3):
            origin = 0 if start is None else start[row]
            for i in range(max(begin, origin), end):
                want = _by_hand(pattern, k[row, :, origin:], v[row, :, origin:], q[row, :, i], i - origin, 14 - origin)
                torch.testing.assert_close(got[row, :, i - begin], want, atol=2e-5, rtol=1e-5)
        assert layer.nbytes == sum(t.untyped_storage().nbytes() for t in layer.stores[0].tensors())


def _fields(pattern):
    names = ("sinks", "window" if isinstance(pattern, SinkWindow) else "alpha")
    if isinstance(pattern, SinkWindow):
        return {"sinks": pattern.sinks, "window": pattern.recent}
    return {"sinks": pattern.sinks, names[1]: pattern.alpha, "beta": pattern.beta, "minimum": pattern.minimum}


def _by_hand(pattern, k, v, q, i, prompt):
    """Query i (position) of one row: k, v (K, n, D), q (K, D); the prompt reads all."""
    positions = torch.arange(i + 1)
    if i < prompt:
        kept = positions >= 0
    else:
        n = prompt if pattern.grow else i + 1
        kept = (positions < pattern.sinks) | (positions >= n - pattern.window(n))
    keys, values, logs = k[:, : i + 1][:, kept], v[:, : i + 1][:, kept], torch.zeros(int(kept.sum()))
    dropped = int((~kept).sum())
    if dropped:
        keys = torch.cat([keys, k[:, : i + 1][:, ~kept].mean(1, keepdim=True)], 1)
        values = torch.cat([values, v[:, : i + 1][:, ~kept].mean(1, keepdim=True)], 1)
        weight = float(dropped) if pattern.compensation == "count" else 1.0
        logs = torch.cat([logs, torch.tensor([weight]).log()])
    weights = torch.softmax((keys @ q[:, :, None])[..., 0] * 8**-0.5 + logs, -1)
    return (weights[..., None] * values).sum(1)


# bytes


def test_bytes_are_those_of_the_plan_and_of_the_tensors():
    """Within 2 % of the formula for a long text, per layer and in the table; a full cache of transformers is the yardstick."""
    plan = HeadPlan(
        patterns=((Full(), SinkWindow(16, 240)), (SinkWindow(16, 1008), Elastic(4, 0, 0.5)), (Full(), Full()))
    )
    cache, batch, n, D = HeadwiseCache(plan), 2, 4096, 64
    for begin, end in [(0, 4000), *((i, i + 1) for i in range(4000, n))]:
        for layer in cache.layers:
            layer.update(*(torch.zeros(batch, 2, end - begin, D, dtype=torch.bfloat16) for _ in range(2)))
            layer.take(None)
    formula = plan.bytes(n, head_dim=D, dtype=torch.bfloat16, batch=batch)
    for have, want in zip(cache.layer_bytes(), formula.tolist(), strict=True):
        assert want <= have <= 1.02 * want
    assert cache.nbytes == sum(cache.layer_bytes()) == allocated(cache)
    assert f"{cache.nbytes / 2**20:.3f}" in cache.table().splitlines()[-1]
    assert [line.split()[1] for line in cache.table().splitlines()[1:-1]] == [
        f"{b / 2**20:.3f}" for b in cache.layer_bytes()
    ]
    assert cache.nbytes < 0.7 * 3 * 2 * batch * 2 * n * D * 2


def test_what_is_dropped_is_freed():
    plan = HeadPlan.uniform(SinkWindow(2, 6), 1, 2)
    cache = HeadwiseCache(plan)
    k, v = random(1, 2, 4000, 16), random(1, 2, 4000, 16)
    big = [weakref.ref(x.untyped_storage()) for x in (k, v)]
    cache.update(k, v, 0)
    groups, *_ = cache.layers[0].take(None)
    assert cache.nbytes == 2 * 8 * 2 * 16 * 4 + 8 * 4
    del k, v, groups
    gc.collect()
    assert all(ref() is None for ref in big)


@pytest.mark.parametrize(
    "rows", [[SinkWindow(2, 60)] * 2, [SinkWindow(2, 60), Full()], [Full()] * 2], ids=["window", "mixed", "full"]
)
def test_nothing_of_the_buffers_that_keys_are_cut_from_is_kept(rows):
    """A store of a view owns its memory, also where the pattern keeps the whole prompt."""
    cache = HeadwiseCache(HeadPlan(patterns=(rows,)))
    fused = random(1, 10, 6, 16).transpose(1, 2)  # (B, heads, N, D) out of one buffer, as a fused projection gives them
    cache.update(fused[:, :2], fused[:, 2:4], 0)
    cache.layers[0].take(None)
    assert cache.nbytes == allocated(cache) == 4 * 10 * 16 * 4 + 10 * 4 * int(rows[0] != Full())


def test_the_buffer_of_a_full_head_grows_by_a_64th():
    cache = HeadwiseCache(HeadPlan.full(1, 1))
    copies, held = 0, None
    for step in range(1200):
        cache.update(random(1, 1, 6400 if step == 0 else 1, 4), random(1, 1, 6400 if step == 0 else 1, 4), 0)
        cache.layers[0].take(None)
        if cache.layers[0].stores[0].k is not held:
            held, copies = cache.layers[0].stores[0].k, copies + 1
        assert step == 0 or cache.layers[0].stores[0].slots <= (6400 + step) * 65 / 64 + 1
    assert copies <= 13


@pytest.mark.parametrize(
    ("pattern", "cut", "promised"),
    [
        (SinkWindow(4, 8), [20, 16, 9], 2),
        (SinkWindow(0, 8), [3, 5, 30], 2),
        (SinkWindow(3, 40), [20, 1, 1, 16, 1, 12], 2),  # nothing has left the window before the chunks
        (
            SinkWindow(4, 8),
            [20, 1, 1, 16, 12],
            1,
        ),  # after steps the window has turned, after a chunk it stands in order
    ],
)
def test_what_is_held_in_order_is_a_text_without_its_middle(pattern, cut, promised):
    """Where `in_order` is promised, the same window over slots alone reads the same: a kernel needs no positions."""
    layer = HeadwiseLayer([(pattern, (0, 1))], dense_prefill=False)
    k, v, q = (random(2, heads, sum(cut), 8, seed=heads) for heads in (2, 2, 4))
    begin = 0
    for count in cut:
        new = slice(begin, begin + count)
        layer.update(k[:, :, new], v[:, :, new])
        (group,), offset, _ = layer.take(None)
        begin += count
        if not group.in_order or group.positions is None:
            continue
        promised -= 1
        told = headwise.attention(q[:, :, new], groups=[group], offset=offset, backend="reference")
        by_slots = KVGroup(group.heads, group.k, group.v, pattern=pattern)
        torch.testing.assert_close(headwise.attention(q[:, :, new], groups=[by_slots], backend="reference"), told)
    assert promised == 0
