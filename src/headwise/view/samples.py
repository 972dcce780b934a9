"""What a model of the explorer reads: the user's own prompt, picture, or both, as a batch of one, with a label for every token."""

from __future__ import annotations

import base64
import binascii
import io
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from headwise.attach.images import image_token_ids
from headwise.errors import AttachError, ViewError
from headwise.tasks.pictures import picture_batches
from headwise.tasks.shapes import make_shapes

MAX_CHARS, MAX_TOKENS = 20_000, 384  # of a prompt: a map has tokens² cells
MAX_IMAGE = 6 * 2**20  # bytes of an image file
MAX_SIDE = 8192  # pixels
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")


@dataclass(frozen=True)
class Sample:
    """A batch of one.

    `inputs`: keyword arguments of the model; `labels`: one for each of the N tokens of the attention; `next_token`: whether token i + 1
    is what the logits at i predict, and of which token on that is a matter of text (`first`); `causal`: whether a token sees only what
    came before it; `side`: patches a side, where the last side² tokens are the patches of a picture; `picture` (S, S, 3) in [0, 1].
    """

    inputs: dict[str, Tensor]
    labels: tuple[str, ...]
    next_token: bool = False
    first: int = 1
    causal: bool = True
    side: int | None = None
    picture: Tensor | None = None

    @property
    def tokens(self) -> int:
        """N."""
        return len(self.labels)

    def distances(self) -> Tensor:
        """(N, N) float: tokens between query and key, or patches between them (NaN where one is no patch)."""
        if self.side is None:
            place = torch.arange(self.tokens, dtype=torch.float32)
            between = place[:, None] - place
            return between if self.causal else between.abs()
        y, x = torch.meshgrid(*[torch.arange(self.side, dtype=torch.float32)] * 2, indexing="ij")
        place = torch.stack([y.flatten(), x.flatten()], 1)
        found = torch.full((self.tokens, self.tokens), torch.nan)
        first = self.tokens - self.side**2
        found[first:, first:] = torch.cdist(place, place)
        return found


def wants(model: nn.Module, tokenizer: Any) -> tuple[bool, bool]:
    """(a prompt, a picture): what the model reads."""
    try:
        image_token_ids(model)
        return True, True
    except AttachError:
        return tokenizer is not None, tokenizer is None


def make_sample(model: Any, tokenizer: Any, prompt: str = "", picture: int = 0, upload: str | None = None) -> Sample:
    """The sample of a prompt, of a drawn picture (by number), or of an uploaded image (a data URL).

    Raises ViewError for an empty or too long prompt, or an image that cannot be read.
    """
    text, image = wants(model, tokenizer)
    if text and not isinstance(prompt, str):
        raise ViewError("the prompt must be text")
    if text and image:
        return _scene(model, tokenizer, prompt, picture)
    return _text(model, tokenizer, prompt) if text else _picture(model, picture, upload)


def _text(model: Any, tokenizer: Any, prompt: str) -> Sample:
    if not prompt.strip():
        raise ViewError("the prompt is empty; type a text that the model should read")
    if len(prompt) > MAX_CHARS:
        raise ViewError(f"the prompt has {len(prompt)} characters; the explorer reads at most {MAX_CHARS}")
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    _check_length(ids.shape[1])
    window = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if window is not None and ids.shape[1] > window:
        raise ViewError(f"the prompt has {ids.shape[1]} tokens; the model reads at most {window}")
    labels = tuple(tokenizer.decode([token]) for token in ids[0].tolist())
    return Sample({"input_ids": ids.to(model.device)}, labels, next_token=bool(model.can_generate()))


def _check_length(tokens: int) -> None:
    if not 2 <= tokens <= MAX_TOKENS:
        raise ViewError(f"the prompt has {tokens} tokens; the explorer draws maps of 2 to {MAX_TOKENS} tokens")


