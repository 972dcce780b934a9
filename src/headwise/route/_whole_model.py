"""Folders for models that routing has rebuilt: the dense model's config, what was done to it, and all weights.

folder/config.json          of the dense model, as transformers writes it
folder/headwise.json        the method's name and options
folder/rebuilt.safetensors  every tensor of the rebuilt model, and the seal of the two files above

The seal is a digest: what a damaged config or option would build, of any size, is refused before it is built.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from headwise.checks import shown
from headwise.errors import ArtifactError
from headwise.storage import (
    StrPath,
    decoding,
    field,
    read_json,
    read_meta,
    read_plain_json,
    read_tensors,
    read_text,
    write_json,
    write_tensors,
    write_text,
)

Made = TypeVar("Made", bound="Whole")
NOTE, WEIGHTS, SCHEMA = "headwise.json", "rebuilt.safetensors", 1


class Whole(Protocol):
    """What a conversion gives: a model, and the tokenizer that is kept beside it."""

    model: Any
    tokenizer: Any


READERS: dict[str, Callable[[StrPath], Any]] = {}
"""Kind of a folder → what reads it: every conversion that writes such folders puts its reader here."""


def load_rebuilt(folder: StrPath) -> Any:
    """What a conversion that rebuilds models wrote: a `MixedModel` or a `UnionModel`. Raises ArtifactError."""
    kind = read_plain_json(Path(folder) / NOTE).get("headwise")
    if not isinstance(kind, str) or kind not in READERS:
        raise ArtifactError(f"{folder}: {NOTE} is of kind {shown(kind)}; known kinds are {', '.join(sorted(READERS))}")
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
    write_text(place / "config.json", config.to_json_string())
    if tokenizer is not None:
        tokenizer.save_pretrained(place)
    note = {"options": dict(options), "class": type(model).__name__}
    write_tensors(place / WEIGHTS, kind, SCHEMA, _own(model), {"seal": _seal(place, note)})
    write_json(place / NOTE, kind, SCHEMA, note)


def forget_whole(folder: StrPath) -> None:
    """Take away what `save_whole` left in a folder that now gets a plain model, or the folder would be read as the old one."""
    for name in (NOTE, WEIGHTS):
        (Path(folder) / name).unlink(missing_ok=True)


def read_whole(folder: StrPath, kind: str, build: Callable[[Any, dict[str, Any]], Made]) -> Made:
    """What `save_whole` wrote: `build` makes it of a dense model of random weights and the options, then it gets its weights and tokenizer.

    Raises ArtifactError.
    """
    place = Path(folder)
    note = read_json(place / NOTE, kind, SCHEMA)
    with decoding(place):
        if read_meta(place / WEIGHTS, kind, SCHEMA).get("seal") != _seal(place, note):
            raise ArtifactError(
                f"{NOTE}, config.json and {WEIGHTS} do not belong together; copy all files of the folder"
            )
        made = build(_dense(place, note), field(note, "options", dict))
        _fill(made.model, place, kind)
        made.tokenizer = saved_tokenizer(place)
    return made


def _seal(folder: Path, note: Mapping[str, Any]) -> str:
    """A digest of the config and of what is done to it."""
    plain = json.dumps([read_text(folder / "config.json"), note], sort_keys=True)
    return hashlib.sha256(plain.encode()).hexdigest()


def _dense(folder: Path, note: Mapping[str, Any]) -> Any:
    import transformers

    built: Any = getattr(transformers, str(note.get("class")), None)
    if not isinstance(built, type) or not hasattr(built, "config_class"):
        raise ArtifactError(f"{note.get('class')!r} is no model class of this transformers")
    with torch.random.fork_rng(devices=[]):
        return built(built.config_class.from_pretrained(folder)).eval()


def _fill(model: nn.Module, folder: StrPath, kind: str) -> None:
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
