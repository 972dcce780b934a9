"""What the explorer knows and can do, without a page: files, models at hand, what was computed for the last samples."""

from __future__ import annotations

import hashlib
import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from headwise.edits import HeadEdits
from headwise.errors import HeadwiseError, ViewError
from headwise.plan import HeadPlan
from headwise.units import Fingerprint, HeadScores, HeadSet, Unit
from headwise.view.library import Library
from headwise.view.live import Effect, Live, ablation
from headwise.view.points import Points, measure_points
from headwise.view.samples import Sample

T = TypeVar("T")
KEPT, UPLOADS = 48, 4  # results and images that are remembered
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


@dataclass(frozen=True)
class Ask:
    """What the user wants the model to read."""

    prompt: str = ""
    picture: int = 0
    upload: str = ""  # the key of an image that was handed in, see `Explorer.keep`


@dataclass
class Job:
    """A measurement in the background."""

    line: str = ""
    done: bool = False
    failed: bool = False
    name: str = ""


@dataclass
class Explorer:
    """The library, one or two models, and a memory of results. Methods may be called from several threads."""

    library: Library
    live: Live | None = None
    other: Live | None = None
    job: Job | None = None
    _memory: OrderedDict[Hashable, Any] = field(default_factory=OrderedDict)
    _uploads: dict[str, str] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    # -- tables of scores ------------------------------------------------------------------------------------------------

    def tables(self, ask: Ask | None = None) -> dict[str, HeadScores]:
        """Every table that can be drawn: of heads first, files before what the models do on the prompt that was run."""
        found = {name: item.value for name, item in self.library.of("scores").items()}
        for live in filter(None, (self.live, self.other)):
            if ask is not None:
                found |= {f"{live.name}, now: {name}": table for name, table in self.measured(live, ask).items()}
        return dict(sorted(found.items(), key=lambda pair: pair[1].kind != "head"))

    def table(self, name: str | None, ask: Ask | None = None) -> HeadScores:
        """One table. Raises ViewError for a name that is not there."""
        found = self.tables(ask)
        if name not in found:
            raise ViewError(f"no scores are called {str(name)[:80]!r}; choose another table")
        return found[name]

    def measured(self, live: Live, ask: Ask) -> dict[str, HeadScores]:
        """What the heads of a model do on a sample."""
        return self._remember(("tables", live.name, ask), lambda: live.tables(self.sample(ask, live)))

    def marks(self) -> dict[str, HeadSet]:
        """Sets of units that can be outlined on the grid: files of sets, the full kv heads of plans, the units of edits."""
        found: dict[str, HeadSet] = {name: item.value for name, item in self.library.of("set").items()}
        found |= {f"{name}: full": item.value.full_heads() for name, item in self.library.of("plan").items()}
        for name, item in self.library.of("edits", "expert edits").items():
            units = [edit.units for edit in (item.value if isinstance(item.value, HeadEdits) else item.value.edits)]
            for unit_set in units[1:]:
                units[0] = units[0] | unit_set
            if units:
                found[f"{name}: edited"] = units[0]
        return found

    def marked(self, name: str | None, scores: HeadScores) -> HeadSet | None:
        """The set of this name in the units of a table: kv heads stand for their query heads, where the groups are known, and back."""
        chosen = self.marks().get(name or "")
        if chosen is None or chosen.kind == scores.kind:
            return chosen and self._inside(chosen, scores)
        group = self.group(scores.fingerprint)
        if group is None or "expert" in (chosen.kind, scores.kind):
            return None
        return self._inside(chosen.to_kv(group) if scores.kind == "kv" else chosen.to_heads(group), scores)

    def _inside(self, chosen: HeadSet, scores: HeadScores) -> HeadSet | None:
        pairs = chosen.pairs()
        return chosen if all(layer < scores.layers and index < scores.units for layer, index in pairs) else None

    def group(self, made_for: Fingerprint | None = None) -> int | None:
        """Query heads a kv head."""
        known = made_for or (self.live.fingerprint if self.live else None)
        return known.heads // known.kv_heads if known else None

    # -- the model ---------------------------------------------------------------------------------------------------------

    def need(self) -> Live:
        """The model. Raises ViewError where none was given."""
        if self.live is None:
            raise ViewError("no model is loaded; start with: headwise view … --model smollm2")
        return self.live

    def sample(self, ask: Ask, live: Live | None = None) -> Sample:
        """What a model reads for this prompt."""
        live, upload = live or self.need(), self._uploads.get(ask.upload)
        if ask.upload and upload is None:
            raise ViewError("the image that was handed in is no longer here; hand it in again")
        return self._remember(("sample", live.name, ask), lambda: live.sample(ask.prompt, ask.picture, upload))

    def keep(self, upload: str) -> str:
        """Keep an image that was handed in (a data URL), and give its key; the last few are kept."""
        key = hashlib.sha256(upload.encode()).hexdigest()
        self._uploads[key] = upload
        while len(self._uploads) > UPLOADS:
            self._uploads.pop(next(iter(self._uploads)))
        return key

    def maps(self, ask: Ask, unit: Unit, plan: str | None = None, edits: str | None = None) -> Any:
        """The attention map (N, N) of a head, as it is or under files."""
        live, attached = self.need(), self.attached(plan, edits)
        live.check(unit)
        key = ("maps", ask, unit.layer, plan, edits)
        return self._remember(key, lambda: live.maps(self.sample(ask), unit.layer, **attached))[unit.index]

    def attached(self, plan: str | None, edits: str | None) -> dict[str, Any]:
        """What `attach` is given for these files."""
        found: dict[str, Any] = {}
        if plan:
            found["plan"] = self.library.get(plan, HeadPlan)
        if edits:
            found["edits"] = self.library.get(edits, HeadEdits)
        return found

    def nearest(self, ask: Ask, unit: Unit) -> list[tuple[Unit, float]]:
        """The heads whose maps look most like this one's."""
        return self._remember(("nearest", ask, unit), lambda: self.need().nearest(self.sample(ask), unit))

    def without(self, ask: Ask, unit: Unit, mode: Any) -> Effect:
        """The prediction without one head."""
        live = self.need()
        live.check(unit)

        def compute() -> Effect:
            before = self._remember(("before", ask), lambda: live.predict(self.sample(ask)))
            return Effect(before, live.predict(self.sample(ask), edits=ablation(unit, mode)))

        return self._remember(("without", ask, unit, mode), compute)

    def chance(self, ask: Ask, unit: Unit, mode: Any, count: int = 8) -> list[float]:
        """The change that taking out each of some random other heads makes."""
        return [self.without(ask, other, mode).change for other in self.need().others(unit, count)]

    def under(self, ask: Ask, plan: str | None, edits: str | None) -> Effect:
        """The prediction under a plan and edits."""
        attached = self.attached(plan, edits)
        return self._remember(("under", ask, plan, edits), lambda: self.need().effect(self.sample(ask), **attached))

    # -- points and exports --------------------------------------------------------------------------------------------------

    def measure(self, scores: str, **how: Any) -> Job:
        """Measure points of the cache in the background, and keep them in a file. Raises ViewError while one runs."""
        live, table = self.need(), self.library.get(scores, HeadScores)
        if self.job is not None and not self.job.done:
            raise ViewError("a measurement is running; wait for it")
        job = self.job = Job("starting")

        def run() -> None:
            try:
                with live.lock:
                    points = measure_points(
                        live.model, live.tokenizer, table, step=lambda line: setattr(job, "line", line), **how
                    )
                path = self._free("points", ".json")
                points.save(path)
                self.library.add(path)
                job.name, job.line = path.name, f"{points}; written: {path.name}"
            except HeadwiseError as error:
                job.failed, job.line = True, str(error)
            except Exception as error:  # a thread that dies in silence would leave the page waiting
                job.failed, job.line = True, f"{type(error).__name__}: {error}"
            finally:
                job.done = True

        threading.Thread(target=run, daemon=True).start()
        return job

    def points(self, name: str | None) -> Points:
        """The points of one file."""
        return self.library.get(name or "", Points)

    def export(self, chosen: HeadSet, name: str) -> Path:
        """Write a set of units into the folder, in the house format, and list it. Raises ViewError; no file is ever replaced."""
        path = self._inner(name, ".safetensors")
        if path.exists():
            raise ViewError(f"{path.name} exists already; choose another name")
        if not len(chosen):
            raise ViewError("nothing is selected; mark heads with the space bar or take the best ones")
        made_for = next((p for p in self._fingerprints() if _fits(chosen, p)), None)
        chosen.save(path, fingerprint=made_for)
        self.library.add(path)
        return path

    def _fingerprints(self) -> list[Fingerprint]:
        if self.live is not None:
            return [self.live.fingerprint]
        found = {p for item in self.library.of("scores").values() if (p := item.fingerprint) is not None}
        return list(found) if len(found) == 1 else []  # of two models, none is sure

    def _inner(self, name: str, suffix: str) -> Path:
        if not isinstance(name, str) or not NAME.fullmatch(name) or ".." in name:
            raise ViewError(f"{str(name)[:60]!r} is no file name; use letters, digits, dots, dashes and underscores")
        return self.library.folder / (name if name.endswith(suffix) else name + suffix)

    def _free(self, stem: str, suffix: str) -> Path:
        numbers = (f"-{n}" for n in range(1, 10_000))
        return next(p for n in numbers if not (p := self.library.folder / f"{stem}{n}{suffix}").exists())

    # -- memory ---------------------------------------------------------------------------------------------------------------

    def _remember(self, key: Hashable, compute: Callable[[], T]) -> T:
        with self._lock:
            if key in self._memory:
                self._memory.move_to_end(key)
                return self._memory[key]
        value = compute()
        with self._lock:
            self._memory[key] = value
            while len(self._memory) > KEPT:
                self._memory.popitem(last=False)
        return value


def _fits(chosen: HeadSet, made_for: Fingerprint) -> bool:
    try:
        chosen.check(made_for)
    except HeadwiseError:
        return False
    return True


def check_files(explorer: Explorer) -> list[str]:
    """Sentences about files that belong to another model than the one at hand."""
    if explorer.live is None:
        return []
    found = []
    for item in explorer.library.items.values():
        if item.fingerprint is not None and item.fingerprint != explorer.live.fingerprint:
            found.append(f"{item.name} was made for {item.fingerprint}, not for {explorer.live.name}")
    return found
