"""Recipe: a GPT-2 of 12 layers of 12 heads on text and three tasks, whose circuits can then be compared."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from headwise.errors import RouteError
from headwise.hub import load_model
from headwise.hub.shipped import shipped_folder, shipped_names
from headwise.models.circuit_lm import accuracies, circuit_lm, probes
from headwise.registry import register
from headwise.route._recipes import Arm, Data, Job, Student, Trained, follow, settings_of, size_of
from headwise.route._train import Recipe, whole_checkpoint
from headwise.storage import StrPath, read_plain_json, write_plain_json
from headwise.tasks.circuit_mix import Mix, circuit_rows, circuit_tokenizer, text_rows
from headwise.tasks.pairs import PromptPairs

LOG, HELD_OUT = "log.json", 64


@dataclass(frozen=True, kw_only=True)
class CircuitSize:
    """The model, and `steps` of `batch` rows out of `rows`, each of `length` tokens; tasks are asked ten times a run."""

    width: int = 96
    layers: int = 4
    heads: int = 6
    vocabulary: int = 2048
    length: int = 128
    rows: int = 3000
    steps: int = 300
    batch: int = 32
    rate: float = 2e-3
    probes: int = 32


SIZES = {
    "cpu": CircuitSize(),
    "gpu": CircuitSize(
        width=192, layers=12, heads=12, vocabulary=4096, rows=150_000, steps=2400, batch=512, rate=1e-3, probes=256
    ),
}


@dataclass
class Asked(Student):
    """A model that is asked the three tasks every `every` steps; `log` has its share of right answers by step, also in the file `place`.

    `before` is the log of the model that the run went on from.
    """

    prompts: dict[str, PromptPairs] = field(default_factory=dict)
    every: int = 1
    place: Path | None = None
    log: dict[str, dict[str, float]] = field(default_factory=dict)
    step: int = 0
    before: dict[str, Any] | None = None

    def after_step(self) -> None:
        """Ask, if it is time."""
        self.step += 1
        if self.step % self.every == 0:
            self.log[str(self.step)] = accuracies(self.model, self.prompts)
            if self.place is not None:
                write_plain_json(self.place, {"log": self.log})


@register("train", "circuit-lm", paper="29")
def train_circuit_lm(
    *,
    size: Literal["cpu", "gpu"] = "cpu",
    mix: Mix = "plain",
    steps: int | None = None,
    start: str | None = None,
    folder: str | None = None,
    save_every: int = 0,
    resume: bool = False,
    device: str | None = None,
    seed: int = 0,
    progress: bool = False,
) -> Trained:
    """Train a GPT-2 on packaged text, indirect objects, coloured objects and multiple choice.

    Openings, questions, names, objects and words of the prompts that are asked afterwards are not those it is trained on, see
    `headwise.tasks.circuit_mix`. The folder `lm` holds the model in bfloat16 with its tokenizer and `log.json`: answers by step, and
    under `before` the log of the run that it went on from.

    size: cpu (4 layers of width 96, 1.2 M tokens, for looking) or gpu (12 layers of 12 heads, width 192, 157 M tokens).
    mix: what it reads: plain, or dense: more answers a document, and openings of any words. The bundled model read plain, then dense.
    steps: optimizer steps, instead of the size's.
    start: a model of this size to go on from, by name or folder, with its tokenizer; by default random weights.
    folder: where checkpoints go.
    save_every: steps between checkpoints; 0 for none.
    resume: continue the run in folder, killed or complete.
    device: cpu, cuda, …; by default the GPU where there is one.

    Returns the trained model as arm "lm"; `measured` has the share of right answers of each task, of the whole vocabulary.
    """
    chosen: CircuitSize = size_of(size, SIZES, steps)
    job = Job(
        name="circuit-lm",
        recipe=Recipe(steps=chosen.steps, batch_size=chosen.batch, learning_rate=chosen.rate, seed=seed),
        settings=settings_of(chosen, size=size, mix=mix, seed=seed) | ({} if start is None else {"start": start}),
        folder=folder,
        save_every=save_every,
        resume=resume,
        device=device,
        progress=progress,
    )
    first, tokenizer = (None, circuit_tokenizer(chosen.vocabulary)) if start is None else _started(start, chosen)
    asked = probes(tokenizer, count=chosen.probes, seed=seed + 1)
    rows = circuit_rows(tokenizer, chosen.rows, chosen.length, mix=mix, seed=seed)
    held_out = text_rows(tokenizer, HELD_OUT, chosen.length, seed=999, split="eval")
    before = None if start is None else _log_of(start)

    def build(done: object) -> Student:
        shape = {"width": chosen.width, "layers": chosen.layers, "heads": chosen.heads, "length": chosen.length}
        model = first or circuit_lm(**shape, vocabulary=chosen.vocabulary, seed=seed)
        place = None if folder is None else Path(folder) / LOG
        student = Asked(model, prompts=asked, every=max(1, chosen.steps // 10), place=place, before=before)
        if place is not None and resume and place.exists():
            student.log = dict(read_plain_json(place)["log"])
            student.step = _step_of(whole_checkpoint(place.parent / "lm"))
        student.save = lambda where: _save(trained, student, where)
        return student

    def examine(student: Student) -> dict[str, float]:
        return accuracies(student.model, asked)

    trained = follow(job, {"lm": Arm(build, Data(rows, held_out, tokenizer), examine=examine)})
    return trained


def _started(start: str, chosen: CircuitSize) -> tuple[Any, Any]:
    """The model to go on from and its tokenizer. Raises RouteError for one of another shape."""
    model, tokenizer = load_model(start, dtype="float32")
    wanted = {"n_embd": chosen.width, "n_layer": chosen.layers, "n_head": chosen.heads, "vocab_size": chosen.vocabulary}
    found = {name: getattr(model.config, name, None) for name in wanted}
    if found != wanted or tokenizer is None:
        raise RouteError(f"start={start!r} has {found}; this size has {wanted}, and a tokenizer beside the weights")
    return model, tokenizer


def _log_of(start: str) -> dict[str, Any] | None:
    """What the run that made a model wrote beside it; None where there is nothing."""
    place = Path(shipped_folder(start) if start in shipped_names() else start) / LOG
    return dict(read_plain_json(place)) if place.is_file() else None


def _step_of(checkpoint: str | None) -> int:
    return 0 if checkpoint is None else int(Path(checkpoint).name.rpartition("-")[2])


def _save(trained: Trained, student: Asked, where: StrPath) -> None:
    """The model in bfloat16, its tokenizer, and what it answered on the way, in this run and in those before it."""
    copy.deepcopy(student.model).to(torch.bfloat16).save_pretrained(where)
    trained.tokenizer.save_pretrained(where)
    log: dict[str, Any] = {"name": trained.name, "accuracies": student.log, **trained.summary()}
    write_plain_json(Path(where) / LOG, log if student.before is None else {**log, "before": student.before})
