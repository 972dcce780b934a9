"""Task-KV: semantic vectors, the choice of heads, budgets to the slot, and parity with the nine steps written as loops."""

import math

import pytest
import torch

import headwise
from headwise.attention.groups import KVGroup, Queries
from headwise.budget import task_kv
from headwise.budget._semantic import distance_table, distances, far_heads, joined, rounded, semantic_vectors
from headwise.cache import HeadwiseLayer
from headwise.errors import PlanError, ScoreError
from headwise.keyscores import Ask
from headwise.plan import Selected
from headwise.score import semantic_distance
from headwise.units import Fingerprint
from tiny_helper import generate, logits, oracle, padded, random, tiny, tokens

LLAMA = Fingerprint(architecture="llama", config_hash="0", layers=32, heads=32, kv_heads=32)
MISTRAL = Fingerprint(architecture="mistral", config_hash="0", layers=32, heads=32, kv_heads=8)


def ask_of(q, k, v, **more):
    group = KVGroup(tuple(range(k.shape[1])), k, v)
    queries = Queries(q.shape[2], k.shape[2] - q.shape[2], more.pop("start", None))
    seen = more.pop("seen", (k.shape[2],) * k.shape[0])
    return Ask(q, group, queries, k.shape[-1] ** -0.5, 0, Selected(0, 1, 0), seen)


# semantic vectors


@pytest.mark.parametrize("group_size", [1, 2])
def test_all_tokens_and_all_queries_give_the_exact_vector(group_size):
    """(1/N) Σ_i A[i, :] V over the whole causal matrix."""
    k, v, q = random(2, 3, 50, 8), random(2, 3, 50, 8, seed=1), random(2, 3 * group_size, 50, 8, seed=2)
    got = semantic_vectors(joined(ask_of(q, k, v).masses(50), "mean"), v, 50)
    rows = headwise.attention(q, k, v).view(2, 3, group_size, 50, 8)
    torch.testing.assert_close(got, rows.mean((2, 3)), atol=1e-5, rtol=0)


def test_equal_heads_are_equally_far_and_a_shifted_one_is_farthest():
    k, v, q = random(1, 1, 40, 8), random(1, 1, 40, 8, seed=1), random(1, 1, 40, 8, seed=2)
    k, v, q = (x.expand(1, 4, -1, -1).clone() for x in (k, v, q))
    far = distances(semantic_vectors(joined(ask_of(q, k, v).masses(8), "mean"), v, 16))
    torch.testing.assert_close(far, far[:, :1].expand_as(far), atol=1e-6, rtol=0)
    v[:, 2] += 3.0
    vectors = semantic_vectors(joined(ask_of(q, k, v).masses(8), "mean"), v, 16)
    assert int(distances(vectors).argmax()) == 2
    torch.testing.assert_close(distances(vectors * 5, "cosine"), distances(vectors, "cosine"), atol=1e-6, rtol=0)


def test_the_number_of_heads_falls_linearly():
    assert [far_heads(r, 32, 32, 0.25, 4) for r in (0, 31)] == [8, 4]
    assert far_heads(15, 32, 32, 0.25, 4) == pytest.approx(6.06, abs=0.01)
    assert sum(far_heads(r, 32, 32, 0.25, 4) for r in range(32)) == pytest.approx(192)
    assert sum(far_heads(r, 32, 8, 0.3, 1) for r in range(32)) == pytest.approx(54.4)
    assert far_heads(0, 1, 8, 0.5, 1) == 4
    assert [rounded(x) for x in (0.4, 0.5, 1.5, 2.49)] == [0, 1, 2, 2]


# the nine steps as loops


