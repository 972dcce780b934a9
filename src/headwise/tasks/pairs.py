"""Pairs of prompts that differ in little: what patching compares, with the token that is right in each.

Letters: B pairs, N columns.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from headwise.checks import whole
from headwise.errors import TaskError
from headwise.tasks.texts import encode

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Side = Literal["left", "right"]


@dataclass(frozen=True, eq=False)
class PromptPairs:
    """B prompts and their corrupted twins, token by token of one length, padded to N columns.

    `answers` (B,) is the right next token of the prompt, `contrasts` (B,) that of the twin. `mask` (B, N) is True on real
    tokens. `marks` names places of a row: columns (B,) or (B, many).
    """

    ids: Tensor
    corrupt: Tensor
    mask: Tensor
    answers: Tensor
    contrasts: Tensor
    texts: tuple[str, ...] = ()
    marks: Mapping[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        B, N = self.ids.shape if self.ids.ndim == 2 else (0, 0)
        wanted = {"ids": (B, N), "corrupt": (B, N), "mask": (B, N), "answers": (B,), "contrasts": (B,)}
        for name, shape in wanted.items():
            if not B or tuple(getattr(self, name).shape) != shape:
                got = tuple(getattr(self, name).shape)
                raise TaskError(f"{name} of prompt pairs is {got}; pairs are (B, N) = {(B, N)}, answers (B,), B >= 1")

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, rows: slice) -> PromptPairs:
        """Some of the pairs, with the same columns."""
        kept = {name: getattr(self, name)[rows] for name in ("ids", "corrupt", "mask", "answers", "contrasts")}
        return replace(self, **kept, texts=self.texts[rows], marks={k: v[rows] for k, v in self.marks.items()})

    def to(self, device: torch.device | str) -> PromptPairs:
        """The same on another device."""
        moved = {name: getattr(self, name).to(device) for name in ("ids", "corrupt", "mask", "answers", "contrasts")}
        return replace(self, **moved, marks={k: v.to(device) for k, v in self.marks.items()})

    def swapped(self) -> PromptPairs:
        """Prompt and twin change places."""
        return replace(
            self, ids=self.corrupt, corrupt=self.ids, answers=self.contrasts, contrasts=self.answers, texts=()
        )

    @property
    def last(self) -> Tensor:
        """Column of each row's last real token, (B,)."""
        columns = torch.arange(self.mask.shape[1], device=self.mask.device)
        return columns.masked_fill(~self.mask.bool(), -1).max(1).values

    @classmethod
    def of(
        cls,
        prompts: Sequence[Sequence[int]],
        corrupt: Sequence[Sequence[int]],
        answers: Sequence[int],
        contrasts: Sequence[int],
        *,
        pad: int = 0,
        side: Side = "left",
        texts: Sequence[str] = (),
        marks: Mapping[str, Sequence[int | Sequence[int]]] | None = None,
    ) -> PromptPairs:
        """Pad token ids of prompts and twins; `marks` count tokens of the row. Raises TaskError where two lengths differ.

        >>> pairs = PromptPairs.of([[1, 2, 3], [4, 5]], [[1, 9, 3], [4, 6]], [7, 7], [8, 8])
        >>> pairs.ids.tolist(), pairs.last.tolist()
        ([[1, 2, 3], [0, 4, 5]], [2, 2])
        """
        if not prompts or not len(prompts) == len(corrupt) == len(answers) == len(contrasts):
            raise TaskError(f"{len(prompts)} prompts, {len(corrupt)} twins, {len(answers)} answers: one of each a pair")
        for row, (one, other) in enumerate(zip(prompts, corrupt, strict=True)):
            if len(one) != len(other) or not len(one):
                raise TaskError(f"pair {row} has {len(one)} and {len(other)} tokens; a twin has its prompt's length")
        if side not in ("left", "right"):
            raise TaskError(f"side={side!r}; choose left or right")
        width = max(map(len, prompts))
        shift = [width - len(p) if side == "left" else 0 for p in prompts]

        def padded(rows: Sequence[Sequence[int]]) -> Tensor:
            table = torch.full((len(rows), width), pad)
            for i, row in enumerate(rows):
                table[i, shift[i] : shift[i] + len(row)] = torch.tensor(list(row))
            return table

        starts, lengths = torch.tensor(shift), torch.tensor([len(p) for p in prompts])
        columns = torch.arange(width)[None] - starts[:, None]
        mask = (columns >= 0) & (columns < lengths[:, None])
        places = {name: torch.tensor(rows) for name, rows in (marks or {}).items()}
        placed = {name: at + starts.view(-1, *[1] * (at.ndim - 1)) for name, at in places.items()}
        return cls(
            padded(prompts), padded(corrupt), mask, torch.tensor(answers), torch.tensor(contrasts), tuple(texts), placed
        )


def one_token(tokenizer: PreTrainedTokenizerBase, word: str) -> int:
    """The id of a word that is one token behind other text. Raises TaskError for one that is several."""
    ids = encode(tokenizer, word)
    if len(ids) != 1:
        raise TaskError(
            f"{word!r} has {len(ids)} tokens in this vocabulary; an answer that is compared must be one token"
        )
    return ids[0]


def single_words(tokenizer: PreTrainedTokenizerBase, words: Sequence[str], least: int, what: str) -> list[str]:
    """The words that are one token each. Raises TaskError where fewer than `least` are left."""
    kept = [word for word in words if len(encode(tokenizer, " " + word)) == 1]
    if len(kept) < least:
        raise TaskError(
            f"{len(kept)} of {len(words)} {what} are one token in this vocabulary, {least} are needed: take a larger "
            "vocabulary, or the task 'induction', which needs none"
        )
    return kept


def make_induction(vocabulary: int, *, count: int = 16, length: int = 12, seed: int = 0) -> PromptPairs:
    """Random tokens that repeat up to the token before a chosen one: an induction head answers, whatever the vocabulary.

    The prompt is x_1 … x_K x_1 … x_j, its answer x_{j+1}; the twin has another token in the place of the first x_{j+1}.

    >>> pairs = make_induction(50, count=2, length=5)
    >>> bool((pairs.ids.gather(1, pairs.marks["answer"][:, None])[:, 0] == pairs.answers).all())
    True
    """
    whole("length", length, 3, TaskError)
    whole("count", count, 1, TaskError)
    whole("vocabulary", vocabulary, length + 2, TaskError)
    generator = torch.Generator().manual_seed(seed)
    prompts, twins, answers, contrasts, places = [], [], [], [], []
    for _ in range(count):
        drawn = torch.randperm(vocabulary, generator=generator)[: length + 1].tolist()
        j = int(torch.randint(1, length - 1, (), generator=generator))
        first, other = drawn[:length], drawn[length]
        prompts.append(first + first[: j + 1])
        twins.append(first[: j + 1] + [other] + first[j + 2 :] + first[: j + 1])
        answers.append(first[j + 1])
        contrasts.append(other)
        places.append(j + 1)
    return PromptPairs.of(prompts, twins, answers, contrasts, marks={"answer": places})
