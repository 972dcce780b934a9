"""What each head of an in-context regression layer does, read off its weights (He et al. 2025, arXiv 2503.12734)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from headwise.attach import fingerprint
from headwise.checks import finite
from headwise.errors import ScoreError
from headwise.models.icl_regression import Circuits, RegressionModel
from headwise.registry import register
from headwise.units import HeadScores

Role = Literal["positive", "negative", "dummy"]


@register("score", "icl-regression", paper="08")
def icl_regression(model: nn.Module, tokenizer: Any, *, measure: Literal["omega", "mu", "eta"] = "omega") -> HeadScores:
    """How strongly, and with which sign, each head of a regression layer compares covariates.

        omega_h = mean of the first d diagonal entries of KQ_h,    mu_h = last entry of OV_h,    eta_h = omega_h mu_h

    measure: omega (sign tells positive from negative heads), mu, or eta, the head's part of the step size of gradient descent.
    `tokenizer` is not used. With several tasks mu is the entry of largest size among the tasks.

    Raises ScoreError for a model that is no `headwise.models.icl_regression.RegressionModel`.

    >>> from headwise.models.icl_regression import RegressionConfig
    >>> icl_regression(RegressionModel(RegressionConfig(dim=3, heads=4)), None).values.shape
    torch.Size([1, 4])
    """
    if not isinstance(model, RegressionModel):
        raise ScoreError(
            f"model is a {type(model).__name__}; these measures are of a RegressionModel (headwise.models.icl_regression)"
        )
    if measure not in ("omega", "mu", "eta"):
        raise ScoreError(f"measure={measure!r}; choose omega, mu or eta")
    found = patterns(model.circuits, model.config.dim)
    table = {"omega": found.omega, "mu": found.mu, "eta": found.omega * found.mu}[measure]
    data = f"weights, d = {model.config.dim}, {model.config.tasks} tasks"
    return HeadScores(
        values=table[None].detach().float(),
        method=f"icl-regression-{measure}",
        data=data,
        fingerprint=fingerprint(model),
    )


@dataclass(frozen=True)
class Patterns:
    """How close the circuits are to diag(omega I, 0) and (0, …, 0, mu); all tables (…, H).

    omega: mean of the first d diagonal entries of KQ; omega_std: their standard deviation; kq_rest: the largest other entry of KQ
    that can act (columns from d on meet the query's empty labels and never do);
    mu: the last entry of OV (of several tasks: the one of largest size); ov_rest: the largest entry of OV outside the last T.
    """

    omega: Tensor
    omega_std: Tensor
    kq_rest: Tensor
    mu: Tensor
    ov_rest: Tensor

    def roles(self, tolerance: float = 0.05) -> list[Role]:
        """Of one model: positive or negative by the sign of omega; dummy where |omega · mu| is below the tolerance."""
        finite("tolerance", tolerance, ScoreError)
        if self.omega.ndim != 1:
            raise ScoreError(f"roles are of one model, omega (H,); got {tuple(self.omega.shape)}")
        return [
            "dummy" if abs(w * m) < tolerance else "positive" if w > 0 else "negative"
            for w, m in zip(self.omega.tolist(), self.mu.tolist(), strict=True)
        ]


def patterns(circuits: Circuits, dim: int) -> Patterns:
    """Pattern measures of kq (…, H, n, n) and ov (…, T, H, n); d = dim."""
    kq, ov = circuits.kq.detach(), circuits.ov.detach()
    diagonal = kq.diagonal(dim1=-2, dim2=-1)[..., :dim]
    keep = torch.zeros(kq.shape[-2:], dtype=torch.bool, device=kq.device)
    keep[range(dim), range(dim)] = True
    keep[:, dim:] = True
    last = ov[..., dim:].transpose(-3, -2).flatten(-2)  # (…, H, T·T)
    mu = last.gather(-1, last.abs().argmax(-1, keepdim=True))[..., 0]
    return Patterns(
        diagonal.mean(-1),
        diagonal.std(-1, correction=0),
        kq.masked_fill(keep, 0.0).abs().amax((-2, -1)),
        mu,
        ov[..., :dim].abs().amax(-1).amax(-2),
    )


@dataclass(frozen=True)
class Superposition:
    """Which head serves which task: kq (H, T), mean diagonal on the covariates that only this task uses; ov (H, T), what it writes.

    strength (H, T) = |kq · ov| over the largest one. A head is shared where two tasks reach `share` of the strongest.
    """

    kq: Tensor
    ov: Tensor

    @property
    def strength(self) -> Tensor:
        """(H, T) in [0, 1]."""
        product = (self.kq * self.ov).abs()
        return product / product.max().clamp(min=torch.finfo(product.dtype).tiny)

    def shared(self, share: float = 0.2) -> list[int]:
        """Heads that serve more than one task."""
        return [h for h, count in enumerate((self.strength >= share).sum(-1).tolist()) if count > 1]


def superposition(circuits: Circuits, supports: tuple[tuple[int, int], ...], dim: int) -> Superposition:
    """Read out kq (H, n, n) and ov (T, H, n) of one model task by task."""
    if len(supports) < 2:
        raise ScoreError(f"supports={supports}; superposition is of two tasks or more")
    diagonal = circuits.kq.detach().diagonal(dim1=-2, dim2=-1)[:, :dim]  # (H, d)
    use = torch.zeros(len(supports), dim)
    for task, (first, stop) in enumerate(supports):
        use[task, first:stop] = 1
    alone = use * (use.sum(0) == 1)
    alone = torch.where(alone.sum(1, keepdim=True) > 0, alone, use).to(
        diagonal
    )  # nested supports have nothing of their own
    kq = diagonal @ alone.T / alone.sum(1)
    ov = circuits.ov.detach()[..., dim:].diagonal(dim1=0, dim2=-1)  # (H, T): task t's label into output t
    return Superposition(kq, ov)


def share_in_powers(kq: Tensor, covariance: Tensor, degree: int = 3) -> Tensor:
    """(…, H) share of the squared entries of KQ[:d, :d] that a polynomial of the covariance explains: is it preconditioned descent?"""
    d = len(covariance)
    powers = (
        torch.stack([torch.linalg.matrix_power(covariance.to(kq), k) for k in range(degree + 1)]).flatten(1).T
    )  # (d², k)
    target = kq.detach()[..., :d, :d].flatten(-2)[..., None]  # (…, d², 1)
    basis = torch.linalg.qr(powers)[0]
    explained = (basis.mT @ target).square().sum((-2, -1))
    return explained / target.square().sum((-2, -1)).clamp(min=torch.finfo(kq.dtype).tiny)
