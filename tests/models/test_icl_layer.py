"""The regression layer against its literal formula, its circuits, the training of many seeds at once, and the theory in closed form."""

import pytest
import torch

import headwise
from headwise.attach import find_stack
from headwise.errors import AttachError, TaskError
from headwise.models.icl_regression import Circuits, RegressionConfig, RegressionModel, Weights, circuit_forward
from headwise.models.icl_theory import (
    approx_gradients,
    approx_loss,
    attention_predictor,
    bayes_limit,
    first_order_eta,
    gd_optimum,
    gd_risk,
    gradient_flow,
    gradient_step,
    mu_star,
    ridge,
    single_head_optimum,
)
from headwise.models.icl_training import train_regression
from headwise.tasks.regression import Regression

SIZES = {"dim": 5, "length": 40, "noise": 0.1}
ONE_HEAD = approx_loss(*(torch.tensor([value]) for value in single_head_optimum(**SIZES)), **SIZES)


def weights(heads=3, n=4, tasks=1, seed=0, *, lead=()):
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(*lead, heads, n, n, generator=generator) for _ in range(3))
    return Weights(q, k, v, torch.randn(*lead, tasks, heads, n, generator=generator))


def literal(w, z, z_q):
    """The equation, pair by pair and head by head."""
    out = torch.zeros(len(z), len(w.o), dtype=z.dtype)
    for b, (pairs, asked) in enumerate(zip(z, z_q, strict=True)):
        for h in range(len(w.q)):
            logits = torch.stack([(w.k[h] @ pair) @ (w.q[h] @ asked) for pair in pairs]) / len(asked) ** 0.5
            row = logits.softmax(0)
            read = sum(p * (w.v[h] @ pair) for p, pair in zip(row, pairs, strict=True))
            out[b] += w.o[:, h] @ read
    return out


# the layer


@pytest.mark.parametrize("base", ["sdpa", "eager"])
@pytest.mark.parametrize("tasks", [1, 2])
def test_equals_the_literal_formula(base, tasks):
    w = Weights(*(t.double() for t in weights(n=3 + tasks, tasks=tasks)))
    model = RegressionModel.of(w)
    model.config._attn_implementation = base
    batch = Regression(dim=3 + tasks - 1, length=7).draw(
        4, generator=torch.Generator().manual_seed(1), dtype=torch.float64
    )
    z, z_q = batch.z[..., : 3 + tasks], batch.z_q[..., : 3 + tasks]
    wanted = literal(w, z, z_q)
    with torch.no_grad():
        torch.testing.assert_close(model(z, z_q), wanted, rtol=0, atol=1e-6)
        torch.testing.assert_close(model(z[:, torch.randperm(7)], z_q), wanted, rtol=0, atol=1e-6)
    one = Weights(*(t[None] for t in w)).circuits()
    heads = circuit_forward(one, z[None], z_q[None])[0]
    torch.testing.assert_close(heads.sum(-1), wanted, rtol=0, atol=1e-6)


def test_circuits_are_the_products_of_the_slices_and_heads_sum_to_the_output():
    model = RegressionModel(RegressionConfig(dim=3, heads=2)).double().eval()
    attention, (kq, ov) = model.layers[0].attention, model.circuits
    for h in range(2):
        rows = slice(4 * h, 4 * h + 4)
        wanted = attention.k_proj.weight[rows].T @ attention.q_proj.weight[rows] / 2
        torch.testing.assert_close(kq[h], wanted, rtol=0, atol=1e-6)
        torch.testing.assert_close(
            ov[:, h], attention.out_proj.weight[:, rows] @ attention.v_proj.weight[rows], rtol=0, atol=1e-6
        )
    z, z_q = torch.randn(5, 6, 4, dtype=torch.float64), torch.randn(5, 4, dtype=torch.float64)
    each = circuit_forward(Circuits(kq[None], ov[None]), z[None], z_q[None])[0]
    parts = []
    for h in range(2):
        with headwise.ablate(model, f"L0H{1 - h}"):
            parts.append(model(z, z_q))
    torch.testing.assert_close(torch.stack(parts, -1), each, rtol=0, atol=1e-6)
    torch.testing.assert_close(each.sum(-1), model(z, z_q), rtol=0, atol=1e-6)


def test_the_query_is_no_key():
    model = RegressionModel.of(weights())
    z, z_q = torch.randn(2, 1, 4), torch.randn(2, 4)
    with torch.no_grad():
        torch.testing.assert_close(
            model(z, z_q), model(z, 5 * z_q)
        )  # one pair: whatever the query, all the weight is on it


