"""Exact match and perplexity: the two ways agree, batches equal single rows, and interventions are felt."""

import json
import math
from typing import ClassVar

import pytest
import torch
from transformers import DynamicCache

from headwise.errors import TaskError
from headwise.hub import available_models, load_model
from headwise.tasks import (
    Prompt,
    english,
    exact_match,
    generate_match,
    make_needles,
    make_passkeys,
    perplexity,
    wilson,
    window_losses,
)
from headwise.tasks.texts import encode

NO_LM = ("vit", "clip", "bert")
CAUSAL = [n for n, _ in available_models() if n.startswith("tiny") and not n.endswith(NO_LM)]


def prompts_of(tokenizer, seed: int = 0) -> list[Prompt]:
    """Prompts of several lengths, with answers of two lengths."""
    generator = torch.Generator().manual_seed(seed)
    made = [
        make_passkeys(tokenizer, count=2, length=length, generator=generator, digits=digits)
        for length, digits in ((230, 5), (170, 3), (201, 5))
    ]
    return [prompt for few in made for prompt in few]


@pytest.fixture(scope="module")
def llama():
    return load_model("tiny-random-llama")


@pytest.fixture(scope="module")
def chain():
    """A model whose next token depends on the last one alone, and a function that makes prompts it answers rightly."""
    model, _ = load_model("tiny-random-llama")
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        follows = model(torch.arange(320)[None]).logits[0].argmax(-1).tolist()

    def prompt(first: int, length: int, answer: int = 3, right: bool = True) -> Prompt:
        said = [first]
        for _ in range(answer):
            said.append(follows[said[-1]])
        if not right:
            said[-1] = (said[-1] + 1) % 320
        ids = [*range(length - answer - 1), *said[1:], first]
        span = (length - answer - 1, length - 1)
        return Prompt(torch.tensor(ids), torch.tensor(said[1:]), span, "")

    return model, prompt


@pytest.mark.parametrize("kwargs", [{}, {"through": "cache"}, {"through": "cache", "step": 0, "tail": 4}])
def test_right_and_wrong_answers_are_told_apart_in_the_order_given(chain, kwargs):
    model, prompt = chain
    prompts = [prompt(65, 30), prompt(66, 12, right=False), prompt(67, 20, answer=5), prompt(68, 25)]
    for batch_size in (1, 3):
        result = exact_match(model, prompts, batch_size=batch_size, **kwargs)
        assert result.exact == (True, False, True, True)
        assert result.token_accuracy == pytest.approx((1, 2 / 3, 1, 1))
        assert (result.mean, result.tokens) == pytest.approx((3 / 4, 11 / 12))
        assert [len(p) for p in result.predicted] == [3, 3, 5, 3]


def test_generation_agrees(chain, llama):
    model, prompt = chain
    prompts = [prompt(65, 30), prompt(66, 12, right=False), prompt(67, 20, answer=5)]
    assert generate_match(model, prompts, batch_size=2).exact == (True, False, True)
    model, tokenizer = llama
    prompts = prompts_of(tokenizer)
    forced, generated = exact_match(model, prompts), generate_match(model, prompts, batch_size=4)
    assert forced.exact == generated.exact
    assert [p[0] for p in forced.predicted] == [p[0] for p in generated.predicted]


def test_generation_that_ends_early_counts_as_wrong(chain):
    model, prompt = chain
    asked = prompt(65, 30)
    end, model.generation_config.eos_token_id = model.generation_config.eos_token_id, int(asked.answer_ids[0])
    result = generate_match(model, [asked])
    model.generation_config.eos_token_id = end
    assert not result.exact[0]
    assert result.predicted[0][1:] == (-1, -1)


@pytest.mark.parametrize("name", CAUSAL)
def test_batches_and_both_ways_equal_single_forwards(name):
    model, tokenizer = load_model(name)
    prompts = prompts_of(tokenizer)
    expected = exact_match(model, prompts)
    for kwargs in (
        {"batch_size": 4},
        {"batch_size": 4, "padding": "right"},
        {"batch_size": 4, "through": "cache"},
        {"batch_size": 3, "through": "cache", "step": 0},
        {"batch_size": 2, "through": "cache", "tail": 20, "step": 7},
    ):
        assert exact_match(model, prompts, **kwargs).predicted == expected.predicted, kwargs


def test_a_hook_is_felt_both_ways(llama):
    model, tokenizer = llama
    prompts = prompts_of(tokenizer)
    before = exact_match(model, prompts).predicted
    hook = model.model.layers[0].self_attn.o_proj.register_forward_hook(lambda module, args, out: out * 0)
    try:
        one, cached = exact_match(model, prompts).predicted, exact_match(model, prompts, through="cache").predicted
    finally:
        hook.remove()
    assert one == cached != before
    assert exact_match(model, prompts).predicted == before


class Counting(DynamicCache):
    """Keeps the query lengths that it was updated with at layer 0."""

    made: ClassVar[list["Counting"]] = []

    def __init__(self):
        super().__init__()
        self.lengths = []
        Counting.made.append(self)

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        if layer_idx == 0:
            self.lengths.append(key_states.shape[2])
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)


