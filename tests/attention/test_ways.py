"""What the op remembers of earlier calls: never a number of a tensor, and all that a decision depends on."""

import dataclasses
import gc
import weakref

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from headwise.attention import Compensation, KVGroup, attention, sdpa, ways
from headwise.attention.groups import Selection
from headwise.errors import AttentionError
from headwise.plan import Elastic, Full, SinkWindow

B, H, K, N, M, D = 2, 4, 2, 24, 24, 8


@pytest.fixture(autouse=True)
def forget():
    ways._known.clear()
    yield
    ways._known.clear()


def draw(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def integers(seed, low, high, *shape):
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(seed))


def dense(seed, **options):
    return (draw(seed, B, H, N, D), draw(seed + 1, B, K, M, D), draw(seed + 2, B, K, M, D)), options


def grouped(seed, **options):
    """A ragged cache: one head of 24 columns, one of 7 slots whose positions change."""
    order = torch.randperm(24, generator=torch.Generator().manual_seed(seed))[:7]
    groups = [
        KVGroup((1,), draw(seed, B, 1, 24, D), draw(seed + 1, B, 1, 24, D)),
        KVGroup(
            (0,), draw(seed + 2, B, 1, 7, D), draw(seed + 3, B, 1, 7, D), SinkWindow(2, 9), positions=order[None, None]
        ),
    ]
    return (draw(seed + 4, B, H, 3, D),), {"groups": groups, "offset": 21} | options


CALLS = {
    "dense": dense,
    "no causality": lambda seed: dense(seed, causal=False),
    "scale": lambda seed: dense(seed, scale=0.1 + seed / 100),
    "active": lambda seed: dense(seed, active=draw(seed, B, H, N) > 0),
    "gate": lambda seed: dense(seed, gate=draw(seed, B, H, N)),
    "active and gate": lambda seed: dense(seed, active=draw(seed, B, H, N) > 0, gate=draw(seed, B, H, N)),
    "start": lambda seed: dense(seed, start=integers(seed, 0, M, B)),
    "packed rows": lambda seed: dense(seed, start=integers(seed, 0, 9, B, N).cummax(1).values.clamp(max=torch.arange(N))),
    "mask": lambda seed: dense(seed, mask=draw(seed, B, 1, N, M) > 0),
    "windows": lambda seed: dense(seed, patterns=[SinkWindow(1, 3), Full()], gate=draw(seed, B, H, N)),
    "windows of a padded batch": lambda seed: dense(seed, patterns=[SinkWindow(1, 3), Full()], start=integers(seed, 0, M, B)),
    "lists": lambda seed: dense(seed, selected=integers(seed, -1, 6, B, K, 6, 1).int(), key_block=4, query_block=4),
    "lists in a window": lambda seed: dense(
        seed, selected=integers(seed, -1, 6, B, K, 6, 1).int(), key_block=4, query_block=4, patterns=SinkWindow(0, 5)
    ),
    "log-sum-exp": lambda seed: dense(seed, return_lse=True, gate=draw(seed, B, H, N)),
    "groups": grouped,
    "groups, gates": lambda seed: grouped(seed, gate=draw(seed, B, H, 3), active=draw(seed + 1, B, H, 3) > 0),
}  # fmt: skip


def parts(result):
    return [x for x in (result if isinstance(result, tuple) else (result,)) if isinstance(x, torch.Tensor)]


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_a_later_call_is_served_by_its_own_numbers(name, backend):
    """The same signature with other numbers in every tensor: as if the op had never been called."""
    calls = [CALLS[name](seed) for seed in (0, 10, 20)]
    results = [parts(attention(*tensors, backend=backend, **options)) for tensors, options in calls]
    assert len(ways._known) == 1  # the later calls did use what the first one left
    for (tensors, options), again in zip(calls, results, strict=True):
        ways._known.clear()
        first = parts(attention(*tensors, backend=backend, **options))
        assert all(torch.equal(a, b) for a, b in zip(again, first, strict=True))
        for a, b in zip(again, parts(attention(*tensors, backend="reference", **options)), strict=True):
            torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("name", CALLS)
def test_gradients_after_a_call_without_any(name):
    tensors, options = CALLS[name](3)
    if name.startswith("groups"):
        leaves = [tensors[0], *(x for g in options["groups"] for x in (g.k, g.v))]
    else:
        leaves = [*tensors, *([options["gate"]] if "gate" in options else [])]
    attention(*tensors, **options)
    for leaf in leaves:
        leaf.requires_grad_()
    with torch.no_grad():
        attention(*tensors, **options)
    found, want = (parts(attention(*tensors, backend=b, **options))[0] for b in ("auto", "reference"))
    weight = draw(9, *found.shape)
    got, exact = (torch.autograd.grad(x, leaves, weight, allow_unused=True) for x in (found, want))
    for a, b in zip(got, exact, strict=True):
        torch.testing.assert_close(a, b, atol=5e-5, rtol=1e-4)


