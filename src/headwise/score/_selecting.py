"""Choose documents by their scores, within each domain, to a budget of tokens: AttentionInfluence, step 4."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from headwise.errors import ScoreError


@dataclass(frozen=True)
class Scored:
    """A document's row in the scores file: its place in the input, domain, tokens and score (NaN: undefined)."""

    index: int
    domain: str
    tokens: int
    score: float


@dataclass(frozen=True)
class Domain:
    """What became of one domain: documents and tokens with a score, those kept, the least score kept, those without a score.

    `length_correlation` is Spearman's rank correlation of length and score (NaN for fewer than three documents).
    """

    documents: int
    tokens: int
    kept_documents: int
    kept_tokens: int
    threshold: float
    undefined: int
    length_correlation: float


@dataclass(frozen=True)
class Selection:
    """The documents to keep, by their place in the input, and each domain's figures."""

    keep: frozenset[int]
    domains: Mapping[str, Domain]

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers for JSON."""
        return {name: dict(vars(domain)) for name, domain in self.domains.items()}


def select_by_tokens(scored: Iterable[Scored], share: float) -> Selection:
    """Of every domain the best documents, as long as they hold at most `share` of its scored tokens.

    Domains are ranked apart because losses of web text, mathematics and code are not comparable. Documents are taken from
    the best on until the next one would exceed the budget, so at most one document is missing. Equal scores: the earlier
    document first. Documents without a score are left out and counted. Raises ScoreError for a share outside (0, 1].

    >>> rows = [Scored(0, "code", 50, 0.2), Scored(1, "code", 50, 0.3), Scored(2, "web", 10, 0.01), Scored(3, "web", 90, 0.0)]
    >>> sorted(select_by_tokens(rows, 0.5).keep)
    [1, 2]
    """
    if not 0 < share <= 1:
        raise ScoreError(f"share={share}; a share of the tokens, in (0, 1] (0.2 keeps a fifth)")
    by_domain: dict[str, list[Scored]] = {}
    for row in scored:
        by_domain.setdefault(row.domain, []).append(row)
    if not by_domain:
        raise ScoreError("there are no documents to select from")
    keep: set[int] = set()
    domains = {}
    for name, members in by_domain.items():
        chosen = _best([m for m in members if math.isfinite(m.score)], share)
        keep.update(row.index for row in chosen)
        domains[name] = _figures(members, chosen)
    return Selection(frozenset(keep), domains)


def _best(members: Sequence[Scored], share: float) -> list[Scored]:
    budget = share * sum(m.tokens for m in members)
    chosen, used = [], 0
    for row in sorted(members, key=lambda m: (-m.score, m.index)):
        if used + row.tokens > budget + 1e-9:
            break
        used += row.tokens
        chosen.append(row)
    return chosen


def _figures(members: Sequence[Scored], chosen: Sequence[Scored]) -> Domain:
    defined = [m for m in members if math.isfinite(m.score)]
    return Domain(
        documents=len(defined),
        tokens=sum(m.tokens for m in defined),
        kept_documents=len(chosen),
        kept_tokens=sum(m.tokens for m in chosen),
        threshold=chosen[-1].score if chosen else math.nan,
        undefined=len(members) - len(defined),
        length_correlation=_spearman([m.tokens for m in defined], [m.score for m in defined]),
    )


def _spearman(a: Sequence[float], b: Sequence[float]) -> float:
    if len(a) < 3 or len(set(a)) == 1 or len(set(b)) == 1:
        return math.nan
    from scipy.stats import spearmanr

    return float(spearmanr(a, b).statistic)


def rank_statistics(first: Sequence[float], second: Sequence[float]) -> dict[str, float]:
    """Do scores of the `first` group rank above those of the `second`? AUC (0.5: no difference) and the one-sided p of Mann-Whitney.

    Undefined scores are left out. Raises ScoreError where a group has none left.

    >>> rank_statistics([3.0, 4.0, 5.0], [1.0, 2.0, 3.5])["auc"] > 0.8
    True
    """
    from scipy.stats import mannwhitneyu

    a, b = ([x for x in group if math.isfinite(x)] for group in (first, second))
    if not a or not b:
        raise ScoreError(f"groups of {len(a)} and {len(b)} defined scores: nothing to compare")
    test = mannwhitneyu(a, b, alternative="greater")
    return {"auc": float(test.statistic) / (len(a) * len(b)), "p": float(test.pvalue)}
