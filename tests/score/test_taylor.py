"""First-order importance and output norms: against definitions, finite differences, padding and bad input."""

import pytest
import torch

from headwise import Edit, HeadSet, attach, fingerprint
from headwise.attach import find_stack
from headwise.attach.projection import output_projection
from headwise.errors import TaskError
from headwise.hub import load_model
from headwise.score import output_norm, taylor


@pytest.fixture
def ids():
    return torch.randint(0, 256, (2, 12), generator=torch.Generator().manual_seed(3))


def summed_loss(model, ids, scales=None):
    """Loss in nats, times the labels, with head outputs scaled by (L, B, N, H)."""
    transforms = [] if scales is None else [lambda call, attend: attend() * scales[call.layer][..., None]]
    with attach(model, transforms=transforms), torch.no_grad():
        return float(model(ids, labels=ids).loss.double() * ids.numel())


def test_the_score_is_the_mean_size_of_the_derivative_by_a_factor_on_the_output(ids):
    model, _ = load_model("tiny-random-llama", dtype="float64")
    values = taylor(model, None, batches=[{"input_ids": ids, "labels": ids}]).values
    layer, head, wanted = 1, 2, 0.0
    for b in range(2):
        for t in range(12):
            sides = []
            for step in (0.02, -0.02):  # the model's loss is computed in float32
                scales = torch.ones(3, 2, 12, 4, dtype=torch.float64)
                scales[layer, b, t, head] += step
                sides.append(summed_loss(model, ids, scales))
            wanted += abs(sides[0] - sides[1]) / 0.04 / 24
    assert float(values[layer, head]) == pytest.approx(wanted, rel=1e-2)


def test_it_ranks_the_head_without_which_the_loss_changes_most():
    model, tokenizer = load_model("tiny-random-llama")
    with torch.no_grad():  # a head that writes nothing
        model.model.layers[1].self_attn.o_proj.weight[:, 16:32] = 0
    values = taylor(model, tokenizer, tokens=64, window=64).values
    assert float(values[1, 1]) == 0
    assert int((values == 0).sum()) == 1
    assert float(output_norm(model, tokenizer, tokens=64, window=64).values[1, 1]) == 0


def test_the_model_is_left_as_it_was(ids):
    model, tokenizer = load_model("tiny-random-llama")
    model.train()
    model.model.embed_tokens.weight.requires_grad_(False)
    wanted = {name: p.requires_grad for name, p in model.named_parameters()}
    scores = taylor(model, tokenizer, tokens=32, window=16)
    assert model.training
    assert {name: p.requires_grad for name, p in model.named_parameters()} == wanted
    assert all(p.grad is None for p in model.parameters())
    assert not model.model._forward_pre_hooks
    assert scores.fingerprint == fingerprint(model)
    output_norm(model, tokenizer, tokens=32, window=16)
    assert model.training


def test_the_score_under_other_edits_is_that_of_the_edited_model(ids):
    model, _ = load_model("tiny-random-llama")
    with attach(model, edits=Edit.zero(HeadSet.parse("L2H0"))):
        values = taylor(model, None, batches=[{"input_ids": ids, "labels": ids}]).values
    assert float(values[2, 0]) == 0
    assert (values[:2] > 0).all()


def test_padding_counts_for_nothing(ids):
    model, _ = load_model("tiny-random-llama")
    padded = torch.cat([torch.full((2, 4), 256), ids], 1)
    mask = torch.cat([torch.zeros(2, 4, dtype=torch.long), torch.ones_like(ids)], 1)
    labels = padded.masked_fill(mask == 0, -100)
    labels[:, 4] = -100  # nothing predicts the first token of a row without padding
    wanted = ids.clone()
    wanted[:, 0] = -100
    inputs = {"input_ids": padded, "attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
    for score in (taylor, output_norm):
        a = score(model, None, batches=[{**inputs, "labels": labels}]).values
        b = score(model, None, batches=[{"input_ids": ids, "labels": wanted}]).values
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3"])
def test_output_norms_are_those_of_the_projected_heads(name, ids):
    model, _ = load_model(f"tiny-random-{name}")
    outs = []
    with attach(model, observers=[lambda call, out: outs.append(out.detach())]):
        model(ids)
    projection = output_projection(find_stack(model), 1)
    bias = projection.bias if getattr(projection, "bias", None) is not None else 0
    wanted = []
    for head in range(4):
        alone = torch.zeros_like(outs[1])
        alone[:, :, head] = outs[1][:, :, head]
        wanted.append((projection(alone.flatten(2)) - bias).norm(dim=-1).mean())
    values = output_norm(model, None, batches=[{"input_ids": ids}]).values
    torch.testing.assert_close(values[1], torch.stack(wanted).detach(), rtol=1e-4, atol=1e-5)


def test_a_classifier_of_images_is_scored_by_its_own_loss():
    model, _ = load_model("tiny-random-vit")
    batch = {"pixel_values": torch.randn(2, 3, 32, 32), "labels": torch.tensor([1, 3])}
    assert (taylor(model, None, batches=[batch]).values > 0).all()


def test_the_seed_chooses_the_text():
    model, tokenizer = load_model("tiny-random-llama")
    one, two, other = (taylor(model, tokenizer, tokens=32, window=32, seed=s).values for s in (0, 0, 1))
    assert torch.equal(one, two)
    assert not torch.equal(one, other)


@pytest.mark.parametrize("score", [taylor, output_norm])
@pytest.mark.parametrize(
    "options, problem",
    [
        ({"tokens": 16, "window": 32}, "tokens is 16"),
        ({"window": 1}, "window is 1"),
        ({"tokens": 9000, "window": 9000}, "context is 4096"),
        ({"batches": []}, "number of batches is 0"),
        ({"text": "short", "window": 32}, "windows of 32 tokens"),
    ],
)
def test_bad_input(score, options, problem):
    model, tokenizer = load_model("tiny-random-llama")
    with pytest.raises(TaskError, match=problem):
        score(model, tokenizer, **options)


def test_models_without_text_or_loss_are_refused():
    model, _ = load_model("tiny-random-vit")
    with pytest.raises(TaskError, match="no causal language model with a tokenizer"):
        taylor(model, None)
    with pytest.raises(TaskError, match="gave no loss"):
        taylor(model, None, batches=[{"pixel_values": torch.randn(1, 3, 32, 32)}])


@pytest.mark.smollm2
@pytest.mark.slow
def test_taylor_and_norm_disagree_on_a_real_model():
    """First-order importance sees the first layers, which write little and matter most."""
    model, tokenizer = load_model("smollm2")
    importance = taylor(model, tokenizer, tokens=256, window=256)
    norms = output_norm(model, tokenizer, tokens=256, window=256)
    assert importance.values[:2].mean() > 2 * importance.values[2:].mean()
    assert norms.values[:2].mean() < norms.values[2:].mean()
    assert abs(importance.rank_correlation(norms)) < 0.6
