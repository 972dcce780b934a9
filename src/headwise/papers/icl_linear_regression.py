"""Paper 08, in-context linear regression with multi-head softmax attention (He et al. 2025, arXiv 2503.12734)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from headwise import ablate
from headwise.models.icl_regression import Circuits, circuit_forward
from headwise.models.icl_theory import (
    attention_predictor,
    first_order_eta,
    gd_optimum,
    gradient_step,
    ridge,
    single_head_optimum,
)
from headwise.models.icl_training import RegressionRun, train_regression
from headwise.papers._run import Measured, device_of, reproduces
from headwise.papers.catalogue import Paper
from headwise.papers.reproduction import Check
from headwise.score.icl_regression import patterns, share_in_powers, superposition
from headwise.tasks.regression import Regression

PAPER = Paper(
    slug="icl-linear-regression",
    status="works",
    api="headwise.score.icl_regression, headwise.models.icl_training.train_regression, headwise.models.icl_regression.RegressionModel, "
    "headwise.models.icl_theory.approx_loss, headwise.models.icl_theory.gradient_step, headwise.tasks.regression.Regression",
    claim="Two softmax heads trained on in-context regression become a positive and a negative one of equal size and zero sum, which "
    "together are one step of debiased gradient descent: better than one head, and at lengths never seen, where linear attention breaks; "
    "and two tasks share a head where there are fewer heads than two a task",
)
LENGTHS = (20, 40, 80, 160)
SIZES: dict[str, dict[str, Any]] = {
    "cpu": {"seeds": 3, "steps": 3500, "count": 30_000},
    "gpu": {"seeds": 8, "steps": 20_000, "count": 400_000},
}
CHECKS = (
    Check("two heads reach the risk of gradient descent", "risk_two_heads_worst", "<=", 0.262),
    Check("and no less than is possible for it", "risk_two_heads_best", ">=", 0.235),
    Check("one head does not", "risk_one_head_best", ">", 0.38),
    Check("two heads are much better than one", "ratio_one_to_two_heads", ">=", 1.5),
    Check("opposite signs in every seed", "seeds_with_opposite_signs", "==", 1),
    Check("zero sum", "relative_sum_of_mu_worst", "<", 0.1),
    Check("the step size of theory, least", "eta_least", ">=", 0.80),
    Check("the step size of theory, most", "eta_most", "<=", 0.95),
    Check("homogeneous diagonal", "relative_spread_of_omega_worst", "<=", 0.1),
    Check("debiased descent explains the predictions", "unexplained_by_debiased_gd", "<=", 0.02),
    Check("better than plain descent does", "unexplained_by_debiased_gd", "<", "unexplained_by_plain_gd"),
    Check("every head matters", "loss_ratio_of_ablating_a_head_least", ">=", 1.5),
    Check("four heads do the same", "gap_four_to_two_heads", "<=", 0.01),
    Check("longer is better, 20 to 40", "risk_two_heads_40", "<", "risk_two_heads_20"),
    Check("40 to 80", "risk_two_heads_80", "<", "risk_two_heads_40"),
    Check("80 to 160", "risk_two_heads_160", "<", "risk_two_heads_80"),
    Check("linear attention as trained breaks", "risk_linear_160", ">", "risk_linear_40"),
    Check("three heads share two tasks in every seed", "shared_heads_of_three_least", ">=", 1),
    Check("nearly as well as four, best seeds", "ratio_three_to_four_heads_best", "<=", 1.1),
    Check("better than one head a task", "risk_two_tasks_three_heads_best", "<", "risk_two_tasks_two_heads_best"),
    Check("skewed covariates are preconditioned", "share_in_powers_of_covariance", ">=", 0.95),
)


@reproduces(PAPER, CHECKS)
def reproduce(scale: str = "cpu", *, seed: int = 0, progress: bool = False) -> Measured:
    """Train and measure. "cpu": 3 seeds of 3500 steps, 1-3 minutes. "gpu": 8 seeds of 20 000 steps."""
    return measure(device=device_of(scale), seed=seed, progress=progress, **SIZES[scale])


def measure(
    *, seeds: int, steps: int, count: int, device: str = "cpu", seed: int = 0, progress: bool = False
) -> tuple[dict[str, float], dict[str, float]]:
    """(metrics, baselines) of all trainings; d = 5, L = 40, noise 0.1."""
    task = Regression()
    options: dict[str, Any] = {"seeds": seeds, "steps": steps, "seed": seed, "device": device, "progress": progress}
    runs = {heads: train_regression(task, heads=heads, **options) for heads in (1, 2, 4)}
    linear = train_regression(task, heads=1, linear=True, **options)
    risks = {heads: run.risk(count=count) for heads, run in runs.items()}
    metrics = {
        "risk_two_heads": float(risks[2].mean()),
        "risk_two_heads_worst": float(risks[2].max()),
        "risk_two_heads_best": float(risks[2].min()),
        "risk_four_heads": float(risks[4].mean()),
        "gap_four_to_two_heads": float((risks[4].mean() - risks[2].mean()).abs()),
        "ratio_one_to_two_heads": float(risks[1].mean() / risks[2].mean()),
        "loss_ratio_of_ablating_a_head_least": ablated(runs[2], seed),
    }
    metrics |= shapes(runs[2]) | predictions(runs[2], seed) | lengths("two_heads", runs[2], count)
    baselines = {
        "risk_one_head": float(risks[1].mean()),
        "risk_one_head_best": float(risks[1].min()),
        **lengths("linear", linear, count, rescale=False),
        "risk_linear_160_rescaled": float(linear.risk(length=160, count=count).mean()),
        **closed_forms(task, count),
    }
    both, alone = two_tasks(options, count)
    return metrics | both | skewed(options, count), baselines | alone


def shapes(run: RegressionRun) -> dict[str, float]:
    """The emergent pattern of two heads: signs, zero sum, step size, homogeneous diagonal, and what is outside it."""
    found = patterns(run.circuits, run.task.dim)
    omega, mu = found.omega, found.mu  # (S, 2)
    opposite = (omega[:, 0] * omega[:, 1] < 0) & (mu[:, 0] * mu[:, 1] < 0) & (omega * mu > 0).all(1)
    eta = (omega * mu).sum(1)
    return {
        "seeds_with_opposite_signs": float(opposite.double().mean()),
        "relative_sum_of_mu_worst": float((mu.sum(1).abs() / mu.abs().amax(1)).max()),
        "eta_least": float(eta.min()),
        "eta_most": float(eta.max()),
        "relative_spread_of_omega_worst": float((found.omega_std / omega.abs()).max()),
        "largest_other_entry_of_kq": float(found.kq_rest.max()),
        "largest_other_entry_of_ov": float(found.ov_rest.max()),
    }


@torch.no_grad()
def predictions(run: RegressionRun, seed: int, count: int = 20_000) -> dict[str, float]:
    """How much of the variance of the trained layer's predictions the closed forms leave unexplained; the mean over seeds."""
    q = run.weights.q
    batch = run.task.draw(1, count, generator=torch.Generator(q.device).manual_seed(seed + 77))
    z, z_q = (t.expand(len(q), *t.shape[1:]) for t in (batch.z, batch.z_q))
    trained = circuit_forward(run.circuits, z, z_q).sum(-1)[..., 0]  # (S, B)
    d = run.task.dim
    x, y, x_q = batch.z[0, :, :, :d], batch.z[0, :, :, d], batch.z_q[0, :, :d]
    found = patterns(run.circuits, d)
    eta = float((found.omega * found.mu).sum(1).mean())
    smoother = torch.stack([attention_predictor(w, m, x, y, x_q) for w, m in zip(found.omega, found.mu, strict=True)])

    def left(guess: Tensor) -> float:
        return float(((trained - guess).square().mean(1) / trained.var(1)).mean())

    return {
        "unexplained_by_debiased_gd": left(gradient_step(eta, x, y, x_q, debiased=True)),
        "unexplained_by_plain_gd": left(gradient_step(eta, x, y, x_q)),
        "unexplained_by_omega_and_mu": left(smoother),
    }


