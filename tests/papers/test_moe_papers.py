"""The reproductions of papers 25 and 26: what they measure in a few steps, and that their verdicts can be false."""

from dataclasses import replace

import pytest
import torch

from headwise.errors import HeadwiseError
from headwise.papers import Reproduction, graph_of_tokens, moe_survey
from headwise.papers._moe_clusters import make_task, measure_clusters, purity
from headwise.papers._small_lm import Size, batches, corrupted, mixture_lm, small_lm, train
from headwise.route import Routing

TINY = Size(width=16, heads=2, hidden=8, experts=4, steps=6, batch=2, length=24)


def test_purity_is_one_for_the_right_answer_and_an_eighth_for_chance():
    _, _, kind = make_task(0).draw(torch.Generator().manual_seed(0))
    right = Routing((kind * 3 % 8)[..., None], torch.ones(*kind.shape, 1), torch.full((*kind.shape, 8), 1 / 8))
    assert purity(right, kind) == 1
    wrong = torch.randint(8, kind.shape, generator=torch.Generator().manual_seed(1))
    assert purity(replace(right, index=wrong[..., None]), kind) < 0.3


def test_clusters_are_measured_repeatably_for_every_router():
    found = measure_clusters(0, 2)
    assert {name for name in found if name.startswith("error")} == {
        f"error_{name}"
        for name in ("balanced", "unbalanced", "information", "choice", "noisy", "hash", "soft", "smear")
    }
    assert found == measure_clusters(0, 2)


def test_every_model_of_a_seed_sees_the_same_tokens_and_training_learns():
    assert all(torch.equal(a, b) for a, b in zip(batches(TINY, 3, 1), batches(TINY, 3, 1), strict=True))
    model, host = mixture_lm(TINY, 0, losses={"balance": 0.01})
    dense = small_lm(TINY, 2 * TINY.hidden, 0)
    active = sum(p.numel() for layer in host.layers.values() for p in layer.experts.parameters()) * 2 // TINY.experts
    assert active == sum(p.numel() for block in dense.model.layers for p in block.mlp.parameters())
    ids = next(batches(TINY, 1, 2))
    before = float(model(ids, labels=ids).loss.detach())
    train(model, replace(TINY, steps=20), 0, host=host)
    assert float(model(ids, labels=ids).loss.detach()) < before
    changed = corrupted(ids, 0.5) != ids
    assert 0.3 < changed.float().mean() < 0.7


def test_language_models_are_measured_with_both_dense_controls():
    scale = replace(moe_survey.SCALES["cpu"], size=TINY)
    found = moe_survey.measure_models(0, scale, names=("topk", "sigmoid", "hash"))
    assert {name for name in found if name.startswith("loss")} == {
        f"loss_{name}" for name in ("dense", "wide", "topk", "sigmoid", "hash")
    }


@pytest.mark.parametrize("name", ["plain", "attention"])
def test_graph_models_are_measured(name):
    scale = replace(graph_of_tokens.SCALES["cpu"], size=TINY, checkpoints=3, every=1)
    found = graph_of_tokens.measure(name, 0, scale)
    assert set(found) == {"loss", "loss_noisy", "fluctuation", "agreement", "entropy", "violation"}
    assert 0 <= found["fluctuation"] <= 1 and 0 < found["agreement"] <= 1


def test_the_noise_of_a_router_is_damped_as_predicted():
    assert graph_of_tokens.damping_error(1) < 0.15


@pytest.mark.parametrize("paper", [moe_survey, graph_of_tokens])
def test_the_verdicts_can_be_false(paper):
    names = {side for check in paper.CHECKS for side in (check.left, check.right) if isinstance(side, str)}
    same = Reproduction(paper.PAPER.slug, paper.PAPER.claim, "cpu", dict.fromkeys(names, 0.5), {}, paper.CHECKS, 1.0)
    assert not same.holds
    assert len(same.failed()) >= 4
    with pytest.raises(HeadwiseError, match="scale is 'tpu'"):
        paper.reproduce("tpu")
