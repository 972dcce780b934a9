"""Colored objects, one solved question before the one that is asked (the task of arXiv 2310.08744)."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

import torch

from headwise.checks import whole
from headwise.errors import TaskError
from headwise.tasks.pairs import PromptPairs, Side, one_token
from headwise.tasks.texts import encode

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "brown", "black")
OBJECTS = (
    "pencil", "notebook", "pen", "cup", "plate", "jug", "mug", "puzzle", "textbook", "leash", "necklace",
    "bracelet", "bottle", "ball", "envelope", "lighter", "bowl",
)  # fmt: skip
SURFACES = ("table", "desk", "floor")
SEEN = ("there is", "you see", "I see")


class Scene(NamedTuple):
    """Three coloured objects and which of them is asked for."""

    surface: str
    seen: str
    colors: tuple[str, ...]
    objects: tuple[str, ...]
    asked: int

    def text(self) -> str:
        """The question, up to "A:"."""
        items = [f"{'an' if c[0] in 'aeiou' else 'a'} {c} {o}" for c, o in zip(self.colors, self.objects, strict=True)]
        return (
            f"Q: On the {self.surface}, {self.seen} {items[0]}, {items[1]}, and {items[2]}. "
            f"What color is the {self.objects[self.asked]}?\nA:"
        )


def make_colored_objects(
    tokenizer: PreTrainedTokenizerBase, *, count: int = 32, seed: int = 0, side: Side = "left"
) -> PromptPairs:
    """A solved question about three coloured objects, then another: " Blue". The twin asks for another of the three.

    The second block shares no object and no colour with the first. Marks: `right`, `wrong` (B, 2), `asked`: the tokens of
    the right colour, of the two wrong ones and of the object asked for, in the second block; `choices` (B, 2): the answers that
    the two wrong colours would be. Objects of the twin have as
    many tokens as the object they stand for. Raises TaskError where a colour is not one token, or objects are too uneven.
    """
    whole("count", count, 1, TaskError)
    generator = torch.Generator().manual_seed(seed)
    prompts: list[list[int]] = []
    twins: list[list[int]] = []
    answers, contrasts, texts = [], [], []
    marks: dict[str, list] = {"right": [], "wrong": [], "asked": []}
    others: list[list[int]] = []
    while len(prompts) < count:
        shown, scene, other = _draw(generator, tokenizer)
        first = f"{shown.text()} {shown.colors[shown.asked].capitalize()}\n"
        text, twin = first + scene.text(), first + scene._replace(asked=other).text()
        ids = encode(tokenizer, text)
        prompts.append(ids)
        twins.append(encode(tokenizer, twin))
        answers.append(one_token(tokenizer, " " + scene.colors[scene.asked].capitalize()))
        contrasts.append(one_token(tokenizer, " " + scene.colors[other].capitalize()))
        texts.append(text)
        begin = len(encode(tokenizer, first))
        at = [begin + ids[begin:].index(one_token(tokenizer, " " + color)) for color in scene.colors]
        marks["right"].append(at[scene.asked])
        marks["wrong"].append([at[i] for i in range(3) if i != scene.asked])
        words = [one_token(tokenizer, " " + color.capitalize()) for color in scene.colors]
        others.append([words[i] for i in range(3) if i != scene.asked])
        marks["asked"].append(len(ids) - 1 - len(encode(tokenizer, "?\nA:")))
    pairs = PromptPairs.of(prompts, twins, answers, contrasts, side=side, texts=texts, marks=marks)
    return replace(pairs, marks={**pairs.marks, "choices": torch.tensor(others)})


def _draw(generator: torch.Generator, tokenizer: PreTrainedTokenizerBase) -> tuple[Scene, Scene, int]:
    """The solved scene, the asked one, and the object of its twin, whose name has as many tokens."""
    for _ in range(200):
        colors = [COLORS[int(i)] for i in torch.randperm(len(COLORS), generator=generator)[:6]]
        objects = [OBJECTS[int(i)] for i in torch.randperm(len(OBJECTS), generator=generator)[:6]]
        scenes = []
        for part in (slice(0, 3), slice(3, 6)):
            surface = SURFACES[int(torch.randint(3, (), generator=generator))]
            seen = SEEN[int(torch.randint(3, (), generator=generator))]
            asked = int(torch.randint(3, (), generator=generator))
            scenes.append(Scene(surface, seen, tuple(colors[part]), tuple(objects[part]), asked))
        second = scenes[1]
        size = [len(encode(tokenizer, " " + name)) for name in second.objects]
        fitting = [i for i in range(3) if i != second.asked and size[i] == size[second.asked]]
        if fitting:
            return scenes[0], second, fitting[int(torch.randint(len(fitting), (), generator=generator))]
    raise TaskError("no two objects have names of equally many tokens in this vocabulary")
