"""Needle in a haystack: a sentence that is at odds with its surroundings, and a question that only it answers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from headwise.errors import TaskError
from headwise.tasks.prompts import Layout, Prompt, build_prompt, even_depths

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_HAY = "\x00HAY\x00"  # stands for the haystack while a chat template is applied


@dataclass(frozen=True)
class Needle:
    """A sentence `lead + " " + answer + "."` and the question it answers; the prompt ends in the lead."""

    question: str
    lead: str
    answer: str

    @property
    def sentence(self) -> str:
        return f"{self.lead} {self.answer}."


NEEDLES = (
    Needle(
        "What is the best thing to do in San Francisco?",
        "The best thing to do in San Francisco is to",
        "walk over the bridge at dusk with a bag of warm cherries",
    ),
    Needle(
        "What does the baker of Lindau put into her secret bread?",
        "The secret bread of the baker of Lindau is made with",
        "roasted chestnuts from the northern hills",
    ),
    Needle(
        "Where did the captain hide the silver compass?",
        "The captain hid the silver compass under",
        "the third stair of the old lighthouse",
    ),
    Needle(
        "What did the old gardener plant behind the school?",
        "Behind the school the old gardener planted",
        "a long row of purple pear trees",
    ),
    Needle(
        "How does Marta wake her brother every morning?",
        "Every morning Marta wakes her brother by",
        "playing a slow waltz on the broken piano",
    ),
)


def make_needle(
    tokenizer: PreTrainedTokenizerBase,
    *,
    length: int,
    depth: float,
    generator: torch.Generator,
    needle: Needle | None = None,
    haystack: str | None = None,
    chat: bool = False,
) -> Prompt:
    """One needle prompt of at most `length` tokens; the sentence stands at `depth`, moved back to the last full stop.

    `needle=None` draws one of `NEEDLES`. `chat=True` wraps text and question as a user's message in the tokenizer's chat
    template; the lead of the answer then opens the assistant's turn.

    >>> from headwise.hub import byte_tokenizer
    >>> tokenizer, generator = byte_tokenizer(), torch.Generator().manual_seed(0)
    >>> prompt = make_needle(tokenizer, length=600, depth=0.3, generator=generator, needle=NEEDLES[2])
    >>> tokenizer.decode(prompt.ids[slice(*prompt.needle_span)])[:22]
    ' the third stair of th'
    """
    if needle is None:
        needle = NEEDLES[int(torch.randint(len(NEEDLES), (), generator=generator))]
    before, after = _chat_frame(tokenizer, needle) if chat else ("", f"{_ask(needle)}\nAnswer:")
    gap = "" if chat else " "  # a chat template ends in a line break or a mark
    layout = Layout(
        needle=f" {needle.sentence}",
        question=after,
        endings=[(f"{gap}{needle.lead}", f" {needle.answer}"), (f"{gap}{needle.lead} ", needle.answer)],
        before=before,
    )
    return build_prompt(
        tokenizer,
        layout,
        length=length,
        depth=depth,
        generator=generator,
        haystack=haystack,
        special=not chat,  # the template writes its own start token
        meta={"task": "needle", "needle": needle.sentence, "question": needle.question, "chat": chat},
    )


def make_needles(
    tokenizer: PreTrainedTokenizerBase,
    *,
    count: int,
    length: int,
    generator: torch.Generator,
    haystack: str | None = None,
    chat: bool = False,
) -> list[Prompt]:
    """`count` needle prompts at even depths from 0.05 to 0.95, going round through `NEEDLES`."""
    return [
        make_needle(
            tokenizer,
            length=length,
            depth=depth,
            generator=generator,
            needle=NEEDLES[i % len(NEEDLES)],
            haystack=haystack,
            chat=chat,
        )
        for i, depth in enumerate(even_depths(count))
    ]


def _ask(needle: Needle) -> str:
    return f"\n\nAnswer from the text above.\nQuestion: {needle.question}"


def _chat_frame(tokenizer: PreTrainedTokenizerBase, needle: Needle) -> tuple[str, str]:
    """What the chat template writes before and after the haystack."""
    if not tokenizer.chat_template:
        raise TaskError("chat=True, but the tokenizer has no chat template")
    messages = [{"role": "user", "content": _HAY + _ask(needle)}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    before, _, after = text.partition(_HAY)
    return before, after
