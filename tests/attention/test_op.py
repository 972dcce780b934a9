"""The op: every backend against the equation, over drawn shapes; gates, routing, ragged groups; what is refused."""

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from headwise.attention import Compensation, KVGroup, attention
from headwise.errors import AttentionError
from headwise.plan import Elastic, Full, SinkWindow

LENGTHS = (1, 7, 8, 63, 111, 300)
PATTERNS = (
    Full(),
    SinkWindow(sinks=0, window=1),
    SinkWindow(sinks=2, window=5),
    SinkWindow(sinks=16, window=40),
    Elastic(1, 2, 0.25),
    Elastic(4, -8, 0.5, minimum=3),
)
FEW = settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)


def naive(q, k, v, patterns, *, causal=True, mask=None, start=None, offset=None, scale=None, active=None, gate=None):
    """One query at a time, in float64, written like the equation; -> out (B,H,N,Dv), lse (B,H,N)."""
    B, H, N, D = q.shape
    G, M = H // k.shape[1], k.shape[2]
    offset = M - N if offset is None else offset
    out, lse = (
        torch.zeros(B, H, N, v.shape[3], dtype=torch.float64),
        torch.full((B, H, N), -math.inf, dtype=torch.float64),
    )
    for b in range(B):
        first = 0 if start is None else int(start[b])
        for i in range(N):
            here, j = offset + i - first, torch.arange(M) - first
            for kv, pattern in enumerate(patterns):
                seen = j >= 0
                if causal:
                    near = here - j < pattern.window(max(here + 1, 0))
                    seen = seen & (j <= here) & (near | (j < pattern.sinks))
                if mask is not None:
                    seen = seen & mask[b if mask.shape[0] > 1 else 0, 0, i]
                if not seen.any():
                    continue
                heads = slice(kv * G, (kv + 1) * G)
                logits = (q[b, heads, i].double() @ k[b, kv, seen].double().T) * (D**-0.5 if scale is None else scale)
                lse[b, heads, i] = torch.logsumexp(logits, -1)
                out[b, heads, i] = torch.softmax(logits, -1) @ v[b, kv, seen].double()
    out = out if active is None else out * active[..., None]
    return (out if gate is None else out * gate[..., None].double()), lse


def normal(seed, *shape, dtype=torch.float32, strided=False):
    """Random numbers; `strided`: a view with a padded last axis and swapped inner axes."""
    generator = torch.Generator().manual_seed(seed)
    if not strided:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    B, H, N, D = shape
    return torch.randn(B, N, H, D + 3, generator=generator, dtype=torch.float64).to(dtype)[..., :D].transpose(1, 2)


def near(got, want, tolerance):
    assert got.shape == want.shape and not got.isnan().any()
    error = (got.double() - want.double()).norm() / max(float(want.double().norm()), 1e-3 * max(want.numel(), 1) ** 0.5)
    assert error <= tolerance, f"relative error {float(error):.2e}"


