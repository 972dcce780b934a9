"""Patterns: which of the tokens seen so far a kv head keeps and its queries read. A small closed family of frozen dataclasses.

Most are rules of positions alone: sinks (the first tokens of the row) and a window (the latest ones) whose length may grow with the
text. `Selected` says how many further tokens are kept, chosen by their content when the prompt has been read. Positions count real
tokens of a row from 0, never padding; n is the number of tokens that the row has seen.
A new pattern is one class here, listed in `PATTERNS`.
"""

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass, fields
from fractions import Fraction
from functools import cached_property
from typing import Any, ClassVar, Literal, cast, get_args

import torch
from torch import Tensor

from headwise.checks import LARGEST, finite, shown, whole
from headwise.errors import ArtifactError, PlanError
from headwise.storage import field

Compensation = Literal["none", "count", "one"]
_NUMBER = r"[0-9]{1,10}(?:\.[0-9]*)?(?:e-?[0-9]{1,3})?"
_SUFFIX = r"(?:\+(?P<compensation>count|one))?(?P<grow>\+grow)?"


class Pattern(ABC):
    """What one kv head keeps: its first `sinks` tokens and the last `window(n)` of n; query q reads key k iff

        0 <= k <= q  and  (k < sinks  or  q - k < window(q + 1)).

    `compensation` says what happens to the rest: dropped ("none"), or averaged into one token that counts as many tokens as it
    stands for ("count", RazorAttention's paper) or as one ("one", its reference code). With `grow`, nothing is dropped after the
    prompt: the window is cut once, at its end, and every later token is kept.
    """

    tag: ClassVar[str]
    selects: ClassVar[bool] = False  # by content: the rule is not one of positions
    sinks: int
    compensation: Compensation
    grow: bool

    @abstractmethod
    def _span(self, n: Any) -> Any:
        """Wanted window at n tokens, before it is bounded by n; n is an int or an int64 tensor."""

    @property
    @abstractmethod
    def keeps_all(self) -> bool:
        """Whether nothing is ever dropped, however long the text."""

    @property
    def compensated(self) -> bool:
        """Whether a compensation token stands for what was dropped."""
        return self.compensation != "none"

    @property
    def grows(self) -> bool:
        """Whether every token after the prompt is kept."""
        return self.grow

    def window(self, n: int) -> int:
        """Length of the window when n tokens have been seen, at most n."""
        return min(n, int(self._span(n)))

    def windows(self, n: Tensor) -> Tensor:
        """`window` of every entry of an integer tensor, as int64."""
        n = n.to(torch.int64)
        return _at_most(n, self._span(n))

    def kept(self, n: int, *, prompt: int | None = None) -> int:
        """Tokens kept of n seen: min(n, sinks + window(n)). With `grow`, the first `prompt` (default n) of them are the prompt."""
        n = whole("n", n, 0, PlanError)
        if self.grow and prompt is not None and prompt < n:
            return n - prompt + self.kept(whole("prompt", prompt, 0, PlanError))
        return min(n, self.sinks + self.window(n))

    def slots(self, n: int, *, prompt: int | None = None) -> int:
        """Tokens that must be stored: `kept`, and one for the compensation token where something was dropped."""
        kept = self.kept(n, prompt=prompt)
        return kept + int(self.compensated and kept < n)

    def reads(self, q_pos: Tensor, k_pos: Tensor, *, prompt: Tensor | int | None = None) -> Tensor:
        """Which queries read which keys: bool, of the shape that integer positions `q_pos` and `k_pos` broadcast to.

        A negative key position is padding, which nothing reads. `prompt` (broadcastable) is the length of the prompt, for patterns
        with `grow`: queries behind it read whatever was kept at its end. Compensation tokens are no keys and not part of this.

        >>> SinkWindow(1, 2).reads(torch.arange(4)[:, None], torch.arange(4)).int()
        tensor([[1, 0, 0, 0],
                [1, 1, 0, 0],
                [1, 1, 1, 0],
                [1, 0, 1, 1]], dtype=torch.int32)
        """
        q_pos, k_pos = q_pos.to(torch.int64), k_pos.to(torch.int64)
        last = q_pos if prompt is None or not self.grow else _at_most(q_pos, prompt - 1)
        near = last - k_pos < self.windows(last + 1)
        return (k_pos >= 0) & (k_pos <= q_pos) & ((k_pos < self.sinks) | near)

    def to_dict(self) -> dict[str, Any]:
        """The pattern as plain values, with its tag under "pattern"."""
        names = {item.name: "window" if item.name == "recent" else item.name for item in fields(cast(Any, self))}
        return {"pattern": self.tag, **{outside: getattr(self, name) for name, outside in names.items()}}

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> "Pattern":
        """The inverse of `to_dict`. Raises ArtifactError for an unknown pattern or entry, PlanError for a value out of range."""
        kind = next((kind for kind in PATTERNS if isinstance(data, Mapping) and data.get("pattern") == kind.tag), None)
        if kind is None:
            raise ArtifactError(f"{shown(data)} is no pattern; known: {', '.join(kind.tag for kind in PATTERNS)}")
        return kind._from_dict({name: value for name, value in data.items() if name != "pattern"})

    @classmethod
    def _from_dict(cls, data: dict[str, Any]) -> "Pattern":
        types = {name: type(value) for name, value in cls._example().to_dict().items() if name != "pattern"}
        if set(data) != set(types):
            raise ArtifactError(f"pattern {cls.tag!r} has the entries {sorted(types)}, not {shown(sorted(data))}")
        return cls(**{name: field(data, name, kind) for name, kind in types.items()})

    @classmethod
    @abstractmethod
    def _example(cls) -> "Pattern":
        """Any instance: its entries show the types of a file's entries."""

    @classmethod
    @abstractmethod
    def _parse(cls, text: str) -> "Pattern | None":
        """The pattern that `text` names, if it is of this class."""

    def _check(self) -> None:
        object.__setattr__(self, "sinks", whole("sinks", self.sinks, 0, PlanError))
        if self.compensation not in get_args(Compensation):
            raise PlanError(f"compensation is {shown(self.compensation)}; it must be 'none', 'count' or 'one'")
        if not isinstance(self.grow, bool):
            raise PlanError(f"grow is {self.grow!r}; it must be True or False")

    def _suffix(self) -> str:
        return ("" if self.compensation == "none" else f"+{self.compensation}") + ("+grow" if self.grow else "")


