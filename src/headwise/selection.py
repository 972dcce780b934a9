"""Which tokens of a row an edit or a record concerns, by their position among its real tokens: 0 is the first, padding never counts."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from headwise.checks import finite, shown, whole
from headwise.errors import ArtifactError, EditError
from headwise.storage import field

_RANGE = re.compile(r"([0-9]{1,10}):([0-9]{0,10})")
_LIST = re.compile(r"[0-9]{1,10}(,[0-9]{1,10})*")


@dataclass(frozen=True)
class TokenSelection:
    """All tokens, the last one, a list of positions, or a range of them; prints as `all`, `last`, `0,5`, `4:16` or `4:`.

    "last" is the newest real token of the row in the pass at hand, so every token while decoding one by one.

    >>> TokenSelection.of("4:16") == TokenSelection.of(slice(4, 16)) == TokenSelection.of(range(4, 16))
    True
    >>> TokenSelection.of((0, 2)).mask(torch.tensor([-1, 0, 1, 2])).tolist()
    [False, True, False, True]
    """

    kind: Literal["all", "last", "positions", "range"]
    positions: tuple[int, ...] = ()
    start: int = 0
    stop: int | None = None

    def __post_init__(self) -> None:
        if self.kind not in ("all", "last", "positions", "range"):
            raise EditError(f"kind of tokens is {shown(self.kind)}; it must be 'all', 'last', 'positions' or 'range'")
        positions = tuple(sorted({whole("a token position", place, 0, EditError) for place in self.positions}))
        object.__setattr__(self, "positions", positions)
        if bool(positions) != (self.kind == "positions"):
            raise EditError("tokens of kind 'positions' need at least one position, other kinds have none")
        object.__setattr__(self, "start", whole("start of tokens", self.start, 0, EditError))
        if self.stop is not None:
            object.__setattr__(self, "stop", whole("stop of tokens", self.stop, self.start + 1, EditError))

    @classmethod
    def all(cls) -> "TokenSelection":
        return cls("all")

    @classmethod
    def last(cls) -> "TokenSelection":
        return cls("last")

    @classmethod
    def of(cls, tokens: Any) -> "TokenSelection":
        """The selection that is meant: itself, its text, a position, several, a slice or a range with step 1. Raises EditError."""
        if isinstance(tokens, TokenSelection):
            return tokens
        if isinstance(tokens, str):
            return cls._parse(tokens)
        if isinstance(tokens, slice | range):
            if tokens.step not in (None, 1):
                raise EditError(f"tokens is {tokens}; a range of tokens has step 1")
            return cls("range", start=tokens.start or 0, stop=tokens.stop)
        if isinstance(tokens, Tensor):
            tokens = tokens.tolist()
        return cls("positions", tuple(tokens) if isinstance(tokens, Iterable) else (tokens,))

    @classmethod
    def _parse(cls, text: str) -> "TokenSelection":
        bare = re.sub(r"\s", "", text)
        if bare in ("all", "last"):
            return cls(bare)  # type: ignore[arg-type]
        if found := _RANGE.fullmatch(bare):
            return cls("range", start=int(found[1]), stop=int(found[2]) if found[2] else None)
        if _LIST.fullmatch(bare):
            return cls("positions", tuple(map(int, bare.split(","))))
        raise EditError(f"{text[:60]!r} selects no tokens; write all, last, 0,5 or 4:16")

    def __str__(self) -> str:
        if self.kind == "range":
            return f"{self.start}:{'' if self.stop is None else self.stop}"
        return ",".join(map(str, self.positions)) or self.kind

    def mask(self, positions: Tensor, last: Tensor | int | None = None) -> Tensor:
        """Bool of the shape of `positions`, integer positions of tokens, negative for padding.

        `last`, of a shape that broadcasts, is the position of the newest token of the row; "last" needs it (EditError without).
        """
        real = positions >= 0
        if self.kind == "all":
            return real
        if self.kind == "range":
            return (positions >= self.start) & (real if self.stop is None else positions < self.stop)
        if self.kind == "positions":
            return torch.isin(positions, torch.tensor(self.positions, device=positions.device))
        if last is None:
            raise EditError("tokens 'last' needs the position of the newest token of each row")
        return real & (positions == last)


ALL_TOKENS = TokenSelection("all")


@dataclass(frozen=True)
class KeyGroup:
    """A named group of keys, selected by position like queries are, and how much they weigh (>= 0; 1 is as before).

    >>> print(KeyGroup("sinks", "0:4", 0.5))
    sinks(0:4)×0.5
    """

    name: str
    tokens: TokenSelection
    weight: float = 1.0

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name:
            raise EditError("a key group needs a name")
        object.__setattr__(self, "tokens", TokenSelection.of(self.tokens))
        object.__setattr__(self, "weight", finite("weight of a key group", self.weight, EditError))
        if self.weight < 0:
            raise EditError(f"weight of key group {self.name!r} is {self.weight}; it must be >= 0")

    def to_dict(self) -> dict[str, Any]:
        """The group as plain values."""
        return {"name": self.name, "tokens": str(self.tokens), "weight": self.weight}

    @classmethod
    def from_dict(cls, data: Any) -> "KeyGroup":
        """The inverse of `to_dict`. Raises ArtifactError or EditError."""
        if not isinstance(data, dict):
            raise ArtifactError("a key group must be an object")
        tokens = TokenSelection.of(field(data, "tokens", str))
        return cls(field(data, "name", str), tokens, field(data, "weight", float))

    def __str__(self) -> str:
        return f"{self.name}({self.tokens})×{self.weight:g}"
