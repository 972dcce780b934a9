"""Pages of measured claims: every check has its bars, and papers about heads show them."""

import pytest
import torch

pytest.importorskip("plotly")

from headwise.cli import app
from headwise.hub import load_model
from headwise.papers import catalogue, row, rows
from headwise.papers.reproduction import Check, Reproduction
from headwise.report.chapters.circuits import copying, injection, letters, reuse
from headwise.report.paper_page import check_bars, paper_page
from headwise.tasks import make_passkeys
from headwise.tasks.multiple_choice import make_multiple_choice

RECORDED = [r.slug for r in rows() if r.record is not None and getattr(r.module, "sections", None) is None]


def small(**changed):
    checks = (Check("is small", "size", "<", "bound"), Check("is positive", "size", ">", 0.0))
    return Reproduction("mote", "Small things are small", "cpu", {"size": 1.0} | changed, {"bound": 2.0}, checks, 3.0)


@pytest.mark.parametrize("slug", RECORDED[:3])
def test_a_record_is_a_page(slug):
    found = row(slug)
    text = paper_page(found, found.record)
    assert "</html>" in text and "https://" not in text.split("<script>")[0]
    assert all(check.name in text for check in found.record.checks)
    assert ("does not hold" in text) == (not found.record.holds)


def test_a_check_that_is_not_true_is_marked():
    good, bad = (check_bars(r.checks, r.numbers) for r in (small(), small(size=3.0)))
    assert list(good.data[0].x) == [0.5, 1.0] and list(bad.data[0].x) == [1.0, 1.0]
    assert not any(name.startswith("✗") for name in good.data[0].y)
    assert [name.startswith("✗") for name in bad.data[0].y] == [True, False]
    assert list(check_bars(small(size=float("nan")).checks, small(size=float("nan")).numbers).data[0].x) == [0.0, 0.0]


def test_the_command_writes_the_page(monkeypatch, tmp_path, capsys):
    module = row("mote").module
    monkeypatch.setattr(module, "reproduce", lambda scale, *, seed, progress: small())
    monkeypatch.setattr(module, "sections", lambda result, *, seed, progress: [], raising=False)
    with pytest.raises(SystemExit) as ended:
        app(["reproduce", "mote", "--page", str(tmp_path / "deep" / "page.html"), "--seed", "4"])
    assert ended.value.code == 0
    text = (tmp_path / "deep" / "page.html").read_text(encoding="utf-8")
    assert "Small things are small" in text and "--seed 4" in text and catalogue.row("mote").arxiv in text


def numbers(*names, prefix=""):
    found = {prefix + name: 0.5 for name in names}
    return Reproduction("mote", "x", "cpu", found, {}, (Check("", 1.0, "==", 1.0),), 1.0)


def test_circuits_of_two_tasks_are_drawn():
    model, tokenizer = load_model("circuit-lm")
    result = numbers(
        "colors_accuracy_of_three", "repaired_accuracy_of_three", "repair_gain_random_most", prefix="trained_"
    )
    made = reuse(result, model, tokenizer, name="circuit-lm", prefix="trained_", seed=1)
    assert len(made) == 6 and len(made[0].figures) == 2 and made[0].table.rows
    assert list(made[1].figures[0].data[0].y) == [0.5, 0.5, 1.0]
    assert all("<section" in section.to_html(n) for n, section in enumerate(made))


def test_letters_are_drawn():
    model, tokenizer = load_model("circuit-lm")
    ranks = [f"accuracy_rank_{r}" for r in (0, 1, 3, 8, 16)]
    result = numbers(*ranks, "accuracy_letters", "accuracy_rank_3_random")
    written, look, dimensions = letters(
        result, model, make_multiple_choice(tokenizer, count=8, form="question"), name="circuit-lm"
    )
    assert len(written.figures) == 2 and torch.tensor(look.figures[0].data[0].z).shape == (4, 4)
    assert [len(trace.x) for trace in dimensions.figures[0].data] == [5, 5, 1]
    assert all("<section" in section.to_html(1) for section in (written, look, dimensions))


def test_copying_and_injection_are_drawn():
    model, tokenizer = load_model("tiny-random-llama")
    keys = make_passkeys(tokenizer, count=2, length=300, generator=torch.Generator().manual_seed(0))
    few, causal = copying(model, tokenizer, prompts=keys, success="any")
    assert torch.tensor(few.figures[0].data[0].z).shape == (4, 3) and len(causal.figures[0].data) >= 1
    result = numbers("exact_soft", "exact_ten_shot", "exact_zero_shot")
    answered, shares = injection(result, model, tokenizer, tasks=("antonym",), steps=2)
    assert (
        list(answered.figures[0].data[0].y) == [0.5] * 3 and len(shares.figures) == 2 and len(shares.table.rows) == 12
    )
