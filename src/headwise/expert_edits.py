"""Edits of a model's routing, said as data: which experts are switched off, banned, forced, favoured or scaled.

| op | what happens to the experts of the edit |
|---|---|
| off | they lose their weight, the other chosen experts take it over in proportion; nobody moves in (MoTE) |
| ban | they are never chosen, the next best move in; weights as the model makes them |
| force | they are always chosen, in the place of the worst others; own score, at least `value` if given |
| favour | `value` is added to their score for the choice only |
| scale | their weight times `value`, the others as they were |

First the choice is made (ban, force, favour), then weights change (off, scale). Edits concern routed experts; shared
ones always run. `headwise.attach(model, edits=...)` applies them. Letters: L layers, E experts, k chosen a token.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from headwise import storage
from headwise.addresses import Fingerprint, HeadSet, read_fingerprint
from headwise.checks import Meta, finite, plain_meta, shown, whole
from headwise.errors import ArtifactError, EditError, UnitError
from headwise.selection import ALL_TOKENS, TokenSelection
from headwise.storage import StrPath, decoding

ExpertOp = Literal["off", "ban", "force", "favour", "scale"]
ExpertPhase = Literal["all", "prefill", "decode"]


@dataclass(frozen=True, kw_only=True)
class ExpertEdit:
    """One change of the routing for some experts, for some tokens of some rows of the batch, in one phase.

    `units` is a `HeadSet` of kind "expert"; its weights multiply the effect of "favour" and "scale" (a weight of 0 is no
    change) and mean nothing elsewhere. `tokens` and `phase` as in `headwise.Edit`; `rows` names rows of the batch, all
    if None. Raises EditError, UnitError.

    >>> print(ExpertEdit(units=HeadSet.parse("L8E5,L8E7"), op="off", phase="decode"))
    off L8E5,L8E7, tokens all, phase decode
    """

    units: HeadSet
    op: ExpertOp
    value: float | None = None
    tokens: TokenSelection = ALL_TOKENS
    phase: ExpertPhase = "all"
    rows: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.op not in get_args(ExpertOp):
            raise EditError(f"op is {shown(self.op)}; it must be one of {', '.join(get_args(ExpertOp))}")
        if self.phase not in get_args(ExpertPhase):
            raise EditError(f"phase is {shown(self.phase)}; it must be 'all', 'prefill' or 'decode'")
        if not isinstance(self.units, HeadSet) or self.units.kind != "expert":
            raise EditError("units must be a HeadSet of kind 'expert', such as HeadSet.parse('L8E5')")
        if not len(self.units):
            raise UnitError(f"the edit {self.op!r} has an empty set of units; name at least one expert")
        object.__setattr__(self, "tokens", TokenSelection.of(self.tokens))
        self._check_value()
        if self.rows is not None:
            rows = tuple(sorted({whole("a row", row, 0, EditError) for row in self.rows}))
            object.__setattr__(self, "rows", rows)

    def _check_value(self) -> None:
        needs = self.op in ("favour", "scale")
        if needs and self.value is None or self.value is not None and not needs and self.op != "force":
            raise EditError(f"value is {self.value}; ops 'favour' and 'scale' need a number, 'force' may have one")
        if self.value is None:
            return
        object.__setattr__(self, "value", finite("value", self.value, EditError))
        if self.value < 0 and self.op != "favour":
            raise EditError(f"value is {self.value}; a weight of an expert must be at least 0")

    def __str__(self) -> str:
        value = "" if self.value is None else f" {self.value:g}"
        rows = "" if self.rows is None else f", rows {','.join(map(str, self.rows))}"
        return f"{self.op}{value} {self.units}, tokens {self.tokens}, phase {self.phase}{rows}"

    def _to_dict(self) -> dict[str, Any]:
        rows = None if self.rows is None else list(self.rows)
        plain = {"op": self.op, "value": self.value, "phase": self.phase, "rows": rows}
        return {**plain, "units": str(self.units), "tokens": str(self.tokens)}

    @classmethod
    def _from_dict(cls, data: Mapping[str, Any]) -> "ExpertEdit":
        rows, value = data.get("rows"), data.get("value")
        return cls(
            units=HeadSet.parse(storage.field(data, "units", str)),
            op=storage.field(data, "op", str),  # type: ignore[arg-type]
            value=None if value is None else storage.field(data, "value", float),
            tokens=TokenSelection.of(storage.field(data, "tokens", str)),
            phase=storage.field(data, "phase", str),  # type: ignore[arg-type]
            rows=None if rows is None else tuple(storage.field(data, "rows", list)),
        )


@dataclass(frozen=True)
class ExpertEdits:
    """Edits of the routing that act together; the order does not matter. Raises EditError for contradictions.

    >>> edits = ExpertEdits.off("L1E2,L1E3") + ExpertEdits.force("L2E0")
    >>> len(edits), ExpertEdits.parse("off L1E2; force L2E0") == ExpertEdits.off("L1E2") + ExpertEdits.force("L2E0")
    (2, True)
    """

    edits: tuple[ExpertEdit, ...] = ()
    fingerprint: Fingerprint | None = field(default=None, kw_only=True)
    method: str = field(default="", kw_only=True)
    meta: Meta = field(default_factory=dict, kw_only=True)

    def __post_init__(self) -> None:
        object.__setattr__(self, "edits", tuple(self.edits))
        if not all(isinstance(edit, ExpertEdit) for edit in self.edits):
            raise EditError("edits must all be of type ExpertEdit, such as those of ExpertEdits.off(units)")
        object.__setattr__(self, "meta", plain_meta(self.meta, EditError))
        self._check_contradictions()
        if self.fingerprint:
            self.check(self.fingerprint)

    __hash__ = None  # type: ignore[assignment]

    def _check_contradictions(self) -> None:
        forced = [edit for edit in self.edits if edit.op == "force"]
        for edit in self.edits:
            for other in forced if edit.op in ("off", "ban") else ():
                both = edit.units & other.units
                apart = _apart(edit.rows, other.rows) or {edit.phase, other.phase} == {"prefill", "decode"}
                if len(both) and not apart:
                    raise EditError(f"{both} is both forced on and switched off; choose one")

    @classmethod
    def off(cls, units: "HeadSet | str", **where: Any) -> "ExpertEdits":
        """Switch experts off: the others that the token chose share their weight. `where`: tokens, phase, rows."""
        return cls((_edit("off", units, None, where),))

    @classmethod
    def ban(cls, units: "HeadSet | str", **where: Any) -> "ExpertEdits":
        """Never choose these experts: the next best take their places."""
        return cls((_edit("ban", units, None, where),))

    @classmethod
    def force(cls, units: "HeadSet | str", *, floor: float | None = None, **where: Any) -> "ExpertEdits":
        """Always choose these experts, in the place of the worst others; `floor`: least score they enter with."""
        return cls((_edit("force", units, floor, where),))

    @classmethod
    def favour(cls, units: "HeadSet | str", value: float, **where: Any) -> "ExpertEdits":
        """Add `value` to the score that the choice is made by (probability, sigmoid or logit, as the model has it)."""
        return cls((_edit("favour", units, value, where),))

    @classmethod
    def scale(cls, units: "HeadSet | str", value: float, **where: Any) -> "ExpertEdits":
        """Multiply the weight of these experts where they are chosen."""
        return cls((_edit("scale", units, value, where),))

    @classmethod
    def parse(cls, text: str) -> "ExpertEdits":
        """Edits from text: `off L8E5,L8E7; force L3E0; scale 0.5 L2E1`."""
        edits = []
        for part in filter(None, (part.strip() for part in text.split(";"))):
            words = part.split(maxsplit=2 if part.split()[0] in ("favour", "scale") else 1)
            try:
                value = float(words[1]) if len(words) == 3 else None
            except ValueError:
                raise EditError(f"{shown(part)}: {words[1]!r} is no number; write 'scale 0.5 L2E1'") from None
            if len(words) < 2:
                raise EditError(f"{shown(part)} names no experts; write 'off L8E5,L8E7'")
            edits.append(_edit(words[0], words[-1], value, {}))
        return cls(tuple(edits))

    def __len__(self) -> int:
        return len(self.edits)

    def __iter__(self) -> Iterator[ExpertEdit]:
        return iter(self.edits)

    def __add__(self, other: "ExpertEdits") -> "ExpertEdits":
        """Both together; labels come from the left. Raises WrongModelError if they are for two models."""
        if not isinstance(other, ExpertEdits):
            return NotImplemented
        if self.fingerprint and other.fingerprint:
            self.fingerprint.require(other.fingerprint, "the first list of edits")
        print_ = self.fingerprint or other.fingerprint
        return ExpertEdits(self.edits + other.edits, fingerprint=print_, method=self.method, meta=self.meta)

    def check(self, fingerprint: Fingerprint) -> None:
        """Raises WrongModelError for another model, UnitError for an expert that the model lacks."""
        if self.fingerprint:
            self.fingerprint.require(fingerprint, "the list of expert edits")
        for edit in self.edits:
            edit.units.check(fingerprint)

    def __str__(self) -> str:
        return "\n".join(f"{place}. {edit}" for place, edit in enumerate(self.edits, 1)) or "no edits"

    def save(self, path: StrPath) -> None:
        """Write a JSON file."""
        payload: dict[str, Any] = {
            "edits": [edit._to_dict() for edit in self.edits],
            "fingerprint": self.fingerprint and self.fingerprint.to_dict(),
            "method": self.method,
            "meta": self.meta,
        }
        storage.write_json(path, "expert-edits", 1, payload)

    @classmethod
    def load(cls, path: StrPath) -> "ExpertEdits":
        """Read what `save` wrote. Raises ArtifactError."""
        payload = storage.read_json(path, "expert-edits", 1)
        with decoding(path):
            rows = storage.field(payload, "edits", list)
            if not all(isinstance(row, dict) for row in rows):
                raise ArtifactError("'edits' must be a list of objects")
            return cls(
                tuple(ExpertEdit._from_dict(row) for row in rows),
                fingerprint=read_fingerprint(payload),
                method=storage.field(payload, "method", str),
                meta=storage.field(payload, "meta", dict),
            )


def _edit(op: str, units: HeadSet | str, value: float | None, where: Mapping[str, Any]) -> ExpertEdit:
    units = HeadSet.parse(units) if isinstance(units, str) else units
    return ExpertEdit(op=op, units=units, value=value, **where)  # type: ignore[arg-type]


def _apart(a: Iterable[int] | None, b: Iterable[int] | None) -> bool:
    return a is not None and b is not None and not set(a) & set(b)
