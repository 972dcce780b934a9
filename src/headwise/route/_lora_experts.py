"""LoRA experts: a frozen linear layer with a mixture of low-rank updates, y = W₀ x + Σ_e w_e (α / r) B_e A_e x.

Letters: B batch, N tokens, C width, O outputs, E experts, r rank.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor, nn

from headwise.checks import finite, whole
from headwise.errors import RouteError
from headwise.route._experts import routed_linear
from headwise.route._router_base import Router, Rule
from headwise.route._rules import Dense


class LoRAExperts(nn.Module):
    """Wraps a linear layer; B starts at 0, so that the output is the layer's until training. The layer is frozen.

    `rule` routes x; the default uses all experts with softmax weights. Raises RouteError for a rank below 1 or a layer
    that is no `nn.Linear`.

    >>> layer = LoRAExperts(nn.Linear(8, 6), experts=4, rank=2, generator=torch.Generator().manual_seed(0))
    >>> x = torch.ones(1, 3, 8)
    >>> bool((layer(x) == layer.base(x)).all()), [n for n, p in layer.named_parameters() if p.requires_grad]
    (True, ['A', 'B', 'router.W'])
    """

    def __init__(
        self,
        base: nn.Linear,
        *,
        experts: int = 4,
        rank: int = 8,
        alpha: float = 16.0,
        rule: Rule | None = None,
        generator: torch.Generator | None = None,
    ):
        super().__init__()
        if not isinstance(base, nn.Linear):
            raise RouteError(f"base is a {type(base).__name__}; it must be an nn.Linear")
        whole("rank", rank, 1, RouteError)
        self.scale = finite("alpha", alpha, RouteError) / rank
        self.base = base.requires_grad_(False)
        width, outputs = base.in_features, base.out_features
        A = torch.zeros(experts, rank, width).normal_(0.0, width**-0.5, generator=generator)
        self.A = nn.Parameter(A.to(base.weight.device, base.weight.dtype))
        self.B = nn.Parameter(torch.zeros(experts, outputs, rank, device=base.weight.device, dtype=base.weight.dtype))
        self.router = Router(rule or Dense(), width=width, experts=experts, generator=generator).to(base.weight.device)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, N, C) -> (B, N, O)."""
        routing = self.router(x)
        flat = x.reshape(-1, x.shape[-1])
        weight = routing.gates().reshape(len(flat), -1).to(x.dtype)
        if routing.k >= len(self.A):
            low = torch.einsum("tc,erc->ter", flat, self.A)
            extra = torch.einsum("ter,eor,te->to", low, self.B, weight)
        else:
            index = routing.index.reshape(len(flat), -1)
            low = routed_linear(flat[:, None], self.A, index)
            extra = (routed_linear(low, self.B, index) * weight.gather(1, index)[..., None]).sum(1)
        return self.base(x) + self.scale * extra.reshape(*x.shape[:-1], -1)


def add_lora_experts(
    model: nn.Module, targets: str = r"\.(gate_proj|up_proj|down_proj)$", *, seed: int = 0, **options: Any
) -> list[LoRAExperts]:
    """Wrap every linear layer whose path matches the pattern, freeze the rest; the layers, for the optimizer.

    The model's output is unchanged at first. Raises RouteError if nothing matches.
    """
    found = [(path, m) for path, m in model.named_modules() if isinstance(m, nn.Linear) and re.search(targets, path)]
    if not found:
        raise RouteError(f"targets is {targets!r}; no linear layer's path matches it")
    model.requires_grad_(False)
    generator, made = torch.Generator().manual_seed(seed), []
    for path, linear in found:
        parent, _, name = path.rpartition(".")
        made.append(LoRAExperts(linear, generator=generator, **options))
        setattr(model.get_submodule(parent), name, made[-1])
    return made
