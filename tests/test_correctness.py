"""The cache over many prompts, cuts, decoding modes and calls: exact, or refused with a reason, and nothing is left behind."""

import contextlib
import gc
import tracemalloc

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache
from transformers.generation.configuration_utils import ALL_CACHE_IMPLEMENTATIONS

import headwise
from headwise import Elastic, Full, HeadPlan, HeadwiseCache, SinkWindow
from headwise.arguments import cache_argument, cache_of
from headwise.attention import sdpa
from headwise.errors import HeadwiseError
from headwise.hub import load_model
from headwise.plan import Selected
from headwise.tasks import english
from headwise.tasks.batches import padded as pad_rows
from headwise.tasks.texts import encode
from tiny_helper import allocated, generate, padded, state, tiny, tokens

FULL, SMALL = HeadPlan.full(3, 2), HeadPlan.uniform(SinkWindow(1, 5), 3, 2)
MIXED = HeadPlan(
    patterns=((Full(), SinkWindow(2, 4)), (Elastic(1, 2, 0.25), Full()), (SinkWindow(0, 6), SinkWindow(3, 3)))
)
COMPENSATED = HeadPlan.uniform(SinkWindow(1, 4, compensation="count", grow=True), 3, 2, prefill="dense")
CHOSEN = HeadPlan.uniform(Selected(1, 3, 4, by="key-norm"), 3, 2, prefill="dense")
BATCH = padded([14, 6, 10])


# full plan = the model's own cache


@pytest.mark.slow
def test_a_full_plan_is_the_dynamic_cache_for_200_prompts_of_mixed_lengths_in_batches():
    model, rows = tiny(), 0
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        lengths = torch.randint(1, 120, (10,), generator=generator).tolist()
        batch, new = padded(lengths, seed), 4 + seed
        want = generate(model, batch, new)
        with headwise.attach(model, plan=FULL):
            cache = HeadwiseCache(FULL)
            assert torch.equal(generate(model, batch, new, past_key_values=cache), want)
        rows += len(lengths)
    assert rows == 200


@pytest.mark.smollm2
@pytest.mark.slow
def test_a_full_plan_is_the_dynamic_cache_on_a_real_model_for_20_prompts():
    model, tokenizer = load_model("smollm2")
    ids = encode(tokenizer, english("eval"))
    plan = HeadPlan.full(30, 3)
    for seed in range(4):
        generator = torch.Generator().manual_seed(seed)
        cuts = torch.randint(3, 150, (5,), generator=generator).tolist()
        begins = torch.randint(len(ids) - 200, (5,), generator=generator).tolist()
        rows = [torch.tensor(ids[begin : begin + cut]) for begin, cut in zip(begins, cuts, strict=True)]
        batch = dict(zip(("input_ids", "attention_mask"), pad_rows(rows), strict=True))
        want = generate(model, batch, 6, pad_token_id=2)
        with headwise.attach(model, plan=plan):
            assert torch.equal(generate(model, batch, 6, pad_token_id=2), want)


# chunked = one shot = stepwise


POSITIONS = st.one_of(
    st.just(Full()),
    st.builds(SinkWindow, st.integers(0, 6), st.integers(1, 12)),
    st.builds(
        Elastic,
        st.integers(0, 4),
        st.integers(-6, 6),
        st.sampled_from([0.1, 0.25, 0.5, 0.9]),
        minimum=st.integers(1, 4),
    ),
)


def cuts_of(data, total):
    parts = []
    while sum(parts) < total:
        parts.append(data.draw(st.integers(1, total - sum(parts))))
    return parts


def read(model, batch, plan, cut):
    """Logits of the real tokens, the text cut into passes of these lengths, and the cache behind it."""
    cache, parts, begin = HeadwiseCache(plan), [], 0
    with headwise.attach(model, plan=plan), torch.no_grad():
        for count in cut:
            end = begin + count
            more = {
                "attention_mask": batch["attention_mask"][:, :end],
                "position_ids": batch["position_ids"][:, begin:end],
            }
            parts.append(model(batch["input_ids"][:, begin:end], past_key_values=cache, use_cache=True, **more).logits)
            begin = end
    return torch.cat(parts, dim=1)[batch["attention_mask"].bool()], cache


