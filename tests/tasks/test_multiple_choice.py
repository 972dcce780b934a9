"""Multiple choice: what is asked, what is marked, and what is refused."""

import pytest
import torch

from headwise.errors import TaskError
from headwise.hub import load_model
from headwise.tasks.multiple_choice import RANDOM, choice_pairs, chosen, make_multiple_choice


class Words:
    """A tokenizer that cuts at spaces, brackets and line ends: enough for the generator."""

    all_special_ids: tuple[int, ...] = ()
    eos_token_id = sep_token_id = None

    def __init__(self):
        self.vocabulary: dict[str, int] = {}

    def __call__(self, text, **options):
        for mark in "()[]\n":
            text = text.replace(mark, f" {mark} ")
        parts = text.replace("\n", "¶").split()
        return {"input_ids": [self.vocabulary.setdefault(part, len(self.vocabulary)) for part in parts]}


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("labels", ["letters", "shuffled", "random", "digits"])
def test_prompts_say_what_is_right(labels, side):
    tokenizer = Words()
    pairs = make_multiple_choice(tokenizer, count=8, labels=labels, seed=3, side=side)
    words = {number: word for word, number in tokenizer.vocabulary.items()}
    rows, marks = torch.arange(8), pairs.marks
    assert torch.equal(pairs.ids.gather(1, marks["labels"]), marks["choices"])
    for asked, option, ids in (("correct", pairs.answers, pairs.ids), ("other", pairs.contrasts, pairs.corrupt)):
        at = marks["labels"][rows, marks[asked]]
        assert torch.equal(ids[rows, at], option)
        assert torch.equal(
            ids[rows, at - 2], ids[rows, pairs.last - 1]
        )  # the word before its label is the one asked for
    names = {words[int(t)] for t in marks["choices"].flatten()}
    expected = {"letters": set("ABCD"), "shuffled": set("ABCD"), "digits": set("1234")}
    assert names == expected[labels] if labels in expected else names <= set(RANDOM)
    assert marks["correct"].tolist() == [0, 1, 2, 3] * 2
    if labels == "shuffled":
        assert len({tuple(row) for row in marks["choices"].tolist()}) > 1
    before = [set(pairs.ids[i, : int(marks["labels"][i, 0]) - 2].tolist()) for i in range(8)]
    assert all(not set(marks["choices"][i].tolist()) & before[i] for i in range(8))  # no label was used before


@pytest.mark.parametrize("labels", ["letters", "shuffled", "random", "digits"])
def test_questions_have_the_label_before_its_word(labels):
    tokenizer = Words()
    pairs = make_multiple_choice(tokenizer, count=8, labels=labels, form="question", seed=3)
    number, rows, marks = tokenizer.vocabulary, torch.arange(8), pairs.marks
    assert torch.equal(pairs.ids.gather(1, marks["labels"]), marks["choices"])
    for asked, answer, ids in (("correct", pairs.answers, pairs.ids), ("other", pairs.contrasts, pairs.corrupt)):
        at = marks["labels"][rows, marks[asked]]
        assert torch.equal(ids[rows, at], answer)
        assert all(ids[i, pairs.last[i]] == number["("] for i in range(8))
        words = ids[rows, at + 2]  # ( A ) word
        question = ids.tolist()
        last = [len(q) - 1 - q[::-1].index(number["Which"]) for q in question]
        assert [q[n + 2] for q, n in zip(question, last)] == [number[f"{w}?"] for w in _names(number, words)]
    assert bool((pairs.ids != pairs.corrupt).sum(1).eq(1).all())  # the twin asks for another word, all else is the same


@pytest.mark.parametrize("form", ["recall", "question"])
def test_other_brackets_are_the_same_prompts(form):
    tokenizer = Words()
    plain = make_multiple_choice(tokenizer, count=4, form=form, seed=3)
    square = make_multiple_choice(tokenizer, count=4, form=form, brackets="[]", seed=3)
    number = tokenizer.vocabulary
    swapped = plain.ids.clone()
    for one, other in (("(", "["), (")", "]")):
        swapped[plain.ids == number[one]] = number[other]
    assert torch.equal(square.ids, swapped) and torch.equal(square.answers, plain.answers)


def _names(vocabulary, tokens):
    words = {number: word for word, number in vocabulary.items()}
    return [words[int(t)] for t in tokens]


def test_seeds():
    tokenizer = Words()
    one, again, other = (make_multiple_choice(tokenizer, count=4, seed=s) for s in (1, 1, 2))
    assert torch.equal(one.ids, again.ids) and not torch.equal(one.ids, other.ids)


def test_chosen_looks_at_labels_only():
    pairs = choice_pairs([[5, 8, 6, 9]], [[5, 8, 6, 8]], [[0, 2]], [[5, 6]], correct=[1], other=[0])
    logits = torch.zeros(1, 10)
    logits[0, 9], logits[0, 6] = 5.0, 1.0
    assert chosen(logits, pairs).tolist() == [1]


def test_bad_input():
    with pytest.raises(TaskError, match="labels='roman'"):
        make_multiple_choice(Words(), labels="roman")
    with pytest.raises(TaskError, match="brackets='<>'"):
        make_multiple_choice(Words(), brackets="<>")
    with pytest.raises(TaskError, match="form='essay'"):
        make_multiple_choice(Words(), form="essay")
    with pytest.raises(TaskError, match="words, 22 are one"):
        make_multiple_choice(Words(), shots=9)
    with pytest.raises(TaskError, match="options is 1"):
        make_multiple_choice(Words(), options=1)
    with pytest.raises(TaskError, match="0 are one"):
        make_multiple_choice(load_model("tiny-random-llama")[1])
    with pytest.raises(TaskError, match="no label"):
        choice_pairs([[5, 8]], [[5, 9]], [[0, 1]], [[5, 6]], correct=[1], other=[0])
    with pytest.raises(TaskError, match="must differ"):
        choice_pairs([[5, 6]], [[5, 6]], [[0, 1]], [[5, 6]], correct=[1], other=[1])
    with pytest.raises(TaskError, match="4 and 5 tokens"):
        choice_pairs([[5, 6, 7, 7]], [[5, 6, 7, 7, 7]], [[0, 1]], [[5, 6]], correct=[1], other=[0])
    with pytest.raises(TaskError, match="as many labels"):
        choice_pairs([[5, 6]] * 2, [[5, 7]] * 2, [[0, 1], [0]], [[5, 6], [5]], correct=[1, 0], other=[0, 1])


@pytest.mark.smollm2
def test_smollm2_answers_with_labels_that_say_nothing():
    from headwise.score import Quiz

    model, tokenizer = load_model("smollm2")
    pairs = make_multiple_choice(tokenizer, count=8, labels="shuffled", seed=1)
    assert (Quiz(model, pairs).choose()[0] == pairs.marks["correct"]).float().mean() >= 0.6  # chance is 0.25
