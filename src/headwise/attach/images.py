"""Where the image tokens stand in a vision-language model: found from the model's own image token id, pass by pass.

LLaVA, Qwen2-VL and their like put the image into the decoder's sequence, one token a patch. `ImageTokens` notes which positions
these are, for every row of a padded batch, through prefill, chunks and decoding, so that edits can speak of "the image".

Letters: B batch, N columns of a pass, P positions of a row (real tokens, counted from 0).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn

from headwise.arguments import CACHE, bound
from headwise.attach import Attachment, HeadCall, Transform, attach
from headwise.attach.locate import Stack, _stacks, find_stack
from headwise.errors import AttachError

_IDS = ("image_token_id", "image_token_index", "video_token_id", "video_token_index")
_TEXT_ONLY = "_headwise_text_only"


def image_token_ids(model: nn.Module) -> tuple[int, ...]:
    """Ids of the tokens that stand for patches of images (and videos). Raises AttachError for a model that has none.

    >>> from headwise.hub import load_model
    >>> image_token_ids(load_model("tiny-random-llava")[0])
    (259,)
    """
    found = {getattr(model.config, name, None) for name in _IDS}
    ids = tuple(sorted(value for value in found if isinstance(value, int)))
    if not ids:
        raise AttachError(
            f"{type(model).__name__} has no image token: its config has none of {', '.join(_IDS)}. "
            "A vision-language model that puts image tokens into its decoder's sequence (LLaVA, Qwen2-VL, …) is needed"
        )
    return ids


def decoder_stack(model: nn.Module) -> str:
    """Name of the decoder's stack of attention layers, for `stack=`, in a model that has a vision tower too.

    Raises AttachError for a model without image tokens, or one whose image enters by cross-attention.
    """
    image_token_ids(model)
    text: Any = model.config.get_text_config()  # type: ignore[union-attr,operator]
    found = {name: next(iter(layers.values()))[1] for name, layers in _stacks(model).items()}
    crossing = [name for name in found if "cross" in name]
    if crossing:
        raise AttachError(
            f"{type(model).__name__} takes images in by cross-attention ({crossing[0]}); its sequence holds no image tokens"
        )
    own = [name for name, module in found.items() if getattr(module, "config", None) == text]
    if len(own) != 1:
        raise AttachError(f"{type(model).__name__}: {len(own)} of {sorted(found)} belong to the text decoder, not one")
    return own[0]


def block(stack: Stack, layer: int) -> nn.Module:
    """The decoder layer that holds the attention module of this number: its input is the residual stream x^(l-1)."""
    for holder in stack.owner.modules():
        found = holder[layer] if isinstance(holder, nn.ModuleList) and len(holder) == stack.layers else None
        if found is not None and any(part is stack.modules[layer] for part in found.modules()):
            return found
    raise AttachError(f"stack {stack.pattern}: no list of {stack.layers} layers holds attention module {layer}")


@contextmanager
def text_only(model: nn.Module) -> Iterator[None]:
    """Inside, passes of the decoder read a prompt whose images were taken out: what speaks of image tokens stands aside."""
    marks: dict[str, Any] = model.base_model.__dict__
    outer = _TEXT_ONLY in marks
    marks[_TEXT_ONLY] = True
    try:
        yield
    finally:
        if not outer:
            del marks[_TEXT_ONLY]


class ImageTokens:
    """Follows the forward passes of a vision-language model and knows which positions are image tokens.

    `table` (B, P) bool by position; `fresh` whether the pass at hand begins a prompt. Subclasses get `begin` at each prompt and may
    attach transforms with `attach_with`. A pass without cache whose ids continue those of the last one (`generate(use_cache=False)`)
    is not fresh.
    """

    def __init__(self, model: nn.Module):
        self.model = model
        self.base: nn.Module = model.base_model  # type: ignore[assignment]
        self.ids = image_token_ids(model)
        self.stack: Stack = find_stack(model, decoder_stack(model))
        self.table = torch.zeros(0, 0, dtype=torch.bool)
        self.fresh = False
        self.past = self.count = 0
        self.columns = torch.zeros(
            0, 0, dtype=torch.bool
        )  # image tokens among the columns of the prompt's pass, (B, N)
        self.real = torch.zeros(0, 0, dtype=torch.bool)  # columns that are no padding, (B, N)
        self.positions = torch.zeros(0, 0, dtype=torch.long)  # of these columns, (B, N)
        self.start: Tensor | None = None  # first real column of each row (B,), None where the model got no 2-D mask
        self._ids = torch.tensor(self.ids)
        self._mask: Tensor | None = None  # the 2-D mask of the pass
        self._queries: Tensor | None = None  # found once a pass
        self._read: Tensor | None = None
        self._undo: list[Callable[[], None]] = []

    # -- on and off --------------------------------------------------------------------------------------------------

    def attach_with(self, *transforms: Any) -> None:
        """Begin to follow, with transforms in the decoder's layers."""
        hook = self.base.register_forward_pre_hook(self._before, with_kwargs=True)
        self._undo.append(hook.remove)
        try:
            if transforms:
                made: Attachment = attach(self.model, transforms=transforms, stack=self.stack.pattern)
                self._undo.append(made.detach)
        except Exception:
            self.detach()
            raise

    def detach(self) -> None:
        """Stop; the model is as it was. Repeated calls do nothing."""
        while self._undo:
            self._undo.pop()()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.detach()

    @property
    def paused(self) -> bool:
        """Is this a pass with the images taken out?"""
        return _TEXT_ONLY in self.base.__dict__

    # -- pass by pass ------------------------------------------------------------------------------------------------

    def begin(self, ids: Tensor, mask: Tensor) -> None:
        """A prompt begins: ids (B, N), mask (B, N) bool of the real tokens. For subclasses."""

    def _before(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        given = bound(module, args, kwargs)
        ids = given.get("input_ids")
        if not isinstance(ids, Tensor):
            raise AttachError(
                "image tokens are found in input_ids, but the model was given inputs_embeds: pass input_ids"
            )
        cache = given.get(CACHE)
        self.past, self.count = int(cache.get_seq_length()) if cache is not None else 0, ids.shape[1]
        self.fresh = self.past == 0 and not self._continues(ids, given)
        self._place(ids, given.get("attention_mask"))
        if self.past == 0:
            self._read = ids
        if self.fresh:
            self._require_images()
            self.begin(ids, self.real)

    def _continues(self, ids: Tensor, given: Mapping[str, Any]) -> bool:
        """Is this the next step of a generation without cache?"""
        read = self._read
        if given.get("use_cache") is not False or read is None or read.shape[0] != ids.shape[0]:
            return False
        return read.shape[1] < ids.shape[1] and bool(torch.equal(read, ids[:, : read.shape[1]]))

    def _place(self, ids: Tensor, mask: object) -> None:
        B, N = ids.shape
        self._mask = mask if isinstance(mask, Tensor) and mask.ndim == 2 else None
        self._queries = None
        if N == 1 and self.past and self.table.shape[0] == B:
            return  # a token that is decoded is text: nothing to find, so a step costs next to nothing
        self._ids = self._ids.to(ids.device)
        columns = torch.arange(self.past, self.past + N, device=ids.device).expand(B, -1)
        self.columns = torch.isin(ids, self._ids)
        if self._mask is not None:
            real = self._mask.bool()
            self.start = torch.where(real.any(1), real.to(torch.int8).argmax(1), real.shape[1])
            self.positions = columns - self.start[:, None]
            self.real = real[:, self.past : self.past + N]
        else:
            self.start, self.positions, self.real = None, columns, torch.ones_like(self.columns)
        old = self.table if self.past and self.table.shape[0] == B else self.columns.new_zeros(B, 0)
        self.table = extended(old, self.positions, self.columns & self.real, self.past + N)

    def _require_images(self) -> None:
        without = (~self.table.any(1)).nonzero()[:, 0].tolist()
        if without:
            raise AttachError(
                f"no image token {self.ids} in row{'s' if len(without) > 1 else ''} {without} of the prompt: every row needs "
                "an image; let the model's processor put its image tokens into the text"
            )

    def text_queries(self) -> Tensor:
        """Columns of the pass that are text behind an image, (B, N) bool."""
        if self._queries is not None:
            return self._queries
        if self.count == 1 and self.past:
            here = self.table.new_ones(self.table.shape[0], 1)
            self._queries = here if self._mask is None else self._mask[:, self.past : self.past + 1].bool()
        else:
            first = self.table.to(torch.int8).argmax(1)[:, None]
            self._queries = self.real & ~self.columns & (self.positions > first)
        return self._queries

    def check_call(self, call: HeadCall) -> None:
        """A pass that went round the model, straight to its decoder, has no known image tokens: AttachError."""
        if call.past != self.past or call.q.shape[2] != self.count or call.q.shape[0] != self.table.shape[0]:
            raise AttachError(
                f"layer {call.layer}: the decoder reads {tuple(call.q.shape[:3:2])} (rows, columns) behind {call.past}, the model was "
                f"given {(self.table.shape[0], self.count)} behind {self.past}: call the whole model with input_ids"
            )


def extended(table: Tensor, positions: Tensor, flags: Tensor, width: int) -> Tensor:
    """(B, P') bool, P' ≥ `width`: `table` (B, P) with the flags (B, N) of columns at these positions (B, N) below `width`; negative
    ones are padding. The width is the caller's to know, so that nothing waits for the device.
    """
    width = max(table.shape[1], width)
    wide = nn.functional.pad(table, (0, width + 1 - table.shape[1]))  # one more place takes the padding
    wide.scatter_(1, torch.where(positions < 0, width, positions), flags & (positions >= 0))
    return wide[:, :width]


class InLayers:
    """A transform of some layers: `attach` leaves the others alone. `own_attention`: it works on the layer's own attention, so
    it goes innermost. `counts`: in a decode step it does without the host's view of the keys, so that steps stay on the device.

    >>> InLayers(lambda call, attend: attend(), (1, 3)).in_layers
    (1, 3)
    """

    def __init__(
        self, transform: Transform, in_layers: Sequence[int], *, own_attention: bool = False, counts: bool = False
    ):
        self.transform, self.in_layers = transform, tuple(in_layers)
        self._layers = frozenset(self.in_layers)
        self.own_attention, self.counts = own_attention, counts

    def __call__(self, call: HeadCall, attend: Callable[[], Tensor]) -> Tensor:
        return self.transform(call, attend) if call.layer in self._layers else attend()


def looked_up(table: Tensor, positions: Tensor) -> Tensor:
    """Flags (B, …) of positions (B or 1, …) in a table (B, P); False beyond it and at padding.

    >>> looked_up(torch.tensor([[False, True]]), torch.tensor([[-1, 0, 1, 2]])).tolist()
    [[False, False, True, False]]
    """
    B, P = table.shape
    places = positions.expand(B, *positions.shape[1:])
    inside = (places >= 0) & (places < P)
    found = table.gather(1, places.clamp(0, max(P - 1, 0)).reshape(B, -1)).view(places.shape)
    return found & inside
