"""What `headwise plan` says of a plan before anything runs: bytes by layer and kv head, the time of a step; and budgets from times."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from headwise.budget import StepTime
    from headwise.registry import Method

LENGTHS = (1024, 8192, 32768)
HEADS_SHOWN = 8  # a line with more kv heads than this gives the range


@dataclass(frozen=True)
class Told:
    """As plain values and as text."""

    data: dict[str, Any]
    text: str


def machine_of(latency: str | None, machine: Path | None, source: Any) -> StepTime | None:
    """The measured step time that a latency asks for: of a file, or of the model that `source` is, or was scored on."""
    if latency is None and machine is None:
        return None
    from headwise.attach import fingerprint
    from headwise.budget import StepTime
    from headwise.budget._step_time import lookup
    from headwise.errors import PlanError

    model = getattr(source, "fingerprint", None) if not hasattr(source, "parameters") else fingerprint(source)
    if machine is not None:
        timed = StepTime.load(machine)
        if model is not None:
            model.require(timed.fingerprint, "the scores")
        return timed
    if model is None:
        raise PlanError(
            "--latency needs --machine, the file of headwise calibrate: these scores do not know their model"
        )
    return lookup(model)


def budgeted(
    method: Method, options: dict[str, Any], latency: str | None, length: int | None, timed: StepTime
) -> dict[str, Any]:
    """The options with the budget, in bytes, that a latency allows; and with the sizes that such a budget needs."""
    from headwise.errors import PlanError

    known = method.options
    sizes = {"head_dim": timed.head_dim, "dtype_bytes": timed.token_bytes // (2 * timed.head_dim)}
    options = options | {name: value for name, value in sizes.items() if name in known}
    if latency is None:
        return options
    if "budget" not in known:
        raise PlanError(f"{method.name} takes no budget, so no --latency either")
    if options["budget"] is not None and str(options["budget"]) != str(_default(known["budget"].default)):
        raise PlanError(f"give --budget or --latency, not both: {options['budget']} and {latency}")
    context = length or options.get("context") or LENGTHS[1]
    budget = timed.within(latency, context=context, batch=options.get("batch", 1))
    return options | {"budget": budget} | ({"context": context} if "context" in known else {})


def _default(value: Any) -> Any:
    from headwise.plan import Budget

    return Budget.parse(value) if isinstance(value, str) else value


def tell(plan: Any, source: Any, options: dict[str, Any], length: int | None, timed: StepTime | None) -> Told:
    """Shares at several lengths, a table of layers at one, and the predicted time of a step."""
    lengths = tuple(sorted({*LENGTHS, length})) if length else LENGTHS
    share = {str(n): plan.ratio(n) for n in lengths}
    data: dict[str, Any] = {"ratio": share}
    size, batch = _size(source, options, timed), options.get("batch", 1)
    totals = (
        {str(n): (plan.bytes(n, head_dim=size[0], dtype=size[1]) * batch).tolist() for n in lengths} if size else {}
    )
    data |= {"layer_bytes": totals} if size else {}
    notes = {n: f", {sum(layers) / 2**20:.1f} MiB" for n, layers in totals.items()}
    lines = ["of the full cache: " + "; ".join(f"{r:.0%}{notes.get(n, '')} at {n} tokens" for n, r in share.items())]
    if not hasattr(plan, "slots"):  # what changes reads, not storage
        return Told(data, lines[0])
    token = 2 * size[0] * size[1].itemsize * batch if size else None  # bytes of a token in one kv head, all rows
    at = length or options.get("context") or LENGTHS[1]
    data |= {"length": at, "batch": batch, "head_tokens": plan.slots(at).tolist()}
    if token:
        data["head_bytes"] = (plan.slots(at) * token).tolist()
    if timed:
        data["step_ms"] = timed.of_plan(plan, length=at, batch=batch)
        lines.append(
            f"a step of {batch} rows behind {at} tokens: {data['step_ms']:.3g} ms on {timed.device}, predicted"
        )
    return Told(data, "\n".join([*lines, *table(plan, at, token)]))


def table(plan: Any, length: int, size: int | None) -> list[str]:
    """A line a layer: what all its kv heads hold at this length, and what each does, in KiB, or in tokens where the size is unknown."""
    slots = plan.slots(length)
    unit, scale = ("KiB", size / 1024) if size else ("tokens", 1.0)
    head = f"{'layer':>5} {unit:>10}  by kv head at {length} tokens"
    lines = [head if size else f"{head} (give --head-dim or --machine for bytes)"]
    for layer, row in enumerate(slots.tolist()):
        held = [f"{n * scale:.0f}" for n in row]
        shown = (
            " ".join(held)
            if len(held) <= HEADS_SHOWN
            else f"{held[row.index(min(row))]} to {held[row.index(max(row))]}"
        )
        lines.append(f"{layer:>5} {sum(row) * scale:>10.0f}  {shown}")
    total = int(slots.sum()) * scale
    return [*lines, f"total {total:>10.0f}"]


def _size(source: Any, options: dict[str, Any], timed: StepTime | None) -> tuple[int, torch.dtype] | None:
    """(head dim, dtype) of keys and values: of the model, of the measured machine, or of the options."""
    import torch

    if hasattr(source, "parameters"):
        from headwise.attach import find_stack

        return find_stack(source).head_dim, source.dtype
    if timed:
        return timed.head_dim, getattr(torch, timed.dtype)
    dim, number = options.get("head_dim"), {1: torch.int8, 2: torch.float16, 4: torch.float32, 8: torch.float64}
    return (
        (int(dim), number[options.get("dtype_bytes", 2)]) if dim and options.get("dtype_bytes", 2) in number else None
    )
