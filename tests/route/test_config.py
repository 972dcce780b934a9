"""A head router's config and files: saved, loaded, refused where it is damaged or made for another model."""

import json

import pytest
import torch
from router_helper import KINDS, logits, make
from safetensors.torch import save_file

from headwise import attach
from headwise.errors import ArtifactError, AttachError, RouteError, WrongModelError
from headwise.hub import load_model
from headwise.route import HeadRouter, LayerRoute, RouterConfig

# on disk


@pytest.mark.parametrize("kind", KINDS)
def test_saved_and_loaded_it_is_the_same(llama, ids, kind, tmp_path):
    router = make(llama, kind, gate_norm="paper", beta=0.5)
    router.save_pretrained(tmp_path / "adapter")
    again = HeadRouter.from_pretrained(tmp_path / "adapter")
    assert again.config == router.config
    with attach(llama, router=router):
        wanted = logits(llama, ids)
    with attach(llama, router=again):
        assert torch.equal(logits(llama, ids), wanted)


def test_loading_does_not_touch_the_global_generator(llama, tmp_path):
    make(llama, "trained").save_pretrained(tmp_path)
    torch.manual_seed(5)
    wanted = torch.rand(1)
    torch.manual_seed(5)
    HeadRouter.from_pretrained(tmp_path)
    assert torch.equal(torch.rand(1), wanted)


def test_another_model_is_refused(llama, tmp_path):
    router = make(llama, "norm")
    other, _ = load_model("tiny-random-qwen3")
    with pytest.raises(WrongModelError, match="the head router was made for llama"):
        attach(other, router=router)
    assert not hasattr(other.model.layers[0].self_attn, "headwise_router")
    bare = HeadRouter(RouterConfig(kind="norm", layers=(LayerRoute(heads=4, routed=2),) * 2))
    with pytest.raises(WrongModelError, match="2 layers"):
        attach(llama, router=bare)
    narrow = RouterConfig(kind="trained", width=32, layers=(LayerRoute(heads=4, routed=2),) * 3)
    with pytest.raises(AttachError, match="width 32, the model has 64"):
        attach(llama, router=HeadRouter(narrow))


def _broken(folder, name, change):
    path = folder / name
    if change == "cut":
        path.write_bytes(path.read_bytes()[:-40])
    elif change == "gone":
        path.unlink()
    elif change == "other":
        save_file({"layers.0.W_r": torch.ones(3, 64)}, path)
    else:
        data = json.loads(path.read_text())
        data.update(change)
        path.write_text(json.dumps(data))


@pytest.mark.parametrize(
    "name, change",
    [
        ("router_model.safetensors", "cut"),
        ("router_model.safetensors", "gone"),
        ("router_model.safetensors", "other"),
        ("router_config.json", "cut"),
        ("router_config.json", "gone"),
        ("router_config.json", {"kind": "magic"}),
        ("router_config.json", {"beta": -1.0}),
        ("router_config.json", {"eps": None}),
        ("router_config.json", {"width": 63}),
        ("router_config.json", {"layers": []}),
        ("router_config.json", {"layers": [{"heads": 4, "shared": [0], "routed": 9}] * 3}),
        ("router_config.json", {"layers": [{"heads": 4, "shared": [4], "routed": 1}] * 3}),
        ("router_config.json", {"layers": [7]}),
        ("router_config.json", {"weights": "0" * 64}),
        ("router_config.json", {"schema": 99}),
        ("router_config.json", {"fingerprint": {"layers": 3}}),
    ],
)
def test_bad_files_are_refused_with_their_name(llama, tmp_path, name, change):
    make(llama, "trained").save_pretrained(tmp_path)
    _broken(tmp_path, name, change)
    with pytest.raises(ArtifactError, match="router_"):
        HeadRouter.from_pretrained(tmp_path)


# counts that make no sense


@pytest.mark.parametrize(
    "route, problem",
    [
        (lambda: LayerRoute(heads=4, shared=(0, 1, 2), routed=2), "routed is 2; it must be a whole number from 0 to 1"),
        (lambda: LayerRoute.first(4, -1, 2), "shared heads is -1"),
        (lambda: LayerRoute.first(4, 5, 0), "shared heads is 5"),
        (lambda: LayerRoute(heads=4, shared=(4,), routed=0), "a shared head is 4"),
        (lambda: LayerRoute(heads=4, shared=(0,), routed=-1), "routed is -1"),
        (lambda: LayerRoute(heads=4, shared=(), routed=5), "from 0 to 4"),
        (lambda: LayerRoute(heads=4), "no head of a layer would run"),
        (lambda: LayerRoute(heads=4, shared=(1, 0), routed=1), "ascending"),
        (lambda: LayerRoute(heads=4, shared=(1, 1), routed=1), "once"),
        (lambda: LayerRoute(heads=0, routed=0), "heads is 0"),
        (lambda: LayerRoute(heads=4, routed=1.5), "routed is 1.5"),
        (lambda: RouterConfig(kind="norm", layers=()), "at least one"),
        (lambda: RouterConfig(kind="best", layers=(LayerRoute(heads=2, routed=1),)), "kind is 'best'"),
        (lambda: RouterConfig(kind="trained", layers=(LayerRoute(heads=2, routed=1),)), "width is 0"),
        (lambda: RouterConfig(kind="static", layers=(LayerRoute(heads=2, routed=1),)), "chooses no heads per token"),
        (lambda: RouterConfig(kind="norm", layers=(LayerRoute(heads=2, routed=1),), eps=0.0), "eps above 0"),
        (lambda: RouterConfig(kind="norm", layers=(LayerRoute(heads=2, routed=1),), gate_norm="x"), "gate_norm is 'x'"),
    ],
)
def test_head_counts_that_make_no_sense(route, problem):
    with pytest.raises(RouteError, match=problem):
        route()
