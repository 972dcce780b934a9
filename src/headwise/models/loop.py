"""The training loop of the small models here, on batches made on the fly: a learning rate that rises and falls, clipped gradients,
losses kept, checkpoints from which a killed run goes on to the bit. No pickle: a checkpoint is one safetensors file.

(Rows of a fixed data set go through transformers' Trainer instead: `headwise.route._train`.)
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from headwise import storage
from headwise.checks import whole
from headwise.errors import ArtifactError, TaskError

KIND = "training-checkpoint"
KEPT = 2  # checkpoints: the newest may be the one that a crash interrupted


@dataclass(frozen=True, kw_only=True)
class Run:
    """How long a training is, where it keeps itself, and whether it shows a bar. TaskError for what does not fit together."""

    steps: int
    folder: str | None = None
    save_every: int = 0
    resume: bool = False
    progress: bool = False
    title: str = "training"

    def __post_init__(self) -> None:
        whole("steps", self.steps, 1, TaskError)
        whole("save_every", self.save_every, 0, TaskError)
        if self.folder is None and (self.save_every or self.resume):
            raise TaskError("save_every and resume need folder=, where the checkpoints are")


def warm_cosine(warm: int, steps: int) -> Callable[[int], float]:
    """Share of the learning rate at each step: it falls along a cosine, and the first `warm` steps rise to it.

    >>> rate = warm_cosine(10, 100)
    >>> rate(0), rate(50), round(rate(99), 4)
    (0.1, 0.5, 0.0002)
    """
    return lambda step: min(1, (step + 1) / warm) * (0.5 + 0.5 * math.cos(math.pi * step / steps))


def train(
    run: Run,
    model: nn.Module,
    optimizers: Sequence[torch.optim.Optimizer],
    loss_of: Callable[[int], Tensor],
    *,
    rate: Callable[[int], float],
    generator: torch.Generator,
    clip: float | None = 1.0,
    after_step: Callable[[], Any] | None = None,
) -> list[float]:
    """Train in place; the loss of every step. `loss_of(step)` draws its batch with `generator`, whose state the checkpoints hold.

    Gradients are clipped to norm `clip`. With `run.resume` the newest whole checkpoint in the folder is where it goes on; without one it
    starts. The model ends in eval mode. Raises ArtifactError for a checkpoint of another model.
    """
    bases = [[group["lr"] for group in one.param_groups] for one in optimizers]
    losses: list[Tensor] = []
    first = _restore(run, model, optimizers, generator, losses)
    model.train()
    for step in _track(run, first):
        for one, base in zip(optimizers, bases, strict=True):
            one.zero_grad(set_to_none=True)
            for group, lr in zip(one.param_groups, base, strict=True):
                group["lr"] = lr * rate(step)
        loss = loss_of(step)
        loss.backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        for one in optimizers:
            one.step()
        if after_step is not None:
            after_step()
        losses.append(loss.detach())  # on its device: a step waits for nothing
        if run.save_every and ((step + 1) % run.save_every == 0 or step + 1 == run.steps):
            _save(run, step + 1, model, optimizers, generator, losses)
    model.eval()
    return torch.stack(losses).float().tolist()


def _save(
    run: Run,
    step: int,
    model: nn.Module,
    optimizers: Sequence[torch.optim.Optimizer],
    generator: torch.Generator,
    losses: Sequence[Tensor],
) -> None:
    tensors = {f"model.{name}": value for name, value in model.state_dict().items()}
    for number, one in enumerate(optimizers):
        for index, state in one.state_dict()["state"].items():
            tensors |= {f"optimizer.{number}.{index}.{key}": torch.as_tensor(value) for key, value in state.items()}
    tensors |= {"generator": generator.get_state(), "losses": torch.stack([loss.float() for loss in losses])}
    plain = {name: value.detach().cpu().clone().contiguous() for name, value in tensors.items()}
    folder = Path(str(run.folder))
    storage.write_tensors(folder / f"step-{step}.safetensors", KIND, 1, plain, {"step": step})
    for _, old in sorted(checkpoints(folder).items())[:-KEPT]:
        old.unlink()


def _restore(
    run: Run,
    model: nn.Module,
    optimizers: Sequence[torch.optim.Optimizer],
    generator: torch.Generator,
    losses: list[Tensor],
) -> int:
    """The first step that is still to do."""
    for step, path in sorted(checkpoints(run.folder).items(), reverse=True) if run.resume else ():
        try:
            tensors, _ = storage.read_tensors(path, KIND, 1, None)
        except ArtifactError:  # damaged, or cut short: the one before it may be whole
            continue
        device = next(model.parameters()).device
        try:
            model.load_state_dict({name[6:]: value for name, value in tensors.items() if name.startswith("model.")})
        except RuntimeError as error:
            raise ArtifactError(f"{path}: is a checkpoint of another model ({str(error).splitlines()[0]})") from error
        with storage.decoding(path):
            for number, one in enumerate(optimizers):
                one.load_state_dict({**one.state_dict(), "state": _states(tensors, number)})
            generator.set_state(tensors["generator"])
            losses += list(tensors["losses"].to(device))
        return step
    return 0


def _states(tensors: dict[str, Tensor], number: int) -> dict[int, dict[str, Tensor]]:
    found: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        parts = name.split(".")
        if parts[:2] == ["optimizer", str(number)]:
            found.setdefault(int(parts[2]), {})[".".join(parts[3:])] = value
    return found


def checkpoints(folder: str | Path | None) -> dict[int, Path]:
    """Checkpoint files of a folder, by step."""
    found = Path(folder).glob("step-*.safetensors") if folder is not None else ()
    return {int(path.stem[5:]): path for path in found if re.fullmatch(r"step-\d+", path.stem)}


def _track(run: Run, first: int) -> Iterator[int]:
    if not run.progress:
        yield from range(first, run.steps)
        return
    from rich.progress import Progress

    with Progress(transient=True) as bar:
        task = bar.add_task(run.title, total=run.steps, completed=first)
        for step in range(first, run.steps):
            yield step
            bar.advance(task)
