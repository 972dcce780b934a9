"""The one attention op, its backends and the data it reads."""

from headwise.attention.groups import Compensation, KVGroup, Queries
from headwise.attention.op import AttentionOutput, Ran, attention, explain, split_by_pattern

__all__ = ["AttentionOutput", "Compensation", "KVGroup", "Queries", "Ran", "attention", "explain", "split_by_pattern"]
