"""The output projection of an attention layer, split into what each head contributes: sum_h O_h W_O^h.

Letters: H query heads, D head dim, C width of the model.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from headwise.attach.locate import Stack
from headwise.errors import AttachError

NAMES = ("o_proj", "out_proj", "c_proj", "out", "proj", "dense")


def output_projection(stack: Stack, layer: int) -> nn.Module:
    """The linear module behind the heads of a layer: a child of the attention module, or (BERT) of its neighbour `output`.

    Raises AttachError where none has H · D inputs.

    >>> from headwise.attach import find_stack
    >>> from headwise.hub import load_model
    >>> model, _ = load_model("tiny-random-llama")
    >>> output_projection(find_stack(model), 0) is model.model.layers[0].self_attn.o_proj
    True
    """
    module = stack.modules[layer]
    wanted = stack.heads * stack.head_dim
    for holder in (module, _neighbour(stack, module)):
        children = dict(holder.named_children()) if holder is not None else {}
        for name in NAMES:
            child = children.get(name)
            if child is not None and _inputs(child) == wanted:
                return child
    raise AttachError(
        f"layer {layer}: {type(module).__name__} has no output projection with H·D = {wanted} inputs among {', '.join(NAMES)}"
    )


def hidden_width(stack: Stack) -> int:
    """C, the size of the hidden state that enters the attention: of the configuration, else inputs of the query projection.

    Raises AttachError where neither says it.

    >>> from headwise.attach import find_stack
    >>> from headwise.hub import load_model
    >>> hidden_width(find_stack(load_model("tiny-random-llama")[0]))
    64
    """
    stated = getattr(stack.config, "hidden_size", None)
    if isinstance(stated, int):
        return stated
    for name in ("to_q", "q_proj", "qkv", "c_attn"):
        width = getattr(getattr(stack.modules[0], name, None), "in_features", None)
        if isinstance(width, int):
            return width
    raise AttachError(
        f"{type(stack.modules[0]).__name__}: neither its configuration nor a query projection says its width"
    )


def head_weights(projection: nn.Module, heads: int) -> Tensor:
    """A view of W_O as (H, D, C): head h adds `out_h @ head_weights[h]` to the layer's output."""
    weight = projection.weight
    assert isinstance(weight, Tensor)
    rows = weight if _is_conv1d(projection) else weight.t()  # (H·D, C)
    return rows.unflatten(0, (heads, -1))


@torch.no_grad()
def scale_heads(projection: nn.Module, factors: Tensor) -> None:
    """Multiply each head's rows of W_O by its factor (H,), in place: gates that are the same for every token, folded in."""
    weight = projection.weight
    assert isinstance(weight, Tensor)
    if not weight.is_floating_point():
        raise AttachError(
            f"the output projection holds {weight.dtype} weights; heads can be folded into floating weights only"
        )
    inputs = 0 if _is_conv1d(projection) else 1
    wide = factors.to(weight).repeat_interleave(weight.shape[inputs] // len(factors))
    weight.mul_(wide[:, None] if inputs == 0 else wide)


def _neighbour(stack: Stack, module: nn.Module) -> nn.Module | None:
    """The child `output` of the module that holds this attention module."""
    for parent in stack.owner.modules():
        if any(child is module for child in parent.children()):
            found = getattr(parent, "output", None)
            return found if isinstance(found, nn.Module) else None
    return None


def _inputs(module: nn.Module) -> int:
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or weight.ndim != 2:
        return 0
    return weight.shape[0 if _is_conv1d(module) else 1]


def _is_conv1d(module: nn.Module) -> bool:
    """GPT-2's linear layer, whose weight is (in, out)."""
    return type(module).__name__ == "Conv1D"
