"""MLPs as nodes beside heads: what each writes into the answer itself, and what it does to it with all that follows live.

Letters: B prompts, N columns, L layers, C width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from headwise.modes import evaluating
from headwise.score._blocks import Kept, at_columns, constant, first, with_first
from headwise.score._letters import Effects, need_decoder
from headwise.score._patching import ROWS, answer, column_mask, need_language_model
from headwise.score._paths import Paths

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from headwise.tasks.pairs import PromptPairs


@dataclass(frozen=True, eq=False)
class MlpEffects:
    """What replacing one MLP's last output by its twin's takes from LD, in logits: `direct` and `total` (L, B), `base` (B,) LD itself."""

    direct: Tensor
    total: Tensor
    base: Tensor

    def ranking(self, heads: Effects | None = None) -> list[tuple[str, float]]:
        """MLPs (`L3 mlp`), and heads (`L3H1`) where their effects are given, by mean direct effect."""
        found = {f"L{layer} mlp": value for layer, value in enumerate(self.direct.double().mean(-1).tolist())}
        if heads is not None:
            for layer, row in enumerate(heads.direct.double().mean(-1).tolist()):
                found |= {f"L{layer}H{head}": value for head, value in enumerate(row)}
        return sorted(found.items(), key=lambda item: -item[1])


class _MlpPaths(Paths):
    """Path patching whose only sender in a layer is its MLP."""

    def __init__(self, model: PreTrainedModel, pairs: PromptPairs, where: Tensor, rows: int):
        super().__init__(model, pairs, where, freeze_mlps=True, rows=rows)
        self.twins = Kept(self.blocks)
        with evaluating(model), torch.no_grad(), self.twins.recording():
            answer(model, pairs, pairs.corrupt)

    def _sending(self, forwards: dict[nn.Module, Callable], layer: int, units: Sequence[int]) -> None:
        output = self.twins.mlp[layer]
        sent = at_columns(first(output), self.columns, len(units))
        forwards[self.blocks.mlps[layer]] = constant(with_first(output, sent))

    def live(self, layer: int) -> Tensor:
        """LD (B,) with the MLP's last output the twin's and all that follows live."""
        own, other = self.kept.mlp[layer], self.twins.mlp[layer]
        mixed = torch.where(self.where[..., None], first(other), first(own))[:, self.sweep.start :]
        return self.sweep.run(layer, None, 1, {self.blocks.mlps[layer]: constant(with_first(own, mixed))})


def mlp_effects(
    model: PreTrainedModel, pairs: PromptPairs, *, rows: int = ROWS, track: Callable[[Any], Any] = iter
) -> MlpEffects:
    """Direct and total effect of every MLP (or mixture of experts) at the last token, prompt by prompt; as `letter_effects` for heads.

    Raises AttachError for a model without next-token logits, or that is not causal.

    >>> from headwise.hub import load_model
    >>> from headwise.tasks.pairs import make_induction
    >>> found = mlp_effects(load_model("tiny-random-llama")[0], make_induction(200, count=3, length=6))
    >>> found.direct.shape, bool(torch.allclose(found.direct[-1], found.total[-1], atol=1e-5))
    (torch.Size([3, 3]), True)
    """
    need_language_model(model)
    need_decoder(model)
    pairs = pairs.to(model.device)
    paths = _MlpPaths(model, pairs, column_mask(pairs, "last"), rows)
    base = paths.base.difference
    with evaluating(model), torch.no_grad(), paths.sweep.attached():
        found = [
            (base - paths.to_logits(layer, [0])[0], base - paths.live(layer))
            for layer in track(range(paths.found.layers))
        ]
    direct, total = (torch.stack(table).cpu() for table in zip(*found, strict=True))
    return MlpEffects(direct, total, base.cpu())
