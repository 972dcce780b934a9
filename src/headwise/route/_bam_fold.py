"""Attention experts folded into the heads of one attention layer: N experts of H heads are one layer of N·H heads.

    out_t = Σ_i g_ti W_O^i o_ti  =  [W_O^1 … W_O^N] (g ⊙ o)_t

so that any attention kernel, mask and cache serves all experts in one call. Expert kv: heads in the order (expert, kv head,
query head of the group). Shared kv: (kv head, expert, query head of the group), so that one kv head serves all experts.

Letters: B batch, N experts, T tokens, C width, H query heads and K kv heads of one expert, G = H/K, D head dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from headwise.route._router_base import Router

KV = Literal["expert", "shared"]


class SoftOutput(nn.Linear):
    """The output projections of all experts side by side; each head's output is first multiplied by its expert's gate.

    `owner` (N·H,) says which expert a head belongs to, `biases` (N, C) are the experts' output biases. `router` reads the
    input of the attention layer, which a hook on that layer brings. `record`: a list that takes the gates of every pass.
    """

    owner: Tensor

    def __init__(self, weight: Tensor, biases: Tensor | None, owner: Tensor, router: Router):
        super().__init__(weight.shape[1], weight.shape[0], bias=False, device="meta")
        self.weight = nn.Parameter(weight)
        self.biases = None if biases is None else nn.Parameter(biases)
        self.register_buffer("owner", owner, persistent=False)
        self.router = router
        self.gates: Tensor | None = None
        self.record: list[Tensor] | None = None

    def see(self, attention: nn.Module, args: tuple, kwargs: dict) -> None:
        """Forward pre-hook of the attention layer: gates (B, T, N) of its input."""
        x = args[0] if args else kwargs["hidden_states"]
        self.gates = self.router(x).gates()
        if self.record is not None:
            self.record.append(self.gates.detach())

    def forward(self, heads: Tensor) -> Tensor:
        """(B, T, N·H·D) -> (B, T, C)."""
        assert self.gates is not None
        gates, self.gates = self.gates.to(heads.dtype), None
        weighed = heads.unflatten(-1, (len(self.owner), -1)) * gates[..., self.owner][..., None]
        out = F.linear(weighed.flatten(-2), self.weight)
        return out if self.biases is None else out + gates @ self.biases.to(out.dtype)


def fold(attention: Any, experts: Sequence[Any], kv: KV, router: Router) -> None:
    """Make `attention` (a copy of any of the experts, with averaged k and v if shared) the layer that holds them all."""
    K, D = _kv_heads(attention), attention.head_dim
    N, G = len(experts), attention.num_key_value_groups
    for name in ("q_proj",) if kv == "shared" else ("q_proj", "k_proj", "v_proj"):
        setattr(attention, name, _side_by_side([getattr(e, name) for e in experts], K, D, kv))
    columns = torch.stack([e.o_proj.weight.detach().unflatten(1, (K, G, D)) for e in experts], 1)  # (C, N, K, G, D)
    columns = columns.transpose(1, 2) if kv == "shared" else columns
    bias = attention.o_proj.bias
    biases = None if bias is None else torch.stack([e.o_proj.bias.detach() for e in experts])
    owner = (
        torch.arange(N).expand(K, N)[..., None] if kv == "shared" else torch.arange(N)[:, None, None].expand(N, K, 1)
    )
    owner = owner.expand(*owner.shape[:2], G).reshape(-1).to(columns.device)
    attention.o_proj = SoftOutput(columns.flatten(1).clone(), biases, owner, router)
    if kv == "shared":
        attention.num_key_value_groups = N * G
    attention.register_forward_pre_hook(attention.o_proj.see, with_kwargs=True)


def unfold(attention: Any, expert: int, kv: KV, dense: Any) -> None:
    """Write expert `expert` of a folded layer into the dense attention module `dense`."""
    K, D, G = _kv_heads(dense), dense.head_dim, dense.num_key_value_groups
    N = attention.o_proj.router.experts
    for name in ("q_proj", "k_proj", "v_proj"):
        source, target = getattr(attention, name), getattr(dense, name)
        shared = kv == "shared" and name != "q_proj"
        for part in ("weight", "bias"):
            value, mine = getattr(source, part), getattr(target, part)
            if mine is not None:
                mine.copy_(value if shared else _of_expert(value, expert, N, K, D, kv).reshape(mine.shape))
    columns = attention.o_proj.weight.unflatten(1, (K, N, G * D) if kv == "shared" else (N, K, G * D))
    dense.o_proj.weight.copy_(columns.select(2 if kv == "shared" else 1, expert).flatten(1))
    if dense.o_proj.bias is not None:
        dense.o_proj.bias.copy_(attention.o_proj.biases[expert])


def _kv_heads(attention: Any) -> int:
    return attention.k_proj.weight.shape[0] // attention.head_dim


def _side_by_side(layers: Sequence[nn.Linear], K: int, D: int, kv: KV) -> nn.Linear:
    """One linear layer whose rows are those of all layers, head by head in the order of the module's docstring."""
    parts = {}
    for name in ("weight", "bias"):
        values = [getattr(layer, name) for layer in layers]
        if values[0] is not None:
            rows = torch.stack([v.detach().unflatten(0, (K, -1, D)) for v in values], 1 if kv == "shared" else 0)
            parts[name] = nn.Parameter(rows.flatten(0, 3).clone())
    made = nn.Linear(layers[0].in_features, len(parts["weight"]), bias="bias" in parts, device="meta")
    for name, value in parts.items():
        setattr(made, name, value)
    return made


def _of_expert(rows: Tensor, expert: int, N: int, K: int, D: int, kv: KV) -> Tensor:
    if kv == "shared":
        return rows.unflatten(0, (K, N, -1, D))[:, expert]
    return rows.unflatten(0, (N, K, -1, D))[expert]
