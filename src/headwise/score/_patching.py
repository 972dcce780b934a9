"""What patching measures: pairs of prompts, their answers' logits, where heads are patched, and shares of an effect.

Letters: B pairs, N columns, L layers, H query heads, D head dim, V vocabulary.
"""

from __future__ import annotations

import copy
import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache

from headwise.arguments import cache_argument
from headwise.attach import find_stack
from headwise.attach.observe import observe
from headwise.errors import AttachError, ScoreError
from headwise.selection import TokenSelection
from headwise.tasks.colored_objects import make_colored_objects
from headwise.tasks.ioi import make_ioi
from headwise.tasks.pairs import PromptPairs, make_induction

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Task = Literal["induction", "ioi", "colored-objects"]
Reduce = Literal["ratio_of_means", "mean_of_ratios"]
ROWS = 64  # of a folded batch: enough to fill the matrix units, little enough for a laptop
SHORT = 4  # columns; a shorter prefix is read again
LEAST = 1e-6  # logit difference between the two runs below which a ratio of effects says nothing


@dataclass(frozen=True, eq=False)
class Run:
    """One pass: outputs of the units `z`, for heads L of (B, N, H, D), `logits` (B, V) of each row's last token, and `difference` (B,)."""

    z: list[Any]
    logits: Tensor
    difference: Tensor


def make_pairs(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    pairs: PromptPairs | None,
    task: str,
    count: int,
    seed: int,
) -> PromptPairs:
    """The caller's pairs, or those of a task, on the model's device. Raises ScoreError for what does not fit together."""
    if task not in get_args(Task):
        raise ScoreError(f"task={task!r}; choose {', '.join(get_args(Task))}")
    vocabulary = int(model.get_input_embeddings().weight.shape[0])
    if pairs is None and task == "induction":
        special = min(
            (t for t in (getattr(tokenizer, "all_special_ids", None) or [vocabulary]) if t > 64), default=vocabulary
        )
        pairs = make_induction(min(vocabulary, special), count=count, seed=seed)
    if pairs is None:
        if tokenizer is None:
            raise ScoreError(f"task={task!r} needs a tokenizer; give pairs= of your own, or take task='induction'")
        make = make_ioi if task == "ioi" else make_colored_objects
        pairs = make(tokenizer, count=count, seed=seed)
    if int(max(pairs.ids.max(), pairs.corrupt.max(), pairs.answers.max(), pairs.contrasts.max())) >= vocabulary:
        raise ScoreError(f"the pairs hold a token beyond the {vocabulary} of this model's vocabulary")
    return pairs.to(model.device)


def column_mask(pairs: PromptPairs, tokens: Any) -> Tensor:
    """Which columns are patched, (B, N) bool: a TokenSelection of positions, its text, or one column of each row (B,)."""
    if isinstance(tokens, Tensor):
        if tokens.shape != (len(pairs),) or tokens.is_floating_point():
            raise ScoreError(
                f"tokens is {tuple(tokens.shape)}; as a tensor it is one column for each of {len(pairs)} rows"
            )
        found = torch.arange(pairs.mask.shape[1], device=pairs.mask.device) == tokens.to(pairs.mask.device)[:, None]
    else:
        positions = (pairs.mask.long().cumsum(1) - 1).masked_fill(~pairs.mask.bool(), -1)
        found = TokenSelection.of(tokens).mask(positions, last=positions.max(1, keepdim=True).values)
    found = found & pairs.mask.bool()
    if not bool(found.any(1).all()):
        raise ScoreError(f"tokens={tokens} selects no token of row {int((~found.any(1)).nonzero()[0])}")
    return found


@dataclass(frozen=True, eq=False)
class Asked:
    """Where a pass over prompts reads the answers, found once: distinct columns, which of them is each row's, mask and positions."""

    start: int
    columns: Tensor
    place: Tensor
    mask: Tensor | None

    @classmethod
    def of(cls, pairs: PromptPairs, start: int = 0) -> Asked:
        """For a pass that reads the columns from `start` on."""
        columns, place = torch.unique(pairs.last - start, return_inverse=True)
        return cls(start, columns, place, None if bool(pairs.mask.all()) else pairs.mask.long())