def by_hand(q, k, v, f, ratio, s1, s2, L, t, closest=True):
    """Kept indices of every head, a list a head; q, k, v (n, N, D) of one prompt, one query head a kv head."""
    n, N, D = k.shape
    columns, vectors = [], []
    for h in range(n):
        c = torch.zeros(N)
        for i in range(N - min(L, N), N):
            c[: i + 1] += ((k[h, : i + 1] @ q[h, i]) / math.sqrt(D)).softmax(0)
        c /= min(L, N)
        best = c.argsort(descending=True)[: min(t, N)]
        columns.append(c)
        vectors.append(sum(c[j] * v[h, j] for j in best))
    centre = sum(vectors) / n
    order = sorted(range(n), key=lambda h: -float((vectors[h] - centre).norm()))
    n_full = min(n, rounded(f) + int(closest))
    whole = order[: min(n, rounded(f))] + (order[-1:] if closest and rounded(f) < n else [])
    assert len(whole) == n_full
    B = int(ratio * n * N + 1e-9)
    k_mid = 0 if n_full == n else (B - N * n_full) // (n - n_full) - s1 - s2
    kept = []
    for h in range(n):
        if h in whole:
            kept.append(list(range(N)))
            continue
        pooled = [float(columns[h][max(0, j - 3) : j + 4].sum()) / 7 for j in range(N)]
        middle = sorted(range(s1, N - s2), key=lambda j, p=pooled: (-p[j], j))[: max(0, min(k_mid, N - s1 - s2))]
        kept.append(sorted([*range(s1), *middle, *range(N - s2, N)]))
    return kept


class Reads:
    layer, scale = 0, 8**-0.5

    def __init__(self, q, k, start=None):
        self.q, self.k, self.start = q, k, start

    def queries(self):
        return Queries(self.q.shape[2], 0, self.start)


def held(layer, row):
    found = {}
    for part in layer.stores[0].parts:
        for place, head in enumerate(part.heads):
            at = part.positions[row, place, : part.length]
            found[head] = at[at >= 0].tolist()
    return [found[h] for h in sorted(found)]


@pytest.mark.parametrize(
    "ratio, beta, closest", [(0.5, 0.25, True), (0.7, 0.5, True), (0.4, 0.3, False), (1.0, 0.25, True)]
)
@pytest.mark.parametrize("pads", [0, 13])
def test_parity_with_the_loops(ratio, beta, closest, pads):
    """n = 8, N = 300, L = 16, t = 64; two rows, the second behind a prefix of padding, which changes nothing."""
    n, N = 8, 300
    shape = Fingerprint(architecture="x", config_hash="0", layers=1, heads=n, kv_heads=n)
    plan = task_kv(
        shape,
        budget=f"{ratio:.0%}",
        beta=beta,
        m=1,
        closest=closest,
        tokens=64,
        window=16,
        sinks=4,
        recent=24,
        context=N,
    )
    q, k, v = (random(2, n, N + pads, 8, seed=s) for s in range(3))
    start = torch.tensor([0, pads]) if pads else None
    layer = HeadwiseLayer([(plan.patterns[0][0], tuple(range(n)))], dense_prefill=True)
    layer.update(k, v)
    layer.take(start, Reads(q, k, start))
    if ratio == 1:
        assert plan.patterns[0][0].keeps_all and layer.stores[0].length == N + pads
        return
    for row in (0, 1):
        first = pads if row else 0
        f = n * beta
        want = by_hand(*(x[row, :, first:] for x in (q, k, v)), f, ratio, 4, 24, 16, 64, closest)
        assert held(layer, row) == want
        B, n_full, length = int(ratio * n * (N + pads - first)), min(n, rounded(f) + closest), N + pads - first
        assert 0 <= B - sum(map(len, want)) <= n - n_full
        for kept in want:
            assert kept == sorted(set(kept)) and kept[:4] == [0, 1, 2, 3]
            assert kept[-24:] == list(range(length - 24, length))


def test_permuting_the_heads_permutes_the_choice():
    n, N = 6, 200
    shape = Fingerprint(architecture="x", config_hash="0", layers=1, heads=n, kv_heads=n)
    pattern = task_kv(shape, budget="60%", beta=0.3, m=1, tokens=32, window=8, sinks=4, recent=16, context=N).patterns[
        0
    ][0]
    q, k, v = (random(1, n, N, 8, seed=s) for s in range(3))
    order, found = torch.randperm(n, generator=torch.Generator().manual_seed(1)), []
    for heads in (torch.arange(n), order):
        layer = HeadwiseLayer([(pattern, tuple(range(n)))], dense_prefill=True)
        layer.update(k[:, heads], v[:, heads])
        layer.take(None, Reads(q[:, heads], k[:, heads]))
        found.append(held(layer, 0))
    assert found[1] == [found[0][h] for h in order.tolist()]