@settings(deadline=None, max_examples=40)
@given(st.lists(POSITIONS, min_size=6, max_size=6), st.lists(st.integers(1, 30), min_size=1, max_size=3), st.data())
def test_chunked_is_one_shot_is_stepwise_for_any_plan_of_positions(patterns, lengths, data):
    model, batch = tiny(), padded(lengths, seed=len(lengths))
    plan, total = HeadPlan(patterns=(patterns[:2], patterns[2:4], patterns[4:])), max(lengths)
    want, cache = read(model, batch, plan, [total])
    sizes = cache.layer_bytes()
    for cut in ([1] * total, cuts_of(data, total)):
        got, other = read(model, batch, plan, cut)
        torch.testing.assert_close(got, want, atol=1e-4 * float(want.abs().max()), rtol=0)
        if all(not p.keeps_all for p in patterns) and len(set(lengths)) == 1:
            assert other.layer_bytes() == sizes  # what is kept does not depend on how the text came


@pytest.mark.parametrize("plan", [COMPENSATED, CHOSEN], ids=["compensated", "chosen"])
@pytest.mark.parametrize("batch", [padded([30, 30]), padded([30, 17, 9])], ids=["even", "padded"])
def test_behind_a_dense_prefill_stepwise_is_generate(plan, batch):
    """The prompt comes at once there; every token behind it, alone."""
    model, prompt = tiny(), 20
    short = {k: v[:, :prompt] for k, v in batch.items()}
    keep = short["attention_mask"].any(1)
    short = {k: v[keep] for k, v in short.items()}
    with headwise.attach(model, plan=plan), torch.no_grad():
        text = generate(model, short, 10)
        whole = torch.cat([short["attention_mask"], torch.ones(len(text), 10, dtype=torch.long)], dim=1)
        places, cache = (whole.cumsum(1) - 1).clamp(min=0), HeadwiseCache(plan)
        for begin, end in [(0, prompt), *((i, i + 1) for i in range(prompt, prompt + 9))]:
            more = {"attention_mask": whole[:, :end], "position_ids": places[:, begin:end]}
            out = model(text[:, begin:end], past_key_values=cache, use_cache=True, **more).logits[:, -1]
            out[:, model.config.eos_token_id] = -torch.inf  # min_new_tokens of generate
            assert torch.equal(out.argmax(-1), text[:, end])


# decoding modes: the plan's text, or a refusal with a reason


def left_as_it_was(model, before):
    assert state(model) == before and torch.equal(generate(model, BATCH), WANT["plain"])


WANT: dict = {}


@pytest.fixture(scope="module", autouse=True)
def wanted():
    model = tiny()
    WANT["plain"] = generate(model, BATCH)
    with headwise.attach(model, plan=MIXED):
        WANT["plan"] = generate(model, BATCH)
    assert not torch.equal(WANT["plain"], WANT["plan"])


@pytest.mark.parametrize("name", ALL_CACHE_IMPLEMENTATIONS)
def test_every_cache_of_transformers_is_the_plans_or_refused(name):
    model = tiny()
    before = state(model)
    with headwise.attach(model, plan=MIXED):
        if name in ("dynamic", "hybrid"):
            assert torch.equal(generate(model, BATCH, cache_implementation=name), WANT["plan"])
        else:
            with pytest.raises((HeadwiseError, ImportError), match="HeadwiseCache|install|available"):
                generate(model, BATCH, cache_implementation=name)
    for name in ("_cache", "_previous_max_cache_length"):  # what transformers itself notes for static caches
        vars(model).pop(name, None)
    left_as_it_was(model, before)


@pytest.mark.parametrize(
    "options",
    [
        {"use_cache": False},
        {"prefill_chunk_size": 5},
        {"num_beams": 1, "num_return_sequences": 1},
        {"output_scores": True},
    ],
    ids=str,
)
def test_modes_that_work_give_the_text_of_the_plan(options):
    model = tiny()
    before = state(model)
    with headwise.attach(model, plan=MIXED):
        assert torch.equal(generate(model, BATCH, **options), WANT["plan"])
    left_as_it_was(model, before)


