"""Dialects: the answer stands d tokens back, noise is what it says, bad sizes are refused."""

import pytest
import torch

from headwise.errors import TaskError
from headwise.tasks.dialects import make_dialects


def generator():
    return torch.Generator().manual_seed(0)


def test_the_answer_stands_d_tokens_back():
    made = make_dialects(40, length=12, noise=0.0, generator=generator())
    assert set(made.dialect.tolist()) == {0, 1, 2, 3}
    for ids, labels, dialect in zip(made.ids, made.labels, made.dialect, strict=True):
        d = int(dialect) + 1
        assert int(ids[0]) == 32 + int(dialect)
        for t in range(12):  # a causal model reads ids[: t + 1] and is asked for labels[t + 1]
            known = t - d >= 1  # only words are asked for, not the dialect's name
            assert int(labels[t + 1]) == (int(ids[t - d]) if known else -100)


def test_a_share_of_the_answers_is_random():
    clean = make_dialects(400, noise=0.0, generator=generator())
    noisy = make_dialects(400, noise=0.25, generator=generator())
    asked = clean.labels != -100
    changed = (clean.labels != noisy.labels)[asked].float().mean().item()
    assert changed == pytest.approx(0.25 * 31 / 32, abs=0.02)


@pytest.mark.parametrize(
    "options, problem", [({"length": 5}, "length is 5"), ({"noise": 1.5}, "noise is 1.5"), ({"count": 0}, "count is 0")]
)
def test_bad_sizes(options, problem):
    count = options.pop("count", 2)
    with pytest.raises(TaskError, match=problem):
        make_dialects(count, generator=generator(), **options)
