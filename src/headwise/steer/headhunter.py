"""HeadHunter: the head set that makes guided images best, found greedily, with any objective.

Ahn et al. 2025, arXiv 2506.10978, algorithm 1. S = []; in each of R rounds every head c of the pool is tried as S + [c] on the same M
prompt-seed pairs, and the k best heads join S in the order of their scores. The k of one round are each judged alone
with S, not together. Cost: M · |P| · R images.

Letters: M prompt-seed pairs, P pool, L layers, H query heads.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch
from torch import Tensor

from headwise import storage
from headwise.addresses import Fingerprint
from headwise.attach import fingerprint
from headwise.checks import finite, whole
from headwise.errors import ArtifactError, EditError, UnitError
from headwise.progress import track
from headwise.registry import register
from headwise.steer._perturb import Perturbation, strength_table
from headwise.units import HeadScores, HeadSet, Meta

if TYPE_CHECKING:
    from torch import nn

    from headwise.edits import HeadEdits

Objective = Callable[[Tensor], Tensor]
"""From the M images (M, …) of one candidate, in the order of the pairs, to M scores; higher is better."""


class Sampler(Protocol):
    """Images (R, M, …) of R head sets, given as strengths (R, L, H); `FlowSampler` is one, a pipeline in a loop another."""

    @property
    def pairs(self) -> int: ...

    def __call__(self, strengths: Tensor | None, like: Perturbation | None = None) -> Tensor: ...


@dataclass(frozen=True)
class Round:
    """One round: the score of every head that was tried, and the heads that joined, best first."""

    scores: dict[tuple[int, int], float]
    chosen: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Hunt:
    """The result of a search: `order` is S in the order in which heads joined; `baseline` the mean score without guidance."""

    rounds: tuple[Round, ...]
    like: Perturbation
    baseline: float
    made_for: Fingerprint
    images: int

    @property
    def order(self) -> tuple[tuple[int, int], ...]:
        """(layer, head) of every chosen head, first come first."""
        return tuple(pair for one in self.rounds for pair in one.chosen)

    @property
    def best(self) -> tuple[float, ...]:
        """Score of the best candidate of each round."""
        return tuple(max(one.scores.values()) for one in self.rounds)

    def heads(self, count: int | None = None) -> HeadSet:
        """The first `count` heads that joined (all of them by default), each with weight 1."""
        return HeadSet.of(self.order[:count])

    def perturbation(self, u: float | None = None, count: int | None = None) -> Perturbation:
        """The found set as a perturbation, with another u if wished: choosing u afterwards is cheap."""
        return replace(self.like, heads=self.heads(count), u=self.like.u if u is None else u)

    def scores(self) -> HeadScores:
        """What each head is worth alone (the first round): the gain over no guidance; heads outside the pool have 0."""
        values = torch.zeros(self.made_for.layers, self.made_for.heads)
        for (layer, head), score in self.rounds[0].scores.items():
            values[layer, head] = score - self.baseline
        return HeadScores(
            values=values,
            method="headhunter",
            data=f"{self.images} images",
            fingerprint=self.made_for,
            meta={"u": self.like.u},
        )


def hunt(
    model: nn.Module,
    sampler: Sampler,
    objective: Objective,
    *,
    k: int = 3,
    rounds: int = 5,
    like: Perturbation | None = None,
    pool: HeadSet | None = None,
    batch: int = 8,
    state: str | Path | None = None,
    stack: str | None = None,
    progress: bool = False,
) -> Hunt:
    """The search itself. `like`: strength, target and scope of the perturbation (u = 1 to identity by default, its heads are ignored).

    pool: heads to choose from, all by default. batch: head sets whose images are made together. state: a JSON file that
    keeps what is done, written after every batch; a search of the same settings goes on from it.

    Raises UnitError for an empty pool, k · rounds beyond the pool or a head that the model lacks; EditError for an objective that
    gives NaN or another shape than (M,); ArtifactError for a state file of other settings.
    """
    made_for = fingerprint(model, stack)
    like = replace(like or Perturbation(heads=HeadSet.empty(), u=1.0), heads=HeadSet.empty())
    candidates = HeadSet.empty().complement(made_for.layers, made_for.heads) if pool is None else pool
    candidates.check(made_for)
    _check(candidates, k, rounds, batch)
    memory = _Memory(state, _settings(like, candidates, k, sampler.pairs, made_for))
    baseline = _scored(sampler(None)[0], objective, sampler.pairs)
    done: list[Round] = []
    chosen: tuple[tuple[int, int], ...] = ()
    for number in range(rounds):
        left = [pair for pair in candidates.pairs() if pair not in chosen]
        scores = memory.scores(number)
        todo = [pair for pair in left if pair not in scores]
        for group in _batches(todo, batch, f"round {number + 1} of {rounds}", progress):
            sets = [HeadSet.of([*chosen, pair]) for pair in group]
            images = sampler(strength_table(sets, like.u, made_for), like)
            for pair, found in zip(group, images, strict=True):
                scores[pair] = _scored(found, objective, sampler.pairs)
            memory.write(number, scores)
        order = sorted(left, key=lambda pair: (-scores[pair], pair))
        done.append(Round(dict(scores), tuple(order[:k])))
        chosen += tuple(order[:k])
    made = sampler.pairs * sum(len(one.scores) for one in done)
    return Hunt(tuple(done), like, baseline, made_for, made)


@register("steer", "headhunter", paper="07")
def headhunter(
    model: nn.Module,
    tokenizer: Any,
    *,
    sampler: Sampler | None = None,
    objective: Objective | None = None,
    pool: HeadSet | None = None,
    k: int = 3,
    rounds: int = 5,
    u: float = 1.0,
    target: Literal["identity", "uniform"] = "identity",
    batch: int = 8,
    state: str | None = None,
    progress: bool = False,
) -> HeadEdits:
    """Search the heads whose degraded pass is best pushed away from, and give that pass as edits; `hunt` gives the search itself.

    sampler, objective: how images are made and judged, from Python only: see `FlowSampler` and `Objective`. The edits are in
    the set's strength u; `tokenizer` is not used.

    >>> import headwise
    >>> from headwise.hub import load_model
    >>> model, _ = load_model("tiny-random-vit")
    >>> class Toy:  # images that are the head sets themselves
    ...     pairs = 1
    ...     def __call__(self, strengths, like=None):
    ...         return torch.zeros(1, 1, 2, 4) if strengths is None else strengths[:, None]
    >>> worth = torch.tensor([[0.0, 3.0, 1.0, 0.0], [0.0, 0.0, 2.0, 0.0]])
    >>> edits = headhunter(model, None, sampler=Toy(), objective=lambda images: (images * worth).sum((1, 2)), k=1, rounds=3)
    >>> print(edits[0].units)
    L0H1,L0H2,L1H2
    """
    if sampler is None or objective is None:
        raise EditError(
            "headhunter needs sampler= and objective=: what makes images from head sets and what judges them; both are Python callables"
        )
    like = Perturbation(heads=HeadSet.empty(), u=u, target=target)
    found = hunt(
        model, sampler, objective, k=k, rounds=rounds, like=like, pool=pool, batch=batch, state=state, progress=progress
    )
    edits = found.perturbation().edits()
    meta: Meta = {
        "order": " ".join(f"L{l}H{h}" for l, h in found.order),
        "baseline": found.baseline,
        "best": found.best[-1],
    }
    return replace(edits, fingerprint=found.made_for, method="headhunter", meta=meta)


def _check(pool: HeadSet, k: int, rounds: int, batch: int) -> None:
    for name, value in (("k", k), ("rounds", rounds), ("batch", batch)):
        whole(name, value, 1, UnitError)
    if not len(pool):
        raise UnitError("pool is empty; name the heads to choose from, or leave it out for all of them")
    if k * rounds > len(pool):
        raise UnitError(f"k · rounds = {k} · {rounds} heads are asked for, the pool has {len(pool)}; take fewer")


def _scored(images: Tensor, objective: Objective, pairs: int) -> float:
    found = torch.as_tensor(objective(images))
    if found.shape != (pairs,):
        raise EditError(
            f"the objective gave {tuple(found.shape)}; it must give one score for each of the {pairs} images"
        )
    mean = float(found.double().mean())
    if mean != mean:
        raise EditError("the objective gave NaN; a head cannot be ranked by it")
    return mean


def _batches(items: Sequence[Any], size: int, label: str, progress: bool) -> Any:
    return track([items[i : i + size] for i in range(0, len(items), size)], label, progress)


def _settings(like: Perturbation, pool: HeadSet, k: int, pairs: int, made_for: Fingerprint) -> dict[str, Any]:
    what = hashlib.sha256(str(pool).encode()).hexdigest()[:16]
    how = {name: getattr(like, name) for name in ("u", "target", "geodesic", "scope")} | {"beta": str(like.beta)}
    return {**how, "pool": what, "k": k, "pairs": pairs, "fingerprint": made_for.to_dict()}


class _Memory:
    """What a search has done so far, in a JSON file if it has one."""

    def __init__(self, path: str | Path | None, settings: dict[str, Any]):
        self.path, self.settings = path, settings
        self.rounds: dict[int, dict[tuple[int, int], float]] = {}
        if path is None or not Path(path).exists():
            return
        payload = storage.read_json(path, "head-hunt", 1)
        with storage.decoding(path):
            if storage.field(payload, "settings", dict) != settings:
                raise ArtifactError(
                    f"{str(path)!r} holds a search with other settings; give another state file, or delete it"
                )
            for number, rows in storage.field(payload, "rounds", dict).items():
                self.rounds[int(number)] = {
                    (whole("layer", l, 0, ArtifactError), whole("head", h, 0, ArtifactError)): finite(
                        "score", s, ArtifactError
                    )
                    for l, h, s in rows
                }

    def scores(self, number: int) -> dict[tuple[int, int], float]:
        """Scores of this round that are known already."""
        return dict(self.rounds.get(number, {}))

    def write(self, number: int, scores: dict[tuple[int, int], float]) -> None:
        """Keep the scores of a round, finished or not."""
        self.rounds[number] = dict(scores)
        if self.path is None:
            return
        rounds = {str(n): [[l, h, s] for (l, h), s in rows.items()] for n, rows in self.rounds.items()}
        storage.write_json(self.path, "head-hunt", 1, {"settings": self.settings, "rounds": rounds})
