"""A short training run of a transformers model through transformers' Trainer, with whatever is attached to it."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from headwise.checks import finite, whole
from headwise.errors import ArtifactError, RouteError
from headwise.storage import digest, read_json, write_json

SEAL = "headwise.json"  # in a checkpoint


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How long and how fast to train. AdamW, gradients clipped to norm 1, linear warm-up over a tenth of the steps, then linear decay.

    Raises RouteError for a value outside its range.
    """

    steps: int = 100
    batch_size: int = 4
    accumulate: int = 1
    learning_rate: float = 1e-4
    weight_decay: float = 0.1
    seed: int = 0
    checkpointing: bool = False
    folder: str | None = None
    save_every: int = 0
    eval_every: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "accumulate"):
            whole(name, getattr(self, name), 1, RouteError)
        for name in ("save_every", "eval_every"):
            whole(name, getattr(self, name), 0, RouteError)
        if finite("learning_rate", self.learning_rate, RouteError) <= 0:
            raise RouteError(f"learning_rate is {self.learning_rate}; it must be above 0")
        if self.save_every and self.folder is None:
            raise RouteError("save_every needs folder=, where the checkpoints go")


@dataclass(frozen=True)
class Curve:
    """The losses of a run: of training at every step, auxiliary losses included, and on held-out rows by step, without them."""

    losses: list[float]
    held_out: dict[int, float] = field(default_factory=dict)


def train_lm(model: Any, rows: Tensor, recipe: Recipe, *, resume: bool = False, progress: bool = False) -> list[float]:
    """Train on token rows (n, N), in place; gives the training loss of every step, balance loss included.

    `resume` continues from the newest checkpoint in `recipe.folder`. The model ends in eval mode, as it came.
    """
    return train(model, token_rows(rows), recipe, resume=resume, progress=progress).losses


def token_rows(rows: Tensor) -> list[dict[str, Tensor]]:
    """Token rows (n, N) as Trainer wants them, to be predicted from themselves."""
    return [{"input_ids": row, "labels": row} for row in rows]


def train(
    model: Any,
    dataset: Sequence[Mapping[str, Tensor]],
    recipe: Recipe,
    *,
    held_out: Sequence[Mapping[str, Tensor]] | None = None,
    after_step: Callable[[], Any] | None = None,
    resume: bool = False,
    progress: bool = False,
    title: str = "training",
) -> Curve:
    """Train any model whose forward takes the dataset's keys and gives a loss, in place.

    `held_out` is measured every `recipe.eval_every` steps. `after_step` is called after each optimizer step and before
    the checkpoint, for state that no gradient moves. `resume` and the end: as in `train_lm`.
    """
    cached = getattr(model.config, "use_cache", None)
    with tempfile.TemporaryDirectory() as scratch:
        trainer = _trainer(model, dataset, held_out, recipe, recipe.folder or scratch)
        trainer.add_callback(_callback(after_step, title if progress else None))
        if recipe.checkpointing:
            checkpoint_activations(model)
        try:
            trainer.train(resume_from_checkpoint=_newest(recipe) if resume else None)
        finally:
            model.eval()
            if cached is not None:
                model.config.use_cache = cached  # Trainer turns it off for good
            if recipe.checkpointing:
                stop_checkpointing(model)
    log = trainer.state.log_history
    held = {int(entry["step"]): float(entry["eval_loss"]) for entry in log if "eval_loss" in entry}
    return Curve([float(entry["loss"]) for entry in log if "loss" in entry], held)


def checkpoint_activations(model: Any) -> None:
    """Recompute layers in the backward pass, by the non-reentrant way, under the name that this transformers has for it."""
    how = {"use_reentrant": False}
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=how)
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=how)


def stop_checkpointing(model: Any) -> None:
    """Undo `checkpoint_activations`."""
    getattr(model, "activation_checkpointing_disable", model.gradient_checkpointing_disable)()


def _trainer(model: Any, dataset: Any, held_out: Any, recipe: Recipe, folder: str) -> Any:
    from transformers import PrinterCallback, Trainer, TrainingArguments

    arguments = TrainingArguments(
        output_dir=folder,
        max_steps=recipe.steps,
        per_device_train_batch_size=recipe.batch_size,
        per_device_eval_batch_size=recipe.batch_size,
        gradient_accumulation_steps=recipe.accumulate,
        learning_rate=recipe.learning_rate,
        weight_decay=recipe.weight_decay,
        adam_beta2=0.95,
        max_grad_norm=1.0,
        warmup_steps=max(1, recipe.steps // 10),
        lr_scheduler_type="linear",
        seed=recipe.seed,
        use_cpu=model.device.type == "cpu",  # the model stays where its owner put it
        logging_steps=1,
        report_to=[],
        disable_tqdm=True,
        save_strategy="steps" if recipe.save_every else "no",
        save_steps=recipe.save_every or 1,
        eval_strategy="steps" if held_out is not None and recipe.eval_every else "no",
        eval_steps=recipe.eval_every or None,
        prediction_loss_only=True,
        bf16=model.device.type == "cuda",
        dataloader_pin_memory=model.device.type == "cuda",
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=dataset, eval_dataset=held_out)
    trainer.remove_callback(PrinterCallback)
    return trainer


def _callback(after_step: Callable[[], Any] | None, title: str | None) -> Any:
    """What Trainer calls at each step: the state that no gradient moves, and, with a title, a progress bar with the loss."""
    from rich.progress import Progress
    from transformers import TrainerCallback

    class Steps(TrainerCallback):
        bar: Progress | None = None

        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if title is not None and state.is_world_process_zero:
                self.bar = Progress(transient=True)
                self.task = self.bar.add_task(title, total=state.max_steps, completed=state.global_step)
                self.bar.start()

        def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.is_world_process_zero:
                place = Path(args.output_dir) / f"checkpoint-{state.global_step}"
                write_json(place / SEAL, "checkpoint-seal", 1, {"files": _digests(place)})

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if after_step is not None:
                after_step()
            if self.bar is not None:
                self.bar.update(self.task, completed=state.global_step)

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            if self.bar is not None and "loss" in (logs or {}):
                self.bar.update(self.task, description=f"{title}: loss {float(logs['loss']):.3f}")

        def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if self.bar is not None:
                self.bar.stop()

    return Steps()


def whole_checkpoint(folder: str | Path | None) -> str | None:
    """The newest checkpoint in a folder that is as it was written, None without one.

    When Trainer has written one, the digests of its files are written beside them: a process that died while saving leaves a folder
    without, and a file that was damaged since has another. Both are passed over for the checkpoint before.
    """
    found = Path(folder).glob("checkpoint-*") if folder and Path(folder).is_dir() else ()
    numbered = {int(path.name[11:]): path for path in found if path.name[11:].isdecimal()}
    for _, path in sorted(numbered.items(), reverse=True):
        try:
            if read_json(path / SEAL, "checkpoint-seal", 1).get("files") == _digests(path):
                return str(path)
        except ArtifactError:
            continue
    return None


def _digests(checkpoint: Path) -> dict[str, str]:
    """Name → digest of the files of a checkpoint."""
    return {path.name: digest(path) for path in sorted(checkpoint.iterdir()) if path.name != SEAL}


def _newest(recipe: Recipe) -> str:
    found = whole_checkpoint(recipe.folder)
    if found is None:
        raise RouteError(
            f"resume=True, but {recipe.folder!r} holds no checkpoint; train with folder= and save_every= first"
        )
    return found
