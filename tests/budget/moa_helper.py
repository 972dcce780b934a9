"""Samples and influence profiles for the tests of MoA."""

import torch

from headwise.budget import Calibration, InfluenceProfile
from tiny_helper import tokens


def calibration(rows=2, length=64, answer=16, seed=0):
    answers = torch.zeros(rows, length, dtype=torch.bool)
    answers[:, -answer:] = True
    return Calibration(tokens(rows, length, seed), answers)


def profile(lengths=(256, 512), layers=2, heads=4, kind="kv", block=64, seed=0):
    """Random maps in which every head has its own reach."""
    generator = torch.Generator().manual_seed(seed)
    reach = torch.rand(layers, heads, 1, 1, generator=generator)
    maps = {}
    for n in lengths:
        distance = (torch.arange(n // block)[:, None] - torch.arange(n // block)).clamp(min=0)
        noise = torch.rand(layers, heads, n // block, n // block, generator=generator)
        maps[n] = (noise * torch.exp(-distance * 4 * reach)).tril()
    return InfluenceProfile.of(maps, block, kind=kind)
