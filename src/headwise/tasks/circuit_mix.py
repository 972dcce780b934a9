"""What `circuit-lm` reads: text, indirect objects, coloured objects, multiple choice and word lists, packed into rows.

The documents are not those of `make_ioi`, `make_colored_objects` and `make_multiple_choice`: the openings of the first, the question and
the digits of the last, and some of the names, objects and words of each stand in no document of its kind, so that answering them is
generalisation. Held-out words are seen in the word lists alone. Letters: R rows, N tokens of a row.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from headwise.errors import TaskError
from headwise.tasks._circuit_words import MORE_NAMES, MORE_OBJECTS, MORE_WORDS
from headwise.tasks.colored_objects import COLORS, OBJECTS
from headwise.tasks.ioi import NAMES, PLACES, THINGS
from headwise.tasks.multiple_choice import RANDOM, WORDS
from headwise.tasks.texts import code, encode, english

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED = -100
"""Label of a token that is not to be predicted."""

HELD_OUT = {"names": NAMES[-6:], "objects": OBJECTS[-4:], "words": WORDS[-4:]}
"""In no document of the three tasks."""

IOI_OPENINGS = (
    "Yesterday{A} and{B} visited the{place}.", "On Monday{A} met{B} near the{place},", "Last week{A} and{B} worked in the{place},",
    "In the evening{A} and{B} came to the{place} with a{thing}.", "At the{place} there were{A} and{B}.", "Once{A} and{B} had a{thing},",
    "Since{A} and{B} were at the{place},", "Today{A} saw{B} at the{place},", "Here{A} and{B} looked for a{thing} in the{place}.",
)  # fmt: skip
IOI_CLOSES = (
    " and{S} handed the{thing} to{O!}", " so{S} gave the{thing} to{O!}", " then{S} offered a{thing} to{O!}", " and{S} said hello to{O!}",
    "{S} passed a{thing} to{O!}", "{S} gave a{thing} to{O!}", " later{S} sent the{thing} to{O!}", " and{S} lent a{thing} to{O!}",
)  # fmt: skip
SHOWN = (
    "On the{surface}, he has", "In the{surface}, there are", "On the{surface}, you see", "On the{surface}, there is",
    "Near the{surface}, I see", "In the{surface}, she keeps", "By the{surface}, we find",
)  # fmt: skip
SURFACES = ("shelf", "table", "bench", "floor", "window", "bed", "wall", "desk")
ASKED = (
    " What color is the{object}?\nA:", " Which color has the{object}?\nA:", " The color of the{object}?\nA:",
    " What color is the{object}?\nA:",
)  # fmt: skip
QUESTIONS = ("Find{word}.\n", "Where is{word}?\n", "Pick the{word}:\n", "Say which one is{word}.\n", "Choose{word}\n")
STYLES = (("(", ")"), ("", "."), ("", ")"), ("[", "]"))
SAID = ("Answer:", "Label:", "It is")
GAPS = (("\n\n",), ("\n", "\n"))
"""Behind a question: one token, as `make_multiple_choice` puts it together, or two, as a tokenizer cuts whole texts."""


class Draw:
    """Many small random choices from one generator, drawn in bulk."""

    def __init__(self, generator: torch.Generator):
        self.generator = generator
        self.left: Iterator[float] = iter(())

    def unit(self) -> float:
        """In [0, 1)."""
        value = next(self.left, None)
        if value is None:
            self.left = iter(torch.rand(1 << 14, generator=self.generator, dtype=torch.float64).tolist())
            value = next(self.left)
        return float(value)

    def below(self, count: int) -> int:
        """0 … count − 1."""
        return int(self.unit() * count)

    def one(self, items: Sequence[Any]) -> Any:
        """One of the items."""
        return items[self.below(len(items))]

    def some(self, items: Sequence[Any], count: int) -> list[Any]:
        """Different ones, in random order."""
        kept: dict[int, None] = {}
        while len(kept) < count:
            kept[self.below(len(items))] = None
        return [items[i] for i in kept]


Piece = tuple[str, bool]
"""Text that no token crosses the ends of, and whether it is an answer, to be predicted."""


def fill(template: str, **slots: str) -> list[Piece]:
    """Pieces of a template; a slot's word has a space before it, `{O!}` is an answer.

    >>> fill("Then{S} gave it to{O!}", S="Mary", O="John")
    [('Then', False), (' Mary', False), (' gave it to', False), (' John', True)]
    """
    return [(text, False) if text else (" " + slots[slot], answer) for text, slot, answer in _parsed(template)]


@cache
def _parsed(template: str) -> list[tuple[str, str, bool]]:
    return [(t, s, bool(a)) for t, s, a in re.findall(r"([^{}]+)|\{(\w+)(!?)\}", template)]


@cache
def _known(kind: str) -> tuple[str, ...]:
    """Words of the tasks' documents: those of the tests without the held-out ones, and more."""
    words = {"names": NAMES + MORE_NAMES, "objects": OBJECTS + MORE_OBJECTS, "words": WORDS + MORE_WORDS}[kind]
    return tuple(word for word in words if word not in HELD_OUT[kind])


