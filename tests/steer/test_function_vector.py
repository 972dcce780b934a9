"""Function vectors and task vectors: effects against one pass a head, sums against the layer, where the vector acts, files, errors."""

import pytest
import torch

import headwise
from headwise.attach import fingerprint
from headwise.attach.projection import output_projection
from headwise.edits import Edit
from headwise.errors import AttachError, EditError, TaskError, WrongModelError
from headwise.hub import load_model
from headwise.steer import ResidualInjection, ResidualVector, causal_effects
from headwise.steer._residual import best_layer, block, last_hidden
from headwise.steer.function_vector import shuffled_prompts, summed
from headwise.tasks.icl import Template, encode_item, icl_pairs
from headwise.units import HeadSet
from tiny_helper import generate, logits, padded, random, state, tiny, tokens

ITEMS = [encode_item(load_model("tiny-random-llama")[1], Template().ask(x), y) for x, y in icl_pairs("next-letter")[:3]]


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3"])
@pytest.mark.parametrize("rows", [5, 90])
def test_causal_effects_equal_one_full_pass_a_head(name, rows):
    model = tiny(name)
    L = headwise.find_stack(model).layers
    vectors = random(L, 4, 16)
    got = causal_effects(model, ITEMS[:2], vectors, rows=rows)
    for layer, head in ((0, 0), (0, 3), (L - 1, 2)):
        gains = []
        for item in ITEMS[:2]:
            edit = Edit.replace(HeadSet.of([(layer, head)]), vectors[layer, head][None], tokens="last")
            batch, wanted = {"input_ids": item.ids[None]}, int(item.answer[0])
            plain = logits(model, batch)[0, -1].softmax(-1)[wanted]
            with headwise.attach(model, edits=edit):
                gains.append(logits(model, batch)[0, -1].softmax(-1)[wanted] - plain)
        assert got.values[layer, head].item() == pytest.approx(torch.stack(gains).mean().item(), abs=1e-6)
    assert got.values.abs().max() > 1e-4


