"""Tokens chosen by content, a layer at a time: which are kept, against loops; what queries then read; bytes; the pattern as a value."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache

import headwise
from headwise import HeadPlan, HeadwiseCache
from headwise.cache import HeadwiseLayer
from headwise.errors import AttachError, PlanError
from headwise.plan import Pattern, Selected, parse_pattern
from selected_helper import RULES, SNAP, Reads, kept_positions, read, uniform
from tiny_helper import allocated, random, tiny, tokens

PATTERNS = st.builds(
    Selected,
    st.integers(0, 8),
    st.integers(1, 8),
    st.integers(0, 12),
    share=st.sampled_from([0.0, 0.1, 0.29, 1 / 3, 0.5, 1.0]) | st.floats(0, 1),
    by=st.sampled_from(["observation", SNAP, "random(seed=7)"]),
    split=st.sampled_from(["even", "pooled(floor=0.2)"]),
    grow=st.booleans(),
) | st.builds(Selected, st.just(2), st.just(6), st.just(-8), share=st.floats(0.01, 1))


# the loops: which tokens are kept


def scores_by_hand(pattern, q, k, v):
    """(Kg, n) scores of one row without padding; q (H, N, D), k (Kg, n, D): the equations, a number at a time."""
    name, _, inside = pattern.by.rstrip(")").partition("(")
    options = dict(item.split("=") for item in inside.split(",") if item)
    Kg, n, G = k.shape[0], k.shape[1], q.shape[0] // k.shape[0]
    if name == "key-norm":
        return -k.norm(dim=-1)
    window, kernel = int(options.get("window", 32)), int(options.get("kernel", 7))
    out = torch.zeros(Kg, n)
    for head in range(Kg):
        groups = []
        for g in range(G):
            mass = torch.zeros(n)
            last = range(max(n - window, n - q.shape[1]), n)
            for i in last:
                row = (k[head, : i + 1] @ q[head * G + g, i - n]) / math.sqrt(q.shape[-1])
                mass[: i + 1] += row.softmax(0) / len(last)
            mass[max(0, n - window) :] = 0
            near = [mass[max(0, j - kernel // 2) : j + kernel // 2 + 1] for j in range(n)]
            average = options.get("pool", "max") == "avg"
            groups.append(torch.tensor([float(x.sum() / kernel if average else x.max()) for x in near]))
        joined = torch.stack(groups)
        out[head] = joined.amax(0) if options.get("group") == "max" else joined.mean(0)
    return out * v.norm(dim=-1) if name == "observation-values" else out


def kept_by_hand(pattern, q, k, v):
    """The positions that each kv head keeps of one row, a set a head."""
    Kg, n = k.shape[:2]
    always = {p for p in range(n) if p < pattern.sinks or p >= n - pattern.recent}
    scores = scores_by_hand(pattern, q, k, v)
    rest = [p for p in range(n) if p not in always]
    best = [sorted(rest, key=lambda p, h=h: (-float(scores[h, p]), p)) for h in range(Kg)]
    room = pattern.room(n, Kg)
    if pattern.split == "even":
        return [always | set(order[: room // Kg]) for order in best]
    least = int(room * float(pattern.split.split("floor=")[1].rstrip(")"))) // Kg
    kept = [set(order[:least]) for order in best]
    pool = sorted((-float(scores[h, p]), h, p) for h in range(Kg) for p in best[h][least:])
    for _, h, p in pool[: room - sum(map(len, kept))]:
        kept[h].add(p)
    return [always | tokens for tokens in kept]


@pytest.mark.parametrize("name", [name for name in RULES if name != "random"])
@pytest.mark.parametrize("start", [None, [0, 9, 3]], ids=["dense", "padded"])
def test_a_layer_keeps_and_reads_what_the_loops_say(name, start):
    """Prompt of 20 columns, 3 kv heads of 2 query heads, then 12 single tokens; every output is softmax over the kept set."""
    pattern, first = RULES[name], torch.tensor(start) if start else None
    layer = HeadwiseLayer([(pattern, (0, 1, 2))], dense_prefill=True)
    k, v, q = random(3, 3, 32, 8, seed=0), random(3, 3, 32, 8, seed=1), random(3, 6, 32, 8, seed=2)
    read(layer, q, k, v, 0, 20, first)
    rows = []
    for row in range(3):
        at = start[row] if start else 0
        rows.append(kept_by_hand(pattern, q[row, :, at:20], k[row, :, at:20], v[row, :, at:20]))
        assert kept_positions(layer.stores[0], row) == rows[row]
    for i in range(20, 32):
        out = read(layer, q, k, v, i, i + 1, first)
        for row in range(3):
            at = start[row] if start else 0
            n, edge = i + 1 - at, 20 - at - pattern.recent
            for head in range(3):
                chosen = rows[row][head] if pattern.grow else {p for p in rows[row][head] if p < edge}
                after = 20 - at if pattern.grow else max(edge, n - pattern.recent)
                kept = sorted(chosen | {p for p in range(n) if p >= after or p < pattern.sinks})
                for query in (2 * head, 2 * head + 1):
                    weights = (k[row, head, at:][kept] @ q[row, query, i] * 8**-0.5).softmax(0)
                    torch.testing.assert_close(
                        out[row, query, 0], weights @ v[row, head, at:][kept], atol=2e-5, rtol=1e-5
                    )
    assert layer.nbytes == sum(t.untyped_storage().nbytes() for t in layer.stores[0].tensors())


@pytest.mark.parametrize("name", ["share", "random"])
@pytest.mark.parametrize("start", [None, [0, 11, 3]], ids=["dense", "padded"])
def test_rules_that_look_at_keys_alone_do_not_mind_chunks(name, start):
    """The best k of the best k of a part: whatever the chunks, also with steps of decoding between them, the same are kept."""
    pattern = Selected(1, 3, 6, by=RULES[name].by)
    first = torch.tensor(start) if start else None
    k, v, q = random(3, 2, 30, 8, seed=0), random(3, 2, 30, 8, seed=1), random(3, 2, 30, 8, seed=2)
    found = []
    for cut in ([30], [7, 10, 13], [14, 1, 1, 14]):
        layer, begin = HeadwiseLayer([(pattern, (0, 1))], dense_prefill=True), 0
        for count in cut:
            read(layer, q, k, v, begin, begin + count, first)
            begin += count
        found.append([kept_positions(layer.stores[0], row) for row in range(3)])
    assert found[0] == found[1]
    assert all(len(a) == len(b) for x, y in zip(found[0], found[2], strict=True) for a, b in zip(x, y, strict=True))


def test_random_choices_are_seeded_and_differ_by_head_and_layer():
    def kept(seed, layer=0, batch=1):
        store = HeadwiseLayer([(Selected(0, 1, 10, by=f"random(seed={seed})"), (0, 1))], dense_prefill=True)
        k = random(batch, 2, 40, 8)
        store.update(k, k)
        reads = Reads(k, k, 0, None)
        reads.layer = layer
        store.take(None, reads)
        return kept_positions(store.stores[0], 0)

    assert kept(0) == kept(0, batch=3) and kept(0) != kept(1) and kept(0) != kept(0, layer=1)
    assert kept(0)[0] != kept(0)[1]


# bytes


@pytest.mark.parametrize("split", ["even", "pooled(floor=0.2)"])
def test_bytes_are_those_of_the_plan(split):
    """One row: heads · kept tokens, whoever got them, and 4 bytes a slot for its position; grown by a 64th or 8 slots at most."""
    pattern = Selected(4, 28, -32, share=0.25, by="observation(window=8)", split=split, grow=True)
    plan, n = HeadPlan.uniform(pattern, 2, 4, prefill="dense"), 2000
    k, v, q = (random(1, h, n, 16, seed=s) for s, h in enumerate((4, 4, 8)))
    cache = HeadwiseCache(plan).fill(k, v, q[:, :, -16:])
    formula = int(plan.bytes(n, head_dim=16, dtype=torch.float32).sum())
    assert cache.nbytes == allocated(cache) == formula + 2 * 4 * 500 * 4
    assert plan.kept(n).unique().tolist() == [500] and plan.ratio(n) == 0.25
    sizes = [int(x) for x in cache.layers[0].stores[0].held.split("/")]
    assert (len(set(sizes)) == 1) == (split == "even") and sum(sizes) == (2000 if len(sizes) > 1 else 500)
    for i in range(20):
        for layer in cache.layers:
            layer.update(k[:, :, i : i + 1], v[:, :, i : i + 1])
            layer.take(None)
    assert cache.nbytes == allocated(cache) <= (formula + 2 * 4 * 500 * 4) * 520 / 500 * 1.05


def test_a_prompt_of_keys_alone_cannot_be_rated_by_queries():
    with pytest.raises(PlanError, match="needs queries"):
        HeadwiseCache(uniform(RULES["slides"])).fill(random(1, 2, 30, 8), random(1, 2, 30, 8))


# the pattern as a value


@given(PATTERNS)
def test_patterns_round_trip(pattern):
    assert parse_pattern(str(pattern)) == pattern == Pattern.from_dict(pattern.to_dict())
    assert len({pattern, Pattern.from_dict(pattern.to_dict())}) == 1


@given(PATTERNS, st.integers(0, 60), st.integers(0, 60))
@settings(max_examples=60)
def test_kept_is_what_a_layer_holds(pattern, n, prompt):
    """On average over two heads, rounded down, and by its own count."""
    prompt = min(n, max(1, prompt))
    if n == 0:
        assert pattern.kept(0) == 0
        return
    layer = HeadwiseLayer([(pattern, (0, 1))], dense_prefill=True)
    k = random(1, 2, n, 4)
    read(layer, k, k, k, 0, prompt)
    for i in range(prompt, n):
        read(layer, k, k, k, i, i + 1)
    if pattern.keeps_all:
        assert pattern.kept(n, prompt=prompt) == n == layer.stores[0].length
        return
    held = sum(map(len, kept_positions(layer.stores[0], 0)))
    assert held // 2 == pattern.kept(n, prompt=prompt) <= n


def test_plans_save_load_and_show(tmp_path):
    plan = uniform(RULES["pooled grows"], method="x")
    plan.save(tmp_path / "plan.json")
    assert HeadPlan.load(tmp_path / "plan.json") == plan
    assert "keep(-4+0.5n)" in plan.table(1000) and "0.500" in plan.table(1000)
    assert "pooled(floor=0)" in str(plan)


@pytest.mark.parametrize(
    "make, word",
    [
        (lambda: Selected(-1, 4, 4), "sinks is -1"),
        (lambda: Selected(0, 0, 4), "window is 0"),
        (lambda: Selected(0, 4, -1), "keep is -1"),
        (lambda: Selected(0, 4, 1.5), "keep is 1.5"),
        (lambda: Selected(0, 4, 4, share=1.1), "share is 1.1"),
        (lambda: Selected(0, 4, 4, share=-0.1), "share is -0.1"),
        (lambda: Selected(0, 4, 4, share=math.nan), "share"),
        (lambda: Selected(0, 4, 4, by="Snap KV!"), "by is 'Snap KV!'"),
        (lambda: Selected(0, 4, 4, by=None), "by is None"),
        (lambda: Selected(0, 4, 4, split="pooled(0.2)"), "split is"),
        (lambda: Selected(0, 4, 4, grow=1), "grow is 1"),
        (lambda: Selected(0, 4, 4).reads(torch.tensor([3]), torch.tensor([1])), "by content"),
        (
            lambda: headwise.attention(random(1, 2, 9, 8), *[random(1, 2, 9, 8)] * 2, patterns=Selected(0, 2, 2)),
            "content",
        ),
        (lambda: parse_pattern("sinks4+window4+keep(3)"), "names no pattern"),
        (lambda: parse_pattern("sinks4+window4+keep(3):random+count"), "names no pattern"),
    ],
)
def test_bad_patterns(make, word):
    with pytest.raises(PlanError, match=word):
        make()


@pytest.mark.parametrize(
    "options, word",
    [
        ({"by": "snapkv"}, "there are key-norm, observation, observation-values, random"),
        ({"split": "ada"}, "even, pooled"),
        ({"by": "observation(heads=3)"}, "has the options window, kernel, pool, group"),
        ({"by": "observation(window=1.5)"}, "must be of type int"),
        ({"by": "key-norm(x=1)"}, "has the options none"),
    ],
)
def test_names_that_do_not_exist_are_refused_when_attaching(options, word):
    model = tiny()
    with pytest.raises(PlanError, match=word):
        headwise.attach(model, plan=uniform(Selected(0, 4, 4, **options)))
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize(
    "by", ["observation(pool=min)", "observation(group=sum)", "observation(kernel=4)", "observation(window=0)"]
)
def test_options_out_of_range_are_named(by):
    with pytest.raises(PlanError, match="must be"):
        HeadwiseCache(uniform(Selected(0, 4, 4, by=by))).fill(*[random(1, 2, 30, 8)] * 3)
    split = Selected(0, 4, 4, by="random", split="pooled(floor=2)")
    with pytest.raises(PlanError, match="floor is 2"):
        HeadwiseCache(uniform(split)).fill(*[random(1, 2, 30, 8)] * 3)


def test_a_masked_prefill_is_refused():
    plan = HeadPlan.uniform(Selected(0, 4, 4), 3, 2)
    with pytest.raises(PlanError, match="prefill='dense'"):
        HeadwiseCache(plan)
    with pytest.raises(PlanError, match="prefill='dense'"):
        headwise.attach(tiny(), plan=plan)


def test_a_filled_cache_of_the_models_own_is_refused():
    model, filled = tiny(), DynamicCache(config=tiny().config)
    with torch.no_grad():
        model(tokens(1, 3), past_key_values=filled)
    with headwise.attach(model, plan=uniform(RULES["slides"])), pytest.raises(AttachError, match="already filled"):
        model(tokens(1, 5), past_key_values=filled)
