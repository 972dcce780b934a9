"""`HeadRouter`: one small module a layer that gives each token a gate per query head; attached, trained, saved, merged.

Letters: L layers, B batch, N tokens, H query heads.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from headwise import storage
from headwise.attach import Stack, find_stack, fingerprint
from headwise.attach.controller import tensor_parallel
from headwise.attach.projection import output_projection, scale_heads
from headwise.errors import ArtifactError, AttachError, RouteError
from headwise.route._collect import Collector, HeadLoad, join_loss
from headwise.route._config import RouterConfig
from headwise.route._layers import CLASSES, FittedLayer, RouterLayer, TrainedLayer
from headwise.units import Fingerprint, HeadSet

CONFIG, WEIGHTS = "router_config.json", "router_model.safetensors"
CHILD = "headwise_router"
"""Name under which a layer's router stands in its attention module, so that optimizers, DDP and `.to()` see it."""


class HeadRouter(nn.Module):
    """Gates (B, N, H) per token and query head, for `headwise.attach(model, router=…)`.

    While attached, its modules are children of the attention modules, and in training mode `beta` times the mean
    balance loss of the routed layers is added to the model's `output.loss`. Raises RouteError for a config that makes
    no sense.

    >>> from headwise.attach import attach
    >>> from headwise.hub import load_model
    >>> from headwise.route._config import LayerRoute
    >>> model, _ = load_model("tiny-random-llama")
    >>> router = HeadRouter(RouterConfig(kind="norm", layers=(LayerRoute(heads=4, shared=(0,), routed=2),) * 3))
    >>> with attach(model, router=router), router.recording() as load:
    ...     _ = model(torch.arange(9)[None])
    >>> router.active_counts(), round(float(load.skip_rate()[0]), 3)
    ([3, 3, 3], 0.25)
    """

    def __init__(self, config: RouterConfig, *, generator: torch.Generator | None = None):
        super().__init__()
        self.config = config
        self.collector = Collector()
        generator = torch.Generator().manual_seed(0) if generator is None else generator
        self.layers = nn.ModuleList(self._make(layer, generator) for layer in range(len(config.layers)))
        self._handles: list[Any] = []
        self._causal = True

    def _make(self, layer: int, generator: torch.Generator) -> RouterLayer:
        cls = CLASSES[self.config.kind]
        if issubclass(cls, TrainedLayer | FittedLayer):
            return cls(self.config, layer, self.collector, generator)
        return cls(self.config, layer, self.collector)

    # -- the router protocol of attach -------------------------------------------------------------------------------

    def check(self, fingerprint: Fingerprint) -> None:
        """Raises WrongModelError if this router belongs to another model."""
        self.config.check(fingerprint)

    def for_layer(self, layer: int) -> nn.Module | None:
        """The module of a layer; None where every gate is 1 for every token."""
        return self.layers[layer] if self._needed(layer) else None

    def _needed(self, layer: int) -> bool:
        constant = self.layers[layer].constant()  # type: ignore[operator]
        return constant is None or not bool((constant == 1).all())

    def install(self, model: nn.Module, stack: Stack) -> None:
        """Make the layers children of the attention modules, and add the balance loss to the model's loss."""
        if self._handles:
            raise AttachError("this router is already attached to a model; detach it there, or load a second one")
        if self.config.kind == "norm" and tensor_parallel(stack.modules[0])[1] > 1:
            raise AttachError(
                "routing by query norm compares all heads of a layer, tensor-parallel ranks hold a part each"
            )
        width = getattr(stack.config, "hidden_size", self.config.width)
        if self.config.width not in (0, width):
            raise AttachError(f"the router reads hidden states of width {self.config.width}, the model has {width}")
        if any(hasattr(module, CHILD) for module in stack.modules):
            raise AttachError(f"an attention module already has a child {CHILD!r}: another router is attached")
        self._causal = stack.causal
        for layer, module in enumerate(stack.modules):
            if self._needed(layer):
                router = self.layers[layer].to(next(module.parameters()).device)
                module.add_module(CHILD, router.train(module.training))
        self._handles = [
            stack.owner.register_forward_pre_hook(self._begin),
            model.register_forward_hook(self._add_loss, with_kwargs=True),
        ]

    def uninstall(self, model: nn.Module, stack: Stack) -> None:
        """Undo `install`; does nothing if it never happened."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        for layer, module in enumerate(stack.modules):
            if module._modules.get(CHILD) is self.layers[layer]:
                del module._modules[CHILD]
        self.collector.begin()

    def loss(self) -> Tensor | None:
        """beta · mean over routed layers of the last forward pass' balance loss; None outside training.

        Raises RouteError where gradient checkpointing ran the layers without a graph.
        """
        mean = self.collector.mean_loss()
        return None if mean is None else self.config.beta * mean

    def _begin(self, owner: nn.Module, args: tuple) -> None:
        self.collector.begin()

    def _add_loss(self, model: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
        """Forward hook of the model: the task loss, where there is one, gets the balance loss."""
        extra = self.loss() if model.training else None
        return output if extra is None else join_loss(output, extra, kwargs, self._causal)

    # -- what it does ------------------------------------------------------------------------------------------------

    def active_counts(self) -> list[int]:
        """Heads that run for each token, per layer."""
        return [route.active for route in self.config.layers]

    @property
    def share(self) -> float:
        """Share of all (token, head) pairs that run."""
        return sum(self.active_counts()) / sum(route.heads for route in self.config.layers)

    def shared_heads(self) -> HeadSet:
        """The heads that run for every token."""
        return HeadSet.of([(n, h) for n, route in enumerate(self.config.layers) for h in route.shared])

    @contextmanager
    def recording(self, rows: Sequence[str] | None = None) -> Iterator[HeadLoad]:
        """Inside, used heads are counted; `rows` names the category of each row of the batches (`load.rows` changes it)."""
        if self.collector.load is not None:
            raise RouteError("the load of this router is already being recorded")
        self.collector.load = load = HeadLoad(self.config.layers, rows)
        try:
            yield load
        finally:
            self.collector.load = None

    def merge(self, model: nn.Module, *, stack: str | None = None) -> None:
        """Fold gates that are the same for every token into the output projections, in place: static head pruning.

        Raises RouteError if any gate depends on the token; the model is then as it was.
        """
        if self._handles:
            raise AttachError("detach the router before merging it, or its gates would be applied twice")
        found = find_stack(model, stack)
        self.check(fingerprint(model, stack))
        constants = [layer.constant() for layer in self.layers]  # type: ignore[operator]
        moving = [n for n, gates in enumerate(constants) if gates is None]
        if moving:
            raise RouteError(
                f"a {self.config.kind!r} router cannot be merged: in layers {moving} the gates depend on the token. "
                "Only a static choice of heads folds into the output projection"
            )
        if tensor_parallel(found.modules[0])[1] > 1:
            raise AttachError("merge needs the whole output projection; load the model without a tensor-parallel plan")
        projections = [output_projection(found, layer) for layer in range(found.layers)]
        for projection, gates in zip(projections, constants, strict=True):
            scale_heads(projection, gates)

    def __str__(self) -> str:
        counts, heads = sorted(set(self.active_counts())), self.config.layers[0].heads
        kept = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
        shared = sorted({len(route.shared) for route in self.config.layers})
        common = "" if self.config.kind == "static" else f", {'-'.join(map(str, shared))} of them shared"
        return f"{self.config.kind} head router: kept {kept} of {heads} ({self.share:.3f}) in {len(self.layers)} layers{common}"

    # -- on disk -----------------------------------------------------------------------------------------------------

    def save_pretrained(self, folder: storage.StrPath) -> None:
        """Write an adapter folder: router_config.json and, for kinds with parameters, router_model.safetensors."""
        path = Path(folder)
        weights = dict(self.state_dict())
        digest = None
        if weights:
            storage.write_tensors(path / WEIGHTS, "head-router", 1, weights, {})
            digest = storage.digest(path / WEIGHTS)
        storage.write_json(path / CONFIG, "head-router", 1, {**self.config.to_dict(), "weights": digest})

    @classmethod
    def from_pretrained(cls, folder: storage.StrPath) -> HeadRouter:
        """Read what `save_pretrained` wrote. Raises ArtifactError; `attach` tells whether it fits a model."""
        path = Path(folder)
        payload = storage.read_json(path / CONFIG, "head-router", 1)
        with storage.decoding(path / CONFIG):
            router = cls(RouterConfig.from_dict(payload))
        mine = router.state_dict()
        if mine:
            expect: storage.Expect = {name: (None, tensor.ndim) for name, tensor in mine.items()}
            weights, _ = storage.read_tensors(path / WEIGHTS, "head-router", 1, expect)
            if storage.digest(path / WEIGHTS) != payload.get("weights"):
                raise ArtifactError(f"{str(path / WEIGHTS)!r} belongs to another router; copy both files of the folder")
            wrong = [n for n, t in mine.items() if t.shape != weights[n].shape or not weights[n].isfinite().all()]
            if wrong:
                raise ArtifactError(f"{str(path / WEIGHTS)!r}: {wrong[0]} has the wrong shape or is not finite")
            router.load_state_dict(weights)
        return router