def test_vectors_may_differ_from_prompt_to_prompt():
    model, vectors = tiny(), random(2, 3, 4, 16)
    both = causal_effects(model, ITEMS[:2], vectors)
    alone = [causal_effects(model, [ITEMS[i]], vectors[i]).values for i in (0, 1)]
    torch.testing.assert_close(both.values, (alone[0] + alone[1]) / 2, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_all_heads_of_a_layer_sum_to_its_output_without_the_bias(name):
    model, vectors = tiny(name), random(3, 4, 16)
    project = output_projection(headwise.find_stack(model), 1)
    bias = 0.0 if project.bias is None else project.bias
    got = summed(model, vectors, HeadSet.of([(1, head) for head in range(4)]))
    torch.testing.assert_close(got, (project(vectors[1].flatten()) - bias).detach(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3-moe"])
@pytest.mark.parametrize("mode", ["add", "replace"])
def test_the_vector_acts_behind_one_layer_at_the_last_token_only(name, mode):
    model = tiny(name)
    vector, seen = random(64), {}
    handles = [block(model, i).register_forward_hook(lambda m, a, o, i=i: seen.update({i: o})) for i in range(2)]
    batch = padded((4, 7))
    plain = logits(model, batch)
    before = {i: (o[0] if isinstance(o, tuple) else o).clone() for i, o in seen.items()}
    with ResidualVector(vector, 1, mode, fingerprint(model)).attach(model):
        changed = logits(model, batch)
    for handle in handles:
        handle.remove()
    assert (changed[:, -1] - plain[:, -1]).abs().max() > 1e-3
    assert changed[:, :-1].equal(plain[:, :-1])
    now = ResidualInjection(model, 1, vector[None], mode)
    after = []
    handle = block(model, 1).register_forward_hook(lambda m, a, o: after.append(o[0] if isinstance(o, tuple) else o))
    logits(model, batch)
    handle.remove()
    now.detach()
    wanted = before[1].clone()
    wanted[:, -1] = wanted[:, -1] + vector if mode == "add" else vector
    torch.testing.assert_close(after[0], wanted, rtol=0, atol=1e-5)


def test_the_own_state_in_its_own_place_changes_nothing_and_decoding_is_left_alone():
    model, item = tiny(), ITEMS[0]
    before = state(model)
    states = last_hidden(model, [item])[0]
    batch = {"input_ids": item.ids[None], "attention_mask": torch.ones(1, len(item.ids), dtype=torch.long)}
    with ResidualVector(states[1], 1, "replace", fingerprint(model)).attach(model):
        torch.testing.assert_close(logits(model, batch), logits(model, batch), rtol=0, atol=0)
        written = generate(model, batch)
    assert written.equal(generate(model, batch)) and state(model) == before


def test_last_hidden_does_not_depend_on_the_batch():
    model = tiny()
    longer = [*ITEMS, encode_item(load_model("tiny-random-llama")[1], "a much longer prompt", "x")]
    alone = torch.cat([last_hidden(model, [item]) for item in longer])
    torch.testing.assert_close(last_hidden(model, longer), alone, rtol=0, atol=1e-5)


def test_the_best_layer_has_the_lowest_loss():
    layer, losses = best_layer(tiny(), random(3, 64), "add", ITEMS)
    assert len(losses) == 3 and losses[layer] == min(losses) and len(set(losses)) == 3


def test_shuffled_prompts_hold_the_same_words_with_other_answers():
    tokenizer = load_model("tiny-random-llama")[1]
    pairs = icl_pairs("next-letter")
    items = shuffled_prompts(tokenizer, pairs, 3, 8, Template(), torch.Generator().manual_seed(0))
    text = tokenizer.decode(items[0].ids)
    shown = [block.split("\nA: ") for block in text.removeprefix("Q: ").split("\n\nQ: ")[:-1]]
    assert len(shown) == 8 and sorted(y for _, y in shown) == sorted(dict(pairs)[x] for x, _ in shown)
    assert any(dict(pairs)[x] != y for x, y in shown)


def test_methods_give_vectors_that_save_load_and_refuse_other_models(tmp_path):
    model, tokenizer = load_model("tiny-random-llama")
    before = state(model)
    found = headwise.steer.function_vector(model, tokenizer, task="next-letter", prompts=2, shots=2, trials=1, top=3)
    other = headwise.steer.task_vector(model, tokenizer, task="next-letter", prompts=2, shots=2)
    assert state(model) == before
    for vector in (found, other):
        vector.save(tmp_path / "v.safetensors")
        back = ResidualVector.load(tmp_path / "v.safetensors")
        assert back.vector.equal(vector.vector) and str(back) == str(vector) and back.meta == vector.meta
        with pytest.raises(WrongModelError):
            back.attach(tiny("gpt2"))
    assert len(HeadSet.parse(found.meta["heads"])) == 3


@pytest.mark.parametrize(
    "method, options, error, word",
    [
        ("function_vector", {"trials": 0}, EditError, "trials"),
        ("function_vector", {"prompts": 0}, EditError, "prompts"),
        ("function_vector", {"layer": 7, "heads": HeadSet.parse("L0H0")}, EditError, "layer"),
        ("task_vector", {"layer": 7}, EditError, "layer"),
        ("task_vector", {"shots": 60}, TaskError, "at least 61"),
    ],
)
def test_bad_options_are_named(method, options, error, word):
    model, tokenizer = load_model("tiny-random-llama")
    with pytest.raises(error, match=word):
        getattr(headwise.steer, method)(model, tokenizer, **{"task": "next-letter", "shots": 2, **options})


def test_one_vector_a_row():
    model, vectors, batch = tiny(), random(2, 64), {"input_ids": tokens(2, 5)}
    with ResidualInjection(model, 1, vectors, "add"):
        together = logits(model, batch)
        with pytest.raises(AttachError, match="2 vectors for a batch of 3"):
            logits(model, {"input_ids": tokens(3, 5)})
    for row in range(2):
        with ResidualInjection(model, 1, vectors[row][None], "add"):
            torch.testing.assert_close(logits(model, batch)[row], together[row], rtol=0, atol=1e-5)
