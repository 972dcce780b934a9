"""Text, sizes and measures of recovery training: a pretrained language model that is to run fewer heads.

Letters: N tokens of a row.
"""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from headwise.errors import TaskError
from headwise.route._recipes import Data, Student
from headwise.route._recipes_text import random_windows
from headwise.route._train import Recipe, token_rows
from headwise.tasks import code, english, exact_match, make_passkeys, perplexity
from headwise.tasks.stories import stories
from headwise.tasks.texts import encode

Text = Literal["english", "mixed", "library"]
PACKAGES = ("transformers", "torch")
"""Dependencies of this library, whose source is therefore on every machine; the wording is that of the installed version."""


@dataclass(frozen=True, kw_only=True)
class RecoverSize:
    """Sizes of a recovery training: `steps` of `batch` rows of `window` tokens, and of what is measured."""

    steps: int = 20
    batch: int = 2
    window: int = 256
    rate: float = 1e-4
    fit_tokens: int = 8192
    eval_tokens: int = 2048
    held_out: int = 8
    passkeys: int = 4
    length: int = 512
    chars: int = 1_000_000

    def recipe(self, seed: int) -> Recipe:
        """The training of this size."""
        return Recipe(steps=self.steps, batch_size=self.batch, learning_rate=self.rate, seed=seed)


SIZES = {
    "cpu": RecoverSize(),
    "gpu": RecoverSize(
        steps=300,
        batch=32,
        window=512,
        fit_tokens=49152,
        eval_tokens=16384,
        held_out=64,
        passkeys=20,
        length=1024,
        chars=8_000_000,
    ),
}


def recover_data(tokenizer: Any, text: Text, size: RecoverSize, *, seed: int) -> Data:
    """Random windows of packaged text to train on, and of other documents of English and code to measure on."""
    kinds = {
        "english": lambda: [english()],
        "mixed": lambda: [english(), code(max_chars=size.chars)],
        "library": lambda: [english(), code(max_chars=size.chars), docstrings(max_chars=size.chars)],
    }
    if text not in kinds:
        raise TaskError(f"text is {text!r}; it must be {', '.join(kinds)}")
    train = _ids(tokenizer, "\n\n".join(kinds[text]()))
    held = _ids(tokenizer, english("eval") + "\n\n" + code("eval", max_chars=len(english("eval"))))
    rows = random_windows(train, size.steps * size.batch, size.window, seed + 1)
    return Data(token_rows(rows), token_rows(random_windows(held, size.held_out, size.window, 999)), tokenizer)


def examiner(tokenizer: Any, size: RecoverSize) -> Callable[[Student], dict[str, float]]:
    """Perplexities on unseen text of three kinds, narrative among them, that no fit and no training reads; passkeys found."""
    texts = {"english": english("eval"), "code": code("eval"), "stories": "\n\n".join(stories())}
    chars = 8 * size.eval_tokens  # no tokenizer of ours has longer tokens in the mean
    ids = {name: _ids(tokenizer, text[:chars])[: size.eval_tokens] for name, text in texts.items()}
    generator = torch.Generator().manual_seed(77)
    prompts = make_passkeys(tokenizer, count=size.passkeys, length=size.length, generator=generator)

    def examine(student: Student) -> dict[str, float]:
        found = {}
        for name, part in ids.items():
            window = min(512, len(part))
            found[f"ppl_{name}"] = perplexity(student.model, part, window=window, tokens=len(part), batch_size=8)
        found["passkey"] = exact_match(student.model, prompts, batch_size=4).mean
        return found

    return examine


def docstrings(packages: Sequence[str] = PACKAGES, *, max_chars: int = 1_000_000) -> str:
    """Docstrings of at least 200 characters of the packages' modules, each once, in the order of their files: technical prose.

    >>> len(docstrings(["torch"], max_chars=5000)) <= 5000
    True
    """
    found: dict[str, None] = {}
    total = 0
    for name in packages:
        spec = importlib.util.find_spec(name)
        if spec is None or not spec.submodule_search_locations:
            raise TaskError(f"package {name!r} is not installed: its docstrings cannot be read")
        share = max_chars // len(packages) + total
        for file in sorted(Path(spec.submodule_search_locations[0]).rglob("*.py")):
            if total >= share:
                break
            for text in _docs(file):
                if len(text) >= 200 and text not in found:
                    found[text] = None
                    total += len(text) + 2
    return "\n\n".join(found)[:max_chars]


def _docs(file: Path) -> list[str]:
    try:
        tree = ast.parse(file.read_text(encoding="utf-8", errors="replace"))
    except (SyntaxError, ValueError):
        return []  # templates and files of other Python versions
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    return [text for node in ast.walk(tree) if isinstance(node, kinds) and (text := ast.get_docstring(node))]


def _ids(tokenizer: Any, text: str) -> Tensor:
    return torch.tensor(encode(tokenizer, text), dtype=torch.long)
