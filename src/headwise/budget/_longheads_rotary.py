"""The model's own rotary embedding as a rotation by a number of positions, checked against the model before it is used.

Letters: D head dim, R <= D rotated dims.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from headwise.attach import Stack
from headwise.errors import AttachError

BY_LENGTH = ("dynamic", "longrope")  # kinds of RoPE whose frequencies depend on the length of the text
STEPS = ((0, 5), (3, 17), (900, -700))  # (position, turn) at which the rotation is compared with the model's own


@dataclass(frozen=True, eq=False)
class Rotation:
    """Turning vectors by whole positions: pair (x_i, x_j) by the angle steps · frequency_i, in float32.

    `interleaved`: pairs are neighbours (2i, 2i + 1), otherwise halves (i, i + R/2). Dims behind R are left alone.
    """

    frequencies: Tensor  # (R/2,)
    interleaved: bool = False

    def turn(self, x: Tensor, steps: Tensor) -> Tensor:
        """x (…, D) turned by `steps` (…) positions, which broadcast against x without its last dim; dtype of x.

        >>> x = torch.tensor([1.0, 0.0])
        >>> Rotation(torch.tensor([torch.pi / 2])).turn(x, torch.tensor(1)).round().tolist()
        [-0.0, 1.0]
        """
        frequencies = self.frequencies.to(x.device)
        angle = steps.to(frequencies.dtype)[..., None] * frequencies
        cos, sin = angle.cos(), angle.sin()
        rotated, rest = x[..., : 2 * len(frequencies)].float(), x[..., 2 * len(frequencies) :]
        a, b = (rotated[..., 0::2], rotated[..., 1::2]) if self.interleaved else rotated.chunk(2, dim=-1)
        first, second = a * cos - b * sin, b * cos + a * sin
        turned = torch.stack([first, second], -1).flatten(-2) if self.interleaved else torch.cat([first, second], -1)
        turned = turned.to(x.dtype)
        return turned if not rest.shape[-1] else torch.cat([turned, rest.expand(*turned.shape[:-1], -1)], dim=-1)


def rotation_of(stack: Stack) -> Rotation:
    """The rotation of a model; raises `AttachError` where positions are not rotary, or not by fixed frequencies."""
    rotary, name = getattr(stack.owner, "rotary_emb", None), type(stack.owner).__name__
    if not isinstance(rotary, nn.Module):
        raise AttachError(
            f"{name} has no rotary embedding (rotary_emb): positions cannot be remapped, LongHeads needs RoPE"
        )
    kind = getattr(rotary, "rope_type", "default")
    if kind in BY_LENGTH:
        raise AttachError(f"{name} uses RoPE of type {kind!r}, whose frequencies depend on the length: not invertible")
    frequencies = getattr(rotary, "inv_freq", None)
    if not isinstance(frequencies, Tensor) or frequencies.ndim != 1:
        raise AttachError(f"{name}'s rotary embedding has no one table of frequencies (inv_freq): layers differ")
    apply = getattr(sys.modules[type(stack.modules[0]).__module__], "apply_rotary_pos_emb", None)
    for interleaved in (False, True):
        rotation = Rotation(frequencies.detach().float().cpu().clone(), interleaved)
        if apply is not None and _agrees(rotation, rotary, apply):
            return rotation
    raise AttachError(f"{name} rotates its queries and keys in a way that headwise does not know: cannot be remapped")


@torch.no_grad()
def _agrees(rotation: Rotation, rotary: nn.Module, apply: Callable) -> bool:
    """Whether turning what the model placed at position a by d is what it would place at a + d."""
    device = rotation.frequencies.device if not list(rotary.buffers()) else next(rotary.buffers()).device
    x = torch.randn(1, 1, 1, 2 * len(rotation.frequencies), generator=torch.Generator().manual_seed(0)).to(device)

    def placed(position: int) -> Tensor:
        cos, sin = rotary(x, torch.tensor([[position]], device=device))
        return apply(x, x, cos, sin)[0]

    try:
        pairs = [(rotation.turn(placed(a), torch.tensor(d, device=device)), placed(a + d)) for a, d in STEPS]
    except (TypeError, RuntimeError, ValueError):
        return False
    return all(torch.allclose(turned, wanted, atol=2e-3) for turned, wanted in pairs)
