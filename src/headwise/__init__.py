"""headwise: every attention head and every expert of a transformer as an addressable unit.

Route it, score it, budget its KV cache, steer its output, scale it, in any Hugging Face model.
"""

from headwise.attach import Attachment, attach, detach, find_stack, fingerprint
from headwise.attach.ablate import ablate
from headwise.attach.observe import Record, observe
from headwise.attention import attention
from headwise.cache import HeadwiseCache
from headwise.edits import Edit, HeadEdits, KeyGroup, TokenSelection
from headwise.errors import HeadwiseError
from headwise.plan import Budget, Elastic, Full, HeadPlan, Pattern, SinkWindow
from headwise.units import Fingerprint, HeadScores, HeadSet, Unit

__version__ = "0.1.0"

__all__ = [
    "Attachment",
    "Budget",
    "Edit",
    "Elastic",
    "Fingerprint",
    "Full",
    "HeadEdits",
    "HeadPlan",
    "HeadScores",
    "HeadSet",
    "HeadwiseCache",
    "HeadwiseError",
    "KeyGroup",
    "Pattern",
    "Record",
    "SinkWindow",
    "TokenSelection",
    "Unit",
    "ablate",
    "attach",
    "attention",
    "detach",
    "find_stack",
    "fingerprint",
    "observe",
]
