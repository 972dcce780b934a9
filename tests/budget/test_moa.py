"""MoA: influence against brute force, rules, the integer programme against enumeration, plans that do what they say."""

import itertools

import numpy as np
import pytest
import torch
from moa_helper import calibration, profile
from torch.nn import functional as F

import headwise
from headwise.attach import attach, find_stack
from headwise.budget import Calibration, InfluenceProfile, calibration_set, moa, moa_front, moa_spans, permute_kv_heads
from headwise.budget import _moa_influence as influence
from headwise.budget._moa_calibration import answer_loss
from headwise.budget._moa_rules import Rule
from headwise.errors import ArtifactError, AttachError, HeadwiseError, PlanError, ScoreError, TaskError, UnitError
from headwise.hub import byte_tokenizer, load_model
from headwise.plan import Elastic, Full, HeadPlan
from headwise.units import HeadScores
from tiny_helper import logits, padded, random, state, tiny, tokens

moa_influence = headwise.budget.moa_influence


# influence


class Removed:
    """A transform that takes key j from row i of one head and renormalises; without an address it is plain attention."""

    def __init__(self, layer=-1, head=0, i=0, j=0):
        self.layer, self.head, self.i, self.j = layer, head, i, j
        self.seen = {}

    def __call__(self, call, attend):
        G = call.q.shape[1] // call.k.shape[1]
        k, v = call.k.repeat_interleave(G, 1), call.v.repeat_interleave(G, 1)
        scores = call.q @ k.mT * call.scale
        probs = scores.masked_fill(torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1), -torch.inf).softmax(-1)
        if call.layer == self.layer:
            keep = torch.ones_like(probs)
            keep[:, self.head, self.i, self.j] = 0
            probs = probs * keep / (probs * keep).sum(-1, keepdim=True)
        out = probs @ v
        if not out.requires_grad and torch.is_grad_enabled():
            out.requires_grad_()
        if out.requires_grad:
            out.retain_grad()
        self.seen[call.layer] = call, out, probs
        return out.transpose(1, 2)


def test_influence_is_the_loss_change_to_first_order():
    """In float64, taking away one key of small weight moves the loss as predicted; large ones are beyond first order."""
    model, one = tiny().double().requires_grad_(False), calibration(1, 48, 12)
    ids, answers = one.ids[0], one.answers[0]
    plain = Removed()
    with attach(model, transforms=[plain]), torch.enable_grad():
        base = answer_loss(model, ids, answers)
        base.backward()
    base, generator = float(base.detach()), torch.Generator().manual_seed(1)
    predicted, true = [], []
    for layer, head in itertools.product(range(3), range(4)):
        call, out, probs = plain.seen[layer]
        part = [x.detach() for x in (call.q, call.k, call.v, out, out.grad)]
        signed = influence.influence_rows(*part, 0, call.scale)[0, head]
        small = ((probs[0, head] < 0.01) & (probs[0, head] > 1e-5)).nonzero()
        for i, j in small[torch.randperm(len(small), generator=generator)[:4]].tolist():
            with attach(model, transforms=[Removed(layer, head, i, j)]), torch.no_grad():
                true.append(float(answer_loss(model, ids, answers)) - base)
            predicted.append(float(signed[i, j]))
    assert np.corrcoef(predicted, true)[0, 1] > 0.95
    assert np.polyfit(true, predicted, 1)[0] == pytest.approx(1, abs=0.15)


def test_the_first_row_has_nothing_to_renormalise():
    q, k, v, out, grad = (
        random(1, 2, 4, 8),
        random(1, 1, 4, 8, seed=1),
        random(1, 1, 4, 8, seed=2),
        None,
        random(1, 2, 4, 8, seed=3),
    )
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    signed = influence.influence_rows(q, k, v, out, grad, 0, 8**-0.5)
    assert torch.allclose(signed[0, :, 0, 0], -(grad[0, :, 0] * v[0, 0, 0]).sum(-1), atol=1e-6)
    assert bool((signed.triu(1) == 0).all()) and bool((signed[0, :, 0, 1:] == 0).all())


