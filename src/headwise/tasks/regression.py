"""In-context linear regression: sequences of (x, y) from a random linear model, and one more x whose y is asked for.

Single task:  beta ~ N(0, I/d),  x ~ N(0, S),  y = beta·x + e,  e ~ N(0, noise);  the y of the query is noisy too.
Several tasks (`supports`): y_i = beta_i·x[support_i],  beta_i ~ N(0, I) (not divided by its size d_i), noise of variance d_i·noise on the
context and none on the query. S_ij = rho^|i-j|. These are the conventions of the released code; they differ between the two cases.

Letters: B sequences (any leading shape), L pairs, d covariates, T tasks, n = d + T.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from headwise.checks import finite, whole
from headwise.errors import TaskError


class RegressionBatch(NamedTuple):
    """z (B, L, n) rows (x, y); z_q (B, n) = (x_q, 0); y (B, T) what z_q is to be answered with."""

    z: Tensor
    z_q: Tensor
    y: Tensor


@dataclass(frozen=True, kw_only=True)
class Regression:
    """The distribution of sequences; `draw` makes some.

    >>> task = Regression(dim=3, length=8)
    >>> batch = task.draw(4, generator=torch.Generator().manual_seed(0))
    >>> batch.z.shape, batch.z_q[:, -1].abs().sum().item(), batch.y.shape
    (torch.Size([4, 8, 4]), 0.0, torch.Size([4, 1]))
    """

    dim: int = 5
    length: int = 40
    noise: float = 0.1
    rho: float = 0.0
    supports: tuple[tuple[int, int], ...] = ()

    def __post_init__(self) -> None:
        whole("dim", self.dim, 1, TaskError)
        whole("length", self.length, 1, TaskError)
        if finite("noise", self.noise, TaskError) < 0:
            raise TaskError(f"noise is {self.noise}; it is a variance, at least 0")
        if not -1 < finite("rho", self.rho, TaskError) < 1:
            raise TaskError(f"rho is {self.rho}; it must lie inside (-1, 1)")
        for first, stop in self.supports:
            whole("the start of a support", first, 0, TaskError)
            whole("the end of a support", stop, first + 1, TaskError, high=self.dim)

    @classmethod
    def two_tasks(cls, *, dim: int = 6, d1: int = 4, d2: int = 4, length: int = 48, noise: float = 0.1) -> Regression:
        """The first d1 covariates serve task 1, the last d2 task 2; they overlap where d1 + d2 > dim."""
        for name, size in (("d1", d1), ("d2", d2)):
            whole(name, size, 1, TaskError, high=dim)
        return cls(dim=dim, length=length, noise=noise, supports=((0, d1), (dim - d2, dim)))

    @property
    def tasks(self) -> int:
        """T."""
        return max(1, len(self.supports))

    @property
    def size(self) -> int:
        """n = d + T, the size of a row and of a head."""
        return self.dim + self.tasks

    def covariance(self) -> Tensor:
        """S (d, d)."""
        places = torch.arange(self.dim)
        return torch.tensor(float(self.rho)) ** (places[:, None] - places).abs()

    def draw(
        self, *shape: int, generator: torch.Generator, length: int | None = None, dtype: torch.dtype = torch.float32
    ) -> RegressionBatch:
        """Fresh sequences (*shape, L, n) on the generator's device; `length` in place of the task's own."""
        L = self.length if length is None else whole("length", length, 1, TaskError)
        options = {"generator": generator, "device": generator.device, "dtype": dtype}
        x = torch.randn(*shape, L + 1, self.dim, **options)  # type: ignore[call-overload]
        if self.rho:
            x = x @ torch.linalg.cholesky(self.covariance().to(x)).T
        noise = self.noise**0.5 * torch.randn(*shape, L + 1, self.tasks, **options)  # type: ignore[call-overload]
        y = self._signal(x, shape, options) + self._scaled(noise)
        z = torch.cat([x, y], dim=-1)
        z_q = torch.cat([x[..., -1, :], torch.zeros_like(y[..., -1, :])], dim=-1)
        return RegressionBatch(z[..., :-1, :], z_q, y[..., -1, :])

    def _signal(self, x: Tensor, shape: tuple[int, ...], options: dict) -> Tensor:
        beta = torch.zeros(*shape, self.dim, self.tasks, device=x.device, dtype=x.dtype)
        for task, (first, stop) in enumerate(self.supports or ((0, self.dim),)):
            drawn = torch.randn(*shape, stop - first, **options)
            beta[..., first:stop, task] = drawn if self.supports else drawn / self.dim**0.5
        return x @ beta

    def _scaled(self, noise: Tensor) -> Tensor:
        if not self.supports:
            return noise
        sizes = torch.tensor([stop - first for first, stop in self.supports]).to(noise)
        noise = noise * sizes.sqrt()
        noise[..., -1, :] = 0
        return noise
