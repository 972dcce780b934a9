"""The probe of random tokens that repeat: exact on a model wired by hand, equal to the full matrix, and clear errors."""

import pytest
import torch
from transformers import BloomConfig, BloomForCausalLM, FalconConfig, FalconForCausalLM

from handwired import ECHO, INDUCTION, handwired_induction
from headwise.attach.observe import observe
from headwise.errors import AttachError, TaskError
from headwise.hub import load_model
from headwise.score import echo, induction, induction_and_echo
from headwise.score.induction import _period, _pool, draw_tokens, probe
from tiny_helper import tiny


def full_matrix(model, ids, period, first=0):
    """The same two masses from the whole attention matrices, written as the sums of the paper."""
    with torch.no_grad():
        weights = torch.stack(model(ids[None], output_attentions=True).attentions)[:, 0].double()  # (L, H, T, T)
    same, after, rows = torch.zeros(weights.shape[:2]), torch.zeros(weights.shape[:2]), 0
    for i in range(first + period, len(ids)):
        earlier = [j for j in range(first, i) if (i - j) % period == 0]
        same += weights[:, :, i, earlier].sum(-1)
        after += weights[:, :, i, [j + 1 for j in earlier]].sum(-1)
        rows += 1
    return {"echo": same / rows, "induction": after / rows}


def test_the_wired_heads_are_found_first_and_no_other_scores():
    found = induction_and_echo(handwired_induction(), None, length=16, repeats=4)
    by_name = dict(zip(("induction", "echo"), found, strict=True))
    for name, (layer, head) in (("induction", INDUCTION), ("echo", ECHO)):
        scores = by_name[name]
        assert scores.ranking()[0][0][1:] == (layer, head)
        assert scores.method == name and scores.meta["length"] == 16
    values = by_name["induction"].values.clone()
    assert values[INDUCTION] > 0.95  # the rest goes to the very first key, whose previous token is itself
    values[INDUCTION] = 0
    assert values.max() < 1e-6
    assert by_name["echo"].values[ECHO] == pytest.approx((1 / 2 + 2 / 3 + 3 / 4) / 3, abs=1e-4)  # it sees itself too


@pytest.mark.parametrize("first", [0, 3])
@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3", "mistral"])
def test_streamed_equals_the_full_matrix(name, first, monkeypatch):
    monkeypatch.setattr("headwise.attach.observe.BLOCK", 1500)  # several blocks of rows
    ids = torch.cat([torch.full((first,), 256), torch.randperm(200)[:19].repeat(4)])
    wanted = full_matrix(tiny(name, "eager"), ids, 19, first)
    for base in ("sdpa", "eager"):
        found = probe(tiny(name, base), ids, 19, first)
        for key in wanted:
            torch.testing.assert_close(found[key].double(), wanted[key].double(), rtol=0, atol=1e-5)


def test_masses_lie_in_range_and_sum_to_at_most_one():
    one, other = induction_and_echo(tiny(), None, length=12, repeats=5)
    assert one.values.min() >= 0 and other.values.min() >= 0 and (one.values + other.values).max() <= 1 + 1e-6
    assert induction(tiny(), None, length=12, repeats=5) == one
    assert echo(tiny(), None, length=12, repeats=5) == other


def test_same_seed_same_scores_and_other_seed_other_tokens():
    tables = [induction(tiny(), None, length=16, seed=s) for s in (0, 0, 1)]
    assert tables[0] == tables[1] and not tables[0].values.equal(tables[2].values)


def test_the_default_probe_is_the_papers_or_what_fits():
    model = tiny()
    assert induction(model, None, repeats=2).meta["length"] == 2048  # context of 4096 tokens
    model.config.max_position_embeddings = 12000
    assert _period(model, None, 4, 1) == 2500


def test_the_start_token_of_the_tokenizer_comes_first_and_is_no_match():
    model, tokenizer = load_model("tiny-random-llama")
    tokenizer.bos_token = "<|im_start|>"
    from tokenizers.processors import TemplateProcessing

    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", 257)]
    )
    assert induction(model, tokenizer, length=16, repeats=2).meta["start_tokens"] == 1
    assert induction(model, tokenizer, length=16, repeats=2, start_token=False).meta["start_tokens"] == 0


