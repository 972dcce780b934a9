"""BAM, branch-attend-mix (Zhang et al. 2024, arXiv 2408.08274): several dense models of one seed become one mixture."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from headwise.registry import register
from headwise.route._bam_checks import check_sources
from headwise.route._bam_fold import KV
from headwise.route._bam_model import MixedModel, Recipe, mix


@register("route", "bam", paper="06")
def bam(
    models: Sequence[Any],
    tokenizers: Sequence[Any] | None,
    *,
    attention: Literal["soft", "average"] = "soft",
    attention_k: int | None = None,
    kv: KV = "expert",
    ffn_top_k: int = 1,
    ffn_gate: Literal["prob", "renorm", "scale-n"] = "prob",
    parallel: bool | None = None,
    balance: float = 0.01,
    z: float = 0.001,
    router_std: float = 0.02,
    seed: int = 0,
) -> MixedModel:
    """Mix dense models that branched from one seed: routed feed-forward experts, attention experts that all run.

    y_t = Σ_i g_ti W_O^i A_i(u)_t + Σ_{i in top-k} p_ti FFN_i(u)_t with g = softmax(W_attn u), p = softmax(W_ffn u); what is
    in no expert (norms, embeddings) is the mean over the models, taken in float32. Expert i is made of models[i]; the paper
    puts the seed itself among them. The routers are new, so the mixture wants training. The models are left as they were.

    attention: soft (BAM), or average: the mean of the attention weights and no attention experts (BTX).
    attention_k: so many attention experts a token instead of all; an ablation that the paper finds worse.
    kv: expert (own keys and values, N times the cache) or shared (the mean of the models' key and value weights, one cache).
    ffn_top_k: feed-forward experts a token.
    ffn_gate: prob (the paper's p, about 1/N before training), renorm (p over the sum of the kept; needs ffn_top_k > 1) or
      scale-n (N p: the mixture starts near the mean of its experts).
    parallel: raise unless the models' blocks are parallel (true) or sequential (false); not asked: take them as they are.
    balance: coefficient of the load-balance loss of the feed-forward routers, summed over layers.
    z: coefficient of their z-loss.
    router_std: standard deviation of the new routers' weights.

    Raises RouteError for models that differ in architecture, sizes, dtype or vocabulary, or are not built of q_proj, k_proj,
    v_proj, o_proj and a gated feed-forward layer.

    >>> import torch
    >>> from headwise.hub import load_model
    >>> model, _ = load_model("tiny-random-llama")
    >>> mixed = bam([model, model], None, ffn_top_k=2, ffn_gate="renorm")
    >>> ids = torch.arange(9)[None]
    >>> bool(torch.allclose(mixed.model(ids).logits, model(ids).logits, atol=1e-4))
    True
    """
    check_sources(models, tokenizers)
    recipe = Recipe(
        len(models), attention, attention_k, kv, ffn_top_k, ffn_gate, float(balance), float(z), float(router_std)
    )
    recipe.check()
    made = mix(models, recipe, parallel, seed)
    made.tokenizer = next((t for t in tokenizers or () if t is not None), None)
    return made
