"""Rules that look at all tokens for the sake of balance: expert choice and assignment."""

import pytest
import torch
from zoo_helper import B, C, E, made, seeded

from headwise.route import (
    Balanced,
    ExpertChoice,
)


@pytest.mark.parametrize("over", ["sequence", "batch"])
def test_expert_choice_gives_every_expert_exactly_its_capacity(over):
    x = torch.randn(B, 12, C, generator=seeded(3))
    routing = made(ExpertChoice(capacity=2.0, over=over))(x)
    assert routing.load().tolist() == [2.0 * 12 * B / E] * E
    real = torch.ones(B, 12, dtype=torch.bool)
    real[1, 6:] = False
    limited = made(ExpertChoice(capacity=2.0, over="sequence"))(x, real=real)
    assert limited.load().tolist() == [4 + 2.0] * E and not limited.mask()[~real].any()


@pytest.mark.parametrize("method, slack", [("assignment", 1), ("sinkhorn", 6)])
def test_balanced_assignment_is_even_in_training_and_greedy_in_eval(method, slack):
    router = made(Balanced(method=method, steps=30))
    x = torch.randn(4, 25, C, generator=seeded(3)) + 0.7
    greedy = router.eval()(x).load()
    even = router.train()(x)
    assert greedy.max() - greedy.min() > 2 * slack
    assert even.load().max() - even.load().min() <= slack
    torch.testing.assert_close(even.weight, even.logits.gather(-1, even.index).sigmoid())


def test_assignment_is_the_best_even_one():
    from itertools import permutations

    router = made(Balanced(method="assignment"), experts=4).train()
    routing = router(torch.randn(1, 4, C, generator=seeded(2)))
    scores = routing.logits[0]
    best = max(sum(scores[t, e] for t, e in enumerate(order)) for order in permutations(range(4)))
    torch.testing.assert_close(scores.gather(-1, routing.index[0]).sum(), best)
