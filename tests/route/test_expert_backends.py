"""Experts and their back-ends: the same numbers by every way, and which way is taken."""

import pytest
import torch

from headwise.errors import RouteError
from headwise.route import (
    Experts,
)
from headwise.route._experts import BACKENDS, grouped_mm_works, measure, pick, routed_linear

B, N, C, E, HIDDEN = 2, 11, 16, 5, 8


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def hidden(seed=2, rows=B, length=N):
    return torch.randn(rows, length, C, generator=seeded(seed))


# back-ends


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "loop"])
def test_every_backend_equals_the_loop_forward_and_backward(backend, gated):
    experts = Experts(experts=E, width=C, hidden=HIDDEN, gated=gated, std=0.4, generator=seeded())
    index = torch.rand(37, E, generator=seeded(1)).topk(3).indices
    index[:, :] = torch.where(index == 3, 0, index)  # nobody uses expert 3, and units may repeat
    used = torch.rand(37, 3, generator=seeded(3)) > 0.2
    found = {}
    for name in ("loop", backend):
        x = torch.randn(37, C, generator=seeded(4), requires_grad=True)
        weight = torch.rand(37, 3, generator=seeded(5)).requires_grad_()
        experts.zero_grad()
        out = experts(x, index, weight, used, name)
        out.square().sum().backward()
        grads = [x.grad, weight.grad, experts.gate_up_proj.grad, experts.down_proj.grad]
        found[name] = [out, *(g.clone() for g in grads)]
    for mine, reference in zip(found[backend], found["loop"], strict=True):
        torch.testing.assert_close(mine, reference, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_used_slot_gives_zero(backend):
    experts = Experts(experts=E, width=C, hidden=HIDDEN, std=0.4)
    x, index = torch.randn(4, C), torch.zeros(4, 2, dtype=torch.long)
    out = experts(x, index, torch.ones(4, 2), torch.zeros(4, 2, dtype=torch.bool), backend)
    assert not out.any() and out.shape == x.shape


def test_the_loop_is_the_equation():
    experts = Experts(experts=E, width=C, hidden=HIDDEN, std=0.4, generator=seeded())
    x = torch.randn(3, C, generator=seeded(1))
    index, weight = torch.tensor([[0, 2], [4, 1], [2, 0]]), torch.rand(3, 2, generator=seeded(2))
    out = experts(x, index, weight, torch.ones(3, 2, dtype=torch.bool), "loop")
    for t in range(3):
        expected = torch.zeros(C)
        for j in range(2):
            gate, up = (experts.gate_up_proj[index[t, j]] @ x[t]).chunk(2)
            expected += weight[t, j] * (experts.down_proj[index[t, j]] @ (gate * gate.sigmoid() * up))
        torch.testing.assert_close(out[t], expected)


def test_the_choice_of_a_backend_is_explained_and_impossible_ones_are_refused():
    experts = Experts(experts=E, width=C, hidden=HIDDEN)
    x, index = torch.zeros(64, C), torch.zeros(64, 2, dtype=torch.long)
    assert pick(experts, x, index) in ("sorted", "grouped_mm")
    assert pick(experts, x, torch.zeros(64, E, dtype=torch.long)) == "dense"
    assert grouped_mm_works(experts, x) and not grouped_mm_works(experts, x.double())
    with pytest.raises(RouteError, match="cannot run torch.float64"):
        pick(experts, x.double(), index, "grouped_mm")
    with pytest.raises(RouteError, match="backend is 'fast'"):
        pick(experts, x, index, "fast")
    assert set(measure(experts, x, index, torch.ones(64, 2), repeats=1)) == set(BACKENDS)


def test_routed_linear_equals_a_gather_of_weights():
    weight, index = torch.randn(E, 6, C), torch.randint(0, E, (9, 3))
    x = torch.randn(9, 3, C)
    expected = torch.einsum("tkoc,tkc->tko", weight[index], x)
    torch.testing.assert_close(routed_linear(x, weight, index), expected)
    torch.testing.assert_close(
        routed_linear(x[:, :1], weight, index), torch.einsum("tkoc,tc->tko", weight[index], x[:, 0])
    )
