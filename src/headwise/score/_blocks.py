"""The parts of a decoder layer that patching freezes: its attention module, its MLP, and what they gave in a run.

Letters: B rows, N columns, P chosen columns of a row, C width.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn

from headwise.attach.locate import Stack
from headwise.attach.resume import _blocks
from headwise.errors import AttachError

MLPS = ("mlp", "block_sparse_moe", "feed_forward", "ffn", "moe")


class Blocks:
    """The layers of one stack, each with its attention module and its MLP (or mixture of experts)."""

    def __init__(self, model: nn.Module, found: Stack, stack: str | None):
        self.blocks = _blocks(model, stack)
        self.attentions = list(found.modules)
        self.mlps = [_mlp(layer, block) for layer, block in enumerate(self.blocks)]


def _mlp(layer: int, block: nn.Module) -> nn.Module:
    children = dict(block.named_children())
    for name in MLPS:
        if name in children:
            return children[name]
    raise AttachError(
        f"layer {layer}: {type(block).__name__} has no MLP among its children {sorted(children)}; looked for {', '.join(MLPS)}"
    )


class Kept:
    """What went through each layer in one pass: `entered` (B, N, C), and the outputs of attention and MLP as given back."""

    def __init__(self, blocks: Blocks):
        self.blocks = blocks
        self.entered: dict[int, Tensor] = {}
        self.outputs: dict[int, Any] = {}
        self.attention: dict[int, Any] = {}
        self.mlp: dict[int, Any] = {}

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        """Keep what passes in the pass that runs inside the block."""
        handles = []
        for layer, block in enumerate(self.blocks.blocks):
            handles.append(block.register_forward_pre_hook(self._entering(self.entered, layer), with_kwargs=True))
            handles.append(block.register_forward_hook(_saving(self.outputs, layer)))
            attention, mlp = self.blocks.attentions[layer], self.blocks.mlps[layer]
            handles.append(attention.register_forward_hook(_saving(self.attention, layer)))
            handles.append(mlp.register_forward_hook(_saving(self.mlp, layer)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _entering(self, into: dict[int, Tensor], layer: int) -> Callable:
        def keep(module: nn.Module, args: tuple, kwargs: dict) -> None:
            into[layer] = hidden_of(args, kwargs)

        return keep


def _saving(into: dict[int, Any], layer: int) -> Callable:
    def keep(module: nn.Module, args: tuple, output: Any) -> None:
        into[layer] = output

    return keep


def hidden_of(args: tuple, kwargs: dict) -> Tensor:
    """The hidden states that a layer or an attention module is called with."""
    hidden = args[0] if args else kwargs.get("hidden_states")
    if not isinstance(hidden, Tensor):
        raise AttachError("a layer is called without hidden states as its first argument; its parts cannot be frozen")
    return hidden


def with_hidden(args: tuple, kwargs: dict, hidden: Tensor) -> tuple[tuple, dict]:
    """The arguments of a call with other hidden states."""
    return ((hidden, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": hidden})


def first(output: Any) -> Tensor:
    """The hidden states of what a module gave back: the tensor, or the first of a tuple."""
    found = output[0] if isinstance(output, tuple | list) else output
    assert isinstance(found, Tensor)
    return found


def with_first(output: Any, hidden: Tensor) -> Any:
    """What a module gave back with other hidden states; what else it gave (weights, router logits) is left out as None."""
    if isinstance(output, tuple | list):
        return type(output)([hidden, *[None] * (len(output) - 1)])
    return hidden


def at_columns(hidden: Tensor, columns: Tensor, copies: int = 1) -> Tensor:
    """(B, N, C) at columns (B, P), `copies` times over: (copies · B, P, C)."""
    picked = hidden.gather(1, columns[..., None].expand(-1, -1, hidden.shape[-1]))
    return picked.repeat(copies, 1, 1)


@contextlib.contextmanager
def replaced(forwards: dict[nn.Module, Callable]) -> Iterator[None]:
    """Modules with another forward inside the block. Raises AttachError where one is replaced already."""
    if any("forward" in vars(module) for module in forwards):
        raise AttachError("a layer's forward is replaced already (a wrapper); undo that first")
    for module, forward in forwards.items():
        module.forward = forward
    try:
        yield
    finally:
        for module in forwards:
            del module.forward


def constant(output: Any) -> Callable:
    """A forward that gives the same whatever it is called with."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        return output

    return forward
