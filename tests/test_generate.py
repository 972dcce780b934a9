"""HeadwiseCache under generate(): token for token what the plan says, in every decoding mode that is supported."""

import pytest
import torch
from transformers import DynamicCache

import headwise
from headwise import Elastic, Full, HeadPlan, HeadwiseCache, SinkWindow
from headwise.errors import AttachError, CacheError
from tiny_helper import generate, logits, oracle, padded, starts, tiny, tokens

FULL, SMALL = HeadPlan.full(3, 2), HeadPlan.uniform(SinkWindow(1, 5), 3, 2)
MIXED = HeadPlan(
    patterns=((Full(), SinkWindow(2, 4)), (Elastic(1, 2, 0.25), Full()), (SinkWindow(0, 6), SinkWindow(3, 3)))
)
COMPENSATED = HeadPlan.uniform(SinkWindow(1, 4, compensation="count", grow=True), 3, 2, prefill="dense")
BATCH = padded([14, 6, 10])


def under(model, plan, batch, new=8, **options):
    with headwise.attach(model, plan=plan):
        return generate(model, batch, new, **options)


def greedy(model, plan, batch, new=8):
    """Greedy text by the oracle, the whole row anew for every token, each row alone."""
    rows = []
    for row, first in zip(batch["input_ids"], starts(batch), strict=True):
        ids = row[int(first) :][None]
        for _ in range(new):
            with oracle(model, patterns=plan.patterns):
                scores = logits(model, {"input_ids": ids})[:, -1].clone()
            scores[:, model.config.eos_token_id] = -torch.inf  # min_new_tokens
            ids = torch.cat([ids, scores.argmax(-1, keepdim=True)], dim=1)
        rows.append(ids[0, -new:])
    return torch.stack(rows)


# greedy


@pytest.mark.parametrize("base", ["sdpa", "eager"])
def test_a_full_plan_is_the_dynamic_cache_for_forty_prompts_of_mixed_lengths(base):
    model = tiny("llama", base)
    for seed in range(4):
        lengths = torch.randint(1, 40, (10,), generator=torch.Generator().manual_seed(seed)).tolist()
        batch = padded(lengths, seed)
        assert torch.equal(under(model, FULL, batch, 12), generate(model, batch, 12))


@pytest.mark.parametrize("name", ["qwen3", "mistral", "gemma3", "gpt2", "mixtral", "qwen3-moe"])
def test_a_full_plan_on_other_architectures(name):
    model, batch = tiny(name), padded([40, 20])
    stack = headwise.find_stack(model)
    assert torch.equal(under(model, HeadPlan.full(stack.layers, stack.kv_heads), batch, 6), generate(model, batch, 6))


def test_a_window_longer_than_the_text_is_a_full_plan():
    model = tiny()
    assert torch.equal(under(model, HeadPlan.uniform(SinkWindow(4, 64), 3, 2), BATCH), generate(model, BATCH))


@pytest.mark.parametrize("plan", [SMALL, MIXED], ids=["small", "mixed"])
def test_greedy_text_is_that_of_the_equation(plan):
    model = tiny()
    got = under(model, plan, BATCH)
    assert torch.equal(got[:, 14:], greedy(model, plan, BATCH))
    assert not torch.equal(got, generate(model, BATCH)), "the plan changes nothing here"


@pytest.mark.parametrize("plan", [SMALL, MIXED], ids=["small", "mixed"])
@pytest.mark.parametrize("chunk", [1, 3, 5, 14])
def test_chunked_prefill_of_generate(plan, chunk):
    model = tiny()
    assert torch.equal(under(model, plan, BATCH, prefill_chunk_size=chunk), under(model, plan, BATCH))


def test_a_cache_that_the_user_gives_and_the_table_of_its_bytes():
    model, cache = tiny(), HeadwiseCache(SMALL)
    with headwise.attach(model, plan=SMALL):
        out = generate(model, BATCH, past_key_values=cache, return_dict_in_generate=True)
    assert out.past_key_values is cache and torch.equal(out.sequences, under(model, SMALL, BATCH))
    assert cache.get_seq_length() == 14 + 8 - 1
    assert cache.nbytes == 3 * (
        3 * 2 * 6 * 16 * 2 * 4 + 3 * 6 * 4
    )  # layers · (rows, heads, slots, D, k and v, float32; positions)
    full = HeadwiseCache(FULL)
    with headwise.attach(model, plan=FULL):
        generate(model, BATCH, past_key_values=full)
    assert cache.nbytes < 0.4 * full.nbytes
    assert cache.table().count("sinks1+window5: 6") == 3


def test_going_on_with_a_cache_is_the_whole_conversation():
    model, cache = tiny(), HeadwiseCache(MIXED)
    ids = tokens(2, 12)
    with headwise.attach(model, plan=MIXED):
        first = generate(model, {"input_ids": ids}, 5, past_key_values=cache)
        second = torch.cat([first, tokens(2, 4, seed=5)], dim=1)
        got = generate(model, {"input_ids": second}, 5, past_key_values=cache)
        assert torch.equal(got, generate(model, {"input_ids": second}, 5))


def test_a_dense_prefill_reads_the_whole_prompt():
    model, plan = tiny(), HeadPlan.uniform(SinkWindow(1, 5), 3, 2, prefill="dense")
    got, plain = under(model, plan, BATCH), generate(model, BATCH)
    assert torch.equal(got[:, :15], plain[:, :15]) and not torch.equal(got, plain)


