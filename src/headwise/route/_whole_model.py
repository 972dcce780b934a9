"""Folders for models that routing has rebuilt: the dense model's config, what was done to it, and all weights.

folder/config.json          of the dense model, as transformers writes it
folder/headwise.json        the method's name and options
folder/model.safetensors    every tensor of the rebuilt model
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from headwise.errors import ArtifactError
from headwise.storage import StrPath, read_json, read_plain_json, read_tensors, write_json, write_tensors

NOTE, WEIGHTS, SCHEMA = "headwise.json", "rebuilt.safetensors", 1


READERS: dict[str, Callable[[StrPath], Any]] = {}
"""Kind of a folder → what reads it: every conversion that writes such folders puts its reader here."""


def load_rebuilt(folder: StrPath) -> Any:
    """What a conversion that rebuilds models wrote: a `MixedModel` or a `UnionModel`. Raises ArtifactError."""
    kind = read_plain_json(Path(folder) / NOTE).get("headwise")
    if kind not in READERS:
        raise ArtifactError(f"{folder}: {NOTE} is of kind {kind!r}; known kinds are {', '.join(sorted(READERS))}")
    return READERS[kind](folder)


def saved_tokenizer(folder: StrPath) -> Any:
    """The tokenizer in a folder, None without one."""
    from transformers import AutoTokenizer

    if not (Path(folder) / "tokenizer_config.json").is_file():
        return None
    return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


def save_whole(
    folder: StrPath, kind: str, model: nn.Module, config: Any, options: Mapping[str, Any], tokenizer: Any = None
) -> None:
    """Write a rebuilt model: `config` is that of the dense model it came from, `options` what rebuilds it."""
    place = Path(folder)
    config.save_pretrained(place)
    write_tensors(place / WEIGHTS, kind, SCHEMA, _own(model), {})
    if tokenizer is not None:
        tokenizer.save_pretrained(place)
    write_json(place / NOTE, kind, SCHEMA, {"options": dict(options), "class": type(model).__name__})


def dense_and_options(folder: StrPath, kind: str) -> tuple[Any, dict[str, Any]]:
    """A dense model of random weights and the options that turn it into what the folder holds."""
    import transformers

    note = read_json(Path(folder) / NOTE, kind, SCHEMA)
    built: Any = getattr(transformers, str(note.get("class")), None)
    if not isinstance(built, type) or not hasattr(built, "config_class"):
        raise ArtifactError(f"{folder}: {note.get('class')!r} is no model class of this transformers")
    config = built.config_class.from_pretrained(folder)
    with torch.random.fork_rng(devices=[]):
        return built(config).eval(), dict(note["options"])


def fill(model: nn.Module, folder: StrPath, kind: str) -> None:
    """Put the folder's weights, in their dtype, into a rebuilt model; raises ArtifactError unless they fit exactly."""
    path, mine = Path(folder) / WEIGHTS, _own(model)
    expect = {name: (None if value.is_floating_point() else value.dtype, value.ndim) for name, value in mine.items()}
    tensors, _ = read_tensors(path, kind, SCHEMA, expect)
    for name, value in mine.items():
        if tensors[name].shape != value.shape:
            raise ArtifactError(f"{path}: {name} is {tuple(tensors[name].shape)}, the model wants {tuple(value.shape)}")
    model.to(next(value.dtype for value in tensors.values() if value.is_floating_point()))
    model.load_state_dict(tensors, strict=False)


def _own(model: nn.Module) -> dict[str, Tensor]:
    """The state without other names of the same parameter, such as those of tied embeddings."""
    first = {name for name, _ in model.named_parameters()}
    others = {name for name, _ in model.named_parameters(remove_duplicate=False)} - first
    return {name: value for name, value in model.state_dict().items() if name not in others}