def test_a_cache_of_ones_own_is_made_per_batch_and_fed_as_asked(llama):
    model, tokenizer = llama
    prompts = make_passkeys(tokenizer, count=2, length=200, generator=torch.Generator().manual_seed(0))
    size = max(len(p) for p in prompts)
    Counting.made.clear()
    exact_match(model, prompts, through="cache", tail=3, step=2, cache=Counting)
    assert [c.lengths for c in Counting.made] == [[len(p) - 3, 2, 2, 2, 1] for p in sorted(prompts, key=len)]
    Counting.made.clear()
    generate_match(model, prompts, batch_size=2, cache=Counting)
    assert [c.lengths for c in Counting.made] == [[size, 1, 1, 1, 1]]


def test_the_model_is_left_as_it_was(llama):
    model, tokenizer = llama
    model.train()
    exact_match(model, prompts_of(tokenizer)[:1])
    assert model.training
    model.eval()
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_perplexity_is_that_of_the_models_own_loss(llama):
    model, tokenizer = llama
    ids = torch.tensor(encode(tokenizer, english("eval")[:900]))
    with torch.no_grad():
        losses = [model(row[None], labels=row[None]).loss.item() for row in ids[:512].view(4, 128)]
    expected = math.exp(sum(losses) / 4)
    assert perplexity(model, ids, window=128, tokens=600) == pytest.approx(expected, rel=1e-5)
    assert perplexity(model, ids.tolist(), window=128, tokens=512, batch_size=3) == pytest.approx(expected, rel=1e-5)
    for step in (1, 50, 128, 500):
        cached = perplexity(model, ids, window=128, tokens=512, batch_size=4, through="cache", step=step)
        assert cached == pytest.approx(expected, rel=1e-4), step
    assert window_losses(model, ids, window=128, tokens=512).tolist() == pytest.approx(losses, rel=1e-5)


def test_long_windows_are_summed_in_parts(llama):
    model, _ = llama
    ids = torch.randint(256, (1100,), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model(ids[None], labels=ids[None]).loss.item()
    assert window_losses(model, ids, window=1100).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    "call, text",
    [
        (lambda m, p: exact_match(m, []), "no prompts"),
        (lambda m, p: exact_match(m, p, batch_size=0), "batch_size"),
        (lambda m, p: exact_match(m, p, through="magic"), "one-forward"),
        (lambda m, p: exact_match(m, p, through="cache", tail=0), "tail=0"),
        (lambda m, p: exact_match(m, p, through="cache", step=-1), "step=-1"),
        (lambda m, p: exact_match(m, p, through="cache", tail=500), "leaves no token"),
        (lambda m, p: perplexity(m, p[0].ids, window=5000), "exceed the model's context"),
        (lambda m, p: perplexity(m, p[0].ids, window=400), "cannot be cut"),
        (lambda m, p: perplexity(m, p[0].ids, window=1), "window=1"),
        (lambda m, p: exact_match(load_model("tiny-random-bert")[0], p), "no causal language model"),
    ],
)
def test_what_cannot_be_measured(llama, call, text):
    model, tokenizer = llama
    with pytest.raises(TaskError, match=text):
        call(model, make_passkeys(tokenizer, count=2, length=200, generator=torch.Generator().manual_seed(0)))


def test_a_prompt_beyond_the_context(llama):
    ids = torch.zeros(4096, dtype=torch.long)
    with pytest.raises(TaskError, match="4098 tokens exceed the model's context of 4096"):
        exact_match(llama[0], [Prompt(ids, ids[:2], (0, 2), "")])


def test_results_print_and_export(chain):
    model, prompt = chain
    result = exact_match(model, [prompt(65, 30), prompt(66, 12, right=False)], progress=True)
    assert str(result).startswith("1/2 exact (95 % interval 0.09 to 0.91), 0.83")
    assert json.loads(json.dumps(result.to_dict()))["exact"] == 0.5


def test_wilson_is_that_of_the_books():
    assert wilson(8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert wilson(0, 8) == pytest.approx((0.0, 0.3244), abs=1e-4)
    for bad in ((0, 0), (3, 2), (-1, 2)):
        with pytest.raises(TaskError):
            wilson(*bad)


@pytest.mark.smollm2
def test_smollm2_finds_the_key_both_ways_and_reads_english():
    model, tokenizer = load_model()
    generator = torch.Generator().manual_seed(0)
    prompts = make_passkeys(tokenizer, count=2, length=256, generator=generator)
    assert exact_match(model, prompts, batch_size=2).exact == (True, True)
    assert exact_match(model, prompts, batch_size=2, through="cache").exact == (True, True)
    assert exact_match(model, make_needles(tokenizer, count=1, length=256, generator=generator)).exact == (True,)
    ids = torch.tensor(encode(tokenizer, english("eval")[:6000]))
    assert 8 < perplexity(model, ids, window=512, tokens=512) < 30