def test_tokens_differ_where_the_pool_is_large_enough():
    generator = torch.Generator().manual_seed(0)
    assert len(draw_tokens(torch.arange(50), 50, generator).unique()) == 50
    assert len(draw_tokens(torch.arange(5), 50, generator)) == 50


def test_special_tokens_are_never_drawn():
    model, tokenizer = load_model("tiny-random-llama")
    pool = _pool(model, tokenizer, None, None).tolist()
    assert pool == list(
        range(256)
    )  # the bytes; 256 to 258 are special, and the model's 320 ids are more than the tokenizer has
    assert _pool(model, None, None, None).tolist() == list(range(320))


def test_bf16_and_training_mode_are_left_alone():
    model, _ = load_model("tiny-random-llama", dtype="bfloat16")
    model.train()
    scores = induction(model, None, length=16)
    assert model.training and scores.values.isfinite().all()


@pytest.mark.parametrize(
    "options, word",
    [
        ({"length": 1}, "length=1"),
        ({"repeats": 1}, "repeats=1"),
        ({"length": 2000}, "context of 4096"),
        ({"low": 300, "high": 400}, "vocabulary"),
        ({"low": -1}, "low=-1"),
        ({"low": 20, "high": 20}, "low=20"),
        ({"low": 256, "high": 259}, "not special"),
    ],
)
def test_a_probe_that_cannot_be_made(options, word):
    model, tokenizer = load_model("tiny-random-llama")
    with pytest.raises(TaskError, match=word):
        induction(model, tokenizer, **options)


def test_the_probe_range_of_the_reference_needs_a_large_vocabulary():
    with pytest.raises(TaskError, match="vocabulary has 320"):
        induction(tiny(), None, low=10_000, high=12_500)


@pytest.mark.parametrize("kind", ["bloom", "falcon", "falcon that claims rotary positions too"])
def test_alibi_models_are_refused_with_the_reason(kind):
    if kind == "bloom":
        model = BloomForCausalLM(BloomConfig(vocab_size=64, hidden_size=32, n_layer=1, n_head=2))
    else:
        config = FalconConfig(vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, alibi=True)
        model = FalconForCausalLM(config)
        if "too" in kind:
            model.config.rope_parameters = {"rope_type": "default", "rope_theta": 10000.0}
    with pytest.raises(AttachError, match="ALiBi"):
        induction(model, None, length=4)


# what the probe leans on in observe


def test_pair_mass_gets_positions_of_queries_and_keys_of_padded_rows():
    model, mask = tiny(), torch.ones(2, 10, dtype=torch.long)
    mask[1, :4] = 0
    with (
        torch.no_grad(),
        observe(model, pair_mass={"own": lambda q, k: q == k}, mass={"all": lambda k: k >= 0}) as record,
    ):
        model(torch.arange(20).view(2, 10), attention_mask=mask)
    assert record.table("own").shape == (3, 2, 4, 10)
    assert (record.table("own")[:, 1, :, 4] == 1).all()  # the first real token sees only itself
    torch.testing.assert_close(record.table("all")[:, :, :, 4:], torch.ones(3, 2, 4, 6))


def test_rows_counted_from_the_end_of_each_pass():
    model, ids = tiny(), torch.arange(12)[None]
    with torch.no_grad():
        with observe(model, "entropy") as every:
            model(ids)
        with observe(model, "entropy", rows=[-1, -3]) as some:
            model(ids)
        with observe(model, "entropy", rows=[-3, -2, -1]) as short:
            model(ids[:, :2])
    assert some.table("entropy").equal(every.table("entropy")[..., [9, 11]])
    assert short.table("entropy").shape[-1] == 2
    with pytest.raises(AttachError, match="do not mix"):
        observe(model, "entropy", rows=[0, -1])
    with pytest.raises(AttachError, match="pair_mass"):
        observe(model)


@pytest.mark.smollm2
@pytest.mark.slow
def test_smollm2s_heads_do_not_depend_on_which_tokens_are_drawn():
    model, tokenizer = load_model("smollm2")
    tables = [induction(model, tokenizer, length=256, repeats=2, seed=s).to_kv(3) for s in range(3)]
    for a, b in ((0, 1), (0, 2), (1, 2)):
        assert tables[a].overlap(tables[b], 14) >= 0.8
