"""The recipes of mixture-of-head attention beyond language models from scratch: recovery of a converted one, image generators."""

import json

import pytest
import torch
from typer.testing import CliRunner

from headwise.attach import attach
from headwise.errors import HeadwiseError, RouteError, TaskError
from headwise.hub import load_model
from headwise.models.flow_vit import FlowViT
from headwise.route import HeadRouter, train_moh_dit, train_moh_recover
from headwise.route import _recipes_recover as recovery
from headwise.route._distil import distilling, divergence
from recipes_helper import shrink

TINY = "tiny-random-llama"


@pytest.fixture(autouse=True)
def small(monkeypatch):
    shrink(monkeypatch)


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def weights(trained, arm):
    return trained.students[arm].model.state_dict()


# recovery


def test_recovery_trains_every_share_and_measures_before_and_after():
    trained = train_moh_recover(model=TINY, also=0.5)
    assert list(trained.students) == ["dense", "routed", "also"]
    assert [round(s.router.share, 3) for name, s in trained.students.items() if name != "dense"] == [0.75, 0.5]
    for found in trained.measured.values():
        for what in ("ppl_english", "ppl_code", "ppl_stories", "passkey"):
            assert what in found
            assert f"before_{what}" in found
        assert found["ppl_english"] != found["before_ppl_english"]
    assert "active" not in trained.measured["dense"]
    assert not any("headwise" in name for name in weights(trained, "routed"))  # nothing is left attached


def test_every_arm_starts_from_the_model_itself():
    trained = train_moh_recover(model=TINY, steps=1, router="norm")  # the first step of a warm-up changes nothing
    untouched = load_model(TINY)[0].state_dict()
    assert same(weights(trained, "dense"), untouched)
    assert same(weights(trained, "routed"), untouched)


def test_recovery_trains_the_fitted_router_and_its_stand_ins():
    trained = train_moh_recover(model=TINY)
    at = next(n for n, count in enumerate(trained.router.active_counts()) if count < 4)
    layer = trained.router.layers[at]
    convert = train_moh_recover(model=TINY, steps=1).router.layers[at]  # as converted
    for name in ("W", "b", "fill"):
        assert not torch.equal(getattr(layer, name), getattr(convert, name)), name
    assert torch.equal(layer.first, convert.first)  # what was measured stays


def test_the_teacher_is_the_trained_dense_model(monkeypatch):
    from headwise.route import train_moh_recover as function

    taught = []
    module = __import__(function.__module__, fromlist=["distilling"])
    real = module.distilling
    monkeypatch.setattr(module, "distilling", lambda m, t, w: taught.append((m, t, w)) or real(m, t, w))
    trained = train_moh_recover(model=TINY, router="norm", teacher=0.5)
    assert [(t is trained.students["dense"].model, w) for _, t, w in taught] == [(True, 0.5)]
    plain = train_moh_recover(model=TINY, router="norm")
    assert trained.curves["dense"].losses == plain.curves["dense"].losses
    assert trained.curves["routed"].losses[0] > plain.curves["routed"].losses[0]


def test_all_heads_recover_like_the_dense_model():
    trained = train_moh_recover(model=TINY, active=1.0, allocate="uniform", target="norm")
    assert trained.curves["routed"].losses == pytest.approx(trained.curves["dense"].losses, rel=1e-5)


def test_recovery_is_saved_with_every_router(tmp_path):
    trained = train_moh_recover(model=TINY, also=0.5, router="norm")
    trained.save_pretrained(tmp_path)
    model, _ = load_model(tmp_path / "also")
    ids = torch.arange(60, 90)[None]
    with torch.no_grad():
        with attach(model, router=HeadRouter.from_pretrained(tmp_path / "router-also")):
            mine = model(ids).logits
        with attach(trained.students["also"].model, router=trained.students["also"].router):
            assert torch.equal(mine, trained.students["also"].model(ids).logits)
    assert HeadRouter.from_pretrained(tmp_path / "router").active_counts() == trained.router.active_counts()
    stored = json.loads((tmp_path / "curves.json").read_text())
    assert stored["measured"]["also"]["before_passkey"] == trained.measured["also"]["before_passkey"]


def test_recovery_is_resumed(tmp_path):
    options = {"model": TINY, "router": "norm", "folder": str(tmp_path), "save_every": 1}
    whole = train_moh_recover(**options)
    (tmp_path / "routed" / "checkpoint-3" / "trainer_state.json").unlink()
    again = train_moh_recover(**options, resume=True)
    assert again.curves["routed"].losses == whole.curves["routed"].losses
    assert same(weights(again, "routed"), weights(whole, "routed"))
    with pytest.raises(RouteError, match="other settings: teacher"):
        train_moh_recover(**options, resume=True, teacher=1.0)


@pytest.mark.parametrize(
    "options, problem",
    [
        ({"model": "tiny-random-vit"}, "has no tokenizer"),
        ({"model": "tiny-random-nothing"}, "tiny-random-nothing"),
        ({"teacher": -1.0}, "teacher is -1.0"),
        ({"text": "poems"}, "text is 'poems'"),
        ({"active": 1.5}, "active is 1.5"),
        ({"size": "huge"}, "size is 'huge'"),
        ({"target": "size"}, "target is 'size'"),
    ],
)
def test_recoveries_that_make_no_sense(options, problem):
    with pytest.raises(HeadwiseError, match=problem):
        train_moh_recover(**({"model": TINY} | options))


