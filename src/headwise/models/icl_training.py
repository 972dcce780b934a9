"""Train the in-context regression layer: fresh data every step, Adam, several seeds at once, dynamics recorded.

Letters: S seeds, H heads, T tasks, n = d + T, R records.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from headwise.checks import finite, whole
from headwise.errors import TaskError
from headwise.models.icl_regression import Circuits, RegressionModel, Weights, circuit_forward
from headwise.progress import track
from headwise.tasks.regression import Regression


@dataclass(frozen=True, eq=False)
class RegressionRun:
    """S trained models: weights with a leading S, and what was recorded on the way.

    steps (R,); kq (R, S, H, n, n); ov (R, S, T, H, n): the circuits as they were.
    """

    task: Regression
    weights: Weights
    steps: Tensor
    kq: Tensor
    ov: Tensor
    linear: bool = False

    @property
    def circuits(self) -> Circuits:
        """At the end: kq (S, H, n, n), ov (S, T, H, n)."""
        return self.weights.circuits()

    def model(self, seed: int = 0) -> RegressionModel:
        """One of them as a transformers model. A linear one is none: TaskError."""
        if self.linear:
            raise TaskError("linear attention has no softmax to hand over: use the circuits of the run")
        return RegressionModel.of(Weights(*(w[seed] for w in self.weights)))

    def omega(self) -> Tensor:
        """(R, S, H): mean of the first d diagonal entries of KQ."""
        d = self.task.dim
        return self.kq.diagonal(dim1=-2, dim2=-1)[..., :d].mean(-1)

    def mu(self) -> Tensor:
        """(R, S, H): the last entry of OV, of a single task."""
        return self.ov[:, :, 0, :, -1]

    @torch.no_grad()
    def risk(
        self, *, length: int | None = None, rescale: bool = True, count: int = 50_000, chunk: int = 5_000, seed: int = 1
    ) -> Tensor:
        """(S,) mean squared error on fresh data, summed over tasks; `length` in place of the trained one.

        rescale: of linear attention, divide by the length at hand; else by the trained one, which is what its bare weights do.
        """
        q = self.weights.q
        generator = torch.Generator(q.device).manual_seed(seed)
        grown = (length or self.task.length) / self.task.length if self.linear and not rescale else 1.0
        circuits = Circuits(*(c.detach() for c in self.circuits))
        total = torch.zeros(len(q), dtype=torch.float64)
        for _ in range(max(1, count // chunk)):
            batch = self.task.draw(1, chunk, generator=generator, length=length)
            z, z_q = (x.expand(len(q), *x.shape[1:]) for x in (batch.z, batch.z_q))
            heads = circuit_forward(circuits, z, z_q, linear=self.linear)
            total += (grown * heads.sum(-1) - batch.y).square().sum(-1).mean(1).double().cpu()
        return total / max(1, count // chunk)


def train_regression(
    task: Regression | None = None,
    *,
    heads: int = 2,
    seeds: int = 1,
    steps: int = 5000,
    lr: float = 1e-2,
    batch: int = 256,
    linear: bool = False,
    record: int = 100,
    device: Any = "cpu",
    seed: int = 0,
    progress: bool = False,
) -> RegressionRun:
    """Adam with a learning rate that falls linearly to 0, on fresh sequences, from torch's linear-layer initialisation.

    heads: H. seeds: models trained side by side, each with data and start of its own. record: steps between two records.

    >>> run = train_regression(Regression(dim=2, length=4), heads=2, seeds=2, steps=3, record=1)
    >>> run.omega().shape, run.model(1).config.heads
    (torch.Size([4, 2, 2]), 2)
    """
    task = task or Regression()
    for name, value in (("heads", heads), ("seeds", seeds), ("steps", steps), ("batch", batch), ("record", record)):
        whole(name, value, 1, TaskError)
    if finite("lr", lr, TaskError) <= 0:
        raise TaskError(f"lr is {lr}; it must be above 0")
    weights = _start(task, heads, seeds, seed, device)
    adam = torch.optim.Adam(weights, lr=lr, betas=(0.9, 0.999))
    schedule = torch.optim.lr_scheduler.LinearLR(adam, 1.0, 0.0, total_iters=steps)
    generator = torch.Generator(device).manual_seed(seed + 1)
    kept: list[tuple[int, Circuits]] = []
    for step in track(range(steps + 1), "regression", progress):
        circuits = weights.circuits()
        if step % record == 0 or step == steps:
            kept.append((step, Circuits(*(c.detach().cpu() for c in circuits))))
        if step == steps:
            break
        data = task.draw(seeds, batch, generator=generator)
        error = circuit_forward(circuits, data.z, data.z_q, linear=linear).sum(-1) - data.y
        loss = error.square().sum(-1).mean(1).sum()  # seeds do not touch each other: the sum trains each alone
        adam.zero_grad()
        loss.backward()
        adam.step()
        schedule.step()
    done = Weights(*(w.detach() for w in weights))
    at = torch.tensor([s for s, _ in kept])
    kq, ov = (torch.stack([c[i] for _, c in kept]) for i in (0, 1))
    return RegressionRun(task, done, at, kq, ov, linear)


def _start(task: Regression, heads: int, seeds: int, seed: int, device: Any) -> Weights:
    """Uniform in ±1/sqrt(fan in), as torch's linear layers start; drawn on the CPU, so that every device starts alike."""
    n, generator = task.size, torch.Generator().manual_seed(seed)

    def uniform(*shape: int, fan_in: int) -> Tensor:
        drawn = (2 * torch.rand(*shape, generator=generator) - 1) / fan_in**0.5
        return drawn.to(device).requires_grad_(True)

    q, k, v = (uniform(seeds, heads, n, n, fan_in=n) for _ in range(3))
    return Weights(q, k, v, uniform(seeds, task.tasks, heads, n, fan_in=heads * n))
