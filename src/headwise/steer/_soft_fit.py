"""Fit task embeddings: means of head outputs over prompts with examples, then the mixing shares by gradient, several tasks at once.

Tasks share nothing but the forward pass: row r of a batch is a question of task r, its loss reaches theta[r] only, and Adam keeps its
moments entry by entry. So R tasks learn what each would learn alone, in the time of one batch.

Letters: R tasks, M prompts, L layers, H query heads, D head dim.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

import torch
from torch import Tensor, nn

from headwise.attach import fingerprint
from headwise.checks import finite, whole
from headwise.errors import EditError, TaskError
from headwise.modes import frozen
from headwise.progress import track
from headwise.steer._injection import Injection, inject, last_outputs
from headwise.steer._task_embedding import TaskEmbedding
from headwise.tasks.icl import Item, Pair, Template, draw_few_shot, encode_item
from headwise.tasks.icl_batch import pack, row_losses

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Loss = Literal["first", "full"]
Select = Literal["best", "last"]
ROWS = 64  # rows of one validation batch


@dataclass(frozen=True, kw_only=True)
class SoftOptions:
    """How alpha is learned; the defaults are the paper's. See `fit_tasks`."""

    steps: int = 400
    lr: float = 0.2
    batch: int = 1
    validate: int = 50
    validation_items: int = 100
    loss: Loss = "first"
    select: Select = "best"
    shared_alpha: bool = False

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "validate", "validation_items"):
            whole(name, getattr(self, name), 0 if name == "steps" else 1, EditError)
        if finite("lr", self.lr, EditError) <= 0:
            raise EditError(f"lr is {self.lr}; it must be above 0")
        for name, allowed in (("loss", Loss), ("select", Select)):
            if getattr(self, name) not in get_args(allowed):
                raise EditError(f"{name}={getattr(self, name)!r}; choose {', '.join(get_args(allowed))}")


def fit_tasks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Mapping[str, Sequence[Pair]],
    *,
    validation: Mapping[str, Sequence[Pair]] | None = None,
    prompts: int = 50,
    shots: int = 10,
    steps: int = 400,
    lr: float = 0.2,
    batch: int = 1,
    validate: int = 50,
    validation_items: int = 100,
    loss: Loss = "first",
    select: Select = "best",
    shared_alpha: bool = False,
    template: Template | None = None,
    seed: int = 0,
    progress: bool = False,
) -> dict[str, TaskEmbedding]:
    """Learn several tasks side by side; each as `TaskEmbedding.fit` learns one, up to rounding.

    tasks: name -> (input, output) pairs to learn from. validation: held-out pairs by the same names; by default a fifth of the pairs.
    prompts, shots: M and N of the embedding. steps, lr, batch: Adam on the logits of alpha, `batch` questions of each task a step.
    loss: "first" token of the answer, or all of them ("full"; the injection stays at the last token of the prompt).
    select: the shares with the lowest validation loss, looked at before the first step and every `validate` steps, or the "last" ones.
    shared_alpha: one alpha for all tasks; a step takes one random task.

    The model is frozen and left as it was. Raises TaskError for too few pairs or an answer without a token, EditError for a bad option.
    """
    options = SoftOptions(
        steps=steps, lr=lr, batch=batch, validate=validate, validation_items=validation_items, loss=loss, select=select,
        shared_alpha=shared_alpha,
    )  # fmt: skip
    whole("prompts", prompts, 1, EditError)
    if not tasks:
        raise TaskError("tasks is empty; give at least one list of pairs")
    template = template or Template()
    data = [
        _Task.of(tokenizer, name, pairs, None if validation is None else validation[name], template, seed + place)
        for place, (name, pairs) in enumerate(tasks.items())
    ]
    with frozen(model):
        vectors = torch.stack(
            [task_vectors(model, tokenizer, t.pairs, prompts, shots, template, t.generator) for t in data]
        )
        found = train_alpha(model, data, vectors, options, progress)
    made_for = fingerprint(model)
    meta = {
        "prompts": prompts,
        "shots": shots,
        "steps": steps,
        "lr": lr,
        "batch": batch,
        "loss": loss,
        "select": select,
        "seed": seed,
    }
    return {
        task.name: TaskEmbedding(
            vectors[r], found.alpha[r], made_for, template, {"task": task.name, **meta, "best_step": found.step[r]},
            tuple(found.history[r]),
        )
        for r, task in enumerate(data)
    }  # fmt: skip


@dataclass(frozen=True)
class _Task:
    """One task ready to train: pairs for the prompts, questions without examples for training and validation."""

    name: str
    pairs: Sequence[Pair]
    items: list[Item]
    held_out: list[Item]
    generator: torch.Generator

    @classmethod
    def of(
        cls,
        tokenizer: PreTrainedTokenizerBase,
        name: str,
        pairs: Sequence[Pair],
        validation: Sequence[Pair] | None,
        template: Template,
        seed: int,
    ) -> _Task:
        generator = torch.Generator().manual_seed(seed)
        pairs = list(dict(pairs).items())
        if validation is None:
            order = torch.randperm(len(pairs), generator=generator).tolist()
            cut = len(pairs) // 5
            validation, pairs = [pairs[i] for i in order[:cut]], [pairs[i] for i in order[cut:]]
        if not pairs or not validation:
            raise TaskError(
                f"task {name!r} has {len(pairs)} training and {len(validation)} validation pairs; both need some"
            )
        items, held_out = (
            [encode_item(tokenizer, template.ask(x), y) for x, y in part] for part in (pairs, validation)
        )
        return cls(name, pairs, items, held_out, generator)


