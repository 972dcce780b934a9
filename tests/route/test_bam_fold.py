"""The output projection of folded experts."""

import torch
from torch.nn import functional as F

from headwise.route import Dense, Router
from headwise.route._bam_fold import SoftOutput


def test_output_biases_are_gated():
    router = Router(Dense(), width=64, experts=2, generator=torch.Generator().manual_seed(0))
    biases = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    output = SoftOutput(torch.zeros(2, 8), biases, torch.tensor([0, 0, 1, 1]), router)
    x = torch.randn(1, 3, 64)
    output.see(output, (x,), {})
    torch.testing.assert_close(output(torch.ones(1, 3, 8)), F.linear(x, router.W).softmax(-1))
