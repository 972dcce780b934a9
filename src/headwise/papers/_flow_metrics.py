"""Two judges of generated pictures: a small classifier, and the Fréchet distance of leading pixel components.

Letters: B pictures, C classes, P components.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def train_classifier(
    pixels: Tensor, labels: Tensor, classes: int, *, steps: int, batch: int = 128, seed: int = 0
) -> nn.Module:
    """A small convolutional classifier, trained on pictures with noise so that it does not mistake noise for texture."""
    device = pixels.device
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        features = (pixels.shape[-1] // 4) ** 2 * 32
        model = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Flatten(), nn.Linear(features, 64), nn.ReLU(), nn.Linear(64, classes),
        ).to(device)  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(steps):
        rows = torch.randint(len(pixels), (batch,), generator=generator)
        noise = torch.randn(batch, *pixels.shape[1:], generator=generator).to(device)
        loss = F.cross_entropy(model(pixels[rows] + 0.2 * noise), labels[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


def right_class(model: nn.Module, labels: Tensor) -> Callable[[Tensor], Tensor]:
    """The objective: probability (B,) of the right class of each picture (B, 1, S, S).

    Its logarithm has so heavy a tail that a search of a few dozen pictures learns the noise: on unseen noise nothing of the gain was left.
    """

    @torch.no_grad()
    def judge(pictures: Tensor) -> Tensor:
        return model(pictures.clamp(-1, 1)).softmax(-1).gather(1, labels[:, None])[:, 0]

    return judge


class Frechet:
    """|μ1 − μ2|² + tr(C1 + C2 − 2 (C1 C2)^½) between pictures and a reference, in the reference's P leading pixel components."""

    def __init__(self, reference: Tensor, components: int = 32):
        flat = reference.flatten(1).double()
        self.centre = flat.mean(0)
        centred = flat - self.centre
        self.axes = torch.linalg.eigh(centred.T @ centred)[1][:, -components:]
        self.mean, self.covariance = self._moments(reference)

    def _moments(self, pictures: Tensor) -> tuple[Tensor, Tensor]:
        points = (pictures.clamp(-1, 1).flatten(1).double() - self.centre) @ self.axes
        return points.mean(0), points.T.cov()

    def __call__(self, pictures: Tensor) -> float:
        """The distance; 0 for the reference itself."""
        mean, covariance = self._moments(pictures)
        root = _root(self.covariance)
        cross = torch.linalg.eigvalsh(root @ covariance @ root).clamp(min=0).sqrt().sum()
        gap = (mean - self.mean).square().sum()
        return float(gap + self.covariance.trace() + covariance.trace() - 2 * cross)


def _root(matrix: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    return vectors @ values.clamp(min=0).sqrt().diag() @ vectors.T