def test_the_budget_is_that_of_the_paper():
    """Llama-2-7B at 8192 tokens and 40 %: middle tokens 1366 with 8 whole heads of 32 in the first layer, 2302 with 4 in the last."""
    plan = task_kv(LLAMA, budget="40%", beta=0.25, m=4, closest=False)
    assert [int(p.split.split("heads=")[1].split(",")[0]) for p in (plan.patterns[r][0] for r in (0, 15, 31))] == [
        8,
        6,
        4,
    ]
    for layer, full, middle in ((0, 8, 1366), (15, 6, 1870), (31, 4, 2302)):
        pattern = plan.patterns[layer][0]
        room = pattern.room(8192, 32)
        assert (room - full * (8192 - 272)) // (32 - full) == middle
    assert plan.ratio(8192) == pytest.approx(0.4, abs=1e-4)


def test_two_kv_heads_are_too_few():
    with pytest.raises(PlanError, match="2 kv heads.*equally far"):
        task_kv(tiny())


def test_too_small_a_budget_names_the_least():
    with pytest.raises(PlanError, match=r"layer 0 keeps 8 of 32.*at least 0.2749") as caught:
        task_kv(LLAMA, budget="20%", beta=0.25, m=4, closest=False)
    assert "8192 tokens" in str(caught.value)
    with pytest.raises(PlanError, match=r"at least 0.323|at least 0.27"):
        task_kv(MISTRAL, budget="26%", beta=0.3, m=1, closest=False)


@pytest.mark.parametrize(
    "options, word",
    [
        ({"beta": 1.2}, "beta is 1.2"),
        ({"beta": -0.1}, "beta is -0.1"),
        ({"m": 9}, "m is 9"),
        ({"m": -1}, "m is -1"),
        ({"window": 0}, "window is 0"),
        ({"tokens": 0}, "tokens is 0"),
        ({"sinks": -1}, "sinks is -1"),
        ({"recent": 0}, "window is 0"),
        ({"budget": "100tok"}, "256"),
        ({"budget": "0"}, "budget"),
        ({"context": 0}, "context is 0"),
    ],
)
def test_bad_options(options, word):
    with pytest.raises(PlanError, match=word):
        task_kv(MISTRAL, **options)


# through a model


def small(model, **options):
    given = {"budget": "70%", "beta": 0.3, "m": 1, "closest": False, "tokens": 8, "window": 4, "sinks": 2, "recent": 6}
    return task_kv(model, **(given | {"context": 40} | options))


def test_windows_and_token_counts_beyond_the_text_are_those_of_the_text():
    model = tiny("gpt2")
    with headwise.attach(model, plan=small(model, window=500, tokens=10_000)):
        assert generate(model, padded([40, 12]), 4).shape == (2, 44)


def test_a_short_prompt_is_left_untouched_and_a_middling_one_keeps_fewer_whole():
    model, plan = tiny("gpt2"), small(tiny("gpt2"))
    with headwise.attach(model, plan=plan), torch.no_grad():
        out = model(tokens(1, 8))
        assert out.past_key_values.layers[0].stores[0].held == "8"
        torch.testing.assert_close(out.logits, logits(model, {"input_ids": tokens(1, 8)}))
        cache = model(tokens(1, 12)).past_key_values
    assert all(sum(map(len, held(layer, 0))) <= int(0.7 * 4 * 12) for layer in cache.layers)


def test_rows_choose_for_themselves():
    """A batch with padding: the heads that stay whole are those of each row alone, and differ between rows."""
    model, plan, batch = tiny("gpt2"), small(tiny("gpt2")), padded([40, 29, 35, 33])
    with headwise.attach(model, plan=plan), torch.no_grad():
        cache = model(**batch).past_key_values
        for row, first in enumerate((0, 11, 5, 7)):
            alone = model(batch["input_ids"][row : row + 1, first:]).past_key_values
            for mine, theirs in zip(cache.layers, alone.layers, strict=True):
                assert held(mine, row) == held(theirs, 0)
    choices = {
        tuple(len(kept) == n for kept in held(layer, row))
        for layer in cache.layers
        for row, n in enumerate((40, 29, 35, 33))
    }
    assert len(choices) > 1


