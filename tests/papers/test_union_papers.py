"""The reproductions of papers 06 and 24: what they measure in a few steps, and that their verdicts can be false."""

from dataclasses import replace

import pytest
import torch

from headwise.errors import HeadwiseError
from headwise.papers import Reproduction, bam, uoe
from headwise.papers._bam_domains import DOMAINS, Size, batch, held_out, small_parallel_lm, text, train
from headwise.papers._small_lm import Size as LMSize
from headwise.papers.catalogue import rows

TINY = Size(width=16, heads=2, hidden=16, seed_steps=2, branch_steps=2, mix_steps=2, batch=3, length=24)


def test_domains_do_not_overlap_and_batches_repeat():
    lines = [set(bytes(text("sums", split).tolist()).decode().split("\n")) for split in ("haystack", "eval")]
    assert not lines[0] & lines[1] and min(map(len, lines)) > 1000
    assert all(eval(line.split(";")[0].replace("=", "==")) for line in list(lines[1])[:50])
    one, two = (batch(DOMAINS, TINY, torch.Generator().manual_seed(4), "haystack") for _ in range(2))
    assert torch.equal(one, two) and one.shape == (3, 24)


def test_training_a_specialist_lowers_its_loss_and_leaves_the_random_state():
    size = replace(TINY, width=32, batch=8)
    state = torch.random.get_rng_state()
    model = small_parallel_lm(size, 0)
    before = held_out(model, size, count=2)["sums"]
    train(model, ["sums"], 25, size, 0, 3e-3)
    assert held_out(model, size, count=2)["sums"] < before - 0.5
    assert torch.equal(torch.random.get_rng_state(), state)


def test_bam_measures_every_mixture_from_the_same_sources():
    found = bam.measure(0, replace(bam.SCALES["cpu"], size=TINY))
    names = ("bam", "bam_shared", "bam_top1", "btx", "copies", "soup", "dense")
    assert {k for k in found if k.startswith("start_")} == {f"start_{n}" for n in names}
    assert {k for k in found if k.startswith("loss_")} == {f"loss_{n}" for n in (*names, "seed")}
    assert found["start_soup"] != found["start_btx"] != found["start_bam"]


def test_uoe_measures_losses_and_savings():
    size = LMSize(width=32, heads=4, hidden=16, steps=3, batch=2, length=32)
    found = uoe.measure(0, replace(uoe.SCALES["cpu"], size=size))
    assert found["kv_ratio_gate"] == 0.5 and 0.25 <= found["attention_products_gate"] < 0.5
    assert found["router_moved_none"] == 0 < found["router_moved_gate"]
    assert {k for k in found if k.startswith("loss_")} == {
        f"loss_{n}" for n in ("dense", "thin", "gate", "balanced", "none", "random", "union")
    }


def test_thin_models_have_half_of_the_heads_and_hidden_units():
    scale = uoe.SCALES["cpu"]
    dense, thin = uoe._dense(scale, 0), uoe._thin(scale, 0)
    block, other = dense.model.layers[0], thin.model.layers[0]
    assert other.self_attn.q_proj.out_features * 2 == block.self_attn.q_proj.out_features
    assert other.self_attn.head_dim == block.self_attn.head_dim
    assert other.mlp.gate_proj.out_features * 2 == block.mlp.gate_proj.out_features


@pytest.mark.parametrize("module", [bam, uoe])
def test_verdicts_come_from_the_numbers(module):
    record = next(row.record for row in rows() if row.slug == module.PAPER.slug)
    assert record is not None and record.claim == module.PAPER.claim
    values = dict(record.numbers)
    for check in module.CHECKS:  # each check alone can be false
        right = values[check.right] if isinstance(check.right, str) else float(check.right)
        wrong = right + 1 if check.op.startswith("<") or check.op == "==" else right - 1
        broken = Reproduction(
            module.PAPER.slug, module.PAPER.claim, "cpu", {**values, check.left: wrong}, {}, (check,), 1
        )
        assert not broken.holds, check
        fine = {"<": right - 1, "<=": right, ">": right + 1, ">=": right, "==": right}[check.op]
        kept = Reproduction(module.PAPER.slug, module.PAPER.claim, "cpu", {**values, check.left: fine}, {}, (check,), 1)
        assert kept.holds, check


@pytest.mark.parametrize("module", [bam, uoe])
def test_scales_are_checked(module):
    with pytest.raises(HeadwiseError, match="'tpu'"):
        module.reproduce("tpu")
    if not torch.cuda.is_available():
        with pytest.raises(HeadwiseError, match="CUDA"):
            module.reproduce("gpu")
