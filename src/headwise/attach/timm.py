"""Reach the heads of timm's vision transformers: their attention modules call torch's attention, like those of diffusers.

Letters: H query heads, D head dim.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from headwise.attach.diffusers import Facts
from headwise.attach.locate import Stack
from headwise.errors import AttachError

if TYPE_CHECKING:
    from headwise.attach.controller import Controller


def is_timm(model: nn.Module) -> bool:
    """Is this a model of the timm library? Asked by class names, so that timm need not be there."""
    return any(cls.__module__.split(".")[0] == "timm" for cls in type(model).__mro__)


@dataclass(frozen=True)
class TimmStack(Stack):
    """Attention modules with `num_heads`, `qkv` and `proj`, block by block."""

    @property
    def kv_heads(self) -> int:
        """Every head has keys of its own."""
        return self.heads

    @property
    def head_dim(self) -> int:
        """Size of one head."""
        return int(self.modules[0].qkv.out_features) // 3 // self.heads  # type: ignore[union-attr,arg-type]

    @property
    def causal(self) -> bool:
        """Patches see each other both ways."""
        return False

    def controller(self, model: nn.Module) -> Controller:
        """What hangs the interventions into the model."""
        from headwise.attach.diffusers_hook import DiffusersController

        class TimmController(DiffusersController):
            """The same hooks; timm's modules are called with their tokens alone."""

            remedy = (
                "its attention does not end in torch's scaled_dot_product_attention: call timm.layers.set_fused_attn(True) "
                "before the model is made, or choose a model whose attention does"
            )

            def _kind(self, module: nn.Module) -> tuple:
                return type(module), bool(getattr(module, "fused_attn", True))

            def _try(self, module: nn.Module) -> Any:
                weight: Any = module.qkv.weight  # type: ignore[union-attr]
                tokens = torch.randn(1, 5, weight.shape[1], generator=torch.Generator().manual_seed(0))
                return module(tokens.to(weight.device, weight.dtype))

        return TimmController(model, self)


def find_timm_stack(model: nn.Module, stack: str | None = None) -> TimmStack:
    """The attention of every block. Raises AttachError where there is none, or where blocks differ in their heads (Swin)."""
    found: dict[str, dict[int, nn.Module]] = {}
    for path, module in model.named_modules():
        numbers = re.findall(r"(?:^|\.)(\d+)(?=\.|$)", path)
        if len(numbers) == 1 and all(hasattr(module, name) for name in ("num_heads", "qkv", "proj")):
            found.setdefault(re.sub(r"(^|\.)\d+(?=\.|$)", r"\1*", path), {})[int(numbers[0])] = module
    names = [name for name in found if stack is None or stack in name]
    if len(names) != 1:
        raise AttachError(
            f"{type(model).__name__} has the numbered attention stacks {sorted(found)}; one is needed, choose it with stack="
        )
    modules = tuple(found[names[0]][i] for i in sorted(found[names[0]]))
    shapes = {(int(m.num_heads), int(m.qkv.out_features)) for m in modules}  # type: ignore[union-attr,arg-type]
    if len(shapes) > 1:
        raise AttachError(f"stack {names[0]}: (heads, width) differ between layers: {sorted(shapes)}")
    heads, width = shapes.pop()
    facts = Facts(type(model).__name__, heads, {"layers": len(modules), "heads": heads, "width": width})
    return TimmStack(pattern=names[0], modules=modules, owner=model, config=facts)
