"""Reading heads of the regression layer: exact on circuits wired by hand, and tied to ablation."""

import pytest
import torch

import headwise
from headwise.errors import ScoreError
from headwise.hub import load_model
from headwise.models.icl_regression import Circuits, RegressionModel, Weights
from headwise.models.icl_training import train_regression
from headwise.score.icl_regression import icl_regression, patterns, share_in_powers, superposition
from headwise.tasks.regression import Regression

OMEGA, MU = (0.15, -0.15, 0.0), (2.9, -2.9, 0.0)


@pytest.fixture(scope="module")
def wired():
    """A positive, a negative and a dummy head of d = 5: q = omega · I on the covariates, k = sqrt(n) · I, v = I, o reads the label."""
    n = 6
    keep = torch.diag(torch.tensor([1.0] * 5 + [0.0]))
    q = torch.stack([w * keep for w in OMEGA])
    k, v = torch.eye(n).mul(n**0.5).expand(3, n, n), torch.eye(n).expand(3, n, n)
    o = torch.zeros(1, 3, n)
    o[0, :, -1] = torch.tensor(MU)
    return RegressionModel.of(Weights(q, k, v, o))


def test_scores_are_what_was_wired(wired):
    for measure, wanted in (("omega", OMEGA), ("mu", MU), ("eta", [w * m for w, m in zip(OMEGA, MU, strict=True)])):
        scores = icl_regression(wired, None, measure=measure)
        assert scores.values.shape == (1, 3) and scores.values[0].tolist() == pytest.approx(list(wanted), abs=1e-6)
    found = patterns(wired.circuits, 5)
    assert found.roles() == ["positive", "negative", "dummy"]
    assert max(found.omega_std.max(), found.kq_rest.max(), found.ov_rest.max()) < 1e-6


def test_roles_agree_with_ablation(wired):
    batch = Regression().draw(4000, generator=torch.Generator().manual_seed(0))

    def risk():
        with torch.no_grad():
            return (wired(batch.z, batch.z_q) - batch.y).square().mean().item()

    intact, ratios = risk(), []
    for head in range(3):
        with headwise.ablate(wired, f"L0H{head}"):
            ratios.append(risk() / intact)
    assert intact == pytest.approx(0.24, abs=0.02)
    assert ratios[0] > 1.5 and ratios[1] > 1.5 and ratios[2] == pytest.approx(1, abs=0.01)


def test_what_is_outside_the_pattern_is_measured_and_dead_columns_are_not():
    kq, ov = torch.zeros(1, 6, 6), torch.zeros(1, 1, 6)
    kq[0, 5, 2], kq[0, 1, 5], ov[0, 0, 3] = -0.7, 9.0, 0.4  # column 5 meets the query's empty label
    kq[0, range(5), range(5)] = torch.tensor([1.0, 2.0, 3.0, 2.0, 2.0])
    found = patterns(Circuits(kq, ov), 5)
    assert found.kq_rest.item() == pytest.approx(0.7) and found.ov_rest.item() == pytest.approx(0.4)
    assert found.omega.item() == pytest.approx(2) and found.omega_std.item() == pytest.approx(0.4**0.5)


def test_superposition_is_read_head_by_head_and_task_by_task():
    kq, ov = torch.zeros(3, 8, 8), torch.zeros(2, 3, 8)
    kq[0, range(6), range(6)] = 0.1  # reads everything
    kq[1, range(4), range(4)] = -0.1
    kq[2, range(2, 6), range(2, 6)] = -0.1
    ov[0, 0, 6], ov[1, 0, 7], ov[0, 1, 6], ov[1, 2, 7] = 3.0, 3.0, -3.0, -3.0
    found = superposition(Circuits(kq, ov), ((0, 4), (2, 6)), 6)
    torch.testing.assert_close(found.strength, torch.tensor([[1.0, 1.0], [1.0, 0.0], [0.0, 1.0]]))
    assert found.shared() == [0]
    with pytest.raises(ScoreError, match="two tasks"):
        superposition(Circuits(kq, ov), ((0, 4),), 6)


def test_a_polynomial_of_the_covariance_is_explained_and_noise_is_not():
    S = Regression(rho=0.5).covariance()
    inside = torch.zeros(1, 6, 6)
    inside[0, :5, :5] = S + 0.3 * S @ S
    assert share_in_powers(inside, S).item() == pytest.approx(1, abs=1e-5)
    assert share_in_powers(inside, S, degree=0).item() < 0.9
    noise = torch.randn(1, 6, 6, generator=torch.Generator().manual_seed(0))
    assert share_in_powers(noise, S).item() < 0.6


def test_errors_name_model_and_measure(wired):
    with pytest.raises(ScoreError, match="LlamaForCausalLM"):
        icl_regression(load_model("tiny-random-llama")[0], None)
    with pytest.raises(ScoreError, match="measure='size'"):
        icl_regression(wired, None, measure="size")
    with pytest.raises(ScoreError, match="one model"):
        patterns(Circuits(torch.zeros(2, 1, 6, 6), torch.zeros(2, 1, 1, 6)), 5).roles()


@pytest.mark.slow
def test_training_two_heads_ends_in_the_pattern_of_the_paper():
    run = train_regression(heads=2, seeds=1, steps=4000)
    found, risk = patterns(run.circuits, 5), run.risk()
    assert 0.235 <= risk.item() <= 0.262
    omega, mu = found.omega[0], found.mu[0]
    assert omega[0] * omega[1] < 0 and abs(mu.sum()) < 0.1 * abs(mu[0]) and 0.80 <= (omega @ mu).item() <= 0.95
    risks = [run.risk(length=n).item() for n in (20, 40, 80, 160)]
    assert risks == sorted(risks, reverse=True)
    assert set(patterns(Circuits(*(c[0] for c in run.circuits)), 5).roles()) == {"positive", "negative"}
