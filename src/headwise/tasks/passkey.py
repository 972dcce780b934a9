"""Passkey: a number of a few digits, said once somewhere in a long text, asked for at its end."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from headwise.errors import TaskError
from headwise.tasks.prompts import Layout, Prompt, build_prompt, even_depths

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def make_passkey(
    tokenizer: PreTrainedTokenizerBase,
    *,
    length: int,
    depth: float,
    generator: torch.Generator,
    digits: int = 5,
    haystack: str | None = None,
) -> Prompt:
    """One passkey prompt of at most `length` tokens (rarely more than two fewer), its key at `depth` of the text.

    The prompt ends in "The pass key is " with its space, so that the answer is digits only: with the space in the answer,
    a mildly disturbed model answers " a ..." and exact match looks far worse than it is. Where the tokenizer joins the
    space to the first digit, the space moves into the answer. Digits are 1-9; `haystack` defaults to `texts.english()`.

    >>> from headwise.hub import byte_tokenizer
    >>> prompt = make_passkey(byte_tokenizer(), length=400, depth=0.5, generator=torch.Generator().manual_seed(0))
    >>> start, stop = prompt.needle_span
    >>> len(prompt.answer_ids), prompt.ids[start:stop].equal(prompt.answer_ids), len(prompt)
    (5, True, 400)
    """
    if digits < 1:
        raise TaskError(f"digits={digits}; a key has at least one")
    key = "".join(str(int(d)) for d in torch.randint(1, 10, (digits,), generator=generator))
    layout = Layout(
        needle=f"\n\nThe pass key is {key}. Remember it.\n\n",
        question="\n\nWhat is the pass key?",
        endings=[(" The pass key is ", key), (" The pass key is", f" {key}")],
        at="word",
    )
    meta = {"task": "passkey", "key": key}
    return build_prompt(
        tokenizer, layout, length=length, depth=depth, generator=generator, haystack=haystack, meta=meta
    )


def make_passkeys(
    tokenizer: PreTrainedTokenizerBase,
    *,
    count: int,
    length: int,
    generator: torch.Generator,
    digits: int = 5,
    haystack: str | None = None,
) -> list[Prompt]:
    """`count` passkey prompts at even depths from 0.05 to 0.95, each with its own key and its own piece of haystack."""
    return [
        make_passkey(tokenizer, length=length, depth=d, generator=generator, digits=digits, haystack=haystack)
        for d in even_depths(count)
    ]
