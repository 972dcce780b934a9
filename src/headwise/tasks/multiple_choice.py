"""Multiple choice: options with labels, one of them asked for, and the answer is its label (the task of arXiv 2307.09458).

What is right stands in the prompt itself, so that a model needs no knowledge to answer. Letters: B prompts, C options.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Literal, get_args

import torch
from torch import Tensor

from headwise.checks import whole
from headwise.errors import TaskError
from headwise.tasks.pairs import PromptPairs, Side
from headwise.tasks.texts import encode

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Labels = Literal["letters", "shuffled", "random", "digits"]
Form = Literal["recall", "question"]
Brackets = Literal["()", "[]"]
WORDS = (
    "red", "blue", "green", "black", "dog", "cat", "horse", "bird", "bread", "milk", "cheese", "apple", "iron", "gold",
    "silver", "stone", "river", "lake", "city", "road", "king", "queen",
)  # fmt: skip
RANDOM = "FGHJKLMNPQRSTUVWXYZ"  # none of them begins the alphabet, none is a word


def make_multiple_choice(
    tokenizer: PreTrainedTokenizerBase,
    *,
    count: int = 32,
    shots: int = 2,
    options: int = 4,
    labels: Labels = "letters",
    form: Form = "recall",
    brackets: Brackets = "()",
    seed: int = 0,
    side: Side = "left",
) -> PromptPairs:
    """Solved questions, then one more: "red (A)\\ndog (B)\\n … dog (" with the answer "B". The twin asks for another option.

    form: "recall" has each label behind its word and asks by the word alone. "question" is the form of examinations: "Which is dog?\\n
    (A) red\\n(B) dog\\n … Answer: (", where a label stands before its word and says nothing of it when it is read.
    labels: "letters" A, B, C … in order; "shuffled": the same in another order; "random": other letters, drawn anew; "digits": 1, 2, 3.
    brackets: around the labels.
    shots: solved questions; no word and no label of one is used again, so that nothing but the last question says what is right. Options
    take turns in being right. Marks, of the last question: `labels` (B, C) columns of the labels, `choices` (B, C) the labels as
    tokens, `correct` and `other` (B,) which option answers prompt and twin. Raises TaskError where words or labels do not suffice or
    are not one token.
    """
    whole("count", count, 1, TaskError)
    whole("shots", shots, 0, TaskError, 16)
    whole("options", options, 2, TaskError, 8)
    for name, value, known in (("labels", labels, Labels), ("form", form, Form), ("brackets", brackets, Brackets)):
        if value not in get_args(known):
            raise TaskError(f"{name}={value!r}; choose {', '.join(get_args(known))}")
    space = " " if form == "question" else ""
    words = [word for word in WORDS if len(encode(tokenizer, space + word)) == 1]
    if len(words) < (shots + 1) * options:
        raise TaskError(
            f"{shots} solved questions and one more with options={options} need {(shots + 1) * options} words, {len(words)} are one "
            "token in this vocabulary: take fewer shots, or choice_pairs for prompts of your own"
        )
    if (shots + 1) * options > len(RANDOM):
        raise TaskError(f"shots={shots} with options={options} need more than the {len(RANDOM)} letters there are")
    generator = torch.Generator().manual_seed(seed)
    write = partial(_question if form == "question" else _recall, *brackets)
    rows = [_row(tokenizer, write, words, labels, options, shots, n % options, generator) for n in range(count)]
    prompts, twins, places, tokens, correct, other = zip(*rows, strict=True)
    return choice_pairs(prompts, twins, places, tokens, correct=correct, other=other, side=side)


def choice_pairs(
    prompts: Sequence[Sequence[int]],
    twins: Sequence[Sequence[int]],
    labels: Sequence[Sequence[int]],
    choices: Sequence[Sequence[int]],
    *,
    correct: Sequence[int],
    other: Sequence[int],
    side: Side = "left",
) -> PromptPairs:
    """Pairs of multiple-choice prompts of your own: token ids, places of the labels in them, the labels as tokens, and which answers.

    Raises TaskError where a twin has its prompt's answer, or a label is missing at its place.

    >>> pairs = choice_pairs([[5, 8, 6, 9, 9]], [[5, 8, 6, 9, 8]], [[0, 2]], [[5, 6]], correct=[1], other=[0])
    >>> pairs.answers.tolist(), pairs.marks["labels"].tolist()
    ([6], [[0, 2]])
    """
    sizes = {len(row) for row in (*labels, *choices)}
    if len(sizes) != 1 or not sizes - {0, 1}:
        raise TaskError(f"prompts have {sorted(sizes)} labels; every prompt has as many labels and choices, at least 2")
    for row, (ids, places, tokens) in enumerate(zip(prompts, labels, choices, strict=True)):
        if any(not 0 <= at < len(ids) or ids[at] != token for at, token in zip(places, tokens, strict=True)):
            raise TaskError(f"prompt {row} has no label {list(tokens)} at its tokens {list(places)}")
        if correct[row] == other[row]:
            raise TaskError(f"prompt {row} and its twin are both answered by option {correct[row]}; they must differ")
    answers = [row[k] for row, k in zip(choices, correct, strict=True)]
    contrasts = [row[k] for row, k in zip(choices, other, strict=True)]
    pairs = PromptPairs.of(prompts, twins, answers, contrasts, side=side, marks={"labels": [list(r) for r in labels]})
    extra = {"choices": torch.tensor([list(r) for r in choices])}
    extra |= {"correct": torch.tensor(list(correct)), "other": torch.tensor(list(other))}
    return replace(pairs, marks={**pairs.marks, **extra})


def chosen(logits: Tensor, pairs: PromptPairs) -> Tensor:
    """Which option has the largest logit among the labels, (B,), of logits (B, V)."""
    return logits.gather(1, pairs.marks["choices"].to(logits.device)).argmax(1)


Written = tuple[list[int], str, list[int], list[int]]
"""Token ids of one question up to the bracket behind which its answer goes, the closing bracket, places of its labels, labels as tokens."""


def _row(
    tokenizer: PreTrainedTokenizerBase,
    write: Callable[..., Written],
    words: list[str],
    labels: str,
    options: int,
    shots: int,
    correct: int,
    generator: torch.Generator,
) -> tuple[list[int], list[int], list[int], list[int], int, int]:
    """(prompt, twin, places of the labels, labels as tokens, right option, option of the twin)."""
    shown = _draw(words, (shots + 1) * options, generator)
    letters = _draw(RANDOM, (shots + 1) * options, generator)
    solved: list[int] = []
    for start in range(options, (shots + 1) * options, options):
        asked, part = int(torch.randint(options, (), generator=generator)), slice(start, start + options)
        ids, close, _, tokens = write(tokenizer, shown[part], letters[part], asked)
        solved += [*ids, tokens[asked], *encode(tokenizer, close + "\n\n")]
    names = letters[:options] if labels == "random" else _labels(labels, options, generator)
    other = (correct + 1 + int(torch.randint(options - 1, (), generator=generator))) % options
    (ids, _, places, tokens), twin = (write(tokenizer, shown[:options], names, asked) for asked in (correct, other))
    return solved + ids, solved + twin[0], [len(solved) + at for at in places], tokens, correct, other


def _recall(
    left: str, right: str, tokenizer: PreTrainedTokenizerBase, words: Sequence[str], names: Sequence[str], asked: int
) -> Written:
    """red (A), dog (B), …, and one of the words again with an open bracket."""
    ids: list[int] = []
    places, tokens = [], []
    for word, name in zip(words, names, strict=True):
        before = encode(tokenizer, f"{word} {left}")
        places.append(len(ids) + len(before))
        tokens.append(_label(tokenizer, left, name))
        ids += [*before, tokens[-1], *encode(tokenizer, f"{right}\n")]
    return ids + encode(tokenizer, "\n") + encode(tokenizer, f"{words[asked]} {left}"), right, places, tokens


def _question(
    left: str, right: str, tokenizer: PreTrainedTokenizerBase, words: Sequence[str], names: Sequence[str], asked: int
) -> Written:
    """Which is dog? (A) red, (B) dog, …, and the answer with an open bracket."""
    ids, bracket = encode(tokenizer, f"Which is {words[asked]}?\n"), encode(tokenizer, left)
    places, tokens = [], []
    for word, name in zip(words, names, strict=True):
        places.append(len(ids) + len(bracket))
        tokens.append(_label(tokenizer, left, name))
        ids += [*bracket, tokens[-1], *encode(tokenizer, f"{right} {word}\n")]
    return ids + encode(tokenizer, f"Answer: {left}"), right, places, tokens


def _label(tokenizer: PreTrainedTokenizerBase, left: str, name: str) -> int:
    """The token of a label behind a bracket."""
    found = encode(tokenizer, f"{left}{name}")
    if len(found) != len(encode(tokenizer, left)) + 1:
        raise TaskError(f"label {name!r} behind a bracket is not one token in this vocabulary")
    return found[-1]


def _draw(words: Sequence[str], count: int, generator: torch.Generator) -> list[str]:
    return [words[int(i)] for i in torch.randperm(len(words), generator=generator)[:count]]


def _labels(kind: str, options: int, generator: torch.Generator) -> list[str]:
    """Names of the options: digits, or the first letters, in order or not."""
    if kind == "digits":
        return [str(i + 1) for i in range(options)]
    letters = [chr(ord("A") + i) for i in range(options)]
    return _draw(letters, options, generator) if kind == "shuffled" else letters
