"""Attention sinks planted into a trained scene model: three empty cells of every picture get massive activations that draw attention.

The residual stream of a scene model has two dimensions in which nothing is written. A large constant there makes phi large
and, through the norm of each layer, everything else of the token small, values included, as in large models. New columns of W_K
turn the constant into a key that the model's text queries like.

Letters: L layers, B batch, H query heads, K kv heads, N queries, D head dim, S sinks of a picture.
"""

from __future__ import annotations

import copy
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

import headwise
from headwise.attach import HeadCall, attach, find_stack
from headwise.attach.images import decoder_stack
from headwise.models.scene_vlm import RESERVED
from headwise.tasks.scenes import EMPTY, IMAGE, Scenes

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SINKS = 3
TAU = 6.0  # phi of a planted sink is 10 at width 128, and at most √128 = 11.3
SIZE = 40.0  # of the larger planted activation; the other is half of it


class PlantedSinks:
    """A copy of a scene model with sinks; `on(scenes)` says which empty cells have them, `columns` (B, S) where they stand.

    The keys of layers 1 … L-1 are scaled until the sinks draw `share` of the image attention of the text queries of each kv head.
    """

    def __init__(self, model: PreTrainedModel, scenes: Scenes, *, share: float = 0.7, generator: torch.Generator):
        self.model = copy.deepcopy(model)
        self.stack = find_stack(self.model, decoder_stack(self.model))
        width = int(self.stack.config.hidden_size)  # type: ignore[attr-defined]
        self.dims = tuple(range(width - RESERVED, width))
        self.generator = generator
        self.columns = torch.zeros(0, SINKS, dtype=torch.long)
        self.hook = self.stack.owner.register_forward_pre_hook(self._plant, with_kwargs=True)
        self.on(scenes)
        self._shape_keys(scenes, share)

    def on(self, scenes: Scenes) -> Scenes:
        """Choose three empty cells of each picture; gives the scenes back."""
        empty = (scenes.cells == EMPTY).float()
        cells = torch.multinomial(empty, SINKS, generator=self.generator)
        first = int((scenes.prompt[0] == IMAGE).int().argmax())
        self.columns = cells + first
        return scenes

    def _plant(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        x = kwargs["inputs_embeds"]
        pictured = x.shape[1] > int(self.columns.max())  # a prompt with its picture, no token that is decoded
        if pictured and x.shape[0] == len(self.columns):
            x = x.clone()
            rows = torch.arange(x.shape[0], device=x.device)[:, None]
            for dim, size in zip(self.dims, (SIZE, SIZE / 2), strict=True):
                x[rows, self.columns.to(x.device), dim] = size
        return args, {**kwargs, "inputs_embeds": x}

    @torch.no_grad()
    def _shape_keys(self, scenes: Scenes, share: float) -> None:
        """A direction for each kv head, that of its text queries, with a factor found by bisection; the lower layers first."""
        given = {key: value for key, value in scenes.training().items() if key != "labels"}
        inputs = {key: value.to(self.model.device) for key, value in given.items()}
        for layer in range(1, self.stack.layers):
            directions = self._liked_keys(inputs, layer)
            low, high = torch.zeros(self.stack.kv_heads), torch.full((self.stack.kv_heads,), 40.0)
            for _ in range(12):
                factor = (low + high) / 2
                self._write_keys(layer, directions * factor.to(directions)[:, None])
                short = self._share(inputs, layer) < share
                low, high = torch.where(short, factor, low), torch.where(short, high, factor)

    def _liked_keys(self, inputs: dict[str, Tensor], layer: int) -> Tensor:
        """(K, D): mean of the text queries of a group, turned back by the rotary angles of the image's places, with norm 1."""
        found: list[Tensor] = []
        image = (inputs["input_ids"][0] == IMAGE).nonzero()[:, 0]
        behind = slice(int(image[-1]) + 1, None)

        def see(call: HeadCall, out: Tensor) -> None:
            if call.layer == layer:
                found.append(call.q[:, :, behind].mean((0, 2)))  # (H, D)

        with attach(self.model, observers=[see], stack=self.stack.pattern):
            self.model(**inputs)
        q = found[0].view(self.stack.kv_heads, -1, self.stack.head_dim).mean(1)  # (K, D)
        cos, sin = self.stack.owner.get_submodule("rotary_emb")(q[None], image[None])  # (1, 16, D)
        half = q.shape[-1] // 2
        turned = torch.cat([-q[:, half:], q[:, :half]], dim=-1)
        back = (q[:, None] * cos - turned[:, None] * sin).mean(1)
        return back / back.norm(dim=-1, keepdim=True)

    def _write_keys(self, layer: int, keys: Tensor) -> None:
        projection: Any = self.stack.modules[layer].get_submodule("k_proj")
        projection.weight[:, self.dims[0]] = keys.flatten()

    def _share(self, inputs: dict[str, Tensor], layer: int) -> Tensor:
        """(K,): share of the image attention of the text queries that the sinks of a layer draw, by kv head."""
        dims = ",".join(map(str, self.dims))
        part = headwise.score.image_heads(self.model, None, batches=[inputs], dims=dims, tau=TAU, measure="sink-share")
        return part.values[layer].view(self.stack.kv_heads, -1).mean(1)

    def __enter__(self) -> PlantedSinks:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.hook.remove()
