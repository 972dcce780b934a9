"""Real text that is on every machine: the English of Python's language reference and the source of its library.

`english` is the documentation that Python's `help()` shows (0.35 MB once repeated paragraphs are dropped), `code` the
top-level modules of the standard library. Both are technical text; no package that is always there contains fiction,
letters or news (licences and the Zen of Python are too small to measure anything on), so there is no `prose` here: read
a file and pass its text where a function takes `haystack`. The wording differs between Python versions, and so does
every number measured on it: compare numbers of one Python version only.
"""

from __future__ import annotations

import functools
import re
import sysconfig
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch

from headwise.errors import TaskError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Split = Literal["haystack", "eval"]

_EVAL_SHARE = 0.3  # of the characters goes to "eval"
_RULE = re.compile(r"^\s*[*=\-~^+#|]{3,}[\s*=\-~^+#|]*$", re.MULTILINE)
_TABLE = re.compile(r"^\s*\|.*\|\s*$\n?", re.MULTILINE)
_BLANK_LINES = re.compile(r"\n\s*\n+")


@functools.lru_cache
def english(split: Split = "haystack") -> str:
    """English technical prose; "haystack" (0.25 MB) and "eval" (0.1 MB) share no document and no paragraph.

    >>> "statement" in english("haystack") and english("haystack") != english("eval")
    True
    """
    return "\n\n\n".join(_shared_out(_documents(), _checked(split)).values())


@functools.lru_cache
def code(split: Split = "haystack", *, max_chars: int = 1_000_000) -> str:
    """Python source of the standard library's top-level modules, by file name, cut at `max_chars`; splits share no file."""
    folder = Path(sysconfig.get_path("stdlib"))
    files = {f.name: f.read_text(encoding="utf-8", errors="replace") for f in sorted(folder.glob("*.py"))}
    if not files:
        raise TaskError(f"this Python has no source files of its standard library in {folder}")
    return "\n".join(_shared_out(files, _checked(split)).values())[:max_chars]


def windows(ids: torch.Tensor, length: int, stride: int | None = None) -> torch.Tensor:
    """Cuts token ids (N,) into full windows (n, length) that start every `stride` tokens (default: no overlap).

    The rest that fills no window is dropped. Raises TaskError if there is not even one.

    >>> windows(torch.arange(7), 3, 2).tolist()
    [[0, 1, 2], [2, 3, 4], [4, 5, 6]]
    """
    stride = length if stride is None else stride
    if ids.ndim != 1 or length < 1 or stride < 1:
        raise TaskError(f"windows needs ids (N,), length >= 1, stride >= 1; got {tuple(ids.shape)}, {length}, {stride}")
    if len(ids) < length:
        raise TaskError(f"windows of {length} tokens cannot be cut from {len(ids)} tokens")
    return ids.unfold(0, length, stride)


def encode(tokenizer: PreTrainedTokenizerBase, text: str, *, special: bool = False) -> list[int]:
    """Token ids of `text` without the tokenizer's length warning; `special` adds its start token, never its end token."""
    ids = tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]
    if special and ids and ids[-1] in (tokenizer.eos_token_id, tokenizer.sep_token_id):
        plain = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        ids = ids if plain and plain[-1] == ids[-1] else ids[:-1]
    return list(ids)


def draw_text(haystack: str | None, chars: int, generator: torch.Generator) -> str:
    """`chars` characters of the haystack (default `english()`) from a random paragraph on; goes round at its end."""
    text = english() if haystack is None else haystack
    if not text.strip():
        raise TaskError("haystack is empty")
    start = int(torch.randint(len(text), (), generator=generator))
    paragraph = text.find("\n\n", start)
    start = paragraph + 2 if paragraph >= 0 else 0
    ring = text[start:].lstrip("\n") + "\n\n" + text[:start]
    return (ring * (chars // len(ring) + 1))[:chars]


def draw_tokens(
    tokenizer: PreTrainedTokenizerBase, haystack: str | None, count: int, generator: torch.Generator
) -> list[int]:
    """Exactly `count` token ids of the haystack from a random paragraph on."""
    chars = 6 * count + 64
    seed = int(torch.randint(2**62, (), generator=generator))
    while True:
        ids = encode(tokenizer, draw_text(haystack, chars, torch.Generator().manual_seed(seed)))
        if len(ids) > count:  # one more than needed, so that the last token kept is not one that the cut made
            return ids[:count]
        chars *= 2


def _checked(split: str) -> str:
    if split not in ("haystack", "eval"):
        raise TaskError(f"split={split!r}; it is 'haystack' or 'eval'")
    return split


def _shared_out(documents: dict[str, str], split: str) -> dict[str, str]:
    """The documents of one split, in their order: from the longest on, "eval" gets each that fits into its share so far."""
    chosen, total, of_eval = set(), 0, 0
    for name in sorted(documents, key=lambda n: (-len(documents[n]), n)):
        total += len(documents[name])
        if of_eval + len(documents[name]) <= _EVAL_SHARE * total:
            of_eval += len(documents[name])
            chosen.add(name)
    return {name: text for name, text in documents.items() if (name in chosen) == (split == "eval")}


@functools.lru_cache
def _documents() -> dict[str, str]:
    """The topics by name, each paragraph kept only where it is seen first: many topics are parts of longer ones."""
    seen: set[str] = set()
    documents = {}
    for name, topic in sorted(_topics().items(), key=lambda item: (-len(item[1]), item[0])):
        paragraphs = [p for p in _BLANK_LINES.split(_clean(topic)) if " ".join(p.split()) not in seen]
        seen.update(" ".join(p.split()) for p in paragraphs)
        if any(len(p) > 80 for p in paragraphs):
            documents[name] = "\n\n".join(paragraphs).strip()
    return dict(sorted(documents.items()))


def _topics() -> dict[str, str]:
    for module in ("pydoc_data.topics", "pydoc_data.module_docs", "pydoc_data"):
        try:
            topics = getattr(import_module(module), "topics", None)
        except ImportError:
            continue
        if isinstance(topics, dict) and len(topics) > 10:
            return topics
    raise TaskError(
        "this Python lacks pydoc_data.topics, the text that help() shows: pass a text of your own as haystack"
    )


def _clean(topic: str) -> str:
    """Without underlines, tables, emphasis and literal marks."""
    return _TABLE.sub("", _RULE.sub("", topic)).replace("*", "").replace("`", "").replace("::\n", ":\n")
