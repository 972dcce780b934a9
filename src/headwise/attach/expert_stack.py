"""Find the routers and experts of a transformers mixture-of-experts model, layer by layer.

Since transformers 5 the routed experts of a layer are one module with stacked 3-D parameters, called with
(hidden (T, C), index (T, k), weight (T, k)); the router stands beside it. That call is where headwise reads and
changes the routing, so it works for every class of that shape and no list of models is kept.
"""

from __future__ import annotations

import inspect
import re
from dataclasses import dataclass

from torch import Tensor, nn
from transformers import PreTrainedModel

from headwise.addresses import Unit
from headwise.attach.locate import _owner_path
from headwise.errors import AttachError, UnitError


@dataclass(frozen=True)
class ExpertLayer:
    """The routed experts of one layer: their module, its router and the block that holds both."""

    layer: int
    experts: nn.Module
    router: nn.Module
    block: nn.Module

    @property
    def count(self) -> int:
        """Experts E, without shared ones."""
        return int(self.experts.num_experts)  # type: ignore[arg-type]


@dataclass(frozen=True)
class ExpertStack:
    """All mixture-of-experts layers of one tower. `owner` is the module that runs the layers and is given the mask."""

    layers: tuple[ExpertLayer, ...]
    owner: nn.Module
    depth: int  # layers of the tower, those without experts included
    experts: int

    def numbers(self) -> tuple[int, ...]:
        """Layers that have experts."""
        return tuple(layer.layer for layer in self.layers)

    def weights(self, address: str | Unit) -> dict[str, Tensor]:
        """The expert's own part of each stacked parameter, by name: views, so that writing into them changes the model.

        Writing needs `torch.no_grad()`. The gradient of an expert is the same part of the parameter's `.grad`. Raises
        UnitError for what names no expert of this model.

        >>> from headwise.hub import load_model
        >>> expert = find_experts(load_model("tiny-random-deepseek-v3")[0]).weights("L2E5")
        >>> {name: tuple(part.shape) for name, part in expert.items()}
        {'gate_up_proj': (64, 64), 'down_proj': (64, 32)}
        """
        unit = Unit.parse(address) if isinstance(address, str) else address
        found = next((layer for layer in self.layers if layer.layer == unit.layer), None)
        if unit.kind != "expert" or found is None or unit.index >= self.experts:
            raise UnitError(
                f"{unit} names no routed expert here; there are E0 to E{self.experts - 1} in layers {list(self.numbers())}"
            )
        stacked = found.experts.named_parameters(recurse=False)
        return {name: value[unit.index] for name, value in stacked if value.ndim and len(value) == self.experts}


def find_experts(model: nn.Module) -> ExpertStack:
    """The mixture-of-experts layers of a transformers model. Raises AttachError for a dense model.

    >>> from headwise.hub import load_model
    >>> stack = find_experts(load_model("tiny-random-deepseek-v3")[0])
    >>> stack.numbers(), stack.experts, stack.depth
    ((1, 2), 8, 3)
    """
    if not isinstance(model, PreTrainedModel):
        raise AttachError(
            f"{type(model).__name__} is no transformers model; experts are found in PreTrainedModel classes"
        )
    found = {path: module for path, module in model.named_modules() if _is_experts(module)}
    if not found:
        raise AttachError(
            f"{type(model).__name__} has no experts to reach: none of its modules holds stacked expert weights "
            "(num_experts, down_proj of 3 dimensions) and is called with (hidden_states, index, weights)"
        )
    if len({re.sub(r"\d+", "*", path) for path in found}) > 1:
        raise AttachError(f"{type(model).__name__} has several stacks of experts: {sorted(found)[:4]}; reach one tower")
    layers = tuple(_layer(model, path, experts) for path, experts in found.items())
    counts = {layer.count for layer in layers}
    if len(counts) > 1:
        raise AttachError(f"layers have {sorted(counts)} experts; headwise addresses models with one number of experts")
    owner = model.get_submodule(_owner_path(next(iter(found))))
    config = getattr(owner, "config", model.config)
    depth = int(getattr(config, "num_hidden_layers", 0) or max(layer.layer for layer in layers) + 1)
    return ExpertStack(tuple(sorted(layers, key=lambda layer: layer.layer)), owner, depth, counts.pop())


def _is_experts(module: nn.Module) -> bool:
    weight = getattr(module, "down_proj", None)
    if not isinstance(getattr(module, "num_experts", None), int) or getattr(weight, "ndim", 0) != 3:
        return False
    return len([p for p in inspect.signature(type(module).forward).parameters if p != "self"]) >= 3


def _layer(model: nn.Module, path: str, experts: nn.Module) -> ExpertLayer:
    number = re.search(r"(?:^|\.)(\d+)(?=\.|$)", path)
    block = model.get_submodule(path.rpartition(".")[0])
    router = next((child for name, child in block.named_children() if name in ("gate", "router")), None)
    if router is None or number is None:
        raise AttachError(f"{path}: no router ('gate' or 'router') stands beside these experts")
    if getattr(experts, "_is_expert_parallel", False):
        raise AttachError(f"{path} is split over expert-parallel ranks, which headwise does not reach")
    return ExpertLayer(int(number[1]), experts, router, block)