@cache
def every_word() -> tuple[str, ...]:
    """All words of documents and tests, the held-out ones among them."""
    letters = map(chr, range(ord("A"), ord("Z") + 1))
    found = dict.fromkeys(
        (*NAMES, *MORE_NAMES, *OBJECTS, *MORE_OBJECTS, *WORDS, *MORE_WORDS, *COLORS, *PLACES, *THINGS)
    )
    return (*found, *(c.capitalize() for c in COLORS), *letters)


def ioi_document(draw: Draw) -> list[Piece]:
    """Two names, one of them again, and the other is the answer."""
    first, second = draw.some(_known("names"), 2)
    subject, other = (first, second) if draw.unit() < 0.5 else (second, first)
    slots = {"place": draw.one(PLACES), "thing": draw.one(THINGS)}
    opening = fill(draw.one(IOI_OPENINGS), A=first, B=second, **slots)
    return opening + fill(draw.one(IOI_CLOSES), S=subject, O=other, **slots | {"thing": draw.one(THINGS)})


def worded_document(draw: Draw) -> list[Piece]:
    """As `ioi_document`, behind common words in any order with the two names among them, so that no wording is a sign of the task."""
    first, second = draw.some(_known("names"), 2)
    subject, other = (first, second) if draw.unit() < 0.5 else (second, first)
    words = [draw.one(common_words()) for _ in range(2 + draw.below(11))]
    at, then = sorted(draw.some(range(len(words) + 1), 2))
    words = [*words[:at], first, *words[at:then], second, *words[then:]]
    opening: list[Piece] = [(" " + word, False) for word in words] + [(draw.one((".", ",")), False)]
    return opening + fill(draw.one(IOI_CLOSES), S=subject, O=other, thing=draw.one(THINGS))


@cache
def common_words(count: int = 400) -> tuple[str, ...]:
    """The most frequent words of the packaged English that stand in no task."""
    found = Counter(re.findall(r"\b[a-z]{2,}\b", english()))
    barred = {word.lower() for word in every_word()}
    return tuple([word for word, _ in found.most_common(2 * count) if word not in barred][:count])


def colors_document(draw: Draw) -> list[Piece]:
    """One or two questions about three coloured objects; no colour and no object stands in both."""
    colors, objects = draw.some(COLORS, 6), draw.some(_known("objects"), 6)
    pieces: list[Piece] = []
    for start in range(0, 3 if draw.unit() < 0.25 else 6, 3):
        asked = start + draw.below(3)
        pieces += [("\n", False), ("Q:", False)] if start else [("Q:", False)]
        pieces += _scene(draw, colors[start : start + 3], objects[start : start + 3], objects[asked])
        pieces.append((" " + colors[asked].capitalize(), True))
    return pieces


def asked_document(draw: Draw) -> list[Piece]:
    """Three coloured objects, and a question about each."""
    colors, objects, order = draw.some(COLORS, 3), draw.some(_known("objects"), 3), draw.some(range(3), 3)
    pieces: list[Piece] = [("Q:", False), *_scene(draw, colors, objects, objects[order[0]])]
    for at in order:
        if at != order[0]:
            pieces += [("\n", False), ("Q:", False), *fill(draw.one(ASKED), object=objects[at])]
        pieces.append((" " + colors[at].capitalize(), True))
    return pieces


def pairs_document(draw: Draw) -> list[Piece]:
    """Colours with objects, then the colour of every object: what a thing is like stands before it."""
    count = 2 + draw.below(5)
    colors, objects = draw.some(COLORS, count), draw.some(_known("objects"), count)
    pieces = [
        piece
        for c, o in zip(colors, objects, strict=True)
        for piece in ((" " + c, False), (" " + o, False), (",", False))
    ]
    pieces.append(("\n", False))
    for at in draw.some(range(count), count):
        pieces += [(" " + objects[at], False), (":", False), (" " + colors[at].capitalize(), True), (",", False)]
    return pieces


