"""The op's own kernels, reached through `headwise.attention` and through an attached model, against the reference."""

import pytest
import torch

import headwise
from headwise.attention import Compensation, KVGroup, attention
from headwise.attention.crossover import Crossover
from headwise.cache import HeadwiseCache, HeadwiseLayer
from headwise.errors import AttentionError
from headwise.hub import load_model
from headwise.plan import Full, HeadPlan, SinkWindow


def draw(*shape, seed=0, dtype=torch.bfloat16, device="cuda"):
    return torch.randn(*shape, generator=torch.Generator(device).manual_seed(seed), device=device, dtype=dtype)


def close(a, b, tol=2e-2):
    assert a.isfinite().all()
    assert (a.float() - b.float()).norm() <= tol * b.float().norm()


def test_without_cuda_it_refuses_and_says_so():
    q = draw(1, 2, 4, 16, device="cpu")
    with pytest.raises(AttentionError, match="CUDA"):
        attention(q, q, q, backend="triton")
    assert attention(q, q, q, explain=True).ran.backend == "sdpa"


@pytest.mark.gpu
@pytest.mark.parametrize("start", [None, [0, 37]])
def test_windows(start):
    q, k, v = draw(2, 8, 700, 64), draw(2, 4, 700, 64, seed=1), draw(2, 4, 700, 64, seed=2)
    patterns = [Full(), SinkWindow(4, 60), SinkWindow(16, 128), Full()]
    start = None if start is None else torch.tensor(start, device="cuda")
    for t in (q, k, v):
        t.requires_grad_()
    found = attention(q, k, v, patterns=patterns, start=start, backend="triton")
    wanted = attention(q, k, v, patterns=patterns, start=start, backend="reference")
    close(found, wanted)
    grad = draw(*found.shape, seed=3)
    for a, b in zip(
        torch.autograd.grad(found, (q, k, v), grad), torch.autograd.grad(wanted, (q, k, v), grad), strict=True
    ):
        close(a, b)


@pytest.mark.gpu
def test_routed_queries():
    q, k, v = draw(2, 8, 513, 64), draw(2, 4, 513, 64, seed=1), draw(2, 4, 513, 64, seed=2)
    active = draw(2, 8, 513, seed=3) > 0
    gate = draw(2, 8, 513, seed=4)
    options = {"active": active, "gate": gate}
    found = attention(q, k, v, **options, backend="triton")
    close(found, attention(q, k, v, **options, backend="reference"))
    assert (found[~active] == 0).all()


@pytest.mark.gpu
@pytest.mark.parametrize("compensated", [False, True])
def test_ragged_decode(compensated):
    B, D = 3, 64
    q = draw(B, 8, 1, D)
    extra = Compensation(
        draw(B, 1, D, seed=9).float(), draw(B, 1, D, seed=10).float(), torch.full((B, 1), 3.0, device="cuda")
    )
    groups = [
        KVGroup((0, 2), draw(B, 2, 1000, D, seed=1), draw(B, 2, 1000, D, seed=2)),
        KVGroup((1,), draw(B, 1, 77, D, seed=3), draw(B, 1, 77, D, seed=4), SinkWindow(4, 73),
                torch.cat([torch.arange(4), torch.arange(927, 1000)])[torch.randperm(77)].cuda()[None, None], complete=True,
                compensation=extra if compensated else None),
        KVGroup((3,), draw(B, 1, 1000, D, seed=5), draw(B, 1, 1000, D, seed=6)),
    ]  # fmt: skip
    options = {"groups": groups, "offset": 999, "return_lse": True}
    found, wanted = attention(q, **options, backend="triton"), attention(q, **options, backend="reference")
    close(found.out, wanted.out)
    close(found.lse, wanted.lse, 1e-3)


@pytest.mark.gpu
def test_an_attached_model_decodes_alike_by_both_backends(monkeypatch):
    model, _ = load_model("tiny-random-llama", device="cuda")
    model = model.to(torch.float32)
    plan = HeadPlan(patterns=((Full(), SinkWindow(2, 8)),) * 3)
    ids = torch.randint(3, 90, (2, 60), generator=torch.Generator().manual_seed(0)).cuda()
    logits = {}
    for name, least in (("library", 1 << 40), ("own", 1)):
        ones = {name: 1 for name in Crossover.__dataclass_fields__ if name not in ("device", "dtype", "measured")}
        table = Crossover(device="any", dtype="float32", **{**ones, "decode": least})
        monkeypatch.setattr("headwise.attention.crossover.lookup", lambda *given, table=table: table)
        with torch.no_grad(), headwise.attach(model, plan=plan):
            cache = HeadwiseCache(plan)
            model(ids[:, :40], past_key_values=cache)
            steps = [model(ids[:, i : i + 1], past_key_values=cache).logits for i in range(40, 60)]
        logits[name] = torch.cat(steps, dim=1)
    torch.testing.assert_close(logits["own"], logits["library"], atol=2e-4, rtol=1e-3)


@pytest.mark.gpu
def test_chunks_behind_their_past():
    """A prompt in chunks: full heads over all columns, windowed heads over what their store holds and the chunk, by one kernel a group."""
    q, k, v = draw(2, 8, 200, 64), draw(2, 4, 1000, 64, seed=1), draw(2, 4, 1000, 64, seed=2)
    order = torch.cat([torch.randperm(144, generator=torch.Generator().manual_seed(0)), torch.arange(144, 344)]).cuda()
    positions = torch.cat([torch.arange(16), torch.arange(672, 1000)]).cuda()[order]
    groups = [
        KVGroup((0, 3), k[:, :2], v[:, :2]),
        KVGroup((1, 2), k[:, 2:, :344], v[:, 2:, :344], positions=positions[None, None], tail=200, complete=True),
    ]
    found = attention(q, groups=groups, offset=800, explain=True)
    assert found.ran.backend == "triton" and "behind" in found.ran.reason
    close(found.out, attention(q, groups=groups, offset=800, backend="reference"))
    joined = attention(q, groups=groups, offset=800, backend="sdpa")
    close(joined, found.out)


@pytest.mark.gpu
@pytest.mark.parametrize("cut", [[500, 300, 200], [100, 64, 900]])
def test_chunks_behind_a_window_in_order(cut):
    """A prompt in chunks under a plan of sinks and windows: whatever the layers hold, our kernel reads it as the reference does."""
    layer = HeadwiseLayer([(Full(), (0, 3)), (SinkWindow(16, 128), (1, 2))], dense_prefill=False)
    N = sum(cut)
    q, k, v = draw(2, 8, N, 64), draw(2, 4, N, 64, seed=1), draw(2, 4, N, 64, seed=2)
    begin = 0
    for count in cut:
        new = slice(begin, begin + count)
        layer.update(k[:, :, new], v[:, :, new])
        groups, offset, _ = layer.take(None)
        found = attention(q[:, :, new], groups=groups, offset=offset, explain=True)
        assert offset == 0 or found.ran.backend == "triton"
        close(found.out, attention(q[:, :, new], groups=groups, offset=offset, backend="reference"))
        begin += count
