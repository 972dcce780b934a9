"""MoA's calibration set: long texts with questions about what stands far away, answered by the model itself.

Letters: n samples, N tokens of one.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from headwise.arguments import cache_argument, cache_of
from headwise.checks import whole
from headwise.errors import TaskError
from headwise.tasks.texts import draw_tokens, encode, english


@dataclass(frozen=True)
class Calibration:
    """Samples of one length: ids (n, N), and which tokens are the model's own answers, `answers` (n, N) bool."""

    ids: Tensor
    answers: Tensor

    def __post_init__(self) -> None:
        if self.ids.ndim != 2 or self.answers.shape != self.ids.shape or self.answers.dtype != torch.bool:
            raise TaskError(
                f"ids {tuple(self.ids.shape)} and answers {tuple(self.answers.shape)} must be (n, N), answers bool"
            )
        if not bool(self.answers[:, 1:].any(1).all()):
            raise TaskError("every sample needs at least one answer token behind its first token")

    @property
    def length(self) -> int:
        """Tokens of a sample."""
        return self.ids.shape[1]


NAMES = ("Aldo", "Britta", "Cosmo", "Delia", "Emil", "Fanny", "Gustav", "Hanna", "Ivo", "Judith", "Karl", "Lotte")
THINGS = ("lamp", "clock", "violin", "kettle", "map", "mirror", "ladder", "basket", "ring", "coat", "drum", "chair")
PLACES = ("attic", "cellar", "garden", "kitchen", "tower", "harbour", "library", "stable", "bakery", "chapel")
COLOURS = ("red", "blue", "green", "black", "white", "yellow", "brown", "purple")


@torch.no_grad()
def calibration_set(
    model: Any,
    tokenizer: Any,
    *,
    length: int,
    samples: int,
    questions: int = 2,
    answer_tokens: int = 24,
    haystack: str | None = None,
    generator: torch.Generator,
) -> Calibration:
    """`samples` texts of exactly `length` tokens: haystack with facts in it, then questions, each with the model's greedy answer.

    Two kinds of questions go round: a fact ("Where did Aldo leave the red lamp?") and a quotation (the text goes on after
    a few of its own words, said again). Both can only be answered from far back. Facts and words are drawn by the generator.
    """
    if tokenizer is None or not model.can_generate():
        raise TaskError(f"{type(model).__name__} is no causal language model with a tokenizer: pass calibration=")
    whole("answer_tokens", answer_tokens, 1, TaskError)
    whole("questions", questions, 1, TaskError)
    rows = [
        _sample(model, tokenizer, length, questions, answer_tokens, haystack, generator)
        for _ in range(whole("samples", samples, 1, TaskError))
    ]
    return Calibration(torch.stack([ids for ids, _ in rows]), torch.stack([answers for _, answers in rows]))


def _sample(
    model: Any, tokenizer: Any, length: int, questions: int, new: int, haystack: str | None, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    facts = [_fact(generator) for _ in range((questions + 1) // 2)]
    told = [encode(tokenizer, f" {sentence}") for sentence, _ in facts]
    asked = [encode(tokenizer, f"\n\nQuestion: {question}\nAnswer:") for _, question in facts]
    intro = encode(tokenizer, "\n\nQuote the text above: ")
    quote, quotes = 8, questions // 2  # words of a quotation that are said again
    taken = sum(map(len, told + asked)) + quotes * (len(intro) + quote) + questions * new
    room = length - taken
    if room < 4 * quote:
        raise TaskError(f"length={length} is too short: facts, questions and answers alone take {taken} tokens")
    hay = draw_tokens(tokenizer, haystack or english(), room, generator)
    where = [int(torch.randint(len(hay) // 8, len(hay) // 2, (), generator=generator)) for _ in range(quotes)]
    said = [intro + hay[place : place + quote] for place in where]
    for fact in told:
        place = int(torch.randint(len(hay) // 16, 3 * len(hay) // 4, (), generator=generator))
        hay = hay[:place] + fact + hay[place:]
    turns = [turn for pair in zip(asked, [*said, []], strict=False) for turn in pair if turn]
    return _answered(model, hay, turns, new)


def _answered(model: Any, ids: list[int], turns: list[list[int]], new: int) -> tuple[Tensor, Tensor]:
    """The text with each turn behind it and `new` greedy tokens behind each turn; which tokens those are."""
    text, answers, past = list(ids), [False] * len(ids), None
    for turn in turns:
        text, answers = text + turn, answers + [False] * len(turn)
        out = model(
            _tensor(text[_seen(past) :], model), use_cache=True, logits_to_keep=1, **cache_argument(model, past)
        )
        for _ in range(new):
            past, token = cache_of(out), int(out.logits[0, -1].argmax())
            text, answers = [*text, token], [*answers, True]
            if len(answers) < len(ids) + sum(map(len, turns)) + new * len(turns):  # the last one is never read
                out = model(_tensor([token], model), use_cache=True, logits_to_keep=1, **cache_argument(model, past))
    return torch.tensor(text), torch.tensor(answers)


def _tensor(ids: list[int], model: Any) -> Tensor:
    return torch.tensor([ids], device=model.device)


def _seen(past: Any) -> int:
    return 0 if past is None else int(past.get_seq_length())


def _fact(generator: torch.Generator) -> tuple[str, str]:
    """A sentence and the question that it answers."""
    name, thing, place, colour = (
        words[int(torch.randint(len(words), (), generator=generator))] for words in (NAMES, THINGS, PLACES, COLOURS)
    )
    number = int(torch.randint(100, 1000, (), generator=generator))
    return (
        f"{name} left the {colour} {thing} in the {place} of house {number}.",
        f"Where did {name} leave the {colour} {thing}?",
    )


def answer_loss(model: Any, ids: Tensor, answers: Tensor) -> Tensor:
    """Mean cross entropy in nats of the answer tokens of one sample, ids and answers (N,)."""
    places = answers[1:].nonzero()[:, 0].to(model.device)  # the token before an answer token predicts it
    rows = ids[None].to(model.device)
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        logits = model(rows, use_cache=False, logits_to_keep=places).logits[0]
    else:
        logits = model(rows, use_cache=False).logits[0, places]
    return F.cross_entropy(logits.float(), rows[0, places + 1])
