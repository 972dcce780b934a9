"""The training loop: a run that was killed goes on to the bit, and what it refuses."""

import pytest
import torch

from headwise.errors import ArtifactError, TaskError
from headwise.models.loop import Run, checkpoints, train, warm_cosine


def learner(width=4):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, width), torch.nn.Tanh(), torch.nn.Linear(width, 1))
    matrices = [p for p in model.parameters() if p.ndim == 2]
    rest = [p for p in model.parameters() if p.ndim != 2]
    return model, [torch.optim.Muon(matrices, lr=0.02), torch.optim.AdamW(rest, lr=0.01)]


def fit(run, width=4, until=None):
    """Losses and model; `until`: the step before which the process dies."""
    model, optimizers = learner(width)
    generator = torch.Generator().manual_seed(3)

    def loss_of(step):
        if step == until:
            raise KeyboardInterrupt
        x = torch.randn(8, 3, generator=generator)
        return (model(x) - x.sum(1, keepdim=True)).square().mean()

    return train(run, model, optimizers, loss_of, rate=warm_cosine(2, run.steps), generator=generator), model


def test_a_killed_run_goes_on_to_the_bit(tmp_path):
    whole, model = fit(Run(steps=9))
    folder = str(tmp_path / "run")
    with pytest.raises(KeyboardInterrupt):
        fit(Run(steps=9, folder=folder, save_every=2), until=7)
    assert sorted(checkpoints(folder)) == [4, 6]
    losses, again = fit(Run(steps=9, folder=folder, save_every=2, resume=True))
    assert losses == whole and sorted(checkpoints(folder)) == [8, 9]
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    assert fit(Run(steps=9, folder=folder, resume=True), until=0)[0] == whole  # complete: only read


def test_a_checkpoint_cut_short_is_passed_over(tmp_path):
    whole, _ = fit(Run(steps=6, folder=str(tmp_path), save_every=2))
    newest = checkpoints(tmp_path)[6]
    newest.write_bytes(newest.read_bytes()[:200])
    assert fit(Run(steps=6, folder=str(tmp_path), resume=True))[0] == whole


def test_it_learns_and_ends_in_eval_mode():
    losses, model = fit(Run(steps=300))
    assert sum(losses[-30:]) < 0.5 * sum(losses[:30]) and not model.training


def test_refused(tmp_path):
    with pytest.raises(TaskError, match="steps is 0"):
        Run(steps=0)
    with pytest.raises(TaskError, match="need folder="):
        Run(steps=3, save_every=1)
    fit(Run(steps=2, folder=str(tmp_path), save_every=2))
    with pytest.raises(ArtifactError, match="checkpoint of another model"):
        fit(Run(steps=2, folder=str(tmp_path), resume=True), width=5)
