"""The arguments of a call by name, whatever transformers calls the cache among them.

From transformers 5.24 on, models, layers and outputs say `cache`, before it `past_key_values`. Here both are met, and nowhere else:
what is read stands under `CACHE`, what is given has the name that the module takes.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

CACHE = "cache"  # the key of the cache in what `bound` gives
CACHE_NAMES = ("past_key_values", "cache")


def bound(module: nn.Module, args: tuple, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of a call by name; the cache, if it is among them, under `CACHE`.

    >>> class Layer(nn.Module):
    ...     def forward(self, hidden_states, past_key_values=None): ...
    >>> bound(Layer(), ("x", "kept"), {"use_cache": True})
    {'hidden_states': 'x', 'use_cache': True, 'cache': 'kept'}
    """
    given = {**dict(zip(argument_names(module), args, strict=False)), **kwargs}
    caches = {name: given.pop(name) for name in CACHE_NAMES if name in given}
    if caches:  # of two, the one that the module would read
        given[CACHE] = caches.get(cache_name(module), next(iter(caches.values())))
    return given


def with_cache(
    module: nn.Module, args: tuple, kwargs: Mapping[str, Any], cache: object
) -> tuple[tuple, dict[str, Any]]:
    """The arguments of a call with another cache, or with none: under one name, at the place where one stood."""
    name, names = cache_name(module), argument_names(module)
    others = {key: value for key, value in kwargs.items() if key not in CACHE_NAMES}
    if name in names[: len(args)]:
        at = names.index(name)
        return (*args[:at], cache, *args[at + 1 :]), others
    return args, {**others, name: cache}


def cache_argument(module: nn.Module, cache: object) -> dict[str, Any]:
    """The keyword by which a layer or a model, and its `generate`, takes a cache.

    >>> class Layer(nn.Module):
    ...     def forward(self, hidden_states, past_key_values=None): ...
    >>> cache_argument(Layer(), "kept")
    {'past_key_values': 'kept'}
    """
    return {cache_name(module): cache}


def cache_of(output: Any) -> Any:
    """The cache in the output of a model or of `generate`; None without one.

    >>> from types import SimpleNamespace
    >>> cache_of(SimpleNamespace(cache=1)), cache_of(SimpleNamespace(past_key_values=2)), cache_of(SimpleNamespace())
    (1, 2, None)
    """
    name = CACHE if hasattr(output, CACHE) else "past_key_values"  # the new name first: asking for the old one warns
    return getattr(output, name, None)


def cache_name(module: nn.Module) -> str:
    """What a module calls the cache; a wrapper, whose signature does not say, hands on what transformers calls it."""
    names = argument_names(module)
    return next((name for name in CACHE_NAMES if name in names), None) or _transformers_name()


def argument_names(module: nn.Module) -> tuple[str, ...]:
    """Names of the arguments of a module's forward, in order."""
    return _names_of(type(module).forward)


@functools.cache
def _names_of(function: Callable) -> tuple[str, ...]:
    return tuple(name for name in inspect.signature(function).parameters if name != "self")


@functools.cache
def _transformers_name() -> str:
    from transformers.modeling_outputs import BaseModelOutputWithPast

    return next(name for name in CACHE_NAMES if name in BaseModelOutputWithPast.__dataclass_fields__)
