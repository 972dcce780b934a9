"""What the recipes share: arms that are trained one after the other, kept in one folder, resumed, measured and compared.

A recipe describes its arms (the routed model, the dense control, earlier phases) and calls `follow`. Training itself is `_train.train`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from headwise.attach import attach
from headwise.checks import shown, whole
from headwise.errors import RouteError
from headwise.route._moe import MoEHost
from headwise.route._router import HeadRouter
from headwise.route._train import Curve, Recipe, train, whole_checkpoint
from headwise.route._whole_model import forget_whole
from headwise.storage import StrPath, decoding, read_json, write_json
from headwise.storage import field as field_of

KIND, NOTE, CURVES = "training-run", "run.json", "curves.json"
Rows = Sequence[Mapping[str, Tensor]]


@dataclass
class Student:
    """A model in training and what routes it: a `router` of heads that is attached meanwhile, or a `host` of experts.

    `save` writes a model that transformers could not read back; by default it is `model.save_pretrained`. `during` is entered
    for the time of its training.
    """

    model: Any
    router: HeadRouter | None = None
    host: MoEHost | None = None
    save: Callable[[StrPath], None] | None = None
    during: Callable[[], AbstractContextManager[Any]] | None = None

    def after_step(self) -> None:
        """Move the biases of auxiliary-loss-free routers."""
        if self.host is not None:
            self.host.update_bias()


@dataclass(frozen=True)
class Data:
    """Rows to train on and rows to measure on, which no training sees; `tokenizer` for texts."""

    train: Rows
    held_out: Rows
    tokenizer: Any = None


@dataclass(frozen=True)
class Arm:
    """One training: how its model is made (from the arms before), on what, and for how many steps if not the recipe's.

    `examine` measures more than a loss: its figures are reported as of before the training (`before_…`) and after it.
    """

    build: Callable[[Mapping[str, Student]], Student]
    data: Data
    steps: int | None = None
    examine: Callable[[Student], dict[str, float]] | None = None


@dataclass(frozen=True, kw_only=True)
class Job:
    """What every recipe is asked alike. `settings`: all that decides the numbers, to be compared when a run is resumed."""

    name: str
    recipe: Recipe
    settings: Mapping[str, Any]
    folder: str | None = None
    save_every: int = 0
    resume: bool = False
    device: str | None = None
    progress: bool = False

    def __post_init__(self) -> None:
        whole("save_every", self.save_every, 0, RouteError)
        if self.resume and self.folder is None:
            raise RouteError("resume=True needs folder=, where the run to be resumed keeps its checkpoints")
        if self.save_every and self.folder is None:
            raise RouteError("save_every needs folder=, where the checkpoints go")

    @property
    def place(self) -> str:
        """The device: the one asked for, else the GPU where there is one."""
        return self.device or ("cuda" if torch.cuda.is_available() else "cpu")

    def open(self) -> None:
        """Take the folder: a new run wants one without a run, a resumed one wants its own."""
        if self.folder is None:
            return
        note, mine = Path(self.folder) / NOTE, {"name": self.name, "settings": dict(self.settings)}
        if not self.resume:
            if note.exists():
                raise RouteError(
                    f"folder {self.folder!r} holds a run already; continue it with resume=True or name another"
                )
            Path(self.folder).mkdir(parents=True, exist_ok=True)
            write_json(note, KIND, 1, mine)
            return
        if not note.exists():
            raise RouteError(f"resume=True, but {self.folder!r} holds no run; leave resume out to start one there")
        before = read_json(note, KIND, 1)
        if before.get("name") != self.name:
            raise RouteError(f"{self.folder!r} holds a run of {shown(before.get('name'))}, not of {self.name!r}")
        with decoding(note):
            old = field_of(before, "settings", dict)
        other = [f"{k}={shown(old.get(k))}, now {shown(v)}" for k, v in mine["settings"].items() if old.get(k) != v]  # type: ignore[attr-defined]
        if other:
            raise RouteError(f"the run in {self.folder!r} has other settings: {'; '.join(other)}")


@dataclass
class Trained:
    """What a recipe gives back: its models by arm ("routed" is the one it is for), their curves, and what was measured.

    `model` and `router` are those of the routed arm; `router` is None where experts are inside the model.
    """

    name: str
    settings: dict[str, Any]
    students: dict[str, Student]
    curves: dict[str, Curve] = field(default_factory=dict)
    measured: dict[str, dict[str, float]] = field(default_factory=dict)
    tokenizer: Any = None
    seconds: float = 0.0

    @property
    def model(self) -> Any:
        """The routed model; that of the last arm where nothing is routed."""
        return self.students.get("routed", [*self.students.values()][-1]).model

    @property
    def router(self) -> HeadRouter | None:
        """Its router of heads; attach both to use them."""
        return self.students["routed"].router if "routed" in self.students else None

    def summary(self) -> dict[str, Any]:
        """Plain values: settings and figures of each arm."""
        return {"settings": self.settings, "measured": self.measured, "seconds": round(self.seconds, 1)}

    def save_pretrained(self, folder: StrPath) -> None:
        """Write `folder/<arm>` for each arm (models, with the tokenizer), `folder/router`, and `folder/curves.json`.

        Routers of arms other than "routed" go to `folder/router-<arm>`.
        """
        place = Path(folder)
        for name, student in self.students.items():
            if student.router is not None:
                student.router.save_pretrained(place / ("router" if name == "routed" else f"router-{name}"))
            if student.save is not None:
                student.save(place / name)
            else:
                forget_whole(place / name)
                student.model.save_pretrained(place / name)
                if self.tokenizer is not None:
                    self.tokenizer.save_pretrained(place / name)
        self.save_figures(place / CURVES)

    def save_figures(self, path: StrPath) -> None:
        """Write what is not a model: curves, settings and figures of every arm."""
        curves = {name: {"losses": c.losses, "held_out": _text_keys(c.held_out)} for name, c in self.curves.items()}
        write_json(Path(path), "training-curves", 1, {"name": self.name, "curves": curves, **self.summary()})

    def __str__(self) -> str:
        lines = [f"{self.name}, {self.seconds:.0f} s"]
        for name, figures in self.measured.items():
            lines.append(f"{name}: " + ", ".join(f"{what} {value:.4g}" for what, value in figures.items()))
        return "\n".join(lines)


def follow(job: Job, arms: Mapping[str, Arm]) -> Trained:
    """Train the arms in turn; an arm whose checkpoint is complete is only read. Raises RouteError as `Job.open` does."""
    job.open()
    started = time.monotonic()
    data = next(iter(arms.values())).data
    trained = Trained(job.name, dict(job.settings), {}, tokenizer=data.tokenizer)
    for name, arm in arms.items():
        student = arm.build(trained.students)
        student.model.to(job.place)
        trained.students[name] = student
        before = {f"before_{what}": value for what, value in _examined(arm, student).items()}
        trained.curves[name] = curve = _train(job, name, arm, student)
        found = measure(student, arm.data.held_out, job.recipe.batch_size)
        curve.held_out[len(curve.losses)] = found["held_out_loss"]
        trained.measured[name] = {"train_loss": _tail(curve.losses), **found, **before, **_examined(arm, student)}
    trained.seconds = time.monotonic() - started
    return trained


def _examined(arm: Arm, student: Student) -> dict[str, float]:
    """The arm's further figures, of the model as it would be used: with its router attached."""
    if arm.examine is None:
        return {}
    student.model.eval()
    with ExitStack() as stack:
        if student.router is not None:
            stack.enter_context(attach(student.model, router=student.router))
        return arm.examine(student)


