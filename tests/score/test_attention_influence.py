"""AttentionInfluence: exact heads on a wired model, scores that equal two separate passes, and selection to a budget."""

import copy
import math

import pytest
import torch
from torch.nn import functional as F

import headwise
from handwired import INDUCTION, VOCAB, handwired_induction
from headwise.attach.observe import observe
from headwise.errors import ScoreError, TaskError, UnitError
from headwise.hub import load_model
from headwise.score import InfluenceScorer, attention_influence, important_heads
from headwise.score._selecting import Scored, rank_statistics, select_by_tokens
from headwise.tasks import Prompt
from headwise.units import HeadScores, HeadSet
from tiny_helper import oracle, tiny, tokens

HEADS = HeadSet.parse("L1H0,L2H3")


def documents(*lengths):
    return [tokens(1, n, seed=n)[0] for n in lengths]


def scorer(model, heads=HEADS, **options):
    return InfluenceScorer(model, None, heads, **{"min_tokens": 1, **options})


@torch.no_grad()
def loss(model, ids):
    return F.cross_entropy(model(ids[None]).logits[0, :-1].float(), ids[1:]).item()


# step 1


def lookup(seed):
    order = torch.randperm(VOCAB, generator=torch.Generator().manual_seed(seed))
    key, value, rest = order[:1], order[1:5], order[5:]
    return Prompt(torch.cat([rest[:3], key, value, rest[3:6], key]), value, (4, 8), "")


@pytest.mark.parametrize("decode", [False, True])
def test_the_wired_head_is_found(decode):
    scores = attention_influence(handwired_induction(), None, prompts=[lookup(s) for s in range(4)], decode=decode)
    assert scores.values[INDUCTION] == 1 and scores.values.sum() == 1
    assert scores.meta["answered"] == 4 and scores.method == "attention-influence"


def test_the_gold_answer_counts_where_the_model_errs():
    """Teacher-forced, a head that looks at the right token hits even if the model writes another."""
    model = handwired_induction()
    with torch.no_grad():
        model.transformer.h[1].attn.c_proj.weight.zero_()
    scores = attention_influence(model, None, prompts=[lookup(1)])
    assert scores.values[INDUCTION] == 1 and scores.meta["answered"] == 0


def test_scores_do_not_depend_on_the_batch():
    model, tokenizer = load_model("tiny-random-llama")
    options = {"samples": 3, "length": 800, "shots": 1, "key_length": 8, "seed": 5}
    one, all_ = (attention_influence(model, tokenizer, batch_size=b, **options) for b in (1, 3))
    assert torch.equal(one.values, all_.values)


@pytest.mark.parametrize("layers, heads, share, count", [(24, 16, 0.05, 20), (30, 9, 0.05, 14), (10, 10, 0.3, 30)])
def test_the_share_is_rounded_up(layers, heads, share, count):
    scores = HeadScores(values=torch.zeros(layers, heads), method="x")
    chosen = important_heads(scores, share)
    assert len(chosen) == count and chosen.pairs()[0] == (0, 0)  # ties: lower layer first


@pytest.mark.parametrize("share", [0, 1.5, -0.1])
def test_shares_without_sense(share):
    with pytest.raises(UnitError, match="share"):
        important_heads(HeadScores(values=torch.zeros(2, 2), method="x"), share)
    with pytest.raises(UnitError, match="expert"):
        important_heads(HeadScores(values=torch.zeros(2, 2), method="x", kind="expert"))


def test_bad_samples():
    model, tokenizer = load_model("tiny-random-llama")
    with pytest.raises(TaskError, match="tokenizer"):
        attention_influence(model, None)
    with pytest.raises(TaskError, match="empty"):
        attention_influence(model, None, prompts=[])
    with pytest.raises(TaskError, match="batch_size"):
        attention_influence(model, tokenizer, batch_size=0)


# steps 2 and 3


