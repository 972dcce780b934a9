"""Indirect object identification: who was given the thing (Wang et al. 2022; corruption as in arXiv 2310.08744)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from headwise.checks import whole
from headwise.errors import TaskError
from headwise.tasks.pairs import PromptPairs, Side, one_token, single_words
from headwise.tasks.texts import encode

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NAMES = (
    "Mary", "John", "Tom", "James", "Sarah", "Anna", "Paul", "Mark", "Laura", "Peter", "Alice", "David", "Emma", "Jack",
    "Kate", "Robert", "Susan", "George", "Helen", "Frank", "Martin", "Simon", "Andrew", "Michael", "Daniel", "Steven",
    "Adam", "Kevin", "Scott", "Brian",
)  # fmt: skip
PLACES = ("store", "garden", "station", "school", "office", "market", "house", "park")
THINGS = ("drink", "book", "ring", "basket", "letter", "ticket", "phone", "bone")
OPENINGS = (
    "When {0} and {1} went to the {place},",
    "After {0} and {1} got a {thing} at the {place},",
    "Then, {0} and {1} had a long talk at the {place}.",
    "While {0} and {1} were working at the {place},",
)
CLOSE = " {2} gave a {thing} to"


def make_ioi(tokenizer: PreTrainedTokenizerBase, *, count: int = 32, seed: int = 0, side: Side = "left") -> PromptPairs:
    """Prompts "When A and B went to the store, B gave a drink to" -> " A", half ABB and half BAB; twin: the giver is A.

    The right token of the twin, B, is the contrast. Names, places, things and openings are drawn; names are words of one
    token. Marks: `io`, `s1`, `s2`, columns of the three names. Raises TaskError for a vocabulary without such names.
    """
    whole("count", count, 1, TaskError)
    generator = torch.Generator().manual_seed(seed)
    names = single_words(tokenizer, NAMES, 4, "names")

    def draw(items: tuple[str, ...] | list[str]) -> str:
        return items[int(torch.randint(len(items), (), generator=generator))]

    rows: list[tuple[str, str, str, str]] = []
    for i in range(count):
        first, second = (names[int(k)] for k in torch.randperm(len(names), generator=generator)[:2])
        subject, other = (second, first) if i % 2 == 0 else (first, second)
        text = (draw(OPENINGS) + CLOSE).format(first, second, "{2}", place=draw(PLACES), thing=draw(THINGS))
        rows.append((text.replace("{2}", subject), text.replace("{2}", other), other, subject))
    prompts = [encode(tokenizer, row[0]) for row in rows]
    places = [_names_in(tokenizer, ids, row[2], row[3]) for ids, row in zip(prompts, rows, strict=True)]
    return PromptPairs.of(
        prompts,
        [encode(tokenizer, row[1]) for row in rows],
        [one_token(tokenizer, " " + row[2]) for row in rows],
        [one_token(tokenizer, " " + row[3]) for row in rows],
        side=side,
        texts=[row[0] for row in rows],
        marks={name: [place[i] for place in places] for i, name in enumerate(("io", "s1", "s2"))},
    )


def _names_in(tokenizer: PreTrainedTokenizerBase, ids: list[int], other: str, subject: str) -> tuple[int, int, int]:
    """Places of the indirect object, of the subject, and of the subject's second mention."""
    io, s = one_token(tokenizer, " " + other), one_token(tokenizer, " " + subject)
    twice = [i for i, token in enumerate(ids) if token == s]
    return ids.index(io), twice[0], twice[-1]
