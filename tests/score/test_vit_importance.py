"""Pruning heads of vision transformers: fast equals slow, and every way of pruning is what it says."""

import copy

import pytest
import torch
from transformers import (
    DeiTConfig,
    DeiTForImageClassificationWithTeacher,
    Dinov2Config,
    Dinov2ForImageClassification,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersForImageClassification,
    IJepaConfig,
    IJepaForImageClassification,
    SwinConfig,
    SwinForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

import headwise
from headwise.attach import attach, find_stack
from headwise.attach.ablate import ablate
from headwise.attach.projection import output_projection
from headwise.edits import Edit
from headwise.errors import AttachError, ScoreError, UnitError
from headwise.score._vision import find_grid
from headwise.score._vit_prune import METRICS, jensen_shannon, remove_heads
from headwise.score.vit_importance import (
    gate_gradient,
    importance_of,
    partial_importance,
    pruning_curve,
    spatial_importance,
)
from headwise.units import HeadSet
from tiny_helper import random, tiny

FIELDS = dict(
    hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=64, image_size=32, patch_size=8
)
WIDE = {"num_labels": 5, "initializer_range": 0.15}
CLASSES = {
    "vit": (ViTConfig, ViTForImageClassification, {}, (4, 4, 1)),
    "rectangle": (ViTConfig, ViTForImageClassification, {"image_size": (32, 48)}, (4, 6, 1)),
    "deit": (DeiTConfig, DeiTForImageClassificationWithTeacher, {}, (4, 4, 2)),
    "dinov2": (Dinov2Config, Dinov2ForImageClassification, {"layerscale_value": 0.5}, (4, 4, 1)),
    "registers": (
        Dinov2WithRegistersConfig,
        Dinov2WithRegistersForImageClassification,
        {"num_register_tokens": 3},
        (4, 4, 4),
    ),
    "no-cls": (IJepaConfig, IJepaForImageClassification, {}, (4, 4, 0)),
}
EACH = pytest.mark.parametrize("name", CLASSES)


def model(name="vit", **options):
    config, cls, more, _ = CLASSES[name]
    torch.manual_seed(0)
    return cls._from_config(config(**{**FIELDS, **WIDE, **more, **options}), attn_implementation="sdpa").eval()


def images(name="vit", count=3, seed=0):
    return random(count, 3, 32, 48 if name == "rectangle" else 32, seed=seed)


@torch.no_grad()
def logits(made, pixels):
    return made(pixel_values=pixels).logits


def slow(made, pixels, prune=None):
    """One whole forward per head: logits (L, H, B, C)."""
    stack, rows = find_stack(made), []
    for layer in range(stack.layers):
        row = []
        for head in range(stack.heads):
            edit = (prune or Edit.zero)(HeadSet.of([(layer, head)]))
            with attach(made, edits=edit):
                row.append(logits(made, pixels))
        rows.append(torch.stack(row))
    return torch.stack(rows)


@EACH
@pytest.mark.parametrize("copies", [1, 5, 256])
def test_the_resumed_sweep_is_one_forward_per_head(name, copies):
    made, pixels = model(name), images(name)
    found = importance_of(made, pixels, copies=copies)
    before, after = logits(made, pixels), slow(made, pixels)
    y = before.argmax(-1)
    chosen = after.log_softmax(-1).gather(-1, y.expand(3, 4, -1)[..., None])[..., 0]
    loss = before.log_softmax(-1).gather(-1, y[:, None])[:, 0] - chosen
    torch.testing.assert_close(found.values["loss"], loss, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(found.values["flip"], (after.argmax(-1) != y).float())
    divergence = jensen_shannon(before.log_softmax(-1).expand_as(after), after.log_softmax(-1))
    torch.testing.assert_close(found.values["js"], divergence, atol=1e-5, rtol=1e-3)
    assert (found.grid.rows, found.grid.columns, found.grid.prefix) == CLASSES[name][3]


def test_the_ways_of_pruning():
    made, pixels = model(), images()
    for prune, edit in (("identity", lambda u: Edit.mix_v(u, 1.0)), ("uniform", lambda u: Edit.mix_uniform(u, 1.0))):
        found = importance_of(made, pixels, prune=prune)
        after = slow(made, pixels, edit).log_softmax(-1)
        before = logits(made, pixels).log_softmax(-1).expand_as(after)
        torch.testing.assert_close(found.values["kl"], (before.exp() * (before - after)).sum(-1), atol=1e-5, rtol=1e-3)


def test_the_mean_of_one_image_is_its_own_output():
    made, pixels = model(), images(count=1)
    found = importance_of(made, pixels, prune="mean")
    assert all(found.values[name].abs().max() < 1e-5 for name in METRICS)
    assert importance_of(made, images(count=4), prune="mean").values["js"].max() > 0


def test_a_gate_of_ones_is_the_model_to_the_bit():
    made, pixels = model(), images()
    plain = logits(made, pixels)
    with attach(made, edits=Edit.scale(HeadSet.parse("L0H0,L1H3"), 1.0)):
        assert torch.equal(logits(made, pixels), plain)


@pytest.mark.parametrize("name", ["vit", "deit", "dinov2", "registers", "no-cls"])
def test_a_gate_is_zeroed_columns_is_a_head_cut_out(name):
    made, pixels, heads = model(name), images(name), HeadSet.parse("L0H1,L0H3,L2H0")
    with ablate(made, heads):
        gated = logits(made, pixels)
    zeroed, cut = copy.deepcopy(made), copy.deepcopy(made)
    with torch.no_grad():
        for layer, head in heads.pairs():
            output_projection(find_stack(zeroed), layer).weight[:, head * 8 : head * 8 + 8] = 0
    torch.testing.assert_close(logits(zeroed, pixels), gated, atol=1e-6, rtol=1e-5)
    remove_heads(cut, heads)
    torch.testing.assert_close(logits(cut, pixels), gated, atol=1e-5, rtol=1e-4)
    assert sum(p.numel() for p in cut.parameters()) < sum(p.numel() for p in made.parameters())


def test_a_layer_cannot_lose_all_its_heads():
    made = model()
    before = copy.deepcopy(made.state_dict())
    with pytest.raises(AttachError, match="at least one must stay"):
        remove_heads(made, HeadSet.parse("L0H1,L1H0,L1H1,L1H2,L1H3"))
    assert all(torch.equal(a, b) for a, b in zip(before.values(), made.state_dict().values(), strict=True))


def test_a_dead_head_scores_nothing():
    made, pixels = model(), images()
    with torch.no_grad():
        output_projection(find_stack(made), 1).weight[:, 16:24] = 0
    found = importance_of(made, pixels, torch.tensor([0, 1, 2]))
    assert set(found.values) == set(METRICS)
    for name, table in found.values.items():
        assert table[1, 2].abs().max() < 1e-6, name
        assert table[1, 3].abs().max() > 1e-6 or name == "flip", name
    gradient = gate_gradient(made, pixels)
    assert gradient.values[1, 2] == 0 < gradient.values[1, 3]


def test_heads_before_a_linear_read_out_add_up():
    made, pixels = model(), images()
    made.vit.layernorm = torch.nn.Identity()
    torch.nn.init.zeros_(made.vit.layers[2].mlp.fc2.weight)
    plain, effect = logits(made, pixels), {}
    for heads in ("L2H0", "L2H3", "L2H0,L2H3"):
        with ablate(made, heads):
            effect[heads] = logits(made, pixels) - plain
    torch.testing.assert_close(effect["L2H0,L2H3"], effect["L2H0"] + effect["L2H3"], atol=1e-5, rtol=1e-4)


def test_jensen_shannon():
    p, q = random(50, 6).log_softmax(-1) * 3, random(50, 6, seed=1).log_softmax(-1)
    p = p.log_softmax(-1)
    torch.testing.assert_close(jensen_shannon(p, q), jensen_shannon(q, p))
    assert ((jensen_shannon(p, q) > 0) & (jensen_shannon(p, q) <= 1)).all()
    assert jensen_shannon(p, p).abs().max() < 1e-6
    apart = torch.tensor([[0.0, -80.0]]), torch.tensor([[-80.0, 0.0]])
    torch.testing.assert_close(jensen_shannon(*apart), torch.ones(1))


def test_batches_do_not_matter_and_labels_do():
    made, pixels, labels = model(), images(count=5), torch.tensor([0, 1, 2, 3, 4])
    whole, parts = importance_of(made, pixels, labels), importance_of(made, pixels, labels, batch_size=2)
    for name in METRICS:
        torch.testing.assert_close(whole.values[name], parts.values[name], atol=1e-5, rtol=1e-4)
    assert not torch.equal(whole.values["loss"], importance_of(made, pixels).values["loss"])
    assert whole.by_class("loss", labels, 6)[5].isnan().all()
    torch.testing.assert_close(whole.by_class("loss", labels, 6)[2], whole.values["loss"][..., 2])
    assert -1 <= whole.correlations()["probability", "js"] <= 1


def test_the_gate_gradient_is_the_slope_of_the_loss():
    made, pixels = model().double(), images(count=1).double()
    found, step = gate_gradient(made, pixels), 1e-4
    y = logits(made, pixels).argmax(-1)
    for layer, head in ((0, 1), (2, 3)):
        losses = []
        for value in (1 - step, 1 + step):
            with attach(made, edits=Edit.scale(HeadSet.of([(layer, head)]), value)):
                losses.append(torch.nn.functional.cross_entropy(logits(made, pixels), y))
        slope = float(losses[1] - losses[0]) / (2 * step)
        assert abs(found.values[layer, head] - abs(slope)) < 1e-5


def test_the_pruning_curve_is_accuracy_without_the_first_heads():
    made, pixels = model(), images(count=6)
    labels = logits(made, pixels).argmax(-1)
    order = [(0, 1), (1, 2), (2, 0), (2, 1)]
    curve = pruning_curve(made, pixels, labels, order, counts=[0, 2, 4], batch_size=4)
    assert curve[0] == 1.0
    for k, accuracy in zip((2, 4), curve[1:], strict=True):
        with ablate(made, HeadSet.of(order[:k])):
            assert accuracy == int((logits(made, pixels).argmax(-1) == labels).sum()) / 6
    assert 0 <= pruning_curve(made, pixels, labels, order, counts=[4], prune="mean")[0] <= 1
    with pytest.raises(ScoreError, match="0 to 4 heads"):
        pruning_curve(made, pixels, labels, order, counts=[5])


@pytest.mark.parametrize("name", ["vit", "registers", "no-cls"])
def test_all_blocks_pruned_is_the_head_pruned(name):
    made, pixels = model(name), images(name)
    found = partial_importance(made, pixels, head=(1, 2))
    whole = importance_of(made, pixels)
    for metric, value in found["all"].items():
        assert abs(value - float(whole.values[metric][1, 2].mean())) < 1e-5, metric
    blocks = {"patch-patch"} if name == "no-cls" else {"prefix-prefix", "prefix-patch", "patch-prefix", "patch-patch"}
    assert set(found) == blocks | {"all"}


def test_a_renormalised_block_keeps_the_rest_of_its_rows():
    made, pixels = model(), images()
    plain, scaled = (partial_importance(made, pixels, head=(0, 1), renormalize=r) for r in (False, True))
    assert plain["patch-prefix"]["js"] != scaled["patch-prefix"]["js"]
    assert abs(plain["all"]["js"] - scaled["all"]["js"]) < 1e-6  # rows that lose everything give 0 either way


@pytest.mark.parametrize("side", ["to", "from"])
def test_the_spatial_map_is_one_forward_per_patch(side):
    made, pixels = model(), images()
    found = spatial_importance(made, pixels, head=(1, 2), side=side, copies=7)
    before = logits(made, pixels).log_softmax(-1)

    def cut(call, attend):
        out = attend().clone()
        if call.layer == 1:
            A = (call.q[:, 2] @ call.k[:, 2].mT * call.scale).softmax(-1)
            if side == "to":
                A[:, :, 1 + 6] = 0
            else:
                A[:, 1 + 6] = 0
            out[:, :, 2] = A @ call.v[:, 2]
        return out

    with attach(made, transforms=[cut]):
        after = logits(made, pixels).log_softmax(-1)
    assert found.shape == (4, 4)
    assert abs(float(found[1, 2]) - float(jensen_shannon(before, after).mean())) < 1e-5


def test_the_method_and_its_file(tmp_path):
    made, pixels = model(), images()
    scores = headwise.score.vit_importance(made, None, images=pixels, metric="kl")
    scores.save(tmp_path / "s.safetensors")
    loaded = headwise.HeadScores.load(tmp_path / "s.safetensors")
    assert loaded == scores
    loaded.check(headwise.fingerprint(made))
    clip = tiny("clip")
    assert (
        headwise.score.vit_importance(clip, None, samples=2, metric="embedding", stack="vision_model").values.max() > 0
    )
    assert headwise.score.vit_importance(made, None, samples=2, metric="gate-gradient").values.min() >= 0


def test_the_model_is_left_as_it_was():
    made, pixels = model().train(), images()
    hooks = [sorted(vars(m)) for m in made.modules()]
    importance_of(made, pixels)
    assert made.training
    assert [sorted(vars(m)) for m in made.modules()] == hooks


def test_bfloat16_ranks_alike():
    made, pixels = model(), images(count=8)
    wide = importance_of(made, pixels).scores("js")
    narrow = importance_of(made.bfloat16(), pixels).scores("js")
    assert wide.rank_correlation(narrow) > 0.8


@pytest.mark.parametrize(
    "options, error, words",
    [
        ({"images": torch.zeros(0, 3, 32, 32)}, ScoreError, "at least one image"),
        ({"images": torch.zeros(3, 32, 32)}, ScoreError, r"images is \(3, 32, 32\)"),
        ({"labels": torch.zeros(2)}, ScoreError, "labels must be a tensor of 3"),
        ({"metric": "auc"}, ScoreError, "metric='auc'"),
        ({"prune": "half"}, ScoreError, "prune='half'"),
        ({"samples": 0, "images": None}, ScoreError, "samples is 0"),
    ],
)
def test_bad_input(options, error, words):
    with pytest.raises(error, match=words):
        headwise.score.vit_importance(model(), None, **{"images": images(), **options})


def test_models_without_a_grid_or_a_classifier():
    with pytest.raises(ScoreError, match="needs class logits"):
        headwise.score.vit_importance(tiny("clip"), None, samples=2, stack="vision_model")
    with pytest.raises(ScoreError, match=r"17 tokens do not hold 3 × 9 patches.*give grid="):
        find_grid(model(), images(), 17, (3, 9), None)
    with pytest.raises(UnitError, match="L9H0 does not exist"):
        partial_importance(model(), images(), head=(9, 0))
    swin = SwinForImageClassification(
        SwinConfig(image_size=32, patch_size=2, embed_dim=16, depths=[1, 1], num_heads=[2, 2], window_size=4)
    )
    with pytest.raises(AttachError, match="another number of heads in each stage"):
        headwise.score.vit_importance(swin, None, images=images())
