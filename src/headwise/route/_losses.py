"""Choosing units (heads or experts) and the losses that keep their load even; one file for every router.

Every loss is a function of tensors: nothing is kept between calls. `real` (B, N) bool leaves padding out. f (who was
chosen) is detached, P (how probable) has the gradient.

Letters: B batch, N tokens, E units to choose from, K chosen a token.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from headwise.errors import RouteError

Scaling = Literal["official", "paper", "unit"]
Scope = Literal["batch", "sequence", "global"]


def select(scores: Tensor, count: int) -> Tensor:
    """The `count` largest of scores (..., E) as a 0/1 mask of the same dtype; of equal scores the lowest index wins.

    >>> select(torch.tensor([1.0, 3.0, 3.0, 3.0]), 2).tolist()
    [0.0, 1.0, 1.0, 0.0]
    """
    if not scores.is_floating_point():
        raise RouteError(f"scores of heads are {scores.dtype}; they must be floating point")
    if not 0 <= count <= scores.shape[-1]:
        raise RouteError(f"{count} heads cannot be chosen of {scores.shape[-1]}")
    order = scores.detach().sort(dim=-1, descending=True, stable=True).indices[..., :count]
    return torch.zeros_like(scores).scatter(-1, order, 1.0)


def balance_loss(
    probs: Tensor, mask: Tensor, real: Tensor | None = None, scaling: Scaling = "official", scope: Scope = "batch"
) -> Tensor:
    """Load balance: sum_i P_i f_i over all real tokens, in one of three scalings.

    P_i is the mean probability of unit i (with gradient), f_i the share of tokens that chose it (without). At uniform
    routing the value is K for "official" (times E; equation 8 of MoH and its code), K / E for "paper", 1 for "unit"
    (times E / K; Switch, GShard, MegaBlocks). `scope`: over the whole "batch", per "sequence" and then averaged
    (DeepSeek-V3), or with f averaged over all ranks of the process group ("global"; P stays local, so that the
    gradients that data parallelism averages are those of the global loss). probs, mask (B, N, E).

    >>> probs, mask = torch.full((1, 2, 4), 0.25), torch.tensor([[[1.0, 1, 0, 0], [0, 0, 1, 1]]])
    >>> [float(balance_loss(probs, mask, scaling=name)) for name in ("official", "paper", "unit")]
    [2.0, 0.5, 1.0]
    """
    if scaling not in get_args(Scaling):
        raise RouteError(f"scaling is {scaling!r}; it must be 'official', 'paper' or 'unit'")
    if scope not in get_args(Scope):
        raise RouteError(f"scope is {scope!r}; it must be 'batch', 'sequence' or 'global'")
    if scope == "sequence":
        rows = range(len(probs))
        each = [
            balance_loss(probs[b : b + 1], mask[b : b + 1], None if real is None else real[b : b + 1], scaling)
            for b in rows
        ]
        return torch.stack(each).mean()
    P, f = _mean(probs, real), _mean(mask.detach(), real)
    f = _over_ranks(f, mask, real) if scope == "global" else f
    total = (P * f).sum()
    if scaling == "unit":
        chosen = f.sum()
        return total * probs.shape[-1] / torch.where(chosen > 0, chosen, torch.ones_like(chosen))
    return total * probs.shape[-1] if scaling == "official" else total


def importance_loss(gates: Tensor, real: Tensor | None = None) -> Tensor:
    """Squared coefficient of variation of the total weight of each unit: Var(Imp) / (mean(Imp)² + 1e-10).

    Shazeer et al. 2017, equation 7; gates (B, N, E) are the weights, 0 where a unit was not chosen.
    """
    return _cv2(_sum(gates, real))


def load_loss(clean: Tensor, noisy: Tensor, std: Tensor, k: int, real: Tensor | None = None) -> Tensor:
    """Squared coefficient of variation of the smooth load of noisy top-k (Shazeer et al. 2017, appendix A).

    P(i is chosen) = Φ((clean_i − the k-th largest of the noisy logits without i) / std_i); all (B, N, E). With k = E
    every unit is always chosen and the loss is 0.
    """
    if k >= clean.shape[-1]:
        return clean.sum() * 0
    top = noisy.topk(k + 1, dim=-1).values
    inside, outside = top[..., k : k + 1], top[..., k - 1 : k]
    threshold = torch.where(noisy >= outside, inside, outside)  # without i, the bar for a chosen one is one lower
    chance = torch.special.ndtr((clean - threshold) / std)
    return _cv2(_sum(chance, real))


def z_loss(logits: Tensor, real: Tensor | None = None) -> Tensor:
    """Mean of logsumexp(logits)² over tokens (ST-MoE): keeps logits small. logits (B, N, E), float32 inside.

    >>> round(float(z_loss(torch.zeros(1, 1, 4))), 4)  # (ln 4)²
    1.9218
    """
    square = logits.to(torch.promote_types(logits.dtype, torch.float32)).logsumexp(-1, keepdim=True).square()
    return _mean(square, real).sum()


def information_loss(probs: Tensor, real: Tensor | None = None) -> Tensor:
    """Minus the mutual information of token and unit: mean_t H(p_t) − H(mean_t p_t), in nats (Mod-Squad, ModuleFormer).

    −ln E at sharp, balanced routing, 0 where routing does not depend on the token.
    """
    return entropy_loss(probs, real) + spread_loss(probs, real)


def entropy_loss(probs: Tensor, real: Tensor | None = None) -> Tensor:
    """Mean entropy of the tokens' distributions over units (nats): small where routers are sure."""
    return _mean(_entropy(probs)[..., None], real).sum()


def spread_loss(probs: Tensor, real: Tensor | None = None) -> Tensor:
    """Minus the entropy of the mean distribution (nats), −ln E at balance: SwitchHead's regulariser."""
    return -_entropy(_mean(probs, real))


def distil_loss(student: Tensor, index: Tensor, used: Tensor) -> Tensor:
    """Mean −log softmax(student)_e over the chosen units e: a small router learns another's choice.

    student (B, N, E) logits; index and used (B, N, k).
    """
    each = -student.log_softmax(-1).gather(-1, index)
    return (each * used.to(each.dtype)).sum() / used.sum().clamp(min=1).to(each.dtype)


def _entropy(p: Tensor) -> Tensor:
    return -torch.special.xlogy(p, p).sum(-1)


def _cv2(total: Tensor) -> Tensor:
    return total.var(unbiased=False) / (total.mean() ** 2 + 1e-10)


def _sum(x: Tensor, real: Tensor | None) -> Tensor:
    """Sum of (B, N, E) over the real tokens, (E,)."""
    return x.sum(dim=(0, 1)) if real is None else (x * real[..., None].to(x.dtype)).sum(dim=(0, 1))


def _mean(x: Tensor, real: Tensor | None) -> Tensor:
    """Mean of (B, N, E) over the real tokens, (E,); 0 where there are none."""
    if real is None:
        return x.mean(dim=(0, 1))
    return _sum(x, real) / real.sum().to(x.dtype).clamp(min=1)


def _over_ranks(f: Tensor, mask: Tensor, real: Tensor | None) -> Tensor:
    """f over the tokens of all ranks; unchanged without a process group."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return f
    tokens = f.new_tensor(float(mask.shape[0] * mask.shape[1])) if real is None else real.sum().to(f.dtype)
    both = torch.cat([f * tokens, tokens[None]])
    torch.distributed.all_reduce(both)
    return both[:-1] / both[-1].clamp(min=1)
