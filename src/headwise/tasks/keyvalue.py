"""Key-value lookup: a JSON object of random keys and sentences, a few solved look-ups, and one more to solve.

The proxy task by which AttentionInfluence (arXiv 2505.07293) finds the heads that matter: nothing but the context can
tell which sentence belongs to a random key.
"""

from __future__ import annotations

import functools
import json
import re
import string
from typing import TYPE_CHECKING

import torch

from headwise.errors import TaskError
from headwise.tasks.prompts import Prompt, _locate
from headwise.tasks.texts import encode, english

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_ALPHABET = string.ascii_lowercase + string.digits
_INTRO = "Give the value that belongs to the key in this JSON object.\n\n"


def make_keyvalues(
    tokenizer: PreTrainedTokenizerBase,
    *,
    count: int,
    length: int,
    generator: torch.Generator,
    shots: int = 3,
    key_length: int = 32,
    haystack: str | None = None,
) -> list[Prompt]:
    """`count` prompts of at most `length` tokens, each with as many pairs as fit; the answer is the sentence asked for.

    The sentences are drawn from `haystack` (default `english()`); keys are `key_length` random letters and digits. The
    look-ups, `shots` solved ones and the last, ask for different pairs, drawn evenly over the object.
    Raises TaskError where not even `shots` + 2 pairs fit, or the text has too few sentences.

    >>> from headwise.hub import byte_tokenizer
    >>> tokenizer, generator = byte_tokenizer(), torch.Generator().manual_seed(0)
    >>> prompt = make_keyvalues(tokenizer, count=1, length=900, generator=generator, shots=1, key_length=8)[0]
    >>> len(prompt) <= 900, tokenizer.decode(prompt.answer_ids) == prompt.meta["answer"]
    (True, True)
    """
    for name, value, least in (("count", count, 1), ("shots", shots, 0), ("key_length", key_length, 4)):
        if value < least:
            raise TaskError(f"{name}={value}; at least {least}")
    if length + 1 > tokenizer.model_max_length:
        raise TaskError(f"length={length} and its answer exceed the context of {tokenizer.model_max_length} tokens")
    sentences = _sentences(english() if haystack is None else haystack)
    return [_make(tokenizer, sentences, length, shots, key_length, generator) for _ in range(count)]


@functools.lru_cache(maxsize=4)
def _sentences(text: str) -> tuple[str, ...]:
    """Sentences of 6 to 20 plain words, each once, without their full stop: a quotation mark would merge with it."""
    parts = (" ".join(part.split()) for part in re.split(r"(?<=[.!?])\s+|\n\s*\n", text))
    plain = re.compile(r"[A-Z][A-Za-z0-9 ,;:'()_-]+\.")
    return tuple(s[:-1] for s in dict.fromkeys(parts) if plain.fullmatch(s) and 6 <= len(s.split()) <= 20)


def _make(
    tokenizer: PreTrainedTokenizerBase,
    sentences: tuple[str, ...],
    length: int,
    shots: int,
    key_length: int,
    generator: torch.Generator,
) -> Prompt:
    """One prompt: pairs are taken away until it fits."""
    order = torch.randperm(len(sentences), generator=generator).tolist()
    room = length // max(1, len(encode(tokenizer, f'"{_key(key_length, generator)}": "", ')) + 4)
    pairs = [(_key(key_length, generator), sentences[i]) for i in order[: max(room, shots + 2)]]
    while len(pairs) >= shots + 2:
        text, answer = _text(pairs, shots, torch.Generator().manual_seed(len(pairs) + int(order[0])))
        over = len(encode(tokenizer, text, special=True)) - length
        if over <= 0:
            located = _locate(tokenizer, text, answer, 0, True)
            if located is None:
                raise TaskError(f"the tokens of {answer!r} in the object and in the answer differ for this tokenizer")
            ids, answer_ids, span = located
            facts = {"task": "keyvalue", "length": length, "pairs": len(pairs), "shots": shots, "answer": answer}
            return Prompt(torch.tensor(ids), torch.tensor(answer_ids), span, text, facts)
        per_pair = max(1, (length + over) // (len(pairs) + shots + 1))
        del pairs[-max(1, over // (2 * per_pair)) :]
    raise TaskError(
        f"length={length} is too short: {shots} solved look-ups need at least {shots + 2} pairs in the object"
    )


def _text(pairs: list[tuple[str, str]], shots: int, generator: torch.Generator) -> tuple[str, str]:
    """The prompt's text up to the opening quote of the value that is asked for, and that value."""
    asked = torch.randperm(len(pairs), generator=generator)[: shots + 1].tolist()
    lines = ",\n".join(f"{json.dumps(key)}: {json.dumps(value)}" for key, value in pairs)
    solved = "".join(f'{{"{pairs[i][0]}": "{pairs[i][1]}"}}\n' for i in asked[:-1])
    key, answer = pairs[asked[-1]]
    return f'{_INTRO}{{{lines}}}\n\n{solved}{{"{key}": "', answer


def _key(length: int, generator: torch.Generator) -> str:
    return "".join(_ALPHABET[i] for i in torch.randint(len(_ALPHABET), (length,), generator=generator).tolist())
