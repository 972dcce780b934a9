"""One step of AdamW on a batch of token ids; on CUDA the whole step is captured once as a graph and replayed.

Small models are bound by the host there: a step of a routed model is a few thousand launches. For the papers that train.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

logger = logging.getLogger(__name__)
WARM = 3  # steps that run as they are before one is captured


class Step:
    """Forward pass, gradients, clipping at norm 1, AdamW (0.9, 0.95; decay 0.1). Called as `step(ids, rate)`.

    `after` runs behind the update (biases of routers). On CUDA the forward pass is in bfloat16, and from the fourth call on the
    step is a replay, if the third one never had to wait for the device; shapes must then stay as they are. `replays` says
    whether it is. Random numbers come from torch's own state of the device.
    """

    def __init__(self, model: Any, *, after: Callable[[], None] | None = None):
        self.model, self.after = model, after
        self.device = next(model.parameters()).device
        self.cuda = self.device.type == "cuda"
        rate: Any = torch.zeros((), device=self.device) if self.cuda else 0.0
        options: dict[str, Any] = {"fused": True, "capturable": True} if self.cuda else {}
        self.optimizer = torch.optim.AdamW(
            model.parameters(), lr=rate, betas=(0.9, 0.95), weight_decay=0.1, **options
        )  # fmt: skip
        self.taken, self.replays = 0, False
        self.graph: Any = None
        self.stream = torch.cuda.Stream(self.device) if self.cuda else None

    def __call__(self, ids: Tensor, rate: float) -> None:
        """Train on ids (B, N), which may live on the host."""
        for group in self.optimizer.param_groups:
            if self.cuda:
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate
        if not self.cuda:
            self._run(ids)
        elif self.replays:
            self.ids.copy_(ids)
            self.graph.replay()
        else:
            self._warm(ids.to(self.device))
        self.taken += 1

    def _run(self, ids: Tensor) -> None:
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.cuda):
            loss = self.model(ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.after is not None:
            self.after()

    def _warm(self, ids: Tensor) -> None:
        """A step on the side stream that the graph will be captured on; the last one finds out whether it waits."""
        assert self.stream is not None
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a capturable optimizer outside a capture
            waits = self.taken == WARM - 1 and not self._runs_unwatched(ids)
            if self.taken != WARM - 1 or waits:
                self._run(ids)
        torch.cuda.current_stream(self.device).wait_stream(self.stream)
        if self.taken == WARM - 1 and not waits:
            self._capture(ids)

    def _runs_unwatched(self, ids: Tensor) -> bool:
        """Take a step that may not wait for the device; False if it would have, and nothing is updated."""
        mode = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("error")
        try:
            self._run(ids)
        except RuntimeError as error:
            if "synchroniz" not in str(error):
                raise
            self.optimizer.zero_grad(set_to_none=True)
            logger.warning("training steps wait for the device and are not replayed as a graph", exc_info=True)
            return False
        finally:
            torch.cuda.set_sync_debug_mode(mode)
        return True

    def _capture(self, ids: Tensor) -> None:
        self.ids, graph = ids.clone(), torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, stream=self.stream):
                self._run(self.ids)
        except RuntimeError:
            logger.warning("a training step could not be captured and is not replayed as a graph", exc_info=True)
            self.optimizer.zero_grad(set_to_none=True)
            return
        self.graph, self.replays = graph, True


def seeded(device: torch.device, seed: int) -> Any:
    """A context in which torch's own random state of host and device starts at `seed`; afterwards it is as it was."""
    return _Seeded(device, seed)


class _Seeded:
    def __init__(self, device: torch.device, seed: int):
        self.fork = torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])
        self.device, self.seed = device, seed

    def __enter__(self) -> None:
        self.fork.__enter__()
        torch.default_generator.manual_seed(self.seed)
        if self.device.type == "cuda":
            with torch.cuda.device(self.device):
                torch.cuda.manual_seed(self.seed)

    def __exit__(self, *error: Any) -> None:
        self.fork.__exit__(*error)
