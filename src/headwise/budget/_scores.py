"""What the planners share: scores of kv heads, and a budget turned into a number of full heads."""

from __future__ import annotations

from dataclasses import replace

from headwise.errors import PlanError
from headwise.plan import Budget, Pattern
from headwise.units import HeadScores


def kv_scores(name: str, scores: HeadScores, kv_heads: int | None = None) -> HeadScores:
    """The scores (L, K) of kv heads; a kv head is worth what the best of its query heads is. Raises PlanError.

    `name` is the argument to complain about; `kv_heads` is needed where scores of query heads do not know their model.
    """
    if not isinstance(scores, HeadScores):
        raise PlanError(f"{name} must be HeadScores, not {type(scores).__name__}; HeadScores.load reads a file of them")
    if scores.kind == "kv":
        return scores
    count = scores.fingerprint.kv_heads if scores.fingerprint else kv_heads
    if scores.kind != "head" or count is None:
        raise PlanError(
            f"a plan needs scores of kv heads; {name} holds those of kind {scores.kind!r} and does not know its model: "
            "give kv_heads=, or make them with HeadScores.to_kv(kv_heads)"
        )
    return scores.to_kv(count, "max")


def mixed(first: HeadScores, second: HeadScores, share: float) -> HeadScores:
    """(1 - share) · first / max(first) + share · second / max(second), scores (L, K) of one model. Raises PlanError, WrongModelError."""
    if first.values.shape != second.values.shape:
        raise PlanError(
            f"mix holds scores of {second.layers} × {second.units} kv heads, scores those of {first.layers} × {first.units}"
        )
    if first.fingerprint and second.fingerprint:
        first.fingerprint.require(second.fingerprint, "the table of scores to mix with")
    a, b = first.normalized(), second.normalized()
    method = f"{1 - share:g} {first.method} + {share:g} {second.method}"
    return replace(first, values=(1 - share) * a.values.double() + share * b.values.double(), method=method)


def full_heads(
    budget: str | Budget,
    scores: HeadScores,
    other: Pattern,
    *,
    context: int,
    batch: int,
    head_dim: int | None,
    dtype_bytes: int,
) -> int:
    """How many kv heads may keep everything within a budget while the rest keep what `other` says. Raises PlanError."""
    amount = Budget.parse(budget) if isinstance(budget, str) else budget
    if amount.unit == "bytes" and head_dim is None:
        raise PlanError(f"a budget of {amount} needs head_dim=, the size of a head")
    sizes = {"layers": scores.layers, "kv_heads": scores.units, "head_dim": head_dim or 1, "dtype_bytes": dtype_bytes}
    return amount.full_heads(context=context, other=other, batch=batch, **sizes)
