"""Recipes: they train, compare with a dense control on the same rows, survive a kill, and leave a folder that can be used."""

import gzip
import json
import os
import signal
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from forked_helper import forked
from headwise import attach
from headwise.errors import HeadwiseError, RouteError, TaskError
from headwise.hub import load_model
from headwise.report.training import save_page, thinned
from headwise.route import (
    HeadRouter,
    load_rebuilt,
    train_bam,
    train_moh_lm,
    train_moh_vit,
    train_routers,
    train_uoe_lm,
)
from headwise.route import _recipes_images as pictures
from headwise.route import _recipes_text as texts
from headwise.route._recipes_rules import RULES
from headwise.route._train import whole_checkpoint
from recipes_helper import TEXTS, shrink

TEXT = "The quick brown fox jumps over the lazy dog, and the dog sleeps on. " * 60
LEAKING = ("expert-choice", "sinkhorn", "soft", "smear")


@pytest.fixture(autouse=True)
def small(monkeypatch):
    shrink(monkeypatch)


def weights(trained, arm="routed"):
    return trained.students[arm].model.state_dict()


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# what they train


@pytest.mark.parametrize("recipe", [train_moh_lm, train_moh_vit, train_routers, train_uoe_lm])
def test_a_recipe_trains_both_arms_and_measures_them(recipe):
    trained = recipe(control=True, steps=3)
    assert list(trained.students) == list(trained.curves) == list(trained.measured) == ["routed", "dense"]
    for arm, curve in trained.curves.items():
        assert len(curve.losses) == 3
        assert curve.held_out[3] == trained.measured[arm]["held_out_loss"]
        assert not trained.students[arm].model.training
    assert trained.seconds > 0
    assert "routed: " in str(trained)


def test_the_seed_decides_everything_and_the_control_changes_nothing():
    first, again = train_moh_lm(text=TEXT), train_moh_lm(text=TEXT, control=True)
    assert first.curves["routed"].losses == again.curves["routed"].losses
    assert same(weights(first), weights(again))
    assert train_moh_lm(text=TEXT, seed=1).curves["routed"].losses != first.curves["routed"].losses


def test_the_control_does_not_depend_on_what_was_routed_before_it():
    half = train_moh_lm(text=TEXT, active=0.5, shared_count=1, control=True)
    quarter = train_moh_lm(text=TEXT, active=0.25, shared_count=1, control=True)
    assert half.curves["dense"].losses == quarter.curves["dense"].losses
    assert half.curves["routed"].losses != quarter.curves["routed"].losses
    assert half.model.config.use_cache  # Trainer turns it off; a trained model generates with its cache


def test_training_lowers_the_loss():
    trained = train_moh_lm(text=TEXT, steps=40)
    assert trained.measured["routed"]["held_out_loss"] < 0.8 * trained.curves["routed"].losses[0]


def test_the_router_of_moh_lm_trains_and_its_load_is_reported():
    trained = train_moh_lm(text=TEXT, active=0.5, shared_count=1)
    assert trained.router.active_counts() == [2, 2]
    assert trained.measured["routed"]["active"] == 0.5
    assert trained.measured["routed"]["busiest"] >= 1
    fresh = HeadRouter(trained.router.config, generator=torch.Generator().manual_seed(0))
    assert not torch.equal(fresh.layers[0].W_r, trained.router.layers[0].W_r)
    assert not any("headwise" in name for name in trained.model.state_dict())  # nothing is left attached


@pytest.mark.parametrize("rule", [name for name in RULES if name not in LEAKING])
def test_every_causal_rule_of_the_zoo_trains(rule):
    trained = train_routers(rule=rule, experts=4, steps=2, text=TEXT)
    assert all(loss == loss and loss < 10 for loss in trained.curves["routed"].losses)


@pytest.mark.parametrize("rule", LEAKING)
def test_rules_that_leak_are_refused(rule):
    with pytest.raises(RouteError, match="later tokens"):
        train_routers(rule=rule, experts=4, steps=2, text=TEXT)


