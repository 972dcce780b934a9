"""Tokens chosen by content, in whole models: an independent dense oracle, padding, rows, beams, taking back, other interventions."""

import pytest
import torch
from transformers import DynamicCache

import headwise
from headwise import HeadPlan
from headwise.errors import CacheError
from headwise.plan import Full, Selected, SinkWindow
from selected_helper import RULES, kept_positions, run, uniform
from tiny_helper import allocated, generate, logits, oracle, padded, starts, tiny, tokens

DENSE, PADDED = {"input_ids": tokens(2, 24)}, padded([24, 15, 4])


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("batch", [DENSE, PADDED], ids=["dense", "padded"])
def test_prompt_is_dense_and_a_step_reads_the_kept_set_of_its_row_and_head(name, batch):
    """Oracle: the model with its own cache, whole, and a mask for each (row, kv head) made of what was kept at the prompt's end."""
    model, pattern = tiny(), RULES[name]
    got, cache = run(model, batch, uniform(pattern), [14])
    start = starts(batch) if "attention_mask" in batch else torch.zeros(len(batch["input_ids"]), dtype=torch.long)
    want = logits(model, {n: x[:, :14] for n, x in batch.items()})
    kept = [[kept_positions(layer.stores[0], row) for row in range(len(start))] for layer in cache.layers]
    more, _ = run(model, batch, uniform(pattern), [1] * 10, cache)

    class Row:
        def __init__(self, layer, head):
            self.sets = [kept[layer][row][head] for row in range(len(start))]

        def reads(self, q_pos, k_pos):
            if q_pos.shape[-2] > 1:
                return Full().reads(q_pos, k_pos)
            n = 14 - start
            edge = (n - pattern.recent)[:, None, None, None]
            chosen = torch.stack([torch.isin(k_pos[row], torch.tensor(sorted(s))) for row, s in enumerate(self.sets)])
            if pattern.grow:
                return (k_pos >= 0) & (k_pos <= q_pos) & (chosen | (k_pos >= n[:, None, None, None]))
            late = (k_pos >= edge) & (q_pos - k_pos < pattern.recent)
            early = (k_pos < edge) & chosen
            return (k_pos >= 0) & (k_pos <= q_pos) & (late | early | (k_pos < pattern.sinks))

    dynamic, steps = DynamicCache(config=model.config), []
    with oracle(model, patterns=[[Row(i, h) for h in range(2)] for i in range(3)], start=start), torch.no_grad():
        for begin, end in [(0, 14), *((i, i + 1) for i in range(14, 24))]:
            extra = {}
            if "attention_mask" in batch:
                extra["attention_mask"] = batch["attention_mask"][:, :end]
                extra["position_ids"] = batch["position_ids"][:, begin:end]
            steps.append(model(batch["input_ids"][:, begin:end], past_key_values=dynamic, **extra).logits)
    real = batch.get("attention_mask", torch.ones(len(start), 24)).bool()
    torch.testing.assert_close(got[real[:, :14]], want[real[:, :14]], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(more[real[:, 14:]], torch.cat(steps[1:], 1)[real[:, 14:]], atol=2e-4, rtol=1e-3)
    assert cache.nbytes == allocated(cache)


@pytest.mark.parametrize("name", RULES)
def test_a_padded_row_is_the_row_alone(name):
    model, plan = tiny(), uniform(RULES[name])
    both, cache = run(model, PADDED, plan, [18, 1, 1, 1, 3])
    for row, first in ((0, 0), (1, 9)):
        single = {"input_ids": PADDED["input_ids"][row : row + 1, first:]}
        alone, one = run(model, single, plan, [18 - first, 1, 1, 1, 3])
        torch.testing.assert_close(both[row : row + 1, first:], alone, atol=1e-4, rtol=1e-3)
        for mine, theirs in zip(cache.layers, one.layers, strict=True):
            assert kept_positions(mine.stores[0], row) == kept_positions(theirs.stores[0], 0)


@pytest.mark.parametrize("name", ["mistral", "gemma3", "qwen3", "gpt2"])
@pytest.mark.parametrize("base", ["sdpa", "eager"])
def test_other_architectures_and_bases(name, base):
    """A plan whose rule drops nothing is the model itself; one that drops is served, rows alone as in the batch."""
    model = tiny(name, base=base)
    stack, batch = headwise.find_stack(model), padded([48, 39])  # windows of 32 of their own: mistral, gemma3
    if name == "gpt2":
        batch.pop("position_ids")
    small = HeadPlan.uniform(RULES["pooled"], stack.layers, stack.kv_heads, prefill="dense")
    whole = HeadPlan.uniform(Selected(4, 8, 200, grow=True), stack.layers, stack.kv_heads, prefill="dense")
    with headwise.attach(model, plan=whole):
        got = generate(model, batch, 6)
    assert torch.equal(got, generate(model, batch, 6))
    with headwise.attach(model, plan=small):
        both = generate(model, batch, 6)
        alone = generate(model, {"input_ids": batch["input_ids"][1:, 9:]}, 6)
    assert torch.equal(both[1, -6:], alone[0, -6:])


@pytest.mark.parametrize("pattern", RULES.values(), ids=RULES)
def test_bfloat16(pattern):
    batch = padded([24, 15])
    got, cache = run(tiny(dtype=torch.bfloat16), batch, uniform(pattern), [20, 1, 1, 1, 1])
    assert {p.k.dtype for layer in cache.layers for s in layer.stores for p in s.parts} == {torch.bfloat16}
    assert got.isfinite().all()


@pytest.mark.parametrize("short", [1, 2, 5])
@pytest.mark.parametrize("name", RULES)
def test_a_short_prompt_is_left_alone_until_there_is_something_to_drop(name, short):
    pattern = Selected(2, 6, 4, by=RULES[name].by, split=RULES[name].split)
    model, batch = tiny(), {"input_ids": tokens(1, 8)}
    got, cache = run(model, batch, uniform(pattern), [short] + [1] * (8 - short))
    torch.testing.assert_close(got, logits(model, batch), atol=1e-4, rtol=1e-3)
    assert kept_positions(cache.layers[0].stores[0], 0) == [set(range(8))] * 2


def test_the_whole_budget_is_the_dense_model():
    model, batch = tiny(), PADDED
    assert Selected(4, 28, -32, share=1.0).keeps_all
    got, _ = run(model, batch, uniform(Selected(4, 28, -32, share=1.0)), [18, 1, 1, 4])
    real = batch["attention_mask"].bool()
    torch.testing.assert_close(got[real], logits(model, batch)[real], atol=1e-5, rtol=1e-4)


# rows, beams, taking back


@pytest.mark.parametrize("name", RULES)
def test_rows_can_be_selected_repeated_and_reordered(name):
    model, plan, order = tiny(), uniform(RULES[name]), torch.tensor([2, 0, 0, 1])
    want, _ = run(model, PADDED, plan, [18, 1, 1, 1, 1, 1, 1])
    for how in ("reorder_cache", "batch_select_indices", "batch_repeat_interleave"):
        _, cache = run(model, PADDED, plan, [18, 1])
        rows = torch.tensor([0, 0, 1, 1, 2, 2]) if how == "batch_repeat_interleave" else order
        getattr(cache, how)(2 if how == "batch_repeat_interleave" else order)
        batch = {n: x[rows] for n, x in PADDED.items()}
        got, _ = run(model, batch, plan, [1] * 5, cache)
        real = batch["attention_mask"].bool()[:, 19:]
        torch.testing.assert_close(got[real], want[rows][:, 19:][real], atol=1e-4, rtol=1e-3)
        assert cache.nbytes == allocated(cache)


@pytest.mark.parametrize("name", ["slides", "pooled grows"])
def test_beam_search_and_sampling(name):
    """Beams under a plan that drops nothing are the model's; under one that drops they still run in a batch."""
    model, batch = tiny(), padded([24, 15])
    with headwise.attach(model, plan=uniform(Selected(4, 8, 200, grow=True))):
        assert torch.equal(generate(model, batch, 6, num_beams=3), generate(model, batch, 6, num_beams=3))
        mine = generate(model, batch, 6, num_beams=3)
    assert torch.equal(mine, generate(model, batch, 6, num_beams=3))
    with headwise.attach(model, plan=uniform(RULES[name])):
        assert generate(model, batch, 6, num_beams=3).shape == (2, 30)


def test_what_came_after_the_prompt_can_be_taken_back_where_nothing_left_for_it():
    model, plan = tiny(), uniform(RULES["pooled grows"])
    want, _ = run(model, PADDED, plan, [18, 1, 1, 1, 1])
    _, cache = run(model, PADDED, plan, [18, 1, 1, 1])
    cache.crop(-2)
    got, _ = run(model, PADDED, plan, [1, 1, 1], cache)
    real = PADDED["attention_mask"].bool()[:, 19:22]
    torch.testing.assert_close(got[real], want[:, 19:22][real], atol=1e-4, rtol=1e-3)
    with pytest.raises(CacheError, match="cannot take them back"):
        cache.crop(-10)
    _, sliding = run(model, DENSE, uniform(RULES["slides"]), [18, 1])
    with pytest.raises(CacheError, match="cannot take them back"):
        sliding.crop(-1)
    with pytest.raises(CacheError, match="assisted generation"):
        sliding.activate_past_recording()


def test_reset_and_reuse():
    model, plan = tiny(), uniform(RULES["pooled"])
    want, cache = run(model, PADDED, plan, [18, 1, 5])
    cache.reset()
    assert cache.nbytes == allocated(cache) == 0
    again, _ = run(model, PADDED, plan, [18, 1, 5], cache)
    assert torch.equal(again, want)


# together with edits, observers, routers


def test_edits_and_observers_see_the_chosen_tokens():
    """Zeroed heads are zero, and the attention that an observer sees is over the kept set: its mass is one."""
    model, plan, seen = tiny(), uniform(RULES["pooled"]), []
    edit = headwise.Edit.zero(headwise.HeadSet.parse("L1H2"))
    with headwise.attach(model, plan=plan), headwise.attach(model, edits=edit):
        with headwise.attach(
            model, observers=[lambda call, out: seen.append((call.layer, call.attend(ones=True), out))]
        ):
            run_generate = generate(model, padded([24, 15]), 4)
    assert run_generate.shape == (2, 28)
    for layer, mass, out in seen[3:]:
        torch.testing.assert_close(mass, torch.ones_like(mass), atol=1e-5, rtol=0)
        assert layer != 1 or not out[:, :, 2].any()


def test_a_mixed_layer():
    rows = [[Full(), RULES["grows"]], [SinkWindow(2, 4), RULES["pooled"]], [RULES["slides"], RULES["share"]]]
    model, plan = tiny(), HeadPlan(patterns=rows, prefill="dense")
    both, cache = run(model, PADDED, plan, [18, 1, 1, 1])
    alone, _ = run(model, {"input_ids": PADDED["input_ids"][1:2, 9:]}, plan, [9, 1, 1, 1])
    torch.testing.assert_close(both[1:2, 9:], alone, atol=1e-4, rtol=1e-3)
    assert cache.nbytes == allocated(cache)
    assert "keep(6)" in cache.table()
