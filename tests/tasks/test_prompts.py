"""Passkey and needle prompts: length, depth, the span of the answer, and what is refused."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from headwise.errors import TaskError
from headwise.hub import byte_tokenizer, load_model
from headwise.tasks import (
    NEEDLES,
    Needle,
    Prompt,
    even_depths,
    find_span,
    insert_needle,
    make_needle,
    make_needles,
    make_passkey,
    make_passkeys,
)
from headwise.tasks.texts import encode

TOKENIZER = byte_tokenizer()


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@given(length=st.integers(200, 1500), depth=st.floats(0, 1), digits=st.integers(1, 9), seed=st.integers(0, 2**32))
@settings(max_examples=40, deadline=None)
def test_passkeys_of_all_sizes(length, depth, digits, seed):
    prompt = make_passkey(TOKENIZER, length=length, depth=depth, digits=digits, generator=seeded(seed))
    start, stop = prompt.needle_span
    assert length - 8 <= len(prompt) <= length
    assert len(prompt.answer_ids) == stop - start == digits
    assert prompt.ids[start:stop].equal(prompt.answer_ids)
    assert TOKENIZER.decode(prompt.answer_ids) == prompt.meta["key"]
    assert prompt.text.startswith("The pass key is ", len(prompt.text) - 16)
    assert TOKENIZER.decode(prompt.ids[:start]).endswith("\n\nThe pass key is ")
    assert "0" not in prompt.meta["key"]


def test_a_short_key_that_also_stands_in_the_text_is_found_in_the_needle():
    """One digit among many: the span is that of the needle, not of the digit nearest to the depth."""
    text = "Issue 1 2 3 4 5 6 7 8 9. " * 40
    for seed in range(8):
        prompt = make_passkey(TOKENIZER, length=400, depth=0.4, digits=1, generator=seeded(seed), haystack=text)
        assert TOKENIZER.decode(prompt.ids[: prompt.needle_span[0]]).endswith("The pass key is ")


@pytest.mark.parametrize("depth", [0, 0.25, 0.5, 1])
def test_the_key_stands_where_it_was_asked_for(depth):
    prompt = make_passkey(TOKENIZER, length=2000, depth=depth, generator=seeded())
    assert prompt.needle_span[0] / len(prompt) == pytest.approx(depth, abs=0.06)


def test_prompts_are_a_matter_of_the_generator_alone():
    first, second = (make_passkeys(TOKENIZER, count=3, length=400, generator=seeded(5)) for _ in range(2))
    assert all(a.ids.equal(b.ids) for a, b in zip(first, second, strict=True))
    assert len({p.meta["key"] for p in first}) == 3
    assert [p.meta["depth"] for p in first] == [0.05, 0.5, 0.95]


@pytest.mark.parametrize("needle", NEEDLES)
@pytest.mark.parametrize("chat", [False, True])
def test_needles_stand_after_a_full_stop_and_are_found(needle, chat):
    prompt = make_needle(TOKENIZER, length=900, depth=0.6, generator=seeded(), needle=needle, chat=chat)
    start, stop = prompt.needle_span
    assert TOKENIZER.decode(prompt.ids[start:stop]) == f" {needle.answer}"
    assert TOKENIZER.decode(prompt.ids[:start]).endswith(f". {needle.lead}")
    assert prompt.text.endswith(needle.lead)
    assert prompt.text.startswith("<|im_start|>") == chat
    assert 890 <= len(prompt) <= 900


def test_a_needle_of_ones_own_and_the_round_of_needles():
    own = Needle("Who rang?", "The one who rang was", "the postman")
    assert (
        "The one who rang was the postman."
        in make_needle(
            TOKENIZER, length=500, depth=0.5, generator=seeded(), needle=own, haystack="It rained all day. " * 40
        ).text
    )
    made = make_needles(TOKENIZER, count=7, length=700, generator=seeded())
    assert [p.meta["needle"] for p in made] == [NEEDLES[i % len(NEEDLES)].sentence for i in range(7)]


def test_a_decoy_elsewhere_does_not_move_the_span():
    hay = "The number 11111 is a decoy. " * 60
    for depth in (0.1, 0.9):
        prompt = make_passkey(TOKENIZER, length=900, depth=depth, generator=seeded(1), haystack=hay)
        assert TOKENIZER.decode(prompt.ids[: prompt.needle_span[0]]).endswith("The pass key is ")


class JoiningTokenizer:
    """Splits into words that carry the space before them, as GPT-2 does: a lone space merges with what follows."""

    eos_token_id = sep_token_id = None
    model_max_length = 10_000

    def __init__(self):
        self.known: dict[str, int] = {}

    def __call__(self, text, add_special_tokens=True, verbose=True):
        import re

        pieces = re.findall(r" ?\w+| ?[^\w\s]+|\s+(?!\S)|\s", text)
        return {"input_ids": [self.known.setdefault(piece, len(self.known)) for piece in pieces]}


def test_the_space_moves_into_the_answer_where_the_tokenizer_joins_it():
    prompt = make_passkey(JoiningTokenizer(), length=300, depth=0.5, generator=seeded())
    assert prompt.text.endswith("The pass key is")
    assert prompt.meta["answer"].startswith(" ")
    assert len(prompt.answer_ids) == 1


class StartAndEnd:
    """A tokenizer that puts a start token before and an end token after."""

    eos_token_id, sep_token_id, model_max_length = 258, None, 4096

    def __call__(self, text, add_special_tokens=True, verbose=True):
        ids = list(text.encode())
        return {"input_ids": [257, *ids, 258] if add_special_tokens else ids}


def test_start_tokens_are_kept_and_end_tokens_are_not():
    assert encode(StartAndEnd(), "ab", special=True) == [257, 97, 98]
    prompt = make_passkey(StartAndEnd(), length=300, depth=0.5, generator=seeded())
    assert prompt.ids[0] == 257
    assert 258 not in prompt.ids


@pytest.mark.parametrize(
    "change, text",
    [
        ({"depth": -0.1}, "between 0 and 1"),
        ({"depth": 1.5}, "between 0 and 1"),
        ({"length": 20}, "too short"),
        ({"length": 4096}, "exceed the context of 4096"),
        ({"digits": 0}, "at least one"),
        ({"haystack": "  "}, "empty"),
    ],
)
def test_what_makes_no_passkey(change, text):
    arguments = {"length": 400, "depth": 0.5, "generator": seeded(), **change}
    with pytest.raises(TaskError, match=text):
        make_passkey(TOKENIZER, **arguments)


def test_what_makes_no_needle():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(TaskError, match="no chat template"):
        make_needle(tokenizer, length=600, depth=0.5, generator=seeded(), chat=True)
    with pytest.raises(TaskError, match="at least one prompt"):
        make_needles(tokenizer, count=0, length=600, generator=seeded())
    with pytest.raises(TaskError, match="does not hold the answer"):
        Prompt(torch.arange(5), torch.tensor([1, 2]), (2, 4), "")
    with pytest.raises(TaskError, match="expected"):
        Prompt(torch.arange(5), torch.tensor([], dtype=torch.long), (2, 2), "")


class Forgetful(JoiningTokenizer):
    """The same word never gets the same token twice, so no answer is ever found."""

    def __call__(self, text, add_special_tokens=True, verbose=True):
        return {"input_ids": list(range(len(text.split(" "))))}


def test_an_answer_that_is_not_found_is_said():
    with pytest.raises(TaskError, match="not found in the prompt"):
        make_passkey(Forgetful(), length=300, depth=0.5, generator=seeded())


def test_spans_keep_the_order():
    assert find_span([3, 2, 1, 1, 2, 3], [1, 2, 3]) == (3, 6)
    assert find_span([1, 2, 0, 1, 2], [1, 2], near=5) == (3, 5)
    assert find_span([], [1]) is None


def test_insertion_and_depths():
    hay = "First one. Second one.\nThird one."
    assert insert_needle(hay, "|", 0.0) == "|" + hay
    assert insert_needle(hay, "|", 1.0) == hay + "|"
    assert insert_needle(hay, "|", 0.9) == "First one. Second one.|\nThird one."
    assert insert_needle("no stop at all", "|", 0.5) == "|no stop at all"
    assert insert_needle("no stop at all", "|", 0.5, at="word") == "no| stop at all"
    assert even_depths(1) == [0.5]


@pytest.mark.smollm2
def test_prompts_of_a_real_tokenizer():
    from transformers import AutoTokenizer

    from headwise.hub.smollm2 import smollm2_folder

    tokenizer = AutoTokenizer.from_pretrained(smollm2_folder())
    for prompt in make_passkeys(tokenizer, count=4, length=512, generator=seeded()):
        assert len(prompt.answer_ids) == 5
        assert 505 <= len(prompt) <= 512
    for chat in (False, True):
        for prompt in make_needles(tokenizer, count=5, length=512, generator=seeded(), chat=chat):
            assert tokenizer.decode(prompt.ids[slice(*prompt.needle_span)]) == prompt.meta["answer"]


def test_bundled_tokenizers_know_their_limit():
    _, tokenizer = load_model("tiny-random-gpt2")
    with pytest.raises(TaskError, match="exceed the context"):
        make_passkey(tokenizer, length=5000, depth=0.5, generator=seeded())
