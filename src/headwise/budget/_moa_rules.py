"""MoA's elastic rules, span = alpha + beta · N, and what each costs and loses.

Letters: L layers, H heads or K kv heads, C rules, N tokens, b tokens of a block, c = N/b blocks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from headwise.checks import whole
from headwise.errors import PlanError
from headwise.plan import Elastic, Full, HeadPlan, Pattern, SinkWindow


@dataclass(frozen=True, order=True)
class Rule:
    """One elastic span: alpha + beta · N latest tokens of N.

    >>> Rule(-1024, 0.625).span(9216), Rule(0, 0.125).span(9216)
    (4736, 1152)
    """

    alpha: int
    beta: float

    def span(self, n: int) -> int:
        """Tokens of the window at n tokens, not bounded from below."""
        return int(self.alpha + self.beta * n)

    def pattern(self, sinks: int, minimum: int) -> Pattern:
        """What a kv head under this rule keeps."""
        if (self.alpha, self.beta) == (0, 1.0):
            return Full()
        return Elastic(sinks, self.alpha, self.beta, minimum=minimum)


def candidate_rules(profiled: Sequence[int], planned: Sequence[int], step: int, betas: int = 9) -> list[Rule]:
    """MoA's grid of rules, by their span at the longest length.

    alpha runs in steps of about `step` from -N_min to P_max, beta over `betas` numbers from 0 to 1; a rule stays if its span is
    at most P_max there, at most N_max there, and above 0 at N_min. P are the profiled lengths, N those and the others planned for.

    >>> len(candidate_rules([2048, 4096, 8192], [2048, 4096, 8192, 16384], 1024))
    48
    """
    top, low, high = max(profiled), min([*profiled, *planned]), max([*profiled, *planned])
    count = (top + low) // whole("alpha_step", step, 1, PlanError) + 1
    if count < 2 or whole("betas", betas, 2, PlanError) > 65:
        raise PlanError(f"alpha_step is {step} and betas {betas}: give at least 2 alphas, and at most 65 betas")
    rules = [
        Rule(int(alpha), float(beta))
        for alpha in np.linspace(-low, top, count)
        for beta in np.linspace(0, 1, betas)
        if alpha + beta * top <= top and alpha + beta * high <= high and alpha + beta * low > 0
    ]
    return sorted(rules, key=lambda rule: (rule.alpha + rule.beta * high, rule))


def layout(pattern: Pattern, blocks: int, block: int) -> Tensor:
    """Which blocks of keys (columns) the blocks of queries (rows) read, (c, c) bool: the first one and the latest ones.

    A row reads `pattern.window(n) // b` blocks, its own included and always read, where n is the number of tokens up to its end.
    """
    rows, columns = torch.arange(blocks)[:, None], torch.arange(blocks)
    spans = (pattern.windows((rows + 1) * block) // block).clamp(min=1)
    return (columns <= rows) & ((columns == 0) | (rows - columns < spans))


def lost_influence(maps: Tensor, patterns: Sequence[Pattern], block: int) -> Tensor:
    """Z (L, K, C): the influence (L, K, c, c) that each head loses under each pattern, summed over the blocks it does not read."""
    blocks = maps.shape[-1]
    causal = torch.ones(blocks, blocks, dtype=torch.bool).tril()
    hidden = torch.stack([causal & ~layout(pattern, blocks, block) for pattern in patterns])
    return maps.double().flatten(2) @ hidden.double().flatten(1).T


def kept_tokens(patterns: Sequence[Pattern], n: int) -> Tensor:
    """D (C,): tokens that a kv head keeps under each pattern at n tokens."""
    return torch.tensor([pattern.kept(n) for pattern in patterns], dtype=torch.float64)


def moa_spans(plan: HeadPlan, tokens: int, *, multiple: int = 64, least: int = 128) -> HeadPlan:
    """The plan as MoA's engine deploys it for texts of `tokens` tokens in all, prompt and answer: fixed spans.

    A head keeps c = ceil(max(min(alpha + beta · N, N), least) / multiple) · multiple tokens, the sinks among them; every row of the prompt
    is read with this span. Beyond `tokens` the spans no longer grow. A head that keeps everything there stays whole.

    >>> rules = HeadPlan(patterns=((Elastic(64, -1024, 0.625), Elastic(64, 0, 0.125)),))
    >>> moa_spans(rules, 9216).kept(9216).tolist()
    [[4736, 1152]]
    """
    whole("tokens", tokens, 1, PlanError)
    whole("multiple", multiple, 1, PlanError)
    whole("least", least, 2, PlanError)
    rows = tuple(tuple(fixed_span(pattern, tokens, multiple, least) for pattern in row) for row in plan.patterns)
    meta = {**plan.meta, "tokens": tokens}
    return HeadPlan(patterns=rows, prefill=plan.prefill, fingerprint=plan.fingerprint, method=plan.method, meta=meta)


def fixed_span(pattern: Pattern, tokens: int, multiple: int, least: int) -> Pattern:
    """One head's pattern for texts of `tokens` tokens, see `moa_spans`."""
    if not isinstance(pattern, Elastic):
        return pattern
    span = max(min(pattern.window(tokens), tokens), least)
    kept = math.ceil(span / multiple) * multiple
    sinks = min(pattern.sinks, kept - 1)
    return Full() if kept >= tokens else SinkWindow(sinks, kept - sinks)
