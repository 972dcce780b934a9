"""How steady and how sure a routing is: measures for any router, given as `Routing`, records or plain index tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from headwise.errors import RouteError
from headwise.route._losses import entropy_loss
from headwise.route._routing import Routing

Mode = Literal["soft", "strict", "top1"]


@torch.no_grad()
def routing_fluctuation(a: Routing | Tensor, b: Routing | Tensor, mode: Mode = "soft") -> float:
    """Share of the routing of the same tokens that differs between two checkpoints (or inputs, or models).

    "soft": 1 − |A ∩ B| / k, mean over tokens; "strict": share of tokens whose set differs at all; "top1": share whose
    first unit differs. Index tensors are (..., k), units in any order but for "top1", where the best stands first;
    records of `observe_experts` are such. Raises RouteError for different shapes.

    >>> routing_fluctuation(torch.tensor([[0, 1], [2, 3]]), torch.tensor([[1, 0], [2, 0]]))
    0.25
    """
    if mode not in get_args(Mode):
        raise RouteError(f"mode is {mode!r}; it must be 'soft', 'strict' or 'top1'")
    one, other = _flat(a), _flat(b)
    if one.shape != other.shape or not one.numel():
        raise RouteError(
            f"a has {tuple(one.shape)} and b {tuple(other.shape)} (tokens, k); they must agree and be real"
        )
    if mode == "top1":
        return float((one[:, 0] != other[:, 0]).double().mean())
    common = (one[:, :, None] == other[:, None, :]).any(-1).double()  # (T, k): is a's unit among b's?
    if mode == "strict":
        return 1 - float(common.all(-1).double().mean())
    return 1 - float(common.mean())


def routing_agreement(a: Routing | Tensor, b: Routing | Tensor, mode: Mode = "soft") -> float:
    """1 − fluctuation: how much of the routing a perturbed input keeps."""
    return 1 - routing_fluctuation(a, b, mode)


def fluctuation_curve(checkpoints: Sequence[Routing | Tensor], mode: Mode = "soft") -> list[float]:
    """Fluctuation from each checkpoint to the next, on one fixed set of tokens."""
    if len(checkpoints) < 2:
        raise RouteError(f"{len(checkpoints)} checkpoints; fluctuation needs at least two")
    return [routing_fluctuation(a, b, mode) for a, b in zip(checkpoints, checkpoints[1:], strict=False)]


@torch.no_grad()
def routing_entropy(routing: Routing | Tensor, *, fraction: bool = False) -> float:
    """Mean entropy of the tokens' distributions over units, in nats or as a fraction of ln E.

    A tensor holds probabilities (..., E), such as `record.probs(layer)`.

    >>> round(routing_entropy(torch.full((3, 4), 0.25), fraction=True), 6)
    1.0
    """
    if isinstance(routing, Routing):
        probs, real = routing.probs, routing.real
    else:
        probs, real = routing.reshape(1, -1, routing.shape[-1]), None
    if not torch.allclose(probs.sum(-1), torch.ones_like(probs[..., 0]), atol=1e-2):
        raise RouteError("probs do not sum to 1 over the last dimension; give probabilities of all units")
    entropy = float(entropy_loss(probs.double(), real))
    return entropy / float(torch.tensor(probs.shape[-1]).double().log()) if fraction else entropy


def _flat(routing: Routing | Tensor) -> Tensor:
    """(T, k) units of the real tokens; unused slots are -1 and differ from everything."""
    if isinstance(routing, Tensor):
        if routing.ndim < 2 or routing.is_floating_point():
            raise RouteError(f"index has {routing.dtype} {tuple(routing.shape)}; it must be integers (..., k)")
        return routing.reshape(-1, routing.shape[-1])
    index = routing.index
    if routing.active is not None:
        index = index.masked_fill(~routing.active, -1)
    index = index.reshape(-1, routing.k)
    return index if routing.real is None else index[routing.real.reshape(-1)]
