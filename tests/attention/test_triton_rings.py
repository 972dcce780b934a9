"""Rings on the device against loops: where tokens go, how many are held, how the work is split."""

import pytest
import torch
from test_triton_common import kernel_device


@pytest.mark.parametrize(("B", "K", "D"), [(1, 1, 16), (3, 2, 24), (2, 9, 64)])
def test_steps_against_loops(B, K, D):
    """Twenty tokens through rings of every kind: storages, positions, counts and the plan for the decode kernel."""
    device = kernel_device()
    from headwise.attention.triton import plan_splits
    from headwise.attention.triton.rings import Counters, advance, write

    L, C, gen = 2, 70, torch.Generator().manual_seed(0)

    def draw(low, high):
        return torch.randint(low, high, (L, B, K), generator=gen, dtype=torch.int32)

    limit = draw(5, 40)
    limit[0, 0, 0] = 70  # never turns
    filled = torch.minimum(draw(0, 40), limit)
    wrap = torch.minimum(draw(0, 6), limit - 1)
    at = torch.where(filled < limit, filled, wrap)
    rings = Counters.of(
        *(x.clone().to(device) for x in (at, filled, wrap, limit)), torch.arange(B, dtype=torch.int32, device=device)
    )
    k, v = (torch.zeros(L, B, K, C, D, device=device) for _ in range(2))
    positions = torch.full((L, B, K, C), -1, dtype=torch.int32, device=device)
    tables = [
        torch.tensor([[[x[l, b, h].data_ptr() for h in range(K)] for b in range(B)] for l in range(L)], device=device)
        for x in (k, v, positions)
    ]
    tables[2][:, :, 0] = 0  # the first head keeps no positions
    want_k, want_v, want_p = k.clone(), v.clone(), positions.clone()
    means, lost = [], {}  # the last head counts what it lost, the first keeps no means, those between count it as one
    for _ in range(L):
        numbers = torch.zeros(B, K, device=device)
        weigh = torch.tensor([0, *[1] * (K - 2), 2][-K:], dtype=torch.int32, device=device)
        hats = torch.zeros(2, B, K, D, device=device)
        means.append((hats[0], hats[1], numbers, torch.full_like(numbers, -torch.inf), weigh))
    for step in range(20):
        new = torch.randn(L, 2, B, 1, K, D, generator=gen).to(device).transpose(3, 4)  # (L, 2, B, K, 1, D), strided
        advance(rings)
        for l in range(L):
            pointers = (t[l] for t in tables)
            write(new[l, 0], new[l, 1], *pointers, rings.slot[l], rings.gone[l], rings.position, means[l])
        for l, b, h in torch.cartesian_prod(torch.arange(L), torch.arange(B), torch.arange(K)).tolist():
            slot = int(at[l, b, h])
            if int(filled[l, b, h]) == int(limit[l, b, h]):
                lost.setdefault((l, b, h), []).append(torch.stack([want_k[l, b, h, slot], want_v[l, b, h, slot]]))
            want_k[l, b, h, slot], want_v[l, b, h, slot] = new[l, 0, b, h, 0], new[l, 1, b, h, 0]
            if h:
                want_p[l, b, h, slot] = b + step + 1
            at[l, b, h] = slot + 1 if slot + 1 < int(limit[l, b, h]) else int(wrap[l, b, h])
            filled[l, b, h] = min(int(filled[l, b, h]) + 1, int(limit[l, b, h]))
    for have, want in ((k, want_k), (v, want_v), (positions, want_p), (rings.at, at), (rings.filled, filled)):
        assert torch.equal(have.cpu(), want.cpu())
    assert B * K == 1 or any(len(gone) > 3 for gone in lost.values())
    for (l, b, h), gone in lost.items():
        k_hat, v_hat, number, log_count, weigh = means[l]
        kind, average = int(weigh[h]), torch.stack(gone).mean(0)
        if kind:
            torch.testing.assert_close(torch.stack([k_hat[b, h], v_hat[b, h]]), average, rtol=1e-5, atol=1e-5)
        assert float(number[b, h]) == (len(gone) if kind else 0)
        want = [-torch.inf, 0.0, torch.tensor(float(len(gone))).log()][kind]
        assert float(log_count[b, h]) == pytest.approx(float(want))
    for l in range(L):
        plan, own = plan_splits(rings.filled[l].contiguous()), rings.splits(l)
        assert all(torch.equal(getattr(plan, name), getattr(own, name)) for name in ("starts", "first", "share"))
        assert plan.programs == own.programs


def test_too_many_pairs_are_refused():
    """The one-program plan has a bound."""
    numbers = torch.zeros(1, 1000, 9, dtype=torch.int32)
    from headwise.attention.triton.rings import Counters

    with pytest.raises(ValueError, match="at most"):
        Counters.of(numbers, numbers, numbers, numbers, torch.zeros(1000, dtype=torch.int32))
