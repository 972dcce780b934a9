"""Names of models that a recipe of this package trains, once their folder stands among the package's weights: `circuit-lm`."""

from __future__ import annotations

from pathlib import Path

from headwise.errors import TaskError

FOLDER = Path(__file__).parent.parent / "models" / "weights"
LINES = {
    "circuit-lm": "a GPT-2 of 12 layers and 12 heads, trained on text, indirect objects, coloured objects and multiple choice",
}


def shipped_names() -> list[str]:
    """Names of the models that are there."""
    return [name for name in LINES if (FOLDER / name / "model.safetensors").is_file()]


def shipped_folder(name: str) -> str:
    """The folder of one of them; TaskError where it is missing."""
    if name not in shipped_names():
        raise TaskError(
            f"the weights of {name!r} do not come with this copy; train them with `headwise train {name} --size gpu -o run`, "
            "then load_model('run/lm')"
        )
    return str(FOLDER / name)