def task_vectors(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[Pair],
    prompts: int,
    shots: int,
    template: Template,
    generator: torch.Generator,
) -> Tensor:
    """t (L, H, D): mean head outputs at the last token of `prompts` prompts, each of `shots` examples and another question."""
    items = []
    for _ in range(prompts):
        examples, query = draw_few_shot(pairs, shots, generator)
        items.append(encode_item(tokenizer, template.few_shot(examples, query[0]), query[1]))
    return last_outputs(model, items).mean(0)


@dataclass
class _Found:
    """The shares kept so far: alpha (R, L, H), the step they are of, and all validation losses."""

    alpha: Tensor
    step: list[int]
    best: Tensor
    history: list[list[tuple[int, float]]]


def train_alpha(
    model: nn.Module, tasks: Sequence[_Task], vectors: Tensor, options: SoftOptions, progress: bool
) -> _Found:
    """Adam on theta (R, L, H), alpha = sigmoid(theta), from 0; vectors (R, L, H, D)."""
    device = next(model.parameters()).device
    vectors = vectors.to(device)
    R, L, H = vectors.shape[:3]
    theta = torch.zeros(1 if options.shared_alpha else R, L, H, device=device, requires_grad=True)
    adam = torch.optim.Adam([theta], lr=options.lr)
    best = torch.full((len(theta),), torch.inf)
    found = _Found(torch.full((R, L, H), 0.5), [0] * R, best, [[] for _ in range(R)])
    injection = Injection(theta.detach().sigmoid().expand(R, L, H), vectors)
    with inject(model, injection):  # attached once: each pass only sets its rows
        _validate(model, injection, tasks, theta, vectors, 0, options, found)
        for step in track(range(1, options.steps + 1), "soft injection", progress):
            (theta.grad,) = torch.autograd.grad(_loss(model, injection, tasks, theta, vectors, options), [theta])
            adam.step()
            if step % options.validate == 0 or step == options.steps:
                _validate(model, injection, tasks, theta, vectors, step, options, found)
    return found


@torch.enable_grad()
def _loss(
    model: nn.Module, injection: Injection, tasks: Sequence[_Task], theta: Tensor, vectors: Tensor, options: SoftOptions
) -> Tensor:
    """Sum over the tasks of the mean loss of `batch` random questions without examples."""
    chosen = _rows(tasks, options)
    batch = pack([item for _, item in chosen], vectors.device, answer=options.loss == "full")
    rows = torch.tensor([r for r, _ in chosen], device=vectors.device)
    alpha = theta.sigmoid()[rows * 0 if options.shared_alpha else rows]
    injection.set(alpha, vectors[rows], batch.ends)
    return row_losses(model, batch).sum() / options.batch


def _rows(tasks: Sequence[_Task], options: SoftOptions) -> list[tuple[int, Item]]:
    """(task, question) of each row of a training batch."""
    among: Sequence[int] = range(len(tasks))
    if options.shared_alpha:
        among = torch.randint(len(tasks), (1,), generator=tasks[0].generator).tolist()
    chosen = []
    for r in among:
        picks = torch.randint(len(tasks[r].items), (options.batch,), generator=tasks[r].generator).tolist()
        chosen += [(r, tasks[r].items[i]) for i in picks]
    return chosen


def _validate(
    model: nn.Module,
    injection: Injection,
    tasks: Sequence[_Task],
    theta: Tensor,
    vectors: Tensor,
    step: int,
    options: SoftOptions,
    found: _Found,
) -> None:
    """Measure held-out losses and keep the shares that are the best so far (or, with select="last", the newest)."""
    alpha = theta.detach().sigmoid()
    losses = _held_out(model, injection, tasks, alpha, vectors, options)
    for r, value in enumerate(losses.tolist()):
        found.history[r].append((step, value))
    scores = losses.mean(0, keepdim=True) if options.shared_alpha else losses
    better = scores < found.best if options.select == "best" else torch.ones_like(scores, dtype=torch.bool)
    found.best = torch.where(better, scores, found.best)
    for r in range(len(tasks)):
        at = 0 if options.shared_alpha else r
        if better[at]:
            found.alpha[r], found.step[r] = alpha[at].cpu(), step


@torch.no_grad()
def _held_out(
    model: nn.Module, injection: Injection, tasks: Sequence[_Task], alpha: Tensor, vectors: Tensor, options: SoftOptions
) -> Tensor:
    """(R,) mean validation loss."""
    pairs = [(r, item) for r, task in enumerate(tasks) for item in task.held_out[: options.validation_items]]
    total, count = torch.zeros(len(tasks)), torch.zeros(len(tasks))
    for begin in range(0, len(pairs), ROWS):
        part = pairs[begin : begin + ROWS]
        rows = torch.tensor([r for r, _ in part])
        batch = pack([item for _, item in part], vectors.device, answer=options.loss == "full")
        own = rows.to(vectors.device)
        injection.set(alpha[own * 0 if options.shared_alpha else own], vectors[own], batch.ends)
        total.index_add_(0, rows, row_losses(model, batch).float().cpu())
        count.index_add_(0, rows, torch.ones(len(part)))
    return total / count
