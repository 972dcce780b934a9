"""`headwise train scene-vlm` and `flow-dit`: what they write, that it loads, and that a resumed run is the same."""

import importlib.util

import pytest
import torch

from headwise.errors import RouteError, TaskError
from headwise.hub import load_model
from headwise.models.flow_vit import FlowViT
from headwise.steer import train_flow_dit, train_scenes
from headwise.storage import read_json

NO_DIFFUSERS = pytest.mark.skipif(importlib.util.find_spec("diffusers") is None, reason="needs diffusers")
KINDS = ["vit", pytest.param("dit", marks=NO_DIFFUSERS)]


def test_a_scene_model_is_written_with_its_curve(tmp_path):
    trained = train_scenes(steps=3, folder=str(tmp_path / "ck"), save_every=2)
    trained.save_pretrained(tmp_path / "run")
    model, tokenizer = load_model(str(tmp_path / "run" / "scene-vlm"))
    assert tokenizer.padding_side == "left" and model.config.model_type == "llava"
    run = read_json(tmp_path / "run" / "curves.json", "training-curves", 1)
    assert len(run["curves"]["scene-vlm"]["losses"]) == 3 and run["settings"]["steps"] == 3
    assert 0 <= run["measured"]["scene-vlm"]["broken_recall"] <= 1
    again = train_scenes(steps=3, folder=str(tmp_path / "ck"), save_every=2, resume=True)
    assert again.curves["scene-vlm"].losses == trained.curves["scene-vlm"].losses
    with pytest.raises(RouteError, match="other settings: seed=0, now 1"):
        train_scenes(steps=3, folder=str(tmp_path / "ck"), resume=True, seed=1)


@pytest.mark.parametrize("kind", KINDS)
def test_a_flow_is_written_and_loads(kind, tmp_path):
    trained = train_flow_dit(model=kind, steps=2, seed=3)
    trained.save_pretrained(tmp_path)
    if kind == "vit":
        loaded = FlowViT.from_pretrained(tmp_path / "vit")
    else:
        from diffusers import DiTTransformer2DModel as DiT

        loaded = DiT.from_pretrained(tmp_path / "dit")
    same = zip(loaded.state_dict().values(), trained.model.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in same)
    again = train_flow_dit(model=kind, steps=2, seed=3)
    assert again.curves[kind].losses == trained.curves[kind].losses
    assert again.measured[kind]["held_out_loss"] == trained.measured[kind]["held_out_loss"]


def test_refused():
    with pytest.raises(RouteError, match="size is 'huge'"):
        train_scenes(size="huge")
    with pytest.raises(RouteError, match="save_every needs folder="):
        train_flow_dit(save_every=1)
    with pytest.raises(TaskError, match="images names a folder"):
        train_flow_dit(images="x")
