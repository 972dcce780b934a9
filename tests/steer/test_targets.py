"""Every target and geodesic against the attention map that its equation describes."""

import math
from types import SimpleNamespace

import pytest
import torch

from headwise.errors import EditError
from headwise.steer import _targets
from headwise.steer._perturb import Perturbation, perturb
from headwise.steer._targets import TARGETS, View
from headwise.units import HeadSet
from tiny_helper import random

IMAGE_FIRST = {"image": slice(0, 9), "text": slice(9, 14)}
TEXT_FIRST = {"text": slice(0, 5), "image": slice(5, 14)}
ORDERS = pytest.mark.parametrize("segments", [IMAGE_FIRST, TEXT_FIRST], ids=["image-first", "text-first"])
HEADS = (1, 4, 6)


def call(segments=IMAGE_FIRST, *, B=2, H=8, K=8, N=14, M=14, D=8, mask=None, cross=False, dtype=torch.float64):
    q, k, v = random(B, H, N, D).to(dtype), random(B, K, M, D, seed=1).to(dtype), random(B, K, M, D, seed=2).to(dtype)
    options = {"segments": segments, "cross": cross}
    return SimpleNamespace(q=q, k=k, v=v, own_values=v, mask=mask, scale=D**-0.5, options=options, layer=3)


def maps(c, beta=1.0):
    """A (B, H, N, M) of all heads, keys and values repeated."""
    G = c.q.shape[1] // c.k.shape[1]
    logits = beta * c.q @ c.k.repeat_interleave(G, 1).mT * c.scale
    if c.mask is not None:
        logits = logits.masked_fill(~c.mask, -torch.inf)
    return logits, logits.softmax(-1), c.v.repeat_interleave(G, 1)


def output(A, v):
    return (A @ v).transpose(1, 2)


def perturbed(c, u, heads=HEADS, **how):
    _, A, v = maps(c)
    units = HeadSet.of([(3, h) for h in heads])
    p = Perturbation(heads=units, u=u, **how)
    with torch.no_grad():
        return perturb(p, c, output(A, v), heads, torch.full((1, len(heads)), float(u), dtype=torch.float64))


def expected(c, A_prime, u, heads=HEADS, rows=slice(None)):
    _, A, v = maps(c)
    mixed = A.clone()
    for h in heads:
        mixed[:, h, rows] = (1 - u) * A[:, h, rows] + u * A_prime[:, h, rows]
    return output(mixed, v)


def target_map(name, c, segments, beta):
    """A' (B, H, N, M) as the equation says it."""
    logits, A, v = maps(c)
    N, M = logits.shape[2:]
    image = segments["image"]
    if name == "identity":
        return torch.eye(N, dtype=A.dtype).expand_as(A)
    if name == "uniform":
        return torch.full_like(A, 1 / M)
    if name == "query-mean":
        return (c.q.mean(2, keepdim=True) @ c.k.mT * c.scale).softmax(-1).expand_as(A)
    if name == "temperature":
        return maps(c, beta)[1]
    diagonal = torch.eye(N, dtype=torch.bool)
    if name == "image-identity":
        gone = torch.zeros(N, M, dtype=torch.bool)
        gone[image, image] = True
        return logits.masked_fill(gone & ~diagonal, -torch.inf).softmax(-1)
    if name == "image-identity-renormalized":
        found, mass = A.clone(), A[:, :, image, image].sum(-1)
        found[:, :, image, image] = torch.diag_embed(mass)
        return found
    kind, rows, keys = name.split("-")
    block = torch.zeros(N, M, dtype=torch.bool)
    block[segments[rows], segments[keys]] = True
    return logits.masked_fill(block, -torch.inf).softmax(-1) if kind == "mask" else A.masked_fill(block, 0.0)