@dataclass(frozen=True)
class Full(Pattern):
    """Every token is kept and read.

    >>> str(Full()), Full().kept(1000)
    ('full', 1000)
    """

    tag = "full"
    sinks = 0
    compensation = "none"
    grow = False

    def _span(self, n: Any) -> Any:
        return n

    @property
    def keeps_all(self) -> bool:
        return True

    def __str__(self) -> str:
        return "full"

    @classmethod
    def _example(cls) -> "Full":
        return cls()

    @classmethod
    def _parse(cls, text: str) -> "Full | None":
        return cls() if text == "full" else None


@dataclass(frozen=True, init=False)
class SinkWindow(Pattern):
    """The first `sinks` tokens and the last `window` ones (StreamingLLM, DuoAttention); kept: min(n, sinks + window).

    The argument `window` is stored as `recent`, as `window(n)` is the method that all patterns share.

    >>> SinkWindow(sinks=16, window=128).kept(1000)
    144
    >>> str(SinkWindow(4, 60, compensation="count"))
    'sinks4+window60+count'
    """

    tag = "sink-window"
    sinks: int
    recent: int
    compensation: Compensation
    grow: bool

    def __init__(self, sinks: int, window: int, *, compensation: Compensation = "none", grow: bool = False):
        recent = whole("window", window, 1, PlanError)
        for name, value in (("sinks", sinks), ("recent", recent), ("compensation", compensation), ("grow", grow)):
            object.__setattr__(self, name, value)
        self._check()

    def _span(self, n: Any) -> Any:
        return self.recent

    @property
    def keeps_all(self) -> bool:
        return False

    def __str__(self) -> str:
        return f"sinks{self.sinks}+window{self.recent}{self._suffix()}"

    @classmethod
    def _example(cls) -> "SinkWindow":
        return cls(0, 1)

    @classmethod
    def _parse(cls, text: str) -> "SinkWindow | None":
        found = re.fullmatch(r"sinks([0-9]{1,10})\+window([0-9]{1,10})" + _SUFFIX, text)
        return found and cls(int(found[1]), int(found[2]), **_options(found))


