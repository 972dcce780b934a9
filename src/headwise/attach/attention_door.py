"""Take the one attention call of a module without seeing its other operations.

Libraries look torch's attention up at every call (`F.scaled_dot_product_attention`). While an attached module runs, a function of ours
stands in that place and hands the module's call over; otherwise torch is as it was. A `TorchFunctionMode` does the same for code that
holds on to the function itself, at the price of a detour for every operation of the module.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

ATTENTION = F.scaled_dot_product_attention
NAME = ATTENTION.__name__


class Taker(Protocol):
    """What wants a module's attention call."""

    def take(self, attention: Callable[..., Tensor], args: tuple, kwargs: dict) -> Tensor: ...


class _Here(threading.local):
    taker: Taker | None = None


class Door:
    """In the place of torch's attention while anyone is inside; each thread's calls go to its own taker, or to torch.

    >>> class Doubled:
    ...     def take(self, attention, args, kwargs):
    ...         return 2 * attention(*args, **kwargs)
    >>> q = torch.ones(1, 1, 2, 4)
    >>> with DOOR.inside(Doubled()):
    ...     doubled = F.scaled_dot_product_attention(q, q, q)
    >>> float(doubled[0, 0, 0, 0]), F.scaled_dot_product_attention is ATTENTION
    (2.0, True)
    """

    def __init__(self) -> None:
        self._lock, self._here = threading.Lock(), _Here()
        self._users = 0
        self._original: Callable[..., Tensor] = ATTENTION

    @contextlib.contextmanager
    def inside(self, taker: Taker) -> Iterator[None]:
        """This thread's attention calls inside the block go to `taker`."""
        outer = self.enter(taker)
        try:
            yield
        finally:
            self.leave(outer)

    def enter(self, taker: Taker) -> Taker | None:
        """The same without a block; gives what `leave` wants."""
        with self._lock:
            if self._users == 0:
                self._original = getattr(F, NAME)  # torch's, or what another library put there
                setattr(F, NAME, self._attention)
            self._users += 1
        outer, self._here.taker = self._here.taker, taker
        return outer

    def leave(self, outer: Taker | None) -> None:
        """The last one to leave puts torch's attention back."""
        self._here.taker = outer
        with self._lock:
            self._users -= 1
            if self._users == 0 and getattr(getattr(F, NAME), "__self__", None) is self:
                setattr(F, NAME, self._original)

    def _attention(self, *args: Any, **kwargs: Any) -> Tensor:
        taker, self._here.taker = self._here.taker, None  # what the taker calls itself is torch's
        try:
            with self._as_it_was() if torch._C._len_torch_function_stack() else contextlib.nullcontext():
                return self._original(*args, **kwargs) if taker is None else taker.take(self._original, args, kwargs)
        finally:
            self._here.taker = taker

    @contextlib.contextmanager
    def _as_it_was(self) -> Iterator[None]:
        """Other tools' function modes compare what is called with what stands in torch's place."""
        setattr(F, NAME, self._original)
        try:
            yield
        finally:
            setattr(F, NAME, self._attention)


DOOR = Door()


class Mode(TorchFunctionMode):
    """The way for code that calls torch's attention by a reference of its own."""

    def __init__(self, taker: Taker):
        super().__init__()
        self.taker = taker

    def __torch_function__(self, func: Callable, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Every operation passes here."""
        if func is ATTENTION:
            return self.taker.take(func, args, kwargs or {})
        return func(*args, **kwargs) if kwargs else func(*args)
