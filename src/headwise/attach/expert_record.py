"""What was seen of a model's experts: sums per prompt, layer and expert, and the choices token by token if asked for.

Letters: R rows (prompts), L layers (those without experts hold zeros), E experts, T tokens, k chosen a token.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from headwise.errors import AttachError

if TYPE_CHECKING:
    from headwise.attach.expert_call import ExpertCall


@dataclass
class ExpertRecord:
    """Sums over the recorded tokens of each row; padding never counts. A pass without cached tokens starts new rows.

    `count` says how often an expert was chosen, `weight` sums its weights, `prob` the scores of the router (float64).
    With `per_token` also, for each layer and in the order of the passes: `index`, `weights`, `probs`, `rows`, `positions`.
    """

    layers: tuple[int, ...]
    depth: int
    experts: int
    per_token: bool = False
    _sums: dict[tuple[str, int], list[Tensor]] = field(default_factory=dict)  # (name, layer) -> blocks (B, E)
    _tokens: list[Tensor] = field(default_factory=list)  # blocks (B,)
    _kept: dict[tuple[str, int], list[Tensor]] = field(default_factory=dict)

    @torch.no_grad()
    def add(self, call: ExpertCall, counted: Tensor, probs: Tensor | None) -> None:
        """One call of a layer; `counted` (B, N) bool, `probs` (T, E)."""
        first = call.layer == self.layers[0]
        if first:
            self._block(self._tokens, counted.sum(1).double(), call.fresh_rows)
        flat = counted.reshape(-1, 1)
        one = torch.zeros(len(flat), self.experts, dtype=torch.float32, device=flat.device)
        tables = {"count": one.scatter_add(1, call.index, flat.expand(-1, call.index.shape[1]).float())}
        tables["weight"] = one.scatter_add(1, call.index, call.weight.float() * flat)
        if probs is not None:
            tables["prob"] = probs.float() * flat
        for name, table in tables.items():
            rows = table.view(*counted.shape, -1).sum(1, dtype=torch.float64)
            self._block(self._sums.setdefault((name, call.layer), []), rows, call.fresh_rows)
        if self.per_token:
            self._keep(call, counted, probs)

    def _block(self, blocks: list[Tensor], rows: Tensor, fresh: bool) -> None:
        if fresh or not blocks:
            blocks.append(rows)
        elif len(blocks[-1]) != len(rows):
            raise AttachError(
                f"a pass of {len(rows)} rows continues a batch of {len(blocks[-1])}; record batches apart"
            )
        else:
            blocks[-1] = blocks[-1] + rows

    def _keep(self, call: ExpertCall, counted: Tensor, probs: Tensor | None) -> None:
        flat, layer = counted.reshape(-1), call.layer
        before = sum(len(block) for block in self._sums["count", layer][:-1])
        rows = torch.arange(len(counted), device=flat.device)[:, None].expand_as(counted).reshape(-1) + before
        values = {"index": call.index, "weights": call.weight, "rows": rows, "positions": call.positions.reshape(-1)}
        if probs is not None:
            values["probs"] = probs
        for name, value in values.items():
            self._kept.setdefault((name, layer), []).append(value[flat].cpu())

    # -- reading -----------------------------------------------------------------------------------------------------

    @property
    def tokens(self) -> Tensor:
        """(R,) recorded tokens of each row."""
        if not self._tokens:
            raise AttachError("nothing was recorded: run the model inside observe_experts")
        return torch.cat([block.cpu() for block in self._tokens])

    @property
    def count(self) -> Tensor:
        """(R, L, E) how many tokens chose each expert; sums to k · tokens in layers with experts."""
        return self._table("count")

    @property
    def weight(self) -> Tensor:
        """(R, L, E) sum of the weights that experts were given."""
        return self._table("weight")

    @property
    def prob(self) -> Tensor:
        """(R, L, E) sum of the router's probabilities, of all experts; needs observe_experts(..., probs=True)."""
        return self._table("prob")

    def load(self) -> Tensor:
        """(L, E) share of all recorded choices that went to each expert; rows of layers with experts sum to 1."""
        total = self.count.sum(0)
        return total / total.sum(-1, keepdim=True).clamp(min=1)

    def index(self, layer: int) -> Tensor:
        """(T, k) chosen experts of a layer."""
        return self._tokenwise("index", layer)

    def weights(self, layer: int) -> Tensor:
        """(T, k) weights of the chosen experts."""
        return self._tokenwise("weights", layer)

    def probs(self, layer: int) -> Tensor:
        """(T, E) probabilities of a layer's router."""
        return self._tokenwise("probs", layer)

    def rows(self, layer: int) -> Tensor:
        """(T,) row of each recorded token."""
        return self._tokenwise("rows", layer)

    def positions(self, layer: int) -> Tensor:
        """(T,) position of each recorded token among the real tokens of its row."""
        return self._tokenwise("positions", layer)

    def _table(self, name: str) -> Tensor:
        rows = len(self.tokens)
        table = torch.zeros(rows, self.depth, self.experts, dtype=torch.float64)
        for layer in self.layers:
            if (name, layer) not in self._sums:
                raise AttachError(f"no {name!r} of layer {layer} was recorded; ask for it in observe_experts")
            table[:, layer] = torch.cat([block.cpu() for block in self._sums[name, layer]])
        return table

    def _tokenwise(self, name: str, layer: int) -> Tensor:
        if (name, layer) not in self._kept:
            have = sorted({kept for kept, _ in self._kept}) or "nothing"
            raise AttachError(
                f"no {name!r} of layer {layer} was kept; layers with experts are {self.layers}, kept is {have}: use "
                "observe_experts(model, per_token=True), and probs=True for probabilities"
            )
        return torch.cat(self._kept[name, layer])
