"""LongHeads' op: the fast forms against the text, one query at a time; chunk keys, selection and counting."""

import pytest
import torch

from headwise.attach import find_stack
from headwise.attention.triton import _host
from headwise.budget._longheads import Shape, _largest, attend, gathered, select, sorted_by_chunk, turns
from headwise.budget._longheads_reference import attend as reference
from headwise.budget._longheads_reference import summaries
from headwise.budget._longheads_rotary import Rotation, rotation_of
from headwise.budget._longheads_state import Chunks
from tiny_helper import random, tiny

KERNELS = _host.triton_available() and (torch.cuda.is_available() or _host.interpreting())
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
W, K = 8, 5  # tokens of a chunk, chunks a query
NONE = torch.zeros(1, dtype=torch.long)


def shape(model=None, w=W, k=K, own=True):
    return Shape(w, k, 0.25, rotation_of(find_stack(model or tiny())), own)


def raw(N, H=4, heads=2, seed=0, B=2):
    return (
        random(B, H, N, 16, seed=seed),
        random(B, heads, N, 16, seed=seed + 1),
        random(B, heads, N, 16, seed=seed + 2),
    )


def placed(form, q, k, shift=0):
    """Queries and keys as the model hands them over, rotated to their positions."""
    at = torch.arange(q.shape[2]) + shift
    return form.rotation.turn(q, at), form.rotation.turn(k, at)


def built(q, k, v, form, shift=NONE, step=None):
    state = Chunks.empty(q, k, None)
    for begin in range(0, q.shape[2], step or q.shape[2]):
        end = min(begin + (step or q.shape[2]), q.shape[2])
        state = state.extended(
            q[:, :, begin:end],
            k[:, :, :end],
            v[:, :, :end],
            w=form.w,
            scale=form.scale,
            rotation=form.rotation,
            shift=shift,
        )
    return state


def positions(N, B=2):
    return torch.arange(N).expand(B, -1)


