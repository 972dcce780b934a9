"""The bench: a red gate stops it, ratios and crossovers are what the rows say, tables reach the op."""

import json
import math
from dataclasses import replace

import pytest
import torch
from typer.testing import CliRunner

from headwise.attention import crossover
from headwise.bench import CASES, Report, Setting, cases, run
from headwise.bench.run import thresholds
from headwise.cli import app
from headwise.errors import ArtifactError, BenchError

SMALL = Setting(device="cpu", heads=4, kv_heads=2, head_dim=16, dtype=torch.float32, lengths=(40, 96))


@pytest.mark.parametrize("name", sorted(CASES))
def test_every_case_proves_its_result_and_times_it(name):
    seen = []
    report = run(CASES[name], SMALL, seen.append)
    assert report.gate and max(report.gate.values()) < 1e-5
    assert report.rows == seen and {row["N"] for row in seen} == {40, 96}
    assert all(row["vs_dense"] > 0 for row in seen)
    assert json.loads(report.to_json())["roof"]["copy_tbs"] > 0


@pytest.mark.parametrize("name", sorted(CASES))
def test_a_wrong_result_is_not_timed(name, monkeypatch):
    right = cases.attention
    monkeypatch.setattr(
        cases,
        "attention",
        lambda *x, backend, **o: right(*x, backend=backend, **o) * (1 if backend == "reference" else 1.1),
    )
    with pytest.raises(BenchError, match="wrong"):
        run(CASES[name], SMALL, lambda row: pytest.fail("a row was measured"))


def report(case="attention", **ratios):
    rows = [
        {"N": N, "active": 0.75, "B": 1, "vs_dense": r, "vs_library": r, "auto_vs_dense": 0.9}
        for N, r in ratios["rows"].items()
    ]
    shape = {"heads": 8, "kv_heads": 2, "head_dim": 64, "dtype": "bfloat16"}
    return Report(case, "about", {"device": "Some GPU", "date": "today"}, shape, {}, {"out": 0.0}, rows)


def test_the_crossover_is_where_all_longer_lengths_win():
    assert report(rows={1: 0.5, 2: 1.2, 4: 0.9, 8: 1.1, 16: 2.0}).crossover() == 8
    assert report(rows={1: 1.5, 2: 1.2}).crossover() == 1
    assert report(rows={1: 1.5, 2: 0.7}).crossover() is None
    assert len(report(rows={1: 1.5, 2: 0.7}).slower()) == 2


def test_thresholds_follow_the_rows():
    assert thresholds(report(rows={1: 0.5, 2: 1.2})) == {
        "routed": 2,
        "routed_backward": crossover.NEVER,
        "routed_graph": 2,
    }
    assert thresholds(report(rows={2: 0.5}))["routed"] == crossover.NEVER
    assert thresholds(report("decode", rows={1000: 0.5, 2000: 1.2})) == {"decode": 2000 + 320}
    assert thresholds(report("spans", rows={1: 2.0})) == {"windowed": 1, "windowed_backward": 1, "windowed_graph": 1}
    assert thresholds(report("blocks", rows={1: 2.0})) == {}


def test_a_table_measured_here_is_asked_first(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    crossover.lookup.cache_clear()
    shipped = crossover.lookup("NVIDIA H200", torch.bfloat16, 128)
    path = replace(shipped, routed=7).save()
    assert path.is_relative_to(tmp_path)
    assert crossover.lookup("NVIDIA H200", torch.bfloat16, 128).routed == 7
    assert crossover.lookup("NVIDIA H200", torch.float16, 96).routed == 7  # nearest of what was measured
    path.write_text("{")
    crossover.lookup.cache_clear()
    assert crossover.lookup("NVIDIA H200", torch.bfloat16, 128) == shipped
    with pytest.raises(ArtifactError, match="is not the JSON"):
        crossover.read(path)
    crossover.lookup.cache_clear()


def test_an_unknown_device_falls_back_and_says_so(caplog):
    crossover.lookup.cache_clear()
    assert crossover.lookup("Abacus 9000", torch.bfloat16, 128).device == crossover.FALLBACK
    assert "Abacus 9000" in caplog.text and "bench" in caplog.text
    assert crossover.lookup("NVIDIA H200", torch.float64, 128).routed == crossover.NEVER


def test_the_command_line(tmp_path):
    small = ["--heads", "4", "--kv-heads", "2", "--head-dim", "16", "--lengths", "40", "--device", "cpu"]
    ran = CliRunner().invoke(app, ["bench", "spans", *small, "--json", "--out", str(tmp_path)])
    assert ran.exit_code == 0, ran.output
    found = json.loads(ran.stdout)
    assert found["case"] == "spans" and math.isfinite(found["rows"][0]["ms"])
    assert json.loads((tmp_path / "spans.json").read_text())["rows"] == found["rows"]
    for bad in (["--lengths", "4,x"], ["--kv-heads", "3"], ["--device", "abacus"]):
        assert isinstance(CliRunner().invoke(app, ["bench", "spans", *small, *bad]).exception, BenchError)
    assert CliRunner().invoke(app, ["bench", "spans", *small, "--table"]).exit_code == 2