class Kept:
    """One kv head of the oracle: the prompt densely, then what was kept of it in each row, and everything behind it."""

    def __init__(self, sets, prompt):
        self.sets, self.prompt = [torch.tensor(sorted(one)) for one in sets], prompt[:, None, None, None]

    def reads(self, q_pos, k_pos):
        chosen = torch.stack([torch.isin(k_pos[row], one) for row, one in enumerate(self.sets)])
        return (k_pos >= 0) & (k_pos <= q_pos) & (chosen | (k_pos >= self.prompt) | (q_pos < self.prompt))


def test_fifty_tokens_behind_the_prompt_read_the_kept_set_of_their_row_and_head():
    """Against dense attention of the model with its own whole cache, masked to what was held when the prompt had been read."""
    model, plan, n, new = tiny("gpt2"), small(tiny("gpt2")), 40, 50
    batch = padded([n + new, 29 + new])
    prompt = torch.tensor([n, 29])
    with headwise.attach(model, plan=plan), torch.no_grad():
        first = model(**{name: x[:, :n] for name, x in batch.items()})
        cache, got = first.past_key_values, []
        sets = [[held(layer, row) for row in (0, 1)] for layer in cache.layers]
        for at in range(n, n + new):
            one = {name: x[:, at : at + 1] for name, x in batch.items()} | {
                "attention_mask": batch["attention_mask"][:, : at + 1]
            }
            got.append(model(**one, past_key_values=cache).logits)
    assert any(len(kept) < n for row in sets[0] for kept in row)
    patterns = [[Kept([row[h] for row in layer], prompt) for h in range(4)] for layer in sets]
    with oracle(model, patterns=patterns, start=torch.tensor([0, n - 29])), torch.no_grad():
        want = model(**batch, use_cache=False).logits[:, n:]
    torch.testing.assert_close(torch.cat(got, 1), want, atol=2e-4, rtol=1e-3)


def test_controls_choose_other_heads():
    n, N = 8, 120
    q, k, v = (random(1, n, N, 8, seed=s) for s in range(3))
    found = {}
    for order in ("far", "near", "random"):
        split = f"spread(heads=2,closest=0,tokens=32,window=8,order={order})"
        layer = HeadwiseLayer([(Selected(2, 8, -10, share=0.5, split=split), tuple(range(n)))], dense_prefill=True)
        layer.update(k, v)
        layer.take(None, Reads(q, k))
        found[order] = {h for h, kept in enumerate(held(layer, 0)) if len(kept) == N}
    assert all(len(heads) == 2 for heads in found.values()) and not found["far"] & found["near"]
    assert found["random"] != found["far"]


@pytest.mark.parametrize("option", ["metric=dot", "group=sum", "order=up"])
def test_options_of_the_split_are_checked(option):
    split = f"spread(heads=1,window=4,{option})"
    cache = headwise.HeadwiseCache(headwise.HeadPlan.uniform(Selected(0, 4, 4, split=split), 1, 2, prefill="dense"))
    with pytest.raises(PlanError, match="must be"):
        cache.fill(*[random(1, 2, 30, 8)] * 3)


# the score


def test_distances_of_a_padded_batch_are_those_of_its_rows():
    model, batch = tiny(), padded([40, 25])
    both = distance_table(model, batch["input_ids"], batch["attention_mask"], window=8)
    alone = distance_table(model, batch["input_ids"][1:, 15:], window=8)
    torch.testing.assert_close(both[1:], alone, atol=1e-5, rtol=1e-4)
    assert both.shape == (2, 3, 2)


def test_the_score_of_a_model():
    model, tokenizer = headwise.load_model("tiny-random-llama")
    one = semantic_distance(model, tokenizer, prompts=2, length=300, seed=1)
    assert one.kind == "kv" and one.values.shape == (3, 2) and (one.values >= 0).all()
    assert one == semantic_distance(model, tokenizer, prompts=2, length=300, seed=1)
    torch.testing.assert_close(one.values[:, 0], one.values[:, 1])  # two heads are equally far from their mean
    with pytest.raises(ScoreError, match="text is empty"):
        semantic_distance(model, tokenizer, text="")