def _train(job: Job, name: str, arm: Arm, student: Student) -> Curve:
    folder = None if job.folder is None else str(Path(job.folder) / name)
    recipe = replace(job.recipe, folder=folder, save_every=job.save_every, steps=arm.steps or job.recipe.steps)
    recipe = replace(recipe, eval_every=max(1, recipe.steps // 10))
    with ExitStack() as stack:
        if student.router is not None:
            stack.enter_context(attach(student.model, router=student.router))
        if student.during is not None:
            stack.enter_context(student.during())
        return train(
            student.model,
            arm.data.train,
            recipe,
            held_out=arm.data.held_out,
            after_step=student.after_step,
            resume=job.resume and whole_checkpoint(folder) is not None,
            progress=job.progress,
            title=f"{job.name}, {name}",
        )


@torch.no_grad()
def measure(student: Student, rows: Rows, batch: int) -> dict[str, float]:
    """Mean loss on rows, accuracy where a row has one label, and the busiest unit's load over the mean."""
    model, total, right = student.model.eval(), 0.0, 0.0
    device = next(model.parameters()).device
    with ExitStack() as stack:
        load = records = None
        if student.router is not None:
            stack.enter_context(attach(model, router=student.router))
            load = stack.enter_context(student.router.recording())
        elif student.host is not None:
            records = stack.enter_context(student.host.recording())
        for start in range(0, len(rows), batch):
            part = rows[start : start + batch]
            given = {key: torch.stack([row[key] for row in part]).to(device) for key in part[0]}
            out = model(**given)
            total += float(out.loss) * len(part)
            if given["labels"].ndim == 1:
                right += float((out.logits.argmax(-1) == given["labels"]).sum())
    found = {"held_out_loss": total / len(rows)}
    if rows[0]["labels"].ndim == 0:
        found["accuracy"] = right / len(rows)
    if load is not None and student.router is not None:
        found |= {"active": student.router.share, "busiest": busiest_head(student.router, load)}
    if records:
        found |= _busiest_expert(records)
    return found


def busiest_head(router: HeadRouter, load: Any) -> float:
    """Load of the busiest head that tokens choose over the mean, in the layer where it is worst; 1 where no layer lets them choose."""
    routed = {n: list(r.pool) for n, r in enumerate(router.config.layers) if r.routed and not r.dense}
    share = load.share() if routed else torch.ones(0, 0)
    return max((float(share[n, pool].max() / share[n, pool].mean()) for n, pool in routed.items()), default=1.0)


def _busiest_expert(records: Mapping[int, Sequence[Any]]) -> dict[str, float]:
    """Mixtures that merge experts instead of choosing have no load."""
    loads = [sum(routing.load().double() for routing in row) for row in records.values() if hasattr(row[0], "load")]
    return {"busiest": max(float(load.max() / load.mean()) for load in loads)} if loads else {}


def size_of(size: str, sizes: Mapping[str, Any], steps: int | None) -> Any:
    """The entry of a recipe's sizes, with other steps if given; RouteError for an unknown one."""
    if size not in sizes:
        raise RouteError(f"size is {size!r}; it must be one of {', '.join(sizes)}")
    if steps is not None:
        whole("steps", steps, 1, RouteError)
    return sizes[size] if steps is None else replace(sizes[size], steps=steps)


def settings_of(chosen: Any, /, **more: Any) -> dict[str, Any]:
    """All that decides a run's numbers, as plain values: the entries of the size, and the options."""
    return {**asdict(chosen), **more}


def _tail(losses: Sequence[float]) -> float:
    """Mean training loss of the last tenth of the steps."""
    last = losses[-max(1, len(losses) // 10) :]
    return sum(last) / max(1, len(last))


def _text_keys(held_out: Mapping[int, float]) -> dict[str, float]:
    return {str(step): loss for step, loss in sorted(held_out.items())}
