"""A package that can be called: `headwise.attach(model)` beside `headwise.attach.observe`, one name for both."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any


def make_callable(name: str, function: str) -> None:
    """Let calling the module `name` call its function `function`."""

    class CallableModule(ModuleType):
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return getattr(self, function)(*args, **kwargs)

    sys.modules[name].__class__ = CallableModule