def test_it_is_a_transformers_model(tmp_path):
    model = RegressionModel.of(weights())
    stack = find_stack(model)
    assert (stack.layers, stack.heads, stack.head_dim, stack.causal) == (1, 3, 4, False)
    model.save_pretrained(tmp_path)
    back = RegressionModel.from_pretrained(tmp_path)
    z, z_q = torch.randn(2, 5, 4), torch.randn(2, 4)
    with torch.no_grad():
        assert all(a.equal(b) for a, b in zip(back.weights, model.weights, strict=True))
        torch.testing.assert_close(back(z, z_q), model(z, z_q))
        with headwise.observe(model, "entropy") as record:
            model(z, z_q)
    assert record.table("entropy").shape == (1, 2, 3, 1)


@pytest.mark.parametrize("options, word", [({"heads": 0}, "heads"), ({"dim": 0}, "dim"), ({"tasks": 0}, "tasks")])
def test_bad_sizes_are_named(options, word):
    with pytest.raises(TaskError, match=word):
        RegressionConfig(**options)


def test_bad_shapes_are_named():
    model = RegressionModel(RegressionConfig(dim=3))
    for z, z_q in (
        (torch.ones(2, 5, 3), torch.ones(2, 4)),
        (torch.ones(2, 5, 4), torch.ones(3, 4)),
        (torch.ones(2, 0, 4), torch.ones(2, 4)),
    ):
        with pytest.raises(TaskError, match="must be"):
            model(z, z_q)


# training


def test_seeds_side_by_side_train_as_each_alone_would_on_its_data():
    """Gradients of one seed do not reach another: the sum of losses trains each."""
    task = Regression(dim=2, length=5)
    run = train_regression(task, heads=2, seeds=3, steps=4, batch=8, record=2)
    start = train_regression(task, heads=2, seeds=3, steps=1, batch=8, record=1)
    assert run.kq[0].equal(start.kq[0]) and run.steps.tolist() == [0, 2, 4]
    w = [t[:1].detach().clone().requires_grad_(True) for t in _started(task)]
    adam = torch.optim.Adam(w, lr=1e-2)
    schedule = torch.optim.lr_scheduler.LinearLR(adam, 1.0, 0.0, total_iters=4)
    generator = torch.Generator().manual_seed(1)
    for _ in range(4):
        data = task.draw(3, 8, generator=generator)
        out = circuit_forward(Weights(*w).circuits(), data.z[:1], data.z_q[:1]).sum(-1)
        adam.zero_grad()
        (out - data.y[:1]).square().mean().backward()
        adam.step()
        schedule.step()
    for mine, theirs in zip(w, run.weights, strict=True):
        torch.testing.assert_close(mine[0].detach(), theirs[0], rtol=0, atol=1e-6)


def _started(task):
    from headwise.models.icl_training import _start

    return _start(task, 2, 3, 0, "cpu")


