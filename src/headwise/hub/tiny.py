"""`tiny-random-<arch>`: models of a few thousand to a few hundred thousand random parameters, one per attention architecture.

All text models share a byte tokenizer (token id = byte value, plus three special tokens), heads of 16 dimensions and a
context of 4096 tokens. The weights are wide enough (std 0.12) that attention is far from uniform and every head matters.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from headwise.errors import TaskError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

TINY_PREFIX = "tiny-random-"
_SEED = 20240917
_PAD, _START, _END = 256, 257, 258
_TEXT: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 4096,
    "initializer_range": 0.12,
    "pad_token_id": _PAD,
    "bos_token_id": _START,
    "eos_token_id": _END,
}
_GQA = _TEXT | {"num_key_value_heads": 2, "head_dim": 16}
_VISION: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
    "initializer_range": 0.12,
}


@dataclass(frozen=True)
class TinyArchitecture:
    """One architecture: its model class, config class and config fields, and one line that says what it is for."""

    line: str
    model: str
    config: str
    fields: dict[str, Any]
    text: bool = True


_GPT2_FIELDS = {
    "n_embd": 64,
    "n_layer": 3,
    "n_head": 4,
    "n_positions": 4096,
    **{k: _TEXT[k] for k in ("vocab_size", "initializer_range", "pad_token_id", "bos_token_id", "eos_token_id")},
}
_GEMMA3_FIELDS = _GQA | {
    "num_hidden_layers": 4,
    "sliding_window": 32,
    "layer_types": ["sliding_attention", "sliding_attention", "sliding_attention", "full_attention"],
    "query_pre_attn_scalar": 16,
}
_QWEN3_MOE_FIELDS = _GQA | {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
_DEEPSEEK_FIELDS = _TEXT | {
    "num_key_value_heads": 4,
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "moe_intermediate_size": 32,
    "num_nextn_predict_layers": 0,
}
_CLIP_FIELDS = {
    "text_config": _TEXT | {"num_hidden_layers": 2, "max_position_embeddings": 64},
    "vision_config": _VISION,
    "projection_dim": 32,
}

_LLAVA_FIELDS = {
    "text_config": _GQA | {"num_hidden_layers": 4, "model_type": "llama"},
    "vision_config": _VISION | {"model_type": "clip_vision_model"},
    "image_token_id": 259,
    "image_seq_length": 16,
    "vision_feature_layer": -1,
}
_QWEN2_VL_FIELDS = {
    "text_config": _GQA | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}},
    "vision_config": {
        "depth": 2,
        "embed_dim": 64,
        "hidden_size": 64,
        "num_heads": 4,
        "mlp_ratio": 2,
        "patch_size": 8,
        "initializer_range": 0.12,
    },
    "image_token_id": 259,
    "video_token_id": 260,
    "vision_start_token_id": 261,
    "vision_end_token_id": 262,
}

TINY_ARCHITECTURES = {
    "llama": TinyArchitecture("Llama, 3 layers, 4 heads, 2 kv heads", "LlamaForCausalLM", "LlamaConfig", _GQA),
    "qwen3": TinyArchitecture("Qwen3: as Llama, with normed queries and keys", "Qwen3ForCausalLM", "Qwen3Config", _GQA),
    "mistral": TinyArchitecture(
        "Mistral: as Llama, every layer with a sliding window of 32 tokens",
        "MistralForCausalLM",
        "MistralConfig",
        _GQA | {"sliding_window": 32},
    ),
    "gemma3": TinyArchitecture(
        "Gemma 3 (text): three layers with a window of 32 tokens, then a full one",
        "Gemma3ForCausalLM",
        "Gemma3TextConfig",
        _GEMMA3_FIELDS,
    ),
    "gpt2": TinyArchitecture(
        "GPT-2: learned positions, one kv head per head", "GPT2LMHeadModel", "GPT2Config", _GPT2_FIELDS
    ),
    "mixtral": TinyArchitecture(
        "Mixtral: as Llama, 4 experts of which 2 are active",
        "MixtralForCausalLM",
        "MixtralConfig",
        _GQA | {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None},
    ),
    "qwen3-moe": TinyArchitecture(
        "Qwen3-MoE: as Qwen3, 8 experts of which 2 are active",
        "Qwen3MoeForCausalLM",
        "Qwen3MoeConfig",
        _QWEN3_MOE_FIELDS,
    ),
    "deepseek-v3": TinyArchitecture(
        "DeepSeek-V3: latent attention, 8 routed experts in 2 groups, 1 shared expert",
        "DeepseekV3ForCausalLM",
        "DeepseekV3Config",
        _DEEPSEEK_FIELDS,
    ),
    "bert": TinyArchitecture("BERT, an encoder of 3 layers, 4 heads", "BertForMaskedLM", "BertConfig", _TEXT),
    "vit": TinyArchitecture(
        "ViT, 2 layers, 32 x 32 pixels in 16 patches, 10 classes",
        "ViTForImageClassification",
        "ViTConfig",
        _VISION | {"num_labels": 10},
        text=False,
    ),
    "clip": TinyArchitecture(
        "CLIP, text and vision towers of 2 layers", "CLIPModel", "CLIPConfig", _CLIP_FIELDS, text=False
    ),
    "llava": TinyArchitecture(
        "LLaVA: CLIP vision (32 x 32 pixels, 16 image tokens) and Llama of 4 layers; image token id 259",
        "LlavaForConditionalGeneration",
        "LlavaConfig",
        _LLAVA_FIELDS,
    ),
    "qwen2-vl": TinyArchitecture(
        "Qwen2-VL: vision tower with 2 x 2 merged patches, decoder with M-RoPE; image token id 259",
        "Qwen2VLForConditionalGeneration",
        "Qwen2VLConfig",
        _QWEN2_VL_FIELDS,
    ),
}


def tiny_model(name: str, attn_implementation: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
    """Builds `tiny-random-<arch>` in float32 on the CPU; the same weights at every call, torch's random state untouched."""
    import transformers

    architecture = TINY_ARCHITECTURES.get(name.removeprefix(TINY_PREFIX))
    if architecture is None:
        known = ", ".join(TINY_PREFIX + n for n in TINY_ARCHITECTURES)
        raise TaskError(f"no bundled model is named {name!r}; known: {known}")
    config = getattr(transformers, architecture.config)(**architecture.fields)
    build = partial(getattr(transformers, architecture.model)._from_config, attn_implementation=attn_implementation)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(_SEED)  # torch.manual_seed would also reseed the accelerators
        model = build(config, dtype=torch.float32)
    model.config.architectures = [architecture.model]
    return model.eval(), byte_tokenizer() if architecture.text else None


def byte_tokenizer() -> PreTrainedTokenizerBase:
    """A tokenizer whose ids are the bytes of the UTF-8 text; pad 256, `<|im_start|>` 257, `<|im_end|>` 258 (end of text).

    >>> byte_tokenizer()("Hi!").input_ids
    [72, 105, 33]
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE(vocab={c: byte for byte, c in enumerate(_byte_characters())}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|pad|>", "<|im_start|>", "<|im_end|>"])
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|pad|>",
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        model_max_length=_TEXT["max_position_embeddings"],
        clean_up_tokenization_spaces=False,
    )
    wrapped.chat_template = _CHAT_TEMPLATE
    return wrapped


_CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def _byte_characters() -> list[str]:
    """The printable character that stands for each byte in byte-level vocabularies, in the order of the bytes."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = (byte for byte in range(256) if byte not in printable)
    stand_in = {byte: chr(256 + i) for i, byte in enumerate(others)}
    return [stand_in.get(byte, chr(byte)) for byte in range(256)]
