"""A short training run of a causal language model through transformers' Trainer, with whatever is attached to it."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from headwise.checks import finite, whole
from headwise.errors import RouteError


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

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "accumulate"):
            whole(name, getattr(self, name), 1, RouteError)
        whole("save_every", self.save_every, 0, RouteError)
        if finite("learning_rate", self.learning_rate, RouteError) <= 0:
            raise RouteError(f"learning_rate is {self.learning_rate}; it must be above 0")
        if self.save_every and self.folder is None:
            raise RouteError("save_every needs folder=, where the checkpoints go")


def train_lm(model: Any, rows: Tensor, recipe: Recipe, *, resume: bool = False, progress: bool = False) -> list[float]:
    """Train on token rows (n, N), in place; gives the training loss of every step, balance loss included.

    `resume` continues from the newest checkpoint in `recipe.folder`. The model ends in eval mode, as it came.
    """
    with tempfile.TemporaryDirectory() as scratch:
        trainer = _trainer(model, rows, recipe, recipe.folder or scratch, progress)
        if recipe.checkpointing:
            checkpoint_activations(model)
        try:
            trainer.train(resume_from_checkpoint=_newest(recipe) if resume else None)
        finally:
            model.eval()
            if recipe.checkpointing:
                stop_checkpointing(model)
    return [float(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]


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


def _trainer(model: Any, rows: Tensor, recipe: Recipe, folder: str, progress: bool) -> Any:
    from transformers import PrinterCallback, Trainer, TrainingArguments

    arguments = TrainingArguments(
        output_dir=folder,
        max_steps=recipe.steps,
        per_device_train_batch_size=recipe.batch_size,
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
        disable_tqdm=not progress,
        save_strategy="steps" if recipe.save_every else "no",
        save_steps=recipe.save_every or 1,
        bf16=model.device.type == "cuda",
        dataloader_pin_memory=model.device.type == "cuda",
    )
    dataset = [{"input_ids": row, "labels": row} for row in rows]
    trainer = Trainer(model=model, args=arguments, train_dataset=dataset)
    trainer.remove_callback(PrinterCallback)
    return trainer


def _newest(recipe: Recipe) -> str:
    from transformers.trainer_utils import get_last_checkpoint

    found = get_last_checkpoint(recipe.folder) if recipe.folder and Path(recipe.folder).is_dir() else None
    if found is None:
        raise RouteError(
            f"resume=True, but {recipe.folder!r} holds no checkpoint; train with folder= and save_every= first"
        )
    return found
