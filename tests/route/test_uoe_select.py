"""The rule of a union of experts: patches, whole sequences, capacity, what it refuses."""

import pytest
import torch
from torch.nn import functional as F

from headwise.errors import RouteError
from headwise.route import Router, UnionTopK


def routed(rule, x, real=None):
    router = Router(rule, width=x.shape[-1], experts=4, causal=False, generator=torch.Generator().manual_seed(0))
    return router(x, real=real)


def test_patches_and_sequences_choose_as_one_and_ignore_padding():
    x = torch.randn(2, 12, 8)
    real = torch.ones(2, 12, dtype=torch.bool)
    real[1, 9:] = False
    patches = routed(UnionTopK(k=2, over="patch", patch=4), x, real)
    assert (patches.index.view(2, 3, 4, 2) == patches.index.view(2, 3, 4, 2)[:, :, :1]).all()
    wild = torch.where(real[..., None], x, 1e3)
    torch.testing.assert_close(routed(UnionTopK(k=2, over="patch", patch=4), wild, real).gates(), patches.gates())
    whole = routed(UnionTopK(k=2, over="sequence"), x, real)
    assert (whole.index == whole.index[:, :1]).all()
    mean = F.softmax(x[1, :9].mean(0) @ _rows(x).T, -1)
    torch.testing.assert_close(whole.probs[1, 0], mean, rtol=1e-4, atol=1e-5)


def _rows(x):
    rule = UnionTopK(k=2)
    return Router(rule, width=x.shape[-1], experts=4, generator=torch.Generator().manual_seed(0)).W.detach()


def test_capacity_drops_the_lowest_gates_and_says_how_many():
    x, real = 10 * torch.randn(2, 16, 8), torch.ones(2, 16, dtype=torch.bool)
    real[1, 12:] = False
    free, tight = routed(UnionTopK(k=2), x, real), routed(UnionTopK(k=2, capacity=0.25), x, real)
    for b, room in ((0, 4), (1, 3)):
        taken, wanted = tight.mask()[b].bool(), free.mask()[b].bool()
        assert (taken.sum(0) <= room).all() and (taken & ~wanted).sum() == 0
        for e in range(4):
            kept, lost = free.probs[b, taken[:, e], e], free.probs[b, wanted[:, e] & ~taken[:, e], e]
            assert not lost.numel() or (len(kept) == room and kept.min() >= lost.max())
    assert tight.statistics()["dropped"] > 0 == free.statistics()["dropped"]
    assert torch.equal(tight.gates(), routed(UnionTopK(k=2, capacity=0.25), x, real).gates())


def test_rules_check_themselves():
    with pytest.raises(RouteError, match="k is 5"):
        Router(UnionTopK(k=5), width=8, experts=4)
    with pytest.raises(RouteError, match="constant"):
        UnionTopK(k=1)
    with pytest.raises(RouteError, match="less than one"):
        routed(UnionTopK(k=2, capacity=0.05), torch.randn(1, 8, 8))
    with pytest.raises(RouteError, match="divide"):
        routed(UnionTopK(k=2, over="patch", patch=5), torch.randn(1, 8, 8))
