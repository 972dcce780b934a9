"""Conversion to mixture-of-head attention without a gradient step: the paper's rules, static pruning, and fitted routers.

Fits read English and source code; "stories" is narrative text, of a kind that no fit reads.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from headwise.attach import attach
from headwise.hub import load_model
from headwise.route import HeadRouter
from headwise.route._fit_steps import FitRecipe, fit_heads
from headwise.route.moh import moh
from headwise.score.taylor import taylor
from headwise.tasks import code, english, exact_match, make_passkeys, perplexity, stories
from headwise.tasks.texts import encode
from headwise.units import HeadScores

COUNTS = (7, 6, 5)  # ninths of the heads, as the names of the figures say


@dataclass(frozen=True)
class Texts:
    """Held-out token ids by kind, and passkey prompts."""

    ids: dict[str, Tensor]
    prompts: list[Any]

    @classmethod
    def of(cls, tokenizer: Any, tokens: int, passkeys: int) -> Texts:
        """Documents that neither scores nor fit nor training saw; passkeys of five digits in 512 tokens."""
        kinds = {"english": english("eval"), "code": code("eval"), "stories": "\n\n".join(stories())}
        ids = {name: torch.tensor(encode(tokenizer, text[: 8 * tokens]))[:tokens] for name, text in kinds.items()}
        generator = torch.Generator().manual_seed(77)
        return cls(ids, make_passkeys(tokenizer, count=passkeys, length=512, generator=generator))

    def perplexity(self, model: Any, kind: str, router: HeadRouter | None) -> float:
        """In windows of 512 tokens."""
        with attached(model, router):
            return perplexity(model, self.ids[kind], window=512, tokens=len(self.ids[kind]))

    def recall(self, model: Any, router: HeadRouter | None) -> float:
        """Share of the passkeys found."""
        with attached(model, router):
            return exact_match(model, self.prompts).mean


def measure_rules(model: Any, texts: Texts, importance: HeadScores) -> tuple[dict[str, float], dict[str, float]]:
    """Perplexity on English at 7/9 and 6/9 of the heads: (the paper's conversion by three choices of shared heads; dense and static)."""
    routed, static = {}, {"ppl_dense": texts.perplexity(model, "english", None)}
    for count in COUNTS[:2]:
        for rule in ("first", "none", "importance"):
            router = convert(model, rule, count / 9, importance)
            routed[f"ppl_{count}of9_{rule}"] = texts.perplexity(model, "english", router)
        for scope in ("layer", "global"):
            pruned = moh(model, None, router="static", scope=scope, importance=importance, active=count / 9)
            static[f"ppl_{count}of9_static_{scope}"] = texts.perplexity(model, "english", pruned)
    return routed, static


def convert(model: Any, rule: Any, active: float, importance: HeadScores | None) -> HeadRouter:
    """The paper's norm router with half of the heads shared: the first, none, or the most important ones."""
    given = importance if rule == "importance" else None
    return moh(model, None, router="norm", active=active, shared=rule, importance=given)


def measure_fitted(
    model: Any, tokenizer: Any, texts: Texts, recipe: FitRecipe
) -> tuple[dict[str, float], dict[str, float]]:
    """Perplexity by kind of text and its growth over dense, passkeys: (fitted routers of every share; dense, and shuffled heads)."""
    fitted = fit_heads(model, tokenizer, recipe)
    total = sum(route.heads for route in fitted.router.config.layers)
    dense = {f"ppl_{kind}_dense": texts.perplexity(model, kind, None) for kind in ("code", "stories")}
    dense |= {"passkey_dense": texts.recall(model, None)}
    found: dict[str, float] = {}
    for count in COUNTS:
        router = fitted.dealt(round(count / 9 * total))
        found[f"ppl_{count}of9_fitted"] = texts.perplexity(model, "english", router)
        for kind in ("code", "stories"):
            found[f"ppl_{kind}_{count}of9_fitted"] = texts.perplexity(model, kind, router)
            found[f"growth_{kind}_{count}of9"] = found[f"ppl_{kind}_{count}of9_fitted"] / dense[f"ppl_{kind}_dense"] - 1
        found[f"passkey_{count}of9_fitted"] = texts.recall(model, router)
        if count == COUNTS[0]:
            mixed = shuffled(router, recipe.seed)
            dense[f"ppl_stories_{count}of9_shuffled"] = texts.perplexity(model, "stories", mixed)
    return found, dense


def shuffled(router: HeadRouter, seed: int) -> HeadRouter:
    """The control: as many heads in every layer, but the scores of a layer's heads go to each other's."""
    made = HeadRouter(router.config)
    made.load_state_dict(router.state_dict())
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in made.layers:
            order = torch.randperm(len(layer.pool), generator=generator)  # type: ignore[arg-type]
            layer.W.copy_(layer.W[order])  # type: ignore[index,operator]
            layer.b.copy_(layer.b[order])  # type: ignore[index,operator]
    return made


@contextmanager
def attached(model: Any, router: HeadRouter | None) -> Iterator[None]:
    """Inside, the router is attached if there is one."""
    if router is None:
        yield
        return
    with attach(model, router=router):
        yield


def measure_conversion(
    name: str,
    size: Any,
    importance: HeadScores | None = None,
    *,
    device: str = "cpu",
    seed: int = 0,
    progress: bool = False,
) -> tuple[dict[str, float], dict[str, float]]:
    """Everything without training: (routed, dense and static and shuffled)."""
    model, tokenizer = load_model(name, device=device, dtype="float32")
    texts = Texts.of(tokenizer, size.eval_tokens, size.passkeys)
    importance = taylor(model, tokenizer, seed=seed, progress=progress) if importance is None else importance
    routed, static = measure_rules(model, texts, importance)
    recipe = replace(size.fit, seed=seed, progress=progress)
    fitted, dense = measure_fitted(model, tokenizer, texts, recipe)
    return routed | fitted, static | dense