def base():
    q, k, v = dense(0)[0]
    return ways.Given(
        q, k, v, None, None, True, None, None, None, None, None, None, 1, 1, None, 0.0, False, "auto"
    )  # fmt: skip


CHANGES = {
    "q": draw(0, B, H, N, D).double(),
    "k": draw(0, B, K, M + 1, D),
    "v": draw(0, B, K, D, M).transpose(2, 3),
    "groups": [KVGroup((0, 1), draw(0, B, K, M, D), draw(1, B, K, M, D))],
    "patterns": SinkWindow(1, 2),
    "causal": False,
    "mask": torch.ones(B, 1, N, M, dtype=torch.bool),
    "start": torch.zeros(B, dtype=torch.int32),
    "offset": 0,
    "active": torch.ones(B, H, N, dtype=torch.bool),
    "gate": draw(0, B, H, N),
    "selected": torch.zeros(B, K, N, 1, dtype=torch.int32),
    "key_block": 2,
    "query_block": 2,
    "dropout": 0.5,
    "return_lse": True,
    "backend": "sdpa",
}


def test_every_argument_but_the_scale_is_part_of_the_signature():
    assert set(CHANGES) | {"scale"} == set(ways.Given._fields)
    plain = base().signature()
    same = base()._replace(q=draw(5, B, H, N, D))
    assert plain == same.signature() and hash(plain) == hash(same.signature())
    for name, other in CHANGES.items():
        assert base()._replace(**{name: other}).signature() != plain, name


@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_who_wants_gradients_is_part_of_the_signature(name):
    leaf = draw(0, *getattr(base(), name).shape).requires_grad_()
    wanting = base()._replace(**{name: leaf})
    assert wanting.signature() != base().signature()
    with torch.no_grad():
        assert wanting.signature() == base().signature()


def test_every_field_of_a_group_is_part_of_the_signature():
    k, v = draw(0, B, 1, M, D), draw(1, B, 1, M, D)
    extra = Compensation(k[:, :, 0], v[:, :, 0], torch.zeros(B, 1))
    changes = {
        "heads": (1,), "k": k.double(), "v": draw(0, B, 1, D, M).transpose(2, 3), "pattern": SinkWindow(1, 2),
        "positions": torch.arange(M)[None, None], "tail": 1, "compensation": extra, "complete": True, "in_order": True,
        "selection": Selection(torch.zeros(B, 1, N, 1, dtype=torch.int32)),
    }  # fmt: skip
    assert set(changes) == {field.name for field in dataclasses.fields(KVGroup)}
    group = KVGroup((0,), k, v)
    plain = ways._group_signature(group)
    for name, other in changes.items():
        assert ways._group_signature(dataclasses.replace(group, **{name: other})) != plain, name


def test_a_bad_call_is_refused_however_often_and_after_a_good_one():
    q, k, v = dense(0)[0]
    bad = [
        {"active": torch.ones(B, H, N)}, {"gate": torch.ones(B, H, N, dtype=torch.int)}, {"backend": "fast"},
        {"patterns": [Full()]}, {"causal": False, "patterns": SinkWindow(1, 2)}, {"patterns": [[], []]},
    ]  # fmt: skip
    attention(q, k, v)
    for options in bad * 2:
        with pytest.raises(AttentionError):
            attention(q, k, v, **options)
    with pytest.raises(AttentionError, match="cast them"):
        attention(q, k.double(), v.double())
    assert len(ways._known) == 1


def test_nothing_is_kept_of_a_tensor_and_not_too_many_signatures(monkeypatch):
    monkeypatch.setattr(ways, "MOST", 8)
    seen = []
    for name, call in CALLS.items():
        for seed in (0, 10):
            tensors, options = call(seed)
            attention(*tensors, **options)
            seen += [(name, weakref.ref(tensors[0]))]
        assert len(ways._known) <= 8
    del tensors, options
    gc.collect()
    assert [name for name, ref in seen if ref() is not None] == []


@pytest.mark.parametrize("recorded", [False, True])
def test_what_is_not_served_is_zero_whatever_stands_there(recorded):
    """NaN in a query that is not served, and in its gate, reaches neither the output nor a gradient of the gate."""
    (q, k, v), _ = dense(0)
    active, gate = draw(7, B, H, N) > 0, draw(8, B, H, N)
    q, gate = (
        q.masked_fill(~active[..., None], torch.nan),
        gate.masked_fill(~active, torch.nan).requires_grad_(recorded),
    )
    for _ in range(2):
        out = attention(q, k, v, active=active, gate=gate)
        assert (out[~active] == 0).all() and out[active].isfinite().all() and out[active].abs().min() > 0
    if recorded:
        (grad,) = torch.autograd.grad(out.sum(), gate)
        assert grad[active].isfinite().all() and grad[active].abs().min() > 0


