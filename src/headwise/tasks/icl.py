"""In-context learning tasks: families of (input, output) pairs, and prompts that show some of them and ask for one more.

    Q: hot
    A: cold

    Q: big
    A:

Families are made from word lists or by a rule; nothing is downloaded. A first space stands before an answer, except before pure digits.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from headwise.checks import shown
from headwise.errors import TaskError
from headwise.tasks import _icl_words as words

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Pair = tuple[str, str]
NOUNS, VERBS, VERBS_E, GOOD, BAD, NUMBERS, TENS = (
    text.split() for text in (words.NOUNS, words.VERBS, words.VERBS_E, words.GOOD, words.BAD, words.NUMBERS, words.TENS)
)


@dataclass(frozen=True)
class Template:
    """How pairs become text: `question` holds one `{}`; `answer` goes behind it, `between` after each example.

    >>> print(Template().few_shot([("hot", "cold")], "big"))
    Q: hot
    A: cold
    <BLANKLINE>
    Q: big
    A:
    """

    question: str = "Q: {}\nA:"
    between: str = "\n\n"

    def __post_init__(self) -> None:
        if self.question.count("{}") != 1:
            raise TaskError(f"question of the template is {shown(self.question)}; it must hold {{}} exactly once")

    def ask(self, x: str) -> str:
        """The question alone: a prompt without examples."""
        return self.question.replace("{}", x)

    def few_shot(self, examples: Sequence[Pair], x: str) -> str:
        """The examples, then the question."""
        shown_ = "".join(self.ask(a) + spaced(b) + self.between for a, b in examples)
        return shown_ + self.ask(x)


class Item(NamedTuple):
    """One question with its known answer: `ids` (N,) of the prompt, `answer` (A,) of what should follow."""

    ids: Tensor
    answer: Tensor


class Split(NamedTuple):
    """Pairs of one task for fitting, for choosing and for testing; no input is in two of them."""

    train: list[Pair]
    validation: list[Pair]
    test: list[Pair]


def icl_tasks() -> tuple[str, ...]:
    """Names of the families.

    >>> len(icl_tasks()) >= 12, "antonym" in icl_tasks()
    (True, True)
    """
    return tuple(FAMILIES)


@functools.cache
def icl_pairs(task: str) -> tuple[Pair, ...]:
    """All pairs of one family, each input once, in a fixed order. Raises TaskError for an unknown name.

    >>> dict(icl_pairs("antonym"))["hard"], dict(icl_pairs("plural"))["child"], dict(icl_pairs("next-number"))["41"]
    ('soft', 'children', '42')
    """
    if task not in FAMILIES:
        raise TaskError(f"task={task!r}; choose {', '.join(FAMILIES)}")
    return tuple(dict(FAMILIES[task]()).items())


def icl_split(
    task: str | Sequence[Pair], *, generator: torch.Generator, test: float = 0.3, validation: float = 0.2
) -> Split:
    """The pairs of a family (or pairs of your own) in random order, cut into train, validation and test.

    >>> split = icl_split("antonym", generator=torch.Generator().manual_seed(0))
    >>> len(set(split.train) & set(split.test)), len(split.train) > len(split.test) > len(split.validation)
    (0, True)
    """
    pairs = icl_pairs(task) if isinstance(task, str) else tuple(task)
    if not 0 <= test + validation < 1 or min(test, validation) < 0:
        raise TaskError(f"test={test}, validation={validation}: shares of at least 0 that leave something to train on")
    order = torch.randperm(len(pairs), generator=generator).tolist()
    shuffled = [pairs[i] for i in order]
    a, b = round(len(pairs) * test), round(len(pairs) * (test + validation))
    return Split(shuffled[b:], shuffled[a:b], shuffled[:a])


def draw_few_shot(
    pairs: Sequence[Pair], shots: int, generator: torch.Generator, query: Pair | None = None
) -> tuple[list[Pair], Pair]:
    """`shots` different examples and a query that is none of them; the query is drawn too unless it is given."""
    others = [p for p in pairs if query is None or p[0] != query[0]]
    need = shots + (query is None)
    if shots < 0 or len(others) < need:
        raise TaskError(f"{len(others)} training pairs for shots={shots}: at least {need} different ones are needed")
    chosen = [others[i] for i in torch.randperm(len(others), generator=generator)[:need].tolist()]
    return chosen[:shots], query if query is not None else chosen[-1]


def encode_item(tokenizer: PreTrainedTokenizerBase, prompt: str, answer: str) -> Item:
    """Tokens of a prompt and of the answer behind it: those of the whole text minus those of the prompt.

    Raises TaskError where the answer has no token of its own or the tokenizer merges it with the prompt.

    >>> from headwise.hub import byte_tokenizer
    >>> item = encode_item(byte_tokenizer(), "Q: a\\nA:", "b")
    >>> len(item.ids), item.answer.tolist() == [ord(" "), ord("b")]
    (7, True)
    """
    ids: list[int] = tokenizer(prompt).input_ids
    whole: list[int] = tokenizer(prompt + spaced(answer)).input_ids
    while ids and ids[-1] != whole[min(len(ids), len(whole)) - 1] and ids[-1] in tokenizer.all_special_ids:
        ids, whole = ids[:-1], whole[:-1]  # a tokenizer that ends every text with a special token
    if whole[: len(ids)] != ids:
        raise TaskError(f"the tokenizer merges the end of the prompt with the answer {answer!r}; change the template")
    if len(whole) == len(ids):
        raise TaskError(f"the answer {answer!r} has no token behind the prompt")
    return Item(torch.tensor(ids), torch.tensor(whole[len(ids) :]))


def spaced(answer: str) -> str:
    """The answer as it stands in the text."""
    return answer if answer.isdigit() else f" {answer}"


def _listed(text: str) -> list[Pair]:
    pairs = (line.replace("_", " ").split(":") for line in text.split())
    return [(a, b) for a, b in pairs]


def _by_rule(items: Sequence[str], rule: Callable[[str], str]) -> list[Pair]:
    return [(x, rule(x)) for x in items]


def _flip(pairs: Sequence[Pair]) -> list[Pair]:
    return [(b, a) for a, b in pairs]


def _plurals() -> list[Pair]:
    return _by_rule(NOUNS, lambda w: w + "s") + _listed(words.PLURALS)


def _past() -> list[Pair]:
    return _listed(words.PAST) + _by_rule(VERBS, lambda w: w + "ed") + _by_rule(VERBS_E, lambda w: w + "d")


def _gerunds() -> list[Pair]:
    keep = ("agree", "tie")
    return _by_rule(VERBS, lambda w: w + "ing") + [(w, w[:-1] + "ing") for w in VERBS_E if w not in keep]


def _third_person() -> list[Pair]:
    hissing = ("s", "x", "ch", "sh")
    return _by_rule(VERBS + VERBS_E, lambda w: w + ("es" if w.endswith(hissing) else "s"))


def _kinds() -> list[Pair]:
    return [(w, kind) for kind, items in words.KINDS.items() for w in items.split() if (w, kind) != ("orange", "color")]


def _sentiments() -> list[Pair]:
    return [(w, "positive") for w in GOOD] + [(w, "negative") for w in BAD]


def _number_words() -> list[Pair]:
    named = {str(i): w for i, w in enumerate(NUMBERS)}
    for i, ten in enumerate(TENS, start=2):
        named |= {str(10 * i + k): ten + (f"-{NUMBERS[k]}" if k else "") for k in range(10)}
    return list(named.items())


def _letters(back: int) -> list[Pair]:
    lower = "abcdefghijklmnopqrstuvwxyz"
    pairs = [(lower[i], lower[i + 1]) for i in range(25)]
    pairs += [(a.upper(), b.upper()) for a, b in pairs]
    return _flip(pairs) if back else pairs


def _lists(place: int) -> list[Pair]:
    """Three words, and the one at a place; which words stand together is fixed."""
    order = torch.randperm(len(NOUNS), generator=torch.Generator().manual_seed(place + 100)).tolist()
    nouns = [NOUNS[i] for i in order]
    triples = [[nouns[i], nouns[(i + 7) % len(nouns)], nouns[(i + 31) % len(nouns)]] for i in range(len(nouns))]
    return [(", ".join(triple), triple[place]) for triple in triples]


FAMILIES: dict[str, Callable[[], list[Pair]]] = {
    "antonym": lambda: _listed(words.ANTONYMS),
    "capitalize": lambda: _by_rule(NOUNS, str.capitalize),
    "choose-first": lambda: _lists(0),
    "choose-last": lambda: _lists(2),
    "city-country": lambda: _flip(_listed(words.CAPITALS)),
    "comparative": lambda: _listed(words.COMPARATIVES),
    "copy": lambda: _by_rule(NOUNS, str),
    "country-capital": lambda: _listed(words.CAPITALS),
    "demonym": lambda: _listed(words.DEMONYMS),
    "first-letter": lambda: _by_rule(NOUNS, lambda w: w[0]),
    "first-letter-capital": lambda: _by_rule(NOUNS, lambda w: w[0].upper()),
    "gerund": _gerunds,
    "kind": _kinds,
    "lowercase": lambda: _flip(_by_rule(NOUNS, str.capitalize)),
    "next-letter": lambda: _letters(0),
    "next-number": lambda: [(str(i), str(i + 1)) for i in range(1, 150)],
    "number-digits": lambda: _flip(_number_words()),
    "number-word": _number_words,
    "past": _past,
    "plural": _plurals,
    "previous-letter": lambda: _letters(1),
    "previous-number": lambda: [(str(i + 1), str(i)) for i in range(1, 150)],
    "sentiment": _sentiments,
    "singular": lambda: _flip(_plurals()),
    "third-person": _third_person,
    "uppercase": lambda: _by_rule(NOUNS, str.upper),
}
"""Name → the pairs of a family."""
