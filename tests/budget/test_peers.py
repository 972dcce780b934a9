"""Every planner that needs no more than a model, or scores of heads: budgets are met, memory falls, and rows are what they are alone."""

import json
from pathlib import Path

import pytest
import torch

import headwise
from headwise import Budget, Full, HeadPlan, HeadwiseCache
from headwise.budget import adakv, full, headkv, pyramidkv, random, snapkv, streaming_llm, task_kv
from headwise.budget._amounts import deal
from headwise.errors import PlanError
from headwise.plan import Elastic, Selected, SinkWindow
from headwise.registry import methods
from headwise.units import Fingerprint, HeadScores
from tiny_helper import allocated, generate, logits, padded, tiny, tokens

LLAMA = Fingerprint(architecture="llama", config_hash="0", layers=4, heads=16, kv_heads=8)
SMALL = {"window": 4, "by": "observation(window=4,kernel=3)"}


def scores(layers=3, kv_heads=2, seed=0, fingerprint=None):
    values = torch.rand(layers, kv_heads, generator=torch.Generator().manual_seed(seed))
    return HeadScores(values=values, kind="kv", method="retrieval", fingerprint=fingerprint)


def scores_of(model):
    made_for = headwise.fingerprint(model)
    return scores(made_for.layers, made_for.kv_heads, fingerprint=made_for)


def small_plans(model):
    """Each planner at half the cache, with windows fit for texts of 40 tokens."""
    return {
        "adakv": adakv(model, budget="50%", floor=0.1, **SMALL),
        "headkv": headkv(scores_of(model), budget="50%", **SMALL),
        "pyramidkv": pyramidkv(model, budget="50%", **SMALL),
        "random": random(model, budget="50%", sinks=2, window=4),
        "snapkv": snapkv(model, budget="50%", window=4, kernel=3),
        "streaming-llm": streaming_llm(model, budget="50%", sinks=2),
    } | _of_three_kv_heads(model)


def _of_three_kv_heads(model):
    if headwise.fingerprint(model).kv_heads < 3:
        return {}
    options = {"beta": 0.3, "m": 1, "closest": False, "tokens": 8, "window": 4, "sinks": 2, "recent": 6}
    return {"task-kv": task_kv(model, budget="50%", context=40, **options)}


NAMES = sorted(small_plans(tiny("gpt2")))


def case(name):
    """A model, and the plan of this name for it."""
    model = tiny("gpt2" if name == "task-kv" else "llama")
    return model, small_plans(model)[name]


def test_the_list_is_whole():
    """Every planner that takes a model alone is in this matrix, or has a test file of its own."""
    of_a_model = {m.name for m in methods("budget") if m.leading[0].name == "model"} - {*NAMES, "full"}
    assert [
        name for name in of_a_model if not list(Path(__file__).parent.glob(f"test_{name.replace('-', '_')}*"))
    ] == []


@pytest.mark.parametrize("name", NAMES)
def test_memory_falls_to_the_budget(name):
    """80 tokens at half: the tensors are at most what the plan says for one row, and positions; far below the dense cache."""
    (model, plan), n = case(name), 80
    with headwise.attach(model, plan=plan), torch.no_grad():
        cache = model(tokens(1, n)).past_key_values
    dims = headwise.find_stack(model).head_dim
    wanted = plan.bytes(n, head_dim=dims, dtype=torch.float32)
    slots = plan.slots(n).sum(1)
    for layer, allowed, count in zip(cache.layers, wanted.tolist(), slots.tolist(), strict=True):
        assert allowed * 0.97 <= layer.nbytes <= allowed + 4 * count + 64
    assert cache.nbytes == allocated(cache)
    assert 0.48 <= plan.ratio(n) <= (0.51 if name == "pyramidkv" else 0.5)  # its last layers keep their window


@pytest.mark.parametrize("name", NAMES)
def test_rows_of_a_padded_batch_are_the_rows_alone(name):
    (model, plan), batch = case(name), padded([40, 25, 7])
    with headwise.attach(model, plan=plan):
        both = generate(model, batch, 6)
        for row, first in ((1, 15), (2, 33)):
            alone = generate(model, {"input_ids": batch["input_ids"][row : row + 1, first:]}, 6)
            assert torch.equal(both[row, -6:], alone[0, -6:])


