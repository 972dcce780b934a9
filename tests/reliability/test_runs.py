"""Runs that are killed, interrupted, repeated a thousand times, or out of disk: what is left is whole, what goes on is the same.

`python benchmarks/reliability.py` does the same longer.
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from readers import READERS
from runs import COMMANDS, interrupted, killed, small_files, soak

import headwise
from forked_helper import forked
from headwise import storage
from headwise.errors import ArtifactError, HeadwiseError
from headwise.hub import smollm2
from headwise.plan import HeadPlan, SinkWindow

SAVED = [name for name in READERS if not set(READERS[name].files) & {"a.jsonl", "a.jsonl.gz", "a.parquet"}]
OTHERS = {  # written by others, or by the tests themselves
    "record",
    "record in the explorer",
    "pictures",
    "scores of documents",
    "labelled prompts",
    "model folder",
    "checkpoint of the Trainer",
}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["training loop", "recipe moh-lm"])
def test_a_run_that_is_killed_again_and_again_ends_as_if_nobody_had(tmp_path, name):
    found = killed(name, tmp_path, kills=4)
    assert found["same_losses_and_weights"] and found["kills"] >= 2, found


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_an_interrupted_command_says_so_in_a_line(tmp_path, name):
    found = interrupted(name, tmp_path / "run", 0.2)
    assert found["exit"] == 130, found
    assert "interrupted" in found["said"] and "Traceback" not in found["said"]
    assert not [file for file in found["files"] if file.endswith(".part")]


def test_a_model_whose_generation_was_interrupted_is_as_it_was():
    model, _ = headwise.load_model("tiny-random-llama")
    ids = torch.arange(1, 12)[None]
    plain = model.generate(ids, max_new_tokens=5, do_sample=False)
    before = sorted(vars(model)), model.config._attn_implementation
    plan = HeadPlan.uniform(SinkWindow(2, 6), layers=3, kv_heads=2)
    old = signal.signal(signal.SIGALRM, signal.default_int_handler)
    try:
        for seconds in (0.03, 0.1, 0.2):
            signal.setitimer(signal.ITIMER_REAL, seconds)
            with pytest.raises(KeyboardInterrupt), headwise.attach(model, plan=plan):
                model.generate(ids, max_new_tokens=4000, min_new_tokens=4000, do_sample=False)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)
    assert (sorted(vars(model)), model.config._attn_implementation) == before
    assert model.generate(ids, max_new_tokens=5, do_sample=False).equal(plain)


def test_generating_for_long_leaves_nothing_behind():
    found = soak(40)
    assert found["state_kept"] and found["same_text"]
    assert found["rise_mb"][-1] < 60


@pytest.mark.parametrize("name", [name for name in SAVED if name not in OTHERS])
def test_on_a_full_disk_writing_raises_and_leaves_no_half_file(tmp_path, name):
    reader = READERS[name]
    with small_files(16), pytest.raises((HeadwiseError, OSError)):
        reader.save(tmp_path)
    assert not [
        path for path in tmp_path.rglob("*") if path.is_file() and path.name in reader.files and not readable(path)
    ]
    assert not list(tmp_path.rglob(".*.part"))


def readable(path):
    """A file is whole: it parses as what its name says."""
    try:
        if path.suffix == ".json":
            storage.read_plain_json(path)
        return path.stat().st_size > 16 or path.suffix not in (".safetensors", ".tsv")
    except ArtifactError:
        return False


def test_a_full_disk_keeps_the_file_that_was_there(tmp_path):
    reader = READERS["plan"]
    reader.save(tmp_path)
    before = (tmp_path / "a.json").read_bytes()
    with small_files(16), pytest.raises(ArtifactError, match="cannot be written"):
        reader.save(tmp_path)
    assert (tmp_path / "a.json").read_bytes() == before and os.listdir(tmp_path) == ["a.json"]


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="needs /proc, a folder that even root cannot write")
@pytest.mark.parametrize(
    "name", ["set", "scores", "plan", "edits", "expert edits", "VHR", "step time", "task embedding"]
)
def test_a_folder_that_cannot_be_written_is_named(name):
    with pytest.raises(ArtifactError, match="/proc/headwise"):
        READERS[name].save(Path("/proc/headwise"))


def test_processes_that_want_one_cache_folder_convert_once(tmp_path, monkeypatch):
    def convert(source, target):
        with open(tmp_path / "conversions", "a") as log:
            log.write("x")
        time.sleep(0.3)
        for name in smollm2._FILES:
            (target / name).write_text("whole")

    monkeypatch.setenv("HEADWISE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(smollm2, "_source", lambda: tmp_path)
    monkeypatch.setattr(smollm2, "_convert", convert)
    processes = [forked(smollm2.smollm2_folder, tmp_path / f"{n}.log") for n in range(4)]
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * 4
    assert (tmp_path / "conversions").read_text() == "x"
    assert sorted(path.name for path in (tmp_path / "cache").iterdir() if path.suffix != ".lock") == ["smollm2-v1"]


ONLINE = """
import socket, sys
tried = []
def guarded(self, address, *rest):
    if self.family in (socket.AF_INET, socket.AF_INET6):
        tried.append(address)
        raise OSError("no network here")
    return real(self, address, *rest)
real, socket.socket.connect = socket.socket.connect, guarded
socket.getaddrinfo = lambda *a, **k: tried.append(a) or (_ for _ in ()).throw(OSError("no network here"))
import headwise
model, tokenizer = headwise.load_model("tiny-random-llama")
model.save_pretrained(sys.argv[1]); tokenizer.save_pretrained(sys.argv[1])
model, tokenizer = headwise.load_model(sys.argv[1])
scores = headwise.score.induction(model, tokenizer)
with headwise.attach(model, plan=headwise.budget.razor(scores, budget="60%")):
    model.generate(**tokenizer("Hello", return_tensors="pt"), max_new_tokens=3)
print("tried", tried)
"""


@pytest.mark.slow
def test_without_offline_variables_nothing_reaches_for_the_network(tmp_path):
    environment = {k: v for k, v in os.environ.items() if "OFFLINE" not in k}
    run = subprocess.run(
        [sys.executable, "-c", ONLINE, str(tmp_path)], env=environment, capture_output=True, text=True, timeout=200
    )
    assert "tried []" in run.stdout, run.stdout + run.stderr[-2000:]