def answer(
    model: nn.Module,
    pairs: PromptPairs,
    ids: Tensor,
    copies: int = 1,
    prefix: Prefix | None = None,
    asked: Asked | None = None,
) -> tuple[Tensor, Tensor]:
    """(logits (copies · B, V) in float32 of the last real tokens, logit of answer minus contrast (copies · B,)).

    With `prefix`, only the columns behind it are read, against its keys and values. `asked` saves looking for the columns again.
    """
    asked = asked or Asked.of(pairs, 0 if prefix is None else prefix.columns)
    start, mask = asked.start, None if asked.mask is None else asked.mask.repeat(copies, 1)
    extra: dict[str, Any] = {} if mask is None else {"position_ids": positions(mask)[:, start:]}
    if prefix is not None:
        extra |= cache_argument(model, prefix.cache)
    out = model(
        input_ids=ids[:, start:].repeat(copies, 1),
        attention_mask=mask,
        use_cache=prefix is not None,
        logits_to_keep=asked.columns,
        **extra,
    ).logits
    logits = out[torch.arange(len(out), device=out.device), asked.place.repeat(copies)].float()
    return logits, difference(logits, pairs, copies)


@dataclass(frozen=True, eq=False)
class Prefix:
    """The first columns of a batch, which no patch can reach, as keys and values."""

    columns: int
    cache: Any

    def copied(self, copies: int, layer: int) -> Prefix:
        """`copies` times the batch, for a pass from `layer` on; the layers before it only say how long they are.

        Keys and values are repeated one layer at a time, when it reads them: nothing of that outlives the layer.
        """
        cache = copy.copy(self.cache)
        cache.layers = [copy.copy(one) for one in self.cache.layers]
        for one, kept in zip(cache.layers[layer:], self.cache.layers[layer:], strict=True):
            one.update = functools.partial(_read_only, one, kept, copies)
        return Prefix(self.columns, cache)


def _read_only(one: Any, kept: Any, copies: int, keys: Tensor, values: Tensor, *args: Any, **options: Any) -> Any:
    """The `update` of a cache layer that is read `copies` times over and keeps nothing but how long it has become."""
    grown = copy.copy(kept)
    grown.keys, grown.values = kept.keys.repeat(copies, 1, 1, 1), kept.values.repeat(copies, 1, 1, 1)
    result = grown.update(keys, values, *args, **options)
    length = grown.get_seq_length()
    one.get_seq_length = lambda: length
    return result


@torch.no_grad()
def read_prefix(model: PreTrainedModel, pairs: PromptPairs, columns: int) -> Prefix:
    """Read the first columns of the prompts into a cache."""
    mask = None if bool(pairs.mask.all()) else pairs.mask[:, :columns].long()
    extra = {} if mask is None else {"position_ids": positions(mask)}
    cache = DynamicCache(config=model.config)
    model(
        input_ids=pairs.ids[:, :columns],
        attention_mask=mask,
        use_cache=True,
        logits_to_keep=1,
        **cache_argument(model, cache),
        **extra,
    )
    return Prefix(columns, cache)


def positions(mask: Tensor) -> Tensor:
    """Positions of the real tokens from 0, so that a row reads the same with padding and without."""
    return (mask.cumsum(1) - 1).clamp(min=0)


def difference(logits: Tensor, pairs: PromptPairs, copies: int = 1) -> Tensor:
    """logit of answer minus contrast, (copies · B,)."""
    right, wrong = pairs.answers.repeat(copies)[:, None], pairs.contrasts.repeat(copies)[:, None]
    return (logits.gather(1, right) - logits.gather(1, wrong))[:, 0]


@torch.no_grad()
def record(model: nn.Module, pairs: PromptPairs, ids: Tensor, stack: str | None = None) -> Run:
    """One pass over ids (B, N), with the outputs of all heads."""
    with observe(model, "output", stack=stack) as seen:
        logits, ld = answer(model, pairs, ids)
    layers = find_stack(model, stack).layers
    return Run([seen.output(layer) for layer in range(layers)], logits, ld)


def shares(after: Tensor, base: Tensor, other: Tensor, reduce: str = "ratio_of_means") -> Tensor:
    """(after − base) / (other − base) over the last axis B: 0 nothing moved, 1 as in the other run. (…, B) -> (…).

    Raises ScoreError where the two runs answer alike.
    """
    if reduce not in get_args(Reduce):
        raise ScoreError(f"reduce={reduce!r}; choose {', '.join(get_args(Reduce))}")
    moved, gap = after.double() - base.double(), other.double() - base.double()
    if reduce == "ratio_of_means":
        moved, gap = moved.mean(-1, keepdim=True), gap.mean(-1, keepdim=True)
    if float(gap.abs().min()) < LEAST:
        raise ScoreError(
            f"prompts and twins differ by {float(gap.abs().min()):.1e} in their logit difference: there is no effect to divide; "
            "take a task that the model answers, or reduce='ratio_of_means'"
        )
    return (moved / gap).mean(-1)


def need_language_model(model: nn.Module) -> None:
    """Refuse a model without next-token logits."""
    if getattr(model, "get_output_embeddings", lambda: None)() is None:
        raise AttachError(f"{type(model).__name__} has no output embeddings: patching compares next-token logits")
