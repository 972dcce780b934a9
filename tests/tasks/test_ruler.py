"""Needles of several kinds: lengths, answers that stand where they should, and every fact in the text."""

import pytest
import torch

from headwise import load_model
from headwise.errors import TaskError
from headwise.hub import byte_tokenizer
from headwise.tasks.evaluate import exact_match
from headwise.tasks.ruler import MAKERS, make_multi_key, make_multi_value, make_ruler, make_variable_tracking


def draw(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("task", MAKERS)
@pytest.mark.parametrize("length", [420, 777])
def test_prompts_are_as_long_as_asked_and_hold_their_answer(task, length):
    tokenizer = byte_tokenizer()
    for prompt in make_ruler(tokenizer, task, count=3, length=length, generator=draw()):
        assert length - 4 <= len(prompt) <= length
        start, stop = prompt.needle_span
        assert tokenizer.decode(prompt.ids[start:stop]).strip() == prompt.meta["answer"]
        assert prompt.meta["task"] == task and stop < len(prompt) - 10


@pytest.mark.parametrize("task", MAKERS)
def test_draws_follow_the_seed(task):
    made = [make_ruler(byte_tokenizer(), task, count=2, length=500, generator=draw(seed)) for seed in (0, 0, 1)]
    assert [p.text for p in made[0]] == [p.text for p in made[1]] != [p.text for p in made[2]]
    assert made[0][0].text != made[0][1].text


def test_what_the_texts_say():
    key = make_multi_key(byte_tokenizer(), length=900, generator=draw(), keys=6)
    assert key.text.count("The number of the") == 7
    values = make_multi_value(byte_tokenizer(), length=900, generator=draw(), values=4)
    tail = values.text[values.text.rindex("The 4 numbers") :]
    assert values.text.count("A number of the") == 4 and values.meta["answer"] not in tail and tail.count(",") == 3
    hops = make_variable_tracking(byte_tokenizer(), length=900, generator=draw(), hops=3)
    assert hops.text.count(" is the number of the ") == 3 and hops.text.count(hops.meta["answer"]) == 1


@pytest.mark.parametrize(
    "call, word",
    [
        (lambda t: make_ruler(t, "hay", count=1, length=500, generator=draw()), "there are multi-key"),
        (lambda t: make_ruler(t, "multi-key", count=0, length=500, generator=draw()), "count=0"),
        (lambda t: make_multi_key(t, length=60, generator=draw()), "too short"),
        (lambda t: make_multi_key(t, length=500, keys=99, generator=draw()), "99 names"),
        (lambda t: make_multi_key(t, length=500, keys=0, generator=draw()), "0 names"),
        (lambda t: make_multi_value(t, length=500, digits=0, generator=draw()), "digits=0"),
        (lambda t: make_multi_key(t, length=10**9, generator=draw()), "exceed the context"),
    ],
)
def test_bad_input(call, word):
    tokenizer = byte_tokenizer()
    tokenizer.model_max_length = min(tokenizer.model_max_length, 4096)
    with pytest.raises(TaskError, match=word):
        call(tokenizer)


def test_they_are_measured_like_any_prompt():
    model, tokenizer = load_model("tiny-random-llama")
    made = make_ruler(tokenizer, "multi-key", count=3, length=300, generator=draw())
    assert len(exact_match(model, made, batch_size=3, through="cache").exact) == 3
