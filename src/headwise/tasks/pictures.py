"""Pictures for vision-language models without any download: scenes drawn at the size that a model's vision tower wants."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from headwise.attach.images import image_token_ids
from headwise.checks import whole
from headwise.errors import TaskError
from headwise.tasks.scenes import ID, make_scenes

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

PROMPT = "Please describe this image in detail."
SCENE_PROMPT = "describe :"


def picture_batches(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    samples: int = 16,
    *,
    batch_size: int = 16,
    prompt: str | None = None,
    seed: int = 0,
) -> list[dict[str, Tensor]]:
    """Keyword arguments of a LLaVA-like model: scenes, each followed by `prompt`, in batches.

    Raises TaskError for a model whose vision tower takes no square picture (Qwen2-VL: let its processor make the batches).

    >>> from headwise.hub import load_model
    >>> batch = picture_batches(*load_model("tiny-random-llava"), samples=2)[0]
    >>> sorted(batch), batch["pixel_values"].shape
    (['attention_mask', 'input_ids', 'pixel_values'], torch.Size([2, 3, 32, 32]))
    """
    whole("samples", samples, 1, TaskError)
    whole("batch_size", batch_size, 1, TaskError)
    side, tokens = picture_size(model)
    if tokenizer is None:
        raise TaskError("a prompt needs a tokenizer; or give batches= of your own, as the model's processor makes them")
    if prompt is None:
        prompt = SCENE_PROMPT if tokenizer.get_vocab() == ID else PROMPT
    start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    text = tokenizer(prompt, add_special_tokens=False).input_ids
    row = torch.tensor([*start, *[image_token_ids(model)[0]] * tokens, *text])
    generator = torch.Generator().manual_seed(seed)
    pixels = make_scenes(samples, generator=generator).pixels
    if side != pixels.shape[-1]:
        pixels = nn.functional.interpolate(pixels, (side, side), mode="bilinear", antialias=False)
    pixels = pixels.to(model.dtype)
    ids = row.expand(samples, -1)
    return [
        {"input_ids": part, "attention_mask": torch.ones_like(part), "pixel_values": pixels[at : at + len(part)]}
        for at, part in ((at, ids[at : at + batch_size]) for at in range(0, samples, batch_size))
    ]


def picture_size(model: PreTrainedModel) -> tuple[int, int]:
    """(pixels a side, image tokens a picture) of a LLaVA-like model; TaskError for others."""
    image_token_ids(model)
    config = model.config
    vision = getattr(config, "vision_config", None)
    side, patch = getattr(vision, "image_size", None), getattr(vision, "patch_size", None)
    if config.model_type not in ("llava", "vipllava") or not isinstance(side, int) or not isinstance(patch, int):
        raise TaskError(
            f"pictures cannot be made for {type(model).__name__}: give batches=, keyword arguments as the model's processor makes them"
        )
    whole_tower = getattr(config, "vision_feature_select_strategy", "default") == "full"
    return side, (side // patch) ** 2 + whole_tower