def _scene(model: Any, tokenizer: Any, prompt: str, picture: int) -> Sample:
    """A vision-language model: a drawn scene and then the prompt, or the scene's own question where the prompt is empty."""
    if len(prompt) > MAX_CHARS:
        raise ViewError(f"the prompt has {len(prompt)} characters; the explorer reads at most {MAX_CHARS}")
    batch = picture_batches(model, tokenizer, samples=1, prompt=prompt.strip() or None, seed=_number(picture))[0]
    ids, images = batch["input_ids"][0].tolist(), image_token_ids(model)
    _check_length(len(ids))
    patches = iter(range(1, len(ids) + 1))
    labels = tuple(f"▦{next(patches)}" if token in images else tokenizer.decode([token]) for token in ids)
    moved = {name: value.to(model.device) for name, value in batch.items()}
    first = max(place for place, token in enumerate(ids) if token in images) + 1
    return Sample(moved, labels, next_token=True, first=first, picture=_shown(batch["pixel_values"][0]))


def _picture(model: Any, picture: int, upload: str | None) -> Sample:
    config = model.config
    size, patch = getattr(config, "image_size", None), getattr(config, "patch_size", None)
    if not isinstance(size, int) or not isinstance(patch, int):
        raise ViewError(f"{type(model).__name__} takes no square picture that the explorer can make")
    channels = getattr(config, "num_channels", 3)
    pixels = _drawn(size, _number(picture)) if not upload else _read_upload(upload, size)
    if channels == 1:
        pixels = pixels.mean(0, keepdim=True)
    side = size // patch
    extra = 1 + getattr(config, "num_register_tokens", 0)
    if hasattr(model, "distillation_classifier"):
        extra += 1
    names = ["[CLS]"] + [f"[{i}]" for i in range(1, extra)]
    labels = (*names, *(f"{row},{column}" for row in range(side) for column in range(side)))
    inputs = {"pixel_values": pixels[None].to(model.device, model.dtype)}
    return Sample(inputs, labels, causal=False, side=side, picture=_shown(pixels))


def _drawn(size: int, picture: int) -> Tensor:
    """(3, size, size) in [-1, 1]: a textured shape on a ground."""
    made = make_shapes(1, size=max(size, 8), generator=torch.Generator().manual_seed(picture)).pixels[0]
    tint = torch.rand(3, 1, 1, generator=torch.Generator().manual_seed(picture + 1)) * 0.6 + 0.4
    return (made.expand(3, -1, -1) + 1) * tint - 1


def _read_upload(upload: str, size: int) -> Tensor:
    """A data URL of an image file, cut to its middle square: (3, size, size) in [-1, 1]."""
    try:
        from PIL import Image, UnidentifiedImageError
    except ImportError as error:
        raise ViewError("reading image files needs pillow: pip install 'headwise[vision]'") from error
    head, comma, body = upload.partition(",")
    if not head.startswith("data:image/") or not comma or len(body) > MAX_IMAGE * 4 // 3 + 4:
        raise ViewError(f"this is no image file of at most {MAX_IMAGE // 2**20} MiB; give a PNG or JPEG")
    try:
        with Image.open(io.BytesIO(base64.b64decode(body, validate=True)), formats=FORMATS) as file:
            if max(file.size) > MAX_SIDE:
                raise ViewError(f"the image has {file.size[0]} × {file.size[1]} pixels; at most {MAX_SIDE} a side")
            edge = min(file.size)
            left, top = (file.width - edge) // 2, (file.height - edge) // 2
            square = file.convert("RGB").resize((size, size), box=(left, top, left + edge, top + edge))
    except (
        UnidentifiedImageError,
        OSError,
        ValueError,
        SyntaxError,
        binascii.Error,
        Image.DecompressionBombError,
    ) as error:
        if isinstance(error, ViewError):
            raise
        raise ViewError(f"the image cannot be read ({str(error)[:100]}); give a PNG or JPEG") from error
    flat = torch.frombuffer(bytearray(square.tobytes()), dtype=torch.uint8)
    return flat.view(size, size, 3).permute(2, 0, 1).float() / 127.5 - 1


def _shown(pixels: Tensor) -> Tensor:
    """(S, S, 3) in [0, 1] of pixels (C, S, S) in [-1, 1]."""
    return ((pixels.float().expand(3, -1, -1).permute(1, 2, 0) + 1) / 2).clamp(0, 1)


def _number(picture: Any) -> int:
    if isinstance(picture, bool) or not isinstance(picture, int) or not 0 <= picture < 2**31 - 1:
        raise ViewError(f"the number of the picture is {str(picture)[:40]!r}; it must be a whole number from 0 on")
    return picture
