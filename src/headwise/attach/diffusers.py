"""Find the attention modules of diffusers transformers (SD3, FLUX, PixArt, DiT …): the same face as transformers models.

`diffusers_hook.py` hangs the interventions in. No list of classes is kept: what counts is what a module has.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from headwise.attach.locate import Stack
from headwise.errors import AttachError

if TYPE_CHECKING:
    from headwise.attach.controller import Controller
    from headwise.attach.hook import HeadCall


def is_diffusers(model: nn.Module) -> bool:
    """Is this a model of the diffusers library? Asked by class names, so that diffusers need not be there."""
    return any(cls.__module__.split(".")[0] == "diffusers" for cls in type(model).__mro__)


@dataclass
class Facts:
    """What the artifacts ask a config for; `to_dict` is what the fingerprint hashes."""

    model_type: str
    num_attention_heads: int
    values: dict[str, Any]
    _attn_implementation: str = "sdpa"

    def to_dict(self) -> dict[str, Any]:
        """The model's own configuration, without what differs between downloads of one model."""
        return self.values


@dataclass(frozen=True)
class DiffusersStack(Stack):
    """Attention modules of a diffusers transformer, in the order in which they run."""

    @property
    def kv_heads(self) -> int:
        """Key/value heads a layer, from the widths of the projections."""
        return kv_heads_of(self.modules[0])

    @property
    def head_dim(self) -> int:
        """Size of one head."""
        return width_of(self.modules[0]) // self.heads

    @property
    def causal(self) -> bool:
        """Image tokens see each other both ways."""
        return False

    def controller(self, model: nn.Module) -> Controller:
        """What hangs the interventions into the model."""
        from headwise.attach.diffusers_hook import DiffusersController

        return DiffusersController(model, self)


def find_diffusers_stack(model: nn.Module, stack: str | None = None) -> DiffusersStack:
    """The self-attention of every block, one layer each, in running order; FLUX's single blocks follow its double blocks.

    `stack`: a part of a name chooses other modules instead, such as "attn2" (PixArt's attention to the text) or
    "single_transformer_blocks". Raises AttachError where nothing, or nothing uniform, is found.
    """
    found = _by_pattern(model)
    if not found:
        raise AttachError(
            f"{type(model).__name__} has no numbered diffusers attention modules: only transformers are reached, not U-Nets"
        )
    if stack is None:
        names = [name for name, modules in found.items() if _leads(name, found) and not is_cross(modules[0])]
    else:
        names = [name for name in found if stack in name]
        if len(names) != 1:
            raise AttachError(
                f"stack={stack!r} matches {len(names)} of the attention stacks {sorted(found)}; name one of them"
            )
    modules = tuple(module for name in names for module in found[name])
    if not modules:
        raise AttachError(f"{type(model).__name__} has only cross-attention {sorted(found)}: choose one with stack=")
    shapes = {(heads_of(m), kv_heads_of(m), width_of(m)) for m in modules}
    if len(shapes) > 1:
        raise AttachError(
            f"stack {' + '.join(names)}: (heads, kv heads, width) differ between layers: {sorted(shapes)}; choose a part with stack="
        )
    stable = {k: v for k, v in dict(model.config).items() if not k.startswith("_")}  # type: ignore[arg-type]
    facts = Facts(type(model).__name__, heads_of(modules[0]), stable)
    return DiffusersStack(pattern=" + ".join(names), modules=modules, owner=model, config=facts)


def segments(call: HeadCall) -> dict[str, slice]:
    """Which tokens of this call are "image" and which are "text", as slices of the N queries; empty where nothing says so.

    The order and the counts are those of this very call: [image, text] in SD3, [text, image] in FLUX.
    """
    found = call.options.get("segments")
    if callable(found):
        found = call.options["segments"] = found()
    return found if isinstance(found, dict) else {}


def _by_pattern(model: nn.Module) -> dict[str, list[nn.Module]]:
    """Attention modules with exactly one number in their path, by pattern, in the order of definition."""
    found: dict[str, dict[int, nn.Module]] = {}
    for path, module in model.named_modules():
        if not (hasattr(module, "processor") and hasattr(module, "set_processor") and hasattr(module, "to_q")):
            continue
        numbers = re.findall(r"(?:^|\.)(\d+)(?=\.|$)", path)
        if len(numbers) == 1:
            pattern = re.sub(r"(^|\.)\d+(?=\.|$)", r"\1*", path)
            found.setdefault(pattern, {})[int(numbers[0])] = module
    return {pattern: [modules[i] for i in sorted(modules)] for pattern, modules in found.items()}


def _leads(name: str, found: dict[str, list[nn.Module]]) -> bool:
    """Is this the first attention of its block? (PixArt's attn2 reads the text, SD3.5's attn2 repeats attn.)"""
    block = name.rpartition(".")[0]
    return next(other for other in found if other.rpartition(".")[0] == block) == name


def is_cross(module: nn.Module) -> bool:
    """Does the module read other tokens than its own?"""
    return bool(getattr(module, "is_cross_attention", False))


def is_joint(module: nn.Module) -> bool:
    """Does it read image and text tokens together, each through projections of its own?"""
    return getattr(module, "add_k_proj", None) is not None


def heads_of(module: nn.Module) -> int:
    """Query heads."""
    return int(module.heads)  # type: ignore[arg-type]


def width_of(module: nn.Module) -> int:
    """H · D."""
    return int(module.to_q.out_features)  # type: ignore[union-attr,arg-type]


def kv_heads_of(module: nn.Module) -> int:
    """Key/value heads, from the widths of the projections."""
    heads = heads_of(module)
    keys = int(module.to_k.out_features)  # type: ignore[union-attr,arg-type]
    return heads * keys // width_of(module)
