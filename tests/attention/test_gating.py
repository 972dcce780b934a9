"""Head outputs times gates: the kernels equal the product, forward and backward."""

import pytest
import torch

from headwise.attention.gating import gated
from headwise.attention.triton import _host

KERNELS = _host.triton_available() and (torch.cuda.is_available() or _host.interpreting())
needs_kernels = pytest.mark.skipif(not KERNELS, reason="needs Triton and a CUDA device, or TRITON_INTERPRET=1")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def product(out, gates):
    return out * gates[..., None].to(out.dtype)


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(2, 7, 3, 64), (1, 1, 1, 16), (2, 130, 4, 40)])
def test_equals_the_product_in_outputs_and_gradients(shape, dtype):
    generator = torch.Generator().manual_seed(0)
    out = torch.randn(shape, generator=generator).to(DEVICE, dtype).requires_grad_()
    wide = torch.randn(*shape[:2], shape[2] + 1, generator=generator).to(DEVICE).requires_grad_()
    above = torch.randn(shape, generator=generator).to(DEVICE, dtype)
    mine, want = (f(out, wide[..., 1:]) for f in (gated, product))  # a rank's part of the gates
    rtol = (
        0.0 if DEVICE == "cuda" or dtype == torch.float32 else 2e-2
    )  # the interpreter cuts bits off where a GPU rounds
    torch.testing.assert_close(mine, want, rtol=rtol, atol=0.0)
    one, two = (torch.autograd.grad(made, [out, wide], above) for made in (mine, want))
    torch.testing.assert_close(one[0], two[0], rtol=rtol, atol=0.0)
    exact = (above.float() * out.detach().float()).sum(-1)
    torch.testing.assert_close(one[1][..., 1:], exact, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(one[1], two[1], rtol=3e-2, atol=1e-5 if dtype == torch.float32 else 1e-1)


@needs_kernels
def test_gradients_that_nobody_needs_are_not_made():
    out, gates = torch.ones(1, 2, 2, 16, device=DEVICE), torch.ones(1, 2, 2, device=DEVICE, requires_grad=True)
    gated(out, gates).sum().backward()
    assert (gates.grad == 16).all() and out.grad is None
    gated(out.requires_grad_(), gates.detach()).sum().backward()
    assert (out.grad == 1).all()


def test_doubles_and_empty_tensors_go_by_torch():
    out = torch.randn(1, 3, 2, 4, dtype=torch.float64)
    gates = torch.rand(1, 3, 2)
    assert torch.equal(gated(out, gates), product(out, gates))
    assert gated(out[:, :0].float(), gates[:, :0]).shape == (1, 0, 2, 4)
