"""Sizes, inputs and routers with large weights, for the tests of the router zoo."""

import torch

from headwise.route import (
    Router,
)

B, N, C, E = 2, 13, 8, 6


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def made(rule, *, causal=False, width=C, experts=E, spread=1.0):
    router = Router(rule, width=width, experts=experts, causal=causal, generator=seeded())
    for parameter in router.parameters():
        if parameter.ndim > 1 and "noise" not in str(rule):
            torch.nn.init.normal_(parameter, std=spread, generator=seeded(7))
    return router


def inputs(seed=1):
    return {
        "x": torch.randn(B, N, C, generator=seeded(seed)),
        "token_ids": torch.randint(0, 50, (B, N), generator=seeded(seed)),
        "units": torch.randn(B, N, E, 3, generator=seeded(seed)),
    }