@pytest.mark.parametrize("name", NAMES)
def test_plans_are_saved_fit_their_model_and_no_other(name, tmp_path):
    model, plan = case(name)
    plan.save(tmp_path / "plan.json")
    assert HeadPlan.load(tmp_path / "plan.json") == plan and plan.method == name
    plan.check(headwise.fingerprint(model))
    with pytest.raises(headwise.HeadwiseError):
        headwise.attach(tiny("mistral"), plan=plan)


@pytest.mark.parametrize("name", ["snapkv", "adakv", "pyramidkv", "random"])
def test_the_whole_budget_is_the_dense_model(name):
    model, batch = tiny(), padded([40, 25])
    plan = methods("budget")[[m.name for m in methods("budget")].index(name)](model, budget="100%")
    assert plan.full_heads() == full(model).full_heads()
    with headwise.attach(model, plan=plan):
        got = logits(model, batch)
    real = batch["attention_mask"].bool()
    torch.testing.assert_close(got[real], logits(model, batch)[real], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("budget, tokens_", [("25%", 1024), ("600tok", 600), (f"{64 * 2**20}B", 1024)])
def test_one_budget_in_three_words(budget, tokens_):
    """Tokens at 4096; bytes need the model, whose 8 · 4 · 2 · 128 · 2 bytes make a token."""
    shape = headwise.budget._amounts.Shape(LLAMA, head_dim=128, dtype_bytes=2)
    amount = headwise.budget._amounts.Amount.of(budget, shape, batch=4)
    wanted = 64 * 2**20 // (8 * 4 * 2 * 128 * 2 * 4) if budget.endswith("B") else tokens_
    assert amount.selected(4, 60).kept(4096) == wanted
    model = tiny()
    made = snapkv(model, budget=f"{2**20}B", batch=2)
    dims = headwise.find_stack(model).head_dim
    assert int(made.bytes(2000, head_dim=dims, dtype=torch.float32, batch=2).sum()) <= 2**20


def test_patterns_are_the_papers():
    assert streaming_llm(LLAMA, budget="512tok").patterns[0][0] == SinkWindow(4, 508)
    assert streaming_llm(LLAMA, budget=Budget.ratio(0.25), sinks=0).patterns[0][0] == Elastic(0, 0, 0.25)
    snap = snapkv(LLAMA, budget="512tok").patterns[0][0]
    assert snap == Selected(0, 32, 480, by="observation(window=32,kernel=7,pool=max)", grow=True)
    assert adakv(LLAMA, budget="512tok", floor=1).patterns[0][0].split == "pooled(floor=1)"
    assert random(LLAMA, seed=3).patterns[0][0].by == "random(seed=3)"
    assert full(LLAMA).patterns == ((Full(),) * 8,) * 4


@pytest.mark.parametrize("budget, n", [("25%", 4096), ("80%", 4096), ("512tok", 4096), ("40tok", 4096)])
@pytest.mark.parametrize("beta", [1, 2, 20])
def test_a_pyramid_falls_and_keeps_its_budget(budget, n, beta):
    plan = pyramidkv(LLAMA, budget=budget, beta=beta)
    kept = plan.kept(n)[:, 0].tolist()
    mean = {"25%": 1024, "80%": 0.8 * n, "512tok": 512, "40tok": 40}[budget]
    assert kept == sorted(kept, reverse=True) and mean - 2 <= sum(kept) / 4 <= mean
    assert beta == 1 or kept[0] > kept[-1]
    assert max(kept) <= n


@pytest.mark.parametrize("budget, mean", [("25%", 1024), ("90%", 3686.4), ("512tok", 512)])
@pytest.mark.parametrize("beta", [1.0, 1.2, 4.0])
def test_headkv_deals_by_score(budget, mean, beta):
    table = scores(4, 8, fingerprint=LLAMA)
    kept = headkv(table, budget=budget, beta=beta).kept(4096).flatten()
    assert mean - 2 <= kept.double().mean() <= mean
    order = table.values.flatten().argsort()
    assert (kept[order].diff() >= -1).all() and kept.max() > kept.min()


def test_headkv_with_one_head_that_does_everything():
    values = torch.zeros(4, 8)
    values[1, 2] = 5.0
    kept = headkv(HeadScores(values=values, kind="kv", method="x"), budget="25%", beta=1.0).kept(4096)
    assert kept[1, 2] == 4096 and 1022 <= kept.double().mean() <= 1024
    heads = HeadScores(values=torch.rand(4, 16), method="x", fingerprint=LLAMA)
    assert headkv(heads).kept(4096).shape == (4, 8)


@pytest.mark.parametrize("weights", [[1, 1, 1], [5, 0, 0], [0, 0, 0], [3, 2, 1], [1e-9, 1, 1e9]])
@pytest.mark.parametrize(
    "mean, least, most", [(0.25, 0.1, 1.0), (0.9, 0.5, 1.0), (1.0, 0.2, 1.0), (50, 10, float("inf"))]
)
def test_dealing_meets_the_mean_and_the_bounds(weights, mean, least, most):
    out = deal(weights, mean, least, most)
    assert sum(out) / 3 == pytest.approx(mean, abs=1e-6)
    assert all(least - 1e-9 <= x <= most + 1e-9 for x in out)


@pytest.mark.parametrize(
    "call, word",
    [
        (lambda: snapkv("smollm2"), "model is a str"),
        (lambda: snapkv(LLAMA, budget="0"), "budget"),
        (lambda: snapkv(LLAMA, budget=0.25j), "no budget|budget is"),
        (lambda: snapkv(LLAMA, budget="16tok"), "window of 32 are 32"),
        (lambda: snapkv(LLAMA, budget="64MiB"), "needs the model itself"),
        (lambda: snapkv(LLAMA, window=0), "window is 0"),
        (lambda: streaming_llm(LLAMA, budget="4tok"), "4 are sinks"),
        (lambda: streaming_llm(LLAMA, sinks=-1), "sinks is -1"),
        (lambda: adakv(LLAMA, floor=1.5), "floor is 1.5"),
        (lambda: adakv(LLAMA, by="Best keys"), "by is 'Best keys'"),
        (lambda: pyramidkv(LLAMA, beta=0.5), "beta is 0.5"),
        (lambda: headkv(scores(), beta=0.0), "beta is 0.0"),
        (lambda: headkv("scores.safetensors"), "must be HeadScores"),
        (lambda: headkv(HeadScores(values=torch.rand(2, 4), method="x")), "does not know its model"),
        (lambda: headkv(scores(), budget="16tok"), "raise the budget"),
        (lambda: random(LLAMA, seed=-1), "seed is -1"),
    ],
)
def test_what_cannot_be_planned_is_named(call, word):
    with pytest.raises(PlanError, match=word):
        call()


def test_caches_made_by_hand_are_the_same():
    model = tiny()
    plan = adakv(model, budget="50%", **SMALL)
    with headwise.attach(model, plan=plan):
        mine = generate(model, padded([40, 25]), 5, past_key_values=HeadwiseCache(plan))
        assert torch.equal(mine, generate(model, padded([40, 25]), 5))


@pytest.mark.smollm2
@pytest.mark.slow
@pytest.mark.parametrize("name", ["snapkv", "adakv"])
def test_a_quarter_of_the_cache_answers_passkeys_in_a_padded_batch(name):
    """Two prompts of unequal length, plain `generate`; the bytes are a quarter of the dense cache, and a few tokens' growth."""
    from headwise.tasks import make_passkey

    model, tokenizer = headwise.load_model("smollm2", dtype="bfloat16")
    generator = torch.Generator().manual_seed(3)
    made = [make_passkey(tokenizer, length=n, depth=d, generator=generator) for n, d in ((1024, 0.3), (700, 0.5))]
    inputs = tokenizer([p.text for p in made], return_tensors="pt", padding=True)
    plan = {"snapkv": snapkv, "adakv": adakv}[name](model, budget="25%")
    with headwise.attach(model, plan=plan), torch.no_grad():
        out = model.generate(**inputs, max_new_tokens=6, do_sample=False, return_dict_in_generate=True)
    width = inputs["input_ids"].shape[1]
    texts = tokenizer.batch_decode(out.sequences[:, width:])
    assert [t[:5] for t in texts] == [p.meta["key"] for p in made]
    dense = full(model).bytes(width, head_dim=64, dtype=torch.bfloat16, batch=2).sum()
    assert out.past_key_values.nbytes < 0.29 * dense


def test_the_command_line_plans_from_a_model_and_tells_bytes(capsys, tmp_path):
    from headwise.cli import main

    file = tmp_path / "plan.json"
    with pytest.raises(SystemExit) as left:
        main(["plan", "adakv", "--model", "tiny-random-llama", "--budget", "50%", "-o", str(file), "--json"])
    assert not left.value.code
    data = json.loads(capsys.readouterr().out)
    plan = HeadPlan.load(file)
    assert plan == adakv(tiny(), budget="50%")
    dims = headwise.find_stack(tiny()).head_dim
    assert data["layer_bytes"]["8192"] == plan.bytes(8192, head_dim=dims, dtype=torch.float32).tolist()
