"""Decode steps as one CUDA graph: the host launches a step as a whole instead of kernel by kernel.

Possible under a KV plan, whose cache then keeps its bookkeeping on the device (`HeadwiseCache.begin_steps`), so that a captured step is
right again at the next token. A step is captured when its shapes have been seen once, replayed afterwards, and captured anew when
the cache had to move its storages. What cannot be captured runs as ever, and is said once in the log.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from headwise.arguments import CACHE, CACHE_NAMES, argument_names, bound, cache_argument
from headwise.cache import HeadwiseCache, HeadwiseLayer
from headwise.steps import Steps

logger = logging.getLogger(__name__)
DROPPED = ("attention_mask", CACHE)  # a step reads all that the cache holds, which was checked; the cache is the cache
PLAIN = (bool, int, float, str, type(None))


@dataclass
class Graph:
    """One captured step: its inputs, which are copied into, and its output, which is overwritten."""

    steps: Steps
    key: tuple
    inputs: dict[str, Tensor]
    graph: Any
    out: Any


class Capture:
    """The forward pass of one stack's owner, with decode steps replayed."""

    def __init__(self, owner: nn.Module, cache: Callable[[], object]):
        self.owner, self.cache = owner, cache
        self.before = owner.__dict__.get("forward")  # a forward pass that somebody else hung there
        self.original = owner.forward
        self.seen: set[tuple] = set()  # shapes that ran once: kernels are compiled, libraries set up
        self.graph: Graph | None = None
        self.refused: str | None = None
        self.replays = 0
        owner.__dict__["forward"] = self.forward

    def remove(self) -> None:
        """The forward pass that was there before."""
        self.owner.__dict__.pop("forward", None)
        if self.before is not None:
            self.owner.__dict__["forward"] = self.before
        self.graph = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Replay a step, capture it, or run the pass as it is."""
        cache = self.cache()
        steps = cache.steps if isinstance(cache, HeadwiseCache) else None
        if steps is None or torch.is_grad_enabled() or self.refused is not None:
            return self.original(*args, **kwargs)
        assert isinstance(cache, HeadwiseCache)
        given = bound(self.owner, args, kwargs)
        key = _key(given)
        if key is None or key not in self.seen or not self.placed(given, cache):
            if key is not None:
                self.seen.add(key)
            return self.original(*args, **kwargs)
        inputs = self._inputs(given, cache)
        if self.graph is None or self.graph.steps is not steps or self.graph.key != key:
            self.graph = None  # its memory goes to the next one
            self.graph = self._captured(steps, key, given, inputs, cache)
            if self.graph is None:
                return self.original(*args, **kwargs)
        else:
            for name, value in inputs.items():
                self.graph.inputs[name].copy_(value)
            for layer in cache.layers:
                layer.seen += 1
            steps.counted(1)
        self.graph.graph.replay()
        self.replays += 1
        return _fresh(self.graph.out, cache)

    def placed(self, given: dict[str, Any], cache: HeadwiseCache) -> bool:
        """Do the inputs say where the tokens stand? A model that finds it out by itself would have the answer of one step captured:
        it must take `position_ids`, and be given them where rows are padded.
        """
        stated = given.get("position_ids") is not None
        return "position_ids" in argument_names(self.owner) and (stated or cache.layers[0].start is None)

    def _inputs(self, given: dict[str, Any], cache: HeadwiseCache) -> dict[str, Tensor]:
        """The tensors of a step; positions are always among them, as a number would be captured with the rest."""
        found = {name: x for name, x in given.items() if isinstance(x, Tensor) and name not in DROPPED}
        if "position_ids" not in found:
            device = next(iter(found.values())).device
            found["position_ids"] = torch.full((1, 1), cache.get_seq_length(), device=device, dtype=torch.long)
        return found

    def _captured(
        self, steps: Steps, key: tuple, given: dict[str, Any], inputs: dict[str, Tensor], cache: HeadwiseCache
    ) -> Graph | None:
        static = {name: x.clone() for name, x in inputs.items()}
        plain = {name: x for name, x in given.items() if name not in (*DROPPED, *static)}
        layers: list[HeadwiseLayer] = cache.layers
        before = layers[0].seen, steps.count, steps.left
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                out = self.original(**plain, **static, attention_mask=None, **cache_argument(self.owner, cache))
        except Exception as error:  # whatever a model does that a graph cannot hold
            for layer in layers:
                layer.seen, layer.pending = before[0], None
            steps.count, steps.left = before[1:]
            torch.cuda.synchronize()
            self.refused = f"{type(error).__name__}: {error}"
            logger.warning("decode steps of this model cannot be captured (%s); they run eagerly", self.refused)
            return None
        return Graph(steps, key, static, graph, out)


def _key(given: dict[str, Any]) -> tuple | None:
    """What two steps must share to be the same graph; None where an argument is neither a tensor nor a plain value."""
    if given.get("output_hidden_states") or given.get("output_attentions"):
        return None
    parts: list[tuple] = []
    for name in sorted(given):
        value = given[name]
        if name in DROPPED or value is None:
            continue
        if isinstance(value, Tensor):
            parts.append((name, tuple(value.shape), value.dtype, value.device))
        elif isinstance(value, PLAIN):
            parts.append((name, value))
        else:
            return None
    return tuple(parts)


def _fresh(out: Any, cache: HeadwiseCache) -> Any:
    """A copy of the output, which the next replay overwrites, with the cache as the caller has it."""
    values = {name: x.clone() if isinstance(x, Tensor) else x for name, x in out.items()}
    return type(out)(**values | {name: cache for name in CACHE_NAMES if name in values})
