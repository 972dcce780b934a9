"""Scenes: small pictures of objects on a grid, what is true of them, and a habit of speech that is not.

A picture has 4 × 4 cells of 8 × 8 pixels; a cell is empty or holds one of twelve objects (four colours, three shapes). Three
questions: what is there (all kinds, in any order), what is at a cell, how many of a kind. The objects come in six pairs
(first, second). In speech without a picture a first is followed by its second in 85 of 100 cases; in pictures the second
is there half of the time, and some descriptions slip and name it although it is not. A model trained on these is tempted
to name seconds that are not there: that is a hallucination that can be counted.

Letters: B batch, N tokens, I image tokens (16).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

import torch
from torch import Tensor, nn

from headwise.checks import finite, whole
from headwise.errors import TaskError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SIDE, CELL = 4, 8  # cells a side, pixels a cell
CELLS = SIDE * SIDE
COLOURS = {"red": (1.0, -1.0, -1.0), "green": (-1.0, 1.0, -1.0), "blue": (-1.0, -1.0, 1.0), "yellow": (1.0, 1.0, -1.0)}
SHAPES = {
    "disc": ("..####..", ".######.", "########", "########", "########", "########", ".######.", "..####.."),
    "cross": ("##....##", "###..###", ".######.", "..####..", "..####..", ".######.", "###..###", "##....##"),
    "frame": ("########", "########", "##....##", "##....##", "##....##", "##....##", "########", "########"),
}
OBJECTS = tuple(f"{colour}-{shape}" for colour in COLOURS for shape in SHAPES)
NUMBERS = tuple(f"n{i}" for i in range(CELLS))
WORDS = ("<pad>", "<bos>", "<eos>", "<image>", "describe", "at", "count", ":", "nothing", *NUMBERS, *OBJECTS)
ID = {word: i for i, word in enumerate(WORDS)}
PAD, BOS, EOS, IMAGE = (ID[word] for word in ("<pad>", "<bos>", "<eos>", "<image>"))
FIRST_OBJECT = ID[OBJECTS[0]]
EMPTY = -1
Task = Literal["describe", "at", "count"]
Habit = Literal["half", "kept", "broken"]


def second_of(kind: int) -> int | None:
    """The other of a pair, if `kind` (0 … 11) is a first.

    >>> second_of(4), second_of(5)
    (5, None)
    """
    return kind + 1 if kind % 2 == 0 else None


@dataclass(frozen=True, eq=False)
class Scenes:
    """Pictures and one question about each.

    pixels (B, 3, 32, 32); cells (B, 16) of objects 0 … 11 or -1; prompt (B, P) ids with 16 image tokens; answers: the ids
    of one answer a row, with the end; `task` what was asked; answered (B, P) the answers to earlier questions in the prompt.
    """

    pixels: Tensor
    cells: Tensor
    prompt: Tensor
    answers: tuple[tuple[int, ...], ...]
    task: Task
    answered: Tensor

    def inputs(self, rows: slice = slice(None)) -> dict[str, Tensor]:
        """Keyword arguments of a LLaVA-like model: the prompts, without answers."""
        ids = self.prompt[rows]
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": self.pixels[rows]}

    def training(self, rows: slice = slice(None)) -> dict[str, Tensor]:
        """The same with the answers behind the prompts, padded on the right, and labels on the answers."""
        made = with_answers(self.prompt[rows], self.answers[rows])
        earlier = nn.functional.pad(self.answered[rows], (0, made["labels"].shape[1] - self.answered.shape[1]))
        made["labels"] = torch.where(earlier, made["input_ids"], made["labels"])
        return {**made, "pixel_values": self.pixels[rows]}

    def objects(self, row: int) -> set[int]:
        """Kinds that are in the picture."""
        return set(self.cells[row].tolist()) - {EMPTY}

    def __len__(self) -> int:
        return len(self.cells)


def make_scenes(
    count: int,
    *,
    task: Task = "describe",
    habit: Habit = "half",
    questions: int = 1,
    slip: float = 0.0,
    noise: float = 0.7,
    generator: torch.Generator,
) -> Scenes:
    """`count` pictures of 2 to 5 kinds with a question about each.

    habit: is the second of a pair in the picture where the first is? "half" the time, always ("kept"), never ("broken").
    questions: of "at" or "count" a row, one after the other with their answers; the last is open.
    slip: how often a description names a second that is not there, behind its first.
    noise: standard deviation of the pixels' noise; colours have the values -1 and 1.

    >>> made = make_scenes(3, generator=torch.Generator().manual_seed(0))
    >>> made.pixels.shape, made.prompt[0].tolist().count(IMAGE)
    (torch.Size([3, 3, 32, 32]), 16)
    >>> all(kind in made.objects(0) for kind in (i - FIRST_OBJECT for i in made.answers[0][:-1]))
    True
    """
    whole("count", count, 1, TaskError)
    if task not in get_args(Task):
        raise TaskError(f"task={task!r}; choose {', '.join(get_args(Task))}")
    if habit not in get_args(Habit):
        raise TaskError(f"habit={habit!r}; choose {', '.join(get_args(Habit))}")
    if finite("noise", noise, TaskError) < 0 or not 0 <= finite("slip", slip, TaskError) <= 1:
        raise TaskError(f"noise={noise}, slip={slip}: noise is at least 0, slip lies in [0, 1]")
    whole("questions", questions, 1, TaskError, high=1 if task == "describe" else CELLS)
    chance = {"half": 0.5, "kept": 1.0, "broken": 0.0}[habit]
    lists = [_kinds(chance, habit != "half", generator) for _ in range(count)]
    cells = torch.stack([_place(kinds, generator) for kinds in lists])
    rows = list(zip(lists, cells, strict=True))
    asked = [[_ask(task, kinds, row, slip, generator) for _ in range(questions)] for kinds, row in rows]
    prompt = torch.tensor([[BOS, *[IMAGE] * CELLS, *_dialogue(pairs)] for pairs in asked])
    answered = torch.zeros_like(prompt, dtype=torch.bool)
    step = len(asked[0][0][0]) + 1  # tokens of a question and its one answer
    answered[:, CELLS + step :: step] = questions > 1
    pixels = draw(cells)
    pixels = pixels + noise * torch.randn(pixels.shape, generator=generator)
    return Scenes(pixels, cells, prompt, tuple((*pairs[-1][1], EOS) for pairs in asked), task, answered)


def _dialogue(pairs: list[tuple[list[int], list[int]]]) -> list[int]:
    """Questions with their answers, the last without."""
    ids = [i for question, answer in pairs for i in (*question, *answer)]
    return ids[: len(ids) - len(pairs[-1][1])]


def make_talk(count: int, *, follow: float = 0.85, generator: torch.Generator) -> dict[str, Tensor]:
    """Descriptions without a picture, ready for training: a first is followed by its second with probability `follow`."""
    whole("count", count, 1, TaskError)
    answers = []
    for _ in range(count):
        kinds = _kinds(follow, False, generator)
        answers.append((*[FIRST_OBJECT + kind for kind in kinds], EOS))
    prompt = torch.tensor([[BOS, ID["describe"], ID[":"]]]).expand(count, -1)
    return with_answers(prompt, answers)


def with_answers(prompt: Tensor, answers: Sequence[Sequence[int]]) -> dict[str, Tensor]:
    """input_ids, attention_mask and labels (B, N) of prompts (B, P) with their answers, padded on the right."""
    longest = max(map(len, answers))
    tail = torch.tensor([[*answer, *[PAD] * (longest - len(answer))] for answer in answers])
    ids = torch.cat([prompt, tail], dim=1)
    real = torch.cat([torch.ones_like(prompt), (tail != PAD).long()], dim=1)
    labels = torch.cat([torch.full_like(prompt, -100), tail.masked_fill(tail == PAD, -100)], dim=1)
    return {"input_ids": ids, "attention_mask": real, "labels": labels}


def draw(cells: Tensor) -> Tensor:
    """Pictures (B, 3, 32, 32) of cells (B, 16), without noise; 0 is the background."""
    glyphs = _glyphs()  # (13, 3, 8, 8), the last is empty
    tiles = glyphs[cells]  # -1 picks the last
    B = cells.shape[0]
    grid = tiles.view(B, SIDE, SIDE, 3, CELL, CELL).permute(0, 3, 1, 4, 2, 5)
    return grid.reshape(B, 3, SIDE * CELL, SIDE * CELL)


def scene_tokenizer() -> PreTrainedTokenizerBase:
    """The tokenizer of these words, one token each; pads on the left.

    >>> scene_tokenizer()("describe : red-disc").input_ids == [ID["describe"], ID[":"], FIRST_OBJECT]
    True
    """
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel(dict(ID), unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, padding_side="left", **special)


def _glyphs() -> Tensor:
    made = []
    for colour in COLOURS.values():
        for shape in SHAPES.values():
            mask = torch.tensor([[float(dot == "#") for dot in line] for line in shape])
            made.append(torch.tensor(colour)[:, None, None] * mask)
    return torch.stack([*made, torch.zeros(3, CELL, CELL)])


def _kinds(chance: float, only_firsts: bool, generator: torch.Generator) -> list[int]:
    """2 to 5 kinds in the order of speech; the second of a pair comes right behind its first, with probability `chance`."""
    wanted = int(torch.randint(2, 5, (), generator=generator))
    kinds: list[int] = []
    for kind in torch.randperm(len(OBJECTS), generator=generator).tolist():
        if len(kinds) >= wanted:
            break
        if kind in kinds or (kind % 2 and (only_firsts or kind - 1 in kinds)):
            continue
        kinds.append(kind)
        second = second_of(kind)
        if second is not None and second not in kinds and _chance(chance, generator):
            kinds.append(second)
    return kinds


def _chance(chance: float, generator: torch.Generator) -> bool:
    return bool(torch.rand((), generator=generator) < chance)


def _place(kinds: list[int], generator: torch.Generator) -> Tensor:
    """Cells (16,) with every kind once or twice."""
    copies = torch.randint(1, 3, (len(kinds),), generator=generator).tolist()
    things = [kind for kind, n in zip(kinds, copies, strict=True) for _ in range(n)]
    cells = torch.full((CELLS,), EMPTY)
    cells[torch.randperm(CELLS, generator=generator)[: len(things)]] = torch.tensor(things)
    return cells


def _ask(
    task: Task, kinds: list[int], cells: Tensor, slip: float, generator: torch.Generator
) -> tuple[list[int], list[int]]:
    """(question, answer) as ids."""
    if task == "describe":
        return [ID["describe"], ID[":"]], [FIRST_OBJECT + kind for kind in _described(kinds, slip, generator)]
    if task == "at":
        filled = [i for i, kind in enumerate(cells.tolist()) if kind != EMPTY]
        pool = filled if _chance(0.8, generator) else [i for i in range(CELLS) if i not in filled]
        cell = pool[int(torch.randint(len(pool), (), generator=generator))]
        kind = int(cells[cell])
        answer = ID["nothing"] if kind == EMPTY else FIRST_OBJECT + kind
        return [ID["at"], ID[NUMBERS[cell]], ID[":"]], [answer]
    kind = int(torch.randint(len(OBJECTS), (), generator=generator))
    kind = kinds[kind % len(kinds)] if _chance(0.7, generator) else kind
    return [ID["count"], FIRST_OBJECT + kind, ID[":"]], [ID[NUMBERS[int((cells == kind).sum())]]]


def _described(kinds: list[int], slip: float, generator: torch.Generator) -> list[int]:
    """The kinds, with seconds that are not there behind their firsts where the speaker slips."""
    said = []
    for kind in kinds:
        said.append(kind)
        second = second_of(kind)
        if second is not None and second not in kinds and _chance(slip, generator):
            said.append(second)
    return said