def test_training_lowers_the_risk_a_seed_repeats_it_and_the_model_says_the_same():
    task = Regression(dim=2, length=10)
    runs = [train_regression(task, heads=2, seeds=2, steps=150, record=50, seed=s) for s in (0, 0, 1)]
    assert runs[0].kq.equal(runs[1].kq) and not runs[0].kq.equal(runs[2].kq)
    risk = runs[0].risk(count=5000)
    untrained = train_regression(task, heads=2, seeds=2, steps=1, lr=1e-12).risk(count=5000)
    assert (risk < 0.9 * untrained).all()
    batch = task.draw(1, 5000, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        error = (runs[0].model(1)(batch.z[0], batch.z_q[0]) - batch.y[0]).square().mean()
    assert error.item() == pytest.approx(risk[1].item(), abs=1e-5)


def test_linear_attention_is_scaled_by_the_length_it_was_trained_at_unless_told():
    run = train_regression(Regression(dim=2, length=10), heads=1, steps=5, linear=True)
    assert run.risk(length=10, count=5000).equal(run.risk(length=10, count=5000, rescale=False))
    assert not run.risk(length=40, count=5000).equal(run.risk(length=40, count=5000, rescale=False))
    with pytest.raises(TaskError, match="linear"):
        run.model()


def test_attach_refuses_what_is_no_softmax_attention():
    with pytest.raises(AttachError):
        headwise.attach(torch.nn.Linear(2, 2))


@pytest.mark.parametrize(
    "options, word", [({"steps": 0}, "steps"), ({"lr": 0.0}, "lr"), ({"heads": 0}, "heads"), ({"seeds": 0}, "seeds")]
)
def test_bad_training_options_are_named(options, word):
    with pytest.raises(TaskError, match=word):
        train_regression(**options)


# theory


def test_mu_star_and_loss_of_the_specification():
    for size, mu, loss in ((0.13, 3.38075, 0.2210056), (0.05, 8.79118, 0.2208819)):
        omega = torch.tensor([size, -size], dtype=torch.float64)
        found = mu_star(omega, **SIZES)
        assert found.tolist() == pytest.approx([mu, -mu], abs=1e-5)
        assert approx_loss(omega, found, **SIZES).item() == pytest.approx(loss, abs=1e-7)
        assert (1.1 - found @ omega).item() == pytest.approx(loss, abs=1e-7)


def test_gradients_by_hand_are_those_of_autograd():
    generator = torch.Generator().manual_seed(0)
    omega, mu = (
        torch.randn(4, generator=generator, dtype=torch.float64).mul(0.3).requires_grad_(True) for _ in range(2)
    )
    wanted = torch.autograd.grad(approx_loss(omega, mu, **SIZES) / 2, [omega, mu])
    for mine, theirs in zip(approx_gradients(omega, mu, **SIZES), wanted, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-6)


def test_gradient_flow_goes_down_and_ends_in_a_positive_and_a_negative_head():
    omega, mu = torch.tensor([0.1, -0.08], dtype=torch.float64), torch.tensor([0.05, -0.1], dtype=torch.float64)
    omegas, mus, losses = gradient_flow(omega, mu, **SIZES, steps=4000)
    assert (losses.diff() <= 1e-12).all() and losses[-1] < 0.9 * ONE_HEAD
    assert omegas[-1, 0] > 0 > omegas[-1, 1] and (omegas[-1] @ mus[-1]).item() == pytest.approx(
        first_order_eta(**SIZES), abs=0.03
    )


def test_risk_of_gradient_descent_is_exact():
    task = Regression()
    batch = task.draw(200_000, generator=torch.Generator().manual_seed(3), length=20)
    x, y, x_q = batch.z[..., :5], batch.z[..., 5], batch.z_q[:, :5]
    eta, risk = gd_optimum(dim=5, length=20, noise=0.1)
    for step in (eta, 0.5):
        measured = (gradient_step(step, x, y, x_q) - batch.y[:, 0]).square().mean().item()
        assert measured == pytest.approx(gd_risk(step, dim=5, length=20, noise=0.1), abs=0.003)
    assert all(gd_risk(eta + e, dim=5, length=20, noise=0.1) > risk for e in (-0.05, 0.05))
    bayes = (ridge(0.1, x, y, x_q) - batch.y[:, 0]).square().mean().item()
    assert bayes == pytest.approx(0.133, abs=0.004)  # of the specification


def test_two_opposite_heads_are_debiased_descent_to_first_order():
    batch = Regression(length=20).draw(2000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x, y, x_q = batch.z[..., :5], batch.z[..., 5], batch.z_q[:, :5]
    errors = []
    for omega in (0.04, 0.02):
        mu = 0.86 / (2 * omega)
        both = attention_predictor(torch.tensor([omega, -omega]).double(), torch.tensor([mu, -mu]).double(), x, y, x_q)
        errors.append((both - gradient_step(0.86, x, y, x_q, debiased=True)).square().mean().sqrt())
    assert errors[0] < 0.03 and errors[0] / errors[1] == pytest.approx(
        4, rel=0.1
    )  # the next term is of third order, over omega


def test_debiased_descent_does_not_see_a_constant_in_the_covariates():
    batch = Regression().draw(5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x, y, x_q = batch.z[..., :5], batch.z[..., 5], batch.z_q[:, :5]
    shifted = gradient_step(0.9, x + 3, y, x_q, debiased=True)
    torch.testing.assert_close(shifted, gradient_step(0.9, x, y, x_q, debiased=True), rtol=0, atol=1e-9)
    assert not gradient_step(0.9, x + 3, y, x_q).allclose(gradient_step(0.9, x, y, x_q))


def test_limits():
    assert single_head_optimum(5, 40, 0.1)[0] == pytest.approx(5**-0.5)
    assert bayes_limit(0.1, 0.0) == pytest.approx(0, abs=1e-9)
    assert bayes_limit(0.5, 1e4) == pytest.approx(
        1e4 + 1, abs=1e-2
    )  # nothing can be learned: noise and the variance of the signal
    assert bayes_limit(5 / 40, 0.1) == pytest.approx(0.1145, abs=0.001)  # what ridge reaches at d = 5
    for call in (
        lambda: bayes_limit(0.0, 0.1),
        lambda: gd_risk(1.0, dim=0, length=1, noise=0.0),
        lambda: mu_star(torch.ones(2), dim=1, length=0, noise=0.0),
    ):
        with pytest.raises(TaskError):
            call()