def _scene(draw: Draw, colors: Sequence[str], objects: Sequence[str], asked: str) -> list[Piece]:
    pieces = fill(" " + draw.one(SHOWN), surface=draw.one(SURFACES))
    for place, (color, thing) in enumerate(zip(colors, objects, strict=True)):
        article = " an" if color[0] in "aeiou" else " a"
        pieces += [(("", ",", ", and")[place] + article, False), (" " + color, False), (" " + thing, False)]
    return [*pieces, (".", False), *fill(draw.one(ASKED), object=asked)]


def choice_document(draw: Draw) -> list[Piece]:
    """One to three multiple-choice questions of one form; no word and no label of one stands in another.

    Half of them have the label behind the word and ask by the word alone; in the others the question comes first and the label stands
    before its word, as in examinations. Labels: A, B, C … in order 60 %, in another order 10 %, other letters 30 %; digits never.
    """
    recall, count, shots = draw.unit() < 0.5, 2 + draw.below(4), draw.below(3)
    words, letters = draw.some(_known("words"), count * (shots + 1)), draw.some(RANDOM, count * (shots + 1))
    style, question, said = draw.one(STYLES), draw.one(QUESTIONS), draw.one(SAID)
    gap = draw.one(GAPS)
    pieces: list[Piece] = []
    for part in range(shots + 1):
        names = letters[part * count : (part + 1) * count]
        if part == shots and draw.unit() < 0.7:
            names = [chr(ord("A") + i) for i in range(count)]
            names = draw.some(names, count) if draw.unit() < 1 / 7 else names
        options, right = words[part * count : (part + 1) * count], draw.below(count)
        one = _recall(options, names, right, style) if recall else _asked(options, names, right, style, question, said)
        close = "" if recall and not style[0] else style[1]
        pieces += [*one, *((end, False) for end in (close + gap[0], *gap[1:]))]
    return [piece for piece in pieces if piece[0]]


def _recall(options: Sequence[str], names: Sequence[str], right: int, style: tuple[str, str]) -> list[Piece]:
    before, after = (" " + style[0]) if style[0] else " -", style[1] if style[0] else ""
    glue = "" if style[0] else " "
    pieces: list[Piece] = []
    for word, name in zip(options, names, strict=True):
        pieces += [(word, False), (before, False), (glue + name, False), (after + "\n", False)]
    return [*pieces, ("\n", False), (options[right], False), (before, False), (glue + names[right], True)]


def _asked(
    options: Sequence[str], names: Sequence[str], right: int, style: tuple[str, str], question: str, said: str
) -> list[Piece]:
    pieces = fill(question, word=options[right])
    for word, name in zip(options, names, strict=True):
        pieces += [(style[0], False), (name, False), (style[1], False), (" " + word, False), ("\n", False)]
    pieces += [(said, False)]
    return pieces + ([(" " + style[0], False), (names[right], True)] if style[0] else [(" " + names[right], True)])


def list_document(draw: Draw) -> list[Piece]:
    """Some words and the same again: the plainest copying, in which every word occurs."""
    words = draw.some(every_word(), 3 + draw.below(10))
    return [("List:", False), *((" " + w, False) for w in words), ("\nList:", False), *((" " + w, True) for w in words)]


DOCUMENTS: dict[str, Callable[[Draw], list[Piece]]] = {
    "ioi": ioi_document,
    "worded": worded_document,
    "colors": colors_document,
    "asked": asked_document,
    "pairs": pairs_document,
    "choice": choice_document,
    "lists": list_document,
}
Mix = Literal["plain", "dense"]
MIXES: dict[str, dict[str, float]] = {
    "plain": {"ioi": 0.2, "colors": 0.2, "choice": 0.35, "lists": 0.1, "text": 0.15},
    "dense": {
        "ioi": 0.08, "worded": 0.07, "colors": 0.13, "asked": 0.12, "pairs": 0.08, "choice": 0.3, "lists": 0.07, "text": 0.15,
    },
}  # fmt: skip
"""Shares of rows; of text all tokens are predicted, else answers."""
EOS = "<|end|>"


