"""Find the attention layers of a transformers model, and say in one sentence why a model cannot be reached."""

from __future__ import annotations

import functools
import hashlib
import inspect
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn
from transformers import PreTrainedModel

from headwise.errors import AttachError
from headwise.units import Fingerprint

if TYPE_CHECKING:
    from headwise.attach.controller import Controller

VOLATILE = (
    "_name_or_path", "architectures", "dtype", "problem_type", "quantization_config", "torch_dtype", "transformers_version",
    "use_cache",
)  # fmt: skip
"""Entries of a config that saving, loading or a first loss fill in: they say nothing about which head is which."""


@dataclass(frozen=True)
class Stack:
    """The attention modules of one tower of a model, layer by layer: `model.layers.*.self_attn` of a decoder.

    `owner` is the module whose forward runs the layers and receives the cache and the 2-D attention mask.
    """

    pattern: str
    modules: tuple[nn.Module, ...]
    owner: nn.Module
    config: object

    @property
    def layers(self) -> int:
        """Number of layers."""
        return len(self.modules)

    @property
    def heads(self) -> int:
        """Query heads a layer, over all tensor-parallel ranks."""
        return int(self.config.num_attention_heads)  # type: ignore[attr-defined]

    @property
    def kv_heads(self) -> int:
        """Key/value heads a layer."""
        return self.heads // int(getattr(self.modules[0], "num_key_value_groups", 1))

    @property
    def head_dim(self) -> int:
        """Size of one head."""
        size = getattr(self.modules[0], "head_dim", None) or getattr(self.modules[0], "attention_head_size", None)
        return int(size or self.config.hidden_size // self.heads)  # type: ignore[attr-defined]

    @property
    def causal(self) -> bool:
        """Does a token see only what came before it?"""
        return bool(getattr(self.modules[0], "is_causal", False))

    def controller(self, model: nn.Module) -> Controller:
        """What hangs the interventions into the model."""
        from headwise.attach.controller import Controller

        return Controller(model, self)


def find_stack(model: nn.Module, stack: str | None = None) -> Stack:
    """The one stack of attention layers to work on; `stack` is a part of its name where a model has several.

    Raises `AttachError` for models that are reached neither by transformers' attention interface nor by an adapter.
    """
    if not isinstance(model, PreTrainedModel):
        return _adapted(model, stack)
    stacks = _stacks(model)
    if not stacks:
        raise AttachError(
            f"{type(model).__name__} cannot be attached: none of its modules calls transformers' attention interface "
            "(ALL_ATTENTION_FUNCTIONS), so its heads are out of reach without rewriting it"
        )
    names = sorted(stacks)
    chosen = [name for name in names if stack is None or stack in name]
    if len(chosen) != 1:
        asked = "" if stack is None else f"; stack={stack!r} matches {len(chosen)} of them"
        raise AttachError(f"{type(model).__name__} has attention stacks {names}{asked}: choose one with stack=")
    return _checked(model, chosen[0], stacks[chosen[0]])


def _adapted(model: nn.Module, stack: str | None) -> Stack:
    """The stack of a model of another library than transformers."""
    from headwise.attach import diffusers, timm

    if diffusers.is_diffusers(model):
        return diffusers.find_diffusers_stack(model, stack)
    if timm.is_timm(model):
        return timm.find_timm_stack(model, stack)
    raise AttachError(
        f"{type(model).__name__} is no transformers model (PreTrainedModel), no diffusers transformer and no timm ViT; attach reaches these"
    )


def _stacks(model: PreTrainedModel) -> dict[str, dict[int, tuple[str, nn.Module]]]:
    """Attention modules by the pattern of their path, then by layer number."""
    stacks: dict[str, dict[int, tuple[str, nn.Module]]] = {}
    for path, module in model.named_modules():
        if _uses_interface(type(module)):
            number = re.search(r"(?:^|\.)(\d+)(?=\.|$)", path)
            pattern = re.sub(r"(^|\.)\d+(?=\.|$)", r"\1*", path, count=1)
            stacks.setdefault(pattern, {})[int(number.group(1)) if number else 0] = (path, module)
    return stacks


def _uses_interface(cls: type[nn.Module]) -> bool:
    """Does the source of its forward look an attention function up?"""
    return _names_interface(cls.forward)


@functools.cache
def _names_interface(forward: Callable) -> bool:
    try:
        source = inspect.getsource(forward)
    except (OSError, TypeError):
        return False
    return "ALL_ATTENTION_FUNCTIONS" in source


def _checked(model: PreTrainedModel, pattern: str, found: dict[int, tuple[str, nn.Module]]) -> Stack:
    layers = sorted(found)
    if layers != list(range(len(layers))):
        raise AttachError(
            f"stack {pattern}: layers {layers} are not numbered 0..{len(layers) - 1}; hybrid models are not reached"
        )
    modules = tuple(found[i][1] for i in layers)
    config = getattr(modules[0], "config", model.config)
    if not isinstance(getattr(config, "num_attention_heads", 0), int):
        raise AttachError(
            f"stack {pattern}: {type(model).__name__} has another number of heads in each stage, which headwise does not address"
        )
    declared = getattr(config, "num_hidden_layers", len(layers))
    if len(layers) == 1 < declared and not getattr(config, "is_encoder_decoder", False):
        raise AttachError(
            f"{type(model).__name__} runs one attention module {declared} times (shared weights): layers have no address"
        )
    strangers = [i for i, m in enumerate(modules) if getattr(m, "config", config) is not config]
    if strangers:
        raise AttachError(
            f"stack {pattern}: layers {strangers} have configs of their own, so switching the attention of layer 0 would not reach "
            "them; layers that share one config are needed"
        )
    if len({getattr(m, "num_key_value_groups", 1) for m in modules}) != 1:
        raise AttachError(
            f"stack {pattern}: the number of kv heads differs between layers, which headwise does not address yet"
        )
    owner = model.get_submodule(_owner_path(found[0][0])) if "*" in pattern else model
    return Stack(pattern=pattern, modules=modules, owner=owner, config=config)


def _owner_path(path: str) -> str:
    """The parent of the list of layers: `model.layers.0.self_attn` -> `model`."""
    before = re.split(r"(?:^|\.)\d+(?=\.|$)", path, maxsplit=1)[0]
    return before.rpartition(".")[0]


def fingerprint(model: nn.Module, stack: str | None = None) -> Fingerprint:
    """What an artifact records of the model it was made for: architecture, config hash, layers, heads, kv heads."""
    return fingerprint_of(find_stack(model, stack))


def fingerprint_of(found: Stack) -> Fingerprint:
    """The same of a stack that was found before."""
    config = found.config.to_dict()  # type: ignore[attr-defined]
    stable = {k: v for k, v in config.items() if k not in VOLATILE and not k.startswith("_attn")}
    text = json.dumps(stable, sort_keys=True, default=str)
    return Fingerprint(
        architecture=str(getattr(found.config, "model_type", type(found.owner).__name__)),
        config_hash=hashlib.sha256(text.encode()).hexdigest()[:16],
        layers=found.layers,
        heads=found.heads,
        kv_heads=found.kv_heads,
        experts=_experts(found.config),
    )


def _experts(config: object) -> int:
    for name in ("num_local_experts", "num_experts", "n_routed_experts"):
        value = getattr(config, name, None)
        if isinstance(value, int):
            return value
    return 0