@pytest.mark.parametrize("by_head", [False, True], ids=["group", "head"])
@pytest.mark.parametrize("form", [gathered, sorted_by_chunk])
@pytest.mark.parametrize(("w", "k", "N", "heads"), [(4, 4, 37, 2), (8, 5, 63, 4), (5, 6, 71, 1)])
@pytest.mark.parametrize("own", [True, False])
def test_the_fast_forms_are_the_text(form, w, k, N, heads, by_head, own):
    (q, kk, v), how = raw(N, heads=heads, seed=N), shape(w=w, k=k, own=own)
    wanted, chunks = reference(q, kk, v, how, start=w * k, by_head=by_head)
    q, kk = placed(how, q, kk)
    chosen = select(q, built(q, kk, v, how).keys, positions(N), NONE, how, by_head=by_head)
    got = form(q, kk, v, chosen, positions(N), None, how)
    assert torch.allclose(got[:, :, w * k :].double(), wanted[:, :, w * k :], atol=2e-6)
    group = 4 // heads
    for b, h, t, mine in chunks:
        assert chosen[b, h // group, h % group if by_head else 0, t].nonzero()[:, 0].tolist() == mine


@pytest.mark.parametrize("step", [1, 7, 8, 30])
def test_chunk_keys_grow_as_they_would_at_once(step):
    (q, k, v), how = raw(61), shape()
    wanted = summaries(q, k, v, how)
    q, k = placed(how, q, k)
    assert torch.allclose(built(q, k, v, how, step=step).keys.double(), wanted, atol=1e-5)
    assert wanted.shape[2] == 61 // W


def test_a_chunk_key_is_a_mean_of_local_keys_and_knows_no_other_chunk():
    (q, k, v), how = raw(40), shape()
    same = k.clone()
    local = how.rotation.turn(torch.ones(1, 1, 1, 16), -torch.arange(W))  # keys that are equal once placed
    same[:, :, :W] = local
    first = summaries(q, same, v, how)[:, :, 0]
    assert torch.allclose(first, torch.ones_like(first), atol=1e-6)
    changed = k.clone()
    changed[:, :, 20] += 1
    before, after = summaries(q, k, v, how), summaries(q, changed, v, how)
    differs = (before != after).any(-1).any(0).any(0)
    assert differs.tolist() == [False, False, True, False, False]


def test_a_shift_of_all_positions_changes_nothing():
    (q, k, v), how = raw(61), shape()
    outs = []
    for shift in (0, 37):
        near, far = placed(how, q, k, shift)
        moved = torch.tensor([shift])
        chosen = select(near, built(near, far, v, how, moved).keys, positions(61), moved, how, by_head=False)
        outs.append(sorted_by_chunk(near, far, v, chosen, positions(61), None, how)[:, :, W * K :])
    assert torch.allclose(*outs, atol=1e-4)


def test_what_a_query_reads_is_counted_and_its_positions_stay_below_the_window():
    (q, k, v), how = raw(100), shape()
    near, far = placed(how, q, k)
    chosen = select(near, built(near, far, v, how).keys, positions(100), NONE, how, by_head=True)
    for t in range(W * K, 100):
        row = chosen[:, :, :, t]
        assert bool((row.sum(-1) == K).all())
        assert bool(row[..., [0, t // W - 1, t // W]].all())
        used = int(
            ((torch.arange(100)[:, None] // W == row[0, 0, 0].nonzero()[:, 0]).any(1) & (torch.arange(100) <= t)).sum()
        )
        assert used == (K - 1) * W + t % W + 1
        # distance to the first key of slot j is that of the remapped positions: never the window or more
        steps = turns(chosen, positions(100), how)[0, 0, 0, t]
        distance = (t + steps - torch.arange(len(steps)) * W)[row[0, 0, 0]]
        assert distance.tolist() == [(K - 1 - j) * W + t % W for j in range(K)]


def test_ties_go_to_the_lowest_chunk():
    q, how = raw(100)[0], shape()
    keys = torch.ones(2, 2, 12, 16)
    chosen = select(q, keys, positions(100), NONE, how, by_head=False)
    assert chosen[0, 0, 0, 99].nonzero()[:, 0].tolist() == [0, 1, 2, 11, 12]


def test_selection_follows_content_not_place():
    q, how = raw(100)[0], shape()
    keys = random(2, 2, 12, 16)
    order = torch.tensor([0, 5, 3, 1, 2, 4, 6, 7, 8, 9, 10, 11])
    one = select(q, keys, positions(100), NONE, how, by_head=False)[..., 99, :12]
    two = select(q, keys[:, :, order], positions(100), NONE, how, by_head=False)[..., 99, :12]
    assert torch.equal(one[..., order], two)


def test_the_largest_are_those_of_a_stable_sort():
    scores = torch.randint(0, 4, (200, 9), generator=torch.Generator().manual_seed(0)).float()
    scores[::3, :5] = -torch.inf
    for count in (0, 1, 3, 9, 12):
        best = scores.sort(dim=-1, descending=True, stable=True).indices[..., :count]
        wanted = torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, best, scores.gather(-1, best) > -torch.inf)
        assert torch.equal(_largest(scores, count), wanted)


@pytest.mark.skipif(not KERNELS, reason="needs Triton and a CUDA device, or TRITON_INTERPRET=1")
@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "pairs"])
@pytest.mark.parametrize("starts", [None, (0, 11)], ids=["dense", "padded"])
@pytest.mark.parametrize(
    ("w", "k", "N", "heads", "own"), [(16, 4, 90, 2, True), (5, 6, 71, 1, False), (8, 5, 63, 4, True)]
)
def test_the_kernel_is_the_form_in_torch(w, k, N, heads, own, starts, interleaved):
    how = Shape(w, k, 0.25, Rotation(10.0 ** -torch.linspace(0, 3, 16).to(DEVICE), interleaved), own)
    q, keys, v = (random(2, h, N, 32, seed=h).to(DEVICE) for h in (4, heads, heads))
    at = torch.arange(N, device=DEVICE) - torch.tensor(starts or (0, 0), device=DEVICE)[:, None]
    chunk_keys = random(2, heads, N // w, 32, seed=9).to(DEVICE)
    for by_head in (False, True):
        chosen = select(q, chunk_keys, at, torch.zeros(1, dtype=torch.long, device=DEVICE), how, by_head=by_head)
        for rows in (slice(w * k + 11, N), slice(N - 1, N)):
            part = q[:, :, rows], keys, v, chosen[:, :, :, rows], at[:, rows], starts, how
            assert torch.allclose(attend(*part), sorted_by_chunk(*part), atol=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_the_kernel_at_the_published_shape(dtype):
    how = Shape(256, 16, 128**-0.5, Rotation(1e4 ** -torch.linspace(0, 1, 64, device="cuda")))
    q, keys, v = (random(1, h, 6001, 128, seed=h).to("cuda", dtype) for h in (8, 4, 4))
    at, zero = torch.arange(6001, device="cuda")[None], torch.zeros(1, dtype=torch.long, device="cuda")
    chosen = select(q, random(1, 4, 23, 128, seed=9).cuda(), at, zero, how, by_head=False)
    part = q[:, :, 4096:], keys, v, chosen[:, :, :, 4096:], at[:, 4096:], None, how
    wide = (x.float() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in part)
    got, wanted = attend(*part).float(), sorted_by_chunk(*wide)
    assert (got - wanted).norm() <= (2e-2 if dtype != torch.float32 else 1e-4) * wanted.norm()
