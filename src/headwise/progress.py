"""The progress bar of long work: one function, so that every bar looks alike and `progress=False` costs nothing."""

from collections.abc import Iterable
from typing import TypeVar

T = TypeVar("T")


def track(items: Iterable[T], title: str, progress: bool) -> Iterable[T]:
    """The items themselves; with `progress`, a bar called `title` moves on as they are taken.

    >>> list(track(range(3), "heads", progress=False))
    [0, 1, 2]
    """
    if not progress:
        return items
    from rich.progress import track as bar

    return bar(items, description=title)
