"""Take heads of a vision transformer out, one by one or together, and see what it says then.

Every head is pruned alone at the price of a part of a pass: the layers before it are not run again (`attach/resume.py`), its own layer's
attention is not computed again, and several heads of a layer share one batch.

Letters: B images, L layers, H query heads, N tokens, D head dim, C classes, R copies of a batch.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor, nn

from headwise.attach import HeadCall, Stack, attach, find_stack
from headwise.attach.projection import output_projection
from headwise.attach.resume import Resume
from headwise.errors import AttachError, ScoreError
from headwise.score._vision import Grid, Said, Seen, find_grid, look, say
from headwise.units import HeadSet

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Prune = Literal["zero", "mean", "identity", "uniform"]
METRICS = ("probability", "loss", "js", "kl", "margin", "embedding", "flip")


def measures(before: Said, after: Said, labels: Tensor | None) -> dict[str, Tensor]:
    """What changed, per image (…, B), from logits (B, C) to logits (…, B, C); y is the label, or the class that was predicted.

    probability p_y − p_y'; loss CE' − CE; js the Jensen-Shannon divergence in bits; kl KL(p || p') in nats; margin the fall of
    z_y − max z_other; embedding 1 − cos; flip 1 where the predicted class changes. All in float32, signs kept: below 0 = harmful head.
    """
    gone = 1 - torch.cosine_similarity(before.embedding.float(), after.embedding.float(), dim=-1)
    found = {"embedding": torch.where((before.embedding == after.embedding).all(-1), torch.zeros_like(gone), gone)}
    if before.logits is None or after.logits is None:
        return found
    p, q = before.logits.float().log_softmax(-1), after.logits.float().log_softmax(-1)
    p = p.expand_as(q)
    y = (before.logits.argmax(-1) if labels is None else labels).expand(q.shape[:-1])[..., None]
    p_y, q_y = p.gather(-1, y)[..., 0], q.gather(-1, y)[..., 0]
    return found | {
        "probability": p_y.exp() - q_y.exp(),
        "loss": p_y - q_y,
        "js": jensen_shannon(p, q),
        "kl": (p.exp() * (p - q)).sum(-1),
        "margin": _margin(before.logits.float().expand_as(q), y) - _margin(after.logits.float(), y),
        "flip": (p.argmax(-1) != q.argmax(-1)).float(),
    }


def jensen_shannon(p: Tensor, q: Tensor) -> Tensor:
    """Divergence in bits, in [0, 1], of two distributions given as log-probabilities (…, C)."""
    middle = torch.logaddexp(p, q) - torch.log(torch.tensor(2.0))
    half = 0.5 * ((p.exp() * (p - middle)).sum(-1) + (q.exp() * (q - middle)).sum(-1))
    return (half / torch.log(torch.tensor(2.0))).clamp(0, 1)


def _margin(logits: Tensor, y: Tensor) -> Tensor:
    others = logits.scatter(-1, y, -torch.inf)
    return logits.gather(-1, y)[..., 0] - others.max(-1).values


def pruned(call: HeadCall, out: Tensor, heads: Sequence[int], how: Prune, mean: Tensor | None) -> Tensor:
    """What the chosen heads give when they are pruned, (B, N, U, D); `mean` (N, H, D) of this layer for how="mean"."""
    chosen = out[:, :, list(heads)]
    if how == "zero":
        return torch.zeros_like(chosen)
    if how == "mean":
        assert mean is not None
        return mean[:, list(heads)].to(out).expand_as(chosen)
    values = call.own_values.transpose(1, 2)[:, :, [h * call.k.shape[1] // call.q.shape[1] for h in heads]]
    return values if how == "identity" else values.mean(1, keepdim=True).expand_as(chosen)


def check_prune(how: str) -> None:
    """ScoreError for a way of pruning that does not exist."""
    if how not in get_args(Prune):
        raise ScoreError(f"prune={how!r}; choose {', '.join(get_args(Prune))}")


@dataclass
class _Copies:
    """The transform of one layer in a resumed pass: the recorded outputs (B, N, H, D), once per copy, each with its own head out."""

    layer: int
    outputs: Tensor
    how: Prune
    mean: Tensor | None
    heads: Sequence[int] = ()

    @property
    def in_layers(self) -> tuple[int]:
        """The others run as if nothing were attached."""
        return (self.layer,)

    def __call__(self, call: HeadCall, attend: Callable[[], Tensor]) -> Tensor:
        B = len(self.outputs)
        out = self.outputs.repeat(len(self.heads), 1, 1, 1)
        for place, head in enumerate(self.heads):
            rows = slice(place * B, (place + 1) * B)
            gone = pruned(_Part(call, rows), self.outputs, [head], self.how, self.mean)  # type: ignore[arg-type]
            out[rows, :, head] = gone[:, :, 0]
        return out


@dataclass
class _Part:
    """Some rows of a call, for `pruned`."""

    call: HeadCall
    rows: slice

    @property
    def own_values(self) -> Tensor:
        return self.call.own_values[self.rows]

    @property
    def q(self) -> Tensor:
        return self.call.q

    @property
    def k(self) -> Tensor:
        return self.call.k


@torch.no_grad()
def sweep(
    model: PreTrainedModel,
    images: Tensor,
    *,
    prune: Prune = "zero",
    mean: Tensor | None = None,
    copies: int = 256,
    grid: tuple[int, int] | None = None,
    stack: str | None = None,
) -> tuple[Said, list[Said], Grid]:
    """(the intact model, for each layer what it says with each head out: logits (H, B, C), the grid). `copies`: rows of a batch at most."""
    found = find_stack(model, stack)
    resume = Resume(model, list(range(1, found.layers)), stack)
    with resume.recording():
        seen = look(model, images, found, stack, keep=True)
    where = find_grid(model, images, seen.tokens, grid, stack)
    intact = seen.said if where.prefix else say(model, images, found, 0)
    size, after = max(1, copies // len(images)), []
    for layer in range(found.layers):
        parts = []
        how = _Copies(layer, seen.outputs[layer], prune, None if mean is None else mean[layer])
        with attach(model, transforms=[how], stack=stack), _idle(found, layer, prune):
            for at in range(0, found.heads, size):
                how.heads = range(at, min(at + size, found.heads))
                copied = (
                    images.repeat(len(how.heads), 1, 1, 1) if layer == 0 else images
                )  # else the skipped layers copy
                with _resumed(resume, layer, len(how.heads)):
                    said = say(model, copied, found, where.prefix)
                parts.append(_unfolded(said, len(how.heads)))
        after.append(_joined(parts))
    return intact, after, where


@contextlib.contextmanager
def _idle(stack: Stack, layer: int, how: Prune) -> Iterator[None]:
    """The projections of q, k and v give zeros where nobody reads them: what the heads of this layer say was recorded."""
    if how not in ("zero", "mean"):  # the others are made of the values
        yield
        return
    try:
        linears = [linear for linear in _projections(stack, layer) if "forward" not in vars(linear)]
    except AttachError:  # projected in another way: they run, and their results go unread
        linears = []
    for linear in linears:
        linear.__dict__["forward"] = functools.partial(_zeros, linear.out_features)
    try:
        yield
    finally:
        for linear in linears:
            del linear.__dict__["forward"]


def _zeros(width: int, x: Tensor) -> Tensor:
    return x.new_zeros(()).expand(*x.shape[:-1], width)


@contextlib.contextmanager
def _resumed(resume: Resume, layer: int, copies: int) -> Iterator[None]:
    """A pass from `layer` on whose batch is the recorded one, `copies` times over."""
    kept = resume.kept.get(layer)
    if kept is not None:
        resume.kept[layer] = _repeated(kept, copies)
    try:
        with resume.from_layer(layer):
            yield
    finally:
        if kept is not None:
            resume.kept[layer] = kept


def _repeated(tree: Any, copies: int) -> Any:
    if isinstance(tree, Tensor):
        return tree.repeat(copies, *[1] * (tree.ndim - 1))
    return type(tree)(_repeated(item, copies) for item in tree) if isinstance(tree, tuple | list) else tree


def _unfolded(said: Said, copies: int) -> Said:
    logits = None if said.logits is None else said.logits.unflatten(0, (copies, -1))
    return Said(logits, said.embedding.unflatten(0, (copies, -1)))


def _joined(parts: list[Said]) -> Said:
    logits = None if parts[0].logits is None else torch.cat([p.logits for p in parts])  # type: ignore[misc]
    return Said(logits, torch.cat([p.embedding for p in parts]))


@torch.no_grad()
def without(
    model: PreTrainedModel,
    images: Tensor,
    heads: HeadSet,
    *,
    prune: Prune = "zero",
    mean: Tensor | None = None,
    stack: str | None = None,
) -> Said:
    """What the model says with a set of heads out at once."""
    chosen = heads.by_layer()

    def take_out(call: HeadCall, attend: Callable[[], Tensor]) -> Tensor:
        out = attend()
        if call.layer in chosen:
            own = list(chosen[call.layer])
            out = out.clone()
            out[:, :, own] = pruned(call, out, own, prune, None if mean is None else mean[call.layer])
        return out

    with attach(model, transforms=[take_out], stack=stack):
        return say(model, images, find_stack(model, stack), 1)


@torch.no_grad()
def mean_outputs(model: PreTrainedModel, parts: Sequence[Tensor], stack: str | None) -> Tensor:
    """(L, N, H, D): mean output of each head at each token position over batches of images."""
    total: list[Tensor] = []
    count = 0
    for images in parts:
        seen: Seen = look(model, images, find_stack(model, stack), stack, keep=True)
        sums = [out.float().sum(0) for out in seen.outputs]
        total = [a + b for a, b in zip(total, sums, strict=True)] if total else sums
        count += len(images)
    return torch.stack(total) / count


def remove_heads(model: PreTrainedModel, heads: HeadSet, *, stack: str | None = None) -> None:
    """Take heads out of the weights: fewer rows of the q, k and v projections, fewer columns of the output projection. In place.

    For models whose attention finds its number of heads by itself (transformers ViT, DeiT, DINOv2 …). AttachError for others, and for a set
    that leaves a layer without heads; the weights are then as they were.
    """
    found = find_stack(model, stack)
    for layer, gone in heads.by_layer().items():
        kept = [h for h in range(found.heads) if h not in gone]
        if not kept or found.kv_heads != found.heads:
            raise AttachError(
                f"layer {layer}: heads {gone} cannot be removed; at least one must stay, and none may share keys"
            )
        _projections(found, layer)
    for layer, gone in heads.by_layer().items():
        kept = [h for h in range(found.heads) if h not in gone]
        index = torch.cat([torch.arange(found.head_dim) + h * found.head_dim for h in kept])
        for linear in _projections(found, layer):
            _cut(linear, index, 0)
        _cut(output_projection(found, layer), index, 1)


def _projections(stack: Stack, layer: int) -> list[nn.Linear]:
    """The q, k and v projections of a layer, by their size and name."""
    width = stack.heads * stack.head_dim
    output = output_projection(stack, layer)
    linears = [
        module
        for name, module in stack.modules[layer].named_modules()
        if isinstance(module, nn.Linear) and module is not output and module.out_features == width
    ]
    if len(linears) != 3:
        raise AttachError(f"layer {layer}: {len(linears)} projections of {width} outputs where q, k and v belong")
    return linears


def _cut(module: nn.Module, index: Tensor, dim: int) -> None:
    assert isinstance(module, nn.Linear)
    index = index.to(module.weight.device)
    module.weight = nn.Parameter(module.weight.detach().index_select(dim, index))
    if dim == 0:
        module.out_features = len(index)
        if module.bias is not None:
            module.bias = nn.Parameter(module.bias.detach().index_select(0, index))
    else:
        module.in_features = len(index)
