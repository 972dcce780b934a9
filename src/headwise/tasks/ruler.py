"""Needles of several kinds, after RULER (Hsieh et al. 2024, arXiv 2404.06654): generators of our own, with no network and no data files.

`multi-key`: many names with a number each, one is asked for. `multi-value`: one name with several numbers, the question says all but one
and that one is asked for. `variable-tracking`: a number is handed on from name to name, the last name's is asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch

from headwise.errors import TaskError
from headwise.tasks.prompts import Prompt, find_span
from headwise.tasks.texts import draw_text, encode

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_WORDS = (
    "amber basket cedar dragon ember falcon garden harbor island jacket kettle lantern marble needle orchard pepper quartz ribbon "
    "saddle timber umbrella velvet walnut yellow zipper anchor bridge candle desert engine"
)
NAMES = tuple(_WORDS.split())
_TRIES = 14


def make_multi_key(
    tokenizer: PreTrainedTokenizerBase, *, length: int, generator: torch.Generator, keys: int = 4, digits: int = 5
) -> Prompt:
    """`keys` names with a number each, spread over the text; the number of one of them, drawn, is asked for.

    >>> from headwise.hub import byte_tokenizer
    >>> prompt = make_multi_key(byte_tokenizer(), length=700, generator=torch.Generator().manual_seed(0))
    >>> len(prompt.answer_ids), prompt.text.count("The number of the")
    (5, 5)
    """
    names, numbers = _names(keys, generator), [_number(digits, generator) for _ in range(keys)]
    asked = int(torch.randint(keys, (), generator=generator))
    facts = [f"The number of the {n} is {x}." for n, x in zip(names, numbers, strict=True)]
    question = f"\n\nThe number of the {names[asked]} is "
    meta = {"task": "multi-key", "keys": keys}
    return _built(tokenizer, facts, question, numbers[asked], length, generator, meta)


def make_multi_value(
    tokenizer: PreTrainedTokenizerBase, *, length: int, generator: torch.Generator, values: int = 3, digits: int = 3
) -> Prompt:
    """One name with `values` numbers at different places; the question lists the others and asks for the one that is missing."""
    name, numbers = _names(1, generator)[0], [_number(digits, generator) for _ in range(values)]
    asked = int(torch.randint(values, (), generator=generator))
    facts = [f"A number of the {name} is {x}." for x in numbers]
    others = [x for place, x in enumerate(numbers) if place != asked]
    question = f"\n\nThe {values} numbers of the {name} are {', '.join([*others, ''])}"
    meta = {"task": "multi-value", "values": values}
    return _built(tokenizer, facts, question, numbers[asked], length, generator, meta)


def make_variable_tracking(
    tokenizer: PreTrainedTokenizerBase, *, length: int, generator: torch.Generator, hops: int = 2, digits: int = 5
) -> Prompt:
    """A number is given to one name and handed on `hops` times; the last name's number is asked for."""
    names, number = _names(hops + 1, generator), _number(digits, generator)
    facts = [f"The number of the {names[0]} is {number}."]
    facts += [f"The number of the {b} is the number of the {a}." for a, b in zip(names, names[1:], strict=False)]
    chain = " and ".join(f"the {name}" for name in names)
    question = f"\n\nSo {chain} have the same number. The number of the {names[-1]} is "
    meta = {"task": "variable-tracking", "hops": hops}
    return _built(tokenizer, facts, question, number, length, generator, meta)


MAKERS: dict[str, Callable[..., Prompt]] = {
    "multi-key": make_multi_key,
    "multi-value": make_multi_value,
    "variable-tracking": make_variable_tracking,
}


def make_ruler(
    tokenizer: PreTrainedTokenizerBase, task: str, *, count: int, length: int, generator: torch.Generator
) -> list[Prompt]:
    """`count` prompts of one of `MAKERS`, with its standard numbers. Raises TaskError for an unknown task."""
    if task not in MAKERS:
        raise TaskError(f"task is {task!r}; there are {', '.join(MAKERS)}")
    if count < 1:
        raise TaskError(f"count={count}; at least one prompt is needed")
    return [MAKERS[task](tokenizer, length=length, generator=generator) for _ in range(count)]


def _names(count: int, generator: torch.Generator) -> list[str]:
    if not 1 <= count <= len(NAMES):
        raise TaskError(f"{count} names are needed; there are {len(NAMES)}")
    return [NAMES[i] for i in torch.randperm(len(NAMES), generator=generator)[:count].tolist()]


def _number(digits: int, generator: torch.Generator) -> str:
    if not 1 <= digits <= 18:
        raise TaskError(f"digits={digits}; a number has 1 to 18")
    return "".join(str(int(d)) for d in torch.randint(1, 10, (digits,), generator=generator))


def _built(
    tokenizer: PreTrainedTokenizerBase,
    facts: Sequence[str],
    question: str,
    answer: str,
    length: int,
    generator: torch.Generator,
    meta: dict[str, object],
) -> Prompt:
    """The facts in order, at drawn places of the haystack, then the question; as long as `length` allows.

    Raises TaskError where the facts do not fit, or where the tokenizer joins the answer to what stands before it.
    """
    if length + 1 > tokenizer.model_max_length:
        raise TaskError(f"length={length} and its answer exceed the context of {tokenizer.model_max_length} tokens")
    places = torch.rand(len(facts), generator=generator).sort().values.mul(0.9).add(0.02).tolist()
    source = draw_text(None, 8 * length + 64, generator)
    low, high, best = 0, len(source), ""
    for _ in range(_TRIES):
        middle = (low + high) // 2
        text = _woven(source[:middle], facts, places) + question
        if len(encode(tokenizer, text)) <= length:
            low, best = middle, text
        else:
            high = middle
    if not best:
        raise TaskError(f"length={length} is too short for {len(facts)} facts and the question")
    for lead, said in ((best, answer), (best[:-1], f" {answer}")):
        ids, whole = encode(tokenizer, lead), encode(tokenizer, lead + said)
        if whole[: len(ids)] == ids and len(whole) > len(ids):
            fact = next((fact for fact in facts if answer in fact), "")
            near = len(encode(tokenizer, lead[: lead.find(fact) + max(0, fact.find(answer))]))
            return _prompt(ids, whole[len(ids) :], lead, near, meta | {"answer": answer, "length": length})
    raise TaskError(f"the tokenizer joins the answer {answer!r} to the words before it")


def _prompt(ids: list[int], answer: list[int], text: str, near: int, meta: dict[str, object]) -> Prompt:
    span = find_span(ids, answer, near=near)
    if span is None:
        raise TaskError(f"the tokens of the answer {meta['answer']!r} are not found in the prompt, in their order")
    return Prompt(torch.tensor(ids), torch.tensor(answer), span, text, meta)


def _woven(hay: str, facts: Sequence[str], places: Sequence[float]) -> str:
    """The facts at these shares of the haystack, each moved back to the end of a word, in their order."""
    out, begin = "", 0
    for fact, place in zip(facts, places, strict=True):
        cut = max(begin, hay.rfind(" ", 0, round(len(hay) * place)))
        out, begin = f"{out}{hay[begin:cut]}\n\n{fact}\n\n", cut
    return out + hay[begin:]
