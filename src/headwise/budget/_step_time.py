"""What a decode step takes on this machine, as a function of the bytes it reads: measured once, kept as data, turned into a budget.

Letters: L layers, K kv heads, B batch, T tokens behind the step, D head dim.
"""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from headwise import storage
from headwise.addresses import Fingerprint, read_fingerprint
from headwise.arguments import cache_argument
from headwise.attach import attach, find_stack, fingerprint
from headwise.cache import HeadwiseCache
from headwise.checks import finite, whole
from headwise.errors import ArtifactError, PlanError
from headwise.plan import Budget, Full, HeadPlan, SinkWindow
from headwise.progress import track

ABOVE = 1.15  # points slower than the floor by this factor show what bytes cost; below, the host is what is waited for
STREAM = SinkWindow(4, 60)
WARM = 4  # steps of a point that do not count: kernels are compiled, a graph is captured


@dataclass(frozen=True)
class Point:
    """One measured step: `batch` rows behind `tokens` tokens, a cache of `nbytes`, `ms` by the wall clock."""

    batch: int
    tokens: int
    nbytes: int
    ms: float


@dataclass(frozen=True, kw_only=True)
class StepTime:
    """Milliseconds of a decode step of one model on one device:

        ms(bytes, B) = max(floor, empty(B) + bytes / rate)

    `floor_ms` is the fastest step that was measured (launches and Python, on a GPU), `empty_ms` what a step of so many rows costs without
    keys, (batch, ms) for every batch that was measured: products of few rows are served by other kernels from batch to batch, so no line
    goes through them. `rate` are the bytes of keys and values that a millisecond reads. Fitted by non-negative least squares of relative
    errors to `points`. Between measured batches `empty` is interpolated, beyond them and beyond the bytes it is an extrapolation.
    `captured` steps ran as CUDA graphs (`attach(…, capture=True)`), where the host is hardly waited for; the plan then has to be
    attached so too.

    >>> points = [Point(1, 100, 1000, 2.0), Point(1, 900, 9000, 10.0), Point(4, 100, 4000, 5.0), Point(4, 900, 36000, 37.0)]
    >>> model = Fingerprint(architecture="Toy", config_hash="0", layers=1, heads=2, kv_heads=1)
    >>> timed = StepTime.fit(points, device="toy", dtype="float32", head_dim=1, fingerprint=model)
    >>> round(timed.ms(20_000, 1), 2), timed.within("11ms", context=100_000)
    (21.0, Budget(unit='bytes', amount=10000))
    """

    device: str
    dtype: str
    head_dim: int
    fingerprint: Fingerprint
    captured: bool = False
    floor_ms: float
    empty_ms: tuple[tuple[int, float], ...]
    rate: float
    points: tuple[Point, ...]

    @classmethod
    def fit(cls, points: Sequence[Point], **labels: Any) -> StepTime:
        """From measured steps. Raises PlanError where more bytes did not take more time."""
        import numpy as np
        from scipy.optimize import nnls

        floor = min(point.ms for point in points)
        slow = [point for point in points if point.ms > ABOVE * floor]
        used = slow if len({p.nbytes for p in slow}) >= 3 else list(points)
        scale = max(point.nbytes for point in used)
        batches = sorted({point.batch for point in used})
        rows = [[*(float(p.batch == batch) for batch in batches), p.nbytes / scale] for p in used]
        times = np.array([point.ms for point in used])
        (*empty, slope), _ = nnls(np.array(rows) / times[:, None], np.ones(len(used)))
        if slope <= 0:
            raise PlanError(
                f"steps behind {min(p.nbytes for p in used)} and {scale} bytes of cache took the same time: measure longer texts or "
                "larger batches, where the cache is what is waited for"
            )
        pairs = tuple(zip(batches, map(float, empty), strict=True))
        return cls(points=tuple(points), floor_ms=floor, empty_ms=pairs, rate=float(scale / slope), **labels)

    @property
    def token_bytes(self) -> int:
        """Bytes of one token's key and value in one kv head."""
        return 2 * self.head_dim * getattr(torch, self.dtype).itemsize

    @property
    def worst(self) -> float:
        """The largest relative error at a measured point."""
        return max(abs(self.ms(p.nbytes, p.batch) / p.ms - 1) for p in self.points)

    def empty(self, batch: int) -> float:
        """Milliseconds of a step of so many rows before any key is read, by the line between the measured batches around it."""
        known = self.empty_ms
        if len(known) == 1:
            return known[0][1]
        right = next((i for i, (b, _) in enumerate(known) if b >= batch and i), len(known) - 1)
        (b0, ms0), (b1, ms1) = known[right - 1 : right + 1]
        return max(0.0, ms0 + (ms1 - ms0) * (batch - b0) / (b1 - b0))

    def ms(self, nbytes: float, batch: int = 1) -> float:
        """Predicted milliseconds of a step that reads so many bytes, all rows together."""
        return max(self.floor_ms, self.empty(batch) + nbytes / self.rate)

    def of_plan(self, plan: HeadPlan, *, length: int, batch: int = 1) -> float:
        """Predicted milliseconds of a step under a plan, behind `length` tokens a row."""
        slots = int(plan.slots(whole("length", length, 1, PlanError)).sum())
        return self.ms(slots * self.token_bytes * whole("batch", batch, 1, PlanError), batch)

    def within(self, target: Budget | str | float, *, context: int, batch: int = 1) -> Budget:
        """The budget, in bytes of all rows, whose step takes at most `target` at `context` tokens: "12ms", or milliseconds as a number.

        A target that even the whole cache meets is the whole cache. Raises PlanError for one that an empty cache would miss.
        """
        wanted = _milliseconds(target)
        empty = self.empty(whole("batch", batch, 1, PlanError))
        least = max(self.floor_ms, empty)
        if wanted < least or wanted <= empty:
            raise PlanError(
                f"a step of {batch} rows takes {least:.3g} ms on {self.device} before any key is read: {wanted:.3g} ms cannot be met by "
                "dropping keys"
            )
        room = int((wanted - empty) * self.rate)
        heads = self.fingerprint.layers * self.fingerprint.kv_heads
        everything = heads * self.token_bytes * batch * whole("context", context, 1, PlanError)
        return Budget.ratio(1.0) if room >= everything else Budget.bytes(max(1, room))

    def __str__(self) -> str:
        what = f"a {'captured ' if self.captured else ''}decode step of {self.fingerprint} in {self.dtype} on {self.device}"
        empty = ", ".join(f"{ms:.3g} for {batch}" for batch, ms in self.empty_ms)
        line = f"max({self.floor_ms:.3g}, empty + bytes / {self.rate / 1e6:.4g} GB/s) ms, empty {empty} row(s)"
        return f"{what}: {line}; measured at {len(self.points)} points, worst error {self.worst:.0%}"

    @property
    def kind(self) -> str:
        """Dtype and mode, for a file's name."""
        return self.dtype + ("-captured" if self.captured else "")

    def save(self, path: storage.StrPath) -> None:
        """Write JSON."""
        names = ("device", "dtype", "head_dim", "captured", "floor_ms", "rate")
        payload = {name: getattr(self, name) for name in names}
        payload["empty_ms"] = [list(pair) for pair in self.empty_ms]
        payload["points"] = [[p.batch, p.tokens, p.nbytes, p.ms] for p in self.points]
        storage.write_json(path, "step-time", 1, payload | {"fingerprint": self.fingerprint.to_dict()})

    @classmethod
    def load(cls, path: storage.StrPath) -> StepTime:
        """Read what `save` wrote. Raises ArtifactError."""
        payload = storage.read_json(path, "step-time", 1)
        with storage.decoding(path):
            labels: dict[str, Any] = {name: storage.field(payload, name, str) for name in ("device", "dtype")}
            labels["captured"] = storage.field(payload, "captured", bool)
            labels["head_dim"] = whole("head_dim", storage.field(payload, "head_dim", int), 1, ArtifactError)
            if not isinstance(getattr(torch, labels["dtype"], None), torch.dtype):
                raise ArtifactError(f"dtype is {labels['dtype']!r}, which torch lacks")
            for name in ("floor_ms", "rate"):
                labels[name] = finite(name, storage.field(payload, name, float), ArtifactError)
            labels["empty_ms"] = tuple(_pair(row) for row in storage.field(payload, "empty_ms", list))
            points = tuple(_point(row) for row in storage.field(payload, "points", list))
            if min(labels["rate"], labels["floor_ms"], *(point.ms for point in points)) <= 0:
                raise ArtifactError("rate, floor_ms and the milliseconds of points must be above 0")
            batches = [batch for batch, _ in labels["empty_ms"]]
            if batches != sorted(set(batches)):
                raise ArtifactError(f"empty_ms names the batches {batches}; each once, in ascending order")
            model = read_fingerprint(payload)
            if model is None or not points or not labels["empty_ms"]:
                raise ArtifactError("a step time belongs to a model and to measured points; this file lacks them")
            return cls(points=points, fingerprint=model, **labels)


