"""How much each head of a vision transformer matters: prune it, and measure what the model says then.

After Li et al. 2023, arXiv 2303.13731 (TVCG 29(6)), who rank heads by several pruning-based metrics. Their equations were not public to us:
the operator and the metrics here are our own reading of the abstract.

Letters: B images, L layers, H query heads, M metrics, P patches.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from headwise.attach import HeadCall, attach, find_stack, fingerprint
from headwise.checks import whole
from headwise.errors import ScoreError
from headwise.modes import evaluating
from headwise.progress import track
from headwise.registry import register
from headwise.score._vision import Grid, Said, batches, check_images, default_images, find_grid, look, say
from headwise.score._vit_prune import METRICS, Prune, check_prune, mean_outputs, measures, sweep, without
from headwise.units import Fingerprint, HeadScores, HeadSet

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Metric = Literal["probability", "loss", "js", "kl", "margin", "embedding", "flip", "gate-gradient"]


@dataclass(frozen=True)
class Importance:
    """`values[metric]` (L, H, B): what pruning each head alone changed for each image; equations in `_vit_prune.measures`."""

    values: dict[str, Tensor]
    prune: Prune
    made_for: Fingerprint
    grid: Grid
    labelled: bool

    def scores(self, metric: str = "js") -> HeadScores:
        """The mean over images."""
        if metric not in self.values:
            raise ScoreError(f"metric={metric!r} was not measured; there are {', '.join(self.values)}")
        table = self.values[metric]
        return HeadScores(
            values=table.mean(-1),
            method="vit-importance",
            data=f"{table.shape[-1]} images",
            fingerprint=self.made_for,
            meta={"metric": metric, "prune": self.prune, "labelled": self.labelled},
        )

    def by_class(self, metric: str, labels: Tensor, classes: int) -> Tensor:
        """(classes, L, H): the mean over the images of each class; NaN for a class without images."""
        self.scores(metric)  # says which metrics there are
        table = self.values[metric]
        return torch.stack([table[..., labels.cpu() == c].mean(-1) for c in range(classes)])

    def correlations(self) -> dict[tuple[str, str], float]:
        """Rank correlation of each pair of metrics; NaN where one is the same for all heads."""
        names, found = list(self.values), {}
        for i, a in enumerate(names):
            for b in names[i + 1 :]:
                x, y = self.scores(a), self.scores(b)
                constant = any(bool((s.values == s.values[0, 0]).all()) for s in (x, y))
                found[a, b] = float("nan") if constant else x.rank_correlation(y)
        return found


@register("score", "vit-importance", paper="10")
def vit_importance(
    model: PreTrainedModel,
    tokenizer: Any,
    *,
    images: Tensor | None = None,
    labels: Tensor | None = None,
    metric: Metric = "js",
    prune: Prune = "zero",
    samples: int = 64,
    batch_size: int = 32,
    stack: str | None = None,
    seed: int = 0,
    progress: bool = False,
) -> HeadScores:
    """What a vision model says without each head: probability, loss, divergence, margin, embedding or decision that changes.

    images (B, channels, S, S) as the model's processor makes them; by default `samples` drawn shapes. labels (B,): the classes that
    count for "probability", "loss" and "margin"; without them the class that the model predicts. "gate-gradient" is the quick estimate
    |dL/dξ| of a gate ξ on each head, from one backward. `importance_of` gives all metrics, image by image; `tokenizer` is not used.

    Raises ScoreError for no images, a metric that needs a classifier where there is none, and windowed attention.

    >>> from headwise.hub import load_model
    >>> model, _ = load_model("tiny-random-vit")
    >>> scores = vit_importance(model, None, samples=3)
    >>> scores.values.shape, bool((scores.values >= 0).all())
    (torch.Size([2, 4]), True)
    """
    chosen = default_images(model, whole("samples", samples, 1, ScoreError), seed, stack) if images is None else images
    if metric == "gate-gradient":
        return gate_gradient(model, chosen, labels, batch_size=batch_size, stack=stack)
    if metric not in METRICS:
        raise ScoreError(f"metric={metric!r}; choose {', '.join((*METRICS, 'gate-gradient'))}")
    found = importance_of(model, chosen, labels, prune=prune, batch_size=batch_size, stack=stack, progress=progress)
    if metric not in found.values:
        raise ScoreError(
            f"metric={metric!r} needs class logits, {type(model).__name__} gives none; metric='embedding' needs none"
        )
    return found.scores(metric)


def importance_of(
    model: PreTrainedModel,
    images: Tensor,
    labels: Tensor | None = None,
    *,
    prune: Prune = "zero",
    batch_size: int = 32,
    copies: int = 256,
    grid: tuple[int, int] | None = None,
    stack: str | None = None,
    progress: bool = False,
) -> Importance:
    """Every metric for every head and image. `batch_size` images are looked at together; a resumed pass has up to `copies` rows."""
    check_prune(prune)
    images, labels = check_images(model, images, labels)
    found: dict[str, list[Tensor]] = {}
    with evaluating(model):
        mean = None
        if prune == "mean":
            mean = mean_outputs(model, [part for part, _ in batches(images, None, batch_size)], stack)
        parts = list(batches(images, labels, batch_size))
        for part, classes in track(parts, "pruning heads", progress):
            intact, after, where = sweep(model, part, prune=prune, mean=mean, copies=copies, grid=grid, stack=stack)
            rows = [measures(intact, said, classes) for said in after]  # a layer each: (H, B)
            for name in rows[0]:
                found.setdefault(name, []).append(torch.stack([row[name] for row in rows]).cpu())
    values = {name: torch.cat(tables, dim=-1) for name, tables in found.items()}
    return Importance(values, prune, fingerprint(model, stack), where, labels is not None)


def gate_gradient(
    model: PreTrainedModel,
    images: Tensor,
    labels: Tensor | None = None,
    *,
    batch_size: int = 32,
    stack: str | None = None,
) -> HeadScores:
    """Mean over images of |dL/dξ| at ξ = 1, a gate ξ on each head and L the cross-entropy: one backward instead of L · H passes."""
    images, labels = check_images(model, images, labels)
    found = find_stack(model, stack)
    total = torch.zeros(found.layers, found.heads, dtype=torch.float64)
    with evaluating(model), torch.enable_grad():
        for part, classes in batches(images, labels, batch_size):
            gates = [
                torch.ones(len(part), 1, found.heads, 1, device=part.device, requires_grad=True)
                for _ in range(found.layers)
            ]

            def gated(call: HeadCall, attend: Callable[[], Tensor], gates: list[Tensor] = gates) -> Tensor:
                return attend() * gates[call.layer].to(call.q.dtype)

            with attach(model, transforms=[gated], stack=stack):
                logits = say(model, part, found, 1).logits
            if logits is None:
                raise ScoreError(f"metric='gate-gradient' needs class logits, {type(model).__name__} gives none")
            y = logits.argmax(-1) if classes is None else classes
            slopes = torch.autograd.grad(F.cross_entropy(logits.float(), y, reduction="sum"), gates)
            total += torch.stack([s.abs().sum((0, 1, 3)) for s in slopes]).double().cpu()
    return HeadScores(
        values=total / len(images),
        method="vit-importance",
        data=f"{len(images)} images",
        fingerprint=fingerprint(model, stack),
        meta={"metric": "gate-gradient", "labelled": labels is not None},
    )


def pruning_curve(
    model: PreTrainedModel,
    images: Tensor,
    labels: Tensor,
    order: Sequence[tuple[int, int]],
    *,
    counts: Sequence[int],
    prune: Prune = "zero",
    batch_size: int = 64,
    stack: str | None = None,
) -> list[float]:
    """Accuracy with the first k heads of `order` out at once, for each k of `counts`."""
    check_prune(prune)
    images, checked = check_images(model, images, labels)
    if checked is None:
        raise ScoreError("a pruning curve shows accuracy: it needs labels")
    wrong = [k for k in counts if not 0 <= k <= len(order)]
    if wrong:
        raise ScoreError(f"counts={list(counts)}: 0 to {len(order)} heads of the order can be taken out")
    found = []
    with evaluating(model):
        mean = (
            mean_outputs(model, [part for part, _ in batches(images, None, batch_size)], stack)
            if prune == "mean"
            else None
        )
        for k in counts:
            heads, right = HeadSet.of(list(order[:k])), 0
            for part, classes in batches(images, checked, batch_size):
                logits = without(model, part, heads, prune=prune, mean=mean, stack=stack).logits
                if logits is None:
                    raise ScoreError(f"a pruning curve needs class logits, {type(model).__name__} gives none")
                right += int(logits.argmax(-1).eq(classes).sum())  # type: ignore[arg-type]
            found.append(right / len(images))
    return found


@torch.no_grad()
def partial_importance(
    model: PreTrainedModel,
    images: Tensor,
    labels: Tensor | None = None,
    *,
    head: tuple[int, int],
    grid: tuple[int, int] | None = None,
    renormalize: bool = False,
    batch_size: int = 32,
    stack: str | None = None,
) -> dict[str, dict[str, float]]:
    """Blocks of one head's attention pruned: {block: {metric: mean over images}}.

    Blocks are "prefix-prefix", "prefix-patch", "patch-prefix" and "patch-patch" (rows, keys); rows lose these keys: O_i − Σ_j a_ij v_j.
    With `renormalize` what is left of a row is scaled to sum to 1; rows that lose everything give 0. "all" prunes the four at once:
    the head itself. A model without prefix tokens has the last block only.
    """
    images, labels = check_images(model, images, labels)
    found_stack = find_stack(model, stack)
    HeadSet.of([head]).check(fingerprint(model, stack))
    sums: dict[str, dict[str, float]] = {}
    with evaluating(model):
        for part, classes in batches(images, labels, batch_size):
            seen = look(model, part, found_stack, stack)
            where = find_grid(model, part, seen.tokens, grid, stack)
            intact = say(model, part, found_stack, where.prefix)
            for name, blocks in _blocks(where).items():
                cut = _block_cut(head, blocks, renormalize)
                with attach(model, transforms=[cut], stack=stack):
                    after = say(model, part, found_stack, where.prefix)
                for metric, values in measures(intact, after, classes).items():
                    row = sums.setdefault(name, {})
                    row[metric] = row.get(metric, 0.0) + float(values.double().sum()) / len(images)
    return sums


@torch.no_grad()
def spatial_importance(
    model: PreTrainedModel,
    images: Tensor,
    *,
    head: tuple[int, int],
    side: Literal["from", "to"] = "to",
    grid: tuple[int, int] | None = None,
    copies: int = 256,
    stack: str | None = None,
) -> Tensor:
    """(rows, columns) of the grid: Jensen-Shannon divergence (bits) when one patch's part of a head's attention is pruned.

    side "from": patch i attends to nothing; "to": nobody attends to patch j. Not renormalised.
    """
    images, _ = check_images(model, images)
    found = find_stack(model, stack)
    HeadSet.of([head]).check(fingerprint(model, stack))
    if side not in ("from", "to"):
        raise ScoreError(f"side={side!r}; choose 'from' or 'to'")
    with evaluating(model):
        seen = look(model, images, found, stack)
        where = find_grid(model, images, seen.tokens, grid, stack)
        intact = say(model, images, found, where.prefix)
        size, parts = max(1, copies // len(images)), []
        for at in range(0, where.patches, size):
            places = list(range(at, min(at + size, where.patches)))
            with attach(model, transforms=[_spatial_cut(head, places, where.prefix, side)], stack=stack):
                said = say(model, images.repeat(len(places), 1, 1, 1), found, where.prefix)
            if said.logits is None:
                raise ScoreError(f"a spatial map needs class logits, {type(model).__name__} gives none")
            after = Said(said.logits.unflatten(0, (len(places), -1)), said.embedding.unflatten(0, (len(places), -1)))
            parts.append(measures(intact, after, None)["js"].mean(-1))
    return torch.cat(parts).view(where.rows, where.columns).cpu()


def _blocks(where: Grid) -> dict[str, list[tuple[slice, slice]]]:
    prefix, patch = slice(0, where.prefix), slice(where.prefix, None)
    named = {"prefix": prefix, "patch": patch} if where.prefix else {"patch": patch}
    found = {f"{a}-{b}": [(named[a], named[b])] for a in named for b in named}
    return found | {"all": [block for blocks in found.values() for block in blocks]}


def _rows_of_head(call: HeadCall, head: int) -> tuple[Tensor, Tensor]:
    """Attention (B, N, M) and values (B, M, D) of one head, in float32 or wider."""
    kv = head * call.k.shape[1] // call.q.shape[1]
    wide = torch.promote_types(call.q.dtype, torch.float32)
    logits = call.q[:, head].to(wide) @ call.k[:, kv].to(wide).mT * call.scale
    return logits.softmax(-1), call.v[:, kv].to(wide)


def _block_cut(head: tuple[int, int], blocks: Sequence[tuple[slice, slice]], renormalize: bool) -> Any:
    def cut(call: HeadCall, attend: Callable[[], Tensor]) -> Tensor:
        out = attend()
        if call.layer != head[0]:
            return out
        A, v = _rows_of_head(call, head[1])
        for rows, keys in blocks:
            A[:, rows, keys] = 0.0
        if renormalize:
            A = A / A.sum(-1, keepdim=True).clamp(min=torch.finfo(A.dtype).tiny)
        out = out.clone()
        out[:, :, head[1]] = (A @ v).to(out.dtype)
        return out

    return cut


def _spatial_cut(head: tuple[int, int], places: Sequence[int], prefix: int, side: str) -> Any:
    def cut(call: HeadCall, attend: Callable[[], Tensor]) -> Tensor:
        out = attend()
        if call.layer != head[0]:
            return out
        out = out.clone()
        rows = len(out) // len(places)
        A, v = (None, None) if side == "from" else _rows_of_head(call, head[1])
        for at, place in enumerate(places):
            part, token = slice(at * rows, (at + 1) * rows), prefix + place
            if A is None or v is None:
                out[part, token, head[1]] = 0.0
            else:
                out[part, :, head[1]] -= (A[part, :, token, None] * v[part, None, token]).to(out.dtype)
        return out

    return cut
