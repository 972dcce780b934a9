"""Bench: what the kernels take and gain, side by side with the fastest dense kernel of the same machine in the same run.

Each case first proves its result against a float64 reference; where that gate is red no figure is printed.
"""

from headwise.bench.cases import CASES, Case, Setting
from headwise.bench.run import Report, run

__all__ = ["CASES", "Case", "Report", "Setting", "run"]
