"""Attention against distance: known attention gives known profiles, and streaming changes nothing."""

import pytest
import torch
from transformers import InternVLVisionConfig, InternVLVisionModel

import headwise
from headwise.attach import attach
from headwise.errors import ScoreError
from headwise.score._vision import Grid
from headwise.score._vit_profile import Profiler, attention_rows, distances
from headwise.score.vit_strength import strength_map, strength_of
from tiny_helper import random, tiny

GRID = Grid(5, 7, 2)
P, T = GRID.patches, GRID.prefix


def profile(A, grid=GRID, kind="chebyshev", renormalize=False, without_top=0.0):
    profiler = Profiler(grid, kind, renormalize, without_top)
    return {name: value / len(A) for name, value in profiler.summed(A).items()}


def attention(patches):
    """(1, 1, N, N): patches attend by `patches` (P, P), prefix tokens uniformly."""
    A = torch.full((1, 1, P + T, P + T), 1 / (P + T), dtype=torch.float64)
    A[:, :, T:] = 0
    A[:, :, T:, T:] = patches
    return A


def test_identity_has_all_its_mass_at_zero():
    found = profile(attention(torch.eye(P, dtype=torch.float64)))
    assert found["mass"][0, 0] == 1
    assert found["mass"][0, 1:].abs().max() == 0
    assert found["distance"][0] == 0
    assert found["largest"][0] < 1


def test_uniform_attention_has_the_mass_of_its_rings():
    found = profile(attention(torch.full((P, P), 1 / P, dtype=torch.float64)))
    ring = distances(GRID, "chebyshev")[1]
    sizes = torch.stack([(ring == k).sum(-1).double().mean() for k in range(int(ring.max()) + 1)])
    torch.testing.assert_close(found["mass"][0], sizes / P)
    torch.testing.assert_close(found["strength"][0], torch.full_like(sizes, 1 / P))


def test_masses_and_prefix_add_up_to_one():
    A = torch.rand(3, 4, P + T, P + T, dtype=torch.float64).softmax(-1)
    found = profile(A)
    torch.testing.assert_close(found["mass"].sum(-1) + found["patch_to_prefix"], torch.ones(4, dtype=torch.float64))
    torch.testing.assert_close(found["prefix_to_prefix"] + found["prefix_to_patch"], torch.ones(4, dtype=torch.float64))
    torch.testing.assert_close(profile(A, renormalize=True)["mass"].sum(-1), torch.ones(4, dtype=torch.float64))


def test_profiles_are_their_definition():
    A = torch.rand(2, 3, P + T, P + T, dtype=torch.float64).softmax(-1)
    found, distance = profile(A), distances(GRID, "euclidean")[0]
    euclid = profile(A, kind="euclidean")
    patch = A[:, :, T:, T:]
    torch.testing.assert_close(euclid["distance"], (patch * distance).sum(-1).mean((0, 2)))
    hops = distances(GRID, "chebyshev")[1]
    for k in (0, 1, 3):
        each = [patch[:, :, i, hops[i] == k].mean(-1) for i in range(P) if (hops[i] == k).any()]
        torch.testing.assert_close(found["strength"][:, k], torch.stack(each).mean((0, 1)))


def test_a_local_pattern_is_the_same_wherever_it_is_planted():
    """Each patch attends to its neighbour (dy, dx): inside, the strength at hop 1 does not depend on the direction."""
    found, big = [], Grid(9, 9, 0)
    dy, dx = big.offsets()
    for step in ((0, 1), (1, 0), (-1, -1)):
        patches = ((dy == step[0]) & (dx == step[1])).double()
        found.append(profile(patches[None, None], big)["inner"][0])
    assert all(torch.allclose(one, found[0]) for one in found)
    assert found[0][1] == pytest.approx(1 / 8)


def test_without_the_keys_that_draw_most():
    A = torch.rand(2, 2, P + T, P + T, dtype=torch.float64).softmax(-1)
    A[:, :, :, T + 3] += 5.0  # a sink
    A = A / A.sum(-1, keepdim=True)
    with_sink, without = profile(A), profile(A, without_top=0.01)
    assert without["mass"].sum() < with_sink["mass"].sum() / 2
    assert torch.equal(profile(A, without_top=0.0)["mass"], with_sink["mass"])


def test_streaming_changes_nothing(monkeypatch):
    model, images = tiny("vit"), random(5, 3, 32, 32)
    whole = strength_of(model, images)
    monkeypatch.setattr("headwise.score._vit_profile.BLOCK", 4 * 17 * 17)
    parts = strength_of(model, images, batch_size=2)
    for name, table in whole.tables.items():
        torch.testing.assert_close(parts.tables[name], table, atol=1e-6, rtol=1e-5)
    assert whole["mass"].shape == (2, 4, 4)
    assert [t.shape for t in whole.layer_trend()] == [(2, 4)] * 2


def normed_queries():
    options = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "use_qk_norm": True,
    }
    torch.manual_seed(0)
    config = InternVLVisionConfig(**options, image_size=(32, 32), patch_size=(8, 8))
    return InternVLVisionModel._from_config(config, attn_implementation="sdpa").eval()


@pytest.mark.parametrize("make", [lambda: tiny("vit"), normed_queries], ids=["vit", "normed queries"])
def test_recomputed_rows_are_what_the_fused_kernel_used(make):
    model, gaps = make(), []
    watch = lambda call, out: gaps.append((attention_rows(call) @ call.v).transpose(1, 2).sub(out).abs().max())
    with attach(model, observers=[watch]), torch.no_grad():
        model(pixel_values=random(2, 3, 32, 32))
    assert len(gaps) == 2 and max(gaps) < 1e-4


def test_profiles_of_a_model_with_normed_queries():
    found = strength_of(normed_queries(), random(2, 3, 32, 32))
    total = found["mass"].sum(-1) + found["patch_to_prefix"]
    torch.testing.assert_close(total, torch.ones(2, 4), atol=1e-5, rtol=0)


def test_the_map_of_one_head():
    model, images = tiny("vit"), random(2, 3, 32, 32)
    found = strength_map(model, images, head=(1, 2), hop=0)
    seen = []
    with attach(model, observers=[lambda call, out: seen.append(attention_rows(call))]), torch.no_grad():
        model(pixel_values=images)
    torch.testing.assert_close(found.flatten(), seen[1][:, 2].mean(0).diagonal()[1:])
    with pytest.raises(ScoreError, match="layer is 2"):
        strength_map(model, images, head=(2, 0))


def test_the_method():
    scores = headwise.score.vit_strength(tiny("vit"), None, samples=3, distance="euclidean")
    assert scores.values.shape == (2, 4)
    assert scores.meta["grid"] == "4x4"
    assert headwise.score.vit_strength(tiny("clip"), None, samples=2, stack="vision_model").values.min() > 0


def test_bad_input():
    model, images = tiny("vit"), random(2, 3, 32, 32)
    with pytest.raises(ScoreError, match="distance='manhattan'"):
        strength_of(model, images, distance="manhattan")
    with pytest.raises(ScoreError, match="without_top=1.5"):
        strength_of(model, images, without_top=1.5)
    with pytest.raises(ScoreError, match="'spread' was not measured"):
        strength_of(model, images)["spread"]
    causal = tiny("llama")
    with attach(causal, observers=[lambda call, out: attention_rows(call)]):
        with pytest.raises(ScoreError, match="needs unmasked, bidirectional"):
            causal(torch.arange(5)[None])