@pytest.mark.parametrize("plan", [SMALL, MIXED, COMPENSATED], ids=["small", "mixed", "compensated"])
def test_a_row_in_a_batch_is_the_row_alone(plan):
    model = tiny()
    together = under(model, plan, BATCH)
    for row, first in enumerate(starts(BATCH).tolist()):
        alone = under(model, plan, {"input_ids": BATCH["input_ids"][row : row + 1, first:]})
        assert torch.equal(together[row, first:], alone[0])


def test_edits_and_a_plan_together_leave_nothing_behind():
    model = tiny()
    plain = generate(model, BATCH)
    with headwise.attach(model, plan=MIXED), headwise.ablate(model, "L0H1,L1H0"):
        inside = generate(model, BATCH)
    assert not torch.equal(inside, plain) and not torch.equal(inside, under(model, MIXED, BATCH))
    assert torch.equal(generate(model, BATCH), plain)
    assert type(model(tokens(1, 3)).past_key_values) is DynamicCache


# beams, samples, several sequences


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"num_beams": 4, "num_return_sequences": 2}], ids=str)
def test_beam_search(options):
    model = tiny()
    assert torch.equal(under(model, FULL, BATCH, **options), generate(model, BATCH, **options))
    for plan in (SMALL, MIXED, COMPENSATED):
        got = under(model, plan, BATCH, **options)
        uncached = plan if plan.prefill == "masked" else None
        if uncached:  # without a cache every step computes the text anew, by the patterns' masks
            with headwise.attach(model, plan=uncached):
                assert torch.equal(got, generate(model, BATCH, use_cache=False, **options))
        assert not torch.equal(got, generate(model, BATCH, **options))


def test_samples_and_several_sequences():
    model = tiny()
    options = {"do_sample": True, "top_k": 20, "num_return_sequences": 3}

    def sampled(plan, **more):
        torch.manual_seed(4)
        return under(model, plan, BATCH, **options, **more)

    torch.manual_seed(4)
    want = generate(model, BATCH, **options)
    assert torch.equal(sampled(FULL), want)
    assert torch.equal(sampled(MIXED), sampled(MIXED, use_cache=False))


# assisted generation


@pytest.mark.parametrize("plan", [FULL, SMALL, MIXED], ids=["full", "small", "mixed"])
@pytest.mark.parametrize("draft", ["itself", "another", "prompt lookup"])
def test_assisted_generation_is_greedy_generation(plan, draft):
    """With a HeadwiseCache given to generate, rejected draft tokens are taken back exactly."""
    model, one = tiny(), {"input_ids": torch.cat([tokens(1, 9), tokens(1, 9)[:, :5]], dim=1)}
    options = {
        "itself": {"assistant_model": tiny()},
        "another": {"assistant_model": tiny("qwen3")},
        "prompt lookup": {"prompt_lookup_num_tokens": 3},
    }[draft]
    cache = HeadwiseCache(plan)
    got = under(model, plan, one, 12, past_key_values=cache, **options)
    assert torch.equal(got, under(model, plan, one, 12))
    assert draft != "prompt lookup" or cache.get_seq_length() >= 14 + 11


@pytest.mark.parametrize(
    "plan", [COMPENSATED, HeadPlan.uniform(SinkWindow(1, 5), 3, 2, prefill="dense")], ids=["compensated", "dense"]
)
def test_assisted_generation_with_a_dense_prefill_is_refused(plan):
    model = tiny()
    with pytest.raises(CacheError, match="prefill='masked'"):
        under(model, plan, {"input_ids": tokens(1, 12)}, past_key_values=HeadwiseCache(plan), assistant_model=tiny())
    assert model.config._attn_implementation == "sdpa"


def test_assisted_generation_without_a_cache_of_its_own_is_exact_or_refused():
    """generate announces draft tokens to the cache that it made itself, which headwise replaces: tokens that were dropped are missed."""
    model, one = tiny(), {"input_ids": tokens(1, 12)}
    assert torch.equal(under(model, FULL, one, assistant_model=tiny("qwen3")), generate(model, one))
    with pytest.raises(CacheError, match="past_key_values=HeadwiseCache"):
        under(model, SMALL, one, assistant_model=tiny("qwen3"))
    dense = HeadPlan.uniform(SinkWindow(1, 5), 3, 2, prefill="dense")
    for assistant in (
        tiny(),
        tiny("qwen3"),
    ):  # one whose drafts are all taken, so that nothing is ever cropped, and one whose are not
        with pytest.raises(CacheError, match="prefill='masked'"):
            under(model, dense, one, assistant_model=assistant)


# refusals


@pytest.mark.parametrize("implementation", ["static", "offloaded", "quantized"])
def test_caches_that_a_plan_cannot_use(implementation):
    model = tiny()
    with pytest.raises((AttachError, ImportError)) as caught:
        under(model, SMALL, BATCH, cache_implementation=implementation)
    assert implementation == "quantized" or "HeadwiseCache" in str(caught.value)
    assert torch.equal(under(model, FULL, BATCH), generate(model, BATCH))


def test_a_prompt_behind_a_full_cache_of_another_batch():
    model, cache = tiny(), HeadwiseCache(SMALL)
    with headwise.attach(model, plan=SMALL):
        generate(model, BATCH, past_key_values=cache)
        with pytest.raises(CacheError, match="batch of 3 rows"):
            generate(model, {"input_ids": tokens(2, 30)}, past_key_values=cache)
        cache.reset()
        again = generate(model, {"input_ids": tokens(2, 30)}, past_key_values=cache)
    assert torch.equal(again, under(model, SMALL, {"input_ids": tokens(2, 30)}))
