"""The gate files of the DuoAttention repository: round trips, files as they are shipped, and files that are no gates."""

import json

import pytest
import torch

from headwise.attach import fingerprint
from headwise.errors import ArtifactError, ScoreError
from headwise.hub import load_model
from headwise.score.duo import read_gates, write_gates
from headwise.units import HeadScores


def table(values) -> HeadScores:
    return HeadScores(values=torch.tensor(values), kind="kv", method="duo-gates")


def test_gate_files_round_trip(tmp_path):
    gates = table([[1.0, 0.1234567], [0.0, 0.75]])
    write_gates(gates, tmp_path / "new", sinks=128, window=256)
    assert json.loads((tmp_path / "new" / "config.json").read_text()) == {"sink_size": 128, "recent_size": 256}
    back = read_gates(tmp_path / "new")
    assert torch.equal(back.values, gates.values) and back.meta == {"sinks": 128, "window": 256}


def test_gate_files_of_the_reference_are_read(tmp_path):
    """NumPy's savetxt with tabs, as the repository ships them."""
    (tmp_path / "full_attention_heads.tsv").write_text("1.000000000000000000e+00\t9.5e-01\n0.0\t2.5e-1\n\n")
    (tmp_path / "config.json").write_text('{"sink_size": 64, "recent_size": 256, "model": "x"}')
    gates = read_gates(tmp_path)
    assert gates.values.tolist() == [[1.0, pytest.approx(0.95)], [0.0, 0.25]]
    model, _ = load_model("tiny-random-llama")
    with pytest.raises(ValueError, match="shape"):
        read_gates(tmp_path, fingerprint=fingerprint(model))


@pytest.mark.parametrize(
    "text, config, error",
    [
        ("1 0\n1\n", '{"sink_size": 4, "recent_size": 8}', "equally many"),
        ("", '{"sink_size": 4, "recent_size": 8}', "equally many"),
        ("1 x\n", '{"sink_size": 4, "recent_size": 8}', "no row of numbers"),
        ("1 nan\n", '{"sink_size": 4, "recent_size": 8}', "not finite"),
        ("1 0\n", '{"sink_size": -4, "recent_size": 8}', "sinks of config.json is -4"),
        ("1 0\n", '{"recent_size": 8}', "sinks of config.json is None"),
        ("1 0\n", "[]", "object"),
    ],
)
def test_bad_gate_files_are_refused(tmp_path, text, config, error):
    (tmp_path / "full_attention_heads.tsv").write_text(text)
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(ArtifactError, match=error):
        read_gates(tmp_path)
    with pytest.raises(ArtifactError):
        read_gates(tmp_path / "absent")


def test_only_gates_are_written_as_gates(tmp_path):
    with pytest.raises(ScoreError, match="in \\[-0.5, 1\\]"):
        write_gates(table([[1.0, -0.5]]), tmp_path, sinks=4, window=8)
    heads = HeadScores(values=torch.ones(1, 2), kind="head", method="x")
    with pytest.raises(ScoreError, match="to_kv"):
        write_gates(heads, tmp_path, sinks=4, window=8)
    with pytest.raises(ValueError, match="window is 0"):
        write_gates(table([[1.0]]), tmp_path, sinks=4, window=0)
