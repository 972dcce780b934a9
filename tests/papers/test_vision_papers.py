"""Papers 07 and 10: the runs measure what their checks ask for, and the claims can fail."""

import math

import pytest
import torch

from headwise.errors import HeadwiseError
from headwise.papers import headhunter_softpag, vit_head_analytics
from headwise.papers._flow_metrics import Frechet, right_class, train_classifier
from headwise.papers.reproduction import Reproduction
from headwise.tasks.shapes import make_shapes

PAPERS = (headhunter_softpag, vit_head_analytics)
FLOW = dict(
    flow={"size": 8, "patch": 4, "width": 16, "layers": 2, "heads": 2}, train=2, classify=2, pictures=64, pairs=4, held_out=64,
    k=1, rounds=2, seeds=2, steps=2, w=1.0, u=1.0, batch=4,
)  # fmt: skip
VIT = dict(seeds=2, steps=2, images=8, size=16, layers=2, width=16, classes=(2, 2), epochs=2)


@pytest.fixture(scope="module")
def measured():
    with torch.random.fork_rng():
        return {
            headhunter_softpag: headhunter_softpag.measure(**FLOW),
            vit_head_analytics: vit_head_analytics.measure(**VIT),
        }


def reproduction(module, metrics, baselines):
    facts = {"paper": module.PAPER.slug, "claim": module.PAPER.claim, "scale": "cpu", "seconds": 1.0}
    return Reproduction(**facts, metrics=metrics, baselines=baselines, checks=module.CHECKS)


@pytest.mark.parametrize("module", PAPERS)
def test_a_run_measures_what_is_checked_and_an_untrained_model_bears_nothing_out(module, measured):
    metrics, baselines = measured[module]
    found = reproduction(module, metrics, baselines)
    assert found.holds is False
    assert not set(metrics) & set(baselines)


@pytest.mark.parametrize("module", PAPERS)
def test_holds_follows_the_numbers(module, measured):
    metrics, baselines = measured[module]
    good = {**metrics, **baselines}
    for check in module.CHECKS:  # make every check true, and then each of them false in turn
        right = check.right if not isinstance(check.right, str) else 1.0
        if isinstance(check.right, str):
            good[check.right] = 1.0
        good[check.left] = right + (1.0 if check.op in (">", ">=") else -1.0)
    made = lambda numbers: reproduction(module, {k: numbers[k] for k in metrics}, {k: numbers[k] for k in baselines})
    assert made(good).holds is True
    for check in module.CHECKS:
        assert made(good | {check.left: math.nan}).holds is False


@pytest.mark.parametrize("module", PAPERS)
def test_the_page_of_a_run_shows_its_first_model(module, measured):
    pytest.importorskip("plotly", reason="needs plotly: pip install 'headwise[report]'")
    metrics, baselines = measured[module]
    made = module.sections(reproduction(module, metrics, baselines), seed=0)
    assert all("<section" in section.to_html(n) for n, section in enumerate(made))
    if module is headhunter_softpag:
        grid = made[0].figures[1]
        assert (
            len(grid.data) == 6 and made[0].table.rows
        )  # no guidance, the set, half of it, a layer, a random set, classifier-free
        assert grid.data[0].z != grid.data[1].z
    else:
        assert len(made) == 4 and len(made[0].table.rows) == 8


def test_a_gpu_run_needs_a_gpu():
    if torch.cuda.is_available():
        pytest.skip("this machine has one")
    for module in PAPERS:
        with pytest.raises(HeadwiseError, match="needs a CUDA device"):
            module.reproduce("gpu")


def test_the_frechet_distance():
    one, other = (make_shapes(600, generator=torch.Generator().manual_seed(s)).pixels for s in (0, 1))
    distance = Frechet(one, components=8)
    assert abs(distance(one)) < 1e-6
    assert (
        0
        < distance(other)
        < distance(torch.randn(600, 1, 16, 16, generator=torch.Generator().manual_seed(0)).clamp(-1, 1))
    )
    shifted = Frechet(one, components=8)(one + 0.05)
    assert shifted > 0


def test_the_judge_learns_and_gives_probabilities():
    data = make_shapes(512, shapes=2, textures=2, generator=torch.Generator().manual_seed(0))
    model = train_classifier(data.pixels, data.labels, 4, steps=60)
    found = right_class(model, data.labels)(data.pixels)
    assert found.shape == (512,)
    assert ((found >= 0) & (found <= 1)).all()
    assert found.mean() > 0.6


def test_shapes_are_even_and_repeatable():
    made = [make_shapes(64, generator=torch.Generator().manual_seed(s)) for s in (0, 0, 1)]
    assert torch.equal(made[0].pixels, made[1].pixels) and not torch.equal(made[0].pixels, made[2].pixels)
    assert made[0].labels.bincount().tolist() == [4] * 16
    assert made[0].pixels.abs().max() <= 1
    with pytest.raises(HeadwiseError, match="shapes is 9"):
        make_shapes(4, shapes=9, generator=torch.Generator())
