"""Pass-phrases: DuoAttention's synthetic data, many phrases hidden in one long text and all asked for at its end.

Xiao et al. 2024, "DuoAttention" (arXiv 2410.10819), section 2.3 and its code: ten phrases of 32 words, each drawn from the
26 words of the NATO alphabet, at ten random depths; after the text ten questions with answers, which alone are labelled.
The wording is ours.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from headwise.errors import TaskError
from headwise.tasks.texts import draw_tokens, encode

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORE = -100  # label of a position that is not supervised
# fmt: off
NATO = (
    "Alpha", "Bravo", "Charlie", "Delta", "Echo", "Foxtrot", "Golf", "Hotel", "India",
    "Juliett", "Kilo", "Lima", "Mike", "November", "Oscar", "Papa", "Quebec", "Romeo",
    "Sierra", "Tango", "Uniform", "Victor", "Whiskey", "Xray", "Yankee", "Zulu",
)
# fmt: on
_ORDINALS = ["first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth", "tenth"]


@dataclass(frozen=True, kw_only=True)
class PassphraseSpec:
    """Sizes of the task; the defaults are the paper's.

    phrases x words: how many pass-phrases, and of how many words each. Depths are drawn without repetition from
    `depth_steps` even values between `depth_low` and `depth_high`. Lengths are rounded up to a multiple of `multiple_of`.
    """

    phrases: int = 10
    words: int = 32
    depth_low: float = 0.05
    depth_high: float = 0.95
    depth_steps: int = 1000
    multiple_of: int = 16

    def __post_init__(self) -> None:
        if self.phrases < 1 or self.words < 1 or self.multiple_of < 1:
            raise TaskError(f"phrases, words and multiple_of must be at least 1: {self}")
        if not 0 <= self.depth_low <= self.depth_high <= 1 or self.depth_steps < self.phrases:
            raise TaskError(f"0 <= depth_low <= depth_high <= 1 and depth_steps >= phrases expected: {self}")


@dataclass(frozen=True, eq=False)
class Passphrases:
    """A batch without padding: every row is filled with text to the same length.

    ids: (B, N) int64. labels: (B, N) int64, the ids of questions and answers, -100 (not supervised) in the text before;
    not shifted, because the paper's loss compares hidden states at those positions. `labels` as transformers expects them.
    spans: (B, P, 2), half-open positions of each phrase's words inside the text. depths: (B, P). phrases: the words.
    """

    ids: torch.Tensor
    labels: torch.Tensor
    spans: torch.Tensor
    depths: torch.Tensor
    phrases: tuple[tuple[str, ...], ...]

    @property
    def supervised(self) -> torch.Tensor:
        """Bool (B, N): the positions that have a label."""
        return self.labels != IGNORE


def make_passphrases(
    tokenizer: PreTrainedTokenizerBase,
    *,
    length: int,
    generator: torch.Generator,
    batch_size: int = 1,
    spec: PassphraseSpec | None = None,
    haystack: str | None = None,
) -> Passphrases:
    """A batch of `batch_size` rows of `length` tokens (rounded up to `spec.multiple_of`), questions and answers included.

    Raises TaskError if the phrases and questions alone need more than `length`, or `length` exceeds the tokenizer's limit.

    >>> from headwise.hub import byte_tokenizer
    >>> spec = PassphraseSpec(phrases=2, words=3)
    >>> data = make_passphrases(byte_tokenizer(), length=600, generator=torch.Generator().manual_seed(0), spec=spec)
    >>> data.ids.shape, data.spans.shape
    (torch.Size([1, 608]), torch.Size([1, 2, 2]))
    """
    spec = PassphraseSpec() if spec is None else spec
    if batch_size < 1:
        raise TaskError(f"batch_size={batch_size}; at least 1")
    total = -(-length // spec.multiple_of) * spec.multiple_of
    if total > tokenizer.model_max_length:
        raise TaskError(f"length={total} exceeds the context of {tokenizer.model_max_length} tokens")
    rows = [_row(tokenizer, total, spec, generator, haystack) for _ in range(batch_size)]
    return Passphrases(
        ids=torch.stack([r.ids for r in rows]),
        labels=torch.stack([r.labels for r in rows]),
        spans=torch.stack([r.spans for r in rows]),
        depths=torch.stack([r.depths for r in rows]),
        phrases=tuple(r.phrases for r in rows),
    )


def context_lengths(low: int = 1000, high: int = 32000, count: int = 50) -> list[int]:
    """The context lengths to draw from, evenly spaced as in the paper's training.

    >>> context_lengths(1000, 2000, 3)
    [1000, 1500, 2000]
    """
    if not 1 <= low <= high or count < 1:
        raise TaskError(f"1 <= low <= high and count >= 1 expected, got {low}, {high}, {count}")
    return torch.linspace(low, high, count, dtype=torch.float64).long().tolist()


@dataclass(frozen=True)
class _Row:
    ids: torch.Tensor
    labels: torch.Tensor
    spans: torch.Tensor
    depths: torch.Tensor
    phrases: tuple[str, ...]


def _row(
    tokenizer: PreTrainedTokenizerBase,
    total: int,
    spec: PassphraseSpec,
    generator: torch.Generator,
    haystack: str | None,
) -> _Row:
    phrases = tuple(_phrase(spec.words, generator) for _ in range(spec.phrases))
    needles = [_needle(tokenizer, i, phrase) for i, phrase in enumerate(phrases)]
    questions = [token for i, phrase in enumerate(phrases) for token in encode(tokenizer, _question(i, phrase))]
    start = encode(tokenizer, "", special=True)  # the start token, where the tokenizer has one
    room = total - len(start) - len(questions) - sum(len(a) + len(b) + len(c) for a, b, c in needles)
    if room < spec.phrases:
        raise TaskError(f"length={total} is too short: the phrases and questions alone take {total - room} tokens")
    hay = draw_tokens(tokenizer, haystack, room, generator)
    depths = _depths(spec, generator)
    ids, spans, used = list(start), [], 0
    for depth, (before, words, after) in zip(depths.tolist(), needles, strict=True):
        cut = int(room * depth)
        ids += hay[used:cut] + before
        spans.append((len(ids), len(ids) + len(words)))
        ids += words + after
        used = cut
    ids += hay[used:]
    labels = [IGNORE] * len(ids) + questions
    return _Row(torch.tensor(ids + questions), torch.tensor(labels), torch.tensor(spans), depths, phrases)


def _phrase(words: int, generator: torch.Generator) -> str:
    return " ".join(NATO[int(i)] for i in torch.randint(len(NATO), (words,), generator=generator))


def _needle(tokenizer: PreTrainedTokenizerBase, index: int, phrase: str) -> tuple[list[int], list[int], list[int]]:
    """Tokens before the phrase, of the phrase with its space, and after it."""
    before = f"\n\nKeep in mind that the {_ordinal(index)} pass-phrase is:"
    return encode(tokenizer, before), encode(tokenizer, f" {phrase}"), encode(tokenizer, ".\n\n")


def _question(index: int, phrase: str) -> str:
    return f"\n\nWhat is the {_ordinal(index)} pass-phrase? The {_ordinal(index)} pass-phrase is: {phrase}."


def _ordinal(index: int) -> str:
    """first ... tenth, then 11th, 12th, 21st, ..."""
    if index < len(_ORDINALS):
        return _ORDINALS[index]
    number = index + 1
    ending = {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th") if number % 100 not in (11, 12, 13) else "th"
    return f"{number}{ending}"


def _depths(spec: PassphraseSpec, generator: torch.Generator) -> torch.Tensor:
    """(P,) sorted, drawn without repetition."""
    values = torch.linspace(spec.depth_low, spec.depth_high, spec.depth_steps, dtype=torch.float64)
    return values[torch.randperm(spec.depth_steps, generator=generator)[: spec.phrases]].sort().values