@dataclass(frozen=True)
class Elastic(Pattern):
    """The first `sinks` tokens and a window that grows with the text: min(n, max(minimum, floor(alpha + beta · n))).

    MoA's span alpha + beta · N, and RazorAttention's max(S0, N / C) as `Elastic(4, 0, 1 / C, minimum=S0)`. `beta` in [0, 1] is taken
    as the nearest fraction with a denominator up to 10^6, so that the floor is exact: 0.2 is one fifth.

    >>> razor = Elastic(4, 0, 0.2, minimum=4000, compensation="count")
    >>> print(razor, razor.kept(8000), razor.kept(100_000))
    sinks4+max(4000,0.2n)+count 4004 20004
    """

    tag = "elastic"
    sinks: int
    alpha: int
    beta: float
    _: KW_ONLY
    minimum: int = 1
    compensation: Compensation = "none"
    grow: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "alpha", whole("alpha", self.alpha, -LARGEST, PlanError))
        object.__setattr__(self, "minimum", whole("minimum", self.minimum, 1, PlanError))
        object.__setattr__(self, "beta", finite("beta", self.beta, PlanError))
        if not 0 <= self.beta <= 1:
            raise PlanError(f"beta is {self.beta}; it must lie in [0, 1]")
        self._check()

    @cached_property
    def _fraction(self) -> tuple[int, int]:
        return Fraction(self.beta).limit_denominator(10**6).as_integer_ratio()

    def _span(self, n: Any) -> Any:
        top, bottom = self._fraction
        span = (self.alpha * bottom + top * n) // bottom
        return span.clamp(min=self.minimum) if isinstance(span, Tensor) else max(self.minimum, span)

    @property
    def keeps_all(self) -> bool:
        return self._fraction == (1, 1) and self.sinks + self.alpha >= 0

    def __str__(self) -> str:
        alpha = f"{self.alpha}+" if self.alpha else ""
        return f"sinks{self.sinks}+max({self.minimum},{alpha}{self.beta!r}n){self._suffix()}"

    @classmethod
    def _example(cls) -> "Elastic":
        return cls(0, 0, 0.5)

    @classmethod
    def _parse(cls, text: str) -> "Elastic | None":
        found = re.fullmatch(
            rf"sinks([0-9]{{1,10}})\+max\(([0-9]{{1,10}}),(?:(-?[0-9]{{1,10}})\+)?({_NUMBER})n\){_SUFFIX}", text
        )
        if found is None:
            return None
        return cls(int(found[1]), int(found[3] or 0), float(found[4]), minimum=int(found[2]), **_options(found))


_CALL = r"[a-z][a-z0-9_-]*(?:\((?:[a-z_]+=[a-z0-9_.+-]+(?:,[a-z_]+=[a-z0-9_.+-]+)*)?\))?"


