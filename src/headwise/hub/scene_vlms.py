"""`scene-vlm-<seed>`: small LLaVAs that were trained on synthetic scenes (`headwise.models.scene_vlm`) and come with the package."""

from __future__ import annotations

from pathlib import Path

from headwise.errors import TaskError

PREFIX = "scene-vlm-"
FOLDER = Path(__file__).parent.parent / "models" / "weights"
LINE = "a LLaVA of 0.7M parameters, trained on synthetic scenes with a habit that makes it invent objects"


def scene_vlm_names() -> list[str]:
    """Names of the models that are there, by seed."""
    return sorted(folder.name for folder in FOLDER.glob(f"{PREFIX}*") if (folder / "model.safetensors").is_file())


def scene_vlm_folder(name: str) -> str:
    """The folder of one of them; TaskError otherwise."""
    if name not in scene_vlm_names():
        raise TaskError(
            f"no bundled model is named {name!r}; of these there are: {', '.join(scene_vlm_names()) or 'none'}"
        )
    return str(FOLDER / name)
