"""headwise: every attention head and every expert of a transformer as an addressable unit.

Route it, score it, budget its KV cache, steer its output, scale it, in any Hugging Face model. Names load when they are
first used, so that `import headwise` and `headwise --help` take no time.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from headwise.attach import Attachment, attach, detach, find_stack, fingerprint
    from headwise.attach.ablate import ablate
    from headwise.attach.experts import attach_experts, find_experts, observe_experts
    from headwise.attach.observe import Record, observe
    from headwise.attention import attention
    from headwise.cache import HeadwiseCache
    from headwise.edits import Edit, HeadEdits, KeyGroup, TokenSelection
    from headwise.errors import HeadwiseError
    from headwise.expert_edits import ExpertEdit, ExpertEdits
    from headwise.hub import load_model
    from headwise.plan import Budget, Elastic, Full, HeadPlan, Pattern, Selected, SinkWindow
    from headwise.units import Fingerprint, HeadScores, HeadSet, Unit

__version__ = "0.1.0"

_HOMES = {
    "attach": "Attachment attach detach find_stack fingerprint",
    "attach.ablate": "ablate",
    "attach.experts": "attach_experts find_experts observe_experts",
    "attach.observe": "Record observe",
    "attention": "attention",
    "cache": "HeadwiseCache",
    "edits": "Edit HeadEdits KeyGroup TokenSelection",
    "errors": "HeadwiseError",
    "expert_edits": "ExpertEdit ExpertEdits",
    "hub": "load_model",
    "plan": "Budget Elastic Full HeadPlan Pattern Selected SinkWindow",
    "units": "Fingerprint HeadScores HeadSet Unit",
}
_WHERE = {name: f"headwise.{home}" for home, names in _HOMES.items() for name in names.split()}
_VERBS = ("budget", "route", "scale", "score", "steer")

__all__ = [*sorted(_WHERE), "__version__"]  # noqa: PLE0604


def __getattr__(name: str) -> Any:
    if name in _WHERE:
        home = importlib.import_module(_WHERE[name])
        called_itself = home.__name__ == f"headwise.{name}"  # attach, attention: modules that are called like functions
        return home if called_itself else getattr(home, name)
    if name in _VERBS:
        return importlib.import_module(f"headwise.{name}")
    raise AttributeError(f"module 'headwise' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_WHERE, *_VERBS])