def test_the_arguments_are_left_as_they_were():
    (q, k, v), _ = dense(0)
    active, gate = draw(7, B, H, N) > 0, draw(8, B, H, N)
    kept = [x.clone() for x in (q, k, v, active, gate)]
    for backend in ("auto", "reference"):
        one = attention(q[:, :, :1], k[:, :, :1], v[:, :, :1], gate=gate[:, :, :1], backend=backend)
        assert one.data_ptr() != v.data_ptr()
        attention(q, k, v, active=active, gate=gate, backend=backend)
    assert all(torch.equal(a, b) for a, b in zip((q, k, v, active, gate), kept, strict=True))


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    st.one_of(
        st.builds(SinkWindow, st.integers(0, 9), st.integers(1, 30)),
        st.builds(Elastic, st.integers(0, 9), st.integers(-9, 30), st.floats(0, 1), minimum=st.integers(1, 9)),
    ),
    st.integers(1, 30),
)
def test_a_pattern_that_keeps_the_whole_text_reads_all_of_every_part(pattern, M):
    """What lets a head with a long window join the full ones."""
    rows, columns = torch.arange(M)[:, None], torch.arange(M)
    if pattern.kept(M) == M:
        assert torch.equal(pattern.reads(rows, columns), columns <= rows)


def test_masks_that_are_kept_know_their_pattern_length_and_place():
    q, k, v = dense(0)[0]
    for pattern in (SinkWindow(1, 3), SinkWindow(0, 3), Elastic(0, 1, 0.5), SinkWindow(1, 3)):
        for n, m in ((24, 24), (12, 24), (12, 12), (24, 24)):
            got, want = (
                attention(q[:, :, :n], k[:, :, :m], v[:, :, :m], patterns=pattern, backend=b)
                for b in ("sdpa", "reference")
            )
            torch.testing.assert_close(got, want, atol=2e-5, rtol=1e-4)
    with torch.inference_mode():
        attention(q, k, v, patterns=SinkWindow(2, 3))
    (grad,) = torch.autograd.grad(attention(q.requires_grad_(), k, v, patterns=SinkWindow(2, 3)).sum(), q)
    assert grad.isfinite().all()


def test_the_order_of_the_library_kernels_is_given_back():
    before = torch._C._get_sdp_priority_order()
    first = [torch.nn.attention.SDPBackend.CUDNN_ATTENTION, torch.nn.attention.SDPBackend.MATH]
    with sdpa._Order(first):
        inside = torch._C._get_sdp_priority_order()
    assert inside[:2] == [int(kernel) for kernel in first] and sorted(inside) == sorted(before)
    assert torch._C._get_sdp_priority_order() == before
    with pytest.raises(ZeroDivisionError), sdpa._Order(first):
        raise ZeroDivisionError
    assert torch._C._get_sdp_priority_order() == before


# -- on a GPU ----------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_short_routed_call_falls_back_and_is_right_each_time(dtype, gated):
    q = draw(0, 2, 300, 8, 64).cuda().to(dtype).transpose(1, 2)
    k, v = (draw(i, 2, 4, 300, 64).cuda().to(dtype) for i in (1, 2))
    for seed in range(3):
        active = (draw(seed, 2, 8, 300) > 0).cuda()
        options = {"active": active, "gate": draw(seed, 2, 8, 300).cuda() if gated else None}
        dirty = q.masked_fill(~active[..., None], torch.nan)
        found = attention(dirty, k, v, explain=True, **options)
        assert found.ran.backend == "sdpa" and (found.out[~active] == 0).all()
        want = attention(q, k, v, backend="reference", **options)
        assert (found.out.float() - want.float()).norm() <= 1e-2 * want.float().norm()


@pytest.mark.gpu
def test_another_table_is_heard_of_at_once(monkeypatch):
    from headwise.attention.crossover import Crossover

    q, k = draw(0, 1, 4, 256, 64).cuda().bfloat16(), draw(1, 1, 4, 256, 64).cuda().bfloat16()
    active = torch.ones(1, 4, 256, dtype=torch.bool, device="cuda")
    ran = []
    for least in (1 << 40, 1, 1 << 40):
        ones = {name: least for name in Crossover.__dataclass_fields__ if name not in ("device", "dtype", "measured")}
        table = Crossover(device="any", dtype="bfloat16", **ones)
        monkeypatch.setattr("headwise.attention.crossover.lookup", lambda *given, table=table: table)
        ran += [attention(q, k, k, active=active, explain=True).ran.backend for _ in range(2)]
    assert ran == ["sdpa", "sdpa", "triton", "triton", "sdpa", "sdpa"]