def test_the_dense_control_of_routers_has_the_active_size():
    trained = train_routers(experts=4, k=2, steps=1, text=TEXT, control=True)
    experts = trained.students["routed"].host.layers[0].experts
    assert experts.hidden * 2 == trained.students["dense"].model.config.intermediate_size


def test_the_bias_of_a_sigmoid_router_moves_in_training():
    trained = train_routers(rule="sigmoid", experts=4, steps=2, text=TEXT)
    assert trained.students["routed"].host.layers[0].router.get_buffer("bias").abs().max() > 0


def test_bam_goes_through_its_phases():
    trained = train_bam(steps=12, control=True)
    lengths = {arm: len(curve.losses) for arm, curve in trained.curves.items()}
    assert lengths == {"seed": 4, "english": 2, "code": 2, "routed": 4, "dense": 8}
    assert not same(weights(trained, "english"), weights(trained, "code"))


# pictures


def idx(folder: Path, count: int = 20) -> None:
    generator = torch.Generator().manual_seed(0)
    for part in ("t10k", "train"):
        images = torch.randint(0, 256, (count * 28 * 28,), dtype=torch.uint8, generator=generator)
        labels = torch.arange(count, dtype=torch.uint8) % 10
        head = (2051).to_bytes(4, "big") + count.to_bytes(4, "big") + (28).to_bytes(4, "big") * 2
        (folder / f"{part}-images-idx3-ubyte.gz").write_bytes(gzip.compress(head + bytes(images.tolist())))
        head = (2049).to_bytes(4, "big") + count.to_bytes(4, "big")
        (folder / f"{part}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(head + bytes(labels.tolist())))


def test_pictures_in_the_idx_format(tmp_path):
    idx(tmp_path)
    drawn = pictures.image_data("fashion-mnist", str(tmp_path), pictures.ImageSize(held_out=5), seed=0)
    assert (len(drawn.rows.train), len(drawn.rows.held_out), drawn.side, drawn.classes) == (20, 5, 28, 10)
    assert drawn.rows.train[3]["labels"] == 3
    trained = train_moh_vit(data="fashion-mnist", images=str(tmp_path), steps=1)
    assert 0 <= trained.measured["routed"]["accuracy"] <= 1


def test_bad_pictures(tmp_path):
    with pytest.raises(TaskError, match="cannot be read"):
        train_moh_vit(data="fashion-mnist", images=str(tmp_path))
    idx(tmp_path)
    (tmp_path / "train-labels-idx1-ubyte.gz").write_bytes(gzip.compress(b"\0" * 100))
    with pytest.raises(TaskError, match="no idx file of labels"):
        train_moh_vit(data="fashion-mnist", images=str(tmp_path))
    idx(tmp_path)
    (tmp_path / "train-labels-idx1-ubyte.gz").write_bytes((tmp_path / "t10k-images-idx3-ubyte.gz").read_bytes()[:40])
    with pytest.raises(TaskError, match="cannot be read"):
        train_moh_vit(data="fashion-mnist", images=str(tmp_path))
    with pytest.raises(TaskError, match="images names a folder"):
        train_moh_vit(images=str(tmp_path))
    with pytest.raises(TaskError, match="data is 'faces'"):
        train_moh_vit(data="faces")


# bad input


@pytest.mark.parametrize(
    "recipe, options, problem",
    [
        (train_moh_lm, {"size": "huge"}, "size is 'huge'"),
        (train_moh_lm, {"steps": 0}, "steps is 0"),
        (train_moh_lm, {"active": 0.0}, "active is 0.0"),
        (train_moh_lm, {"shared_count": 4, "active": 0.5}, "more than the 2 that run"),
        (train_moh_lm, {"data": "poems"}, "data is 'poems'"),
        (train_moh_lm, {"text": "too short"}, "windows of 24 need more"),
        (train_moh_lm, {"text": ""}, "windows of 24 need more"),
        (train_moh_lm, {"save_every": 2}, "save_every needs folder"),
        (train_moh_lm, {"save_every": -1}, "save_every is -1"),
        (train_moh_lm, {"resume": True}, "resume=True needs folder"),
        (train_routers, {"rule": "dice"}, "rule is 'dice'"),
        (train_routers, {"k": 9}, "k is 9"),
        (train_routers, {"k": 3}, "k is 3; it must divide"),
        (train_bam, {"steps": 5}, "steps is 5"),
        (train_uoe_lm, {"active": 2.0}, "active is 2.0"),
    ],
)
def test_bad_options(recipe, options, problem):
    with pytest.raises(HeadwiseError, match=problem):
        recipe(**options)


# folders and resuming


def test_a_folder_belongs_to_one_run(tmp_path):
    options = {"text": TEXT, "folder": str(tmp_path / "run"), "save_every": 2}
    with pytest.raises(RouteError, match="holds no run"):
        train_moh_lm(**options, resume=True)
    train_moh_lm(**options)
    with pytest.raises(RouteError, match="holds a run already"):
        train_moh_lm(**options)
    with pytest.raises(RouteError, match="other settings: steps=4, now 6"):
        train_moh_lm(**options, resume=True, steps=6)
    with pytest.raises(RouteError, match="other settings: data="):
        train_moh_lm(**(options | {"text": TEXT + "."}), resume=True)
    with pytest.raises(RouteError, match="holds a run of 'moh-lm', not of 'routers'"):
        train_routers(**options, resume=True)


@pytest.mark.parametrize("recipe", [train_moh_lm, train_routers])
def test_a_complete_run_is_only_read_again(tmp_path, recipe):
    options = {"control": True, "folder": str(tmp_path), "save_every": 2}
    whole = recipe(**options)
    times = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.safetensors")}
    again = recipe(**options, resume=True)
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.safetensors")} == times
    for arm in ("routed", "dense"):
        assert same(weights(whole, arm), weights(again, arm))
        assert whole.curves[arm].losses == again.curves[arm].losses


def test_a_checkpoint_that_was_not_finished_is_passed_over(tmp_path):
    options = {"text": TEXT, "folder": str(tmp_path), "save_every": 1, "steps": 4}
    whole = train_moh_lm(**options)
    newest = tmp_path / "routed" / "checkpoint-4"
    state = newest / "trainer_state.json"
    state.write_text(state.read_text()[:50])
    (tmp_path / "routed" / "checkpoint-3" / "trainer_state.json").unlink()
    assert Path(whole_checkpoint(tmp_path / "routed")).name == "checkpoint-2"
    again = train_moh_lm(**options, resume=True)
    assert again.curves["routed"].losses == whole.curves["routed"].losses
    assert same(weights(whole), weights(again))


RECIPES = {"moh-lm": train_moh_lm, "routers": partial(train_routers, rule="noisy")}


def started(recipe, folder, resume=False):
    """A process that trains both arms, saves often, and leaves its losses in a file beside the folder."""

    def work():
        texts.SIZES["cpu"] = replace(TEXTS, steps=24)
        trained = RECIPES[recipe](folder=str(folder), save_every=3, control=True, resume=resume)
        losses = {arm: curve.losses for arm, curve in trained.curves.items()}
        folder.with_suffix(".json").write_text(json.dumps(losses))

    return forked(work, folder.with_suffix(".log"))


@pytest.mark.parametrize("recipe, arm", [("moh-lm", "routed"), ("routers", "dense")])
def test_a_run_killed_by_sigkill_ends_in_the_same_losses(tmp_path, recipe, arm):
    """Killed as soon as a checkpoint of an arm is begun, perhaps half written, and continued by a new process."""
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    started(recipe, whole).join(200)
    process, deadline = started(recipe, broken), time.monotonic() + 200
    while not (broken / arm / "checkpoint-6").exists() and time.monotonic() < deadline:
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert not (broken / arm / "checkpoint-24").exists(), "the run ended before it was killed"
    assert not broken.with_suffix(".json").exists()
    started(recipe, broken, resume=True).join(200)
    wanted, resumed = (json.loads(run.with_suffix(".json").read_text()) for run in (whole, broken))
    assert resumed == wanted
    assert {len(losses) for losses in resumed.values()} == {24}


# what is left


def test_a_saved_head_router_and_its_model_give_the_same_logits(tmp_path):
    trained = train_moh_lm(text=TEXT, active=0.5, control=True)
    trained.save_pretrained(tmp_path)
    ids = torch.arange(65, 90)[None]
    model, tokenizer = load_model(tmp_path / "routed")
    assert tokenizer("Hi").input_ids == [72, 105]
    with attach(model, router=HeadRouter.from_pretrained(tmp_path / "router")):
        mine = model(ids).logits
    with attach(trained.model, router=trained.router):
        assert torch.equal(mine, trained.model(ids).logits)
    dense, _ = load_model(tmp_path / "dense")
    assert torch.equal(dense(ids).logits, trained.students["dense"].model(ids).logits)


@pytest.mark.parametrize("rule", ["softmax", "sigmoid", "hash", "attention"])
def test_a_saved_mixture_is_read_back(tmp_path, rule):
    trained = train_routers(rule=rule, experts=4, text=TEXT)
    trained.save_pretrained(tmp_path)
    again = load_rebuilt(tmp_path / "routed")
    ids = torch.arange(65, 90)[None]
    with torch.no_grad():
        assert torch.equal(again.model.eval()(ids).logits, trained.model(ids).logits)


def test_a_saved_union_is_read_back(tmp_path):
    trained = train_uoe_lm(text=TEXT)
    trained.save_pretrained(tmp_path)
    ids = torch.arange(65, 90)[None]
    with torch.no_grad():
        again = load_rebuilt(tmp_path / "routed").model.eval()(ids).logits
        torch.testing.assert_close(again, trained.model(ids).logits)


def test_a_plain_model_takes_the_place_of_a_rebuilt_one_in_the_same_folder(tmp_path):
    train_uoe_lm(text=TEXT).save_pretrained(tmp_path)
    plain = train_moh_lm(text=TEXT)
    plain.save_pretrained(tmp_path)
    again, _ = load_model(str(tmp_path / "routed"))
    ids = torch.arange(65, 90)[None]
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits, plain.model(ids).logits)


