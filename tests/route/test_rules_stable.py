"""StableMoE: a choice that is distilled into a router of token ids, and then kept."""

import pytest
import torch
from zoo_helper import C, E, inputs, made, seeded

from headwise.errors import RouteError
from headwise.route import (
    Router,
    SoftmaxTopK,
    Stable,
)


def test_a_stable_router_distils_its_choice_and_then_keeps_it():
    router = made(Stable(vocabulary=12, rank=6), causal=True).train()
    centres = torch.randn(12, C, generator=seeded(4))
    optimizer = torch.optim.Adam(router.parameters(), lr=0.05)
    for step in range(150):
        ids = torch.randint(12, (4, 32), generator=seeded(step))
        x = centres[ids]
        routing = router(x, token_ids=ids)
        routing.loss({"distil": 1.0}).backward()
        optimizer.step()
        optimizer.zero_grad()
    own = router(x, token_ids=ids)
    assert (own.extra["student"].argmax(-1) == own.index[..., 0]).all()
    assert float(own.loss({"distil": 1.0}).detach()) < 0.3
    router.freeze()
    router.W.data.normal_(generator=seeded(9))  # whatever becomes of the model
    later = router(torch.randn(4, 32, C, generator=seeded(5)), token_ids=ids)
    assert torch.equal(later.index, own.extra["student"].argmax(-1, keepdim=True))
    torch.testing.assert_close(later.weight, later.logits.sigmoid().gather(-1, later.index))
    (later.weight.sum() + later.loss({"distil": 1.0, "balance": 1.0})).backward()
    assert router.student_ids.grad is None and router.W.grad.abs().sum() > 0
    alone = router(torch.randn(4, 32, C, generator=seeded(5)), token_ids=ids)
    (grad,) = torch.autograd.grad(alone.loss({"balance": 1.0}), router.W)
    assert not grad.any()
    again = Router(Stable(vocabulary=12, rank=6), width=C, experts=E)
    again.load_state_dict(router.state_dict())
    x = torch.randn(4, 32, C, generator=seeded(6))
    assert torch.equal(again(x, token_ids=ids).index, later.index)


def test_only_rules_of_two_stages_can_be_frozen_and_distilled():
    with pytest.raises(RouteError, match="nothing to freeze"):
        made(SoftmaxTopK(k=2)).freeze()
    with pytest.raises(RouteError, match="second, small one"):
        made(SoftmaxTopK(k=2))(inputs()["x"]).loss({"distil": 1.0})
    with pytest.raises(RouteError, match="stable routing needs token_ids"):
        made(Stable(vocabulary=50))(inputs()["x"])
    with pytest.raises(RouteError, match="vocabulary is 0"):
        Stable()
