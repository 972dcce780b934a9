"""Regression data: moments as stated, both conventions of noise, errors that name the argument."""

import pytest
import torch

from headwise.errors import TaskError
from headwise.tasks.regression import Regression


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_single_task_moments():
    task = Regression(dim=5, length=40, noise=0.1)
    batch = task.draw(4000, generator=generator())
    x, y = batch.z[..., :5], batch.z[..., 5]
    assert batch.z.shape == (4000, 40, 6) and batch.z_q.shape == (4000, 6) and batch.y.shape == (4000, 1)
    assert x.mean().abs() < 0.01 and (x.var() - 1).abs() < 0.02
    assert y.var().item() == pytest.approx(1.1, abs=0.05)  # |beta|^2 = 1, and the noise
    assert batch.y.var().item() == pytest.approx(1.1, abs=0.1)  # the query's label is noisy too
    assert batch.z_q[:, 5].abs().max() == 0


def test_labels_are_linear_in_the_covariates_with_one_beta_a_sequence():
    task = Regression(dim=3, length=6, noise=0.0)
    batch = task.draw(5, generator=generator())
    beta = torch.linalg.lstsq(batch.z[..., :3], batch.z[..., 3:]).solution
    torch.testing.assert_close(batch.z[..., :3] @ beta, batch.z[..., 3:], rtol=0, atol=1e-4)
    torch.testing.assert_close((batch.z_q[:, None, :3] @ beta)[:, 0], batch.y, rtol=0, atol=1e-4)


def test_skewed_covariates_have_the_stated_covariance():
    task = Regression(dim=4, length=100, rho=0.5)
    x = task.draw(500, generator=generator()).z[..., :4].flatten(0, 1)
    torch.testing.assert_close(x.T.cov(), task.covariance(), rtol=0, atol=0.02)
    assert task.covariance()[0].tolist() == [1.0, 0.5, 0.25, 0.125]


def test_two_tasks_read_their_own_covariates_and_noise_grows_with_their_size():
    quiet = Regression.two_tasks(noise=0.0, length=12)
    batch = quiet.draw(6, generator=generator())
    for task, part in enumerate((slice(0, 4), slice(2, 6))):
        beta = torch.linalg.lstsq(batch.z[..., part], batch.z[..., 6 + task : 7 + task]).solution
        torch.testing.assert_close(batch.z[..., part] @ beta, batch.z[..., 6 + task : 7 + task], rtol=0, atol=1e-3)
        torch.testing.assert_close(
            (batch.z_q[:, None, part] @ beta)[:, 0], batch.y[:, task : task + 1], rtol=0, atol=1e-3
        )
    noisy = Regression.two_tasks(noise=0.5, length=50).draw(2000, generator=generator())
    assert noisy.z[..., 6].var().item() == pytest.approx(4 + 4 * 0.5, rel=0.1)
    assert noisy.y[:, 0].var().item() == pytest.approx(4, rel=0.15)  # no noise on the query


def test_another_length_and_leading_shape_and_seeds():
    task = Regression(dim=2, length=4)
    assert task.draw(3, 5, generator=generator(), length=9).z.shape == (3, 5, 9, 3)
    assert task.draw(2, generator=generator()).z.equal(task.draw(2, generator=generator()).z)
    assert not task.draw(2, generator=generator(1)).z.equal(task.draw(2, generator=generator()).z)


@pytest.mark.parametrize(
    "options, word",
    [
        ({"length": 0}, "length"), ({"dim": 0}, "dim"), ({"rho": 1.0}, "rho"), ({"rho": -1.5}, "rho"), ({"noise": -0.1}, "noise"),
        ({"supports": ((0, 9),)}, "support"), ({"supports": ((3, 3),)}, "support"),
    ],
)  # fmt: skip
def test_bad_input_is_named(options, word):
    with pytest.raises(TaskError, match=word) as caught:
        Regression(**options)
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize("name", ["d1", "d2"])
def test_a_support_larger_than_the_covariates(name):
    with pytest.raises(TaskError, match=name):
        Regression.two_tasks(**{name: 7})