@torch.no_grad()
def ablated(run: RegressionRun, seed: int, count: int = 20_000) -> float:
    """The least factor by which the risk grows when one head is taken out, through the same call as for any model."""
    q = run.weights.q
    batch = run.task.draw(count, generator=torch.Generator(q.device).manual_seed(seed + 78))
    factors = []
    for s in range(len(q)):
        model = run.model(s).to(q.device)
        intact = (model(batch.z, batch.z_q) - batch.y).square().mean()
        for head in range(model.config.heads):
            with ablate(model, f"L0H{head}"):
                factors.append(float((model(batch.z, batch.z_q) - batch.y).square().mean() / intact))
    return min(factors)


def lengths(name: str, run: RegressionRun, count: int, *, rescale: bool = True) -> dict[str, float]:
    """Risk at lengths that the weights were not trained at."""
    return {f"risk_{name}_{n}": float(run.risk(length=n, count=count, rescale=rescale).mean()) for n in LENGTHS}


def closed_forms(task: Regression, count: int, chunk: int = 5_000) -> dict[str, float]:
    """Risks of what theory names, the same data for all, and its exact numbers."""
    sizes: Any = {"dim": task.dim, "length": task.length, "noise": task.noise}
    eta, exact = gd_optimum(**sizes)
    omega, mu = (torch.tensor([value]) for value in single_head_optimum(**sizes))
    generator, total = torch.Generator().manual_seed(5), torch.zeros(4, dtype=torch.float64)
    rounds = max(1, count // chunk)
    for _ in range(rounds):
        batch = task.draw(chunk, generator=generator)
        x, y, x_q = batch.z[..., : task.dim], batch.z[..., task.dim], batch.z_q[:, : task.dim]
        guesses = (
            gradient_step(eta, x, y, x_q), gradient_step(eta, x, y, x_q, debiased=True),
            attention_predictor(omega, mu, x, y, x_q), ridge(task.noise, x, y, x_q),
        )  # fmt: skip
        total += torch.stack([(g - batch.y[:, 0]).square().mean().double() for g in guesses])
    names = ("risk_plain_gd", "risk_debiased_gd", "risk_single_head_closed_form", "risk_bayes")
    return {
        **dict(zip(names, (total / rounds).tolist(), strict=True)),
        "risk_gd_exact": exact,
        "eta_exact": eta,
        "eta_first_order": first_order_eta(**sizes),
    }


def two_tasks(options: dict[str, Any], count: int) -> tuple[dict[str, float], dict[str, float]]:
    """Two overlapping tasks with two, three and four heads: who shares, and at what price."""
    task = Regression.two_tasks()
    runs = {heads: train_regression(task, heads=heads, **options) for heads in (2, 3, 4)}
    risks = {heads: run.risk(count=count) / task.tasks for heads, run in runs.items()}  # (S,), the mean over the tasks
    shared = {
        heads: [len(superposition(c, task.supports, task.dim).shared()) for c in _each(run)]
        for heads, run in runs.items()
    }
    best = {
        heads: float(values.min()) for heads, values in risks.items()
    }  # some starts are still stuck where training ends
    metrics = {
        "risk_two_tasks_three_heads": float(risks[3].mean()),
        "risk_two_tasks_three_heads_best": best[3],
        "ratio_three_to_four_heads_best": best[3] / best[4],
        "shared_heads_of_three_least": float(min(shared[3])),
    }
    baselines = {
        "risk_two_tasks_two_heads": float(risks[2].mean()),
        "risk_two_tasks_two_heads_best": best[2],
        "risk_two_tasks_four_heads": float(risks[4].mean()),
        "shared_heads_of_four_mean": sum(shared[4]) / len(shared[4]),
    }
    return metrics, baselines


def _each(run: RegressionRun) -> list[Circuits]:
    return [Circuits(kq, ov) for kq, ov in zip(*run.circuits, strict=True)]


def skewed(options: dict[str, Any], count: int) -> dict[str, float]:
    """Covariates with S_ij = 0.5^|i-j|: is KQ a polynomial of S, and not just a multiple of the identity?"""
    task = Regression(rho=0.5)
    run = train_regression(task, heads=2, **options)
    S = task.covariance().to(run.circuits.kq.device)
    return {
        "share_in_powers_of_covariance": float(share_in_powers(run.circuits.kq, S).min()),
        "share_in_identity_alone": float(share_in_powers(run.circuits.kq, S, degree=0).mean()),
        "risk_skewed_two_heads": float(run.risk(count=count).mean()),
    }
