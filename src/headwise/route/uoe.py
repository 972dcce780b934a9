"""UoE, union of experts (Yang et al. 2025, arXiv 2503.02495): a dense model cut into experts of the same total size."""

from __future__ import annotations

from typing import Any, Literal

from headwise.attach import find_stack
from headwise.checks import finite, whole
from headwise.errors import RouteError
from headwise.registry import register
from headwise.route._uoe_attention import Positions
from headwise.route._uoe_model import Cut, UnionModel, cut_model
from headwise.route._uoe_select import Combine, Over


@register("route", "uoe", paper="24")
def uoe(
    model: Any,
    tokenizer: Any,
    *,
    active: float = 0.5,
    mlp_experts: int = 4,
    mlp_k: int = 2,
    combine: Combine = "gate",
    over: Over = "token",
    patch: int = 1,
    capacity: float | None = None,
    positions: Positions = "original",
    out_bias: Literal["all", "selected"] = "all",
    balance: float = 0.0,
    allow_noncausal: bool = False,
    seed: int = 0,
) -> UnionModel:
    """Cut a dense decoder into a union of experts, in place: a token that a head does not take is in its q, k and v no more.

    Attention: an expert is a kv head with its query heads; with a share ρ of the tokens its projections cost ρ, its attention
    ρ² and its part of the KV cache ρ. Feed-forward: E column slices. No weight changes and none is added but the routers',
    so a union of all experts (active 1, mlp_k = mlp_experts) is the dense model up to the gates; fewer want training.

    active: share of the kv heads that take each token (the count is rounded half up, at least 1).
    mlp_experts: slices of the feed-forward layers; 0 leaves these layers dense.
    mlp_k: slices a token.
    combine: gate (outputs are weighed, the routers learn) or none (gates only choose, as in the released code: they do not).
    over: what chooses experts: each token, each patch or each sequence. The latter two see later tokens.
    patch: tokens of a patch; it must divide the length of the rows.
    capacity: an expert takes at most this share of a row's tokens; drops the lowest gates. Sees later tokens.
    positions: rotary positions of the tokens in the row (original) or in the expert's list (compact).
    out_bias: an output bias is added for every token (all) or by the experts that serve it (selected).
    balance: coefficient of a load-balance loss; the paper has none.
    allow_noncausal: allow choices that see later tokens in a causal model.

    Raises RouteError for sizes that do not divide, for layers that cannot be cut, and for choices that leak the future.

    >>> import torch
    >>> from headwise.hub import load_model
    >>> model, tokenizer = load_model("tiny-random-llama")
    >>> ids = torch.arange(9)[None]
    >>> before = model(ids).logits
    >>> union = uoe(model, tokenizer, active=1.0, mlp_k=4, combine="none")
    >>> bool(torch.allclose(model(ids).logits, before, atol=1e-4)), bool((union.restore()(ids).logits == before).all())
    (True, True)
    """
    if not 0 < finite("active", active, RouteError) <= 1:
        raise RouteError(f"active is {active}; a share of the heads lies in (0, 1]")
    whole("mlp_experts", mlp_experts, 0, RouteError)
    if mlp_experts:
        whole("mlp_k", mlp_k, 1, RouteError, mlp_experts)
    experts = find_stack(model).kv_heads
    k = max(1, int(active * experts + 0.5))
    cut = Cut(
        k, mlp_experts, mlp_k, combine, over, patch, capacity, positions, out_bias, float(balance), allow_noncausal
    )
    made = cut_model(model, cut, seed)
    made.tokenizer = tokenizer
    return made
