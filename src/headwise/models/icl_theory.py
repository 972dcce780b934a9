"""What the in-context regression layer should come to: estimators, the approximate population loss, exact risks in closed form.

With S(w) = sum_l softmax_l(w x_l·x_q) y_l the layer that has KQ_h = diag(omega_h I, 0) and OV_h = (0, …, 0, mu_h) predicts
sum_h mu_h S(omega_h). Two heads ±omega with mu_1 = -mu_2 = mu give, to first order in omega, one step of gradient descent on centred
covariates, eta/L sum_l y_l (x_l - mean x)·x_q with eta = 2 omega mu.

Letters: B sequences, L pairs, d covariates, H heads; noise is the variance of the noise. Conventions of `tasks.regression`, single task.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from headwise.checks import finite, whole
from headwise.errors import TaskError

# -- estimators: x (B, L, d), y (B, L), x_q (B, d) -> (B,) ---------------------------------------------------------------


def attention_predictor(omega: Tensor, mu: Tensor, x: Tensor, y: Tensor, x_q: Tensor) -> Tensor:
    """sum_h mu_h S(omega_h); omega and mu (H,).

    >>> x, y = torch.eye(2)[None], torch.tensor([[1.0, 3.0]])
    >>> attention_predictor(torch.tensor([0.0]), torch.tensor([2.0]), x, y, torch.ones(1, 2)).item()
    4.0
    """
    logits = torch.einsum("bld,bd->bl", x, x_q)
    rows = (omega[:, None, None] * logits).softmax(-1)  # (H, B, L)
    return torch.einsum("h,hbl,bl->b", mu, rows, y)


def gradient_step(eta: float, x: Tensor, y: Tensor, x_q: Tensor, *, debiased: bool = False) -> Tensor:
    """eta/L sum_l y_l x_l·x_q: one step of gradient descent from 0; `debiased` takes the mean of x away first."""
    centred = x - x.mean(1, keepdim=True) if debiased else x
    return eta / x.shape[1] * torch.einsum("bl,bld,bd->b", y, centred, x_q)


def ridge(noise: float, x: Tensor, y: Tensor, x_q: Tensor) -> Tensor:
    """x_q·(X^T X + noise d I)^-1 X^T y: the posterior mean, which nothing beats."""
    d = x.shape[-1]
    gram = x.mT @ x + noise * d * torch.eye(d, dtype=x.dtype, device=x.device)
    beta = torch.linalg.solve(gram, x.mT @ y[..., None])[..., 0]
    return (beta * x_q).sum(-1)


def single_head_optimum(dim: int, length: int, noise: float) -> tuple[float, float]:
    """(omega, mu) of one head at its best: a kernel smoother with omega = 1/sqrt(d).

    >>> tuple(round(value, 3) for value in single_head_optimum(5, 40, 0.1))
    (0.447, 1.628)
    """
    _check(dim, length, noise)
    return dim**-0.5, dim**0.5 / (1 + (1 + noise) * dim * math.e / length)


# -- the approximate population loss of omega and mu (H,) -----------------------------------------------------------------


def approx_loss(omega: Tensor, mu: Tensor, *, dim: int, length: int, noise: float) -> Tensor:
    """1 + s - 2 mu·omega + mu^T M mu,  M = omega omega^T + (1+s)/L exp(d omega omega^T), s the noise, exp entry by entry."""
    return 1 + noise - 2 * mu @ omega + mu @ _moment(omega, dim, length, noise) @ mu


def mu_star(omega: Tensor, *, dim: int, length: int, noise: float) -> Tensor:
    """M^-1 omega: the best mu for an omega, where the loss is 1 + s - mu·omega.

    >>> mu_star(torch.tensor([0.13, -0.13], dtype=torch.float64), dim=5, length=40, noise=0.1)[0].item().__round__(5)
    3.38075
    """
    return torch.linalg.solve(_moment(omega, dim, length, noise), omega)


def approx_gradients(omega: Tensor, mu: Tensor, *, dim: int, length: int, noise: float) -> tuple[Tensor, Tensor]:
    """(d/d omega, d/d mu) of half the loss, by hand."""
    spread = (dim * omega[:, None] * omega).exp() * (mu[:, None] * mu)
    by_omega = -mu + (mu @ omega) * mu + dim * (1 + noise) / length * spread @ omega
    return by_omega, -omega + _moment(omega, dim, length, noise) @ mu


def gradient_flow(
    omega: Tensor, mu: Tensor, *, dim: int, length: int, noise: float, lr: float = 1e-2, steps: int = 2000
) -> tuple[Tensor, Tensor, Tensor]:
    """(omega (steps+1, H), mu (steps+1, H), loss (steps+1,)) of small steps down the approximate loss."""
    _check(dim, length, noise)
    sizes: Any = {"dim": dim, "length": length, "noise": noise}
    omegas, mus, losses = [omega], [mu], [approx_loss(omega, mu, **sizes)]
    for _ in range(whole("steps", steps, 1, TaskError)):
        by_omega, by_mu = approx_gradients(omega, mu, **sizes)
        omega, mu = omega - lr * by_omega, mu - lr * by_mu
        omegas.append(omega)
        mus.append(mu)
        losses.append(approx_loss(omega, mu, **sizes))
    return torch.stack(omegas), torch.stack(mus), torch.stack(losses)


def _moment(omega: Tensor, dim: int, length: int, noise: float) -> Tensor:
    _check(dim, length, noise)
    outer = omega[:, None] * omega
    return outer + (1 + noise) / length * (dim * outer).exp()


# -- exact risks ------------------------------------------------------------------------------------------------------------


def gd_risk(eta: float, *, dim: int, length: int, noise: float) -> float:
    """Mean squared error of one step of plain gradient descent, exact for every L."""
    _check(dim, length, noise)
    return 1 + noise - 2 * eta + eta**2 * (1 + (dim + 1) / length + noise * dim / length)


def gd_optimum(*, dim: int, length: int, noise: float) -> tuple[float, float]:
    """(eta, risk) where `gd_risk` is lowest.

    >>> eta, risk = gd_optimum(dim=5, length=40, noise=0.1)
    >>> round(eta, 3), round(risk, 4)
    (0.86, 0.2398)
    """
    _check(dim, length, noise)
    eta = 1 / (1 + (dim + 1) / length + noise * dim / length)
    return eta, gd_risk(eta, dim=dim, length=length, noise=noise)


def first_order_eta(*, dim: int, length: int, noise: float) -> float:
    """The eta of two heads in the limit of small omega: 1 / (1 + (1+s) d/L)."""
    _check(dim, length, noise)
    return 1 / (1 + (1 + noise) * dim / length)


def bayes_limit(ratio: float, noise: float) -> float:
    """Risk of ridge, with the label noise of the query, as d and L grow with d/L = ratio (Marchenko and Pastur).

    >>> round(bayes_limit(0.125, 0.0), 6)
    0.0
    """
    if finite("ratio", ratio, TaskError) <= 0 or finite("noise", noise, TaskError) < 0:
        raise TaskError(f"ratio={ratio}, noise={noise}: ratio must be above 0 and noise at least 0")
    return 0.5 * (noise + (ratio - 1) / ratio + math.sqrt(4 * noise + (noise + (1 - ratio) / ratio) ** 2))


def _check(dim: int, length: int, noise: float) -> None:
    whole("dim", dim, 1, TaskError)
    whole("length", length, 1, TaskError)
    if finite("noise", noise, TaskError) < 0:
        raise TaskError(f"noise is {noise}; it is a variance, at least 0")
