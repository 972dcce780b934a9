"""The chapter about heads that tokens choose: rows, the maps of the head load by kind of text, the sentence about them."""

import dataclasses

import pytest

from headwise.hub import load_model
from headwise.report.chapters.routing import RULES, routing
from headwise.report.demo import Settings, Story


def test_rules_recovery_and_head_load_by_kind_of_text(tmp_path):
    pytest.importorskip("plotly")
    sizes = {"moh_tokens": 512, "moh_heads": (3, 2), "fit_tokens": 1024, "recovery_steps": 1, "recovery_window": 32}
    settings = dataclasses.replace(Settings(), **sizes)
    model, tokenizer = load_model("tiny-random-llama")
    story = Story(model, tokenizer, settings, tmp_path, name="tiny-random-llama")
    section = routing(story)
    rows = story.findings["routing"]
    assert [r["rule"] for r in rows if r["trained_tokens"] == 0] == [
        "dense",
        *(rule for rule in RULES for _ in range(2)),
    ]
    assert sum(r["trained_tokens"] > 0 for r in rows) == 2
    load = story.findings["head_load"]
    assert list(load) == ["English", "code"]
    for shares in load.values():
        assert [round(sum(layer), 6) for layer in shares] == [3.0] * 3  # three of four heads a token, in every layer
    assert load["English"] != load["code"]
    maps = section.figures[1:]
    assert [list(map(list, zip(*figure.data[0].z, strict=True))) for figure in maps] == list(load.values())
    assert "Kinds of text use heads of their own" in " ".join(section.text)
    assert "share, code" in section.to_html(1)
