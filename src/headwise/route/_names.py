"""Words that options of routers and experts are chosen from."""

from typing import Literal

Activation = Literal["silu", "gelu", "relu", "gelu_tanh"]
Backend = Literal["auto", "loop", "dense", "sorted", "grouped_mm"]