@pytest.mark.parametrize(
    "options, error",
    [
        ({"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 1.0}, ValueError),  # transformers: remote code
        ({"penalty_alpha": 0.6, "top_k": 4}, ValueError),
        ({"prompt_lookup_num_tokens": 2}, ValueError),  # transformers: one row only
    ],
    ids=["group beams", "contrastive", "assisted batch"],
)
def test_modes_that_transformers_itself_refuses_leave_the_model_alone(options, error):
    model = tiny()
    before = state(model)
    with pytest.raises(error), headwise.attach(model, plan=MIXED):
        generate(model, BATCH, **options)
    left_as_it_was(model, before)


def test_continuous_batching_pages_its_own_cache_and_is_refused():
    model = tiny()
    before = state(model)
    with pytest.raises(ValueError, match="headwise_sdpa is not supported for continuous batching"):
        with headwise.attach(model, plan=MIXED):
            model.generate_batch([[1, 2, 3]])
    left_as_it_was(model, before)


@pytest.mark.slow
def test_a_compiled_model_reads_by_the_plan():
    """torch.compile around an attached model: a prompt, a step through the cache, and generate."""
    model, ids = tiny(), tokens(2, 12)
    with headwise.attach(model, plan=MIXED):
        compiled = torch.compile(model, backend="eager")
        with torch.no_grad():
            want, got = model(ids), compiled(ids)
            assert type(got.past_key_values) is HeadwiseCache and torch.equal(got.logits, want.logits)
            step, own = (
                m(ids[:, :1], past_key_values=o.past_key_values).logits for m, o in ((model, want), (compiled, got))
            )
            torch.testing.assert_close(own, step)
        assert torch.equal(generate(compiled, BATCH), WANT["plan"])
    torch._dynamo.reset()
    assert torch.equal(generate(model, BATCH), WANT["plain"])


# a soak


def live_tensors():
    sdpa._kept_sight.cache_clear()  # at most 64 small masks, kept on purpose
    gc.collect()
    held = [t for t in gc.get_objects() if type(t) in (torch.Tensor, torch.nn.Parameter)]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in held}
    return sum(storages.values())


@pytest.mark.slow
def test_a_soak_of_500_random_generate_calls_leaves_memory_where_it_was():
    model, generator = tiny(), torch.Generator().manual_seed(0)
    before, plans = state(model), (FULL, SMALL, MIXED, COMPENSATED, CHOSEN, None)
    draw = lambda low, high: int(torch.randint(low, high, (), generator=generator))

    def calls(count):
        for _ in range(count):
            plan, batch = plans[draw(0, len(plans))], padded([draw(2, 30) for _ in range(draw(1, 4))], draw(0, 99))
            mode = [{}, {"num_beams": 2}, {"do_sample": True, "num_return_sequences": 2}, {"prefill_chunk_size": 7}][
                draw(0, 4)
            ]
            if plan is None:
                generate(model, batch, draw(1, 6), **mode)
                continue
            with headwise.attach(model, plan=plan):
                with contextlib.suppress(HeadwiseError):  # of a mode that a plan refuses nothing may stay either
                    generate(model, batch, draw(1, 6), **mode)

    calls(60)  # lazily made tables and caches of transformers come first
    tensors = live_tensors()
    tracemalloc.start()
    try:
        calls(20)
        gc.collect()
        python = tracemalloc.get_traced_memory()[0]
        calls(420)
        assert live_tensors() == tensors
        grown = tracemalloc.get_traced_memory()[0] - python
    finally:
        tracemalloc.stop()
    assert grown < 200_000, f"{grown} bytes of Python objects stayed after 420 calls"
    assert state(model) == before


@torch.no_grad()
def test_a_cache_is_freed_with_its_last_reference():
    model = tiny()
    with headwise.attach(model, plan=MIXED):
        model(tokens(2, 40))  # masks that follow from lengths alone are made once and kept
        held = live_tensors()
        cache = cache_of(model(tokens(2, 40), **cache_argument(model, DynamicCache())))
        assert type(cache) is HeadwiseCache and allocated(cache) > 0
        del cache
        assert live_tensors() == held
    assert live_tensors() == held
