"""Run a case: the gate first, then rows, then where it starts to pay; as JSON, as a table, as a figure."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from headwise.attention.crossover import NEVER
from headwise.bench import measure, peers
from headwise.bench.cases import Case, Row, Setting
from headwise.errors import BenchError

TOLERANCE = {torch.float32: 2e-3, torch.float16: 1e-2, torch.bfloat16: 2e-2}
NEVER_SLOWER = 0.95  # what a dispatch may lose against dense


@dataclass
class Report:
    """What one case gave: `gate` (relative errors), `rows`, and the machine they are true of."""

    case: str
    about: str
    environment: dict[str, str]
    shape: dict[str, Any]
    roof: dict[str, float]
    gate: dict[str, float]
    rows: list[Row] = field(default_factory=list)
    peers: dict[str, dict[str, float]] = field(default_factory=dict)

    def crossover(self, ratio: str = "vs_dense", **where: Any) -> int | None:
        """The smallest length from which every measured ratio is at least 1; None if even the longest loses."""
        found: int | None = None
        for row in sorted(self._rows(ratio, where), key=lambda row: -row["N"]):
            if row[ratio] < 1:
                break
            found = row["N"]
        return found

    def _rows(self, ratio: str, where: dict[str, Any]) -> list[Row]:
        return [row for row in self.rows if row.get(ratio) and all(row.get(k) == v for k, v in where.items())]

    def slower(self) -> list[Row]:
        """Rows in which the op's own choice lost more than 5 % against dense: the dispatch table is wrong there.

        Windows and selected blocks have no dense kernel to fall back to: with a mask it would be far slower.
        """
        if self.case in ("spans", "blocks"):
            return []
        return [row for row in self.rows if row.get("auto_vs_dense", 1.0) < NEVER_SLOWER]

    def to_json(self) -> str:
        """One JSON object."""
        return json.dumps(asdict(self), indent=1)

    def save(self, folder: Path) -> list[Path]:
        """Write `<case>.json` and, where plotly is installed, `<case>.html`."""
        folder.mkdir(parents=True, exist_ok=True)
        files = [folder / f"{self.case}.json"]
        files[0].write_text(self.to_json() + "\n", encoding="utf-8")
        figure = self.figure()
        if figure is not None:
            files.append(folder / f"{self.case}.html")
            figure.write_html(files[1], include_plotlyjs=True)
        return files

    def figure(self) -> Any:
        """Ratio to dense over the length, a line for every other quantity of the case; None without plotly."""
        try:
            import plotly.graph_objects as go
        except ImportError:
            return None
        figure = go.Figure()
        for ratio in ("vs_dense", "vs_dense_in_graph", "fwd_bwd_vs_dense"):
            for name, rows in self._lines(ratio).items():
                label = f"{ratio.replace('_', ' ')}{name}"
                figure.add_scatter(x=[r["N"] for r in rows], y=[r[ratio] for r in rows], name=label)
        figure.add_hline(y=1, line={"dash": "dot", "color": "#8a94a6"})
        figure.update_xaxes(title="tokens", type="log", dtick="D1")
        figure.update_yaxes(title="times faster than dense")
        figure.update_layout(
            title=f"{self.case}: {self.about}<br><sub>{self.environment['device']}</sub>", template="plotly_white"
        )
        return figure

    def _lines(self, ratio: str) -> dict[str, list[Row]]:
        lines: dict[str, list[Row]] = {}
        for row in self.rows:
            if row.get(ratio):
                name = "".join(f", {key} {row[key]}" for key in ("active", "block", "B") if key in row)
                lines.setdefault(name, []).append(row)
        return lines


def run(case: Case, setting: Setting, seen: Callable[[Row], None] = lambda row: None) -> Report:
    """Measure a case; `seen` gets every row as it comes. Raises BenchError where the gate is red."""
    torch.manual_seed(0)
    roof = measure.ceilings(setting.device, setting.dtype)
    setting = replace(setting, roof=roof)
    gate = case.gate(setting)
    bad = {name: error for name, error in gate.items() if not error < TOLERANCE[setting.dtype]}
    if bad:
        raise BenchError(f"{case.name}: the result is wrong (relative errors {bad}), so there is nothing to time")
    shape: dict[str, Any] = {"heads": setting.heads, "kv_heads": setting.kv_heads, "head_dim": setting.head_dim}
    shape["dtype"] = str(setting.dtype).removeprefix("torch.")
    report = Report(case.name, case.about, measure.environment(setting.device), shape, roof, gate)
    for N in _lengths(case, setting):
        for row in case.rows(setting, N):
            report.rows.append(row)
            seen(row)
    if setting.device == "cuda" and case.name == "attention":
        report.peers = {f"dense ms at {N}": peers.dense_peers(setting, N) for N in (8192,)}
    return report


def thresholds(report: Report) -> dict[str, int]:
    """Where the op should begin to take the own kernel, by what was measured: entries of `crossover.Crossover`.

    A prefill counts from the length on at which even the case that saves least (75 % of the queries) beats what the op
    would do with library kernels alone.
    """
    if report.case == "decode":
        sizes = {row["N"]: _kept(row, report) for row in report.rows if row["B"] == 1}
        length = report.crossover("vs_library", B=1)
        return {"decode": NEVER if length is None else sizes[length]}
    name = {"attention": "routed", "spans": "windowed"}.get(report.case)
    if name is None:
        return {}
    where: dict[str, Any] = {"active": 0.75} if report.case == "attention" else {}
    ratios = {name: "vs_library", f"{name}_backward": "fwd_bwd_vs_dense", f"{name}_graph": "vs_dense_in_graph"}
    if name == "windowed":  # the library's way is blocks of rows with masks, in whatever mode
        ratios = dict.fromkeys(ratios, "vs_library")
    found = {key: report.crossover(ratio, **where) for key, ratio in ratios.items()}
    found[f"{name}_graph"] = found[f"{name}_graph"] or found[name]  # graphs are measured at the shorter lengths only
    return {key: NEVER if value is None else value for key, value in found.items()}


def _kept(row: Row, report: Report) -> int:
    half = report.shape["kv_heads"] // 2
    return row["B"] * (half * row["N"] + (report.shape["kv_heads"] - half) * min(row["N"], 320))


def _lengths(case: Case, setting: Setting) -> Sequence[int]:
    return setting.lengths or (case.lengths if setting.device == "cuda" else case.small)