@st.composite
def problems(draw, lengths=LENGTHS):
    """Arguments of the op as a dict, and the patterns: everything that may be combined."""
    B, K, G = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(1, 3))
    M = draw(st.sampled_from(lengths))
    N = draw(st.sampled_from([n for n in (1, 2, M // 2, M) if 1 <= n <= M]))
    D, Dv, seed = draw(st.sampled_from([8, 16])), draw(st.sampled_from([8, 12])), draw(st.integers(0, 99))
    causal, strided = draw(st.booleans()), draw(st.booleans())
    patterns = draw(st.lists(st.sampled_from(PATTERNS), min_size=K, max_size=K)) if causal else [Full()] * K
    generator = torch.Generator().manual_seed(seed)
    extra = {"causal": causal}
    if draw(st.booleans()):
        extra["start"] = torch.randint(0, M + 1, (B,), generator=generator)
    if draw(st.booleans()):
        extra["mask"] = torch.rand(draw(st.sampled_from([1, B])), 1, N, M, generator=generator) < 0.7
    if draw(st.booleans()):
        extra["active"] = torch.rand(B, K * G, N, generator=generator) < 0.6
    if draw(st.booleans()):
        extra["gate"] = torch.randn(B, K * G, N, generator=generator)
    if draw(st.booleans()):
        extra["scale"] = 0.7
    shapes = ((B, K * G, N, D), (B, K, M, D), (B, K, M, Dv))
    return [normal(seed + i, *shape, strided=strided) for i, shape in enumerate(shapes)], patterns, extra


@FEW
@given(problems(lengths=(1, 7, 8, 23)))
def test_reference_is_the_equation(problem):
    qkv, patterns, extra = problem
    want, want_lse = naive(*qkv, patterns, **extra)
    got = attention(*qkv, patterns=patterns, backend="reference", return_lse=True, **extra)
    near(got.out, want, 1e-5)
    finite = want_lse.isfinite()
    assert torch.equal(got.lse.isfinite(), finite) and not got.lse.isnan().any()
    near(got.lse[finite], want_lse[finite], 1e-5)
    double = attention(*(x.double() for x in qkv), patterns=patterns, backend="reference", **extra)
    assert double.dtype == torch.float64
    near(double, want, 1e-7 if "gate" in extra else 1e-13)  # gates are given in float32


@FEW
@given(problems())
def test_sdpa_is_the_reference(problem):
    qkv, patterns, extra = problem
    want = attention(*qkv, patterns=patterns, backend="reference", return_lse=True, **extra)
    near(attention(*qkv, patterns=patterns, backend="sdpa", **extra), want.out, 1e-5)
    got = attention(*qkv, patterns=patterns, return_lse=True, **extra)
    near(got.out, want.out, 1e-5)
    finite = want.lse.isfinite()
    assert torch.equal(got.lse.isfinite(), finite) and got.lse.dtype == torch.float32
    near(got.lse[finite], want.lse[finite], 1e-5)


@FEW
@given(problems(lengths=(1, 7, 8, 63)))
def test_gradients_of_sdpa_are_those_of_the_reference(problem):
    qkv, patterns, extra = problem

    def gradients(backend, with_lse):
        leaves = [x.detach().double().requires_grad_() for x in qkv]
        gate = extra["gate"].double().requires_grad_() if "gate" in extra else None
        options = extra | ({"gate": gate} if gate is not None else {})
        result = attention(*leaves, patterns=patterns, backend=backend, return_lse=with_lse, **options)
        out = result.out if with_lse else result
        total = (out * normal(7, *out.shape, dtype=torch.float64)).sum()
        if with_lse:
            total = total + torch.where(result.lse.isfinite(), result.lse, 0.0).cos().sum()
        return torch.autograd.grad(total, [x for x in (*leaves, gate) if x is not None], allow_unused=True)

    for with_lse in (False, True):
        for a, b in zip(gradients("sdpa", with_lse), gradients("reference", with_lse), strict=True):
            a, b = (torch.zeros(1) if x is None else x for x in (a, b))
            near(a, b.expand_as(a), 1e-9)


@FEW
@given(problems(lengths=(7, 63, 111)))
def test_bfloat16(problem):
    qkv, patterns, extra = problem
    half = [x.bfloat16() for x in qkv]
    want = attention(*(x.double() for x in half), patterns=patterns, backend="reference", **extra)
    for options in ({"backend": "sdpa"}, {"backend": "reference"}, {"return_lse": True}):
        got = attention(*half, patterns=patterns, **options, **extra)
        got = got if isinstance(got, torch.Tensor) else got.out
        assert got.dtype == torch.bfloat16
        near(got, want, 2e-2)


def test_offset_of_a_prefix_and_of_a_chunk():
    """`offset` says how many columns came before; queries in chunks are the queries at once."""
    q, k, v = normal(0, 2, 4, 20, 8), normal(1, 2, 2, 20, 8), normal(2, 2, 2, 20, 8)
    patterns, start = [SinkWindow(1, 4), Elastic(2, 1, 0.3)], torch.tensor([0, 6])
    whole = attention(q, k, v, patterns=patterns, start=start)
    for begin, end in ((0, 7), (7, 8), (8, 20)):
        part = attention(q[:, :, begin:end], k[:, :, :end], v[:, :, :end], patterns=patterns, start=start)
        near(part, whole[:, :, begin:end], 1e-5)
        early = attention(q[:, :, begin:end], k, v, patterns=patterns, start=start, offset=begin)
        near(early, whole[:, :, begin:end], 1e-5)


# ragged groups


@st.composite
def ragged(draw):
    """A cache by hand: every group has its own slots in a shuffled order, some of them empty, and maybe a compensation token."""
    B, G, N, seed = (
        draw(st.integers(1, 2)),
        draw(st.integers(1, 2)),
        draw(st.sampled_from([1, 1, 3])),
        draw(st.integers(0, 99)),
    )
    past, D = draw(st.sampled_from([5, 12, 40])), 8
    generator = torch.Generator().manual_seed(seed)
    start = torch.randint(0, past, (B,), generator=generator) if draw(st.booleans()) else None
    groups = []
    for heads in ((1,), (0, 2)):
        stored, Kg = draw(st.integers(1, past)), len(heads)
        order = torch.rand(B, past, generator=generator).argsort(1)[:, :stored]
        slots = order - (0 if start is None else start[:, None])
        slots = torch.where(torch.rand(B, stored, generator=generator) < 0.8, slots, -1).clamp(min=-1)
        new = torch.arange(past, past + N)[None] - (0 if start is None else start[:, None])
        positions = torch.cat([slots, new.expand(B, -1)], dim=1)[:, None]
        k, v = (torch.randn(B, Kg, stored + N, D, generator=generator) for _ in range(2))
        extra = None
        if draw(st.booleans()):
            count = torch.randint(0, 9, (B, Kg), generator=generator).float()
            extra = Compensation(*(torch.randn(B, Kg, D, generator=generator) for _ in range(2)), count.log())
        pattern = draw(st.sampled_from(PATTERNS))
        groups.append(KVGroup(heads, k, v, pattern, positions, tail=N, compensation=extra))
    return torch.randn(B, 3 * G, N, D, generator=generator), groups, {"start": start, "offset": past}


@FEW
@given(ragged())
def test_ragged_groups_and_compensation(problem):
    q, groups, options = problem
    want = attention(q, groups=groups, backend="reference", return_lse=True, **options)
    got = attention(q, groups=groups, return_lse=True, **options)
    near(got.out, want.out, 1e-5)
    assert torch.equal(got.lse.isfinite(), want.lse.isfinite())
    near(got.lse.nan_to_num(neginf=0), want.lse.nan_to_num(neginf=0), 1e-5)
    near(attention(q, groups=groups, **options), want.out, 1e-5)
    _check_by_hand(q, groups, options, want.out)


def _check_by_hand(q, groups, options, got):
    """One (row, head, query): a softmax over the visible slots and the compensation token."""
    G = q.shape[1] // 3
    b, i = q.shape[0] - 1, q.shape[2] - 1
    here = options["offset"] + i - (0 if options["start"] is None else int(options["start"][b]))
    for group in groups:
        for place, kv in enumerate(group.heads):
            position = group.positions[b, 0]
            seen = group.pattern.reads(torch.tensor(here), position)
            keys, values = group.k[b, place, seen], group.v[b, place, seen]
            logits = keys @ q[b, kv * G, i] * q.shape[-1] ** -0.5
            if group.compensation is not None:
                c = group.compensation
                logits = torch.cat(
                    [logits, (c.k[b, place] @ q[b, kv * G, i] * q.shape[-1] ** -0.5 + c.log_count[b, place])[None]]
                )
                values = torch.cat([values, c.v[b, place][None]])
            want = torch.softmax(logits, 0) @ values if logits.isfinite().any() else torch.zeros(8)
            near(got[b, kv * G, i], want, 1e-5)


def test_a_compensation_token_is_the_exact_mean_where_the_dropped_keys_are_equal():
    """n equal keys weigh exp(logit + log n): with 'count' nothing is lost when all dropped keys and values are the same."""
    q, k, v = normal(0, 1, 2, 1, 8), normal(1, 1, 1, 12, 8), normal(2, 1, 1, 12, 8)
    k[:, :, 2:9], v[:, :, 2:9] = k[:, :, 2:3].clone(), v[:, :, 2:3].clone()
    want = attention(q, k, v)
    kept = [0, 1, 9, 10, 11]
    extra = Compensation(k[:, :, 2], v[:, :, 2], torch.tensor([[math.log(7)]]))
    group = KVGroup((0,), k[:, :, kept], v[:, :, kept], Full(), torch.tensor(kept)[None, None], compensation=extra)
    for backend in ("reference", "sdpa"):
        near(attention(q, groups=[group], offset=11, backend=backend), want, 1e-5)


# edges


def test_rows_that_see_nothing_are_zero_and_have_no_gradient_of_nan():
    leaves = [normal(i, 2, 2, 6, 8).requires_grad_() for i in range(3)]
    mask = torch.ones(2, 1, 6, 6, dtype=torch.bool)
    mask[0, :, 3] = False
    for options in ({"mask": mask}, {"start": torch.tensor([4, 6])}):
        for backend in ("sdpa", "reference"):
            result = attention(*leaves, return_lse=True, backend=backend, **options)
            plain = attention(*leaves, backend=backend, **options)
            blind = result.lse.isneginf()
            assert blind.any() and not result.out[blind].any() and not plain[blind].any()
            for out in (result.out, plain):
                assert all(
                    g.isfinite().all() for g in torch.autograd.grad(out.square().sum(), leaves, retain_graph=True)
                )


def test_inactive_queries_are_exactly_zero_and_gates_get_gradients():
    q, k, v = (normal(i, 1, 4, 5, 8) for i in range(3))
    active, gate = torch.rand(1, 4, 5) < 0.5, torch.rand(1, 4, 5, requires_grad=True)
    out = attention(q, k, v, active=active, gate=gate)
    plain = attention(q, k, v)
    assert not out[~active].any() and torch.equal(out[active], (plain * gate[..., None])[active])
    out.sum().backward()
    assert torch.allclose(gate.grad, plain.sum(-1) * active)


def test_indices_made_in_inference_mode_do_not_spoil_training():
    q, k, v = normal(0, 1, 4, 9, 8), normal(1, 1, 4, 9, 8), normal(2, 1, 4, 9, 8)
    patterns = [Full(), SinkWindow(1, 3), Full(), SinkWindow(1, 3)]
    with torch.inference_mode():
        attention(q, k, v, patterns=patterns)
    leaf = q.clone().requires_grad_()
    attention(leaf, k, v, patterns=patterns).sum().backward()
    assert leaf.grad.isfinite().all()


def test_explain_names_backend_and_reason():
    q, k, v = (normal(i, 1, 2, 5, 8) for i in range(3))
    ran = attention(q, k, v, patterns=[Full(), SinkWindow(1, 2)], explain=True).ran
    assert ran.backend == "sdpa" and "2 group(s)" in ran.reason and "window" in ran.reason
    assert "log-sum-exp" in attention(q, k, v, return_lse=True).ran.reason
    assert attention(q, k, v, backend="reference", explain=True).ran.reason == "asked for"


def test_dropout_drops():
    q, k, v = (normal(i, 1, 2, 50, 8) for i in range(3))
    torch.manual_seed(0)
    assert not torch.allclose(attention(q, k, v, dropout=0.5), attention(q, k, v))
    for options in ({"backend": "reference"}, {"backend": "flex"}, {"return_lse": True}):
        with pytest.raises(AttentionError, match=r"dropout"):
            attention(q, k, v, dropout=0.5, **options)


# bad input

Q, KV = torch.zeros(2, 4, 5, 8), torch.zeros(2, 2, 9, 8)
GROUP = KVGroup((0, 1), KV, KV)
ON_META = torch.zeros(2, 2, 9, 8, device="meta")
BAD = {
    "three dimensions": ({"q": Q[0]}, "q has shape"),
    "k without v": ({"v": None}, "give either"),
    "k and groups": ({"groups": [GROUP]}, "give either"),
    "nothing to read": ({"k": None, "v": None}, "give either"),
    "patterns of groups": ({"k": None, "v": None, "groups": [GROUP], "patterns": Full()}, "patterns= belongs"),
    "k and v disagree": ({"v": KV[:, :, :8]}, "agree in B, K, M"),
    "head dimension": ({"q": Q[..., :7]}, "D=7"),
    "batch": ({"q": Q[:1]}, "B=1"),
    "heads": ({"q": Q[:, :3]}, "multiple of the kv heads"),
    "missing head": ({"k": None, "v": None, "groups": [KVGroup((0, 2), KV, KV)]}, "each of 0..K-1 once"),
    "no groups": ({"k": None, "v": None, "groups": []}, "each of 0..K-1 once"),
    "v of a group": ({"k": None, "v": None, "groups": [KVGroup((0, 1), KV, KV[:, :, :3])]}, "must be"),
    "positions": (
        {"k": None, "v": None, "offset": 4, "groups": [KVGroup((0, 1), KV, KV, positions=torch.zeros(2, 3, 9))]},
        "positions of heads",
    ),
    "no offset": (
        {"k": None, "v": None, "groups": [KVGroup((0, 1), KV, KV, positions=torch.zeros(2, 1, 9))]},
        "offset= is needed",
    ),
    "few patterns": ({"patterns": [Full()]}, "2 kv heads"),
    "no patterns": ({"patterns": ["full", "full"]}, "one Pattern"),
    "dtype": ({"k": KV.double()}, "cast them"),
    "device": ({"k": ON_META, "v": ON_META}, "move them together"),
    "more queries than keys": ({"k": KV[:, :, :4], "v": KV[:, :, :4]}, "not defined"),
    "window without causality": ({"causal": False, "patterns": SinkWindow(1, 2)}, "needs causal attention"),
    "float mask": ({"mask": torch.zeros(2, 1, 5, 9)}, "mask must be bool"),
    "mask per head": ({"mask": torch.ones(2, 4, 5, 9, dtype=torch.bool)}, "mask must be bool"),
    "short mask": ({"mask": torch.ones(2, 1, 5, 8, dtype=torch.bool)}, "columns of the keys"),
    "long mask": ({"mask": torch.ones(2, 1, 5, 10, dtype=torch.bool)}, "columns of the keys"),
    "batch of the mask": ({"mask": torch.ones(3, 1, 5, 9, dtype=torch.bool)}, "B must be 1 or 2"),
    "start": ({"start": torch.zeros(3, dtype=torch.long)}, "start must be integers"),
    "float start": ({"start": torch.zeros(2)}, "start must be integers"),
    "active of another shape": ({"active": torch.ones(2, 4, 9, dtype=torch.bool)}, "active has shape"),
    "active of numbers": ({"active": torch.ones(2, 4, 5)}, "active must be bool"),
    "gate of another shape": ({"gate": torch.ones(2, 2, 5)}, "gate has shape"),
    "gate of bools": ({"gate": torch.ones(2, 4, 5, dtype=torch.bool)}, "gate must be floating"),
    "backend": ({"backend": "magic"}, "'magic' is unknown"),
}


@pytest.mark.parametrize(("change", "says"), BAD.values(), ids=BAD)
def test_bad_input(change, says):
    arguments = {"q": Q, "k": KV, "v": KV} | change
    with pytest.raises(AttentionError, match=says):
        attention(arguments.pop("q"), **arguments)


def test_one_row_of_lengths_that_hypothesis_may_miss():
    for M in LENGTHS:
        q, k, v = normal(0, 1, 2, M, 8), normal(1, 1, 1, M, 8), normal(2, 1, 1, M, 8)
        for pattern in PATTERNS:
            want = attention(q, k, v, patterns=pattern, backend="reference")
            near(attention(q, k, v, patterns=pattern), want, 1e-5)
