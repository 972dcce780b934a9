"""A vector in the residual stream at the last token of a prompt: what function vectors add and task vectors put in its place.

Letters: B batch, R rows (B, or 1 for all), N columns, L layers, C width, M prompts.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from headwise import storage
from headwise.attach import Attachment, HeadCall, attach, find_stack, fingerprint
from headwise.checks import Meta, plain_meta, whole
from headwise.errors import AttachError, EditError
from headwise.steer._injection import last_column
from headwise.storage import StrPath
from headwise.tasks.icl import Item
from headwise.tasks.icl_batch import Batch, answer_logits, pack
from headwise.units import Fingerprint

Mode = Literal["add", "replace"]


@dataclass(frozen=True, eq=False)
class ResidualVector:
    """vector (C,) float32 that is added to the output of one layer, or takes its place, at the last token of the prompt."""

    vector: Tensor
    layer: int
    mode: Mode
    fingerprint: Fingerprint
    method: str = ""
    meta: Meta = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.mode not in get_args(Mode):
            raise EditError(f"mode={self.mode!r}; choose {', '.join(get_args(Mode))}")
        whole("layer", self.layer, 0, EditError, high=self.fingerprint.layers - 1)
        if self.vector.ndim != 1 or not self.vector.isfinite().all():
            raise EditError(f"vector is {tuple(self.vector.shape)}; it must be (C,) and finite")
        object.__setattr__(self, "vector", self.vector.detach().float().cpu())
        object.__setattr__(self, "meta", plain_meta(self.meta, EditError))

    def attach(self, model: nn.Module) -> ResidualInjection:
        """Put it into the model: a context manager with `detach()`."""
        self.fingerprint.require(fingerprint(model), f"the {self.method or 'residual'} vector")
        return ResidualInjection(model, self.layer, self.vector[None], self.mode)

    def save(self, path: StrPath) -> None:
        """Write one safetensors file."""
        meta = {"layer": self.layer, "mode": self.mode, "method": self.method, "meta": self.meta}
        meta["fingerprint"] = self.fingerprint.to_dict()
        storage.write_tensors(path, "residual-vector", 1, {"vector": self.vector}, meta)

    @classmethod
    def load(cls, path: StrPath) -> ResidualVector:
        """Read what `save` wrote. Raises ArtifactError."""
        tensors, meta = storage.read_tensors(path, "residual-vector", 1, {"vector": (torch.float32, 1)})
        with storage.decoding(path):
            made_for = Fingerprint.from_dict(storage.field(meta, "fingerprint", dict))
            mode, method = storage.field(meta, "mode", str), storage.field(meta, "method", str)
            layer = storage.field(meta, "layer", int)
            return cls(tensors["vector"], layer, mode, made_for, method, storage.field(meta, "meta", dict))  # type: ignore[arg-type]

    def __str__(self) -> str:
        return f"{self.method}: {self.mode} a vector of norm {self.vector.norm():.3g} behind layer {self.layer}, last token of the prompt"


class ResidualInjection:
    """At work: vectors (R, C) behind one layer, at `columns` (B,) or at the last real token of each pass over a prompt."""

    def __init__(self, model: nn.Module, layer: int, vectors: Tensor, mode: Mode, columns: Tensor | None = None):
        self.layer, self.vectors, self.mode, self.columns = layer, vectors, mode, columns
        self.at: Tensor | None = None
        self.handle: Attachment = attach(model, observers=[self._see])
        self.hook = block(model, layer).register_forward_hook(self._change)

    def _see(self, call: HeadCall, out: Tensor) -> None:
        if call.layer == self.layer:  # the attention runs before the layer ends
            self.at = self.columns if self.columns is not None else None if call.decoding else last_column(call)

    def _change(self, module: nn.Module, args: Any, output: Any) -> Any:
        if self.at is None:
            return None
        hidden = output[0] if isinstance(output, tuple) else output
        if self.vectors.shape[0] not in (1, hidden.shape[0]):
            raise AttachError(f"{self.vectors.shape[0]} vectors for a batch of {hidden.shape[0]}: give one a row")
        index = (torch.arange(hidden.shape[0], device=hidden.device), self.at.to(hidden.device))
        vectors = self.vectors.to(hidden).expand(hidden.shape[0], -1)
        hidden = hidden.index_put(index, vectors, accumulate=self.mode == "add")
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    def detach(self) -> None:
        """Leave the model as it was."""
        self.hook.remove()
        self.handle.detach()

    def __enter__(self) -> ResidualInjection:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.detach()


def block(model: nn.Module, layer: int) -> nn.Module:
    """The whole layer around an attention module: `model.layers.3` of `model.layers.3.self_attn`."""
    before, star, _ = find_stack(model).pattern.partition("*")
    if not star:
        raise AttachError(f"{type(model).__name__} has no numbered layers, so there is no residual stream behind one")
    return model.get_submodule(f"{before}{layer}")


@torch.no_grad()
def last_hidden(model: nn.Module, items: Sequence[Item], batch_size: int = 8) -> Tensor:
    """(M, L, C) float32 on the CPU: output of each layer at the last token of each prompt."""
    layers, device = find_stack(model).layers, next(model.parameters()).device
    found = []
    for begin in range(0, len(items), batch_size):
        batch = pack(items[begin : begin + batch_size], device, answer=False)
        with _kept(model, layers, batch) as kept:
            model(input_ids=batch.ids, attention_mask=batch.mask, use_cache=False, logits_to_keep=1)
        found.append(torch.stack([kept[layer] for layer in range(layers)], dim=1))
    return torch.cat(found)


@contextlib.contextmanager
def _kept(model: nn.Module, layers: int, batch: Batch) -> Iterator[dict[int, Tensor]]:
    kept: dict[int, Tensor] = {}

    def keep(layer: int) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            hidden = output[0] if isinstance(output, tuple) else output
            kept[layer] = hidden[torch.arange(len(hidden), device=hidden.device), batch.ends].float().cpu()

        return hook

    handles = [block(model, layer).register_forward_hook(keep(layer)) for layer in range(layers)]
    try:
        yield kept
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def best_layer(model: nn.Module, vectors: Tensor, mode: Mode, items: Sequence[Item]) -> tuple[int, list[float]]:
    """The layer (vectors (L, C), one each) with the lowest loss on the first answer tokens of `items`, and all losses (nats)."""
    batch = pack(items, next(model.parameters()).device, answer=False)
    losses = []
    for layer in range(len(vectors)):
        with ResidualInjection(model, layer, vectors[layer][None], mode, batch.ends):
            _, logits, labels = answer_logits(model, batch)
            losses.append(float(nn.functional.cross_entropy(logits, labels)))
    return min(range(len(losses)), key=losses.__getitem__), losses
