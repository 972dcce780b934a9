"""Which heads put the label of the right option there: their direct and total effect, what they look at, what kind they are.

Letters: B prompts, C options, L layers, H query heads, U heads folded into the batch.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from headwise.attach import HeadCall, find_stack
from headwise.attach.observe import observe
from headwise.checks import whole
from headwise.errors import AttachError, ScoreError
from headwise.modes import evaluating
from headwise.score._patching import ROWS, answer, column_mask, need_language_model, record
from headwise.score._paths import Paths
from headwise.tasks.pairs import PromptPairs
from headwise.units import HeadSet

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NEEDED = ("labels", "choices", "correct", "other")
KINDS = ("correct-letter", "single-letter", "uniform", "amplification", "other")


@dataclass(frozen=True, eq=False)
class Effects:
    """What replacing one head's last output by its twin's takes from LD = logit(right label) − logit(the twin's), in logits.

    `direct` (L, H, B): everything behind the head is frozen, the final norm is live. `total` (L, H, B): everything behind it is
    live. `base` (B,): LD itself.
    """

    direct: Tensor
    total: Tensor
    base: Tensor

    def output_nodes(self, share: float = 0.8) -> HeadSet:
        """The fewest heads whose direct effects, the largest first, add up to `share` of the sum of all positive ones."""
        if not 0 < share <= 1:
            raise ScoreError(f"share={share}; it is a share of the positive direct effects, above 0 and at most 1")
        mean = self.direct.double().mean(-1)
        order = mean.flatten().argsort(descending=True)
        curve = self.cumulative()
        if not len(curve):
            raise ScoreError(
                "no head has a positive direct effect: the model does not answer these prompts by its heads"
            )
        count = int((curve < share - 1e-9).sum()) + 1
        return HeadSet.of([divmod(int(i), mean.shape[1]) for i in order[:count]])

    def cumulative(self) -> Tensor:
        """Share of the positive direct effects that the 1, 2, 3 … best heads hold; as long as there are such heads."""
        mean = self.direct.double().mean(-1).flatten().sort(descending=True).values
        positive = mean[mean > 0]
        return positive.cumsum(0) / positive.sum()


def letter_effects(
    model: PreTrainedModel, pairs: PromptPairs, *, rows: int = ROWS, track: Callable[[Any], Any] = iter
) -> Effects:
    """Direct and total effects of all heads at the last token, prompt by prompt. Raises ScoreError for pairs without labels.

    The total effect is activation patching, the direct one path patching to the logits with the MLPs frozen too.
    """
    need_decoder(model)
    pairs = need_labels(pairs).to(model.device)
    heads = range(find_stack(model).heads)
    with evaluating(model):
        paths = Paths(model, pairs, column_mask(pairs, "last"), freeze_mlps=True, rows=rows)
        direct, total = [], []
        for layer in track(range(find_stack(model).layers)):
            direct.append(paths.base.difference - paths.to_logits(layer, heads))
            total.append(paths.base.difference - paths.sweep.layer(layer, heads, paths.other.z[layer]))
    return Effects(torch.stack(direct).cpu(), torch.stack(total).cpu(), paths.base.difference.cpu())


@dataclass(frozen=True, eq=False)
class Resample:
    """The transform: at each row's last token the outputs of `heads` are those of the twins' run, all of them at once.

    rows (B,): columns of the last tokens. outputs: by layer, (B, H, D).
    """

    heads: HeadSet
    rows: Tensor
    outputs: Mapping[int, Tensor]

    @classmethod
    def of(cls, model: PreTrainedModel, pairs: PromptPairs, heads: HeadSet) -> Resample:
        """Runs the twins once."""
        return cls.all_heads(model, pairs).only(heads)

    @classmethod
    def all_heads(cls, model: PreTrainedModel, pairs: PromptPairs) -> Resample:
        """Runs the twins once; `only` then takes some of the heads."""
        pairs, found = need_labels(pairs).to(model.device), find_stack(model)
        with evaluating(model):
            z = record(model, pairs, pairs.corrupt).z
        at = torch.arange(len(pairs), device=pairs.ids.device)
        every = HeadSet.of([(layer, head) for layer in range(found.layers) for head in range(found.heads)])
        return cls(every, pairs.last, {layer: out[at, pairs.last] for layer, out in enumerate(z)})

    def only(self, heads: HeadSet) -> Resample:
        """The same outputs, of some heads."""
        missing = heads - self.heads
        if len(missing):
            raise ScoreError(f"no outputs of {missing} were recorded")
        return replace(self, heads=heads)

    def __call__(self, call: HeadCall, attend: Callable[[], Tensor]) -> Tensor:
        out = attend()
        mine = self.heads.by_layer().get(call.layer, ())
        here = self.rows.to(out.device) - call.past
        if not len(mine) or bool((here < 0).all()):
            return out
        if len(self.rows) != len(out) or bool(((here < 0) | (here >= out.shape[1])).any()):
            raise AttachError(
                f"layer {call.layer}: outputs of {len(self.rows)} last tokens, this pass has {tuple(out.shape[:2])}"
            )
        out, batch = out.clone(), torch.arange(len(out), device=out.device)
        for head in mine:
            out[batch, here, head - call.site.first_head] = self.outputs[call.layer][:, head].to(out)
        return out


@dataclass(frozen=True, eq=False)
class LabelPattern:
    """What the last token looks at, mean over the prompts of each right option.

    `mass` (L, H, C, C): attention on label j where option k is right, at [k, j]. `recent` (L, H): attention on the last tokens.
    """

    mass: Tensor
    recent: Tensor

    @property
    def on_labels(self) -> Tensor:
        """Attention on all labels together, (L, H)."""
        return self.mass.sum(-1).mean(-1)

    @property
    def shares(self) -> Tensor:
        """`mass` with each row brought to sum 1, (L, H, C, C)."""
        return self.mass / self.mass.sum(-1, keepdim=True).clamp(min=1e-12)

    @property
    def on_correct(self) -> Tensor:
        """Attention on the right label, mean over the options, (L, H)."""
        return self.mass.diagonal(dim1=-2, dim2=-1).mean(-1)

    def kinds(
        self,
        *,
        looks: float = 0.3,
        mean: float = 0.5,
        least: float = 0.4,
        lead: float = 0.3,
        spread: float = 0.9,
        recent: float = 0.5,
    ) -> list[list[str]]:
        """A name for every head, (L, H), one of `KINDS`.

        correct-letter: mass on the labels >= `looks`, the share of the right one >= `mean` on average and >= `least` for each option.
        single-letter: mass >= `looks` where one option is right and for no other; its share is then larger by `lead`. uniform: mass >=
        `looks`, entropy of the shares >= `spread` · ln C. amplification: mass below `looks`, attention on the last tokens >= `recent`.
        """
        shares, mass, C = self.shares, self.mass.sum(-1), self.mass.shape[-1]
        right = shares.diagonal(dim1=-2, dim2=-1)  # (L, H, C)
        elsewhere = (shares.sum(-2) - right) / (C - 1)
        entropy = -torch.xlogy(shares, shares).sum(-1).mean(-1)
        looking = self.on_labels >= looks
        tests = {
            "correct-letter": looking & (right.mean(-1) >= mean) & (right.min(-1).values >= least),
            "single-letter": ((mass >= looks).sum(-1) == 1) & ((mass >= looks) & (right - elsewhere >= lead)).any(-1),
            "uniform": looking & (entropy >= spread * math.log(C)),
            "amplification": ~looking & (self.recent >= recent),
        }
        names = [["other"] * self.mass.shape[1] for _ in range(self.mass.shape[0])]
        for name, found in reversed(tests.items()):
            for layer, head in found.nonzero().tolist():
                names[layer][head] = name
        return names

    def of_kind(self, kind: str, **thresholds: float) -> HeadSet:
        """The heads of one kind; options as in `kinds`."""
        if kind not in KINDS:
            raise ScoreError(f"kind={kind!r}; choose {', '.join(KINDS)}")
        table = self.kinds(**thresholds)
        return HeadSet.of([(li, h) for li, row in enumerate(table) for h, name in enumerate(row) if name == kind])

    def counts(self, **thresholds: float) -> Mapping[str, int]:
        """How many heads are of each kind; they add up to all heads."""
        found = Counter(name for row in self.kinds(**thresholds) for name in row)
        return {kind: found[kind] for kind in KINDS}


@torch.no_grad()
def label_pattern(model: PreTrainedModel, pairs: PromptPairs, *, recent: int = 3) -> LabelPattern:
    """Attention of every head from the last token to each label, and to the `recent` last tokens.

    One pass with the model's own attention; only the last row of each head is computed anew. Raises ScoreError for pairs without
    labels, or where some option is right in no prompt.
    """
    need_decoder(model)
    pairs = need_labels(pairs).to(model.device)
    whole("recent", recent, 1, ScoreError)
    start = pairs.mask.long().argmax(1)
    at, end = pairs.marks["labels"] - start[:, None], (pairs.last - start).view(-1, 1, 1, 1, 1)
    C = at.shape[1]
    tests = {f"label {j}": _at(at[:, j].view(-1, 1, 1, 1, 1)) for j in range(C)}
    tests["recent"] = lambda queries, keys: (keys > end - recent) & (keys <= end)
    with evaluating(model), observe(model, rows="last", pair_mass=tests) as seen:
        answer(model, pairs, pairs.ids)
    mass = torch.stack([seen.table(f"label {j}")[..., -1] for j in range(C)], -1)  # (L, B, H, C)
    correct = pairs.marks["correct"].cpu()
    missing = sorted({*range(C)} - {*correct.tolist()})
    if missing:
        raise ScoreError(f"no prompt is answered by option {missing[0]} of {C}; take prompts for every option")
    by_option = torch.stack([mass[:, correct == k].mean(1) for k in range(C)], 2)
    return LabelPattern(by_option, seen.table("recent")[..., -1].mean(1))


def _at(columns: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda queries, keys: keys == columns


def need_decoder(model: PreTrainedModel) -> None:
    """Refuse a model without next-token logits, and one whose tokens see what comes behind them."""
    need_language_model(model)
    if not find_stack(model).causal:
        raise AttachError(
            f"{type(model).__name__} is bidirectional: its last token is not where the next one is answered; take a decoder"
        )


def need_labels(pairs: PromptPairs) -> PromptPairs:
    """The pairs, if they are of multiple choice; ScoreError says what is missing."""
    missing = [name for name in NEEDED if name not in pairs.marks]
    if missing:
        raise ScoreError(
            f"pairs have no marks {', '.join(missing)}; make_multiple_choice and choice_pairs of headwise.tasks.multiple_choice give them"
        )
    if bool((pairs.marks["correct"] == pairs.marks["other"]).any()):
        raise ScoreError("a prompt and its twin have the same right option; patching would compare it with itself")
    return pairs
