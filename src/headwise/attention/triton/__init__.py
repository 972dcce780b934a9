"""Own Triton kernels for the shapes that no library has. Importing this package does not need Triton; calling does.

``routed_attention``  every head serves its own subset of the queries        forward + backward
``span_attention``    every kv head reads its sinks and its window           forward + backward
``block_attention``   every query block reads its own list of key blocks     forward + backward
``key_attention``     every query reads its own list of keys              forward + backward
``ragged_decode``     every (row, kv head) has its own number of keys        forward
"""

from headwise.attention.triton._host import triton_available
from headwise.attention.triton.blocks import block_attention
from headwise.attention.triton.decode import (
    Compensation,
    SplitPlan,
    group_pointers,
    plan_splits,
    ragged_decode,
    ragged_decode_groups,
)
from headwise.attention.triton.keys import key_attention
from headwise.attention.triton.routed import routed_attention
from headwise.attention.triton.spans import span_attention

__all__ = [
    "Compensation",
    "SplitPlan",
    "block_attention",
    "group_pointers",
    "key_attention",
    "plan_splits",
    "ragged_decode",
    "ragged_decode_groups",
    "routed_attention",
    "span_attention",
    "triton_available",
]
