"""The small vision-language model: its recipe learns, its reserved dimensions stay empty, its files load."""

import pytest
import torch

from headwise.attach import find_stack
from headwise.attach.images import block, decoder_stack
from headwise.errors import TaskError
from headwise.hub import load_model
from headwise.models.scene_vlm import RESERVED, SceneData, save_scene_vlm, scene_vlm, train_scene_vlm
from headwise.tasks.descriptions import describe, pull_of_habit
from headwise.tasks.scenes import make_scenes


def residual(model, inputs):
    """Input of every decoder layer, (L, B, N, C)."""
    stack, seen = find_stack(model, decoder_stack(model)), []
    handles = [
        block(stack, layer).register_forward_pre_hook(lambda m, args: seen.append(args[0]))
        for layer in range(stack.layers)
    ]
    with torch.no_grad():
        model(**inputs)
    for handle in handles:
        handle.remove()
    return torch.stack(seen)


def test_training_lowers_the_loss_and_keeps_dimensions_free(tmp_path):
    model = train_scene_vlm(steps=12, data=SceneData(batch=16, pool=64))[0]
    inputs = make_scenes(32, generator=torch.Generator().manual_seed(5)).training()
    with torch.no_grad():
        before, after = scene_vlm()(**inputs).loss, model(**inputs).loss
    assert after < before - 0.2 and not model.training
    assert not residual(model, inputs)[..., -RESERVED:].any()
    again = train_scene_vlm(steps=12, data=SceneData(batch=16, pool=64))[0]
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    save_scene_vlm(model, tmp_path)
    loaded, tokenizer = load_model(str(tmp_path))
    assert tokenizer.padding_side == "left" and next(model.parameters()).dtype == torch.float32
    torch.testing.assert_close(loaded(**inputs).loss, model(**inputs).loss, atol=0.02, rtol=0.02)


@pytest.mark.parametrize("seed", range(3))
def test_bundled_models_see_and_invent(seed):
    model, _ = load_model(f"scene-vlm-{seed}")
    found = describe(model, make_scenes(60, habit="broken", generator=torch.Generator().manual_seed(11))).measures()
    assert found["recall"] > 0.75 and 0.02 < found["chair_i"] < 0.5


def test_bundled_models_speak_by_habit_only_without_a_picture():
    model, _ = load_model("scene-vlm-0")
    pull = pull_of_habit(model, make_scenes(60, habit="broken", generator=torch.Generator().manual_seed(12)))
    assert abs(pull["unseen"] - 0.85) < 0.1, pull  # how often speech goes on so
    assert pull["seen"] < 0.5 * pull["unseen"], pull


def test_refused():
    with pytest.raises(TaskError, match="size='huge'"):
        scene_vlm("huge")
    with pytest.raises(TaskError, match="steps is 0"):
        train_scene_vlm(steps=0)
    with pytest.raises(TaskError, match="scene-vlm-77"):
        load_model("scene-vlm-77")
    for name, value in (("talk", 1.5), ("slip", -0.1), ("noise", -1.0), ("batch", 0), ("noise", float("nan"))):
        with pytest.raises(TaskError, match=f"{name} is {value:g};"):
            SceneData(**{name: value})
