"""VHD and image-centric heads: against brute force, planted heads, batches, and clear errors."""

import pytest
import torch

import headwise
from headwise.attach import attach
from headwise.attach.divergence import divergence, top_sum, vision_aware, without_outliers
from headwise.attach.observe import observe
from headwise.errors import AttachError, EditError, ScoreError, TaskError
from headwise.hub import load_model
from headwise.score.vhd import token_vhd, vhd_samples
from headwise.tasks.pictures import picture_batches
from vlm_helper import IMAGE, PATCHES, llava, one_of, prompt, qwen2_vl

ROWS = ([1, "img", 7, 8, 9, 10], [1, 2, 3, "img", 7, 8])


def head_outputs(model, inputs, rows=1):
    """(L, T, H, D) of the last positions of a batch of one, recorded by `observe`."""
    with torch.no_grad(), observe(model, "output", stack="language_model") as record:
        model(**inputs)
    return torch.stack([record.output(layer)[0, -rows:] for layer in range(record.layers)])


def text_of(inputs):
    ids = inputs["input_ids"]
    ids = ids[ids != IMAGE][None]
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


@pytest.mark.parametrize("padding", ["left", "right"])
def test_equals_brute_force_row_by_row(padding):
    model, inputs = llava(), prompt(*ROWS, padding=padding)
    found = vhd_samples(model, inputs, outliers=False)
    for row in range(2):
        alone = one_of(inputs, row, [row])
        expected = (head_outputs(model, alone) - head_outputs(model, text_of(alone)))[:, 0].norm(dim=-1)
        torch.testing.assert_close(found[row], expected, atol=1e-5, rtol=1e-5)
    assert (found >= 0).all()


def test_several_images():
    model, inputs = llava(), prompt([1, "img", 7, "img", 8, 9])
    found = vhd_samples(model, inputs, outliers=False)[0]
    expected = (head_outputs(model, inputs) - head_outputs(model, text_of(inputs)))[:, 0].norm(dim=-1)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_planted_heads():
    model, inputs = llava(), prompt(ROWS[0])

    def plant(call, attend):
        out = attend().clone()
        if call.layer == 2:
            of_image = call.attend(key_weight=lambda at: ((at >= 1) & (at <= PATCHES)).float())
            out[:, :, 0] = of_image[:, :, 0] * 20 if call.q.shape[2] > PATCHES else 0.0  # reads the image alone
            first = call.attend(key_weight=lambda at: (at == 0).float())
            out[:, :, 1] = first[:, :, 1] / call.attend(key_weight=lambda at: (at == 0).float(), ones=True)[:, :, 1]
        return out

    with attach(model, transforms=[plant], stack="language_model"):
        table = vhd_samples(model, inputs, outliers=False)[0]
    assert int(table[2].argmax()) == 0 and table[2, 1] < 1e-5 < table[2, 2:].min()


def test_divergence_and_its_rules():
    x = torch.randn(2, 5, 6, 8, generator=torch.Generator().manual_seed(0))
    assert not divergence(x, x).any() and divergence(x, x, "cosine").abs().max() < 1e-6
    torch.testing.assert_close(divergence(2 * x, x, "relative"), torch.ones(2, 5, 6))
    values = torch.rand(3, 4, 8, generator=torch.Generator().manual_seed(1))
    assert (vision_aware(values).sum(-1) == 4).all() and not vision_aware(torch.ones(3, 8)).any()
    torch.testing.assert_close(top_sum(values, 8), values.sum((-1, -2)))
    assert (top_sum(values, 2) < top_sum(values, 3)).all()
    with pytest.raises(EditError, match="k is 9"):
        top_sum(values, 9)
    with pytest.raises(EditError, match="k is 0"):
        top_sum(values, 0)


@pytest.mark.parametrize(
    ("high_vhd", "high_text", "removed"), [(True, True, True), (True, False, False), (False, True, False)]
)
def test_outlier_needs_both(high_vhd, high_text, removed):
    values, text = torch.ones(6), torch.ones(6, 4)
    values[2], text[2] = (9.0 if high_vhd else 1.0), (9.0 if high_text else 1.0)
    found = without_outliers(values, text)
    assert (found[2] == 0) == removed and torch.equal(found[3:], values[3:])


