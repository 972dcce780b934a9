"""What routers leave behind in a forward pass: one balance loss a layer, and, where asked for, counts of used heads.

Letters: L layers, B batch, N tokens, H query heads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from headwise.errors import RouteError
from headwise.route._config import LayerRoute


@dataclass
class Collector:
    """Losses of the forward pass at hand. The first entry of a layer counts: gradient checkpointing computes it twice."""

    losses: dict[int, Tensor] = field(default_factory=dict)
    without_graph: bool = False  # a layer ran under no_grad, as reentrant checkpointing does
    seen: set[int] = field(default_factory=set)
    load: HeadLoad | None = None

    def begin(self) -> None:
        """A new forward pass starts."""
        self.losses, self.without_graph, self.seen = {}, False, set()

    def first(self, layer: int) -> bool:
        """Is this the layer's first run in this pass?"""
        fresh = layer not in self.seen
        self.seen.add(layer)
        return fresh

    def add_loss(self, layer: int, loss: Tensor) -> None:
        """The auxiliary loss of a layer in this pass."""
        self.losses[layer] = loss
        self.without_graph |= not torch.is_grad_enabled()

    def mean_loss(self) -> Tensor | None:
        """Mean over layers of this pass' losses; None without any. RouteError where checkpointing lost the graph."""
        if not self.losses:
            return None
        if self.without_graph and torch.is_grad_enabled():
            raise RouteError(
                "the balance loss has no gradient: reentrant gradient checkpointing ran the layers without a graph; "
                "use gradient_checkpointing_kwargs={'use_reentrant': False}"
            )
        losses = list(self.losses.values())
        return torch.stack([loss.to(losses[0].device) for loss in losses]).mean()


def join_loss(output: Any, extra: Tensor, kwargs: dict, causal: bool) -> Any:
    """A model's output with `extra` added to its task loss, where there is one."""
    if isinstance(output, tuple):
        labelled = kwargs.get("labels") is not None and isinstance(output[0], Tensor) and output[0].ndim == 0
        return (_joined(output[0], extra, kwargs, causal), *output[1:]) if labelled else output
    if getattr(output, "loss", None) is not None:
        output.loss = _joined(output.loss, extra, kwargs, causal)
    return output


def _joined(task: Tensor, extra: Tensor, kwargs: dict, causal: bool) -> Tensor:
    return task + (extra * _share_of_step(kwargs, causal)).to(device=task.device, dtype=task.dtype)


def _share_of_step(kwargs: dict, causal: bool) -> Tensor | float:
    """Share of the optimizer step's labels in this batch.

    Trainer normalises the task loss by the labels of all accumulated batches (`num_items_in_batch`) and then no
    longer divides by their number; without this factor the auxiliary loss would count once for each of them.
    """
    total, labels = kwargs.get("num_items_in_batch"), kwargs.get("labels")
    if total is None or not isinstance(labels, Tensor):
        return 1.0
    shifted = kwargs.get("shift_labels")
    mine = shifted if isinstance(shifted, Tensor) else labels[..., 1:] if causal else labels
    return (mine != -100).sum() / torch.as_tensor(total, device=labels.device)


@dataclass
class HeadLoad:
    """How many tokens used each head, by category of text. `rows`: the category of each row of the coming batches.

    Padding does not count, nor do layers in which every head runs for every token (their share is 1).
    """

    routes: tuple[LayerRoute, ...]
    rows: Sequence[str] | None = None
    used: dict[str, Tensor] = field(default_factory=dict)  # category -> (L, H) tokens that used the head
    tokens: dict[str, Tensor] = field(default_factory=dict)  # category -> (L,) tokens

    @torch.no_grad()
    def add(self, layer: int, gates: Tensor, real: Tensor | None) -> None:
        """Count the non-zero gates (B, N, H) of a layer."""
        rows = ["all"] * gates.shape[0] if self.rows is None else list(self.rows)
        if len(rows) != gates.shape[0]:
            raise RouteError(f"rows names {len(rows)} categories, the batch has {gates.shape[0]} rows; set load.rows")
        on = gates != 0
        real = torch.ones(gates.shape[:2], dtype=torch.bool, device=gates.device) if real is None else real
        used, tokens = (on & real[..., None]).sum(1).double().cpu(), real.sum(1).double().cpu()
        for row, category in enumerate(rows):
            self._table(self.used, category, gates.shape[-1])[layer] += used[row]
            self._table(self.tokens, category)[layer] += tokens[row]

    def _table(self, tables: dict[str, Tensor], category: str, *size: int) -> Tensor:
        shape = (len(self.routes), *size)
        return tables.setdefault(category, torch.zeros(shape, dtype=torch.float64))

    def share(self, category: str | None = None) -> Tensor:
        """(L, H) share of the tokens of a category (None: of all) that used each head."""
        if not self.used or (category is not None and category not in self.used):
            raise RouteError(f"no token of category {category!r} was seen; seen: {', '.join(self.used) or 'nothing'}")
        names = list(self.used) if category is None else [category]
        used, tokens = (torch.stack([t[name] for name in names]).sum(0) for t in (self.used, self.tokens))
        dense = torch.tensor([route.dense for route in self.routes])
        share = used / tokens.clamp(min=1)[:, None]
        return torch.where((dense & (tokens == 0))[:, None], torch.ones_like(share), share)

    def skip_rate(self) -> Tensor:
        """(L,) share of (token, head) pairs whose gate was exactly 0: what a sparse kernel may leave out."""
        return 1 - self.share().mean(dim=1)

    def distance(self, one: str, other: str) -> float:
        """Total variation distance of two categories' head-load histograms over routed heads, mean over routed layers."""
        distances = []
        a, b = self.share(one), self.share(other)
        for layer, route in enumerate(self.routes):
            if route.routed and not route.dense:
                pool = list(route.pool)
                x, y = (t[layer, pool] / t[layer, pool].sum().clamp(min=1e-12) for t in (a, b))
                distances.append(float((x - y).abs().sum()) / 2)
        if not distances:
            raise RouteError("no layer of this router lets tokens choose: there are no histograms to compare")
        return sum(distances) / len(distances)
