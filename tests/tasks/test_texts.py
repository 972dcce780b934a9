"""Texts: disjoint splits, determinism, windows, and pieces of exact size."""

import ast

import pytest
import torch

from headwise.errors import TaskError
from headwise.hub import byte_tokenizer
from headwise.tasks import texts
from headwise.tasks.texts import code, draw_text, draw_tokens, english, windows

TOKENIZER = byte_tokenizer()


def paragraphs(text: str) -> set[str]:
    return {" ".join(p.split()) for p in text.split("\n\n") if p.strip()}


def test_english_is_english_and_its_splits_are_disjoint():
    haystack, held_out = english("haystack"), english("eval")
    assert len(haystack) > 2 * len(held_out) > 100_000
    assert not paragraphs(haystack) & paragraphs(held_out)
    assert not set("*`") & set(haystack + held_out)
    words = haystack.lower().split()
    assert sum(w in ("the", "of", "is", "a", "to") for w in words) / len(words) > 0.12


def test_code_is_python_and_its_splits_share_no_file():
    assert len(code()) == len(code("eval")) == 1_000_000
    assert code()[:2000] != code("eval")[:2000]
    assert code(max_chars=500) == code()[:500]
    lines = code().splitlines()
    ast.parse("\n".join(lines[: next(i for i, line in enumerate(lines) if i > 20 and line.startswith("class "))]))


def test_unknown_splits_and_a_python_without_topics(monkeypatch):
    for function in (english, code):
        with pytest.raises(TaskError, match="'haystack' or 'eval'"):
            function("train")
    monkeypatch.setattr(texts, "import_module", lambda name: (_ for _ in ()).throw(ImportError(name)))
    with pytest.raises(TaskError, match="pass a text of your own"):
        texts._topics()


def test_windows():
    ids = torch.arange(10)
    assert windows(ids, 4).tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert windows(ids, 4, 3).tolist() == [[0, 1, 2, 3], [3, 4, 5, 6], [6, 7, 8, 9]]
    for bad in ((ids, 11), (ids, 0), (ids, 4, 0), (ids[None], 2)):
        with pytest.raises(TaskError):
            windows(*bad)


def test_drawn_text_is_a_matter_of_the_generator_alone():
    first, second = (draw_text(None, 500, torch.Generator().manual_seed(3)) for _ in range(2))
    assert first == second
    assert first != draw_text(None, 500, torch.Generator().manual_seed(4))
    assert draw_text("One.\n\nTwo.", 100, torch.Generator().manual_seed(0)).count("Two.") > 3  # goes round
    with pytest.raises(TaskError, match="empty"):
        draw_text(" \n", 10, torch.Generator())


@pytest.mark.parametrize("count", [1, 63, 3000])
def test_drawn_tokens_have_the_size_asked_for(count):
    assert len(draw_tokens(TOKENIZER, None, count, torch.Generator().manual_seed(0))) == count
    assert len(draw_tokens(TOKENIZER, "A short text.", count, torch.Generator().manual_seed(0))) == count
