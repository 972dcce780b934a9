"""Circuit reuse: the search on tiny models, and a claim that can fail."""

import pytest
import torch

from headwise.errors import ScoreError
from headwise.hub import load_model
from headwise.papers.catalogue import row
from headwise.papers.circuit_reuse import CHECKS, PAPER, PREFIX, chance_overlap, repair_heads
from headwise.papers.reproduction import Reproduction
from headwise.score import find_circuit
from headwise.score.circuit import common
from headwise.units import HeadScores, HeadSet

GOOD = {
    "ioi_accuracy": 1.0,
    "colors_accuracy_of_three": 0.5,
    "shared_of_union": 0.4,
    "shared_of_union_random_x3": 0.1,
    "shared_of_union_worst_seed": 0.3,
    "shared_of_union_random": 0.03,
    "colors_drop_without_ioi_circuit": 1.0,
    "colors_drop_without_random": 0.1,
    "ioi_drop_without_ioi_circuit": 5.0,
    "ioi_drop_without_random": 0.1,
    "repair_gain": 0.3,
    "repair_gain_random_most": 0.0,
}


BOTH = GOOD | {PREFIX + name: value for name, value in GOOD.items()}


def reproduction(**changed):
    return Reproduction("circuit-reuse", PAPER.claim, "cpu", BOTH | changed, {}, CHECKS, 1.0)


@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"repair_gain": 0.05},
        {"repair_gain_random_most": 0.4},
        {"shared_of_union": 0.05},
        {"colors_drop_without_ioi_circuit": 0.0},
        {"ioi_accuracy": float("nan")},
        {"trained_ioi_accuracy": 0.7},
        {"trained_shared_of_union_worst_seed": 0.0},
        {"trained_repair_gain": 0.0},
    ],
)
def test_the_claim_can_fail(changed):
    assert reproduction(**changed).holds is (not changed)


def test_stages_follow_each_other():
    model, _ = load_model("tiny-random-llama")
    found = find_circuit(model, None, count=4, share=0.1, through="q,v")
    assert [stage.through for stage in found.stages] == ["logits", "q", "v"]
    assert found.stages[1].receivers == found.stages[0].kept
    assert all(len(stage.kept) <= 2 for stage in found.stages)
    assert found.overlap(found) == {"union": 1.0, "mine": 1.0, "theirs": 1.0}
    assert common([found, found]) == found.heads
    with pytest.raises(ScoreError, match="share="):
        find_circuit(model, None, share=0.0)


def test_chance_and_the_choice_of_heads():
    scores = HeadScores(values=torch.tensor([[0.5, -0.9, 0.1, 0.0], [0.2, 0.3, -0.1, 0.4]]), method="x")
    some = HeadSet.parse("L0H0,L0H1,L1H1,L1H2")
    assert chance_overlap(scores, some, some, torch.Generator().manual_seed(0)) == pytest.approx(0.35, abs=0.05)
    assert str(repair_heads(scores, scores)) == "L0H0,L0H1,L1H1,L1H3"


def test_the_record_is_of_this_claim():
    found = row("circuit-reuse")
    assert found.problems() == [] and found.status == "partial"
    assert found.record.claim == PAPER.claim and [str(c) for c in found.record.checks] == [str(c) for c in CHECKS]
