"""The page about a ViT's heads: complete, self-contained, and about one model only."""

import json

import pytest

from headwise.errors import ScoreError
from headwise.report.vit_page import save_vit_page, vit_page
from headwise.score.vit_importance import importance_of
from headwise.score.vit_patterns import atlas_of
from headwise.score.vit_strength import strength_of
from tiny_helper import random, tiny

pytest.importorskip("plotly", reason="needs plotly: pip install 'headwise[report]'")


def parts(model, seed=0):
    images = random(3, 3, 32, 32, seed=seed)
    return importance_of(model, images), strength_of(model, images), atlas_of(model, images, latent=4, count=3, steps=3)


def test_the_page_holds_what_it_shows(tmp_path):
    importance, strength, atlas = made = parts(tiny("vit"))
    save_vit_page(tmp_path / "vit.html", *made)
    text, data = (tmp_path / "vit.html").read_text(), json.loads((tmp_path / "vit.json").read_text())
    best = importance.scores("js").ranking()[0][0]
    assert str(best) in text
    assert "plotly_click" in text and "{plot_id}" not in text
    assert text.count("<section") == 4
    assert data["importance"]["js"] == importance.values["js"].mean(-1).tolist()
    assert data["patterns"]["names"] == [list(row) for row in atlas.names]
    assert data["grid"] == [4, 4, 1]
    assert "<script src" not in text


def test_the_parts_must_be_of_one_model():
    importance, strength, atlas = parts(tiny("vit"))
    other = strength_of(tiny("clip"), random(2, 3, 32, 32), stack="vision_model")
    with pytest.raises(ScoreError, match="importance and strength are of two models"):
        vit_page(importance, other, atlas)
