"""Fit a router in closed form: from the hidden state that enters the attention to what it costs to leave a head out.

Keeping, per token, the heads of largest |W_O^h o_h| costs a language model almost nothing, but needs all heads computed
first. A ridge regression per layer, log size_h ~ W x + b, predicts the ranking before any head has run; x is the hidden
state, or more (`_local.py`). What is missing without a head is d = W_O^h (o_h − f_h), f the mean output of the head where it
stands in for an absent one, else 0; its size is |d| ("norm"), or sqrt(d^T M d) with the covariance M of the loss's
gradients at the layer's output ("importance"): the root mean square of the first-order loss change g^T d.

Letters: L layers, B batch, N tokens, C width of the hidden state, H query heads, D head dim.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from headwise.attach import HeadCall, Stack, attach, find_stack
from headwise.attach.projection import head_weights, output_projection
from headwise.errors import RouteError
from headwise.modes import evaluating
from headwise.progress import track
from headwise.route._local import FirstKeys

if TYPE_CHECKING:
    from headwise.route._router import HeadRouter


FLOOR = 1e-3
"""Of the mean size: what is added before the log is taken, so that a head that writes nothing does not rule the regression."""


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
        """W (H, C), b (H,) and R^2 on the rows seen; the penalty on an input is `ridge` times its sum of squares about its mean.

        That is the ridge of inputs brought to variance 1. b has no penalty.
        """
        tokens = self.xx[-1, -1]
        spread = self.xx.diagonal() - self.xx[-1].square() / tokens
        penalty = ridge * spread.clamp(min=1e-6 * float(spread.max()))
        penalty[-1] = 0.0
        W = torch.linalg.solve(self.xx + torch.diag(penalty), self.xy)  # (C + 1, H)
        residual = self.yy - 2 * (W * self.xy).sum(0) + (W * (self.xx @ W)).sum(0)
        total = self.yy - self.xy[-1].square() / tokens
        r2 = 1 - float(residual.sum() / total.sum().clamp(min=1e-30))
        return W[:-1].t(), W[-1], r2


class _Watch:
    """Observer: what each layer's router reads, and the logs of the sizes of what would be missing without a head."""

    needs_hidden = True

    def __init__(self, stack: Stack, router: HeadRouter, metric: Tensor | None = None, fill: Tensor | None = None):
        self.router, self.fill = router, fill
        self.normals: dict[int, Normal] = {}
        self.floors: dict[int, Tensor] = {}
        self.grams: list[Tensor] = []
        for layer in range(stack.layers):
            W = head_weights(output_projection(stack, layer), stack.heads).detach().float()  # (H, D, C)
            wide = W if metric is None else W @ metric[layer].to(W.device)
            self.grams.append(wide @ W.transpose(1, 2))

    def __call__(self, call: HeadCall, out: Tensor) -> None:
        wide, layer = out.detach().float(), call.layer
        if self.fill is not None:
            wide = wide - self.fill[layer].to(wide.device)
        sizes = torch.einsum("bnhd,hde,bnhe->bnh", wide, self.grams[layer], wide).clamp(min=0).sqrt()
        real = call.real_tokens()
        keep = slice(None) if real is None else real
        x = self.router.layers[layer].inputs(call).detach().float()[keep]  # type: ignore[operator]
        y = sizes[keep].reshape(-1, sizes.shape[-1])
        if layer not in self.normals:
            self.normals[layer] = Normal(x.shape[-1], y.shape[-1], y.device)
            self.floors[layer] = FLOOR * y.mean() + torch.finfo(y.dtype).tiny
        self.normals[layer].add(x.reshape(-1, x.shape[-1]), (y + self.floors[layer]).log())


@torch.no_grad()
def fit(
    router: HeadRouter,
    model: Any,
    rows: Tensor,
    *,
    metric: Tensor | None = None,
    fill: Tensor | None = None,
    ridge: float = 0.1,
    under: HeadRouter | None = None,
    stack: str | None = None,
    progress: bool = False,
) -> list[float]:
    """Fit the linear maps of a "fitted" router on token rows (n, N); gives R^2 per layer on the text of the fit.

    `metric` (L, C, C): M of each layer, None for the identity. `fill` (L, H, D): what an absent head gives. `under`: the
    router under which the text is read. Raises RouteError if there are fewer tokens than unknowns.
    """
    found_stack = find_stack(model, stack)
    unknowns = next((layer.W.shape[1] for layer in router.layers if isinstance(layer.W, nn.Parameter)), 0)
    if rows.numel() <= unknowns:
        raise RouteError(
            f"{rows.numel()} tokens cannot fit {unknowns + 1} unknowns a head: give fit_tokens of at least {4 * unknowns}"
        )
    for layer, module in zip(router.layers, found_stack.modules, strict=True):
        layer.to(next(module.parameters()).device)
    if router.config.features == "queries":
        _first_keys(router, model, rows, stack)
    watch = _Watch(found_stack, router, metric, fill)
    read(model, rows, watch, under=under, stack=stack, progress=progress)
    found = []
    for index, layer in enumerate(router.layers):
        W, b, r2 = watch.normals[index].solve(ridge)
        found.append(r2)
        pool: Tensor = layer.pool.to(W.device)  # type: ignore[assignment]
        if isinstance(layer.W, nn.Parameter):
            layer.W.copy_(W[pool])
            layer.b.copy_(b[pool])  # type: ignore[operator]
    return found


def _first_keys(router: HeadRouter, model: Any, rows: Tensor, stack: str | None) -> None:
    """Mean key of first tokens, read from first tokens alone: nothing stands before them."""
    keys = FirstKeys()
    read(model, rows[:, :1], keys, stack=stack)
    table, config = keys.table, router.config
    if table.shape[1:] != (config.kv_heads, config.head_dim):
        raise RouteError(
            f"features='queries' expects keys of {config.kv_heads} heads x {config.head_dim} dimensions, {type(model).__name__} "
            f"has {tuple(table.shape[1:])}: use features='hidden'"
        )
    for layer, first in zip(router.layers, table, strict=True):
        layer.first.copy_(first)  # type: ignore[operator]


@torch.no_grad()
def read(
    model: Any,
    rows: Tensor,
    observer: Any,
    *,
    under: HeadRouter | None = None,
    stack: str | None = None,
    progress: bool = False,
    what: str = "fitting",
) -> None:
    """Run the model on token rows (n, N), one after the other, with an observer attached; the model is left as it was.

    `under` a router the observer sees the outputs of all heads, computed from hidden states that the router has shaped.
    """
    seen: dict[str, Any] = {"observers": [observer]}
    if under is not None:
        seen = {"router": under, "transforms": [_BeforeGates(observer)]}
    with evaluating(model), attach(model, stack=stack, **seen):
        for row in track(rows, f"{what} the router", progress):
            model(input_ids=row[None].to(model.device), use_cache=False, logits_to_keep=1)


class _BeforeGates:
    """An observer as a transform that changes nothing: transforms come before a router's gates, observers after them."""

    def __init__(self, observer: Any):
        self.observer, self.needs_hidden = observer, bool(getattr(observer, "needs_hidden", False))

    def __call__(self, call: HeadCall, attend: Callable[[], Tensor]) -> Tensor:
        out = attend()
        self.observer(call, out)
        return out
