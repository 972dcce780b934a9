"""What `headwise reproduce` gives back: the numbers of a run and whether they bear out the claim.

`expected` is text that a reader understands and a program evaluates: `"passkey_top3 < passkey_random; ppl_random <= 21"`.
`holds` is always computed from it and the numbers, never stored, so a record cannot say one thing and show another.
"""

import json
import math
import operator
import platform
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from headwise.checks import shown
from headwise.errors import ArtifactError
from headwise.storage import parse_json

SCALES = ("cpu", "gpu")
KEYS = ("paper", "claim", "scale", "metrics", "baselines", "expected", "holds", "seconds", "environment")

_OPERATORS: dict[str, Callable[[float, float], bool]] = {
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
    "==": operator.eq,
}
_ROW = re.compile(
    r"\s*(?:(?P<name>[^:<>=]+):)?\s*(?P<left>[^\s:<>=]+)\s*(?P<op><=|>=|==|<|>)\s*(?P<right>[^\s<>=]+)\s*"
)


def environment() -> dict[str, str]:
    """With what and when a run was made: versions, device and date; no host names, no paths.

    >>> sorted(environment())
    ['date', 'device', 'headwise', 'python', 'torch', 'transformers']
    """
    import torch

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"cpu ({platform.machine()})"
    return {
        "headwise": _version("headwise"),
        "torch": torch.__version__,
        "transformers": _version("transformers"),
        "python": platform.python_version(),
        "device": device,
        "date": datetime.now(UTC).date().isoformat(),
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


@dataclass(frozen=True)
class Check:
    """One row of what a claim demands: `left op right`, where a side is the name of a metric or baseline, or a number.

    A comparison with NaN or with an infinite number is false, whatever the operator: a run that broke bears out nothing.

    >>> Check("specific to retrieval heads", "top3", "<", "random").holds({"top3": 0.0, "random": 1.0})
    True
    """

    name: str
    left: str | float
    op: str
    right: str | float

    def __post_init__(self) -> None:
        """Refuse what could not be read back from the text form."""
        if self.op not in _OPERATORS:
            raise ValueError(f"op must be one of {' '.join(_OPERATORS)}, not {self.op!r}")
        if re.search(r"[:;<>=]", self.name):
            raise ValueError(f"the name of a check holds none of : ; < > =, not {self.name!r}")
        for side in (self.left, self.right):
            if isinstance(side, str) and (not side or re.search(r"[\s:;<>=]", side)):
                raise ValueError(f"a side of a check is a number or the name of a metric, not {side!r}")

    def holds(self, numbers: Mapping[str, float]) -> bool:
        """Whether the row is true of these numbers; a name that is not among them raises `ArtifactError`."""
        left, right = self._value(self.left, numbers), self._value(self.right, numbers)
        return math.isfinite(left) and math.isfinite(right) and bool(_OPERATORS[self.op](left, right))

    def _value(self, side: str | float, numbers: Mapping[str, float]) -> float:
        if not isinstance(side, str):
            return float(side)
        if side not in numbers:
            raise ArtifactError(
                f"check {shown(str(self), 200)} needs {shown(side)}; the run measured {shown(sorted(numbers), 400)}"
            )
        return float(numbers[side])

    def __str__(self) -> str:
        """The text form, e.g. `specific: top3 < random`."""
        prefix = f"{self.name}: " if self.name else ""
        left, right = (side if isinstance(side, str) else f"{side:.12g}" for side in (self.left, self.right))
        return f"{prefix}{left} {self.op} {right}"

    @classmethod
    def parse(cls, text: str) -> "Check":
        """Read the text form back."""
        found = _ROW.fullmatch(text)
        if found is None:
            raise ArtifactError(f"not a check: {shown(text, 200)}; a check reads 'name: left < right'")
        return cls((found["name"] or "").strip(), _side(found["left"]), found["op"], _side(found["right"]))


@dataclass(frozen=True)
class Reproduction:
    """One measured run of one paper's claim.

    Attributes:
        paper: slug of the paper, e.g. `"moh"`.
        claim: the claim that is tested, in one sentence.
        scale: `"cpu"` or `"gpu"`.
        metrics: what the method reached, by name; units belong in the name (`ppl_…`, `…_bytes`, `…_s`).
        baselines: what it is held against: dense, random, inverse, published figures.
        checks: what must be true of the numbers, at least one row.
        seconds: wall-clock seconds of the run.
        environment: see `environment()`.
    """

    paper: str
    claim: str
    scale: str
    metrics: Mapping[str, float]
    baselines: Mapping[str, float]
    checks: tuple[Check, ...]
    seconds: float
    environment: Mapping[str, str] = field(default_factory=environment)

    def __post_init__(self) -> None:
        """A claim without a check, or a check of a number that was not measured, raises `ArtifactError`."""
        values: dict[str, Any] = {
            "metrics": {name: float(value) for name, value in self.metrics.items()},
            "baselines": {name: float(value) for name, value in self.baselines.items()},
            "checks": tuple(self.checks),
            "seconds": round(float(self.seconds), 1),
            "environment": {name: str(value) for name, value in self.environment.items()},
        }
        for name, value in values.items():
            object.__setattr__(self, name, value)
        if self.scale not in SCALES:
            raise ArtifactError(f"scale is one of {', '.join(SCALES)}, not {shown(self.scale)}")
        if not self.checks:
            raise ArtifactError(
                f"reproduction of {shown(self.paper)} has no check: a claim that cannot fail is no claim"
            )
        twice = set(self.metrics) & set(self.baselines)
        if twice:
            raise ArtifactError(
                f"{shown(', '.join(sorted(twice)), 400)} named both as metric and as baseline of {shown(self.paper)}"
            )
        self.failed()

    @property
    def numbers(self) -> dict[str, float]:
        """Metrics and baselines together."""
        return {**self.metrics, **self.baselines}

    @property
    def expected(self) -> str:
        """The checks as text."""
        return "; ".join(map(str, self.checks))

    @property
    def holds(self) -> bool:
        """Whether every check is true of the numbers."""
        return not self.failed()

    def failed(self) -> list[Check]:
        """The checks that are not true of the numbers."""
        return [check for check in self.checks if not check.holds(self.numbers)]

    def to_dict(self) -> dict[str, Any]:
        """The object that `headwise reproduce --json` prints; NaN and infinities become null, as JSON has none."""
        return {key: _jsonable(getattr(self, key)) for key in KEYS}

    def to_json(self) -> str:
        """`to_dict()` as indented JSON."""
        return json.dumps(self.to_dict(), indent=2, ensure_ascii=False, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> "Reproduction":
        """Read a record; `holds` is computed anew, and a record that says otherwise raises `ArtifactError`."""
        try:
            data = parse_json(text, "record")
            missing = set(KEYS) - set(data)
            if missing:
                raise ArtifactError(f"record lacks {', '.join(sorted(missing))}")
            record = cls(
                paper=data["paper"],
                claim=data["claim"],
                scale=data["scale"],
                metrics={k: math.nan if v is None else v for k, v in data["metrics"].items()},
                baselines={k: math.nan if v is None else v for k, v in data["baselines"].items()},
                checks=tuple(Check.parse(row) for row in data["expected"].split(";")),
                seconds=data["seconds"],
                environment=data["environment"],
            )
        except ArtifactError:
            raise
        except (ValueError, TypeError, AttributeError) as error:
            raise ArtifactError(f"not the record of a reproduction: {str(error)[:400]}") from error
        if record.holds != data["holds"]:
            raise ArtifactError(
                f"the record of {shown(record.paper)} says holds={shown(data['holds'])}, its numbers say {record.holds}"
            )
        return record


def _side(text: str) -> str | float:
    try:
        return float(text)
    except ValueError:
        return text


def _jsonable(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _jsonable(item) for key, item in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
