"""Papers 08 and 27: the whole measurement runs on a small scale, and what it measures can be false."""

import dataclasses

import pytest
import torch

from headwise.attach import fingerprint
from headwise.errors import HeadwiseError
from headwise.papers import Reproduction, icl_linear_regression, soft_injection
from headwise.papers.catalogue import row
from headwise.steer import TaskEmbedding
from tiny_helper import random, tiny


@pytest.fixture(scope="module")
def injected():
    return soft_injection.measure(
        "tiny-random-llama", tasks=("next-letter", "capitalize"), seeds=2, prompts=2, steps=2, test=2, trials=2, every=1, held_out=2,
        shots=2, dtype="float32",
    )  # fmt: skip


@pytest.fixture(scope="module")
def regressed():
    return icl_linear_regression.measure(seeds=2, steps=10, count=5000)


def made(module, numbers):
    metrics, baselines = numbers
    return Reproduction(module.PAPER.slug, module.PAPER.claim, "cpu", metrics, baselines, module.CHECKS, 1.0)


def test_soft_injection_does_not_hold_on_a_random_model(injected):
    record = made(soft_injection, injected)
    assert not record.holds and "examples help" in [check.name for check in record.failed()]
    assert all(0 <= value <= 1 for name, value in record.numbers.items() if name.startswith("exact"))


def test_regression_does_not_hold_untrained(regressed):
    record = made(icl_linear_regression, regressed)
    assert not record.holds and "two heads reach the risk of gradient descent" in [
        check.name for check in record.failed()
    ]
    assert record.numbers["risk_gd_exact"] == pytest.approx(0.2398, abs=1e-4)
    assert record.numbers["risk_debiased_gd"] == pytest.approx(0.242, abs=0.01)
    assert record.numbers["risk_bayes"] == pytest.approx(0.1145, abs=0.005)
    assert record.numbers["risk_single_head_closed_form"] == pytest.approx(0.407, abs=0.02)


GOOD = {
    "exact_ten_shot": 0.9, "gap_to_ten_shot": 0.0, "gain_over_zero_shot": 0.8, "exact_function_vector": 0.3, "exact_soft": 0.9,
    "exact_zero_shot": 0.1, "exact_all_replaced": 0.2, "exact_shuffled_alpha": 0.3, "exact_vectors_of_another_task": 0.0,
    "gain_over_zero_shot_worst_seed": 0.7,
}  # fmt: skip


@pytest.mark.parametrize(
    "change",
    [
        {"exact_ten_shot": 0.3}, {"gap_to_ten_shot": -0.1}, {"gain_over_zero_shot": 0.4}, {"exact_function_vector": 0.95},
        {"exact_function_vector": 0.05}, {"exact_all_replaced": 0.9}, {"exact_shuffled_alpha": 0.95},
        {"exact_vectors_of_another_task": 0.6}, {"gain_over_zero_shot_worst_seed": 0.2},
    ],
)  # fmt: skip
def test_every_check_of_soft_injection_can_fail_alone(change):
    good = Reproduction("soft-injection", "claim", "cpu", GOOD, {}, soft_injection.CHECKS, 1.0)
    assert good.holds and not dataclasses.replace(good, metrics=GOOD | change).holds


def test_controls_change_one_thing_each():
    model = tiny()
    fitted = [TaskEmbedding(random(3, 4, 16, seed=s), torch.rand(3, 4), fingerprint(model)) for s in range(4)]
    found = soft_injection.controls(fitted, 2, seed=0)
    assert found["vectors_of_another_task"][0].vectors.equal(fitted[1].vectors)
    assert found["vectors_of_another_task"][3].vectors.equal(fitted[2].vectors)  # of the same seed
    assert found["vectors_of_another_task"][0].alpha.equal(fitted[0].alpha)
    shuffled = found["shuffled_alpha"][0]
    assert shuffled.alpha.flatten().sort().values.equal(fitted[0].alpha.flatten().sort().values)
    assert not shuffled.alpha.equal(fitted[0].alpha) and shuffled.vectors.equal(fitted[0].vectors)
    assert (found["all_replaced"][1].alpha == 1).all() and (found["untrained_half"][1].alpha == 0.5).all()


@pytest.mark.parametrize("module", [soft_injection, icl_linear_regression])
def test_the_gpu_scale_needs_a_gpu(module):
    if torch.cuda.is_available():
        pytest.skip("a GPU is there")
    with pytest.raises(HeadwiseError, match="CUDA"):
        module.reproduce("gpu")


@pytest.mark.parametrize("name", ["soft-injection", "icl-linear-regression"])
def test_the_row_says_what_is_there(name):
    assert row(name).paper.slug == name
    assert [p for p in row(name).problems() if "cannot be imported" in p or "PAPER" in p] == []
