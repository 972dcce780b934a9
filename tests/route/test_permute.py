"""The memory passes of a dispatch: equal to the plain formulas, values and gradients, in torch and as kernels."""

import pytest
import torch

from headwise.attention.triton import _host
from headwise.route import Experts
from headwise.route._permute import gather_sum, kernels_work, sort_pairs, spread, swiglu


def device():
    """'cuda' where there is one; in Triton's interpreter and without Triton the CPU."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def drawn(T=37, E=5, k=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    index = torch.rand(T, E, generator=generator).topk(k).indices
    used = torch.rand(T, k, generator=generator) > 0.3
    return index.to(device()), used.to(device()), generator


@pytest.mark.parametrize("some", [False, True])
def test_rows_are_sorted_by_expert_and_places_lead_back(some):
    index, used, _ = drawn()
    pairs = sort_pairs(index, used if some else None, 5)
    chosen = index.reshape(-1)[pairs.order]
    assert bool((chosen.diff() >= 0).all()) and len(chosen) == (int(used.sum()) if some else index.numel())
    assert pairs.ends.tolist() == [(chosen <= e).sum() for e in range(5)]
    rows = torch.arange(len(chosen), device=chosen.device)
    assert torch.equal(pairs.place.reshape(-1)[pairs.order], rows) and torch.equal(pairs.token, pairs.order // 2)
    if some:
        assert bool((pairs.place[~used] == -1).all())


@pytest.mark.parametrize("some", [False, True])
@pytest.mark.parametrize("width", [8, 63, 1100])
def test_spread_and_gather_sum_equal_the_formulas(some, width):
    index, used, generator = drawn(T=11)
    pairs = sort_pairs(index, used if some else None, 5)
    x = torch.randn(11, width, generator=generator).to(device()).requires_grad_()
    rows = spread(x, pairs)
    assert torch.equal(rows, x[pairs.token])
    scaled = rows * torch.arange(1, len(rows) + 1, device=rows.device)[:, None]
    want = torch.zeros_like(x).index_add(0, pairs.token, scaled)
    torch.testing.assert_close(gather_sum(scaled, pairs), want)
    up = torch.randn(11, width, generator=generator).to(x)
    mine = torch.autograd.grad(gather_sum(scaled, pairs), x, up, retain_graph=True)[0]
    torch.testing.assert_close(mine, torch.autograd.grad(want, x, up)[0])


@pytest.mark.parametrize("size", [8, 63, 2100])
@pytest.mark.parametrize("weighed", [False, True])
def test_swiglu_and_its_gradients_equal_the_formula(size, weighed):
    generator = torch.Generator().manual_seed(1)
    up = torch.randn(7, 2 * size, generator=generator).to(device()).requires_grad_()
    weight = torch.rand(7, generator=generator).to(device()).requires_grad_()
    above = torch.randn(7, size, generator=generator).to(device())
    gate, value = up.chunk(2, dim=-1)
    want = torch.nn.functional.silu(gate) * value * (weight[:, None] if weighed else 1)
    made = swiglu(up, weight if weighed else None)
    torch.testing.assert_close(made, want)
    leaves = [up, weight] if weighed else [up]
    mine, plain = (torch.autograd.grad(out, leaves, above) for out in (made, want))
    for a, b in zip(mine, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-4)


def test_no_token_and_no_used_slot_give_zeros_and_zero_gradients():
    experts = Experts(experts=3, width=8, hidden=16, generator=torch.Generator().manual_seed(0)).to(device())
    index, weight = torch.zeros(4, 2, dtype=torch.long, device=device()), torch.ones(4, 2, device=device())
    for backend in ("dense", "sorted"):
        x = torch.ones(4, 8, device=device(), requires_grad=True)
        out = experts(x, index, weight, torch.zeros_like(index, dtype=torch.bool), backend)
        out.sum().backward()
        assert not bool(out.any()) and not bool(x.grad.any())
        assert experts(x[:0], index[:0], weight[:0], None, backend).shape == (0, 8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_results_repeat_bit_for_bit(dtype):
    """Nothing is added up in an order that the machine chooses."""
    index, _, generator = drawn(T=64)
    experts = Experts(experts=5, width=16, hidden=24, generator=generator).to(device(), dtype)
    x = torch.randn(64, 16, generator=generator).to(device(), dtype).requires_grad_()
    weight = torch.rand(64, 2, generator=generator).to(device(), dtype)
    runs = []
    for _ in range(2):
        out = experts(x, index, weight)
        runs.append([out, *torch.autograd.grad(out.float().square().sum(), [x, *experts.parameters()])])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.skipif(not _host.triton_available(), reason="triton is not installed")
def test_these_tests_run_the_kernels_where_they_can():
    assert kernels_work(torch.ones(1, device=device())) is (torch.cuda.is_available() or _host.interpreting())
