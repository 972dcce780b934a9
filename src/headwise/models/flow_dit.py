"""A small class-conditional diffusion transformer of diffusers' own class, for `train_flow`: a rectified flow by `DiTTransformer2DModel`.

Class and time act through adaptive layer norms, so every token is an image token. Needs diffusers: pip install 'headwise[vision]'.

Letters: B pictures, C channels, S pixels a side.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from headwise.errors import TaskError

if TYPE_CHECKING:
    from headwise.models.flow_vit import Velocity

TIMES = 1000.0
"""diffusers' time embedding wants steps of a schedule of a thousand; t runs from 0 to 1."""


def flow_dit(
    *,
    size: int = 16,
    patch: int = 2,
    width: int = 64,
    layers: int = 4,
    heads: int = 4,
    classes: int = 16,
    seed: int = 0,
) -> Any:
    """A `DiTTransformer2DModel` with random weights; label `classes` means no condition. Raises TaskError where diffusers is missing.

    The library's own class drops labels by the global generator while it trains, in each block by itself; here `train_flow` hides
    them, so that is switched off.
    """
    if size % patch or width % heads:
        raise TaskError(
            f"size={size}, patch={patch}, width={width}, heads={heads}: patch divides size, heads divide width"
        )
    try:
        from diffusers import DiTTransformer2DModel
    except ImportError as error:
        raise TaskError("a DiT needs diffusers: pip install 'headwise[vision]'") from error
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        model = DiTTransformer2DModel(
            num_attention_heads=heads,
            attention_head_dim=width // heads,
            in_channels=1,
            num_layers=layers,
            sample_size=size,
            patch_size=patch,
            num_embeds_ada_norm=classes,
        )
    for module in model.modules():
        if hasattr(module, "dropout_prob"):
            module.dropout_prob = 0.0
    return model.eval()


def dit_velocity(model: Any) -> Velocity:
    """v(x, t, labels) of a DiT, for `train_flow` and `FlowSampler(velocity=…)`: x (B, C, S, S), t (B,) in [0, 1], labels (B,)."""

    def velocity(x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        return model(x, timestep=TIMES * t, class_labels=labels).sample

    return velocity


def velocity_of(model: Any) -> Any:
    """v(x, t, labels) of a generator of either class, diffusers' DiT or `FlowViT`."""
    return dit_velocity(model) if hasattr(model, "transformer_blocks") else model


@torch.no_grad()
def velocity_error(model: Any, pixels: Tensor, labels: Tensor, *, seed: int = 99, batch: int = 256) -> float:
    """Mean square error of a rectified flow's velocity on pictures (B, C, S, S), one time and one noise a picture."""
    generator = torch.Generator().manual_seed(seed)
    t, noise = torch.rand(len(pixels), generator=generator), torch.randn(pixels.shape, generator=generator)
    device, total = next(model.parameters()).device, 0.0
    for at in range(0, len(pixels), batch):
        x, y, s, n = (part[at : at + batch].to(device) for part in (pixels, labels, t, noise))
        mix = s[:, None, None, None]
        error = velocity_of(model)((1 - mix) * x + mix * n, s, y) - (n - x)
        total += float(error.square().flatten(1).mean(1).sum())
    return total / len(pixels)
