"""The fused router: every output and every gradient equals the composed one; what it cannot do goes the other way."""

import pytest
import torch

from headwise.attach.gates import GateRule
from headwise.attention.triton import _host
from headwise.route import Router, Routing, SigmoidTopK, SoftmaxTopK, _losses
from headwise.route._fused import fused_choice, fused_works

KERNELS = _host.triton_available() and (torch.cuda.is_available() or _host.interpreting())
needs_kernels = pytest.mark.skipif(not KERNELS, reason="needs Triton and a CUDA device, or TRITON_INTERPRET=1")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def composed(x, W, gate, real):
    """The same from torch operations, as `Router` and `Routing` have it."""
    logits = torch.nn.functional.linear(x.float(), W.float())[None]
    weight, index = gate.choose(logits)
    masked = None if real is None else real[None]
    routing = Routing(index, weight, logits.softmax(-1), logits, real=masked)
    balance = _losses.balance_loss(routing.probs, routing.mask(), masked, "unit")
    return index[0], weight[0], routing.probs[0], logits[0], balance, _losses.z_loss(logits, masked)


@needs_kernels
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(
    ("T", "C", "E", "gate"),
    [
        (70, 48, 8, GateRule(k=2, renorm=True)),
        (1, 63, 5, GateRule(k=1)),
        (130, 100, 40, GateRule(k=3, renorm=True, scale=2.5)),
        (65, 16, 3, GateRule(k=3)),
    ],
)
def test_outputs_and_gradients_equal_the_composed_router(T, C, E, gate, padded):
    generator = torch.Generator().manual_seed(0)
    x, W = torch.randn(T, C, generator=generator), torch.randn(E, C, generator=generator) / C**0.5
    x, W = (t.to(DEVICE).requires_grad_() for t in (x, W))
    real = (torch.rand(T, generator=generator) > 0.3).to(DEVICE) if padded else None
    mine, want = fused_choice(x, W, gate, real), composed(x, W, gate, real)
    assert torch.equal(mine.index, want[0]) and float(mine.good) == 1
    for a, b in zip(mine[1:6], want[1:], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    above = [torch.randn(t.shape, generator=generator).to(DEVICE) for t in mine[1:6]]
    for used in ([0], [1], [2], [3], [4], [0, 3, 4], [0, 1, 2, 3, 4]):  # weight, probs, logits, balance, z
        one, two = (
            torch.autograd.grad([out[1 + i] for i in used], [x, W], [above[i] for i in used], retain_graph=True)
            for out in (mine, want)
        )
        for a, b in zip(one, two, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


@needs_kernels
def test_of_equal_scores_the_lowest_unit_wins_and_broken_logits_are_seen():
    x = torch.ones(3, 16, device=DEVICE)
    mine = fused_choice(x, torch.zeros(6, 16, device=DEVICE), GateRule(k=3))
    assert mine.index.tolist() == [[0, 1, 2]] * 3
    x[1, 2] = torch.nan
    assert float(fused_choice(x, torch.ones(6, 16, device=DEVICE), GateRule(k=3)).good) == 0


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_router_gives_the_same_routing_and_losses_either_way(dtype, monkeypatch):
    router = Router(SoftmaxTopK(k=2), width=32, experts=8, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    x = torch.randn(2, 40, 32, generator=torch.Generator().manual_seed(1)).to(DEVICE, dtype).requires_grad_()
    real = (torch.arange(40)[None] >= torch.tensor([[0], [7]])).to(DEVICE)
    runs = []
    for fused in (True, False):
        monkeypatch.setattr("headwise.route._router_base.fused_works", fused_works if fused else lambda *_: False)
        routing = router(x, real=real)
        assert (routing.ready is not None) is fused
        loss = routing.loss({"balance": 0.3, "z": 0.1, "entropy": 0.2}) + (routing.weight * real[..., None]).sum()
        runs.append((routing, loss, torch.autograd.grad(loss + routing.gates().square().sum(), [x, router.W])))
    (one, loss, grads), (two, other, others) = runs
    assert torch.equal(one.index, two.index) and one.statistics() == pytest.approx(two.statistics(), rel=1e-4)
    torch.testing.assert_close(loss, other, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(grads, others, rtol=1e-2 if dtype == torch.bfloat16 else 1e-3, atol=1e-3)


@needs_kernels
def test_ready_losses_are_not_used_for_a_routing_that_was_changed():
    router = Router(SoftmaxTopK(k=2), width=16, experts=4, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    routing = router(torch.randn(1, 24, 16, generator=torch.Generator().manual_seed(1)).to(DEVICE))
    limited = routing.limited(6)
    plain = _losses.balance_loss(limited.probs, limited.mask(), None, "unit")
    torch.testing.assert_close(limited.loss({"balance": 1.0}), plain)
    assert not torch.allclose(plain, routing.loss({"balance": 1.0}))


def test_only_plain_softmax_routers_are_fused():
    x, W = torch.ones(2, 8, device=DEVICE), torch.ones(4, 8, device=DEVICE)
    assert fused_works(x, W, GateRule(k=2)) is KERNELS
    assert not fused_works(x.double(), W, GateRule(k=2)) and not fused_works(x[:0], W, GateRule(k=2))
    assert not fused_works(x, W, GateRule(k=2, score="sigmoid")) and not fused_works(x, W, GateRule(k=2, groups=2))
    assert not fused_works(x, torch.ones(200, 8), GateRule(k=2))
    assert SoftmaxTopK(k=2).plain_gate() == GateRule(k=2, renorm=True)
    for other in (SoftmaxTopK(k=2, logit_norm=1.0), SoftmaxTopK(k=2, jitter=0.1), SigmoidTopK(k=2)):
        assert other.plain_gate() is None


@needs_kernels
def test_second_derivatives_are_refused():
    """The kernels of a backward pass are no graph: asked to differentiate them, autograd would take them for constants."""
    x, W = (torch.randn(n, 16, device=DEVICE, requires_grad=True) for n in (4, 5))
    (grad,) = torch.autograd.grad(fused_choice(x, W, GateRule(k=2)).weight.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()
