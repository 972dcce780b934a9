"""The page of a training recipe: the loss curves of its arms, what was measured at the end, and the settings."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from headwise import registry
from headwise.report import figures
from headwise.report.figures import COLOURS, PALETTE, Line
from headwise.report.page import Card, Section, Table, render
from headwise.storage import StrPath, decoding, read_json, write_text

CURVES, PAGE = "curves.json", "curves.html"
POINTS = 200  # of a training curve; a point is the mean of the steps since the last one


def save_page(folder: StrPath) -> Path | None:
    """Draw `folder/curves.json`, which a recipe wrote, as `folder/curves.html`; None, and no page, where plotly is missing.

    Raises ArtifactError for a file that is none.
    """
    run = read_json(Path(folder) / CURVES, "training-curves", 1)
    if importlib.util.find_spec("plotly") is None:
        return None
    place = Path(folder) / PAGE
    with decoding(Path(folder) / CURVES):
        page = training_page(run)
    write_text(place, page)
    return place


def training_page(run: Mapping[str, Any]) -> str:
    """The page as HTML, of the content of `curves.json`."""
    measured = run["measured"]
    cards = [Card(f"{found['held_out_loss']:.4g}", f"held-out loss, {arm}") for arm, found in measured.items()]
    columns = sorted({what for found in measured.values() for what in found})
    rows = [[arm, *(found.get(what) for what in columns)] for arm, found in measured.items()]
    section = Section(
        "Loss by step",
        [
            "Training loss holds the auxiliary losses of the routers, held-out loss does not; a training point is the mean of the "
            "steps since the point before. All arms of equal length saw the same rows."
        ],
        figures=[curves_figure(run["curves"])],
        table=Table(["arm", *columns], rows),
        command=repeat(run["name"], run["settings"]),
    )
    facts = [(name, str(value)) for name, value in run["settings"].items()]
    lead = f"Recipe {run['name']}: {', '.join(measured)}; {run['seconds']} seconds."
    return render(f"Training: {run['name']}", lead, cards=cards, sections=[section], facts=facts)


def repeat(name: str, settings: Mapping[str, Any]) -> str:
    """The command that trains this again: the recipe's options whose values are not the default.

    >>> repeat("moh-lm", {"active": 0.5, "beta": 0.01, "control": True, "steps": 40, "seed": 0})
    'headwise train moh-lm --active 0.5 --control --steps 40 -o run/'
    """
    flags = []
    for option in registry.get("train", name).options.values():
        value = settings.get(option.name, option.default)
        flag = option.name.replace("_", "-")
        if value == option.default or value is None:
            continue
        flags.append(f"--{'' if value else 'no-'}{flag}" if isinstance(value, bool) else f"--{flag} {value}")
    return " ".join(["headwise train", name, *flags, "-o run/"])


def curves_figure(curves: Mapping[str, Any]) -> Any:
    """Two panels, training and held-out loss, a line for each arm."""
    known = {"routed": COLOURS["trained"], "dense": COLOURS["dense"]}
    spare = iter(c for c in PALETTE * 4 if c not in known.values())
    train, held = [], []
    for arm, curve in curves.items():
        colour = known.get(arm) or next(spare)
        train.append(Line(arm, *thinned(curve["losses"]), colour=colour))
        points = sorted((int(step), loss) for step, loss in curve["held_out"].items())
        held.append(Line(arm, [step for step, _ in points], [loss for _, loss in points], colour=colour))
    return figures.lines({"training loss": train, "held-out loss": held}, x_title="step")


def thinned(losses: Sequence[float]) -> tuple[list[float], list[float]]:
    """Steps and mean losses of at most `POINTS` even parts of a curve."""
    every = max(1, -(-len(losses) // POINTS))
    parts = [losses[start : start + every] for start in range(0, len(losses), every)]
    ends = [float(min(len(losses), (n + 1) * every)) for n in range(len(parts))]
    return ends, [sum(part) / len(part) for part in parts]
