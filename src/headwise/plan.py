"""The KV plan of a model: one pattern for every (layer, kv head), and the budget that such a plan has to meet.

Letters: L layers, K kv heads, D head dim, n tokens seen by a row. `headwise.patterns` holds the patterns themselves.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from headwise import storage
from headwise.addresses import Fingerprint, HeadSet, read_fingerprint
from headwise.checks import Meta, finite, plain_meta, shown, whole
from headwise.errors import PlanError
from headwise.patterns import PATTERNS, Compensation, Elastic, Full, Pattern, Selected, SinkWindow, parse_pattern
from headwise.storage import StrPath, decoding

__all__ = [
    "PATTERNS",
    "Budget",
    "Compensation",
    "Elastic",
    "Full",
    "HeadPlan",
    "Pattern",
    "Selected",
    "SinkWindow",
    "parse_pattern",
]

Prefill = Literal["masked", "dense"]
BYTES = {"b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}


@dataclass(frozen=True, kw_only=True)
class HeadPlan:
    """What every kv head of a model keeps and reads: `patterns[layer][kv head]`, L × K of them.

    `prefill="masked"`: the prompt is read by the exact pattern, so that results do not depend on how it is cut into chunks.
    `prefill="dense"`: every chunk reads all that is kept plus the chunk itself, causally; compression comes after (DuoAttention, Razor).

    >>> keep = HeadSet.parse("L0K1,L1K0")
    >>> plan = HeadPlan.from_set(keep, SinkWindow(4, 28), layers=2, kv_heads=2)
    >>> plan.kept(100).tolist(), plan.ratio(100)
    ([[32, 100], [100, 32]], 0.66)
    >>> plan.bytes(100, head_dim=64, dtype=torch.bfloat16).tolist()
    [33792, 33792]
    """

    patterns: tuple[tuple[Pattern, ...], ...]
    prefill: Prefill = "masked"
    fingerprint: Fingerprint | None = None
    method: str = ""
    meta: Meta = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        rows = tuple(tuple(row) for row in self.patterns)
        if not rows or not rows[0] or any(len(row) != len(rows[0]) for row in rows):
            raise PlanError(
                f"patterns has rows of {sorted({len(row) for row in rows})} entries; all must have K >= 1 of them"
            )
        for pattern in (pattern for row in rows for pattern in row):
            _check_pattern("every entry of patterns", pattern)
        if self.prefill not in get_args(Prefill):
            raise PlanError(f"prefill is {shown(self.prefill)}; it must be 'masked' or 'dense'")
        if not isinstance(self.method, str):
            raise PlanError("method must be text")
        object.__setattr__(self, "patterns", rows)
        object.__setattr__(self, "meta", plain_meta(self.meta, PlanError))
        if self.fingerprint:
            self._check_shape(self.fingerprint)

    @classmethod
    def uniform(cls, pattern: Pattern, layers: int, kv_heads: int, **labels: Any) -> "HeadPlan":
        """The same pattern everywhere. `labels`: prefill, fingerprint, method, meta."""
        return cls.from_set(HeadSet.empty("kv"), pattern, layers, kv_heads, **labels)

    @classmethod
    def full(cls, layers: int, kv_heads: int, **labels: Any) -> "HeadPlan":
        """Every kv head keeps everything."""
        return cls.uniform(Full(), layers, kv_heads, **labels)

    @classmethod
    def from_set(
        cls,
        keep: HeadSet,
        other: Pattern,
        layers: int,
        kv_heads: int,
        *,
        prefill: Prefill = "masked",
        fingerprint: Fingerprint | None = None,
        method: str = "",
        meta: Mapping[str, Any] | None = None,
    ) -> "HeadPlan":
        """`Full()` for the kv heads in `keep`, `other` for the rest. Raises UnitError for a kv head that does not exist."""
        if not isinstance(keep, HeadSet) or keep.kind != "kv":
            raise PlanError("keep must be a HeadSet of kind 'kv'; HeadSet.to_kv(group_size) makes one of query heads")
        _check_pattern("other", other)
        full, shape = Full(), (whole("layers", layers, 1, PlanError), whole("kv_heads", kv_heads, 1, PlanError))
        rows = tuple(tuple(full if kept else other for kept in row) for row in keep.mask(*shape).tolist())
        return cls(patterns=rows, prefill=prefill, fingerprint=fingerprint, method=method, meta=dict(meta or {}))

    @property
    def layers(self) -> int:
        return len(self.patterns)

    @property
    def kv_heads(self) -> int:
        return len(self.patterns[0])

    def layer(self, layer: int) -> tuple[Pattern, ...]:
        """The K patterns of one layer."""
        return self.patterns[whole("layer", layer, 0, PlanError, self.layers - 1)]

    def groups(self, layer: int) -> list[tuple[Pattern, tuple[int, ...]]]:
        """The patterns of a layer in order of first appearance, each with its kv heads."""
        found: dict[Pattern, list[int]] = {}
        for head, pattern in enumerate(self.layer(layer)):
            found.setdefault(pattern, []).append(head)
        return [(pattern, tuple(heads)) for pattern, heads in found.items()]

    def full_heads(self) -> HeadSet:
        """The kv heads that keep everything, however long the text."""
        return HeadSet.from_mask(torch.tensor([[p.keeps_all for p in row] for row in self.patterns]), "kv")

    def kept(self, n: int, *, prompt: int | None = None) -> Tensor:
        """(L, K) int64: tokens that each kv head keeps of n seen. `prompt` matters to patterns that grow, see `Pattern.kept`."""
        return torch.tensor([[p.kept(n, prompt=prompt) for p in row] for row in self.patterns], dtype=torch.int64)

    def slots(self, n: int, *, prompt: int | None = None) -> Tensor:
        """(L, K) int64: `kept`, and one for each compensation token."""
        return torch.tensor([[p.slots(n, prompt=prompt) for p in row] for row in self.patterns], dtype=torch.int64)

    def bytes(
        self,
        n: int,
        *,
        head_dim: int,
        dtype: torch.dtype,
        batch: int = 1,
        value_dim: int | None = None,
        prompt: int | None = None,
    ) -> Tensor:
        """(L,) int64: bytes of keys and values at n tokens a row: batch · slots · (head_dim + value_dim) · bytes of dtype."""
        dims = whole("head_dim", head_dim, 1, PlanError) * 2
        if value_dim is not None:
            dims = head_dim + whole("value_dim", value_dim, 1, PlanError)
        return self.slots(n, prompt=prompt).sum(1) * (whole("batch", batch, 1, PlanError) * dims * dtype.itemsize)

    def ratio(self, n: int, *, prompt: int | None = None) -> float:
        """Tokens stored at n >= 1 tokens seen, compensation tokens included, over those of a full cache."""
        full = whole("n", n, 1, PlanError) * self.layers * self.kv_heads
        return int(self.slots(n, prompt=prompt).sum()) / full

    def check(self, fingerprint: Fingerprint) -> None:
        """Raises WrongModelError if the plan was made for another model, PlanError if its shape does not fit."""
        if self.fingerprint:
            self.fingerprint.require(fingerprint, "the plan" + (f" of method {self.method!r}" if self.method else ""))
        self._check_shape(fingerprint)

    def _check_shape(self, fingerprint: Fingerprint) -> None:
        mine, wanted = (self.layers, self.kv_heads), (fingerprint.layers, fingerprint.kv_heads)
        if mine != wanted:
            raise PlanError(f"the plan is for {mine} (layers, kv heads); {fingerprint} has {wanted}")

    def table(self, n: int) -> str:
        """One line a layer at n tokens: kv heads that are full, tokens kept on average, ratio, patterns."""
        kept, slots = self.kept(n), self.slots(n)
        lines = [f"{'layer':>5} {'full':>5} {'kept':>10} {'ratio':>6}  pattern: kv heads"]
        for layer in range(self.layers):
            full = sum(pattern.keeps_all for pattern in self.patterns[layer])
            share = float(slots[layer].sum()) / (max(n, 1) * self.kv_heads)
            groups = "; ".join(f"{pattern}: {' '.join(map(str, heads))}" for pattern, heads in self.groups(layer))
            lines.append(f"{layer:5d} {full:5d} {float(kept[layer].double().mean()):10.1f} {share:6.3f}  {groups}")
        return "\n".join(lines)

    def __str__(self) -> str:
        counts: dict[Pattern, int] = {}
        for pattern in (pattern for row in self.patterns for pattern in row):
            counts[pattern] = counts.get(pattern, 0) + 1
        parts = ", ".join(f"{count} × {pattern}" for pattern, count in counts.items())
        return f"plan of {self.layers} × {self.kv_heads} kv heads{self.method and f' by {self.method}'}: {parts}; {self.prefill} prefill"

    def save(self, path: StrPath) -> None:
        """Write JSON: the distinct patterns, and an L × K matrix of indices into them."""
        distinct = {
            pattern: place for place, pattern in enumerate(dict.fromkeys(p for row in self.patterns for p in row))
        }
        payload = {
            "patterns": [pattern.to_dict() for pattern in distinct],
            "heads": [[distinct[pattern] for pattern in row] for row in self.patterns],
            "prefill": self.prefill,
            "method": self.method,
            "meta": self.meta,
            "fingerprint": self.fingerprint and self.fingerprint.to_dict(),
        }
        storage.write_json(path, "head-plan", 1, payload)

    @classmethod
    def load(cls, path: StrPath) -> "HeadPlan":
        """Read what `save` wrote. Raises ArtifactError; `check` tells whether the plan fits a model."""
        payload = storage.read_json(path, "head-plan", 1)
        with decoding(path):
            patterns = [Pattern.from_dict(data) for data in storage.field(payload, "patterns", list)]
            return cls(
                patterns=tuple(_row(row, patterns) for row in storage.field(payload, "heads", list)),
                prefill=storage.field(payload, "prefill", str),  # type: ignore[arg-type]
                fingerprint=read_fingerprint(payload),
                method=storage.field(payload, "method", str),
                meta=storage.field(payload, "meta", dict),
            )


def _check_pattern(name: str, pattern: Any) -> None:
    if not isinstance(pattern, Pattern):
        raise PlanError(f"{name} must be a Pattern such as Full() or SinkWindow(4, 252), not {type(pattern).__name__}")


def _row(row: Any, patterns: Sequence[Pattern]) -> tuple[Pattern, ...]:
    if not isinstance(row, list) or not patterns:
        raise PlanError("'heads' must be a list of lists of indices into a non-empty 'patterns'")
    return tuple(patterns[whole("an index into 'patterns'", place, 0, PlanError, len(patterns) - 1)] for place in row)


@dataclass(frozen=True)
class Budget:
    """How much KV cache a plan may use: a ratio of the full cache, tokens a kv head on average, bytes in all, or the time of a step.

    A time becomes bytes on a machine on which decode steps were measured: `headwise.budget.StepTime.within`.

    >>> Budget.parse("25%"), Budget.parse("512tok"), Budget.parse("64MiB")
    (Budget(unit='ratio', amount=0.25), Budget(unit='tokens', amount=512), Budget(unit='bytes', amount=67108864))
    >>> Budget.parse("12ms")
    Budget(unit='ms', amount=12.0)
    >>> Budget.ratio(0.5).full_heads(context=1000, layers=4, kv_heads=2, other=SinkWindow(4, 96), head_dim=64, dtype_bytes=2)
    3
    """

    unit: Literal["ratio", "tokens", "bytes", "ms"]
    amount: float

    def __post_init__(self) -> None:
        if self.unit not in ("ratio", "tokens", "bytes", "ms"):
            raise PlanError(f"unit is {shown(self.unit)}; it must be 'ratio', 'tokens', 'bytes' or 'ms'")
        if self.unit == "ms":
            if not finite("a budget in milliseconds", self.amount, PlanError) > 0:
                raise PlanError(f"a budget in milliseconds is {self.amount}; it must lie above 0")
        elif self.unit != "ratio":
            object.__setattr__(self, "amount", whole(f"a budget in {self.unit}", self.amount, 1, PlanError, 2**63 - 1))
        elif not 0 < finite("a budget as ratio", self.amount, PlanError) <= 1:
            raise PlanError(
                f"a budget as ratio is {self.amount}; it must lie above 0 and at most at 1 (0.5 or 50% is half the cache)"
            )

    @classmethod
    def ratio(cls, ratio: float) -> "Budget":
        """This share of the full cache, in (0, 1]."""
        return cls("ratio", ratio)

    @classmethod
    def tokens(cls, tokens: int) -> "Budget":
        """So many tokens a kv head, on average over all of them."""
        return cls("tokens", tokens)

    @classmethod
    def bytes(cls, count: int) -> "Budget":
        """So many bytes of keys and values, all layers and rows together."""
        return cls("bytes", count)

    @classmethod
    def latency(cls, milliseconds: float) -> "Budget":
        """At most so many milliseconds a decode step."""
        return cls("ms", float(milliseconds))

    @classmethod
    def parse(cls, text: str) -> "Budget":
        """`0.5` or `25%` of the full cache, `512tok` a kv head, `64MiB` (B, KB, KiB, MB, MiB, GB, GiB) in all, `12ms` or `0.5s` a step."""
        found = re.fullmatch(r"\s*([0-9]{1,18}(?:\.[0-9]{0,18})?|\.[0-9]{1,18})\s*([a-z%]*)\s*", str(text).lower())
        number, unit = (Fraction(found[1]), found[2]) if found else (Fraction(0), "?")
        if unit in ("", "%"):
            return cls.ratio(float(number / 100 if unit else number))
        if unit in ("tok", "tokens") and number.denominator == 1:
            return cls.tokens(int(number))
        if unit in BYTES:
            return cls.bytes(int(number * BYTES[unit]))
        if unit in ("ms", "s"):
            return cls.latency(float(number * (1000 if unit == "s" else 1)))
        raise PlanError(f"{shown(text)} is no budget; write 0.5, 25%, 512tok, 64MiB or 12ms")

    def need_bytes(self) -> None:
        """Raises PlanError for a time, which only a measured machine turns into bytes."""
        if self.unit == "ms":
            raise PlanError(
                f"a budget of {self} depends on the machine: measure it with headwise.budget.step_time(model), and give what its within() "
                "says; on the command line, headwise calibrate and then --latency"
            )

    def slots(self, *, context: int, layers: int, kv_heads: int, token_bytes: int) -> int:
        """Tokens that all L · K kv heads of one row may store together at `context` tokens; one takes `token_bytes` in all rows."""
        self.need_bytes()
        heads = layers * kv_heads
        if self.unit == "bytes":
            return int(self.amount) // token_bytes
        if self.unit == "tokens":
            return int(self.amount) * heads
        return math.floor(Fraction(str(float(self.amount))) * heads * context)

    def full_heads(
        self,
        *,
        context: int,
        layers: int,
        kv_heads: int,
        other: Pattern,
        head_dim: int,
        dtype_bytes: int,
        batch: int = 1,
        value_dim: int | None = None,
    ) -> int:
        """The most kv heads, of L · K, that may keep all `context` tokens while the others follow `other`.

        The largest f with f · context + (L · K - f) · other.slots(context) <= the tokens that the budget allows.

        Raises:
            PlanError: not even f = 0 fits, or `other` saves nothing at this context.
        """
        sizes = {"context": context, "layers": layers, "kv_heads": kv_heads, "head_dim": head_dim}
        sizes |= {"dtype_bytes": dtype_bytes, "batch": batch, "value_dim": head_dim if value_dim is None else value_dim}
        for name, value in sizes.items():
            whole(name, value, 1, PlanError)
        _check_pattern("other", other)
        heads, least = layers * kv_heads, other.slots(context)
        if least >= context:
            raise PlanError(
                f"{other} stores {least} of {context} tokens, so it saves nothing; shorten it or lengthen the context"
            )
        token_bytes = (head_dim + sizes["value_dim"]) * dtype_bytes * batch
        allowed = self.slots(context=context, layers=layers, kv_heads=kv_heads, token_bytes=token_bytes)
        if allowed < heads * least:
            raise PlanError(
                f"{self} allows {allowed} tokens over {heads} kv heads, but {other} alone stores {heads * least} at {context} tokens "
                f"({heads * least * token_bytes} bytes); raise the budget to {heads * least / (heads * context):.4f} or shorten the pattern"
            )
        return min(heads, (allowed - heads * least) // (context - least))

    def __str__(self) -> str:
        return {
            "ratio": f"{self.amount:.4g} of the full cache",
            "tokens": f"{self.amount} tok",
            "bytes": f"{self.amount} B",
            "ms": f"{self.amount:.4g} ms a step",
        }[self.unit]