@dataclass(frozen=True, init=False)
class Selected(Pattern):
    """Sinks, a window, and further tokens chosen by what they are: `keep` + `share` · n a head, on average over the heads of a group.

    When a chunk of the prompt has been read, the key scorer `by` rates every token held, and `split` deals the room of a group of like
    heads, heads · keep + floor(heads · share · n), out to its heads: "even" (SnapKV), or by content (AdaKV's "pooled"). Both name
    functions of `headwise.keyscores`, with options in brackets. While decoding, the window slides and the chosen tokens stay; with
    `grow` every token behind the prompt is kept. A negative `keep` takes sinks and window off a share: a quarter of the cache is
    `Selected(4, 28, -32, share=0.25)`. The prompt is read densely; which keys a query reads is known in a cache only.

    >>> print(pattern := Selected(4, 28, -32, share=0.25, by="observation(window=16)"), pattern.kept(1000), pattern.kept(20))
    sinks4+window28+keep(-32+0.25n):observation(window=16) 250 20
    >>> print(Selected(0, 32, 224, split="pooled(floor=0.2)", grow=True))
    sinks0+window32+keep(224):observation:pooled(floor=0.2)+grow
    """

    tag = "selected"
    compensation = "none"
    selects = True
    sinks: int
    recent: int
    keep: int
    share: float
    by: str
    split: str
    grow: bool

    def __init__(
        self, sinks: int, window: int, keep: int, *, share: float = 0.0, by: str = "observation", split: str = "even", grow: bool = False
    ):  # fmt: skip
        values: dict[str, Any] = {"sinks": sinks, "grow": grow, "by": _call("by", by), "split": _call("split", split)}
        values |= {"recent": whole("window", window, 1, PlanError), "keep": whole("keep", keep, -LARGEST, PlanError)}
        for name, value in (values | {"share": finite("share", share, PlanError)}).items():
            object.__setattr__(self, name, value)
        self._check()
        if not 0 <= self.share <= 1:
            raise PlanError(f"share is {shown(share)}; it must lie in [0, 1]")
        if self.share == 0 and self.keep < 0:
            raise PlanError(f"keep is {self.keep}; without a share of the text it must be at least 0")

    def room(self, n: int, heads: int = 1) -> int:
        """Tokens beside sinks and window that so many heads may keep together at n tokens, at most all of them."""
        top, bottom = Fraction(self.share).limit_denominator(10**6).as_integer_ratio()
        rest = max(0, n - self.sinks - self.recent)
        return max(0, min(heads * rest, heads * self.keep + heads * top * n // bottom))

    def kept(self, n: int, *, prompt: int | None = None) -> int:
        """Tokens kept of n seen: sinks, window and room; of heads that share their room unevenly, the mean. Chosen from the prompt."""
        n = whole("n", n, 0, PlanError)
        read = n if prompt is None else min(n, whole("prompt", prompt, 0, PlanError))
        always = min(read if self.grow else n, self.sinks + self.recent)
        return n if self.keeps_all else always + self.room(read) + (n - read if self.grow else 0)

    def reads(self, q_pos: Tensor, k_pos: Tensor, *, prompt: Tensor | int | None = None) -> Tensor:
        """Refused with PlanError, as the keys are chosen by content, unless all are kept."""
        if self.keeps_all:
            return super().reads(q_pos, k_pos, prompt=prompt)
        raise PlanError(f"{self} chooses keys by content, in a cache: positions alone do not say what a query reads")

    def _span(self, n: Any) -> Any:
        return n if self.keeps_all else self.recent

    @property
    def keeps_all(self) -> bool:
        return self.share == 1 and self.sinks + self.recent + self.keep >= 0

    def __str__(self) -> str:
        amount = f"{self.keep}+{self.share!r}n" if self.share else str(self.keep)
        split = "" if self.split == "even" else f":{self.split}"
        return f"sinks{self.sinks}+window{self.recent}+keep({amount}):{self.by}{split}{self._suffix()}"

    @classmethod
    def _example(cls) -> "Selected":
        return cls(0, 1, 0)

    @classmethod
    def _parse(cls, text: str) -> "Selected | None":
        amount = rf"keep\((-?[0-9]{{1,10}})(?:\+({_NUMBER})n)?\)"
        form = rf"sinks([0-9]{{1,10}})\+window([0-9]{{1,10}})\+{amount}:({_CALL})(?::({_CALL}))?(\+grow)?"
        if (found := re.fullmatch(form, text)) is None:
            return None
        share, split = float(found[4] or 0), found[6] or "even"
        numbers = (int(found[place]) for place in (1, 2, 3))
        return cls(*numbers, share=share, by=found[5], split=split, grow=found[7] is not None)


PATTERNS: tuple[type[Pattern], ...] = (Full, SinkWindow, Elastic, Selected)


def parse_pattern(text: str) -> Pattern:
    """The pattern that `text` names; the inverse of `str`. Raises PlanError.

    >>> parse_pattern("sinks16 + window128")
    SinkWindow(sinks=16, recent=128, compensation='none', grow=False)
    >>> parse_pattern("sinks64+max(1,-512+0.25n)").window(4096)
    512
    """
    bare = re.sub(r"\s", "", text) if isinstance(text, str) else ""
    for kind in PATTERNS:
        if found := kind._parse(bare):
            return found
    forms = "full, sinks16+window128, sinks4+max(4000,512+0.2n) or sinks4+window28+keep(100):random, +count, +one or +grow behind"
    raise PlanError(f"{shown(text)} names no pattern; write {forms}")


def _at_most(values: Tensor, bound: Tensor | int) -> Tensor:
    return torch.minimum(values, bound) if isinstance(bound, Tensor) else values.clamp(max=bound)


def _call(name: str, text: Any) -> str:
    """A name with options in brackets, such as "pooled(floor=0.2)", without spaces and empty brackets."""
    bare = re.sub(r"\s", "", text).removesuffix("()") if isinstance(text, str) else ""
    if not re.fullmatch(_CALL, bare):
        raise PlanError(f"{name} is {shown(text)}; write a name, or one with options: observation(window=32,kernel=7)")
    return bare


def _options(found: re.Match[str]) -> dict[str, Any]:
    return {"compensation": found["compensation"] or "none", "grow": found["grow"] is not None}