def test_tokens_one_by_one():
    model, inputs = llava(), prompt([1, "img", 7, 8, 9, 10, 11])
    found = token_vhd(model, inputs, tokens=3, k=4)  # k = H: the sum over all heads
    difference = head_outputs(model, inputs, rows=4) - head_outputs(model, text_of(inputs), rows=4)
    torch.testing.assert_close(found[0], difference.norm(dim=-1).sum((0, 2))[:-1], atol=1e-4, rtol=1e-5)
    with pytest.raises(EditError, match="k is 5"):
        token_vhd(model, inputs, tokens=3, k=5)


def test_scores_are_means_over_prompts_whatever_the_batch():
    model, tokenizer = load_model("tiny-random-llava")
    scores = headwise.score.vhd(model, tokenizer, samples=5, batch_size=5)
    again = headwise.score.vhd(model, tokenizer, samples=5, batch_size=2)
    torch.testing.assert_close(scores.values, again.values)
    tables = torch.cat([vhd_samples(model, b) for b in picture_batches(model, tokenizer, 5)])
    torch.testing.assert_close(scores.values, tables.mean(0))
    assert scores.method == "vhd" and scores.data == "5 scenes" and scores.fingerprint.heads == 4
    model, inputs = qwen2_vl()
    assert headwise.score.vhd(model, None, batches=[inputs]).values.shape == (3, 4)


def test_image_heads_against_maps():
    model, inputs = load_model("tiny-random-llava", attn_implementation="eager")[0], prompt(ROWS[0])
    with torch.no_grad():
        maps = torch.stack(model(**inputs, output_attentions=True).attentions)[:, 0]  # (L, H, N, M)
    image = inputs["input_ids"][0] == IMAGE
    mass = maps[:, :, 17:, image].sum(-1)
    found = headwise.score.image_heads(model, None, batches=[inputs], measure="mass")
    torch.testing.assert_close(found.values, mass.mean(-1), atol=1e-5, rtol=1e-5)
    centric = headwise.score.image_heads(model, None, batches=[inputs], minimum_mass=0.6)
    torch.testing.assert_close(centric.values, (mass >= 0.6).float().mean(-1))
    sunk = headwise.score.image_heads(model, None, batches=[inputs], dims="5,9", tau=1.5, measure="sink-share")
    strict = headwise.score.image_heads(model, None, batches=[inputs], dims="5,9", tau=1.5, minimum_mass=0.6)
    assert 0 < sunk.values.max() <= 1 and (strict.values <= centric.values).all()


def test_image_heads_hardly_depend_on_padding():
    model = llava()
    left, right = (prompt(*ROWS, padding=side) for side in ("left", "right"))
    tables = [headwise.score.image_heads(model, None, batches=[b], dims="5", tau=1.5).values for b in (left, right)]
    torch.testing.assert_close(*tables)


def test_refused():
    model, tokenizer = load_model("tiny-random-llava")
    with pytest.raises(AttachError, match="no image token"):
        headwise.score.vhd(*load_model("tiny-random-llama"))
    with pytest.raises(TaskError, match="give batches="):
        headwise.score.vhd(*load_model("tiny-random-qwen2-vl"))
    with pytest.raises(ScoreError, match="measure='x'"):
        headwise.score.image_heads(model, tokenizer, measure="x")
    with pytest.raises(ScoreError, match="no text query stands behind"):
        headwise.score.image_heads(model, tokenizer, batches=[prompt([1, 2, "img"])])
    with pytest.raises(ScoreError, match="at least one"):
        headwise.score.vhd(model, tokenizer, batches=[])
    with pytest.raises(ScoreError, match="tokens is 0"):
        token_vhd(model, prompt(ROWS[0]), tokens=0)
    assert not model.model._forward_pre_hooks and model.config.text_config._attn_implementation == "sdpa"
