"""Fit a router in closed form: from the hidden state that enters the attention to the norm of what each head adds.

Keeping, per token, the heads of largest |W_O^h o_h| costs a language model almost nothing, but needs all heads computed
first. A ridge regression per layer, norm_h ~ W x + b, predicts the ranking before any head has run.

Letters: B batch, N tokens, C width of the hidden state, H query heads.
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


class _Watch:
    """Observer: hidden states and norms of the heads' contributions, layer by layer."""

    needs_hidden = True

    def __init__(self, stack: Stack, width: int):
        self.normals: list[Normal] = []
        self.grams: list[Tensor] = []
        for layer in range(stack.layers):
            W = head_weights(output_projection(stack, layer), stack.heads).detach().float()  # (H, D, C)
            self.grams.append(W @ W.transpose(1, 2))
            self.normals.append(Normal(width, stack.heads, W.device))

    def __call__(self, call: HeadCall, out: Tensor) -> None:
        assert call.hidden is not None
        wide = out.detach().float()
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
    ridge: float = 1e-3,
    stack: str | None = None,
    progress: bool = False,
) -> list[float]:
    """Fit the linear maps of a "fitted" router on token rows (n, N); gives R^2 per layer on the text of the fit.

    Raises RouteError if there are fewer tokens than unknowns.
    """
    width = router.config.width
    if rows.numel() <= width:
        raise RouteError(
            f"{rows.numel()} tokens cannot fit {width + 1} unknowns a head: give fit_tokens of at least {4 * width}"
        )
    watch = _Watch(find_stack(model, stack), width)
    training = model.training
    model.eval()
    try:
        with attach(model, observers=[watch], stack=stack):
            for row in _track(rows, progress):
                model(input_ids=row[None].to(model.device), use_cache=False, logits_to_keep=1)
    finally:
        model.train(training)
    found = []
    for layer, normal in zip(router.layers, watch.normals, strict=True):
        W, b, r2 = normal.solve(ridge)
        found.append(r2)
        pool: Tensor = layer.pool.to(W.device)  # type: ignore[assignment]
        if isinstance(layer.W, nn.Parameter):
            layer.W.copy_(W[pool])
            layer.b.copy_(b[pool])  # type: ignore[operator]
    return found


def _track(rows: Tensor, progress: bool) -> Any:
    if not progress:
        return rows
    from rich.progress import track

    return track(list(rows), description="fitting the router")
