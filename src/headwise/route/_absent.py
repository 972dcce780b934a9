"""What stands in for a head that does not run: nothing, its mean output, or its mean output over the tokens that do without it.

Heads that tokens do without mostly rest on the attention sink, and what they write then is nearly a constant: so the last of
the three transfers to another kind of text, which the mean over all tokens does not. It is taken as far as two halves of the text
agree on it; where the fit reads two kinds of text in turn, the halves are the kinds.

Letters: L layers, B batch, N tokens, H query heads, D head dim, k heads that a token does without.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from headwise.attach import HeadCall, Stack

PRIOR = 200.0
"""Tokens of output 0 that a mean over few tokens starts from."""


class Means:
    """Observer: mean output of each head over real tokens; `table` (L, H, D), float32."""

    def __init__(self, stack: Stack):
        self.sums: list[Tensor | None] = [None] * stack.layers
        self.tokens = [0] * stack.layers

    def __call__(self, call: HeadCall, out: Tensor) -> None:
        rows = _real(call, out.detach().float())  # (T, H, D)
        before = self.sums[call.layer]
        self.sums[call.layer] = rows.double().sum(0).cpu() + (0 if before is None else before)
        self.tokens[call.layer] += len(rows)

    @property
    def table(self) -> Tensor:
        """See the class."""
        return torch.stack(
            [s / max(n, 1) for s, n in zip(self.sums, self.tokens, strict=True) if s is not None]
        ).float()


class RestMeans:
    """Observer: mean output of each head over the tokens that do without it, for k = 0 … H; `table` (L, H + 1, H, D), float32.

    `scores` gives the scores (B, N, H) of a layer for a call: a token does without its k heads of lowest score. A mean over n tokens
    is taken n / (n + PRIOR) times, so that a head that hardly ever stays out gets nearly nothing; and a times, a = 2 m·m' / (|m|² + |m'|²)
    at least 0, where m and m' are the means over every second call, so that what one kind of text does alone is left out.
    """

    needs_hidden = True

    def __init__(self, stack: Stack, scores: Sequence[Any]):
        self.scores = scores
        size = (2, stack.layers, stack.heads + 1, stack.heads)
        self.sums = torch.zeros(*size, stack.head_dim, dtype=torch.float64)
        self.tokens = torch.zeros(*size, dtype=torch.float64)
        self.calls = [0] * stack.layers

    def __call__(self, call: HeadCall, out: Tensor) -> None:
        rows = _real(call, out.detach().float())  # (T, H, D)
        absent = without(_real(call, self.scores[call.layer](call)))  # (T, H + 1, H)
        half = self.calls[call.layer] % 2
        self.sums[half, call.layer] += torch.einsum("tkh,thd->khd", absent, rows).double().cpu()
        self.tokens[half, call.layer] += absent.sum(0).double().cpu()
        self.calls[call.layer] += 1

    @property
    def table(self) -> Tensor:
        """See the class."""
        mean = self.sums.sum(0) / (self.tokens.sum(0) + PRIOR)[..., None]
        return (mean * self.agreement[..., None]).float()

    @property
    def agreement(self) -> Tensor:
        """a (L, H + 1, H): 1 where both halves have the same mean, 0 where their means have nothing in common."""
        one, other = self.sums / self.tokens.clamp(min=1)[..., None]
        size = one.square().sum(-1) + other.square().sum(-1)
        return (2 * (one * other).sum(-1) / size.clamp(min=1e-30)).clamp(min=0)


def without(scores: Tensor) -> Tensor:
    """Which heads a token does without, (…, H + 1, H) in 0 and 1 for k = 0 … H: the k of lowest score, of equal ones the last.

    >>> without(torch.tensor([2.0, 1.0])).tolist()
    [[0.0, 0.0], [0.0, 1.0], [1.0, 1.0]]
    """
    H = scores.shape[-1]
    order = scores.sort(dim=-1, descending=True, stable=True).indices
    place = torch.empty_like(order).scatter_(-1, order, torch.arange(H, device=order.device).expand_as(order))
    kept = H - torch.arange(H + 1, device=order.device)  # by k
    return (place[..., None, :] >= kept[:, None]).to(scores.dtype)


def _real(call: HeadCall, values: Tensor) -> Tensor:
    """Values (B, N, …) of real tokens, (T, …)."""
    real = call.real_tokens()
    return values.flatten(0, 1) if real is None else values[real]
