"""`bench`: what the kernels take and gain on this machine, against its fastest dense kernel."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from headwise.cli import common

if TYPE_CHECKING:
    from headwise.bench import Report, Setting

app = typer.Typer(no_args_is_help=True, rich_markup_mode="rich")
HELP = """Time the attention kernels on this machine, against its fastest dense kernel in the same run.

The result is checked first; where it is wrong, nothing is timed. A ratio above 1 means faster than dense.

Example: headwise bench spans --lengths 2048,8192 --out bench/"""

Device = Annotated[str | None, typer.Option("--device", help="cuda or cpu. Default: cuda where there is one.")]
Lengths = Annotated[str | None, typer.Option("--lengths", help="Tokens, e.g. 2048,8192. Default: the case's own.")]
Heads = Annotated[int, typer.Option("--heads", help="Query heads.")]
KVHeads = Annotated[int, typer.Option("--kv-heads", help="Key/value heads.")]
HeadDim = Annotated[int, typer.Option("--head-dim", help="Size of one head.")]
Dtype = Annotated[
    Literal["bfloat16", "float16", "float32"] | None,
    typer.Option("--dtype", help="Default: bfloat16 on a GPU, float32 on a CPU."),
]
Backward = Annotated[bool, typer.Option("--backward/--no-backward", help="Time forward + backward too.")]
Out = Annotated[Path | None, typer.Option("--out", "-o", help="Folder for the JSON and the plot.")]
Table = Annotated[
    bool, typer.Option("--table", help="Keep where our kernels begin to win, for the op's choice on this machine.")
]


def _add(name: str, about: str) -> None:
    def command(
        device: Device = None,
        lengths: Lengths = None,
        heads: Heads = 32,
        kv_heads: KVHeads = 8,
        head_dim: HeadDim = 128,
        dtype: Dtype = None,
        backward: Backward = True,
        out: Out = None,
        table: Table = False,
        json: common.Json = False,
    ) -> None:
        from headwise.bench import CASES, run

        setting = _setting(device, lengths, heads, kv_heads, head_dim, dtype, backward)
        if table and setting.device != "cuda":
            raise typer.BadParameter("--table measures CUDA kernels; on a CPU the op always takes the library's")
        report = run(CASES[name], setting, (lambda row: None) if json else _printer())
        if out is not None:
            report.save(out)
        kept = str(_keep(report)) if table else None
        common.say({**_plain(report), "table": kept}, json, _verdict(report, kept))

    command.__doc__ = f"Time {about}.\n\nExample: headwise bench {name} --lengths 1024,4096"
    app.command(name)(command)


_add("attention", "routed queries: each head serves 75, 50 or 25 % of the tokens")
_add("spans", "windows: half of the kv heads read 64 sinks and 256 recent tokens")
_add("blocks", "selected blocks: each query block reads 1/8 of the visible key blocks")
_add("decode", "one token over a cache in which half of the kv heads hold 320 tokens")


def _setting(
    device: str | None, lengths: str | None, heads: int, kv_heads: int, head_dim: int, dtype: str | None, backward: bool
) -> "Setting":
    import torch

    from headwise.bench import Setting
    from headwise.errors import BenchError

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device not in ("cuda", "cpu") or (device == "cuda" and not torch.cuda.is_available()):
        raise BenchError(f"device={device!r}: choose cpu, or cuda on a machine that has a GPU")
    if heads < 1 or kv_heads < 2 or heads % kv_heads:
        raise BenchError(f"heads={heads} must be a multiple of kv_heads={kv_heads}, and kv_heads at least 2")
    try:
        numbers = tuple(int(part) for part in lengths.split(",")) if lengths else ()
    except ValueError:
        numbers = (0,)
    if lengths and min(numbers) < 1:
        raise BenchError(f"lengths={lengths!r}: write whole numbers of tokens with commas between, e.g. 2048,8192")
    kind = getattr(torch, dtype or ("bfloat16" if device == "cuda" else "float32"))
    return Setting(
        device=device, heads=heads, kv_heads=kv_heads, head_dim=head_dim, dtype=kind, lengths=numbers, backward=backward
    )


def _printer() -> Callable[[dict[str, Any]], None]:
    """Prints every row as it comes; a long run shows that it lives."""

    def show(row: dict[str, Any]) -> None:
        parts = [f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items() if v is not None]
        typer.echo("  ".join(parts))

    return show


def _plain(report: "Report") -> dict[str, Any]:
    from dataclasses import asdict

    return {**asdict(report), "crossover": report.crossover(), "slower_than_dense": len(report.slower())}


def _verdict(report: "Report", kept: str | None) -> str:
    cross, slower = report.crossover(), report.slower()
    lines = [f"{report.case} on {report.environment['device']}: {report.about}"]
    lines += [f"gate green, worst relative error {max(report.gate.values()):.1e}"]
    lines += [f"faster than dense from {cross} tokens on" if cross else "not faster than dense at the longest length"]
    if slower:
        lines += [
            f"backend='auto' lost more than 5 % in {len(slower)} rows: measure a table of this device with --table"
        ]
    return "\n".join(lines + ([f"table: {kept}"] if kept else []))


def _keep(report: "Report") -> Path:
    """The table of this device with what the report found; what it did not measure stays as the op has it now."""
    from dataclasses import replace

    import torch

    from headwise.attention import crossover
    from headwise.bench.run import thresholds

    dtype, dim = getattr(torch, report.shape["dtype"]), report.shape["head_dim"]
    now = crossover.lookup(report.environment["device"], dtype, dim)
    changed: dict[str, Any] = {"device": report.environment["device"], "dtype": report.shape["dtype"], "head_dim": dim}
    changed["measured"] = f"headwise bench {report.case}, {report.environment['date']}"
    changed |= thresholds(report)
    return replace(now, **changed).save()
