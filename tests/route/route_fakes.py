"""What a router layer reads of a `HeadCall`, without a model."""

from types import SimpleNamespace

import torch


def fake_call(*, B=2, N=5, H=4, C=8, D=6, hidden=None, q=None, real=None, first_head=0):
    """hidden (B, N, C), q (B, H, N, D), which tokens are real, and the number of the rank's first head."""
    generator = torch.Generator().manual_seed(11)
    hidden = torch.randn(B, N, C, generator=generator) if hidden is None else hidden
    q = torch.randn(B, H, N, D, generator=generator) if q is None else q
    site = SimpleNamespace(first_head=first_head)
    return SimpleNamespace(q=q, hidden=hidden, site=site, real_tokens=lambda: real)