def _point(row: Any) -> Point:
    if not isinstance(row, list) or len(row) != 4:
        raise ArtifactError("a point is [batch, tokens, bytes, milliseconds]")
    batch, tokens, nbytes = (
        whole(name, x, 1, ArtifactError) for name, x in zip(("batch", "tokens", "bytes"), row, strict=False)
    )
    return Point(batch, tokens, nbytes, finite("milliseconds", row[3], ArtifactError))


def _pair(row: Any) -> tuple[int, float]:
    if not isinstance(row, list) or len(row) != 2:
        raise ArtifactError("what a step costs without keys is [batch, milliseconds]")
    return whole("batch", row[0], 1, ArtifactError), finite("milliseconds", row[1], ArtifactError)


def _milliseconds(target: Budget | str | float) -> float:
    if isinstance(target, int | float) and not isinstance(target, bool):
        target = Budget.latency(target)
    amount = Budget.parse(target) if isinstance(target, str) else target
    if not isinstance(amount, Budget) or amount.unit != "ms":
        raise PlanError(f"a target latency is {target!r}; write 12ms or 0.5s")
    return float(amount.amount)


def step_time(
    model: nn.Module,
    *,
    batches: Sequence[int] = (1, 4),
    lengths: Sequence[int] | None = None,
    repeats: int = 8,
    capture: bool = False,
    seed: int = 0,
    progress: bool = False,
) -> StepTime:
    """Measure decode steps of a model on its device, with the kernels that plans use: half of the kv heads whole, half streaming.

    batches: rows, those that will be served among them: between them what a step costs is interpolated.
    lengths: tokens behind the step; by default a 32nd, a quarter and all of the model's context (up to 65536), as far as half of the free
      GPU memory holds them. The caches are filled with random numbers: no prompt is read.
    repeats: steps a point, of which the median counts, after four that do not.
    capture: as CUDA graphs, see `headwise.attach`; on a GPU only.

    Takes seconds on a GPU, and on a CPU as long as batches · lengths · repeats steps. Raises PlanError.

    >>> from headwise.hub import load_model
    >>> timed = step_time(load_model("tiny-random-llama")[0], batches=(1, 4), lengths=(64, 65536), repeats=2)
    >>> len(timed.points), timed.ms(0) < timed.ms(10**10)
    (4, True)
    """
    stack, batches = find_stack(model), [whole("a batch", b, 1, PlanError) for b in batches]
    lengths = _lengths(stack, lengths)
    half = tuple(tuple(Full() if (i + l) % 2 else STREAM for i in range(stack.kv_heads)) for l in range(stack.layers))
    plan = HeadPlan(patterns=half)
    todo = [(b, t) for b in batches for t in lengths if _fits(model, stack, b, t)]
    if len(todo) < 2:
        raise PlanError(
            f"batches {batches} and lengths {lengths} leave {len(todo)} points to measure; give two at least"
        )
    generator = torch.Generator().manual_seed(seed)
    with attach(model, plan=plan, capture=capture), torch.no_grad():
        points = [
            _measured(model, stack, plan, b, t, whole("repeats", repeats, 1, PlanError), generator)
            for b, t in track(todo, "decode steps", progress)
        ]
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    labels = {"dtype": dtype, "head_dim": stack.head_dim, "fingerprint": fingerprint(model), "captured": capture}
    return StepTime.fit(points, device=device_name(_device(model)), **labels)


