"""Budget: from scores to a KV plan, by one method a file. Results are `HeadPlan`."""

from headwise.budget._permute import permute_kv_heads
from headwise.registry import expose

expose(__name__)

__all__ = ["permute_kv_heads"]
