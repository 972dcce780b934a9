"""Key-value look-ups: the object holds the answer once, at the span; demonstrations are right; bad sizes are refused."""

import json
import re

import pytest
import torch

from headwise.errors import TaskError
from headwise.hub import byte_tokenizer
from headwise.tasks import make_keyvalues


def make(seed=0, **options):
    options = {"count": 1, "length": 900, "shots": 2, "key_length": 8} | options
    tokenizer = byte_tokenizer()
    return tokenizer, make_keyvalues(tokenizer, generator=torch.Generator().manual_seed(seed), **options)


def test_the_span_holds_the_value_of_the_key_that_is_asked_for():
    tokenizer, prompts = make(count=4)
    for prompt in prompts:
        body, _, after = prompt.text.partition("}\n\n")
        pairs = json.loads("{" + body.partition("{")[2] + "}")
        *solved, (key, rest) = re.findall(r'\{"(\w+)": "([^"]*)', after)
        assert len(solved) == 2 and all(pairs[k] == v for k, v in solved)
        assert rest == "" and pairs[key] == prompt.meta["answer"]
        assert tokenizer.decode(prompt.ids[slice(*prompt.needle_span)]) == prompt.meta["answer"]
        assert len({key, *(k for k, _ in solved)}) == 3


def test_as_many_pairs_as_fit():
    _, (short,) = make(length=900)
    _, (long,) = make(length=2400)
    assert 600 < len(short) <= 900 and 2000 < len(long) <= 2400
    assert long.meta["pairs"] > short.meta["pairs"] >= 4


def test_seeds():
    assert make(3)[1][0].text == make(3)[1][0].text != make(4)[1][0].text


@pytest.mark.parametrize(
    "options, words",
    [({"count": 0}, "count"), ({"shots": -1}, "shots"), ({"key_length": 2}, "key_length"), ({"length": 200}, "too short"),
     ({"length": 9000}, "context")],
)  # fmt: skip
def test_bad_sizes(options, words):
    with pytest.raises(TaskError, match=words):
        make(**options)