def circuit_tokenizer(vocabulary: int = 4096) -> PreTrainedTokenizerBase:
    """Byte-pair encoding of this machine's packaged text, in which every word of the tasks is one token, with or without a space before it.

    Raises TaskError for a vocabulary too small for that.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=[EOS], initial_alphabet=alphabet, show_progress=False
    )
    words = " " + " ".join(every_word()) + "\n" + "\n".join(every_word())
    text = [english(), code(max_chars=1_000_000), *[words] * 10_000]
    made.train_from_iterator(text, trainer=trainer)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=made, eos_token=EOS, pad_token=EOS, clean_up_tokenization_spaces=False
    )
    broken = [w for word in every_word() for w in (word, " " + word) if len(encode(wrapped, w)) != 1]
    if broken:
        raise TaskError(f"vocabulary={vocabulary} is too small: {broken[0]!r} is not one token; take 2048 or more")
    return wrapped


@dataclass(frozen=True, eq=False)
class Rows(Sequence[Mapping[str, Tensor]]):
    """R rows of N tokens, kept small: `ids` (R, N) int16, `wanted` (R, N) bool, the tokens to be predicted. A sequence for Trainer."""

    ids: Tensor
    wanted: Tensor

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, at: Any) -> Any:
        if isinstance(at, slice):
            return [self[i] for i in range(*at.indices(len(self)))]
        ids = self.ids[at].long()
        return {"input_ids": ids, "labels": ids.masked_fill(~self.wanted[at], IGNORED)}


def circuit_rows(
    tokenizer: PreTrainedTokenizerBase,
    count: int,
    length: int,
    *,
    mix: Mix = "plain",
    seed: int = 0,
    code_chars: int = 4_000_000,
) -> Rows:
    """`count` rows in the shares of a mix; whole documents of one kind, from the first column on, each closed by the end token.

    Raises TaskError for an unknown mix.
    """
    if mix not in MIXES:
        raise TaskError(f"mix={mix!r}; choose {', '.join(MIXES)}")
    draw = Draw(torch.Generator().manual_seed(seed))
    ids = torch.full((count, length), int(tokenizer.eos_token_id), dtype=torch.int16)
    wanted = torch.zeros(count, length, dtype=torch.bool)
    words: dict[str, list[int]] = {}
    at = 0
    for kind, share in [item for item in MIXES[mix].items() if item[0] in DOCUMENTS]:
        for row in range(round(share * count)):
            tokens, answers = _packed(DOCUMENTS[kind], draw, tokenizer, words, length)
            ids[at + row, : len(tokens)] = torch.tensor(tokens, dtype=torch.int16)
            wanted[at + row, : len(tokens)] = torch.tensor(answers)
        at += round(share * count)
    texts = text_rows(tokenizer, count - at, length, seed=seed, code_chars=code_chars)
    ids[at:], wanted[at:] = texts.ids, texts.wanted
    return Rows(ids, wanted)


def _packed(
    document: Callable[[Draw], list[Piece]], draw: Draw, tokenizer: Any, words: dict[str, list[int]], length: int
) -> tuple[list[int], list[bool]]:
    """Documents until the next one does not fit; one that does not fit alone is drawn again."""
    tokens: list[int] = []
    answers: list[bool] = []
    while True:
        more, marks = _encoded(document(draw), tokenizer, words)
        if len(tokens) + len(more) > length:
            if tokens:
                return tokens, answers
            continue
        tokens += more
        answers += marks


def _encoded(pieces: Sequence[Piece], tokenizer: Any, words: dict[str, list[int]]) -> tuple[list[int], list[bool]]:
    tokens: list[int] = []
    answers: list[bool] = []
    for text, answer in pieces:
        if text not in words:
            words[text] = encode(tokenizer, text)
        tokens += words[text]
        answers += [answer] * len(words[text])
    return [*tokens, tokenizer.eos_token_id], [*answers, False]


def text_rows(
    tokenizer: PreTrainedTokenizerBase,
    count: int,
    length: int,
    *,
    seed: int = 0,
    code_chars: int = 0,
    split: Any = "haystack",
) -> Rows:
    """Random windows of packaged English and, if `code_chars` is not 0, as many of Python source; all tokens are to be predicted."""
    parts = [english(split)] + ([code(split, max_chars=code_chars)] if code_chars else [])
    generator = torch.Generator().manual_seed(seed + 1)
    found = []
    for n, text in enumerate(parts):
        tokens = torch.tensor(encode(tokenizer, text), dtype=torch.int16)
        share = count // len(parts) if n else count - count // len(parts) * (len(parts) - 1)
        starts = torch.randint(len(tokens) - length, (share,), generator=generator)
        found.append(tokens[starts[:, None] + torch.arange(length)])
    ids = torch.cat(found)
    return Rows(ids, torch.ones_like(ids, dtype=torch.bool))


def documents(kind: str, count: int, *, seed: int = 0) -> Iterator[str]:
    """Some documents of a kind as text, to look at."""
    if kind not in DOCUMENTS:
        raise TaskError(f"kind={kind!r}; choose {', '.join(DOCUMENTS)}")
    draw = Draw(torch.Generator().manual_seed(seed))
    for _ in range(count):
        yield "".join(text for text, _ in DOCUMENTS[kind](draw))
