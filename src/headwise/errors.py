"""Every error that headwise raises on purpose. Each text names the argument, the value it had and what would be right."""


class HeadwiseError(Exception):
    """Base class: `except HeadwiseError` catches whatever headwise raises on purpose."""


class UnitError(HeadwiseError, ValueError):
    """A head, kv head or expert that does not exist, an empty set, a malformed address."""


class PlanError(HeadwiseError, ValueError):
    """A KV plan or pattern that makes no sense: a negative window, a budget outside its range, a wrong shape."""


class ScoreError(HeadwiseError, ValueError):
    """An option of a scoring method that makes no sense: no prompts, a gate outside [0, 1], a text shorter than the window."""


class EditError(HeadwiseError, ValueError):
    """An edit of a head's output that makes no sense or lacks what it needs."""


class ArtifactError(HeadwiseError, ValueError):
    """A file that is truncated, of another schema, or holds tensors of the wrong shape or dtype."""


class WrongModelError(HeadwiseError, ValueError):
    """An artifact made for one model was given to another."""


class AttachError(HeadwiseError, RuntimeError):
    """A model that cannot be reached, or an intervention that cannot be applied where it was asked for."""


class CacheError(HeadwiseError, RuntimeError):
    """A cache used in a way that would lose or mix up tokens."""


class AttentionError(HeadwiseError, ValueError):
    """Bad input of the attention op: shapes, devices, unknown backend."""


class TaskError(HeadwiseError, ValueError):
    """A task, text or bundled model that is missing or cannot be built as asked for."""


class RouteError(HeadwiseError, ValueError):
    """A router of heads that makes no sense: head counts that do not add up, a share outside its range, a missing score."""


class BenchError(HeadwiseError, RuntimeError):
    """A measurement that must not be shown: its result is wrong, or the machine lacks what it needs."""


class ViewError(HeadwiseError, ValueError):
    """Something that the explorer cannot show or write: a prompt that is too long, a name that leads out of its folder."""
