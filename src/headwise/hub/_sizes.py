"""Does a config describe the model whose weights lie beside it? Asked before anything of the described size is made."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from headwise.errors import TaskError

LARGEST_TEXT = 256 * 2**20
LARGEST_HEADER = 100 * 2**20  # bytes, as in safetensors itself
COUNTS = re.compile(r"(num_|n_)?((en|de)coder_|hidden_)?layers?")
SLACK = 2  # a model of more than so many times the stored values would be random for the most part


def check_size(folder: Path, config: Any, model_class: Any) -> None:
    """Refuse a config of many more layers or parameters than the folder has weights: it would be filled with random numbers, at any size.

    Folders without safetensors and quantised models, whose tensors are packed, are left to transformers. Raises TaskError.
    """
    plain = config.to_dict()
    shapes = [shape for file in sorted(folder.glob("*.safetensors")) for shape in _shapes(file)]
    if not shapes or plain.get("quantization_config"):
        return
    most = max(_layers(plain), default=0)
    if most > len(shapes):
        raise TaskError(f"config.json asks for {most} layers, the weights beside it have {len(shapes)} tensors")
    make = getattr(model_class, "_from_config", None) or model_class.from_config
    with torch.device("meta"):
        wanted = sum(parameter.numel() for parameter in make(config).parameters())
    stored = sum(math.prod(shape) for shape in shapes)
    if wanted > SLACK * stored:
        raise TaskError(f"config.json asks for {wanted} parameters, the weights beside it are {stored}")


def check_files(folder: Path) -> None:
    """Refuse what transformers would read without end: a pipe, or an enormous text file. Raises TaskError."""
    for path in sorted(folder.iterdir()):
        if path.suffix in (".json", ".safetensors") and not path.is_file():
            raise TaskError(f"{path.name} is no regular file")
        if path.suffix == ".json" and path.stat().st_size > LARGEST_TEXT:
            raise TaskError(f"{path.name} has {path.stat().st_size} bytes, more than the {LARGEST_TEXT} of any model")


def _shapes(file: Path) -> Iterator[list[int]]:
    """The shapes that the header of a safetensors file names; only the header is read."""
    with file.open("rb") as opened:
        size = int.from_bytes(opened.read(8), "little")
        if size > LARGEST_HEADER:
            raise TaskError(f"{file.name} is no safetensors file: its header would have {size} bytes")
        header = json.loads(opened.read(size))
    for name, entry in header.items():
        if name != "__metadata__":
            yield entry["shape"]


def _layers(config: Mapping[str, Any]) -> Iterator[int]:
    """Every number of layers in a config and the configs inside it."""
    for name, value in config.items():
        if isinstance(value, Mapping):
            yield from _layers(value)
        elif COUNTS.fullmatch(str(name)) and type(value) is int:
            yield value
