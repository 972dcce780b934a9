"""Guidance for a denoiser that somebody else's sampler calls: a hook around its forward, and a callback that counts steps.

Letters: B batch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from headwise.attach import Attachment, attach, fingerprint
from headwise.checks import finite, whole
from headwise.edits import HeadEdits
from headwise.errors import EditError
from headwise.steer._perturb import Perturbation, push


class guided:  # noqa: N801 - used like a function
    """While active, every prediction of `denoiser` is pushed away from its degraded one: pred + w · (pred − perturbed).

    Works around any pipeline or loop that calls the denoiser: `with guided(pipe.transformer, perturbation, w=3.0): pipe(…)`.
    The denoiser runs twice a step. Its output may be a tensor, a tuple or a model output; the first or `.sample` is the prediction.

    cfg: scale s of a pipeline that batches [unconditional, conditional] rows: only the second half is perturbed, and pushed by
    w / s, so that the pipeline's own uncond + s · (cond − uncond) becomes uncond + s · (cond − uncond) + w · (cond − perturbed).
    calls, which: a pipeline that runs the branches one by one calls the denoiser `calls` times a step; call number `which` is conditional.
    start, stop: the share of the steps in which guidance is active; `steps` says how many there are, or give
    `callback_on_step_end=guidance.callback` to the pipeline.

    >>> from headwise.hub import load_model
    >>> from headwise.units import HeadSet
    >>> model, _ = load_model("tiny-random-vit")
    >>> pixels, heads = torch.randn(1, 3, 32, 32), HeadSet.parse("L0H1")
    >>> with torch.no_grad():
    ...     plain = model(pixel_values=pixels)[0]
    ...     with guided(model, Perturbation(heads=heads, u=1.0), w=2.0):
    ...         pushed = model(pixel_values=pixels)[0]
    >>> bool((plain != pushed).any())
    True
    """

    def __init__(
        self,
        denoiser: nn.Module,
        perturbation: Perturbation | HeadEdits,
        *,
        w: float = 3.0,
        cfg: float | None = None,
        calls: int = 1,
        which: int = 0,
        start: float = 0.0,
        stop: float = 1.0,
        steps: int | None = None,
        stack: str | None = None,
    ):
        self.denoiser, self.perturbation, self.stack = denoiser, perturbation, stack
        self.w = finite("w", w, EditError)
        self.cfg = None if cfg is None else finite("cfg", cfg, EditError)
        if self.cfg == 0:
            raise EditError("cfg is 0: the pipeline then ignores its conditional rows; use cfg=None or another scale")
        self.calls = whole("calls", calls, 1, EditError)
        self.which = whole("which", which, 0, EditError, self.calls - 1)
        self.start, self.stop = finite("start", start, EditError), finite("stop", stop, EditError)
        if not 0 <= self.start <= self.stop <= 1:
            raise EditError(f"start={start}, stop={stop}: shares of the steps, 0 <= start <= stop <= 1")
        self.steps = None if steps is None else whole("steps", steps, 1, EditError)
        self.seen, self.step, self.counted = 0, 0, False
        self._busy = False
        self._handle: Any = None
        self._attachment: Attachment | None = None

    def __enter__(self) -> guided:
        if isinstance(self.perturbation, HeadEdits):
            self.perturbation.check(fingerprint(self.denoiser, self.stack))
        self._attachment = self._attached()  # once: a step only takes it up and lays it down
        if self._attachment is not None:
            self._attachment.suspend()
        self.seen, self.step, self.counted = 0, 0, False
        self._handle = self.denoiser.register_forward_hook(self._after, with_kwargs=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._handle.remove()
        if self._attachment is not None:
            self._attachment.detach()

    def callback(self, pipe: Any, step: int, timestep: Any, tensors: Mapping[str, Any]) -> Mapping[str, Any]:
        """For a pipeline's `callback_on_step_end`: tells which step comes next and how many there are."""
        self.counted, self.step = True, step + 1
        self.steps = int(getattr(pipe, "num_timesteps", 0) or 0) or self.steps
        return tensors

    def _attached(self) -> Attachment | None:
        """The degraded pass, attached; None where nothing would be degraded."""
        if isinstance(self.perturbation, HeadEdits):
            edits = self.perturbation
            return attach(self.denoiser, edits=edits, stack=self.stack) if len(edits) else None
        made = self.perturbation.attached(self.denoiser, stack=self.stack)
        return made if isinstance(made, Attachment) else None

    def _degraded(self, args: tuple, kwargs: dict) -> Tensor:
        """The prediction of the degraded pass."""
        if self._attachment is not None:
            self._attachment.resume()
        self._busy = True
        try:
            return prediction(self.denoiser(*args, **kwargs))
        finally:
            self._busy = False
            if self._attachment is not None:
                self._attachment.suspend()

    def _active(self) -> bool:
        number, self.seen = self.seen, self.seen + 1
        if number % self.calls != self.which or self.w == 0:
            return False
        if (self.start, self.stop) == (0.0, 1.0):
            return True
        if self.steps is None and not self.counted and number >= self.calls:
            raise EditError(
                "start and stop are shares of the steps, but nothing says how many there are: give steps=, or pass "
                "guidance.callback as the pipeline's callback_on_step_end"
            )
        step = self.step if self.counted else number // self.calls
        if self.steps is None:  # the first step of a pipeline whose callback has not run yet
            return self.start == 0
        return int(self.start * self.steps) <= step < max(int(self.stop * self.steps), int(self.start * self.steps) + 1)

    def _after(self, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
        if self._busy or not self._active():
            return None
        pred = prediction(output)
        rows = slice(None) if self.cfg is None else slice(len(pred) // 2, None)
        if self.cfg is not None and len(pred) % 2:
            raise EditError(
                f"cfg={self.cfg}: {len(pred)} rows are no pairs of unconditional and conditional ones; use cfg=None"
            )
        if self.cfg is not None:
            args, kwargs = _rows(args, rows, len(pred)), _rows(kwargs, rows, len(pred))
        perturbed = self._degraded(args, kwargs)
        pushed = push(pred[rows], perturbed, self.w if self.cfg is None else self.w / self.cfg)
        return with_prediction(output, pushed if self.cfg is None else torch.cat([pred[: len(pred) // 2], pushed]))


def prediction(output: Any) -> Tensor:
    """The prediction in what a denoiser gave: a tensor, the first of a tuple, or `.sample` or the first entry of a model output."""
    found = output
    if not isinstance(output, Tensor):
        found = output.sample if hasattr(output, "sample") else output[0]
    if not isinstance(found, Tensor):
        raise EditError(
            f"the denoiser gave a {type(output).__name__} whose first entry is no tensor; guidance needs a prediction"
        )
    return found


def with_prediction(output: Any, pred: Tensor) -> Any:
    """The same output with another prediction in it."""
    if isinstance(output, Tensor):
        return pred
    if dataclasses.is_dataclass(output) and not isinstance(output, type):
        given = [f.name for f in dataclasses.fields(output) if getattr(output, f.name) is not None]
        return dataclasses.replace(output, **{"sample" if "sample" in given else given[0]: pred})
    return type(output)((pred, *output[1:]))


def _rows(tree: Any, rows: slice, batch: int) -> Any:
    """Every tensor of a tree whose first dimension is the batch, cut to `rows`."""
    if isinstance(tree, Tensor):
        return tree[rows] if tree.ndim and tree.shape[0] == batch else tree
    if isinstance(tree, Mapping):
        return {key: _rows(value, rows, batch) for key, value in tree.items()}
    if isinstance(tree, tuple | list):
        return type(tree)(_rows(value, rows, batch) for value in tree)
    return tree