def test_the_command_trains_saves_and_draws(tmp_path):
    from headwise.cli import app

    run = tmp_path / "run"
    arguments = ["train", "routers", "--rule", "top-p", "--experts", "4", "--steps", "3", "--control", "--json", "-o"]
    done = CliRunner().invoke(app, [*arguments, str(run)])
    assert done.exit_code == 0, done.output
    said = json.loads(done.stdout)
    assert said["settings"]["rule"] == "top-p"
    stored = json.loads((run / "curves.json").read_text())
    assert [len(stored["curves"][arm]["losses"]) for arm in ("routed", "dense")] == [3, 3]
    assert stored["measured"] == said["measured"]
    text = "The"
    done = CliRunner().invoke(
        app, ["generate", "--model", str(run / "routed"), "--prompt", text, "--max-new-tokens", "3"]
    )
    assert done.exit_code == 0, done.output


def test_the_help_of_a_recipe_asks_for_no_model():
    from headwise.cli import app

    shown = CliRunner().invoke(app, ["train", "moh-lm", "--help"], env={"COLUMNS": "160"}).stdout
    assert "--control" in shown
    assert "--model" not in shown


def test_the_page_shows_every_arm(tmp_path):
    pytest.importorskip("plotly")
    trained = train_moh_lm(text=TEXT, control=True)
    trained.save_pretrained(tmp_path)
    page = save_page(tmp_path).read_text()
    assert "held-out loss" in page
    assert '"name":"dense"' in page.replace(" ", "")
    assert "https://" not in page.split("</script>")[-1]


def test_without_plotly_there_is_no_page(tmp_path, monkeypatch):
    train_moh_lm(text=TEXT, steps=1).save_pretrained(tmp_path)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert save_page(tmp_path) is None
    assert not (tmp_path / "curves.html").exists()


def test_long_curves_are_thinned_to_means():
    steps, means = thinned([1.0, 3.0] * 200)
    assert (len(steps), steps[0], steps[-1], set(means)) == (200, 2.0, 400.0, {2.0})
    assert thinned([1.0, 5.0]) == ([1.0, 2.0], [1.0, 5.0])
