"""The site without its generator: every page is in the menu, every link and anchor leads somewhere, and generated files are fresh."""

import importlib.util
import re
import subprocess
import sys

import pytest

from docs_helper import ROOT, pages

DOCS = ROOT / "docs"
MENU = re.compile(r"^\s+- (?:[^:\n]+: )?([\w/.-]+\.md)$", re.MULTILINE)
LINK = re.compile(r"(?<!!)\[[^\]\[]+\]\(([^)\s]+)\)")
IMAGE = re.compile(r"!\[[^\]]*\]\(([^)\s]+)\)")


def tool(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


hooks = tool("site_hooks")


def prose(name):
    """A page without its code."""
    text = (ROOT / name).read_text(encoding="utf-8")
    return re.sub(r"^```.*?^```$|`[^`\n]+`|<!--.*?-->", "", text, flags=re.DOTALL | re.MULTILINE)


def anchors(text):
    """Identifiers of the headings, as the generator makes them."""
    heads = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    plain = [re.sub(r"[^\w\s-]", "", re.sub(r"\[([^\]]+)\]\([^)]+\)", r"\1", head)).strip().lower() for head in heads]
    return {re.sub(r"[-\s]+", "-", head) for head in plain}


def broken(name):
    """Links of a page that lead nowhere."""
    bad = []
    for target in LINK.findall(prose(name)) + IMAGE.findall(prose(name)):
        path, _, anchor = target.partition("#")
        if re.match(r"\w+:", path):
            continue
        file = (ROOT / name).parent / path if path else ROOT / name
        if (
            not file.exists()
            or anchor
            and file.suffix == ".md"
            and anchor not in anchors(file.read_text(encoding="utf-8"))
        ):
            bad.append(target)
    return bad


@pytest.mark.parametrize("name", pages())
def test_links_and_anchors_lead_somewhere(name):
    assert broken(name) == []


def test_a_broken_link_is_seen(monkeypatch):
    monkeypatch.setattr(f"{__name__}.prose", lambda name: "[a](nowhere.md) [b](docs/papers.md#no-such) [c](LICENSE)")
    assert broken("README.md") == ["nowhere.md", "docs/papers.md#no-such"]


def test_every_page_is_in_the_menu_and_every_entry_is_a_page():
    menu = MENU.findall((ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:")[2])
    assert len(menu) == len(set(menu)) > 50
    outside = set(hooks.OUTSIDE)
    assert [entry for entry in menu if not (ROOT if entry in outside else DOCS).joinpath(entry).exists()] == []
    held = {str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md")}
    assert sorted(held - set(menu) - {"reliability.md"}) == []


def test_no_foreign_host_is_asked_when_a_page_is_read():
    settings = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    assert "font: false" in settings
    assert re.findall(r"https?://", settings) == []
    assert re.findall(r"url\(|@import", (DOCS / "assets" / "site.css").read_text(encoding="utf-8")) == []
    for name in pages():
        assert re.findall(r"!\[[^\]]*\]\(https?:|<(?:script|link|img|iframe)\b", prose(name)) == [], name


def test_pages_for_github_become_pages_for_the_generator():
    text = "Words\n| a |\n|---|\n| b |\nMore\n- x\n- y\n```sh\n| no\n- no\n```"
    assert hooks.spaced(text).split("\n") == [
        *["Words", "", "| a |", "|---|", "| b |", "", "More", "", "- x", "- y", "```sh", "| no", "- no", "```"]
    ]


def test_links_that_leave_the_site_become_file_names():
    out = hooks.relinked("[n](../../benchmarks/notes.md) [t](../../tests/test_docs.py) [d](duo.md#x)", "methods/moh.md")
    assert out == "[n](../benchmarks/notes.md) t (`tests/test_docs.py`) [d](../methods/duo.md#x)"
    assert hooks.relinked("`[k](v.md)`", "methods/moh.md") == "`[k](v.md)`"


@pytest.mark.parametrize("name", ["api_pages", "site_figure"])
def test_generated_files_are_fresh(name, capsys):
    assert not tool(name).main(["--check"]), capsys.readouterr().out


def test_the_reference_has_every_public_name():
    import headwise

    text = "\n".join(page.read_text(encoding="utf-8") for page in (DOCS / "api").glob("*.md"))
    missing = [name for name in headwise.__all__ if f"headwise.{name}}}" not in text and not name.startswith("__")]
    assert missing == []
    assert "headwise.score.retrieval}" in text and "headwise.route.HeadRouter}" in text


def test_the_figure_follows_the_records(monkeypatch):
    figure = tool("site_figure")
    real = figure.record("duoattention")
    assert f">{real['recall_duo_10pct']:.2f}<" in figure.svg()
    monkeypatch.setattr(figure, "record", lambda slug: dict.fromkeys([*real, *record_names(slug)], 0.31))
    assert ">0.31<" in figure.svg() and figure.svg() != figure.FIGURE.read_text(encoding="utf-8")


def record_names(slug):
    return ["recall_intact", "recall_without_top", "recall_without_random"] if slug == "retrieval-head" else []


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("mkdocs") is None, reason="needs pip install 'headwise[docs]'")
def test_the_site_builds_and_loads_nothing_from_elsewhere(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "-d", str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    loads = re.compile(r"<(?:script|img|iframe)[^>]+src=\"?https?://|<link[^>]+rel=\"?stylesheet[^>]+https?://")
    for page in tmp_path.rglob("*.html"):
        assert not loads.search(page.read_text(encoding="utf-8")), page