@pytest.mark.parametrize("entries", [1, 3000, 1 << 22])
def test_block_sums_do_not_depend_on_how_many_rows_are_in_memory(monkeypatch, entries):
    q, grad = random(2, 4, 96, 8), random(2, 4, 96, 8, seed=3)
    k, v = random(2, 2, 96, 8, seed=1), random(2, 2, 96, 8, seed=2)
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    whole = influence.influence_rows(q, k, v, out, grad, 0, 8**-0.5).abs().view(2, 4, 6, 16, 6, 16).sum((3, 5)).mean(0)
    monkeypatch.setattr(influence, "ROWS", entries)
    assert torch.allclose(influence.influence_blocks(q, k, v, out, grad, block=16, scale=8**-0.5), whole, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_profiling_leaves_the_model_as_it_was(dtype):
    model = tiny(dtype=dtype)
    model.train()
    before, wanted = state(model), [p.requires_grad for p in model.parameters()]
    found = moa_influence(model, None, calibration=[calibration(), calibration(1, 128)], block=16)
    assert state(model) == before and model.training and [p.requires_grad for p in model.parameters()] == wanted
    assert all(p.grad is None for p in model.parameters())
    assert found.lengths == [64, 128] and found.maps[128].shape == (3, 4, 8, 8)
    assert all(bool(torch.isfinite(m).all()) and bool((m.triu(1) == 0).all()) for m in found.maps.values())
    assert found.values.shape == (3, 4) and bool((found.values > 0).all())
    found.check(headwise.fingerprint(model))


def test_the_profile_of_a_kv_head_is_the_blockwise_maximum_of_its_group():
    found = moa_influence(tiny(), None, calibration=[calibration()], block=16)
    kv = found.to_kv(2)
    assert torch.equal(kv.maps[64][:, 1], torch.maximum(found.maps[64][:, 2], found.maps[64][:, 3]))
    assert kv.kind == "kv" and kv.values.shape == (3, 2)
    assert isinstance(found.normalized(), HeadScores)


def test_the_mean_of_profiles_is_that_of_their_maps():
    one, two = profile(seed=0), profile(seed=1)
    both = InfluenceProfile.mean([one, two])
    assert torch.allclose(both.maps[512], (one.maps[512] + two.maps[512]) / 2)
    assert torch.allclose(both.values, (one.values + two.values) / 2, atol=1e-4)
    with pytest.raises(UnitError, match="same lengths"):
        InfluenceProfile.mean([one, profile(lengths=(256,))])


def test_a_profile_survives_the_disk(tmp_path):
    found = profile(kind="head")
    found.save(tmp_path / "i.safetensors")
    again = InfluenceProfile.load(tmp_path / "i.safetensors")
    assert again == found and again.block == found.block
    assert all(torch.equal(again.maps[n], found.maps[n]) for n in found.lengths)
    HeadScores(values=torch.ones(2, 2), method="x").save(tmp_path / "s.safetensors")
    with pytest.raises(ArtifactError, match="influence-profile"):
        InfluenceProfile.load(tmp_path / "s.safetensors")


# calibration


def test_answers_are_what_the_model_itself_would_say():
    model, tokenizer = load_model("tiny-random-llama")
    generator = torch.Generator().manual_seed(0)
    one = calibration_set(model, tokenizer, length=512, samples=2, questions=2, answer_tokens=5, generator=generator)
    assert one.ids.shape == (2, 512) and one.answers.sum(1).tolist() == [10, 10]
    said = logits(model, {"input_ids": one.ids}).argmax(-1)
    assert torch.equal(said[:, :-1][one.answers[:, 1:]], one.ids[:, 1:][one.answers[:, 1:]])
    again = calibration_set(
        model,
        tokenizer,
        length=512,
        samples=2,
        questions=2,
        answer_tokens=5,
        generator=torch.Generator().manual_seed(0),
    )
    assert torch.equal(again.ids, one.ids)


# plans


@pytest.mark.parametrize("budget", [0.55, 0.75])
@pytest.mark.parametrize("rules", [1, 2, None])
def test_a_plan_meets_its_budget_everywhere_and_uses_it(budget, rules):
    plan = moa(profile(), budget=str(budget), lengths="1024,2048", rules_per_layer=rules)
    for n in (256, 512, 1024, 2048):
        assert plan.ratio(n) <= budget + 1e-9
        assert plan.ratio(n) >= plan.meta["lowest"] * budget - 1e-9
    assert rules is None or all(len(plan.groups(layer)) <= rules for layer in range(2))
    assert plan.method == "moa" and plan.prefill == "masked"


def test_heads_that_look_far_get_the_long_spans():
    found = profile(layers=4, heads=4, seed=2)
    plan = moa(found, budget="50%", rules_per_layer=None)
    span = HeadScores(values=plan.kept(512).float(), kind="kv", method="span")
    assert found.rank_correlation(span) > 0.5


def test_spans_grow_beyond_what_was_profiled():
    plan = moa(profile(), budget="50%", lengths="1024,4096")
    assert bool((plan.kept(16384).sum() > 2 * plan.kept(4096).sum() / 1.1).item())


def test_tokens_and_bytes_are_budgets_too():
    plan = moa(profile(), budget="200tok", lengths="512")
    assert plan.kept(512).double().mean() <= 200
    same = moa(profile(), budget=f"{200 * 8 * 2 * 16 * 2}B", lengths="512", head_dim=16)
    assert same.patterns == plan.patterns
    with pytest.raises(PlanError, match="head_dim"):
        moa(profile(), budget="1MiB")


def test_the_front_is_bounded_and_validated_by_a_model():
    model = tiny()
    found = moa_influence(model, None, calibration=[calibration(1, 64), calibration(1, 128)], block=16)
    front = moa_front(found, budget="60%", lengths=[256], intervals=2)
    assert all(plan.ratio(n) <= 0.6 for plan in front.plans for n in (64, 128, 256))
    means = [sum(row) / len(row) for row in front.losses]
    assert means == sorted(means) and len(front) == len(front.losses)
    best, losses = front.validated(model, calibration(1, 192, seed=5))
    assert best in front.plans and min(losses) == losses[front.plans.index(best)]
    assert state(model) == state(tiny())
    assert moa(found, budget="60%", lengths="256", intervals=2) == front.plans[0]


def test_the_front_can_be_drawn():
    pytest.importorskip("plotly")
    figure = moa_front(profile(), budget="60%", intervals=2).figure()
    assert len(figure.data[0].x) >= 1 and figure.layout.yaxis.title.text == "at 512 tokens"


def test_the_rule_that_keeps_all_is_dense():
    model, batch = tiny(), {"input_ids": tokens(2, 100)}
    with attach(model, plan=HeadPlan.uniform(Rule(0, 1.0).pattern(64, 64), 3, 2)):
        assert torch.allclose(logits(model, batch), logits(tiny(), batch), atol=1e-5)


def test_decoding_under_a_plan_is_masked_attention_for_padded_rows():
    model, batch = tiny(), padded([150, 97])
    found = moa_influence(model, None, calibration=[calibration(1, 64), calibration(1, 128)], block=16)
    elastic = moa(found, budget="50%", lengths="256")
    assert elastic.ratio(150) < 0.8
    for plan in (elastic, moa_spans(elastic, 150, multiple=16, least=32)):
        with torch.no_grad(), attach(model, plan=plan):
            whole, cache, parts = model(**batch, use_cache=False).logits, headwise.HeadwiseCache(plan), []
            for begin, end in [(0, 70), *((i, i + 1) for i in range(70, 150))]:
                piece = {name: x[:, begin:end] for name, x in batch.items()} | {
                    "attention_mask": batch["attention_mask"][:, :end]
                }
                parts.append(model(**piece, past_key_values=cache).logits)
        stepped = torch.cat(parts, 1)
        assert torch.allclose(stepped[0], whole[0], atol=1e-4) and torch.allclose(
            stepped[1, 53:], whole[1, 53:], atol=1e-4
        )


def test_a_permuted_model_with_a_permuted_plan_is_the_same():
    model, ids = tiny(), tokens(1, 120)
    rules = Elastic(4, 0, 0.25), Full()
    plan = HeadPlan(patterns=(rules, rules[::-1], rules), method="moa")
    with attach(model, plan=plan):
        before = logits(model, {"input_ids": ids})
    permuted, _ = permute_kv_heads(model, plan)
    assert permuted.patterns != plan.patterns
    with attach(model, plan=permuted):
        assert torch.allclose(logits(model, {"input_ids": ids}), before, atol=1e-4)


# bad input


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"budget": "10%"}, "the shortest rule keeps 0.5 of them"),
        ({"budget": "0"}, "budget"),
        ({"lengths": "many"}, "lengths is 'many'"),
        ({"rules_per_layer": 0}, "rules_per_layer is 0"),
        ({"lowest": 2.0}, "lowest is 2.0"),
        ({"betas": 1}, "betas is 1"),
        ({"alpha_step": 0}, "alpha_step is 0"),
        ({"intervals": -1}, "intervals is -1"),
    ],
)
def test_what_cannot_be_planned_is_named(options, text):
    with pytest.raises(PlanError, match=text):
        moa(profile(), **options)


