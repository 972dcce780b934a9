"""Vision classes of transformers and diffusers at their real shapes (no memory: meta tensors), and small ones that really run."""

import copy

import pytest
import torch
import transformers

from headwise.attach import attach, find_stack, fingerprint
from headwise.attach.images import decoder_stack
from headwise.edits import Edit
from headwise.errors import AttachError
from headwise.steer.vhr import VHR
from headwise.units import HeadSet
from tiny_helper import random
from vlm_helper import llava, prompt, qwen2_vl

TOWERS = {  # class, part of the stack's name, layers, heads, head dim
    "ViT": ("ViTForImageClassification", None, 12, 12, 64),
    "DeiT": ("DeiTForImageClassification", None, 12, 12, 64),
    "Dinov2": ("Dinov2Model", None, 12, 12, 64),
    "CLIP": ("CLIPModel", "vision_model", 12, 12, 64),
    "Siglip": ("SiglipModel", "vision_model", 12, 12, 64),
}
VLMS = {  # layers, heads, kv heads of the decoder by default
    "Llava": (32, 32, 32),
    "LlavaNext": (32, 32, 32),
    "LlavaOnevision": (32, 32, 32),
    "Qwen2VL": (80, 64, 8),
    "Qwen2_5_VL": (80, 64, 8),
    "InternVL": (32, 32, 32),
    "SmolVLM": (32, 32, 32),
    "Gemma3": (26, 8, 4),
    "PaliGemma": (18, 8, 1),
    "Mistral3": (40, 32, 8),
}


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Nothing here reads fresh memory; and torch.device("meta") knows torch.empty only as torch made it, else it makes real gigabytes."""
    torch.utils._device._device_constructors.cache_clear()
    yield
    torch.utils._device._device_constructors.cache_clear()


def on_meta(name):
    cls = getattr(transformers, name)
    with torch.device("meta"):
        return cls._from_config(cls.config_class(), attn_implementation="sdpa")


@pytest.mark.parametrize("name", TOWERS)
def test_towers_of_real_shape(name):
    cls, part, layers, heads, dim = TOWERS[name]
    stack = find_stack(on_meta(cls), part)
    assert (stack.layers, stack.heads, stack.head_dim, stack.causal) == (layers, heads, dim, False)


@pytest.mark.parametrize("name", VLMS)
def test_decoders_of_vision_language_models_of_real_shape(name):
    model = on_meta(f"{name}ForConditionalGeneration")
    made_for = fingerprint(model, decoder_stack(model))
    assert (made_for.layers, made_for.heads, made_for.kv_heads) == VLMS[name]
    with VHR(layers=(1, made_for.layers - 1)).attach(model):
        pass
    assert not model.base_model._forward_pre_hooks


def test_images_by_cross_attention_are_refused():
    with pytest.raises(AttachError, match="takes images in by cross-attention"):
        decoder_stack(on_meta("MllamaForConditionalGeneration"))


SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
PIXELS = {"image_size": 16, "patch_size": 4}


FELT = {  # class, and options where it has others
    "vit": ("ViTModel", {}),
    "deit": ("DeiTModel", {}),
    "dinov2": ("Dinov2Model", {"intermediate_size": None}),
    "dinov2 with registers": ("Dinov2WithRegistersModel", {"intermediate_size": None, "num_register_tokens": 3}),
    "clip": ("CLIPVisionModel", {}),
    "siglip": ("SiglipVisionModel", {}),
    "internvl, normed queries": (
        "InternVLVisionModel",
        {"use_qk_norm": True, "image_size": (16, 16), "patch_size": (4, 4)},
    ),
    "dinov3": ("DINOv3ViTModel", {}),
}


def small(name):
    cls, more = FELT[name]
    cls = getattr(transformers, cls)
    options = {k: v for k, v in {**SMALL, **PIXELS, **more}.items() if v is not None}
    torch.manual_seed(0)
    return cls._from_config(cls.config_class(**options), attn_implementation="sdpa").eval()


@pytest.mark.parametrize("name", FELT)
@torch.no_grad()
def test_every_head_is_felt_and_everything_is_restored(name):
    model = small(name)
    pixels = random(2, 3, 16, 16)
    plain = model(pixel_values=pixels).last_hidden_state
    for layer in range(2):
        for head in range(4):
            with attach(model, edits=Edit.zero(HeadSet.of([(layer, head)]))):
                assert not torch.equal(model(pixel_values=pixels).last_hidden_state, plain), (layer, head)
    assert torch.equal(model(pixel_values=pixels).last_hidden_state, plain)


@pytest.mark.parametrize("name", ["llava", "qwen2-vl"])
@torch.no_grad()
def test_every_head_of_a_vision_language_model_is_felt(name):
    """Decoder and image tower, each as a stack of its own; zeroed edits reach what the model says."""
    model, inputs = (llava(), prompt([1, "img", 7, 8])) if name == "llava" else qwen2_vl()
    plain = model(**inputs).logits
    towers = [decoder_stack(model), "vision_tower" if name == "llava" else "visual"]
    for stack in towers:
        made = fingerprint(model, stack)
        for layer in range(made.layers):
            for head in range(made.heads):
                with attach(model, edits=Edit.zero(HeadSet.of([(layer, head)])), stack=stack):
                    assert not torch.equal(model(**inputs).logits, plain), (stack, layer, head)
    assert torch.equal(model(**inputs).logits, plain)


def test_layers_with_configs_of_their_own_are_refused():
    """Switching one config would not reach the others: no silent no-op."""
    model = small("vit")
    attention = find_stack(model).modules[1]
    attention.config = copy.deepcopy(attention.config)
    with pytest.raises(AttachError, match=r"layers \[1\] have configs of their own"):
        attach(model, edits=Edit.zero(HeadSet.parse("L0H0")))


DIFFUSION = {  # class, options of the published model, layers, heads, head dim
    "SD3-medium": ("SD3Transformer2DModel", {"num_layers": 24, "num_attention_heads": 24, "caption_projection_dim": 1536}, 24, 24, 64),
    "FLUX.1": ("FluxTransformer2DModel", {}, 57, 24, 128),
    "PixArt": ("PixArtTransformer2DModel", {"caption_channels": 4096}, 28, 16, 72),
    "DiT-XL/2": ("DiTTransformer2DModel", {}, 28, 16, 72),
}  # fmt: skip


@pytest.mark.parametrize("name", DIFFUSION)
def test_diffusion_transformers_of_real_shape(name):
    diffusers = pytest.importorskip("diffusers", reason="needs diffusers: pip install 'headwise[vision]'")
    cls, options, layers, heads, dim = DIFFUSION[name]
    with torch.device("meta"):
        model = getattr(diffusers, cls)(**options)
    stack = find_stack(model)
    assert (stack.layers, stack.heads, stack.head_dim) == (layers, heads, dim)
    with attach(model, edits=Edit.zero(HeadSet.of([(layers - 1, heads - 1)]))):
        assert [bool(m._forward_hooks) for m in stack.modules] == [False] * (layers - 1) + [True]
