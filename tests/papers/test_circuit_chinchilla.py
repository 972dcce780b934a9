"""Chinchilla's multiple choice: a claim that can fail, and what a seed measures."""

import pytest
import torch

from headwise.errors import HeadwiseError
from headwise.hub import load_model
from headwise.papers import circuit_chinchilla
from headwise.papers.catalogue import row
from headwise.papers.circuit_chinchilla import CHECKS, PAPER, PREFIX, SMOLLM2_CHECKS
from headwise.papers.reproduction import Reproduction
from headwise.tasks.multiple_choice import choice_pairs

GOOD = {
    "accuracy_letters": 0.9,
    "letter_heads_fewest": 2.0,
    "output_nodes_share": 0.05,
    "accuracy_without_letter_heads": 0.2,
    "accuracy_without_random_least": 0.8,
    "accuracy_rank_3_kept": 0.99,
    "accuracy_rank_0": 0.3,
    "accuracy_rank_3": 0.89,
    "loss_rank_3": 0.4,
    "loss_rank_3_random": 1.4,
    "moved_letters": 0.7,
    "unmoved_letters": 0.03,
    "moved_random": 0.4,
    "unmoved_random": 0.05,
}


BOTH = GOOD | {PREFIX + name: value for name, value in GOOD.items()}


@pytest.mark.parametrize(
    "changed",
    [
        {}, {"accuracy_letters": 0.3}, {"letter_heads_fewest": 0.0}, {"output_nodes_share": 0.5},
        {"accuracy_without_letter_heads": 0.8}, {"accuracy_rank_3_kept": 0.9}, {"accuracy_rank_0": 0.89},
        {"loss_rank_3_random": 0.4}, {"moved_letters": 0.02}, {"moved_random": 0.05}, {"moved_random": 0.7},
        {"accuracy_rank_3_kept": float("nan")}, {"trained_letter_heads_fewest": 0.0}, {"trained_moved_random": 0.8},
    ],
)  # fmt: skip
def test_the_claim_can_fail(changed):
    record = Reproduction("circuit-chinchilla", PAPER.claim, "cpu", BOTH | changed, {}, CHECKS, 1.0)
    assert record.holds is (not changed)


def tiny_prompts(count, seed, labels="letters"):
    """L1 v1 … L4 v4 v of tokens that a tiny model knows."""
    generator, rows = torch.Generator().manual_seed(seed), ([], [], [], [], [], [])
    for n in range(count):
        values = (torch.randperm(50, generator=generator)[:4] + 100).tolist()
        names = [60, 61, 62, 63] if labels == "letters" else (torch.randperm(20, generator=generator)[:4] + 70).tolist()
        body = [9, 9, 9] + [t for pair in zip(names, values, strict=True) for t in pair]
        k, j = n % 4, (n + 1 + n % 3) % 4
        row = (body + [values[k]], body + [values[j]], [3, 5, 7, 9], names, k, j)
        for into, one in zip(rows, row, strict=True):
            into.append(one)
    return choice_pairs(*rows[:4], correct=rows[4], other=rows[5])


def test_a_random_model_does_not_bear_the_claim_out():
    model, _ = load_model("tiny-random-llama")
    found = circuit_chinchilla._one_seed(model, tiny_prompts, 0, 8, 8, 2)
    found |= {"letter_heads_fewest": found["letter_heads"]}
    found["accuracy_rank_3_kept"] = found["accuracy_rank_3"] / max(found["accuracy_letters"], 1e-9)
    assert all(torch.isfinite(torch.tensor(value)) for value in found.values())
    record = Reproduction("circuit-chinchilla", PAPER.claim, "cpu", found, {}, SMOLLM2_CHECKS, 1.0)
    assert not record.holds
    again = circuit_chinchilla._one_seed(model, tiny_prompts, 0, 8, 8, 2)
    assert all(again[name] == pytest.approx(found[name]) for name in again)


def test_refusals(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(HeadwiseError, match="CUDA"):
        circuit_chinchilla.reproduce("gpu")


def test_the_record_is_of_this_claim():
    found = row("circuit-chinchilla")
    assert found.problems() == [] and found.status == "partial"
    assert found.record.claim == PAPER.claim and [str(c) for c in found.record.checks] == [str(c) for c in CHECKS]
