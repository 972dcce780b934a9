"""What the pages show is run: the README's ten lines, and the method that the architecture page adds."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def blocks(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL)


@pytest.mark.smollm2
@pytest.mark.slow
def test_the_ten_lines_of_the_readme(capsys):
    (code,) = blocks("README.md")
    space: dict = {}
    exec(compile(code, "README.md", "exec"), space)
    assert len([line for line in code.splitlines() if line.strip()]) <= 12
    printed = capsys.readouterr().out
    assert "L18H6" in printed
    assert "Paris" in printed


def test_the_method_of_the_architecture_page():
    import headwise
    from headwise import registry

    (code,) = blocks("docs/architecture.md")
    known = dict(registry._methods)
    space = {"__name__": "headwise.score.entropy"}
    try:
        exec(compile(code, "docs/architecture.md", "exec"), space)
        assert registry.get("score", "entropy").summary.startswith("Minus the mean entropy")
        scores = space["entropy"](*headwise.load_model("tiny-random-llama"), tokens=64)
    finally:
        registry._methods.clear()
        registry._methods.update(known)
    assert scores.values.shape == (3, 4)
    assert (scores.values < 0).all()