@pytest.mark.parametrize("name", ["llama", "mistral", "gpt2", "qwen3", "deepseek-v3"])
def test_losses_equal_a_dense_reference_written_by_the_equation(name):
    model, texts = tiny(name), documents(40, 64)
    edits = [headwise.Edit.uniform(HEADS)]
    for ids, found in zip(texts, scorer(model).score(texts), strict=True):
        with oracle(model, edits=edits):
            reference = loss(model, ids)
        base = loss(model, ids)
        assert found.tokens == len(ids) - 1
        assert found.base == pytest.approx(base, abs=1e-5) and found.reference == pytest.approx(reference, abs=1e-4)
        assert found.score == pytest.approx((reference - base) / base, abs=1e-4)


@pytest.mark.parametrize("mode", ["uniform", "zero"])
def test_sharing_the_prefix_changes_nothing(mode):
    model, texts = tiny(), documents(30, 9, 50)
    both = [[i.reference for i in scorer(model, mode=mode, share_prefix=share).score(texts)] for share in (True, False)]
    assert both[0] == pytest.approx(both[1], abs=1e-6)


def test_the_first_batch_proves_whether_a_prefix_can_be_shared():
    model = tiny()
    chosen = scorer(model)
    assert chosen.share_prefix is None
    list(chosen.score(documents(10)))
    assert chosen.share_prefix is True
    secret = {}
    model.model.layers[0].register_forward_hook(lambda *_: secret.update(x=secret.get("x", 0) + 1))
    model.model.norm.register_forward_hook(lambda _, __, out: out * (1 + secret["x"] % 2))
    chosen = scorer(model)
    list(chosen.score(documents(10)))
    assert chosen.share_prefix is False


def test_scores_do_not_depend_on_batch_or_order():
    model, texts = tiny(), documents(33, 7, 61, 20, 48)
    alone = [i.score for i in scorer(model, batch_size=1).score(texts)]
    together = [i.score for i in scorer(model, batch_size=3).score(texts)]
    backwards = [i.score for i in scorer(model, batch_size=3).score(texts[::-1])]
    assert together == pytest.approx(alone, abs=1e-5) and backwards[::-1] == pytest.approx(alone, abs=1e-5)


class Values:
    """The transform that keeps the values of a layer's call and attends."""

    def __init__(self, layer):
        self.layer, self.v = layer, None

    def __call__(self, call, attend):
        if call.layer == self.layer:
            self.v = call.v
        return attend()


