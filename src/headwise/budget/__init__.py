"""Budget: from scores to a KV plan, by one method a file. Results are `HeadPlan`."""

from headwise.budget._moa_calibration import Calibration, calibration_set
from headwise.budget._moa_front import MoaFront, moa_front
from headwise.budget._moa_profile import InfluenceProfile
from headwise.budget._moa_rules import moa_spans
from headwise.budget._permute import permute_kv_heads
from headwise.budget._step_time import StepTime, step_time
from headwise.registry import expose

expose(__name__)

__all__ = [
    "Calibration",
    "InfluenceProfile",
    "MoaFront",
    "StepTime",
    "calibration_set",
    "moa_front",
    "moa_spans",
    "permute_kv_heads",
    "step_time",
]
