"""Pairs of prompts: aligned, padded on either side, marked where they say."""

import pytest
import torch

from headwise.errors import TaskError
from headwise.hub import load_model
from headwise.tasks.colored_objects import make_colored_objects
from headwise.tasks.ioi import make_ioi
from headwise.tasks.pairs import PromptPairs, make_induction


def test_both_sides_hold_the_same_tokens():
    rows = ([[5, 6, 7], [8, 9]], [[5, 1, 7], [8, 2]], [3, 3], [4, 4])
    left, right = PromptPairs.of(*rows, pad=0, side="left"), PromptPairs.of(*rows, pad=9, side="right")
    for i, row in enumerate(rows[0]):
        assert left.ids[i][left.mask[i]].tolist() == right.ids[i][right.mask[i]].tolist() == row
    assert left.last.tolist() == [2, 2]
    assert right.last.tolist() == [2, 1]
    assert left.swapped().ids.tolist() == left.corrupt.tolist()


def test_a_token_of_id_zero_is_no_padding():
    assert PromptPairs.of([[0, 0]], [[0, 1]], [1], [2]).mask.all()


def test_induction_answers_follow_the_repeated_token():
    pairs = make_induction(64, count=8, length=9, seed=2)
    for i in range(8):
        row, twin = pairs.ids[i][pairs.mask[i]], pairs.corrupt[i][pairs.mask[i]]
        at = int((row[:-1] == row[-1]).nonzero()[0]) + 1
        assert row[at] == pairs.answers[i]
        assert twin[at] == pairs.contrasts[i]
        assert (row != twin).sum() == 1
    assert torch.equal(pairs.ids, make_induction(64, count=8, length=9, seed=2).ids)


def test_bad_pairs_are_named():
    with pytest.raises(TaskError, match="pair 0 has 2 and 1 tokens"):
        PromptPairs.of([[1, 2]], [[1]], [1], [2])
    with pytest.raises(TaskError, match="side="):
        PromptPairs.of([[1]], [[1]], [1], [2], side="top")
    with pytest.raises(TaskError, match="vocabulary"):
        make_induction(5, length=9)
    _, tokenizer = load_model("tiny-random-llama")
    with pytest.raises(TaskError, match="names are one token"):
        make_ioi(tokenizer)
    with pytest.raises(TaskError, match="one token"):
        make_colored_objects(tokenizer)


@pytest.mark.smollm2
def test_words_stand_where_the_marks_say():
    _, tokenizer = load_model("smollm2")
    ioi = make_ioi(tokenizer, count=6, seed=1)
    rows = torch.arange(6)
    assert torch.equal(ioi.ids[rows, ioi.marks["io"]], ioi.answers)
    assert torch.equal(ioi.ids[rows, ioi.marks["s2"]], ioi.contrasts)
    assert torch.equal(ioi.corrupt[rows, ioi.marks["s2"]], ioi.answers)
    colors = make_colored_objects(tokenizer, count=6, seed=1)
    for i in range(6):
        text = tokenizer.decode(colors.ids[i][colors.mask[i]])
        block = text.rsplit("Q:", 1)[1]
        first = {word.strip(",.?") for word in text.rsplit("Q:", 1)[0].lower().split()}
        right = tokenizer.decode(colors.ids[i, colors.marks["right"][i]])
        asked = block.split("What color is the ")[1].split("?")[0]
        assert f"{right} {asked}" in block
        assert tokenizer.decode(colors.answers[i]).lower() == right
        wrong = [tokenizer.decode(colors.ids[i, c]) for c in colors.marks["wrong"][i]]
        assert sorted(tokenizer.decode(c).lower() for c in colors.marks["choices"][i]) == sorted(wrong)
        assert not first & {w.strip() for w in (*wrong, right)}
