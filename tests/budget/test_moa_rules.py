"""MoA's rules and the integer programme that chooses among them, against enumeration."""

import itertools

import numpy as np
import pytest
import torch
from moa_helper import profile

from headwise.budget import moa, moa_spans
from headwise.budget._moa_rules import Rule, candidate_rules, kept_tokens, layout, lost_influence
from headwise.budget._moa_solve import Problem, pareto_front
from headwise.plan import Elastic, Full, HeadPlan, SinkWindow

# rules


def test_the_grid_of_rules_and_what_they_keep():
    rules = candidate_rules([2048, 4096, 8192], [2048, 4096, 8192, 16384], 1024)
    assert len(rules) == 48 and Rule(0, 1.0) in rules
    assert all(rule.span(2048) > 0 and rule.span(16384) <= 16384 and rule.span(8192) <= 8192 for rule in rules)
    patterns = [rule.pattern(64, 64) for rule in rules]
    assert all(float(kept_tokens(patterns, n).max()) <= n for n in (2048, 8192, 16384))
    assert patterns[rules.index(Rule(0, 1.0))] == Full()


@pytest.mark.parametrize(
    ("alpha", "beta", "tokens", "wanted"),
    [
        (-1024, 0.625, 9216, 4736),
        (0, 0.125, 9216, 1152),
        (0, 0.0, 9216, 128),
        (-1024, 0.125, 2048, 128),
        (1000, 0.0, 4096, 1024),
    ],
)
def test_the_deployed_span_follows_the_engine(alpha, beta, tokens, wanted):
    plan = moa_spans(HeadPlan.uniform(Elastic(64, alpha, beta, minimum=64), 1, 1), tokens)
    assert plan.kept(tokens).item() == wanted and plan.patterns[0][0] == SinkWindow(64, wanted - 64)
    assert moa_spans(HeadPlan.full(1, 1), tokens).patterns[0][0] == Full()
    assert moa_spans(HeadPlan.uniform(Elastic(64, tokens, 0.0), 1, 1), tokens).patterns[0][0] == Full()


@pytest.mark.parametrize("pattern", [Elastic(16, -32, 0.5, minimum=16), SinkWindow(16, 48), Full()])
def test_a_layout_is_what_the_pattern_reads(pattern):
    seen, at = layout(pattern, 8, 16), torch.arange(128)
    exact = pattern.reads(at[:, None], at).view(8, 16, 8, 16).any(3).any(1)
    assert bool((exact | ~seen).all())  # whole blocks only, so never more than the tokens show …
    assert bool((exact & ~seen).sum(1).le(1).all())  # … and at most the block that the window cuts is missing
    assert bool(seen.diagonal().all()) and bool(seen[:, 0].all()) and not bool(seen.triu(1).any())


def test_longer_spans_hide_less_and_keep_more():
    maps = profile(layers=1, heads=3).maps[512]
    patterns = [Elastic(64, alpha, 0.0, minimum=64) for alpha in (64, 128, 256, 512)] + [Full()]
    lost = lost_influence(maps, patterns, 64)
    assert bool((lost.diff(dim=-1) <= 1e-9).all()) and bool((lost[..., -1] == 0).all())
    assert bool((kept_tokens(patterns, 512).diff() >= 0).all())
    hidden = (~layout(patterns[0], 8, 64)).tril()
    assert torch.allclose(lost[..., 0], (maps * hidden).sum((-1, -2)).double(), atol=1e-5)


def test_planning_for_fixed_spans_counts_what_they_keep():
    plan = moa(profile(), budget="60%", lengths="1024", fixed_rows=True)
    for n in (256, 512, 1024):
        assert 0.9 * 0.6 - 1e-9 <= moa_spans(plan, n).ratio(n) <= 0.6


# the integer programme


def small_problem(seed, limited):
    generator = np.random.default_rng(seed)
    loss = np.sort(generator.random((2, 4, 6)), axis=2)[:, :, ::-1]
    cost = np.sort(generator.integers(1, 20, (2, 6)).astype(float), axis=1)
    upper = cost.mean(axis=1) * 4
    return Problem(loss, cost, 0.5 * upper, upper, 2, 1 if limited else None, gap=0.0)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("limited", [False, True])
def test_the_optimum_is_that_of_enumeration(seed, limited):
    problem, weights = small_problem(seed, limited), np.array([1.0, 0.5])
    every = [np.array(choice) for choice in itertools.product(range(6), repeat=4)]
    fitting = [weights @ problem.losses(choice) for choice in every if problem.fits(choice)]
    found = problem.solve(weights)
    assert (found is None) == (not fitting)
    if found is not None:
        assert problem.fits(found) and weights @ problem.losses(found) == pytest.approx(min(fitting), abs=1e-7)


def test_no_plan_of_the_front_beats_another_and_corners_are_on_it():
    problem = small_problem(3, False)
    front = pareto_front(problem)
    losses = [loss for _, loss in front]
    assert front and all(problem.fits(choice) for choice, _ in front)
    for a, b in itertools.permutations(losses, 2):
        assert not (a <= b).all()
    every = np.stack(
        [problem.losses(np.array(c)) for c in itertools.product(range(6), repeat=4) if problem.fits(np.array(c))]
    )
    assert np.stack(losses).min(0) == pytest.approx(every.min(0), abs=1e-4)