def test_tables_that_are_no_profile():
    with pytest.raises(PlanError, match="InfluenceProfile"):
        moa(HeadScores(values=torch.ones(2, 2), kind="kv", method="x"))
    with pytest.raises(PlanError, match="kv_heads="):
        moa(profile(kind="head"))
    with pytest.raises(UnitError, match=r"maps\[256\]"):
        InfluenceProfile.of({256: torch.ones(1, 2, 4, 3)}, 64)
    with pytest.raises(UnitError, match="negative"):
        InfluenceProfile.of({256: -torch.ones(1, 2, 4, 4)}, 64)
    assert moa(profile(kind="head"), kv_heads=2, budget="75%").kv_heads == 2


@pytest.mark.parametrize("lengths", ["", "a,b", "100", "64", "256,256", "8192", "-64"])
def test_lengths_that_cannot_be_profiled(lengths):
    with pytest.raises(ScoreError, match="lengths is"):
        moa_influence(tiny(), byte_tokenizer(), lengths=lengths)


def test_models_and_samples_that_cannot_be_profiled():
    with pytest.raises(TaskError, match="calibration="):
        moa_influence(tiny("bert"), byte_tokenizer(), lengths="256")
    model, batch = tiny(), padded([40, 20])
    with (
        attach(model, transforms=[influence.InfluenceProbe(3, 16)]),
        pytest.raises(AttachError, match="without padding"),
    ):
        model(**batch)
    with pytest.raises(TaskError, match="too short"):
        moa_influence(tiny(), byte_tokenizer(), lengths="128")
    with pytest.raises(TaskError, match="at least one answer token"):
        Calibration(tokens(1, 8), torch.zeros(1, 8, dtype=torch.bool))
    with pytest.raises(HeadwiseError):
        find_stack(torch.nn.Linear(2, 2))
