"""The reproduction of DuoAttention: its numbers exist, its checks can fail, and the GPU measurement runs anywhere in small."""

import pytest
import torch
from transformers import LlamaConfig

import headwise
from headwise.errors import HeadwiseError
from headwise.hub import load_model
from headwise.papers import Reproduction, duoattention, row
from headwise.papers.duoattention import PAPER, RECALL_CHECKS, llama_3_8b, measure_decoding, measure_recall, reproduce
from headwise.tasks import make_passkey
from headwise.units import HeadScores, HeadSet

GOOD = {
    "recall_full": 1.0,
    "recall_duo_25pct": 1.0,
    "recall_loss_25pct": 0.0,
    "recall_inverse_25pct": 0.0,
    "recall_random_25pct": 0.3,
    "recall_random_10pct": 0.1,
    "recall_duo_10pct": 0.8,
    "ppl_duo_25pct": 17.0,
    "ppl_inverse_25pct": 19.0,
    "cache_share_25pct": 0.37,
}


def made(numbers: dict[str, float]) -> Reproduction:
    return Reproduction(
        paper=PAPER.slug,
        claim=PAPER.claim,
        scale="cpu",
        metrics=numbers,
        baselines={},
        checks=RECALL_CHECKS,
        seconds=1.0,
    )


@pytest.mark.parametrize(
    "name, value",
    [
        ("recall_full", 0.5),
        ("recall_loss_25pct", 0.2),
        ("recall_inverse_25pct", 0.6),
        ("recall_random_25pct", 1.0),
        ("recall_random_10pct", 0.9),
        ("ppl_duo_25pct", 20.0),
        ("cache_share_25pct", 1.0),
    ],
)
def test_every_check_can_fail(name, value):
    assert made(GOOD).holds
    assert len(made(GOOD | {name: value}).failed()) == 1


def test_a_model_that_cannot_retrieve_does_not_bear_the_claim_out():
    metrics, baselines = measure_recall("tiny-random-llama", prompts=2, length=400, draws=2)
    run = made(metrics | baselines)
    assert not run.holds and run.numbers["recall_full"] < 0.9
    assert run.numbers["cache_bytes_streaming"] < run.numbers["cache_bytes_duo_25pct"] < run.numbers["cache_bytes_full"]


def test_decoding_is_measured_on_any_device():
    config = LlamaConfig(
        vocab_size=320,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    metrics, baselines = measure_decoding(config, tokens=2000, batches=(1, 2), device="cpu", sinks=4, window=12)
    for rows in (1, 2):
        dense = 2 * 2 * 16 * 3 * 2 * 2000 * rows
        assert baselines[f"cache_bytes_dynamic_b{rows}"] == baselines[f"cache_bytes_full_b{rows}"] == dense
        assert metrics[f"cache_bytes_duo_b{rows}"] == pytest.approx(dense * (2000 + 16) / 4000, rel=0.01)
        assert metrics[f"step_speedup_b{rows}"] > 0
    assert metrics["cache_over_formula"] < 1.02
    assert [str(check) for check in duoattention._gpu_checks(metrics)][-1].startswith("step of 1 rows")


def test_the_formula_at_the_papers_size():
    """KV of Llama-3-8B at 131072 tokens in bf16: 16.00 GiB, 8.02 GiB with half of the heads streaming."""
    config, gates = llama_3_8b(), torch.rand(32, 8, generator=torch.Generator().manual_seed(0))
    plan = headwise.budget.duo(headwise.HeadScores(values=gates, kind="kv", method="x"), sparsity=0.5)
    sizes = dict(head_dim=config.hidden_size // config.num_attention_heads, dtype=torch.bfloat16)
    gib = [int(p.bytes(131072, **sizes).sum()) / 2**30 for p in (headwise.HeadPlan.full(32, 8), plan)]
    assert [round(x, 2) for x in gib] == [16.0, 8.02]


def test_the_gpu_scale_needs_a_gpu():
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(HeadwiseError, match="CUDA"):
        reproduce("gpu")


def test_the_declaration_is_borne_out():
    assert row("duoattention").problems() == []


@pytest.mark.smollm2
@pytest.mark.slow
def test_the_choice_of_heads_carries_the_claim_on_a_real_model():
    """Recall and bytes of the claim over two texts of 640 tokens and one random draw; the recorded run has four of 1024, three draws,
    and perplexity, which needs texts longer than these."""
    model, tokenizer = load_model("smollm2")
    generator = torch.Generator().manual_seed(1000)
    keys = [make_passkey(tokenizer, length=640, depth=depth, generator=generator) for depth in (0.1, 0.75)]
    scores = headwise.score.duo_instant(model, tokenizer, sinks=duoattention.SINKS, window=duoattention.WINDOW)
    bench = duoattention.Bench(model, keys, torch.empty(0), 640)
    inverse = HeadScores(values=-scores.values, kind="kv", method="inverse")
    full, size = bench.recall(HeadSet.empty("kv").complement(scores.layers, scores.units), scores)
    quarter, smaller = bench.recall(duoattention._top(scores, 23), scores)
    tenth, smallest = bench.recall(duoattention._top(scores, 9), scores)
    (drawn,) = scores.random_sets(23, 1, generator=generator)
    assert full >= 0.9 and quarter >= full - 0.1 and tenth > 0.5
    assert bench.recall(duoattention._top(inverse, 23), scores)[0] <= 0.3
    assert bench.recall(drawn, scores)[0] < quarter
    assert smallest < smaller <= 0.45 * size
