"""Patterns of heads: known ones are recovered and named, and the atlas is the same for the same seed."""

import pytest
import torch

import headwise
from headwise.errors import ScoreError
from headwise.score._vision import Grid
from headwise.score._vit_autoencoder import SIDE, clusters, fit, name_of, patterns, plane, planted, purity
from headwise.score.vit_patterns import atlas_of
from tiny_helper import random, tiny

KINDS = ("self", "local", "row", "column", "uniform", "spot")


@pytest.mark.parametrize("grid", [Grid(6, 6, 0), Grid(5, 7, 1), Grid(14, 14, 1)])
def test_known_patterns_get_their_names(grid):
    A, truth = planted(KINDS, 3, grid, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(A.sum(-1), torch.ones(18, grid.patches))
    assert [name_of(one, grid, 0.0) for one in A] == [KINDS[t] for t in truth]
    assert name_of(A[0], grid, 0.9) == "prefix"


def test_pictures_have_one_size_and_tell_positions_apart():
    for grid in (Grid(4, 4, 1), Grid(5, 7, 1), Grid(14, 14, 1)):
        A, _ = planted(("self", "row"), 1, grid, generator=torch.Generator().manual_seed(0), noise=0.0)
        made = patterns(A, grid)
        assert made.shape == (2, 2, SIDE, SIDE)
        assert made.min() >= 0 and made.max() <= 1
        assert made[0, 0, SIDE // 2, SIDE // 2] == made[0, 0].max()
    centre = patterns(torch.eye(64)[None], Grid(8, 8, 0))[0, 0]
    assert centre.sum() == centre[SIDE // 2, SIDE // 2] == 1


def test_planted_patterns_are_recovered():
    grid = Grid(6, 6, 0)
    A, truth = planted(KINDS, 25, grid, generator=torch.Generator().manual_seed(1))
    pictures = patterns(A, grid)
    trained = fit(pictures, torch.arange(len(A)), latent=8, steps=120, seed=0)
    with torch.no_grad():
        latents = trained.model.encode(pictures)
    assert trained.r2 > 0.6
    assert purity(clusters(latents, 12, 0), truth) >= 0.9
    assert purity(truth[torch.randperm(len(truth))], truth) < 0.6  # the measure can say no


def test_clusters_and_planes_of_equal_points():
    assert clusters(torch.zeros(5, 3), 4, 0).tolist() == [0] * 5
    assert plane(random(6, 4)).shape == (6, 2)
    points = torch.cat([torch.zeros(4, 2), torch.full((4, 2), 9.0)])
    labels = clusters(points, 2, 0)
    assert len(labels[:4].unique()) == len(labels[4:].unique()) == 1
    assert labels[0] != labels[4]


def test_the_atlas():
    model, images = tiny("vit"), random(6, 3, 32, 32)
    found = atlas_of(model, images, latent=4, count=3, steps=20, batch_size=4)
    assert found.latents.shape == (6, 2, 4, 4)
    assert found.plane.shape == (6, 2, 4, 2)
    assert found.cluster.shape == (6, 2, 4)
    assert found.pictures.shape == (int(found.cluster.max()) + 1, 2, SIDE, SIDE)
    assert found.mean.shape == (2, 4, 16, 16)
    assert found.of_head().shape == (2, 4)
    rows = found.table(torch.arange(8.0).view(2, 4))
    assert sum(heads for *_, heads in rows) == 8
    again = atlas_of(model, images, latent=4, count=3, steps=20)
    torch.testing.assert_close(again.latents, found.latents, atol=1e-4, rtol=1e-3)
    assert atlas_of(model, images, latent=4, count=3, steps=20, seed=1).latents.ne(found.latents).any()


def test_patterns_that_never_change_depend_on_no_content():
    same = random(1, 3, 32, 32).expand(5, -1, -1, -1).contiguous()
    assert atlas_of(tiny("vit"), same, latent=4, steps=5).content_dependence().max() < 1e-6
    scores = headwise.score.vit_patterns(tiny("vit"), None, images=random(5, 3, 32, 32), latent=4, steps=5)
    assert scores.values.min() > 0
    assert scores.values.mean() <= 1


def test_bad_input():
    with pytest.raises(ScoreError, match="latent is 0"):
        atlas_of(tiny("vit"), random(2, 3, 32, 32), latent=0)
    with pytest.raises(ScoreError, match="kind='blob'"):
        planted(("blob",), 1, Grid(4, 4, 0), generator=torch.Generator())
    with pytest.raises(ScoreError, match="at least one image"):
        atlas_of(tiny("vit"), random(0, 3, 32, 32))
