"""Papers 22 and 33: a run on an untrained scene model measures what the checks ask for and bears nothing out."""

import math

import pytest
import torch

from headwise.errors import HeadwiseError
from headwise.models.scene_vlm import scene_vlm
from headwise.papers import vision_aware_head_divergence as vhd_paper
from headwise.papers import visual_attention_sink as var_paper
from headwise.papers.reproduction import Reproduction

PAPERS = (vhd_paper, var_paper)


@pytest.fixture(scope="module")
def measured():
    model = scene_vlm()
    return {module: module.summarise([module.measure(model, scenes=6, draws=1, seed=0)]) for module in PAPERS}


def reproduction(module, metrics, baselines):
    facts = {"paper": module.PAPER.slug, "claim": module.PAPER.claim, "scale": "cpu", "seconds": 1.0}
    finite = {name: value if math.isfinite(value) else 0.0 for name, value in metrics.items()}
    return Reproduction(**facts, metrics=finite, baselines=baselines, checks=module.CHECKS)


@pytest.mark.parametrize("module", PAPERS)
def test_an_untrained_model_bears_nothing_out(module, measured):
    metrics, baselines = measured[module]
    assert reproduction(module, metrics, baselines).holds is False
    assert not set(metrics) & set(baselines)
    named = {side for check in module.CHECKS for side in (check.left, check.right) if isinstance(side, str)}
    assert named <= set(metrics) | set(baselines)


@pytest.mark.parametrize("module", PAPERS)
def test_holds_follows_the_numbers(module, measured):
    metrics, baselines = measured[module]
    values = {**metrics, **baselines}
    ranks = dict.fromkeys(values, 0.0)
    for _ in module.CHECKS:  # numbers that bear every check out, found by raising and lowering what breaks one
        for check in module.CHECKS:
            right = ranks[check.right] if isinstance(check.right, str) else check.right
            if check.op in (">", ">=") and not ranks[check.left] > right:
                ranks[check.left] = right + 0.01 if check.op == ">" else right
            elif check.op in ("<", "<=") and not ranks[check.left] <= right - 0.001:
                if isinstance(check.right, str):
                    ranks[check.right] = ranks[check.left] + 0.01
                else:
                    ranks[check.left] = right - 0.01
            elif check.op == "==":
                ranks[check.left] = right
    made = lambda v: reproduction(module, {k: v[k] for k in metrics}, {k: v[k] for k in baselines})
    assert made(ranks).holds is True, made(ranks)
    for check in module.CHECKS:
        right = ranks[check.right] if isinstance(check.right, str) else check.right
        wrong = right + (-1.0 if check.op in (">", ">=") else 1.0)
        assert made(ranks | {check.left: wrong}).holds is False, check


@pytest.mark.parametrize("module", PAPERS)
def test_the_page_shows_pictures_and_attention(module, measured):
    pytest.importorskip("plotly", reason="needs plotly: pip install 'headwise[report]'")
    metrics, baselines = measured[module]
    rates, looking = module.sections(reproduction(module, metrics, baselines), seed=0)
    assert rates.figures and "<section" in looking.to_html(1)
    panels = looking.figures[0].data
    assert len(panels) == 3 * (3 if module is var_paper else 2)  # picture, attention, and under VAR
    if module is vhd_paper:
        assert [label for label, _ in looking.quotes][:4] == ["picture 1 shows", "greedy", "alpha 2", "alpha 3"]
    else:
        plain, under = (panels[i].z for i in (1, 2))
        assert plain != under


def test_a_gpu_run_needs_a_gpu():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    for module in PAPERS:
        with pytest.raises(HeadwiseError, match="needs a CUDA device"):
            module.reproduce("gpu")


def test_published_figures_are_no_measurements():
    for module in PAPERS:
        assert all(name.startswith("published_") for name in module.PUBLISHED)
