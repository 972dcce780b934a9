"""The patching engine: what a model answers when one head's output is taken from another run, all heads in few passes.

A clean pass keeps the outputs of the heads and what enters each layer. A patched run differs from it only from the head's
layer on, so the run starts there (`attach/resume.py`), with the heads of a layer as copies in the batch.

Letters: B pairs, N columns, L layers, H query heads, D head dim, U heads folded into the batch, V vocabulary.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache

from headwise.attach import HeadCall, attach, find_stack
from headwise.attach.observe import observe
from headwise.attach.resume import Resume
from headwise.checks import whole
from headwise.errors import AttachError, ScoreError
from headwise.score._blocks import first, with_first
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
    """One pass: head outputs `z` (L of (B, N, H, D)), `logits` (B, V) of each row's last token, and `difference` (B,)."""

    z: list[Tensor]
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


@contextlib.contextmanager
def quiet(model: nn.Module) -> Iterator[None]:
    """The model in eval mode inside the block: dropout would make two runs differ by chance."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


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


def answer(
    model: nn.Module, pairs: PromptPairs, ids: Tensor, copies: int = 1, prefix: Prefix | None = None
) -> tuple[Tensor, Tensor]:
    """(logits (copies · B, V) in float32 of the last real tokens, logit of answer minus contrast (copies · B,)).

    With `prefix`, only the columns behind it are read, against its keys and values.
    """
    start = 0 if prefix is None else prefix.columns
    columns, where = torch.unique(pairs.last - start, return_inverse=True)
    mask = None if bool(pairs.mask.all()) else pairs.mask.long().repeat(copies, 1)
    extra: dict[str, Any] = {} if mask is None else {"position_ids": positions(mask)[:, start:]}
    if prefix is not None:
        extra["past_key_values"] = prefix.cache
    out = model(
        input_ids=ids[:, start:].repeat(copies, 1),
        attention_mask=mask,
        use_cache=prefix is not None,
        logits_to_keep=columns,
        **extra,
    ).logits
    logits = out[torch.arange(len(out), device=out.device), where.repeat(copies)].float()
    return logits, difference(logits, pairs, copies)


@dataclass(frozen=True, eq=False)
class Prefix:
    """The first columns of a batch, which no patch can reach, as keys and values."""

    columns: int
    cache: Any

    def copied(self, copies: int, layer: int) -> Prefix:
        """`copies` times the batch, for a pass from `layer` on; the layers before it only say how long they are."""
        cache = copy.copy(self.cache)
        cache.layers = [copy.copy(one) for one in self.cache.layers]
        for one in cache.layers[layer:]:
            one.keys, one.values = one.keys.repeat(copies, 1, 1, 1), one.values.repeat(copies, 1, 1, 1)
        return Prefix(self.columns, cache)


@torch.no_grad()
def read_prefix(model: PreTrainedModel, pairs: PromptPairs, columns: int) -> Prefix:
    """Read the first columns of the prompts into a cache."""
    mask = None if bool(pairs.mask.all()) else pairs.mask[:, :columns].long()
    extra = {} if mask is None else {"position_ids": positions(mask)}
    cache = DynamicCache(config=model.config)
    model(
        input_ids=pairs.ids[:, :columns],
        attention_mask=mask,
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
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


class Sweep:
    """Runs of one model on one batch of prompts, each with some heads' outputs replaced at some columns.

    `base` is the run that is changed. `rows` bounds the rows of a folded batch; results do not depend on it.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        pairs: PromptPairs,
        where: Tensor,
        *,
        stack: str | None = None,
        rows: int = ROWS,
    ):
        self.model, self.pairs, self.where, self.stack = model, pairs, where, stack
        self.found = find_stack(model, stack)
        self.rows = whole("rows", rows, 1, ScoreError)
        self.resume = Resume(model, range(1, self.found.layers), stack)
        with self.resume.recording():
            self.base = record(model, pairs, pairs.ids, stack)
        self._check_resumed()
        self.prefix = self._find_prefix()

    @property
    def size(self) -> int:
        """Heads that are folded into one batch: the more the fewer columns a pass has."""
        whole_rows = self.rows * self.pairs.ids.shape[1] // (self.pairs.ids.shape[1] - self.start)
        return max(1, whole_rows // len(self.pairs))

    @property
    def start(self) -> int:
        """First column that a pass reads."""
        return 0 if self.prefix is None else self.prefix.columns

    @torch.no_grad()
    def _find_prefix(self) -> Prefix | None:
        """The columns before the first patched one, where a decoder's cache proves that they need not be read again."""
        first = self.where.float().argmax(1)
        columns = int(torch.minimum(first, self.pairs.last).min())
        if columns < SHORT or not self.found.causal or not self.resume.kept:
            return None
        prefix = read_prefix(self.model, self.pairs, columns)
        again = answer(self.model, self.pairs, self.pairs.ids, 1, prefix.copied(1, 0))[0]
        return prefix if self._same(again) else None

    def _same(self, logits: Tensor) -> bool:
        exact = self.base.z[0].dtype in (torch.float32, torch.float64)
        allowed = (1e-4 if exact else 2e-2) * float(self.base.logits.abs().max())
        return bool((logits - self.base.logits).abs().max() <= allowed)

    @torch.no_grad()
    def _check_resumed(self) -> None:
        """A model that hands more than hidden states from layer to layer runs whole each time."""
        middle = self.found.layers // 2
        if not middle:
            return
        with self.resume.from_layer(middle):
            again = answer(self.model, self.pairs, self.pairs.ids)[0]
        if not self._same(again):
            self.resume.kept.clear()

    @torch.no_grad()
    def layer(self, layer: int, heads: Sequence[int], outputs: Tensor) -> Tensor:
        """Logit differences (U, B) with each of `heads` of a layer replaced, alone, by its slice of outputs (B, N, H, D)."""
        parts = []
        for at in range(0, len(heads), self.size):
            some = list(heads[at : at + self.size])
            tail = slice(self.start, None)
            change = Fold(layer, self.base.z[layer][:, tail], outputs[:, tail], some, self.where[:, tail])
            parts.append(self.run(layer, [change], len(some)).view(len(some), -1))
        return torch.cat(parts)

    @torch.no_grad()
    def run(self, layer: int, transforms: Sequence[Any], copies: int) -> Tensor:
        """LD (copies · B,) of a pass from `layer` on, with transforms attached."""
        prefix = None if self.prefix is None else self.prefix.copied(copies, layer)
        with (
            _folded(self.resume, layer, copies, self.start),
            attach(self.model, transforms=transforms, stack=self.stack),
        ):
            return answer(self.model, self.pairs, self.pairs.ids, copies, prefix)[1]

    def all_heads(self, outputs: Callable[[int], Tensor], track: Callable[[Any], Any] = iter) -> Tensor:
        """Logit differences (L, H, B), one head replaced at a time; `outputs(layer)` is (B, N, H, D)."""
        heads = range(self.found.heads)
        return torch.stack([self.layer(layer, heads, outputs(layer)) for layer in track(range(self.found.layers))])


@dataclass(frozen=True, eq=False)
class Fold:
    """The transform of a resumed pass: a layer's recorded outputs, once per head, each with its own head replaced."""

    layer: int
    base: Tensor  # (B, N, H, D)
    other: Tensor
    heads: Sequence[int]
    where: Tensor  # (B, N)

    def __call__(self, call: HeadCall, attend: Callable[[], Tensor]) -> Tensor:
        if call.layer != self.layer:
            return attend()
        U, B = len(self.heads), len(self.base)
        out = self.base.repeat(U, 1, 1, 1).unflatten(0, (U, B))  # (U, B, N, H, D)
        for u, head in enumerate(self.heads):
            mine = self.where[..., None]
            out[u, :, :, head] = torch.where(mine, self.other[:, :, head], self.base[:, :, head])
        return out.flatten(0, 1)


@contextlib.contextmanager
def _folded(resume: Resume, layer: int, copies: int, start: int) -> Iterator[None]:
    """A pass from `layer` on whose batch is the recorded one, `copies` times over, from column `start` on."""
    kept = resume.kept
    point = layer if layer in kept else 0
    resume.kept = {point: repeated(kept[point], copies, start)} if point else {}
    try:
        with resume.from_layer(point):
            yield
    finally:
        resume.kept = kept


def repeated(output: Any, copies: int, start: int) -> Any:
    """What a layer gave back, `copies` times over, from column `start` on."""
    return with_first(output, first(output)[:, start:].repeat(copies, 1, 1))


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