def test_docstrings_are_prose_of_installed_packages_each_once():
    text = recovery.docstrings(["torch"], max_chars=40_000)
    assert 30_000 < len(text) <= 40_000
    assert text == recovery.docstrings(["torch"], max_chars=40_000)
    assert "import torch\nfrom" not in text[:2000]
    with pytest.raises(TaskError, match="'no_such_package' is not installed"):
        recovery.docstrings(["no_such_package"])


# learning from another model


def test_the_distance_to_a_teacher():
    generator = torch.Generator().manual_seed(0)
    mine, other = torch.randn(2, 2, 3, 5, generator=generator)
    p, q = other.softmax(-1), mine.softmax(-1)
    wanted = (p * (p / q).log()).sum(-1)
    torch.testing.assert_close(divergence(mine, other), wanted.mean())
    real = torch.tensor([[1, 1, 0], [1, 0, 0]]).bool()
    torch.testing.assert_close(divergence(mine, other, real), wanted[real].mean())
    assert divergence(mine, mine).abs() < 1e-6


def test_the_teachers_distance_is_added_in_training_only_and_is_taken_away_again():
    (model, _), (teacher, _) = load_model(TINY), load_model("tiny-random-llama")
    with torch.no_grad():
        teacher.lm_head.weight.mul_(-3)
    ids = torch.arange(60, 80)[None]
    plain = model(ids, labels=ids).loss
    with distilling(model, teacher, 2.0):
        assert torch.equal(model(ids, labels=ids).loss, plain)
        found = model.train()(ids, labels=ids).loss
        wanted = plain + 2 * divergence(model(ids).logits, teacher(ids).logits)
        torch.testing.assert_close(found, wanted)
        found.backward()
        assert all(p.grad is None for p in teacher.parameters())
    assert torch.equal(model(ids, labels=ids).loss, plain)
    with pytest.raises(RouteError, match="the model itself"), distilling(model, model, 1.0):
        pass
    with pytest.raises(RouteError, match="weight is -1"), distilling(model, teacher, -1.0):
        pass


# image generators


def test_a_generator_trains_routed_and_dense_on_the_same_draws():
    trained = train_moh_dit(control=True)
    assert list(trained.curves) == ["routed", "dense"]
    assert trained.router.active_counts() == [3, 3]
    alone = train_moh_dit()
    assert alone.curves["routed"].losses == trained.curves["routed"].losses
    half = train_moh_dit(control=True, active=0.5, shared_count=1)
    assert half.curves["dense"].losses == trained.curves["dense"].losses
    assert half.curves["routed"].losses != trained.curves["routed"].losses


def test_the_balance_loss_of_a_generator_reaches_its_router():
    with_loss, without = train_moh_dit(beta=0.5), train_moh_dit(beta=0.0)
    assert with_loss.curves["routed"].losses[0] > without.curves["routed"].losses[0] + 0.1
    assert not torch.equal(with_loss.router.layers[0].W_r, without.router.layers[0].W_r)


def test_a_generator_of_a_published_budget():
    trained = train_moh_dit(preset="dit-b/2-75", steps=1)
    assert trained.router.active_counts() == [3, 3]
    assert trained.router.config.meta["preset"] == "dit-b/2-75 on 2 x 4"
    with pytest.raises(RouteError, match="preset is 'dit-x'"):
        train_moh_dit(preset="dit-x")


def test_a_generator_of_diffusers_class():
    pytest.importorskip("diffusers")
    trained = train_moh_dit(model="dit", control=True)
    assert trained.measured["routed"]["active"] == 0.75


def test_a_saved_generator_draws_the_same(tmp_path):
    trained = train_moh_dit(control=True)
    trained.save_pretrained(tmp_path)
    model = FlowViT.from_pretrained(tmp_path / "routed").eval()
    x, t, labels = torch.randn(2, 1, 24, 24), torch.tensor([0.2, 0.9]), torch.tensor([0, 3])
    with torch.no_grad():
        with attach(model, router=HeadRouter.from_pretrained(tmp_path / "router")):
            mine = model(x, t, labels)
        with attach(trained.model, router=trained.router):
            torch.testing.assert_close(mine, trained.model(x, t, labels))
            assert not torch.equal(mine, trained.students["dense"].model(x, t, labels))


def test_a_generator_is_resumed_to_the_same_weights(tmp_path):
    options = {"control": True, "folder": str(tmp_path), "save_every": 1}
    whole = train_moh_dit(**options)
    (tmp_path / "routed" / "step-3.safetensors").unlink()
    again = train_moh_dit(**options, resume=True)
    assert again.curves["routed"].losses == pytest.approx(whole.curves["routed"].losses)
    assert same(weights(again, "routed"), weights(whole, "routed"))
    with pytest.raises(RouteError, match="holds a run already"):
        train_moh_dit(**options)


def test_the_command_of_recovery(tmp_path):
    from headwise.cli import app

    arguments = ["train", "moh-recover", "--model", TINY, "--router", "norm", "--steps", "2", "--json", "-o"]
    done = CliRunner().invoke(app, [*arguments, str(tmp_path / "run")])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["settings"]["model"] == TINY
    assert (tmp_path / "run" / "router" / "router_config.json").is_file()
