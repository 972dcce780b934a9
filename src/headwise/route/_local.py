"""What a head will do to a token, as far as it can be known before any attention is computed: features for a fitted router.

How a query meets its own key says how much the head will read its own token, how it meets the first key how much it
will rest on the attention sink; a head that rests there writes next to nothing. The key of a first token hardly depends on which
token it is (no rotation, a massive activation), so its mean f_k over first tokens of the fit stands in for it: features need
the token's own q, k and v alone, with or without a cache.

Letters: B batch, N tokens, H query heads, K kv heads, D head dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from headwise.attach import HeadCall
from headwise.errors import AttachError

STEPS = (-4.0, -2.0, 0.0)
"""Where the sigmoids of the logit to the first key stand: a softmax turns logits into mass by such a curve."""


def count(heads: int, kv_heads: int) -> int:
    """Number of features: 3 + 3 + 2 a query head, 2 a kv head, 1 of the position.

    >>> count(9, 3)
    79
    """
    return (5 + len(STEPS)) * heads + 2 * kv_heads + 1


def local_features(call: HeadCall, first: Tensor) -> Tensor:
    """Features (B, N, F) of a call's tokens; `first` (K, D): mean key of first tokens.

    For each head a = scale · q·k of the token itself, s = scale · q·f, |q|, σ(s + c) for c in STEPS, σ(s − a) and
    σ(s − log(1 + position)); |v| and |k| of each kv head; log(1 + position). Raises AttachError where heads are spread over ranks.
    """
    q, k, v = (_wide(t) for t in (call.q, own(call, call.k), call.own_values))
    H, K = q.shape[1], k.shape[1]
    if first.shape != (K, k.shape[-1]):
        raise AttachError(
            f"layer {call.layer}: the router knows a first key of {tuple(first.shape)}, this rank has kv heads and dimensions "
            f"{(K, k.shape[-1])}; features='queries' needs all heads in one place"
        )
    a = call.scale * (q * k.repeat_interleave(H // K, dim=1)).sum(-1)  # (B, H, N)
    s = call.scale * torch.einsum("bhnd,hd->bhn", q, first.to(q.dtype).repeat_interleave(H // K, dim=0))
    place = call.positions().clamp(min=0).to(q).log1p()[:, None]  # (1 or B, 1, N)
    place = place.expand(len(q), -1, -1)
    found = [
        a,
        s,
        q.norm(dim=-1),
        *(torch.sigmoid(s + c) for c in STEPS),
        torch.sigmoid(s - a),
        torch.sigmoid(s - place),
    ]
    return torch.cat([*found, v.norm(dim=-1), k.norm(dim=-1), place], dim=1).transpose(1, 2)


def own(call: HeadCall, keys: Tensor) -> Tensor:
    """The rows of the query tokens themselves among a call's keys (B, K, M, D): as `call.own_values` for values."""
    N = call.q.shape[2]
    at = 0 if keys.shape[2] == N else call.past - call.first_column
    return keys[:, :, at : at + N]


class FirstKeys:
    """Observer: mean key of first tokens, of every row that is read from its start; `table` (L, K, D), float32."""

    def __init__(self) -> None:
        self.sums: dict[int, Tensor] = {}
        self.rows = 0

    def __call__(self, call: HeadCall, out: Tensor) -> None:
        keys = call.k[:, :, 0].detach().double().sum(0).cpu()
        self.sums[call.layer] = self.sums.get(call.layer, torch.zeros_like(keys)) + keys
        self.rows += len(call.k) if call.layer == 0 else 0

    @property
    def table(self) -> Tensor:
        """See the class."""
        return torch.stack([self.sums[layer] for layer in sorted(self.sums)]).div(max(1, self.rows)).float()


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
