"""What a model says about scenes: hallucination rates with recall and length, which only together tell something.

CHAIR (Rohrbach et al., arXiv 1809.02156), counted in kinds of objects, so that saying a true thing twice does not look like an
improvement.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from headwise.errors import TaskError
from headwise.tasks.scenes import FIRST_OBJECT, OBJECTS, PAD, Scenes, second_of, with_answers

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, eq=False)
class Descriptions:
    """Answers of a model (B, T) to "describe :" about scenes, padded on the right."""

    scenes: Scenes
    answers: Tensor

    def said(self, row: int) -> list[int]:
        """Kinds in the order in which they were named, with repetitions."""
        last = FIRST_OBJECT + len(OBJECTS)
        return [i - FIRST_OBJECT for i in self.answers[row].tolist() if FIRST_OBJECT <= i < last]

    def measures(self) -> dict[str, float]:
        """Rates over all answers.

        chair_s: share of answers with an invented kind; chair_i: share of the named kinds that are invented; recall: share of
        the kinds in the pictures that are named; f1 of recall and 1 − chair_i; length: objects named, with repetitions;
        repeats: share of them that are repetitions.
        """
        invented = named = there = right = faulty = words = 0
        for row in range(len(self.scenes)):
            said, real = self.said(row), self.scenes.objects(row)
            wrong = set(said) - real
            invented, named, words = invented + len(wrong), named + len(set(said)), words + len(said)
            right, there, faulty = right + len(real & set(said)), there + len(real), faulty + bool(wrong)
        count = len(self.scenes)
        chair_i, recall = invented / max(named, 1), right / there
        precision = 1 - chair_i if named else 0.0
        f1 = 2 * precision * recall / max(precision + recall, 1e-12)
        length, repeats = words / count, 1 - named / max(words, 1)
        values = (faulty / count, chair_i, recall, f1, length, repeats)
        return dict(zip(("chair_s", "chair_i", "recall", "f1", "length", "repeats"), values, strict=True))

    def training(self) -> dict[str, Tensor]:
        """The prompts with these answers, as inputs of the model: ids and mask padded on the right, pixels."""
        ids = torch.cat([self.scenes.prompt, self.answers], dim=1)
        real = torch.cat([torch.ones_like(self.scenes.prompt), (self.answers != PAD).long()], dim=1)
        return {"input_ids": ids, "attention_mask": real, "pixel_values": self.scenes.pixels}


@torch.no_grad()
def describe(model: PreTrainedModel, scenes: Scenes, *, tokens: int = 12, batch_size: int = 256) -> Descriptions:
    """Greedy answers of a scene model, with its cache."""
    parts = []
    for at in range(0, len(scenes), batch_size):
        inputs = {k: v.to(model.device) for k, v in scenes.inputs(slice(at, at + batch_size)).items()}
        made = model.generate(**inputs, max_new_tokens=tokens, do_sample=False)[:, scenes.prompt.shape[1] :]
        parts.append(torch.nn.functional.pad(made.cpu(), (0, tokens - made.shape[1]), value=PAD))
    return Descriptions(scenes, torch.cat(parts))


@torch.no_grad()
def pull_of_habit(model: PreTrainedModel, scenes: Scenes) -> dict[str, float]:
    """Mean probability of a second that is not there, right behind its first in a true description: `seen` and `unseen`.

    `seen`: with the picture; `unseen`: the same words without it. A model that copies its training data has the share of slips
    in their descriptions in the one, and how often speech goes on that way in the other. Where `seen` exceeds the slips, the
    habit of speech pulls against the picture.

    >>> from headwise.models.scene_vlm import scene_vlm
    >>> from headwise.tasks.scenes import make_scenes
    >>> pull = pull_of_habit(scene_vlm(), make_scenes(4, habit="broken", generator=torch.Generator().manual_seed(0)))
    >>> [0 < value < 0.2 for value in pull.values()]  # of random weights
    [True, True]
    """
    begun = [
        (row, place, FIRST_OBJECT + second)
        for row, answer in enumerate(scenes.answers)
        for place, token in enumerate(answer[:-1])
        if (second := second_of(token - FIRST_OBJECT)) is not None and second not in scenes.objects(row)
    ]
    if scenes.task != "describe" or not begun:
        raise TaskError(f"no description among {len(scenes)} scenes ({scenes.task!r}) has a first without its second")
    rows, places, seconds = torch.tensor(begun).T
    seen = scenes.training()
    bare = torch.cat([scenes.prompt[:, :1], scenes.prompt[:, -2:]], dim=1)  # <bos> describe :
    found = {}
    for name, prompt, given in (("seen", scenes.prompt, seen), ("unseen", bare, with_answers(bare, scenes.answers))):
        inputs = {key: value.to(model.device) for key, value in given.items() if key != "labels"}
        chances = model(**inputs).logits.float().softmax(-1).cpu()
        found[name] = float(chances[rows, prompt.shape[1] + places, seconds].mean())
    return found
