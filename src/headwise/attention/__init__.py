"""The one attention op, its backends and the data it reads."""

from headwise.attention.backends import Ran
from headwise.attention.groups import Compensation, KVGroup, Queries
from headwise.attention.op import AttentionOutput, attention, split_by_pattern
from headwise.callable_module import make_callable

__all__ = ["AttentionOutput", "Compensation", "KVGroup", "Queries", "Ran", "attention", "split_by_pattern"]

make_callable(__name__, "attention")
