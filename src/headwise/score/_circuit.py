"""What a search for a circuit gives: its stages, from the logits backwards."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from headwise.units import HeadScores, HeadSet, Meta


@dataclass(frozen=True)
class Stage:
    """One round of path patching: to which receivers (None: the logits), through what, all scores, and the heads kept."""

    receivers: HeadSet | None
    through: str
    scores: HeadScores
    kept: HeadSet


@dataclass(frozen=True)
class Circuit:
    """The stages of a search, from the logits backwards."""

    stages: tuple[Stage, ...]

    @property
    def heads(self) -> HeadSet:
        """Union of what the stages kept."""
        found = HeadSet.empty()
        for stage in self.stages:
            found = found | stage.kept
        return found

    def scores(self) -> HeadScores:
        """The largest |share| of the stages that kept a head, 0 for a head that none kept: (L, H)."""
        first = self.stages[0].scores
        values = torch.zeros_like(first.values)
        for stage in self.stages:
            for layer, head in stage.kept.pairs():
                values[layer, head] = max(values[layer, head], stage.scores.values[layer, head].abs())
        meta: Meta = {"stages": len(self.stages), "heads": len(self.heads)}
        return HeadScores(values=values, method="circuit", data=first.data, fingerprint=first.fingerprint, meta=meta)

    def overlap(self, other: Circuit) -> dict[str, float]:
        """Heads in both circuits over those in either one (`union`), in this one (`mine`) and in the other (`theirs`)."""
        shared = len(self.heads & other.heads)
        return {
            "union": shared / len(self.heads | other.heads),
            "mine": shared / len(self.heads),
            "theirs": shared / len(other.heads),
        }
