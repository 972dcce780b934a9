"""The causal check of a score: take the best heads out, and as many random others, and ask the model again.

Letters: L layers, H query heads, D head dim, U heads of a set.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor

from headwise.attach import find_stack, fingerprint
from headwise.attach.ablate import ablate
from headwise.attach.observe import observe
from headwise.errors import EditError, TaskError, UnitError
from headwise.progress import track
from headwise.tasks import Prompt, english, exact_match, make_passkeys, perplexity
from headwise.tasks.evaluate import Result
from headwise.tasks.texts import encode
from headwise.units import HeadScores, HeadSet

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Mode = Literal["zero", "uniform", "mean"]
CheckPhase = Literal["all", "decode"]
BARRED = 100  # best heads that no random control may hold, of at most BARRED_SHARE of all
BARRED_SHARE = 0.15
CALIBRATION = 512  # tokens of text whose mean head outputs mode="mean" puts in place


@dataclass(frozen=True)
class CheckRow:
    """One set of heads taken out: `kind` is "none", "top" or "random"; `perplexity` is None where it was not measured."""

    kind: Literal["none", "top", "random"]
    k: int
    heads: HeadSet
    result: Result
    perplexity: float | None

    def to_dict(self) -> dict[str, Any]:
        """Plain values, with the 95 % Wilson interval of exact match as `low` and `high`."""
        facts = {"kind": self.kind, "k": self.k, "heads": str(self.heads), "perplexity": self.perplexity}
        return facts | self.result.to_dict()


@dataclass(frozen=True)
class RetrievalCheck:
    """The rows of a causal check: the model as it is, the top k heads out, and random sets of k others out."""

    rows: tuple[CheckRow, ...]
    mode: Mode
    phase: CheckPhase
    barred: HeadSet
    prompts: int

    @property
    def intact(self) -> CheckRow:
        """The model with no head taken out."""
        return self.rows[0]

    def top(self, k: int) -> CheckRow:
        """The row of the k best heads; UnitError if that size was not checked."""
        return self._of("top", k)[0]

    def random(self, k: int) -> tuple[CheckRow, ...]:
        """The random controls of k heads."""
        return self._of("random", k)

    def _of(self, kind: str, k: int) -> tuple[CheckRow, ...]:
        found = tuple(row for row in self.rows if row.kind == kind and row.k == k)
        if not found:
            raise UnitError(f"k={k} was not checked; sizes: {sorted({row.k for row in self.rows if row.kind == kind})}")
        return found

    def to_dict(self) -> dict[str, Any]:
        """Plain values for a report."""
        how = {"mode": self.mode, "phase": self.phase, "prompts": self.prompts, "barred": len(self.barred)}
        return how | {"rows": [row.to_dict() for row in self.rows]}

    def __str__(self) -> str:
        lines = [f"{'heads out':<12} {'exact':>6} {'95 % interval':>14} {'tokens':>7} {'perplexity':>11}"]
        for row in self.rows:
            low, high = row.result.interval
            ppl = "-" if row.perplexity is None else f"{row.perplexity:.2f}"
            name = "none" if row.kind == "none" else f"{row.kind} {row.k}"
            lines.append(
                f"{name:<12} {row.result.mean:6.2f} {f'{low:.2f} to {high:.2f}':>14} {row.result.tokens:7.2f} {ppl:>11}"
            )
        return "\n".join(lines)


def retrieval_check(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    scores: HeadScores,
    *,
    top: Sequence[int] = (1, 3, 5, 10),
    random_sets: int = 3,
    exclude: HeadSet | None = None,
    mode: Mode = "zero",
    phase: CheckPhase = "all",
    prompts: Sequence[Prompt] | None = None,
    tests: int = 8,
    length: int = 512,
    text_tokens: int | None = None,
    batch_size: int = 1,
    seed: int = 0,
    progress: bool = False,
) -> RetrievalCheck:
    """Takes the `top` best heads out and, of the same sizes, `random_sets` random sets of other heads: is the score causal?

    Exact match and token accuracy on `prompts` (default: `tests` passkeys of `length` tokens), perplexity on `text_tokens` of text
    (default 2048 in windows of 1024; with phase="decode" none, as text would have to be read token by token: give a number).
    `exclude` is what no control may hold; by default the best 100 heads, or 15 % of them where that is less, and never
    fewer than the largest `top`. `mode`: "zero" (output 0), "uniform" (attention to all keys
    alike) or "mean" (the head's mean output on text).
    `phase="decode"` takes the heads out only behind the prefill, token by token; "uniform" so is what the reference code does.

    Raises UnitError for sizes beyond the heads that are left, WrongModelError for scores of another model, TaskError for bad prompts.

    >>> from headwise.hub import load_model
    >>> model, tokenizer = load_model("tiny-random-llama")
    >>> scores = HeadScores(values=torch.rand(3, 4), method="random")
    >>> check = retrieval_check(model, tokenizer, scores, top=(2,), random_sets=1, tests=1, length=300, text_tokens=0)
    >>> [(row.kind, row.k) for row in check.rows], check.top(2).heads == scores.top(2)
    ([('none', 0), ('top', 2), ('random', 2)], True)
    """
    scores.check(fingerprint(model))
    _check_choice(scores, mode, phase, top)
    barred = controls_exclude(scores, max(top)) if exclude is None else exclude
    generator = torch.Generator().manual_seed(seed)
    if prompts is None:
        if tokenizer is None:
            raise TaskError("making prompts needs a tokenizer; or give prompts= of your own")
        prompts = make_passkeys(tokenizer, count=tests, length=length, generator=generator)
    sets: list[tuple[Literal["none", "top", "random"], int, HeadSet]] = [("none", 0, HeadSet.empty())]
    for k in top:
        sets.append(("top", k, scores.top(k)))
        controls = scores.random_sets(k, random_sets, generator=generator, exclude=barred)
        sets += [("random", k, control) for control in controls]
    means = _mean_outputs(model, tokenizer) if mode == "mean" else None
    text = _text(tokenizer, (2048 if phase == "all" else 0) if text_tokens is None else text_tokens)
    rows = []
    for kind, k, heads in track(sets, "causal check", progress):
        with _taken_out(model, heads, mode, phase, means):
            through: Any = "one-forward" if phase == "all" else "cache"
            result = exact_match(model, prompts, batch_size=batch_size, through=through)
            rows.append(CheckRow(kind, k, heads, result, _perplexity(model, text, phase)))
    return RetrievalCheck(tuple(rows), mode, phase, barred, len(prompts))


def controls_exclude(scores: HeadScores, largest: int) -> HeadSet:
    """The best heads, which no random control may hold: 100 or 15 % of all, the smaller, but at least `largest`."""
    return scores.top(max(largest, min(BARRED, round(BARRED_SHARE * len(scores)))))


def _check_choice(scores: HeadScores, mode: str, phase: str, top: Sequence[int]) -> None:
    if scores.kind != "head":
        raise UnitError(f"the check takes query heads out; these scores are of kind {scores.kind!r}")
    if mode not in get_args(Mode):
        raise EditError(f"mode={mode!r}; choose {', '.join(get_args(Mode))}")
    if phase not in get_args(CheckPhase):
        raise EditError(f"phase={phase!r}; choose {', '.join(get_args(CheckPhase))}")
    if not top or min(top) < 1:
        raise UnitError(f"top={tuple(top)}; sizes of at least 1 (the intact model is always the first row)")


def _taken_out(
    model: PreTrainedModel, heads: HeadSet, mode: Mode, phase: CheckPhase, means: Tensor | None
) -> AbstractContextManager[Any]:
    if not len(heads):
        return nullcontext()
    vectors = None if means is None else torch.stack([means[layer, head] for layer, head in heads.pairs()])
    return ablate(model, heads, mode=mode, phase=phase, mean=vectors)


def _mean_outputs(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> Tensor:
    """Mean output of every head over text, (L, H, D) float32."""
    ids = _text(tokenizer, CALIBRATION, "haystack").to(model.device)
    layers = find_stack(model).layers
    with torch.no_grad(), observe(model, "output") as record:
        model(ids[None], use_cache=False)
    return torch.stack([record.output(layer).float().mean((0, 1)) for layer in range(layers)]).cpu()


def _text(tokenizer: PreTrainedTokenizerBase | None, count: int, split: Literal["haystack", "eval"] = "eval") -> Tensor:
    if count and tokenizer is None:
        raise TaskError(
            "perplexity and mode='mean' read text, which needs a tokenizer; text_tokens=0 leaves perplexity out"
        )
    ids = encode(tokenizer, english(split)[: 12 * count]) if tokenizer is not None and count else []
    return torch.tensor(ids[:count], dtype=torch.long)


def _perplexity(model: PreTrainedModel, text: Tensor, phase: CheckPhase) -> float | None:
    if not len(text):
        return None
    window = min(1024, len(text))
    if phase == "all":
        return perplexity(model, text, window=window, tokens=len(text))
    return perplexity(model, text, window=window, tokens=len(text), through="cache", step=1)


__all__ = ["CheckRow", "RetrievalCheck", "controls_exclude", "retrieval_check"]
