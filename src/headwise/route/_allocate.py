"""Deal out heads to layers by what it costs to leave them out, layer by layer, in the same unit.

The cost of a layer without its k least wanted heads, to second order in what is missing from the layer's output, is
c(k) = mean over tokens of d^T M d, with d = sum over these heads of W_O^h (o_h − f_h) (f: what stands in for an absent head) and
M = mean over tokens of g g^T, g the gradient of a token's loss with respect to the layer's output. M is the empirical Fisher matrix
of the layer's output: costs are in squared nats, so that layers compare, whatever the norms of their hidden states.

Letters: L layers, H query heads, B batch, N tokens, D head dim, C width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from headwise.attach import HeadCall, Stack
from headwise.attach.projection import head_weights, output_projection
from headwise.checks import whole
from headwise.errors import RouteError
from headwise.modes import frozen
from headwise.route._absent import without


def gradient_covariance(model: Any, stack: Stack, rows: Tensor) -> Tensor:
    """M (L, C, C), float32: mean over the tokens of rows (n, N) of g g^T at each layer's attention output.

    Gradients are of the summed next-token loss. No weight gets a gradient; the model is left as it was.
    """
    sums: list[Tensor] = []
    seen: dict[int, Tensor] = {}
    for layer in range(stack.layers):
        C = head_weights(output_projection(stack, layer), stack.heads).shape[-1]
        sums.append(torch.zeros(C, C, device=next(stack.modules[layer].parameters()).device))
    with _outputs(model, stack, seen), torch.enable_grad():
        for row in rows:
            seen.clear()
            ids = row[None].to(model.device)
            logits = model(input_ids=ids, use_cache=False).logits[0, :-1].float()
            loss = F.cross_entropy(logits, ids[0, 1:], reduction="sum")
            layers = sorted(seen)
            for layer, grad in zip(layers, torch.autograd.grad(loss, [seen[i] for i in layers]), strict=True):
                g = grad.float().reshape(-1, grad.shape[-1])
                sums[layer] += g.t() @ g
    return torch.stack([total.cpu() for total in sums]) / rows.numel()


@contextmanager
def _outputs(model: Any, stack: Stack, seen: dict[int, Tensor]) -> Iterator[None]:
    """Inside, `seen` holds the output of each layer's output projection, part of the graph though no weight is."""

    def keep(layer: int) -> Any:
        def hook(module: nn.Module, args: tuple, out: Tensor) -> Tensor:
            seen[layer] = out if out.requires_grad else out.detach().requires_grad_()
            return seen[layer]

        return hook

    handles = [output_projection(stack, i).register_forward_hook(keep(i)) for i in range(stack.layers)]
    try:
        with frozen(model):
            yield
    finally:
        for handle in handles:
            handle.remove()


class Costs:
    """Observer: c(k) of each layer when the k heads of lowest score are left out, k = 0 … H; `table` (L, H + 1).

    `scores` gives the scores (B, N, H) of a layer for a call, `metric` is M, `fills` (L, H + 1, H, D) what an absent head gives where k
    are left out.
    """

    needs_hidden = True

    def __init__(self, stack: Stack, scores: Sequence[Any], metric: Tensor, fills: Tensor | None):
        self.stack, self.scores, self.metric, self.fills = stack, scores, metric, fills
        self.sums = torch.zeros(stack.layers, stack.heads + 1, dtype=torch.float64)
        self.tokens = torch.zeros(stack.layers, dtype=torch.float64)

    def __call__(self, call: HeadCall, out: Tensor) -> None:
        layer, real = call.layer, call.real_tokens()
        W = head_weights(output_projection(self.stack, layer), self.stack.heads).detach().float()
        each = torch.einsum("bnhd,hdc->bnhc", out.detach().float(), W)
        absent = without(self.scores[layer](call).float())  # (B, N, H + 1, H)
        missing = torch.einsum("bnkh,bnhc->bnkc", absent, each)
        if self.fills is not None:
            given = torch.einsum("khd,hdc->khc", self.fills[layer].to(W), W)
            missing = missing - torch.einsum("bnkh,khc->bnkc", absent, given)
        cost = torch.einsum("bnkc,cf,bnkf->bnk", missing, self.metric[layer].to(W), missing)
        cost = cost.flatten(0, 1) if real is None else cost[real]
        self.sums[layer] += cost.double().sum(0).cpu()
        self.tokens[layer] += len(cost)

    @property
    def table(self) -> Tensor:
        """Mean costs (L, H + 1) in squared nats."""
        return self.sums / self.tokens.clamp(min=1)[:, None]


def allocate(costs: Tensor, total: int, *, least: int = 1) -> list[int]:
    """Heads that run in each layer, `total` in all and at least `least` each, at the least sum of costs (L, H + 1); exact.

    `costs[l, k]` is the cost of layer l without k heads. Raises RouteError for a total that cannot be dealt out.

    >>> allocate(torch.tensor([[0.0, 1, 5, 9], [0.0, 2, 4, 9]]), 4)
    [2, 2]
    >>> allocate(torch.tensor([[0.0, 4, 9, 9], [0.0, 1, 2, 9]]), 4)
    [3, 1]
    """
    L, H = costs.shape[0], costs.shape[1] - 1
    drop, most = L * H - total, H - whole("least", least, 1, RouteError, H)
    if not 0 <= drop <= L * most:
        raise RouteError(f"{total} heads cannot be dealt out to {L} layers of {H}, at least {least} each")
    best = torch.full((drop + 1,), torch.inf, dtype=torch.float64)
    best[0] = 0.0
    choices = []
    for row in costs.double():
        # reached[k, s]: the cost of leaving out s heads so far, k of them here
        reached = torch.full((most + 1, drop + 1), torch.inf, dtype=torch.float64)
        for k in range(min(most, drop) + 1):
            reached[k, k:] = best[: drop + 1 - k] + row[k]
        best, choice = reached.min(dim=0)
        choices.append(choice)
    counts: list[int] = []
    for choice in reversed(choices):
        k = int(choice[drop])
        counts.append(H - k)
        drop -= k
    return counts[::-1]
