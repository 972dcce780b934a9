"""Fit a router in closed form: from the hidden state that enters the attention to what it costs to leave a head out.

Keeping, per token, the heads of largest |W_O^h o_h| costs a language model almost nothing, but needs all heads computed
first. A ridge regression per layer, size_h ~ W x + b, predicts the ranking before any head has run. What is missing
without a head is d = W_O^h (o_h − f_h), f the mean output of the head where it stands in for an absent one, else 0; its
size is |d| ("norm"), or sqrt(d^T M d) with the covariance M of the loss's gradients at the layer's output
("importance"): the root mean square of the first-order loss change g^T d.

Letters: L layers, B batch, N tokens, C width of the hidden state, H query heads, D head dim.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from headwise.attach import HeadCall, Stack, attach, find_stack
from headwise.attach.projection import head_weights, output_projection
from headwise.errors import RouteError

if TYPE_CHECKING:
    from headwise.route._router import HeadRouter


class Normal:
    """Normal equations of one layer, gathered while the model reads: sums over real tokens of x x^T, x y^T, y^2."""

    def __init__(self, width: int, heads: int, device: torch.device):
        self.xx = torch.zeros(width + 1, width + 1, dtype=torch.float64, device=device)
        self.xy = torch.zeros(width + 1, heads, dtype=torch.float64, device=device)
        self.yy = torch.zeros(heads, dtype=torch.float64, device=device)

    def add(self, x: Tensor, y: Tensor) -> None:
        """Rows x (T, C) and targets y (T, H)."""
        x = torch.cat([x, x.new_ones(len(x), 1)], dim=1)
        self.xx += (x.t() @ x).double()
        self.xy += (x.t() @ y).double()
        self.yy += y.double().square().sum(0)

    def solve(self, ridge: float) -> tuple[Tensor, Tensor, float]:
        """W (H, C), b (H,) and R^2 on the rows seen; the penalty is `ridge` times the mean square of the inputs, not on b."""
        width = self.xx.shape[0] - 1
        penalty = torch.full((width + 1,), ridge, dtype=torch.float64, device=self.xx.device)
        penalty *= self.xx.diagonal()[:-1].mean()
        penalty[-1] = 0.0
        W = torch.linalg.solve(self.xx + torch.diag(penalty), self.xy)  # (C + 1, H)
        tokens = self.xx[-1, -1]
        residual = self.yy - 2 * (W * self.xy).sum(0) + (W * (self.xx @ W)).sum(0)
        total = self.yy - self.xy[-1].square() / tokens
        r2 = 1 - float(residual.sum() / total.sum().clamp(min=1e-30))
        return W[:-1].t(), W[-1], r2


class Means:
    """Observer: mean output of each head over real tokens; `table` (L, H, D), float32."""

    def __init__(self, stack: Stack):
        self.sums: list[Tensor | None] = [None] * stack.layers
        self.tokens = [0] * stack.layers

    def __call__(self, call: HeadCall, out: Tensor) -> None:
        real = call.real_tokens()
        wide = out.detach().float()
        rows = wide.flatten(0, 1) if real is None else wide[real]  # (T, H, D)
        before = self.sums[call.layer]
        self.sums[call.layer] = rows.double().sum(0).cpu() + (0 if before is None else before)
        self.tokens[call.layer] += len(rows)

    @property
    def table(self) -> Tensor:
        """See the class."""
        return torch.stack(
            [s / max(n, 1) for s, n in zip(self.sums, self.tokens, strict=True) if s is not None]
        ).float()


class _Watch:
    """Observer: hidden states and sizes of what would be missing without a head, layer by layer."""

    needs_hidden = True

    def __init__(self, stack: Stack, width: int, metric: Tensor | None = None, fill: Tensor | None = None):
        self.normals: list[Normal] = []
        self.grams: list[Tensor] = []
        self.fill = fill
        for layer in range(stack.layers):
            W = head_weights(output_projection(stack, layer), stack.heads).detach().float()  # (H, D, C)
            wide = W if metric is None else W @ metric[layer].to(W.device)
            self.grams.append(wide @ W.transpose(1, 2))
            self.normals.append(Normal(width, stack.heads, W.device))

    def __call__(self, call: HeadCall, out: Tensor) -> None:
        assert call.hidden is not None
        wide = out.detach().float()
        if self.fill is not None:
            wide = wide - self.fill[call.layer].to(wide.device)
        norms = torch.einsum("bnhd,hde,bnhe->bnh", wide, self.grams[call.layer], wide).clamp(min=0).sqrt()
        real = call.real_tokens()
        x, y = call.hidden.detach().float(), norms
        keep = slice(None) if real is None else real
        self.normals[call.layer].add(x[keep].reshape(-1, x.shape[-1]), y[keep].reshape(-1, y.shape[-1]))


@torch.no_grad()
def fit(
    router: HeadRouter,
    model: Any,
    rows: Tensor,
    *,
    metric: Tensor | None = None,
    fill: Tensor | None = None,
    ridge: float = 1e-3,
    stack: str | None = None,
    progress: bool = False,
) -> list[float]:
    """Fit the linear maps of a "fitted" router on token rows (n, N); gives R^2 per layer on the text of the fit.

    `metric` (L, C, C): M of each layer, None for the identity. `fill` (L, H, D): what an absent head gives; the router
    takes it over. Raises RouteError if there are fewer tokens than unknowns.
    """
    width = router.config.width
    if rows.numel() <= width:
        raise RouteError(
            f"{rows.numel()} tokens cannot fit {width + 1} unknowns a head: give fit_tokens of at least {4 * width}"
        )
    watch = _Watch(find_stack(model, stack), width, metric, fill)
    read(model, rows, watch, stack=stack, progress=progress)
    found = []
    for index, (layer, normal) in enumerate(zip(router.layers, watch.normals, strict=True)):
        W, b, r2 = normal.solve(ridge)
        found.append(r2)
        pool: Tensor = layer.pool.to(W.device)  # type: ignore[assignment]
        if isinstance(layer.W, nn.Parameter):
            layer.W.copy_(W[pool])
            layer.b.copy_(b[pool])  # type: ignore[operator]
        if fill is not None:
            layer.fill.copy_(fill[index])  # type: ignore[operator]
    return found


@torch.no_grad()
def read(
    model: Any, rows: Tensor, observer: Any, *, stack: str | None = None, progress: bool = False, what: str = "fitting"
) -> None:
    """Run the model on token rows (n, N), one after the other, with an observer attached; the model is left as it was."""
    training = model.training
    model.eval()
    try:
        with attach(model, observers=[observer], stack=stack):
            for row in _track(rows, progress, what):
                model(input_ids=row[None].to(model.device), use_cache=False, logits_to_keep=1)
    finally:
        model.train(training)


def _track(rows: Tensor, progress: bool, what: str) -> Any:
    if not progress:
        return rows
    from rich.progress import track

    return track(list(rows), description=f"{what} the router")