def _measured(
    model: nn.Module, stack: Any, plan: HeadPlan, batch: int, tokens: int, repeats: int, generator: torch.Generator
) -> Point:
    device, dtype = _device(model), next(model.parameters()).dtype
    shape = (batch, stack.kv_heads, tokens, stack.head_dim)
    some = torch.randn((1, stack.kv_heads, 64, stack.head_dim), generator=generator).to(device, dtype)
    k = some.repeat(batch, 1, -(-tokens // 64), 1)[:, :, :tokens].reshape(shape)
    cache = HeadwiseCache(plan).fill(k, k)
    ids = torch.zeros(batch, 1, dtype=torch.long, device=device)
    given = {"use_cache": True, **cache_argument(model, cache)}
    times = [_timed(lambda: model(ids, **given), device) for _ in range(repeats + WARM)]
    return Point(batch, tokens, cache.nbytes, statistics.median(times[WARM:]))


def _timed(run: Callable[[], Any], device: torch.device) -> float:
    """Milliseconds by the wall clock, the device's work included."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda *_: None
    wait(device)
    begin = time.perf_counter()
    run()
    wait(device)
    return 1e3 * (time.perf_counter() - begin)


def _lengths(stack: Any, lengths: Sequence[int] | None) -> list[int]:
    if lengths is not None:
        return sorted({whole("a length", t, 1, PlanError) for t in lengths})
    context = min(65536, int(getattr(stack.config, "max_position_embeddings", None) or 8192))
    return sorted({max(64, context // 32), max(64, context // 4), max(64, context - 64)})


def _fits(model: nn.Module, stack: Any, batch: int, tokens: int) -> bool:
    device = _device(model)
    if device.type != "cuda":
        return True
    wanted = batch * tokens * stack.layers * stack.kv_heads * stack.head_dim * next(model.parameters()).dtype.itemsize
    return wanted < torch.cuda.mem_get_info(device)[0] / 2


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def device_name(device: torch.device) -> str:
    """As a step time is kept under: the GPU's name, or the processor and its threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} {platform.machine()}, {torch.get_num_threads()} threads"


def kept_at(device: str, model: Fingerprint, kind: str | None = None) -> Path:
    """Where the step time of a model on a device lies in the user's cache folder; `kind` names dtype and mode, None stands for all."""
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "headwise" / "step-times"
    slug = "-".join(device.lower().replace(",", " ").replace("/", " ").split())
    return base / f"{model.architecture}-{model.config_hash[:16]}-{slug}-{kind or '*'}.json"


def lookup(model: Fingerprint, device: str | None = None) -> StepTime:
    """The step time of this model that was measured last on this machine. Raises PlanError, with the command, if none was."""
    if device is None:
        device = device_name(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    pattern = kept_at(device, model)
    kept = pattern.parent.glob(pattern.name) if pattern.parent.is_dir() else ()
    found = sorted(kept, key=lambda path: path.stat().st_mtime, reverse=True)
    if not found:
        raise PlanError(
            f"no decode step of {model} was measured on {device} yet; do so with: headwise calibrate --model …"
        )
    timed = StepTime.load(found[0])
    model.require(timed.fingerprint, "the scores")
    return timed
