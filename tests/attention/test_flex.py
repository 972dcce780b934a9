"""FlexAttention's eager form against the reference on CPU, and what it refuses."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from headwise.attention import Compensation, KVGroup, attention
from headwise.errors import AttentionError
from headwise.plan import Elastic, Full, SinkWindow

PATTERNS = (Full(), SinkWindow(2, 5), Elastic(1, 2, 0.25))
SETTINGS = settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)


def normal(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@SETTINGS
@given(
    st.sampled_from([1, 7, 63, 111]),
    st.integers(1, 2),
    st.lists(st.sampled_from(PATTERNS), min_size=1, max_size=3),
    st.booleans(),
    st.booleans(),
    st.booleans(),
    st.integers(0, 99),
)
def test_flex_is_the_reference(M, G, patterns, causal, padded, masked, seed):
    B, K, N = 2, len(patterns), max(1, M // 2)
    patterns = patterns if causal else [Full()] * K
    q, k, v = normal(seed, B, K * G, N, 16), normal(seed + 1, B, K, M, 16), normal(seed + 2, B, K, M, 16)
    generator = torch.Generator().manual_seed(seed)
    options = {"patterns": patterns, "causal": causal}
    if padded:
        options["start"] = torch.randint(0, M // 2 + 1, (B,), generator=generator)
    if masked:
        options["mask"] = torch.rand(1 + seed % B, 1, N, M, generator=generator) < 0.8
    want = attention(q, k, v, backend="reference", return_lse=True, **options)
    with torch.no_grad():
        got = attention(q, k, v, backend="flex", **options)
    sighted = want.lse.isfinite()  # rows that see nothing: compared below
    torch.testing.assert_close(got[sighted], want.out[sighted], atol=2e-5, rtol=1e-5)
    assert not got[~sighted].any()


def test_flex_says_that_it_ran_and_applies_gate_and_routing():
    q, k, v = normal(0, 1, 2, 9, 16), normal(1, 1, 1, 9, 16), normal(2, 1, 1, 9, 16)
    active, gate = torch.rand(1, 2, 9) < 0.5, torch.rand(1, 2, 9)
    with torch.no_grad():
        got = attention(q, k, v, active=active, gate=gate, backend="flex", explain=True)
    torch.testing.assert_close(
        got.out, attention(q, k, v, active=active, gate=gate, backend="reference"), atol=1e-5, rtol=1e-5
    )
    assert got.ran.backend == "flex" and not got.out[~active].any()


KV = torch.zeros(1, 2, 9, 16)
EXTRA = Compensation(torch.zeros(1, 2, 16), torch.zeros(1, 2, 16), torch.zeros(1, 2))
REFUSED = {
    "log-sum-exp": {"k": KV, "v": KV, "return_lse": True},
    "compensation": {"groups": [KVGroup((0, 1), KV, KV, compensation=EXTRA)]},
    "dense keys": {"groups": [KVGroup((0, 1), KV, KV, positions=torch.arange(9)[None, None])], "offset": 8},
    "dropout": {"k": KV, "v": KV, "dropout": 0.1},
    "bidirectional": {"k": KV, "v": KV, "causal": False, "patterns": SinkWindow(1, 2)},
}


@pytest.mark.parametrize(("says", "options"), REFUSED.items(), ids=REFUSED)
def test_flex_refuses_with_the_reason(says, options):
    with torch.no_grad(), pytest.raises(AttentionError, match=says):
        attention(torch.zeros(1, 2, 1, 16), backend="flex", **options)


@pytest.mark.parametrize("which", ["q", "k", "v"])
def test_flex_has_no_backward_on_cpu(which):
    tensors = {"q": torch.zeros(1, 2, 1, 16), "k": KV.clone(), "v": KV.clone()}
    tensors[which].requires_grad_()
    with pytest.raises(AttentionError, match="no backward on CPU"):
        attention(**tensors, backend="flex")
    with torch.no_grad():
        attention(**tensors, backend="flex")
