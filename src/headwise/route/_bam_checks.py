"""Which models can be mixed: the same architecture, sizes and dtype, and layers whose parts are found by name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from headwise.errors import RouteError

PARTS = ("q_proj", "k_proj", "v_proj", "o_proj")
_FREE = ("_name_or_path", "transformers_version", "dtype", "torch_dtype", "architectures", "use_cache")


def check_sources(models: Sequence[Any], tokenizers: Sequence[Any] | None) -> None:
    """Raises RouteError where the models, or their tokenizers, cannot become one model."""
    if len(models) < 2:
        raise RouteError(f"models holds {len(models)}; a mixture needs at least 2 (the seed may be one of them)")
    first = models[0]
    for number, other in enumerate(models[1:], 1):
        _check_alike(first, other, number)
    if tokenizers is None:
        return
    if len(tokenizers) != len(models):
        raise RouteError(f"there are {len(tokenizers)} tokenizers for {len(models)} models; give one each, or None")
    words = {n: tokenizer.get_vocab() for n, tokenizer in enumerate(tokenizers) if tokenizer is not None}
    for number, vocabulary in words.items():
        if vocabulary != words[min(words)]:
            raise RouteError(f"the tokenizer of model {number} has another vocabulary than that of model {min(words)}")


def _check_alike(first: Any, other: Any, number: int) -> None:
    if type(first) is not type(other):
        raise RouteError(f"model 0 is a {type(first).__name__}, model {number} a {type(other).__name__}")
    mine, yours = ({k: v for k, v in m.config.to_dict().items() if k not in _FREE} for m in (first, other))
    for key in sorted(mine.keys() | yours.keys()):
        if mine.get(key) != yours.get(key):
            raise RouteError(
                f"models 0 and {number} differ in their config's {key}: {mine.get(key)!r} and {yours.get(key)!r}; "
                "specialists must have branched from one seed"
            )
    a, b = first.state_dict(), other.state_dict()
    if a.keys() != b.keys():
        raise RouteError(f"models 0 and {number} differ in tensors: {', '.join(sorted(a.keys() ^ b.keys())[:3])}")
    for name, value in a.items():
        if value.shape != b[name].shape or value.dtype != b[name].dtype:
            raise RouteError(
                f"{name} is {tuple(value.shape)} {value.dtype} in model 0, {tuple(b[name].shape)} {b[name].dtype} in model "
                f"{number}; cast the models to one dtype first"
            )


def check_attention(attention: Any, number: int) -> None:
    """Raises RouteError for a layer whose projections are not four linear layers, or that has parameters per head."""
    if not all(isinstance(getattr(attention, name, None), nn.Linear) for name in PARTS):
        raise RouteError(
            f"layer {number}: {type(attention).__name__} has no linear q_proj, k_proj, v_proj and o_proj to make experts of"
        )
    for name, value in attention.named_parameters():
        if not name.startswith(PARTS) and tuple(value.shape) != (attention.head_dim,):
            raise RouteError(f"layer {number}: {name} is {tuple(value.shape)}; only norms of one head can be shared")


def is_parallel(block: nn.Module) -> bool:
    """Do attention and feed-forward layer read the same normalised input, as in Cohere's blocks?"""
    return not hasattr(block, "post_attention_layernorm")


def check_parallel(blocks: Sequence[nn.Module], wanted: bool | None) -> bool:
    """Whether the blocks are parallel; RouteError where they are not what is asked for."""
    found = is_parallel(blocks[0])
    if wanted is not None and wanted != found:
        kinds = {True: "parallel (x + attention(u) + ffn(u))", False: "sequential"}
        raise RouteError(
            f"parallel={wanted}, but the blocks of the models are {kinds[found]}: how a block computes cannot be changed"
        )
    return found
