"""Rules without a choice: tokens mixed into slots (Soft MoE), experts merged (SMEAR, Lory)."""

import pytest
import torch
from zoo_helper import B, C, E, N, inputs, made, seeded

from headwise.route import (
    Experts,
    Lory,
    Router,
    Smear,
    SoftMoE,
)


def test_soft_moe_weights_sum_to_one_and_tokens_may_be_permuted():
    router = made(SoftMoE(slots=2))
    x = inputs()["x"]
    slots = router(x)
    torch.testing.assert_close(slots.combine.sum((2, 3)), torch.ones(B, N))
    torch.testing.assert_close(slots.dispatch.sum(1), torch.ones(B, E, 2))
    experts = Experts(experts=E, width=C, hidden=4, std=0.5, generator=seeded())
    order = torch.randperm(N, generator=seeded(1))
    torch.testing.assert_close(router(x[:, order]).apply(experts, x[:, order]), slots.apply(experts, x)[:, order])
    real = torch.ones(B, N, dtype=torch.bool)
    real[:, 9:] = False
    masked = router(x, real=real).apply(experts, x)
    torch.testing.assert_close(masked[:, :9], router(x[:, :9]).apply(experts, x[:, :9]))
    assert not masked[:, 9:].any()


def test_soft_moe_equals_its_formula():
    router, x = made(SoftMoE(slots=2)), inputs()["x"]
    experts = Experts(experts=E, width=C, hidden=4, std=0.5, generator=seeded())
    phi = router.phi / router.phi.norm(dim=0, keepdim=True) * router.s
    logits = (x / x.norm(dim=-1, keepdim=True)) @ phi.reshape(C, -1)
    D, K = logits.softmax(1), logits.softmax(-1)
    slots = D.transpose(1, 2) @ x
    done = torch.stack([experts.one(j // 2, slots[:, j]) for j in range(E * 2)], dim=1)
    torch.testing.assert_close(router(x).apply(experts, x), K @ done)


def test_smear_with_a_one_hot_mixture_is_that_expert():
    router, x = made(Smear()), inputs()["x"]
    experts = Experts(experts=E, width=C, hidden=4, std=0.5, generator=seeded())
    merge = router(x)
    one_hot = type(merge)(torch.nn.functional.one_hot(torch.tensor([[2], [4]]), E).float(), N)
    out = one_hot.apply(experts, x)
    torch.testing.assert_close(out[0], experts.one(2, x[0]))
    torch.testing.assert_close(out[1], experts.one(4, x[1]))
    torch.testing.assert_close(merge.weights[:, 0], (x.mean(1) @ router.W.T).softmax(-1))


def test_lory_routes_a_segment_by_the_one_before():
    router = Router(Lory(segment=4), width=C, experts=E, generator=seeded())
    torch.nn.init.normal_(router.W, generator=seeded(2))
    x = inputs()["x"]
    merge = router(x)
    assert merge.weights.shape == (B, 4, E)
    torch.testing.assert_close(merge.weights[:, 0], torch.full((B, E), 1 / E))
    torch.testing.assert_close(merge.weights[:, 1], (x[:, :4].mean(1) @ router.W.T).softmax(-1))
    experts = Experts(experts=E, width=C, hidden=4, std=0.5, generator=seeded())
    torch.testing.assert_close(merge.apply(experts, x)[:, :9], router(x[:, :9]).apply(experts, x[:, :9]))


def test_soft_moe_agrees_with_the_public_package():
    peers = pytest.importorskip("soft_moe_pytorch", reason="needs soft-moe-pytorch, a peer to compare with")
    peer = peers.SoftMoE(dim=C, num_experts=E, num_slots=2, expert_mult=2).eval()
    router, experts = made(SoftMoE(slots=2)), Experts(experts=E, width=C, hidden=16, gated=False, activation="gelu")
    with torch.no_grad():
        router.phi.copy_(peer.slot_embeds.permute(2, 0, 1))
        router.s.fill_(C)  # it scales both normed sides by sqrt(C)
        for e, expert in enumerate(peer.experts.experts):
            expert[0].bias.zero_()
            expert[3].bias.zero_()
            experts.gate_up_proj[e], experts.down_proj[e] = expert[0].weight, expert[3].weight
        x = torch.randn(B, N, C, generator=seeded(3))
        normed = torch.nn.functional.normalize(x, dim=-1) * C**0.5  # its experts read the normed tokens
        real = torch.ones(B, N, dtype=torch.bool)
        real[:, 10:] = False
        torch.testing.assert_close(router(normed).apply(experts, normed), peer(x), rtol=1e-5, atol=1e-5)
        masked = router(normed, real=real).apply(experts, normed)
        torch.testing.assert_close(masked[:, :10], peer(x[:, :10]), rtol=1e-5, atol=1e-5)
