"""Path patching of many pairs: some at a time, so that `rows` bounds what is kept; and with experts as senders.

Letters: B pairs, L layers, U units of a layer, S senders, R receivers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from headwise.modes import evaluating
from headwise.score._blocks import at_columns, constant
from headwise.score._edges import edges
from headwise.score._expert_sweep import ExpertSweep
from headwise.score._patching import ROWS, shares
from headwise.score._paths import Paths
from headwise.score._units import chunks, units_of
from headwise.units import HeadSet

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from headwise.tasks.pairs import PromptPairs


class ExpertPaths(Paths):
    """As `Paths`, with experts as senders: what an expert adds goes out behind the attention of its layer."""

    made_of = ExpertSweep
    after_experts = 1

    def _sending(self, forwards: dict[nn.Module, Callable], layer: int, units: Sequence[int]) -> None:
        sweep = self.sweep
        assert isinstance(sweep, ExpertSweep)
        changed = sweep.changed(layer, units, self.other.z[layer])  # (U, B, N, C)
        columns = self.columns.repeat(len(units), 1)
        sent = at_columns(changed.flatten(0, 1), columns)
        forwards.pop(self.blocks.mlps[layer], None)  # the rest of the layer reads what it read: it answers as before
        module = next(one.experts for one in sweep.experts.layers if one.layer == layer)
        forwards[module] = constant(sent.flatten(0, 1))


class PathBatch:
    """Path patching of pairs at the columns `where`; what a model is asked for more than once is kept where all pairs fit at once."""

    def __init__(
        self,
        model: PreTrainedModel,
        pairs: PromptPairs,
        where: Tensor,
        *,
        unit: str = "head",
        freeze_mlps: bool = False,
        rows: int = ROWS,
    ):
        self.model, self.pairs, self.where, self.freeze, self.rows = model, pairs, where, freeze_mlps, rows
        self.make = Paths if unit == "head" else ExpertPaths
        self.parts = chunks(len(pairs), units_of(model, unit), rows)
        self.kept: Paths | None = None

    def _of(self, part: slice) -> Paths:
        if self.kept is not None:
            return self.kept
        made = self.make(self.model, self.pairs[part], self.where[part], freeze_mlps=self.freeze, rows=self.rows)
        self.kept = made if len(self.parts) == 1 else None
        return made

    def scores(
        self,
        receivers: HeadSet | None,
        through: str = "q",
        reduce: str = "ratio_of_means",
        track: Callable[[Any], Any] = iter,
    ) -> Tensor:
        """The share (L, U) of the two prompts' difference that each unit carries to the receivers, None for the logits."""
        return self._shares(lambda paths, bar: paths.differences(receivers, through, bar), reduce, track)

    def edges(
        self,
        senders: Mapping[int, Sequence[int]],
        receivers: Mapping[int, Sequence[int]],
        through: str,
        reduce: str = "ratio_of_means",
        track: Callable[[Any], Any] = iter,
    ) -> Tensor:
        """The share (S, R) that each sender carries to each receiver alone; both by layer."""

        def run(paths: Paths, bar: Callable[[Any], Any]) -> Tensor:
            with evaluating(self.model):
                return edges(paths, senders, receivers, through, bar)

        return self._shares(run, reduce, track)

    def _shares(
        self, run: Callable[[Paths, Callable[[Any], Any]], Tensor], reduce: str, track: Callable[[Any], Any]
    ) -> Tensor:
        several, found = len(self.parts) > 1, []
        for part in track(self.parts) if several else self.parts:  # the bar counts pairs, or else layers
            paths = self._of(part)
            found.append((run(paths, iter if several else track), paths.base.difference, paths.other.difference))
        after, base, other = (torch.cat(table, -1) for table in zip(*found, strict=True))
        return shares(after, base, other, reduce).cpu()