@ORDERS
@pytest.mark.parametrize("u", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("name", TARGETS)
def test_a_target_is_its_map(name, u, segments):
    c = call(segments)
    found = perturbed(c, u, target=name, beta=0.4)
    torch.testing.assert_close(found, expected(c, target_map(name, c, segments, 0.4), u), atol=1e-10, rtol=1e-8)


def test_the_fused_path_in_float32():
    c = call(dtype=torch.float32)
    for u in (0.0, 0.3, 1.0):
        found = perturbed(c, u)
        assert (found - expected(c, target_map("identity", c, IMAGE_FIRST, 1.0), u)).abs().max() < 1e-5


def test_identity_at_one_is_exactly_v_and_other_heads_are_untouched():
    c = call(dtype=torch.float32)
    plain, found = output(*maps(c)[1:]), perturbed(c, 1.0)
    assert torch.equal(found[:, :, list(HEADS)], c.v[:, list(HEADS)].transpose(1, 2))
    others = [h for h in range(8) if h not in HEADS]
    assert torch.equal(found[:, :, others], plain[:, :, others])


@pytest.mark.parametrize("name", ["identity", "uniform", "temperature", "query-mean"])
def test_grouped_queries(name):
    c = call({}, H=8, K=2)
    wide = SimpleNamespace(**{**vars(c), "k": c.k.repeat_interleave(4, 1)})
    A_prime = target_map(name, wide, IMAGE_FIRST, 0.4)
    torch.testing.assert_close(perturbed(c, 0.6, target=name, beta=0.4), expected(c, A_prime, 0.6))


@pytest.mark.parametrize("name", [n for n in TARGETS if not n.startswith("zero")])
def test_rows_sum_to_one(name):
    c = call()
    c.v = c.own_values = torch.ones_like(c.v)
    torch.testing.assert_close(perturbed(c, 0.7, target=name), torch.ones(2, 14, 8, 8).double(), atol=1e-6, rtol=0)


def test_zeroed_blocks_do_not_renormalise():
    c = call()
    c.v = c.own_values = torch.ones_like(c.v)
    found = perturbed(c, 1.0, target="zero-image-text")[:, IMAGE_FIRST["image"], list(HEADS)]
    assert (found < 0.999).all()


@ORDERS
@pytest.mark.parametrize("name", ["identity", "uniform", "query-mean"])
@pytest.mark.parametrize("scope", ["image", "text"])
def test_a_scope_changes_its_rows_only(name, scope, segments):
    c = call(segments)
    rows = segments[scope]
    A_prime = target_map(name, c, segments, 1.0)
    if name == "query-mean":
        A_prime = (c.q[:, :, rows].mean(2, keepdim=True) @ c.k.mT * c.scale).softmax(-1).expand_as(A_prime)
    torch.testing.assert_close(perturbed(c, 0.5, target=name, scope=scope), expected(c, A_prime, 0.5, rows=rows))


def test_the_coldest_temperature_is_the_argmax():
    c = call()
    logits, _, v = maps(c)
    one_hot = torch.nn.functional.one_hot(logits.argmax(-1), 14).double()
    torch.testing.assert_close(perturbed(c, 1.0, target="temperature", beta=math.inf), expected(c, one_hot, 1.0))


def curve(A, u, kind):
    """A~ of a geodesic to identity, row by row as it is defined."""
    N = A.shape[-1]
    one = torch.eye(N, dtype=A.dtype).expand_as(A)
    if kind == "log-linear":
        p = one * (1 - 1e-6) + (1 - one) * 1e-6 / (N - 1)
        mixed = p**u * A.clamp(min=1e-12) ** (1 - u)
        return mixed / mixed.sum(-1, keepdim=True)
    a = A.diagonal(dim1=-2, dim2=-1)[..., None]
    if kind == "fisher-rao":
        s = u * one + (1 - u) * A.sqrt()
    else:
        theta = torch.acos(a.sqrt().clamp(max=1))
        s = torch.sin(u * theta) / theta.sin() * one + torch.sin((1 - u) * theta) / theta.sin() * A.sqrt()
    return s**2 / (s**2).sum(-1, keepdim=True)


@pytest.mark.parametrize("u", [0.0, 0.3, 0.8, 1.0])
@pytest.mark.parametrize("kind", ["fisher-rao", "slerp", "log-linear"])
def test_a_geodesic_needs_no_map(kind, u, monkeypatch):
    monkeypatch.setattr(_targets, "BLOCK", 200)  # several blocks of rows
    c = call()
    _, A, v = maps(c)
    mixed = A.clone()
    mixed[:, list(HEADS)] = curve(A, u, kind)[:, list(HEADS)]
    found = perturbed(c, u, geodesic=kind)
    torch.testing.assert_close(found, output(mixed, v), atol=1e-8, rtol=1e-6)
    assert (curve(A, u, kind).sum(-1) - 1).abs().max() < 1e-6
    if u == 1.0:
        assert (found[:, :, list(HEADS)] - c.v[:, list(HEADS)].transpose(1, 2)).abs().max() < 1e-4


@pytest.mark.parametrize("kind", ["fisher-rao", "slerp", "log-linear"])
def test_a_geodesic_of_ones_is_one(kind):
    c = call()
    c.v = c.own_values = torch.ones_like(c.v)
    torch.testing.assert_close(perturbed(c, 0.4, geodesic=kind), torch.ones(2, 14, 8, 8).double(), atol=1e-6, rtol=0)


def test_slerp_survives_rows_that_are_identity_already():
    c = call()
    c.q = c.k = 40 * torch.nn.functional.one_hot(torch.arange(14) % 14, 14).double().expand(2, 8, 14, 14)
    found = perturbed(c, 0.5, geodesic="slerp")
    assert found.isfinite().all()
    torch.testing.assert_close(found[:, :, list(HEADS)], c.v[:, list(HEADS)].transpose(1, 2), atol=1e-4, rtol=0)


def test_masked_keys_stay_unseen():
    mask = torch.ones(2, 1, 14, 14, dtype=torch.bool)
    mask[0, :, :, :4] = False
    c = call(mask=mask)
    changed = call(mask=mask)
    changed.v = changed.own_values = c.v.clone()
    changed.v[0, :, :4] = 99.0
    for name in ("uniform", "temperature", "query-mean"):
        found, other = perturbed(c, 0.5, target=name), perturbed(changed, 0.5, target=name)
        torch.testing.assert_close(found[0], other[0])


def test_gradients_flow_and_nothing_is_changed_in_place():
    c = call(dtype=torch.float32)
    _, A, v = maps(c)
    out = output(A, v).requires_grad_()
    p = Perturbation(heads=HeadSet.of([(3, h) for h in HEADS]), u=0.5)
    found = perturb(p, c, out * 1.0, HEADS, torch.full((1, 3), 0.5))
    found.sum().backward()
    assert torch.equal(out.grad[:, :, 1], torch.full_like(out.grad[:, :, 1], 0.5))


# bad input


def test_cross_attention_has_no_identity():
    for c in (call(M=5), call(cross=True)):
        with pytest.raises(EditError, match="needs self-attention"):
            perturbed(c, 0.5)
    torch.testing.assert_close(perturbed(call(M=5), 0.5, target="uniform").shape, torch.Size((2, 14, 8, 8)))


def test_unknown_tokens_are_refused():
    with pytest.raises(EditError, match="does not say which tokens are image"):
        perturbed(call({}), 0.5, target="image-identity")
    with pytest.raises(EditError, match="does not say which tokens are text"):
        perturbed(call({}), 0.5, scope="text")
    alone = {"image": slice(0, 14), "text": slice(0, 0)}
    with pytest.raises(EditError, match="sees nothing"):
        perturbed(call(alone), 0.5, target="mask-image-image")


@pytest.mark.parametrize(
    "options, words",
    [
        ({"u": 1.5}, "u is 1.5"),
        ({"u": float("nan")}, "u is nan"),
        ({"target": "zero"}, "target is 'zero'"),
        ({"geodesic": "straight"}, "geodesic is 'straight'"),
        ({"geodesic": "slerp", "target": "uniform"}, "leads to identity only"),
        ({"scope": "video"}, "scope is 'video'"),
        ({"beta": -1.0}, "beta is -1.0"),
        ({"heads": "L0H1"}, "must be a HeadSet"),
        ({"heads": HeadSet.parse("L0H1:1.5")}, "L0H1 has weight 1.5"),
    ],
)
def test_a_bad_perturbation_is_refused(options, words):
    with pytest.raises(EditError, match=words):
        Perturbation(**{"heads": HeadSet.parse("L0H1"), **options})


def test_view_is_made_of_the_call():
    c = call(H=8, K=2)
    view = View(c, (1, 4), torch.zeros(2, 14, 2, 8), slice(0, 14))
    assert view.kv == slice(0, 2, 1)
    assert view.own_probability().shape == (2, 14, 2, 1)
