"""The parts that every needle-in-a-haystack task shares: the `Prompt`, the insertion, and the search for the answer's tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch

from headwise.errors import TaskError
from headwise.tasks.texts import draw_text, encode

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_TRIES = 12  # adjustments of the haystack's length; two or three are the rule


@dataclass(frozen=True, eq=False)
class Prompt:
    """One question whose answer stands in the prompt.

    ids: (N,) int64, the prompt without the answer.
    answer_ids: (A,) int64, what a perfect model says next.
    needle_span: half-open token positions `(start, stop)` of the answer inside the prompt: `ids[start:stop]` is `answer_ids`.
    text: what the ids were made of. meta: how it was made (task, depth, key, ...).
    """

    ids: torch.Tensor
    answer_ids: torch.Tensor
    needle_span: tuple[int, int]
    text: str
    meta: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        start, stop = self.needle_span
        if self.ids.ndim != 1 or self.answer_ids.ndim != 1 or len(self.answer_ids) == 0:
            raise TaskError(f"ids (N,) and answer_ids (A,) expected, got {self.ids.shape} and {self.answer_ids.shape}")
        if not torch.equal(self.ids[start:stop], self.answer_ids):
            raise TaskError(f"needle_span={self.needle_span} of the prompt does not hold the answer's tokens")

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class Layout:
    """The text around the haystack: `before + haystack with needle + after`, where `after` asks and leads into the answer.

    `endings` are (lead, answer) pairs, tried in order until the answer's tokens after the lead are the needle's tokens:
    whether the space before a word belongs to the word differs between tokenizers. `at`: where the needle may stand.
    """

    needle: str
    question: str
    endings: Sequence[tuple[str, str]]
    before: str = ""
    at: Literal["sentence", "word"] = "sentence"


def insert_needle(haystack: str, needle: str, depth: float, at: Literal["sentence", "word"] = "sentence") -> str:
    """Puts the needle at `depth` (0 start, 1 end) of the haystack, moved back to the end of the sentence or word before it.

    >>> insert_needle("One two. Three four. Five.", " HERE!", 0.7)
    'One two. HERE! Three four. Five.'
    >>> insert_needle("One two. Three four. Five.", " HERE!", 0.7, at="word")
    'One two. Three HERE! four. Five.'
    """
    stop = needle_place(haystack, depth, at)
    return haystack[:stop] + needle + haystack[stop:]


def needle_place(haystack: str, depth: float, at: Literal["sentence", "word"] = "sentence") -> int:
    """Characters of the haystack that stand before the needle."""
    cut = round(len(haystack) * depth)
    marks, kept = ((". ", ".\n"), 1) if at == "sentence" else ((" ", "\n"), 0)
    stop = max(0, *(haystack.rfind(mark, 0, cut) + kept for mark in marks))
    if cut == len(haystack) and (at == "word" or haystack.endswith(".")):
        stop = cut
    return stop


def find_span(ids: Sequence[int], part: Sequence[int], *, near: int = 0) -> tuple[int, int] | None:
    """Half-open span of `part` inside `ids`, token for token; of several the one whose start is closest to `near`.

    >>> find_span([1, 2, 3, 1, 2], [1, 2], near=4), find_span([1, 2], [2, 1])
    ((3, 5), None)
    """
    ids, part = list(ids), list(part)
    starts = [i for i in range(len(ids) - len(part) + 1) if ids[i] == part[0] and ids[i : i + len(part)] == part]
    if not starts:
        return None
    start = min(starts, key=lambda i: abs(i - near))
    return start, start + len(part)


def build_prompt(
    tokenizer: PreTrainedTokenizerBase,
    layout: Layout,
    *,
    length: int,
    depth: float,
    generator: torch.Generator,
    haystack: str | None = None,
    special: bool = True,
    meta: Mapping[str, Any] | None = None,
) -> Prompt:
    """The prompt of `layout` with as much haystack as makes it `length` tokens long, or up to a few tokens shorter.

    Errors (TaskError): depth outside [0, 1], length beyond the tokenizer's limit or too short for the question, an
    answer whose tokens are not in the prompt.
    """
    if not 0 <= depth <= 1:
        raise TaskError(f"depth={depth}; it is a share of the haystack, between 0 and 1")
    if length + 1 > tokenizer.model_max_length:
        raise TaskError(f"length={length} and its answer exceed the context of {tokenizer.model_max_length} tokens")
    hay = _fit(tokenizer, layout, length, depth, generator, haystack, special)
    place = len(layout.before) + needle_place(hay, depth, layout.at)
    for lead, answer in layout.endings:
        text = layout.before + insert_needle(hay, layout.needle, depth, layout.at) + layout.question + lead
        before = text[: place + max(0, layout.needle.find(answer))]  # a short answer may stand elsewhere in the text
        found = _locate(tokenizer, text, answer, len(encode(tokenizer, before, special=special)), special)
        if found is not None:
            ids, answer_ids, span = found
            facts = {"length": length, "depth": depth, "answer": answer, **(meta or {})}
            return Prompt(torch.tensor(ids), torch.tensor(answer_ids), span, text, facts)
    raise TaskError(f"the tokens of the answer {layout.endings[0][1]!r} are not found in the prompt, in their order")


def _fit(
    tokenizer: PreTrainedTokenizerBase,
    layout: Layout,
    length: int,
    depth: float,
    generator: torch.Generator,
    haystack: str | None,
    special: bool,
) -> str:
    """The piece of haystack that fills the prompt: cut by characters until the tokens fit."""
    lead = layout.endings[0][0]
    around = len(encode(tokenizer, layout.before + layout.needle + layout.question + lead, special=special))
    room = length - around
    if room < 1:
        raise TaskError(f"length={length} is too short: needle and question alone take {around} tokens")
    source = draw_text(haystack, 8 * room + 64, generator)
    low, chars, best = 0, 4 * room, ""
    high = len(source)
    for _ in range(_TRIES):
        hay = source[:chars]
        text = layout.before + insert_needle(hay, layout.needle, depth, layout.at) + layout.question + lead
        over = len(encode(tokenizer, text, special=special)) - length
        if over <= 0:
            low, best = chars, max(best, hay, key=len)
        else:
            high = chars
        if over == 0 or high - low <= 1:
            break
        guess = chars - round(over * max(1.0, chars / (room + over)))  # at this text's characters per token
        chars = guess if low < guess < high else (low + high) // 2
    return best


def build_to_length(
    tokenizer: PreTrainedTokenizerBase,
    before: str,
    after: str,
    length: int,
    generator: torch.Generator,
    haystack: str | None = None,
) -> str:
    """`before + text + after` with as much text, from a drawn paragraph on, as `length` tokens hold. Raises TaskError where none fits."""
    if length + 1 > tokenizer.model_max_length:
        raise TaskError(f"length={length} exceeds the context of {tokenizer.model_max_length} tokens")
    source = draw_text(haystack, 8 * max(1, length) + 64, generator)
    low, high = 0, len(source)
    while high - low > 1:
        middle = (low + high) // 2
        if len(encode(tokenizer, before + source[:middle] + after)) <= length:
            low = middle
        else:
            high = middle
    if low == 0:
        raise TaskError(f"length={length} is too short for the question alone")
    return before + source[:low] + after


def _locate(
    tokenizer: PreTrainedTokenizerBase, text: str, answer: str, near: int, special: bool
) -> tuple[list[int], list[int], tuple[int, int]] | None:
    """Ids of the text, ids of the answer after it, span of the latter in the former; None where tokens would merge."""
    ids = encode(tokenizer, text, special=special)
    whole = encode(tokenizer, text + answer, special=special)
    answer_ids = whole[len(ids) :]
    if whole[: len(ids)] != ids or not answer_ids:
        return None
    span = find_span(ids, answer_ids, near=near)
    return None if span is None else (ids, answer_ids, span)


def even_depths(count: int, low: float = 0.05, high: float = 0.95) -> list[float]:
    """`count` depths from low to high at even distances; one alone lies in the middle.

    >>> even_depths(3)
    [0.05, 0.5, 0.95]
    """
    if count < 1:
        raise TaskError(f"count={count}; at least one prompt is needed")
    if count == 1:
        return [(low + high) / 2]
    return [round(low + (high - low) * i / (count - 1), 6) for i in range(count)]
