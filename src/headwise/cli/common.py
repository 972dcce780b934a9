"""What the commands share: options that mean the same everywhere, loading, attaching, and two ways to say the result."""

import json
import math
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

Model = Annotated[
    str, typer.Option("--model", "-m", help="A bundled name (see: headwise models), a local folder, or a hub id.")
]
Models = Annotated[
    list[str], typer.Option("--models", help="Several models of one architecture: --models A B C, each as for --model.")
]
Dtype = Annotated[str | None, typer.Option("--dtype", help="float32, bfloat16, … or auto. Default: float32 on a CPU.")]
Device = Annotated[str | None, typer.Option("--device", help="cpu, cuda, cuda:1, … Default: cuda where there is one.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else on standard output.")]
Seed = Annotated[int, typer.Option("--seed", help="Seed of every random choice.")]
Progress = Annotated[
    bool | None,
    typer.Option("--progress/--no-progress", help="Progress bars. Default: on a terminal.", show_default=False),
]
PlanFile = Annotated[Path | None, typer.Option("--plan", help="A HeadPlan file: what each kv head keeps.")]
EditsFile = Annotated[
    Path | None,
    typer.Option("--edits", help="A HeadEdits file, what happens to a head's output, or an ExpertEdits file."),
]
RouterFolder = Annotated[Path | None, typer.Option("--router", help="An adapter folder: which token uses which head.")]


def load(model: str, dtype: str | None, device: str | None) -> tuple[Any, Any]:
    """Model and tokenizer, on the GPU where there is one."""
    import torch
    from rich import get_console

    from headwise.hub import load_model

    with get_console().status(f"loading {model}"):
        chosen = device or ("cuda" if torch.cuda.is_available() else "cpu")
        if (Path(model) / "headwise.json").is_file():
            return _rebuilt(model, dtype, chosen)
        return load_model(model, dtype=dtype, device=chosen)


def _rebuilt(folder: str, dtype: str | None, device: str) -> tuple[Any, Any]:
    """A model that a conversion rebuilt, such as a mixture of several."""
    import torch

    from headwise.errors import ArtifactError
    from headwise.route import load_rebuilt

    made = load_rebuilt(folder)
    kind = getattr(torch, dtype, None) if dtype not in (None, "auto") else made.model.dtype
    if not isinstance(kind, torch.dtype):
        raise ArtifactError(f"dtype is {dtype!r}; it must be the name of a torch dtype such as 'bfloat16', or 'auto'")
    return made.model.to(device, kind).eval(), made.tokenizer


def load_all(models: list[str], dtype: str | None, device: str | None) -> tuple[list[Any], list[Any]]:
    """Several models and their tokenizers."""
    loaded = [load(model, dtype, device) for model in models]
    return [model for model, _ in loaded], [tokenizer for _, tokenizer in loaded]


def tokenizer_of(model: str, tokenizer: Any) -> Any:
    """The tokenizer, for commands that cannot do without one."""
    from headwise.errors import TaskError

    if tokenizer is None:
        raise TaskError(f"{model} has no tokenizer; this command needs a language model")
    return tokenizer


@contextmanager
def attached(model: Any, plan: Path | None, edits: Path | None, router: Path | None) -> Iterator[None]:
    """Attach what the files hold while the block runs."""
    if plan is edits is router is None:
        yield
        return
    from headwise.attach import attach
    from headwise.edits import HeadEdits
    from headwise.expert_edits import ExpertEdits
    from headwise.plan import HeadPlan
    from headwise.storage import read_plain_json

    far = plan is not None and read_plain_json(plan).get("headwise") == "long-heads"
    steered = edits is not None and read_plain_json(edits).get("headwise") == "expert-edits"
    parts: dict[str, Any] = {
        "plan": HeadPlan.load(plan) if plan and not far else None,
        "transforms": [_long_heads(plan, model)] if plan and far else [],
        "edits": HeadEdits.load(edits) if edits and not steered else None,
        "router": router_of(router) if router else None,
    }
    with ExitStack() as stack:
        if edits and steered:
            stack.enter_context(attach(model, edits=ExpertEdits.load(edits)))
        if any(part is not None and part != [] for part in parts.values()):
            stack.enter_context(attach(model, **parts))
        yield


def _long_heads(path: Path, model: Any) -> Any:
    """A planner's file that is no cache plan: which chunks a query reads."""
    from headwise.budget.longheads import LongHeads

    return LongHeads.load(path, model)


def router_of(folder: Path) -> Any:
    """The router that an adapter folder holds."""
    import headwise.route

    return headwise.route.HeadRouter.from_pretrained(folder)


def show_progress(progress: bool | None, as_json: bool) -> bool:
    """Progress bars as asked for; by default on a terminal, and never beside JSON."""
    return sys.stderr.isatty() and not as_json if progress is None else progress


def say(data: Mapping[str, Any], as_json: bool, text: str | Any) -> None:
    """Print the result: `data` as one JSON object, or `text` (a string or something that rich can draw) for a reader."""
    if as_json:
        typer.echo(json.dumps(jsonable(data), ensure_ascii=False, allow_nan=False))
        return
    from rich.console import Console

    console = Console(soft_wrap=isinstance(text, str))
    console.print(text, markup=False, highlight=False) if isinstance(text, str) else console.print(text)


def jsonable(value: Any) -> Any:
    """Plain JSON values: tensors and tuples become lists, numbers that JSON lacks become null, the rest text."""
    if isinstance(value, Mapping):
        return {str(key): jsonable(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [jsonable(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, bool | int | str):
        return value
    return jsonable(value.tolist()) if hasattr(value, "tolist") else str(value)
