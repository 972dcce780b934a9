"""A model's mode while it is measured: no dropout, no gradients of weights, and afterwards every module as it was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode inside, so that dropout makes no two passes differ; then each module in its own mode, whichever that was.

    >>> model = nn.Sequential(nn.Dropout(), nn.Dropout().eval())
    >>> with evaluating(model):
    ...     inside = [layer.training for layer in model]
    >>> inside, [layer.training for layer in model]
    ([False, False], [True, False])
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Eval mode, and no weight asks for a gradient: a backward pass through activations alone costs half; then all as before."""
    wanted = [p for p in model.parameters() if p.requires_grad]
    with evaluating(model):
        try:
            for parameter in wanted:
                parameter.requires_grad_(False)
            yield
        finally:
            for parameter in wanted:
                parameter.requires_grad_(True)
