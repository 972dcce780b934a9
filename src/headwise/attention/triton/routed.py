"""Routed attention: every head serves its own subset of the queries (Mixture-of-Head, attention experts, UoE)."""

from __future__ import annotations

from torch import Tensor

from headwise.attention.triton import _host, _rows


def routed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    active: Tensor,
    *,
    gate: Tensor | None = None,
    causal: bool = True,
    scale: float | None = None,
    key_start: Tensor | None = None,
    return_lse: bool = False,
    deterministic: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention in which head h computes only the queries that ``active`` gives it; time follows the served queries.

    ``out[b,h,i] = gate[b,h,i] * softmax_j(scale * q[b,h,i] . k[b,h//G,j]) v[b,h//G,j]`` for served queries, exactly 0
    (with exactly 0 gradient) for the others.

    Args:
        q: (B,H,N,D) queries; k, v: (B,K,M,D) with K dividing H. float16, bfloat16 or float32; D a multiple of 16, <= 256.
        active: (B,H,N) bool, True where the head serves the query. Any number per head, none included.
        gate: (B,H,N) float factor of the output, fused in the epilogue; it gets a gradient.
        causal: query i sees keys j <= i + M - N.
        key_start: (B,) first real key of each row (left padding). A query with no visible key gives 0 and lse -inf.
        return_lse: also return the log-sum-exp (B,H,N) in natural units (differentiable; -inf where not served).
        deterministic: backward without atomics (slower on Hopper, where dq is otherwise accumulated in float32).

    Returns:
        (B,H,N,D), and (B,H,N) float32 when ``return_lse``.

    Limits: the served keys are all keys (subsets of keys: ``span_attention``, ``block_attention``). Launches and buffers
    are sized for N, not for the number of served queries, so memory does not shrink with routing.
    """
    _host.require_triton()
    B, H, K, N, M, D = _host.check_qkv(q, k, v)
    if active.shape != (B, H, N):
        raise ValueError(f"active must be (B,H,N) = {(B, H, N)}, got {tuple(active.shape)}")
    if gate is not None and gate.shape != (B, H, N):
        raise ValueError(f"gate must be (B,H,N) = {(B, H, N)}, got {tuple(gate.shape)}")
    if causal and M < N:
        raise ValueError(f"causal attention needs at least as many keys as queries, got M={M} < N={N}")
    rows, rank = _rows.build_rows(active)
    call = _rows.RowsCall(
        scale=_host.softmax_scale(scale, D), causal=causal, rows=rows, rank=rank,
        key_start=_rows.check_key_start(key_start, B), deterministic=deterministic,
    )  # fmt: skip
    return _rows.rows_attention(q, k, v, gate, call, return_lse)
