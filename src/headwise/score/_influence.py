"""How much a document's loss rises when heads are weakened: AttentionInfluence (arXiv 2505.07293), step 2 and 3.

    AIS(x) = (L_reference(x) - L_base(x)) / L_base(x)

L is the mean cross-entropy over the tokens of x; the reference is the same model, whose important heads attend to all
visible keys alike. One pass of the model a document, and a second one from the first weakened layer on.

Letters: B rows, N columns of a batch, S sets of heads.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from headwise.attach import fingerprint
from headwise.attach.ablate import ablate
from headwise.attach.resume import Resume
from headwise.checks import whole
from headwise.errors import ScoreError, UnitError
from headwise.modes import evaluating
from headwise.score._check import _mean_outputs
from headwise.tasks.texts import encode
from headwise.units import HeadScores, HeadSet

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Weakening = Literal["uniform", "zero", "mean"]
Denominator = Literal["base", "reference", "none"]
LEAST_LOSS = 1e-3  # nats; below it a ratio of losses says nothing
ROWS = 512  # logits rows turned to float32 at a time
AHEAD = 16  # batches that are read ahead, so that documents of like length are padded together
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-8}  # of a resumed pass against a whole one; else 2 % of the logits


@dataclass(frozen=True)
class Influence:
    """One document: mean losses in nats of the base, of the reference and of control sets, over `tokens` predictions.

    `why` says why a score is undefined (NaN): "" where it is not. `per_token` (tokens, 1 + S) holds the losses one by one
    where they were asked for: base, reference, controls.
    """

    tokens: int
    base: float
    reference: float
    controls: tuple[float, ...] = ()
    denominator: Denominator = "base"
    why: str = ""
    per_token: Tensor | None = None

    @property
    def score(self) -> float:
        """AIS."""
        return self._ratio(self.reference)

    @property
    def control_scores(self) -> tuple[float, ...]:
        """The same number for each control set."""
        return tuple(map(self._ratio, self.controls))

    def span(self, start: int, stop: int) -> float:
        """The score of the predicted tokens start to stop alone, such as one step of a solution."""
        if self.per_token is None:
            raise ScoreError("losses of single tokens were not kept: InfluenceScorer(..., per_token=True)")
        if not 0 <= start < stop <= self.tokens:
            raise ScoreError(f"span {start}:{stop} of a document with {self.tokens} predicted tokens")
        base, reference = self.per_token[start:stop, :2].double().mean(0).tolist()
        return ratio(base, reference, self.denominator)

    def _ratio(self, reference: float) -> float:
        return math.nan if self.why else ratio(self.base, reference, self.denominator)


def ratio(base: float, reference: float, denominator: Denominator) -> float:
    """(L_r - L_b) over L_b, L_r or 1; NaN where the divisor is below 1e-3 nats."""
    divisor = {"base": base, "reference": reference, "none": 1.0}[denominator]
    return (reference - base) / divisor if divisor >= LEAST_LOSS else math.nan


def important_heads(scores: HeadScores, share: float = 0.05) -> HeadSet:
    """The best ceil(share · L · H) heads: 20 of 384 at 5 %. Raises UnitError for a share outside (0, 1].

    >>> print(important_heads(HeadScores(values=torch.tensor([[0.1, 0.9], [0.4, 0.0]]), method="x"), 0.3))
    L0H1,L1H0
    """
    if scores.kind != "head":
        raise UnitError(f"attention is weakened in query heads; these scores are of kind {scores.kind!r}")
    if not 0 < share <= 1:
        raise UnitError(f"share={share}; it must lie in (0, 1]")
    return scores.top(math.ceil(share * len(scores) - 1e-9))


class InfluenceScorer:
    """Scores documents, one by one or from an endless stream, in the order given.

    heads: the important heads. controls: other sets, such as random ones, whose reference losses are measured beside.
    mode: "uniform" attention (the paper), "zero" output, or the head's "mean" output on English text.
    denominator: of the score. context: tokens of a chunk; a longer document is cut, its losses are weighted by tokens.
    min_tokens: documents with fewer predicted tokens get NaN: their ratio is noise.
    batch_size: chunks in a forward pass, padded on the right; scores do not depend on it.
    share_prefix: compute the layers before the first weakened one once. None: where a first batch proves it right.

    Raises UnitError for heads that the model lacks, ScoreError for options without sense.

    >>> from headwise.hub import load_model
    >>> model, tokenizer = load_model("tiny-random-llama")
    >>> scorer = InfluenceScorer(model, tokenizer, HeadSet.parse("L1H0,L2H3"), min_tokens=4)
    >>> [(i.tokens, i.why) for i in scorer.score(["A sentence of some length.", "", "Hm."])]
    [(25, ''), (0, 'empty'), (2, 'short')]
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None,
        heads: HeadSet,
        *,
        controls: Sequence[HeadSet] = (),
        mode: Weakening = "uniform",
        denominator: Denominator = "base",
        context: int | None = None,
        min_tokens: int = 64,
        batch_size: int = 4,
        share_prefix: bool | None = None,
        per_token: bool = False,
    ):
        for name, value, allowed in (("mode", mode, Weakening), ("denominator", denominator, Denominator)):
            if value not in get_args(allowed):
                raise ScoreError(f"{name}={value!r}; choose {', '.join(get_args(allowed))}")
        for heads_ in (heads, *controls):
            heads_.check(fingerprint(model))
        self.model, self.tokenizer, self.sets = model, tokenizer, (heads, *controls)
        self.mode, self.denominator, self.per_token = mode, denominator, per_token
        self.context = _context(model, context)
        self.min_tokens = whole("min_tokens", min_tokens, 1, ScoreError)
        self.batch_size = whole("batch_size", batch_size, 1, ScoreError)
        self.points = [min((unit.layer for unit in heads_), default=0) for heads_ in self.sets]
        self.share_prefix, self._proved = share_prefix, share_prefix is not None
        self._resume = Resume(model, self.points)
        self._means = _mean_outputs(model, tokenizer) if mode == "mean" else None

    def score(self, documents: Iterable[str | Tensor]) -> Iterator[Influence]:
        """An `Influence` for each document, text or token ids (N,), in order; reads a few batches ahead."""
        stream = iter(documents)
        while block := list(islice(stream, self.batch_size * AHEAD)):
            yield from self._block([self._ids(document) for document in block])

    def _ids(self, document: str | Tensor) -> Tensor:
        if isinstance(document, Tensor):
            if document.ndim != 1 or document.is_floating_point():
                raise ScoreError(f"a document is text or token ids (N,); got {document.dtype} {tuple(document.shape)}")
            return document.long().cpu()
        if not isinstance(document, str):
            raise ScoreError(f"a document is text or token ids (N,); got a {type(document).__name__}")
        if self.tokenizer is None:
            raise ScoreError("documents are text, which needs a tokenizer; or give token ids (N,)")
        return torch.tensor(encode(self.tokenizer, document, special=True), dtype=torch.long)

    def _block(self, documents: list[Tensor]) -> list[Influence]:
        """Documents cut into chunks, chunks of like length run together, losses put together again."""
        chunks = [
            (at, chunk) for at, ids in enumerate(documents) for chunk in ids.split(self.context) if len(chunk) > 1
        ]
        enough = [len(ids) - -(-len(ids) // self.context) >= self.min_tokens for ids in documents]
        order = sorted((i for i, (at, _) in enumerate(chunks) if enough[at]), key=lambda i: len(chunks[i][1]))
        losses: dict[int, Tensor] = {}
        for start in range(0, len(order), self.batch_size):
            members = order[start : start + self.batch_size]
            losses.update(zip(members, self._losses([chunks[i][1] for i in members]), strict=True))
        parts: list[list[Tensor]] = [[] for _ in documents]
        for i, (at, _) in enumerate(chunks):
            if i in losses:
                parts[at].append(losses[i])
        return [self._influence(ids, found) for ids, found in zip(documents, parts, strict=True)]

    def _influence(self, ids: Tensor, parts: list[Tensor]) -> Influence:
        tokens = sum(map(len, parts)) or max(0, len(ids) - -(-len(ids) // self.context))
        if not parts:
            return Influence(
                tokens, math.nan, math.nan, (math.nan,) * (len(self.sets) - 1), self.denominator,
                "short" if len(ids) else "empty",
            )  # fmt: skip
        table = torch.cat(parts)  # (tokens, 1 + S)
        base, reference, *controls = table.double().mean(0).tolist()
        small = self.denominator != "none" and (base if self.denominator == "base" else reference) < LEAST_LOSS
        kept = table if self.per_token else None
        return Influence(
            tokens, base, reference, tuple(controls), self.denominator, "loss near 0" if small else "", kept
        )

    @torch.no_grad()
    def _losses(self, chunks: list[Tensor]) -> list[Tensor]:
        """Losses (n - 1, 1 + S) of each chunk (n,): base, then one column for each set of heads."""
        width = max(map(len, chunks))
        ids = torch.stack([F.pad(chunk, (0, width - len(chunk))) for chunk in chunks]).to(self.model.device)
        mask = torch.stack([F.pad(torch.ones_like(chunk), (0, width - len(chunk))) for chunk in chunks]).to(ids.device)
        try:
            with evaluating(self.model):
                self._prove(ids, mask)
                with self._resume.recording() if self.share_prefix else nullcontext():
                    columns = [_token_losses(self._logits(ids, mask), ids)]
                for point, heads in zip(self.points, self.sets, strict=True):
                    with self._from(point), self._weakened(heads):
                        columns.append(_token_losses(self._logits(ids, mask), ids) if len(heads) else columns[0])
        finally:
            self._resume.kept = {}
        table = torch.stack(columns, -1).cpu()
        return [table[row, : len(chunk) - 1] for row, chunk in enumerate(chunks)]

    def _prove(self, ids: Tensor, mask: Tensor) -> None:
        """Once, on the first batch: does a resumed pass give what a whole one gives? If not, no prefix is shared."""
        if self._proved:
            return
        self._proved = True
        difference = self._resume.check(lambda: self._logits(ids[:1], mask[:1]))
        logits = self._logits(ids[:1, :2], mask[:1, :2])
        self.share_prefix = difference <= TOLERANCE.get(logits.dtype, 0.02 * float(logits.abs().max()))

    def _logits(self, ids: Tensor, mask: Tensor) -> Tensor:
        return self.model(input_ids=ids, attention_mask=mask, use_cache=False).logits

    def _from(self, point: int) -> AbstractContextManager[Any]:
        return self._resume.from_layer(point) if self.share_prefix else nullcontext()

    def _weakened(self, heads: HeadSet) -> AbstractContextManager[Any]:
        if not len(heads):
            return nullcontext()
        vectors = None if self._means is None else torch.stack([self._means[l, h] for l, h in heads.pairs()])
        return ablate(self.model, heads, mode=self.mode, mean=vectors)


def _token_losses(logits: Tensor, ids: Tensor) -> Tensor:
    """Cross-entropy (B, N - 1) in float32 of every token given those before it."""
    targets = ids[:, 1:]
    parts = []
    for start in range(0, targets.shape[1], ROWS):
        rows = logits[:, start : min(start + ROWS, targets.shape[1])].float().transpose(1, 2)
        parts.append(F.cross_entropy(rows, targets[:, start : start + ROWS], reduction="none"))
    return torch.cat(parts, 1)


def _context(model: PreTrainedModel, context: int | None) -> int:
    """Tokens of a chunk: as asked for, else what the model reads, at most 4096."""
    if not model.can_generate():
        raise ScoreError(f"{type(model).__name__} is no causal language model: its documents have no loss")
    most = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    chosen = min(4096, most or 4096) if context is None else whole("context", context, 2, ScoreError)
    if most and chosen > most:
        raise ScoreError(f"context={chosen}; this model reads {most} tokens")
    return chosen
