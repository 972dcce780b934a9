"""One dense prefill, many plans: what each plan keeps of a prompt that was read once, and what the model then says."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import headwise
from headwise.arguments import cache_argument, cache_of
from headwise.attach import HeadCall
from headwise.plan import HeadPlan


@dataclass(frozen=True)
class Prefill:
    """A prompt (N,) that was read densely: its cache, and the last `window` queries of every layer, (1, H, window, D)."""

    past: Any
    queries: list[Tensor]
    length: int

    @classmethod
    @torch.no_grad()
    def read(cls, model: Any, ids: Tensor, window: int = 32) -> Prefill:
        """Run the prompt."""
        found: dict[int, Tensor] = {}

        def observe(call: HeadCall, out: Tensor) -> None:
            found[call.layer] = call.q[:, :, -window:].clone()

        with headwise.attach(model, observers=[observe]):
            past = cache_of(model(ids[None].to(model.device), use_cache=True, logits_to_keep=1))
        return cls(past, [found[layer] for layer in sorted(found)], len(ids))

    @property
    def keys(self) -> list[Tensor]:
        """Keys of every layer, (1, K, N, D)."""
        return [layer.keys[:, :, : self.length] for layer in self.past.layers]

    @property
    def values(self) -> list[Tensor]:
        """Values of every layer."""
        return [layer.values[:, :, : self.length] for layer in self.past.layers]

    def cache(self, plan: HeadPlan) -> headwise.HeadwiseCache:
        """What the plan keeps of the prompt."""
        return headwise.HeadwiseCache(plan).fill(self.keys, self.values, self.queries)

    @torch.no_grad()
    def log_probs(self, model: Any, after: Tensor, plan: HeadPlan | None) -> tuple[Tensor, int]:
        """(log-probabilities (T, V) behind each token of `after` (T,), bytes of the prompt's cache), whole or by a plan."""
        past = self.past if plan is None else self.cache(plan)
        size = (
            past.nbytes if isinstance(past, headwise.HeadwiseCache) else sum(x.nbytes for x in self.keys + self.values)
        )
        rows, logits = after[None].to(model.device), []
        with nullcontext() if plan is None else headwise.attach(model, plan=plan):
            for part in (rows[:, :1], rows[:, 1:]):  # the token that comes alone ends the prompt
                if part.shape[1]:
                    given = cache_argument(model, past)
                    logits.append(model(part, use_cache=True, **given).logits[0].float())
        if plan is None:
            past.crop(-len(after))
        return torch.cat(logits).log_softmax(-1), size
