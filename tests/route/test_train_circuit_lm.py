"""The recipe of circuit-lm: it trains, survives a cut, and leaves a folder that loads."""

import functools
import json
import sys
from pathlib import Path

import pytest
import torch

from headwise.errors import RouteError
from headwise.hub import available_models, load_model
from headwise.hub.shipped import shipped_folder
from headwise.route import train_circuit_lm
from headwise.route._train import whole_checkpoint
from headwise.tasks.circuit_mix import circuit_rows, circuit_tokenizer

tokenizer = functools.cache(circuit_tokenizer)
MODULE = sys.modules["headwise.route.train_circuit_lm"]
TINY = MODULE.CircuitSize(width=24, layers=2, heads=2, rows=60, steps=6, batch=4, probes=4)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setitem(MODULE.SIZES, "cpu", TINY)
    monkeypatch.setattr(MODULE, "circuit_tokenizer", tokenizer)
    monkeypatch.setattr(MODULE, "circuit_rows", functools.partial(circuit_rows, code_chars=20_000))
    monkeypatch.setattr(MODULE, "HELD_OUT", 4)


def test_it_trains_and_what_it_leaves_loads(tmp_path):
    trained = train_circuit_lm(device="cpu")
    assert list(trained.students) == ["lm"] and trained.router is None and not trained.model.training
    assert len(trained.curves["lm"].losses) == 6
    assert {"ioi", "colors", "letters", "question", "before_ioi"} <= set(trained.measured["lm"])
    trained.save_pretrained(tmp_path)
    model, tokenizer = load_model(tmp_path / "lm")
    ids = tokenizer("When Mary and John went to the store,", return_tensors="pt").input_ids
    wanted = trained.model(ids).logits
    assert torch.allclose(model(ids).logits, wanted, atol=0.05 * float(wanted.detach().abs().max()))
    assert model.dtype == torch.float32 and trained.model.dtype == torch.float32
    log = json.loads((tmp_path / "lm" / "log.json").read_text())
    assert sorted(map(int, log["accuracies"])) == [1, 2, 3, 4, 5, 6] and log["settings"]["seed"] == 0
    assert (tmp_path / "curves.json").exists()


def test_a_run_goes_on_from_a_model(tmp_path):
    first = train_circuit_lm(device="cpu")
    first.save_pretrained(tmp_path)
    again = train_circuit_lm(device="cpu", start=str(tmp_path / "lm"), steps=2)
    assert again.curves["lm"].losses[0] < first.curves["lm"].losses[0] and again.settings["start"] == str(
        tmp_path / "lm"
    )
    again.save_pretrained(tmp_path / "again")
    log = json.loads((tmp_path / "again" / "lm" / "log.json").read_text())
    assert log["before"] == json.loads((tmp_path / "lm" / "log.json").read_text()) and "before" not in log["before"]
    assert sorted(log["accuracies"]) == ["1", "2"] and log["settings"]["steps"] == 2
    with pytest.raises(RouteError, match="start='tiny-random-gpt2' has"):
        train_circuit_lm(device="cpu", start="tiny-random-gpt2")


def test_a_run_that_was_cut_off_ends_in_the_same_losses(tmp_path, monkeypatch):
    whole = train_circuit_lm(device="cpu", folder=str(tmp_path / "whole"), save_every=2)
    original, calls = MODULE.Asked.after_step, []

    def cut(self):
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt
        original(self)

    monkeypatch.setattr(MODULE.Asked, "after_step", cut)
    with pytest.raises(KeyboardInterrupt):
        train_circuit_lm(device="cpu", folder=str(tmp_path / "cut"), save_every=2)
    monkeypatch.setattr(MODULE.Asked, "after_step", original)
    assert whole_checkpoint(tmp_path / "cut" / "lm").endswith("checkpoint-4")
    resumed = train_circuit_lm(device="cpu", folder=str(tmp_path / "cut"), save_every=2, resume=True)
    assert resumed.curves["lm"].losses == whole.curves["lm"].losses
    assert resumed.students["lm"].log == whole.students["lm"].log
    assert all(torch.equal(a, b) for a, b in zip(resumed.model.parameters(), whole.model.parameters(), strict=True))
    with pytest.raises(RouteError, match="other settings"):
        train_circuit_lm(device="cpu", folder=str(tmp_path / "cut"), save_every=2, resume=True, seed=1)


def test_bad_input():
    with pytest.raises(RouteError, match="size is 'huge'"):
        train_circuit_lm(size="huge")
    with pytest.raises(RouteError, match="needs folder="):
        train_circuit_lm(save_every=2)


@pytest.mark.skipif(
    "circuit-lm" not in dict(available_models()), reason="the trained model does not come with this copy"
)
def test_the_shipped_model_answers_its_tasks():
    """As far as docs/methods/circuit-lm.md says: of indirect objects all openings but one."""
    from headwise.models.circuit_lm import accuracies, probes

    model, tokenizer = load_model("circuit-lm")
    assert (model.config.n_layer, model.config.n_head) == (12, 12)
    found = accuracies(model, probes(tokenizer, count=32, seed=7))
    assert found["colors"] > 0.9 and min(found["letters"], found["random"]) > 0.8
    assert found["ioi"] > 0.5 and min(found["question"], found["question_random"]) > 0.45
    runs = json.loads((Path(shipped_folder("circuit-lm")) / "log.json").read_text())
    assert runs["settings"]["start"] == "circuit-lm" and "start" not in runs["before"]["settings"]
    measured = runs["measured"]["lm"]
    assert measured["colors"] > 0.9 > 0.5 > runs["before"]["measured"]["lm"]["colors"]
