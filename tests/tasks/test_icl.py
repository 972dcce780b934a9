"""Families of in-context tasks: right pairs, splits without overlap, prompts, tokens, batches."""

import pytest
import torch

from headwise.errors import TaskError
from headwise.hub import load_model
from headwise.tasks.icl import Template, draw_few_shot, encode_item, icl_pairs, icl_split, icl_tasks, spaced
from headwise.tasks.icl_batch import pack, row_losses
from tiny_helper import tiny

KNOWN = {
    "antonym": ("hot", None), "capitalize": ("apple", "Apple"), "city-country": ("Paris", "France"),
    "country-capital": ("Japan", "Tokyo"), "comparative": ("big", "bigger"), "demonym": ("France", "French"),
    "first-letter": ("tiger", "t"), "first-letter-capital": ("tiger", "T"), "gerund": ("dance", "dancing"), "kind": ("lion", "animal"),
    "lowercase": ("Apple", "apple"), "next-letter": ("a", "b"), "previous-letter": ("b", "a"), "next-number": ("99", "100"),
    "previous-number": ("100", "99"), "number-word": ("42", "forty-two"), "number-digits": ("forty-two", "42"),
    "past": ("go", "went"), "plural": ("wolf", "wolves"), "singular": ("wolves", "wolf"), "third-person": ("watch", "watches"),
    "sentiment": ("awful", "negative"), "uppercase": ("dog", "DOG"), "copy": ("dog", "dog"),
}  # fmt: skip


@pytest.mark.parametrize("task", icl_tasks())
def test_every_family_has_enough_pairs_each_input_once_and_plain_text(task):
    pairs = icl_pairs(task)
    assert len(pairs) >= 40 and len({x for x, _ in pairs}) == len(pairs)
    assert all(
        x.strip() == x and y.strip() == y and x and y and "\n" not in x + y and "_" not in x + y for x, y in pairs
    )
    if KNOWN.get(task, (None, None))[1] is not None:
        assert dict(pairs)[KNOWN[task][0]] == KNOWN[task][1]


def test_choices_from_a_list():
    assert all(y == x.split(", ")[0] for x, y in icl_pairs("choose-first"))
    assert all(y == x.split(", ")[2] for x, y in icl_pairs("choose-last"))


def test_verbs_follow_the_rules_of_spelling():
    gerunds, third = dict(icl_pairs("gerund")), dict(icl_pairs("third-person"))
    assert all(not g.endswith("eing") and g.endswith("ing") for g in gerunds.values())
    assert third["mix"] == "mixes" and third["reach"] == "reaches" and third["dance"] == "dances"


def test_a_split_has_no_input_twice_and_a_seed_repeats_it():
    made = [icl_split("past", generator=torch.Generator().manual_seed(s)) for s in (0, 0, 1)]
    assert made[0] == made[1] != made[2]
    inputs = [x for part in made[0] for x, _ in part]
    assert len(inputs) == len(set(inputs)) == len(icl_pairs("past"))


def test_few_shot_never_shows_the_query():
    generator = torch.Generator().manual_seed(0)
    pairs = icl_pairs("antonym")[:12]
    for _ in range(20):
        examples, query = draw_few_shot(pairs, 11, generator)
        assert query not in examples and len({x for x, _ in examples}) == 11
        examples, query = draw_few_shot(pairs, 11, generator, query=pairs[3])
        assert query == pairs[3] and query not in examples
    with pytest.raises(TaskError, match="at least 13"):
        draw_few_shot(pairs, 12, generator)
    with pytest.raises(TaskError, match="shots=-1"):
        draw_few_shot(pairs, -1, generator)


def test_errors_name_what_is_wrong():
    with pytest.raises(TaskError, match="poem"):
        icl_pairs("poem")
    with pytest.raises(TaskError, match="exactly once"):
        Template("no place")
    with pytest.raises(TaskError, match="test=0.8"):
        icl_split("past", generator=torch.Generator(), test=0.8, validation=0.2)


def test_digits_have_no_space_in_front():
    assert spaced("42") == "42" and spaced("cold") == " cold"


@pytest.mark.smollm2
def test_tokens_of_a_real_tokenizer_come_together_again():
    tokenizer = load_model("smollm2", dtype="bfloat16")[1]
    for task in icl_tasks():
        for x, y in icl_pairs(task)[:5]:
            item = encode_item(tokenizer, Template().ask(x), y)
            assert tokenizer.decode(torch.cat([item.ids, item.answer])) == Template().ask(x) + spaced(y)


def test_losses_of_a_batch_are_those_of_its_rows():
    model, tokenizer = tiny(), load_model("tiny-random-llama")[1]
    items = [encode_item(tokenizer, Template().ask(x), y) for x, y in (("a", "b"), ("longer", "answer"))]
    both = row_losses(model, pack(items, "cpu"))
    for row, item in enumerate(items):
        ids = torch.cat([item.ids, item.answer])
        labels = torch.cat([torch.full_like(item.ids, -100), item.answer])
        wanted = model(ids[None], labels=labels[None]).loss
        assert both[row].item() == pytest.approx(wanted.item(), abs=1e-5)
    first = row_losses(model, pack(items, "cpu", answer=False))[1]
    labels[len(items[1].ids) + 1 :] = -100
    assert first.item() == pytest.approx(model(ids[None], labels=labels[None]).loss.item(), abs=1e-5)