@torch.no_grad()
def heads_of(model, layer, ids, head=None):
    """Values (K, N, D) and head outputs (N, H, D) of a layer, with one head uniform."""
    keep, edits = Values(layer), [] if head is None else [headwise.Edit.uniform(HeadSet.of([(layer, head)]))]
    with headwise.attach(model, edits=edits, transforms=[keep]), observe(model, "output") as record:
        model(ids[None])
    return keep.v[0], record.output(layer)[0]


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3", "mistral", "deepseek-v3"])
def test_a_uniform_head_is_the_running_mean_of_its_values_and_its_siblings_stay(name):
    model, (ids,) = tiny(name), documents(12)
    _, plain = heads_of(model, 1, ids)
    v, z = heads_of(model, 1, ids, 2)
    of = v[2 * len(v) // plain.shape[1]]
    window = getattr(model.config, "sliding_window", None) or len(ids)
    wanted = [of[max(0, i + 1 - window) : i + 1].mean(0) for i in range(len(ids))]
    torch.testing.assert_close(z[:, 2], torch.stack(wanted), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(z[0, 2], of[0], atol=1e-6, rtol=1e-5)
    others = [0, 1, 3]
    assert torch.equal(z[:, others], plain[:, others])


def test_a_uniform_head_does_not_ask_and_does_not_mind_the_order():
    model, (ids,) = copy.deepcopy(tiny()), documents(12)
    _, z = heads_of(model, 0, ids, 2)
    shuffled = torch.cat([ids[:-1][torch.randperm(11, generator=torch.Generator().manual_seed(0))], ids[-1:]])
    torch.testing.assert_close(heads_of(model, 0, shuffled, 2)[1][-1, 2], z[-1, 2], atol=1e-5, rtol=1e-4)
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.weight.mul_(3.0)
    torch.testing.assert_close(heads_of(model, 0, ids, 2)[1][:, 2], z[:, 2], atol=1e-6, rtol=1e-5)


@torch.no_grad()
def test_packed_documents_padding_and_the_cache_see_what_is_theirs():
    model, (a, b) = tiny(), documents(9, 14)
    with headwise.attach(model, edits=headwise.Edit.uniform(HEADS)):
        alone = model(b[None]).logits[0]
        together = torch.cat([a, b])[None]
        places = torch.cat([torch.arange(9), torch.arange(14)])[None]
        packed = model(together, position_ids=places, use_cache=False).logits[0, 9:]
        padded = model(
            torch.cat([torch.zeros(5, dtype=torch.long), b])[None],
            attention_mask=torch.tensor([[0] * 5 + [1] * 14]),
            position_ids=torch.tensor([[0] * 5 + list(range(14))]),
        ).logits[0, 5:]
        cache = model(b[None, :10], use_cache=True).past_key_values
        steps = [model(b[None, i : i + 1], past_key_values=cache, use_cache=True).logits[0, 0] for i in range(10, 14)]
    torch.testing.assert_close(packed, alone, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(padded, alone, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(torch.stack(steps), alone[10:], atol=1e-5, rtol=1e-4)


def test_a_long_document_is_the_token_weighted_mean_of_its_chunks():
    model, (text,) = tiny(), documents(70)
    whole = next(scorer(model, context=32).score([text]))
    parts = list(scorer(model, context=32).score(text.split(32)))
    total = sum(p.tokens for p in parts)
    assert whole.tokens == total == 67
    assert whole.base == pytest.approx(sum(p.base * p.tokens for p in parts) / total, abs=1e-6)


def test_without_heads_the_score_is_exactly_zero():
    assert next(scorer(tiny(), HeadSet.empty()).score(documents(20))).score == 0


def test_controls_are_what_they_would_score_as_heads():
    model, texts, other = tiny(), documents(30, 41), HeadSet.parse("L0H1")
    both = list(scorer(model, controls=[other]).score(texts))
    assert [i.control_scores[0] for i in both] == pytest.approx(
        [i.score for i in scorer(model, other).score(texts)], abs=1e-5
    )


def test_modes_and_denominators():
    model, tokenizer = load_model("tiny-random-llama")
    text = ["The quick brown fox jumps over the lazy dog, again and again."]
    found = {
        m: next(InfluenceScorer(model, tokenizer, HEADS, mode=m, min_tokens=4).score(text))
        for m in ("uniform", "zero", "mean")
    }
    assert len({i.reference for i in found.values()}) == 3
    one = found["zero"]
    for denominator, divisor in (("base", one.base), ("reference", one.reference), ("none", 1)):
        given = InfluenceScorer(model, tokenizer, HEADS, mode="zero", denominator=denominator, min_tokens=4)
        assert next(given.score(text)).score == pytest.approx((one.reference - one.base) / divisor, abs=1e-6)


def test_steps_of_a_document():
    found = next(scorer(tiny(), per_token=True).score(documents(30)))
    table = found.per_token.double()
    assert found.span(0, 29) == pytest.approx(found.score, abs=1e-6)
    assert found.span(5, 9) == pytest.approx((table[5:9, 1].mean() / table[5:9, 0].mean() - 1).item(), abs=1e-6)
    with pytest.raises(ScoreError, match="span"):
        found.span(9, 40)
    with pytest.raises(ScoreError, match="per_token"):
        next(scorer(tiny()).score(documents(9))).span(0, 2)


def test_documents_that_are_too_short_are_undefined():
    found = list(scorer(tiny(), min_tokens=8).score([torch.tensor([], dtype=torch.long), *documents(1, 5, 9)]))
    assert [i.why for i in found] == ["empty", "short", "short", ""]
    assert [math.isnan(i.score) for i in found] == [True, True, True, False]


def test_a_loss_near_zero_is_undefined():
    model = handwired_induction()
    with torch.no_grad():
        model.transformer.h[1].attn.c_proj.weight *= 30
        model.transformer.wte.weight[:] = 0
        model.transformer.wte.weight[3] = 1e4
        model.transformer.ln_f.bias += 1
    found = next(scorer(model, HeadSet.parse("L1H1")).score([torch.full((12,), 3)]))
    assert found.base < 1e-3 and math.isnan(found.score) and found.why == "loss near 0"


def test_the_model_is_left_as_it_was():
    model = tiny().train()
    ids = tokens(1, 12)
    model.eval()
    before = model(ids).logits
    model.train()
    list(scorer(model).score(documents(12, 30)))
    assert model.training
    assert torch.equal(model.eval()(ids).logits, before)


@pytest.mark.parametrize(
    "options, words",
    [({"mode": "soft"}, "mode"), ({"denominator": "max"}, "denominator"), ({"context": 1}, "context"),
     ({"context": 10**6}, "reads 4096"), ({"min_tokens": 0}, "min_tokens"), ({"batch_size": 0}, "batch_size")],
)  # fmt: skip
def test_options_without_sense(options, words):
    with pytest.raises(ScoreError, match=words):
        scorer(tiny(), **options)


def test_other_mistakes():
    with pytest.raises(UnitError, match="L9H0"):
        scorer(tiny(), HeadSet.parse("L9H0"))
    with pytest.raises(ScoreError, match="causal"):
        scorer(tiny("bert"))
    with pytest.raises(ScoreError, match="tokenizer"):
        list(scorer(tiny()).score(["text"]))
    with pytest.raises(ScoreError, match="int"):
        list(scorer(tiny()).score([5]))


# step 4


def test_a_budget_of_tokens_is_kept_within_one_document():
    generator = torch.Generator().manual_seed(0)
    rows = [
        Scored(
            i,
            "ab"[i % 2],
            int(torch.randint(10, 90, (), generator=generator)),
            float(torch.rand((), generator=generator)),
        )
        for i in range(60)
    ]
    selection = select_by_tokens(rows, 0.3)
    for name, domain in selection.domains.items():
        members = [r for r in rows if r.domain == name]
        budget = 0.3 * sum(r.tokens for r in members)
        assert budget - 90 < domain.kept_tokens <= budget
        kept = [r for r in members if r.index in selection.keep]
        left = [r for r in members if r.index not in selection.keep]
        assert min(r.score for r in kept) == domain.threshold >= max(r.score for r in left)


def test_undefined_scores_are_left_out_and_counted():
    rows = [Scored(0, "", 10, math.nan), Scored(1, "", 10, 0.1), Scored(2, "", 10, 0.2)]
    selection = select_by_tokens(rows, 1.0)
    assert selection.keep == {1, 2} and selection.domains[""].undefined == 1


@pytest.mark.parametrize("share", [0, -1, 1.01])
def test_shares_of_a_selection(share):
    with pytest.raises(ScoreError, match="share"):
        select_by_tokens([Scored(0, "", 1, 1.0)], share)


def test_nothing_to_select_from():
    with pytest.raises(ScoreError, match="no documents"):
        select_by_tokens([], 0.5)


def test_rank_statistics():
    assert rank_statistics([2, 3, math.nan], [0, 1]) == {"auc": 1.0, "p": pytest.approx(1 / 6)}
    assert rank_statistics([1, 1], [1, 1])["auc"] == 0.5
    with pytest.raises(ScoreError, match="nothing to compare"):
        rank_statistics([math.nan], [1.0])
