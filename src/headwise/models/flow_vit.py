"""A small class-conditional image generator: a rectified flow whose network is a stack of transformers' ViT layers.

Time and class enter as two tokens in front of the patches, so every head sees condition and image together, as in the
joint attention of larger diffusion transformers, and `headwise.attach` reaches it like any transformers model.

Letters: B pictures, C channels, S pixels a side, P patches.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.vit.configuration_vit import ViTConfig
from transformers.models.vit.modeling_vit import ViTLayer, ViTPreTrainedModel

from headwise.errors import TaskError
from headwise.models.loop import Run, train, warm_cosine

Velocity = Callable[[Tensor, Tensor, Tensor], Tensor]

CONDITIONS = 2
"""Tokens before the patches: time, class."""


class FlowViTConfig(ViTConfig):
    """A ViT's configuration and the number of classes."""

    model_type = "headwise_flow_vit"
    num_classes: int = 16


class FlowViT(ViTPreTrainedModel):
    """v(x, t, labels): the velocity of a rectified flow; label `num_classes` means no condition."""

    config_class = FlowViTConfig
    _can_record_outputs: Any = None

    def __init__(self, config: Any):
        super().__init__(config)
        width, patch = config.hidden_size, config.patch_size
        self.patches = nn.Conv2d(config.num_channels, width, patch, patch)
        self.places = nn.Parameter(0.02 * torch.randn(1, (config.image_size // patch) ** 2 + CONDITIONS, width))
        self.time = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.labels = nn.Embedding(config.num_classes + 1, width)
        self.layers = nn.ModuleList([ViTLayer(config) for _ in range(config.num_hidden_layers)])
        self.norm = nn.LayerNorm(width)
        self.pixels = nn.Linear(width, patch * patch * config.num_channels)
        self.post_init()

    def forward(self, x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        """x (B, C, S, S), t (B,) in [0, 1], labels (B,) -> velocity (B, C, S, S)."""
        time = self.time(_waves(t, self.config.hidden_size))
        conditions = torch.stack([time, self.labels(labels)], dim=1)
        tokens = torch.cat([conditions, self.patches(x).flatten(2).transpose(1, 2)], dim=1) + self.places
        tokens = tokens + time[:, None]  # every token knows the time; the class has to be attended to
        for layer in self.layers:
            out = layer(tokens)
            tokens = out if isinstance(out, Tensor) else out[0]  # a tuple in some versions of transformers
        pixels = self.pixels(self.norm(tokens[:, CONDITIONS:]))
        return F.fold(pixels.transpose(1, 2), x.shape[-2:], self.config.patch_size, stride=self.config.patch_size)

    @property
    def null(self) -> int:
        """The label of no condition."""
        return int(self.config.num_classes)


def flow_vit(
    *,
    size: int = 16,
    patch: int = 2,
    width: int = 64,
    layers: int = 4,
    heads: int = 4,
    classes: int = 16,
    seed: int = 0,
) -> FlowViT:
    """The model with random weights; `train_flow` trains it.

    >>> model = flow_vit(patch=4)
    >>> model(torch.zeros(2, 1, 16, 16), torch.tensor([0.0, 1.0]), torch.tensor([3, 16])).shape
    torch.Size([2, 1, 16, 16])
    """
    if size % patch or width % heads:
        raise TaskError(
            f"size={size}, patch={patch}, width={width}, heads={heads}: patch divides size, heads divide width"
        )
    config = FlowViTConfig(
        image_size=size,
        patch_size=patch,
        num_channels=1,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
    )
    config.num_classes = classes
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        model = FlowViT._from_config(config, attn_implementation="sdpa")
    return model.eval()


def train_flow(
    model: nn.Module,
    pixels: Tensor,
    labels: Tensor,
    *,
    velocity: Velocity | None = None,
    null: int | None = None,
    steps: int = 1500,
    batch: int = 64,
    lr: float = 3e-3,
    unconditional: float = 0.1,
    extra: Callable[[], Tensor | None] | None = None,
    seed: int = 0,
    run: Run | None = None,
    progress: bool = False,
) -> list[float]:
    """Rectified flow: x_t = (1 − t)·x + t·noise, and v learns noise − x; a share of the labels is hidden. Trains in place.

    velocity: v(x, t, labels), of a model that is called in another way. extra: gives what is added to the loss after each forward
    pass, such as a router's balance loss. `run` has a folder with checkpoints, and takes the place
    of `steps`. null: the label of no condition, by default the model's own. Gives the loss of every step.
    """
    if len(pixels) != len(labels) or not len(pixels):
        raise TaskError(f"{len(pixels)} pictures and {len(labels)} labels; as many of both, at least one")
    run = run or Run(steps=steps, progress=progress, title="training a flow")
    device, v = next(model.parameters()).device, velocity or model
    hide = int(model.null if null is None else null)  # type: ignore[arg-type]
    pixels, labels, generator = pixels.to(device), labels.to(device), torch.Generator().manual_seed(seed)

    def loss_of(step: int) -> Tensor:
        rows = torch.randint(len(pixels), (batch,), generator=generator).to(device)
        x, y = pixels[rows], labels[rows]
        hidden = (torch.rand(batch, generator=generator) < unconditional).to(device)
        t = torch.rand(batch, generator=generator).to(device)
        noise = torch.randn(x.shape, generator=generator).to(device)
        mix = t[:, None, None, None]
        error = F.mse_loss(v((1 - mix) * x + mix * noise, t, y.masked_fill(hidden, hide)), noise - x)
        more = None if extra is None else extra()
        return error if more is None else error + more

    return train(run, model, _optimizers(model, lr), loss_of, rate=warm_cosine(50, run.steps), generator=generator)


def _optimizers(model: nn.Module, lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the layers (it needs about half of AdamW's steps here), AdamW for the rest."""
    layers: Any = getattr(model, "layers", None) or model.transformer_blocks
    matrices = [m.weight for m in layers.modules() if isinstance(m, nn.Linear)]
    ids = {id(p) for p in matrices}
    rest = [p for p in model.parameters() if id(p) not in ids]
    return [
        torch.optim.Muon(matrices, lr=0.02, weight_decay=0.01),
        torch.optim.AdamW(rest, lr=lr, betas=(0.9, 0.98), weight_decay=0.01),
    ]


def _waves(t: Tensor, width: int) -> Tensor:
    """Sines and cosines of a time in [0, 1], (B, width)."""
    rates = torch.exp(-math.log(1000.0) * torch.arange(width // 2, device=t.device) / (width // 2))
    angles = 1000.0 * t[:, None] * rates
    return torch.cat([angles.sin(), angles.cos()], dim=-1).to(t.dtype)
