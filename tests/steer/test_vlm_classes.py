"""VHR, VAR and VHD on small random models of the vision-language classes that transformers has."""

import pytest
import torch
import transformers

from headwise.score.vhd import vhd_samples
from headwise.steer.var import VAR
from headwise.steer.vhr import VHR

TEXT = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
    "vocab_size": 300, "max_position_embeddings": 512, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
SIGHT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 4,
}
QWEN_SIGHT = {
    "depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 4, "out_hidden_size": 64, "patch_size": 8, "spatial_merge_size": 2,
}  # fmt: skip
ROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
IMAGE, PIXELS = 259, (2, 3, 32, 32)
QWEN = {"image_token_id": IMAGE, "video_token_id": 260, "vision_start_token_id": 261, "vision_end_token_id": 262}


def model(name, **options):
    cls = getattr(transformers, f"{name}ForConditionalGeneration")
    torch.manual_seed(0)
    return cls._from_config(cls.config_class(image_token_id=IMAGE, **options), attn_implementation="sdpa").eval()


def inputs(*ids, pixels=PIXELS, **more):
    rows = torch.tensor([[*ids], [*ids[:-1], 9]])
    generator = torch.Generator().manual_seed(0)
    given = {"input_ids": rows, "attention_mask": torch.ones_like(rows)}
    return {**given, "pixel_values": torch.randn(pixels, generator=generator), **more}


def qwen(name, rope, **sight):
    made = model(
        name,
        text_config={**TEXT, "rope_parameters": rope},
        vision_config={**QWEN_SIGHT, **sight},
        **{k: v for k, v in QWEN.items() if k != "image_token_id"},
    )
    given = inputs(
        1, 261, *[IMAGE] * 4, 262, 5, 6, 7, pixels=(32, 3 * 2 * 8 * 8), image_grid_thw=torch.tensor([[1, 4, 4]] * 2)
    )
    return made, given | {"mm_token_type_ids": (given["input_ids"] == IMAGE).int()}


def internvl():
    sight = {**SIGHT, "image_size": [32, 32], "patch_size": [4, 4]}
    options = {"text_config": {"model_type": "qwen2", **TEXT}, "image_seq_length": 16, "downsample_ratio": 0.5}
    return model("InternVL", vision_config=sight, **options), inputs(1, 3, *[IMAGE] * 16, 5, 6, 7)


def gemma3():
    text = {**TEXT, "sliding_window": 16, "query_pre_attn_scalar": 16}
    made = model(
        "Gemma3", text_config=text, vision_config=SIGHT, mm_tokens_per_image=16, boi_token_id=261, eoi_token_id=262
    )
    given = inputs(1, 261, *[IMAGE] * 16, 262, 5, 6, 7)
    return made, given | {"token_type_ids": (given["input_ids"] == IMAGE).long()}


def paligemma():
    sight = {"model_type": "siglip_vision_model", **SIGHT, "patch_size": 8, "projection_dim": 64}
    options = {
        "text_config": {"model_type": "gemma", **TEXT},
        "vision_config": sight,
        "projection_dim": 64,
        "hidden_size": 64,
    }
    return model("PaliGemma", **options), inputs(*[IMAGE] * 16, 1, 5, 6, 7)


def smolvlm():
    options = {"text_config": {"model_type": "llama", **TEXT}, "vision_config": SIGHT, "scale_factor": 2}
    return model("SmolVLM", **options), inputs(1, 3, *[IMAGE] * 16, 5, 6, 7, pixels=(2, 1, 3, 32, 32))


def mistral3():
    text, sight = {"model_type": "mistral", **TEXT}, {"model_type": "pixtral", **SIGHT, "head_dim": 8}
    made = model("Mistral3", text_config=text, vision_config=sight, image_token_index=IMAGE, spatial_merge_size=2)
    return made, inputs(1, 3, *[IMAGE] * 16, 5, 6, 7, image_sizes=torch.tensor([[32, 32]] * 2))


MADE = {
    "qwen2.5-vl": lambda: qwen("Qwen2_5_VL", ROPE, window_size=32, fullatt_block_indexes=[1]),
    "qwen3-vl": lambda: qwen(
        "Qwen3VL", ROPE | {"mrope_interleaved": True}, num_position_embeddings=64, deepstack_visual_indexes=[0]
    ),
    "internvl": internvl,
    "gemma3": gemma3,
    "paligemma": paligemma,
    "smolvlm": smolvlm,
    "mistral3": mistral3,
}
VAR_RULE = VAR(dims=tuple(range(64)), tau=2.2, layers=(1, 2), centric=False, move=1.0)


@pytest.mark.parametrize("rule", [VHR(layers=(1, 2), alpha=3.0), VAR_RULE], ids=["vhr", "var"])
@pytest.mark.parametrize("name", MADE)
def test_rules_act_and_answers_do_not_depend_on_the_cache(name, rule):
    made, given = MADE[name]()
    options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    with torch.no_grad():
        plain = made(**given).logits
        with rule.attach(made) as running:
            changed = made(**given).logits
            cached, fresh = (made.generate(**given, **options, use_cache=use) for use in (True, False))
        assert torch.equal(made(**given).logits, plain)
    assert (changed[:, -1] != plain[:, -1]).any() and torch.equal(cached, fresh)
    if isinstance(rule, VHR):
        assert all(heads.sum(1).tolist() == [2, 2] for heads in running.heads.values())
    else:
        assert sum(running.selected.values()) > 0


@pytest.mark.parametrize("name", MADE)
def test_vhd_is_that_of_each_row_alone(name):
    made, given = MADE[name]()
    found = vhd_samples(made, given)
    assert found.shape == (2, 3, 4) and (found >= 0).all() and found.max() > 0
    if given["pixel_values"].shape[0] == 2:
        for row in range(2):
            alone = {key: value[row : row + 1] for key, value in given.items()}
            torch.testing.assert_close(vhd_samples(made, alone)[0], found[row], atol=1e-5, rtol=1e-4)
