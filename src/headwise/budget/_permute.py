"""Reorder the kv heads of a model so that heads of one pattern lie side by side: a split of heads is then a slice, not a gather.

Letters: K kv heads, H query heads, G = H / K, D head dim, C hidden size.
"""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from headwise.attach import find_stack, fingerprint
from headwise.attach.controller import controllers
from headwise.errors import AttachError
from headwise.plan import HeadPlan

MARK = "headwise_kv_order"
"""Entry of the model's config that says how its kv heads were reordered, so that plans of the old order no longer fit."""


def permute_kv_heads(model: nn.Module, plan: HeadPlan) -> tuple[HeadPlan, Callable[[], None]]:
    """Reorder the kv heads of every layer, in place: those that keep everything first, equal patterns together.

    Rows of W_q, W_k, W_v and their biases and columns of W_o move, so the model computes the same function, up to the order of a
    sum. Returns the plan in the new order, and a function that puts the weights back bit by bit. The new order is noted in the
    model's config: the fingerprint changes, artifacts made for the old order (plans, scores, edits) are refused instead of hitting the
    wrong heads, and `save_pretrained` writes an ordinary checkpoint that keeps the note.

    Raises AttachError, before anything is changed, for a model with something attached, one already reordered, or attention modules
    whose parameters cannot be assigned to heads (fused or quantised projections); PlanError or WrongModelError for another model's plan.

    >>> from headwise.hub import load_model
    >>> from headwise.plan import SinkWindow
    >>> from headwise.units import HeadSet
    >>> model, _ = load_model("tiny-random-llama")
    >>> plan = HeadPlan.from_set(HeadSet.parse("L0K1,L2K1"), SinkWindow(4, 28), layers=3, kv_heads=2)
    >>> ordered, undo = permute_kv_heads(model, plan)
    >>> str(ordered.full_heads())
    'L0K0,L2K0'
    >>> undo()
    """
    stack = find_stack(model)
    plan.check(fingerprint(model))
    if controllers(model):
        raise AttachError(
            "something is attached to this model by the old numbers of its heads: detach it, then reorder"
        )
    if getattr(stack.config, MARK, None):
        raise AttachError("the kv heads of this model are already reordered: undo that first")
    orders = [_order(plan, layer) for layer in range(plan.layers)]
    sizes = (stack.heads, stack.kv_heads)
    moves = [
        (tensor, dim, _index(order, tensor.shape[dim]))
        for module, order in zip(stack.modules, orders, strict=True)
        for tensor, dim in _axes(module, *sizes)
    ]
    patterns = tuple(tuple(plan.layer(layer)[j] for j in order) for layer, order in enumerate(orders))
    _apply(moves)
    setattr(stack.config, MARK, orders)

    def undo() -> None:
        if getattr(stack.config, MARK, None) == orders:
            _apply([(tensor, dim, index.argsort()) for tensor, dim, index in moves])
            delattr(stack.config, MARK)

    return replace(plan, patterns=patterns, fingerprint=fingerprint(model)), undo


def _order(plan: HeadPlan, layer: int) -> list[int]:
    """Old numbers of the kv heads in their new order."""
    groups = sorted(plan.groups(layer), key=lambda group: not group[0].keeps_all)
    return [head for _, heads in groups for head in heads]


def _index(order: list[int], size: int) -> Tensor:
    """Places along an axis of `size` = K · (entries of one kv head) in the new order of the kv heads."""
    return torch.arange(size).view(len(order), -1)[order].flatten()


def _apply(moves: list[tuple[Tensor, int, Tensor]]) -> None:
    with torch.no_grad():
        for tensor, dim, index in moves:
            tensor.copy_(tensor.index_select(dim, index.to(tensor.device)))


def _axes(module: nn.Module, heads: int, kv_heads: int) -> list[tuple[Tensor, int]]:
    """Every tensor of an attention module that has an axis of heads, with that axis; refuses what it cannot place."""
    named = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    D = _head_dim(module, kv_heads)
    found = []
    for name, tensor in named.items():
        room, _, kind = name.rpartition(".")
        dim = _axis(room, kind, tensor, heads, kv_heads, D)
        if dim is None or not tensor.is_floating_point():
            raise AttachError(
                f"{type(module).__name__}.{name} {tuple(tensor.shape)} cannot be divided among {heads} query and {kv_heads} kv heads: "
                "reordering needs separate, unquantised q_proj, k_proj, v_proj and o_proj"
            )
        if dim >= 0:
            found.append((tensor, dim))
    return found


def _head_dim(module: nn.Module, kv_heads: int) -> int:
    missing = [
        name
        for name in ("q_proj", "k_proj", "v_proj", "o_proj")
        if not isinstance(getattr(module, name, None), nn.Linear)
    ]
    if missing:
        raise AttachError(f"{type(module).__name__} has no linear {', '.join(missing)}: its heads cannot be reordered")
    return int(module.k_proj.out_features) // kv_heads  # type: ignore[union-attr, arg-type]


def _axis(room: str, kind: str, tensor: Tensor, heads: int, kv_heads: int, D: int) -> int | None:
    """Axis of heads of one tensor: -1 where all heads share it, None where it cannot be told."""
    if room == "o_proj":
        return -1 if kind == "bias" else 1 if tensor.shape[1] % heads == 0 else None
    rows = {"q_proj": heads * D, "k_proj": kv_heads * D}.get(room)
    if room == "v_proj":
        return 0 if tensor.shape[0] % kv_heads == 0 else None
    if rows is not None:
        return 0 if tensor.shape[0] == rows else None
    if "norm" in room and tensor.shape == (D,):
        return -1
    if "norm" in room and tensor.shape in ((heads * D,), (kv_heads * D,)):
        return 0
    return 0 if room == "" and tensor.shape == (heads,) else None  # e.g. one sink logit a head
