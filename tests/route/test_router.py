"""HeadRouter on models: equal to dense where it must be, sparse, causal, cached, merged."""

import copy

import pytest
import torch
from router_helper import KINDS, logits, make
from transformers import LlamaConfig, LlamaForCausalLM

from headwise import Edit, HeadSet, attach, detach
from headwise.attach import find_stack
from headwise.attach.projection import head_weights, output_projection
from headwise.attention import attention
from headwise.errors import AttachError, AttentionError, RouteError
from headwise.hub import load_model
from headwise.route import HeadRouter, LayerRoute, RouterConfig


def gates_of(model, router, ids, **kwargs):
    """Gates (L, B, N, H) of one forward pass."""
    seen = []
    handles = [layer.register_forward_hook(lambda m, a, out: seen.append(out)) for layer in router.layers]
    with attach(model, router=router):
        model(ids, **kwargs)
    for handle in handles:
        handle.remove()
    return torch.stack(seen)


# equal to dense


@pytest.mark.parametrize("name", ["llama", "qwen3", "mistral", "gemma3", "gpt2", "mixtral", "deepseek-v3", "bert"])
@pytest.mark.parametrize("kind", ["norm", "fitted"])
def test_all_heads_routed_is_the_dense_model_bit_for_bit(name, kind, ids):
    model, _ = load_model(f"tiny-random-{name}")
    router = make(model, kind, shared=(), routed=4)
    dense = logits(model, ids)
    with attach(model, router=router):
        assert torch.equal(logits(model, ids), dense)
    # also where the gates are really multiplied
    router._needed = lambda layer: True
    with attach(model, router=router):
        assert torch.equal(logits(model, ids), dense)
    assert torch.equal(logits(model, ids), dense)


def test_a_vision_transformer_routes_its_patches():
    model, _ = load_model("tiny-random-vit")
    pixels = torch.randn(2, 3, 32, 32)
    dense = logits(model, pixels)
    router = make(model, "norm", shared=(), routed=4)
    router._needed = lambda layer: True
    with attach(model, router=router):
        assert torch.equal(logits(model, pixels), dense)
    for kind in KINDS:
        with attach(model, router=make(model, kind)):
            assert not torch.allclose(logits(model, pixels), dense)


def test_a_tower_of_clip_is_routed_alone():
    model, _ = load_model("tiny-random-clip")
    with attach(model, router=make(model, "norm", stack="vision_model"), stack="vision_model") as handle:
        assert handle.controller.stack.pattern.startswith("vision_model")
        assert not any("headwise_router" in name for name, _ in model.text_model.named_modules())


def test_the_sum_over_heads_is_the_concatenation_with_the_bias_once():
    for name in ("llama", "gpt2", "vit"):
        model, _ = load_model(f"tiny-random-{name}")
        projection = output_projection(find_stack(model), 0)
        out = torch.randn(2, 5, 4, 16)
        summed = torch.einsum("bnhd,hdc->bnc", out, head_weights(projection, 4))
        bias = getattr(projection, "bias", None)
        summed = summed if bias is None else summed + bias
        torch.testing.assert_close(summed, projection(out.flatten(2)), rtol=1e-5, atol=1e-5)


def test_static_router_is_zeroing_the_other_heads(llama, ids):
    others = ",".join(f"L{layer}H{head}" for layer in range(3) for head in (0, 3))
    with attach(llama, edits=Edit.zero(HeadSet.parse(others))):
        wanted = logits(llama, ids)
    with attach(llama, router=make(llama, "static", shared=(1, 2))):
        assert torch.equal(logits(llama, ids), wanted)


def test_norm_router_is_zeroing_the_complement_per_token(llama, ids):
    router = make(llama, "norm")
    gates = gates_of(llama, router, ids)

    def mask(call, attend):
        return torch.where(gates[call.layer][..., None] != 0, attend(), 0.0)

    with attach(llama, transforms=[mask]):
        wanted = logits(llama, ids)
    with attach(llama, router=router):
        assert torch.equal(logits(llama, ids), wanted)
    assert (gates.sum(-1) == 3).all()


def test_inactive_heads_get_no_gradient(llama, ids):
    router, outs = make(llama, "trained"), []

    def keep(call, attend):
        out = attend()
        out.retain_grad()
        outs.append(out)
        return out

    seen = []
    with attach(llama, router=router, transforms=[keep], observers=[lambda call, out: seen.append(out)]):
        llama(ids).logits.square().sum().backward()
    for before, after in zip(outs, seen, strict=True):
        off = (after == 0).all(-1)  # (B, N, H)
        assert (off.sum(-1) == 1).all()
        assert (before.grad[off] == 0).all()
        assert (before.grad[~off].abs().sum(-1) > 0).all()


def test_grouped_queries_equal_repeated_keys_and_values(llama, ids):
    config = LlamaConfig(**{**llama.config.to_dict(), "num_key_value_heads": 4})
    wide = LlamaForCausalLM(config).eval()
    state = llama.state_dict()
    for name, value in state.items():
        if ".k_proj." in name or ".v_proj." in name:
            state[name] = value.view(2, 1, 16, 64).expand(2, 2, 16, 64).reshape(64, 64)
    wide.load_state_dict(state)
    for kind in ("trained", "norm"):
        narrow, broad = make(llama, kind), make(wide, kind)
        with attach(llama, router=narrow), attach(wide, router=broad):
            torch.testing.assert_close(logits(llama, ids), logits(wide, ids), rtol=1e-4, atol=1e-5)


def test_keys_and_values_are_untouched(llama, ids):
    dense = llama(ids, use_cache=True).past_key_values
    with attach(llama, router=make(llama, "norm")):
        routed = llama(ids, use_cache=True).past_key_values
    assert torch.equal(dense.layers[0].keys, routed.layers[0].keys)
    assert [layer.keys.shape for layer in dense.layers] == [layer.keys.shape for layer in routed.layers]


# causal, cached, padded


@pytest.mark.parametrize("kind", KINDS)
def test_a_token_changes_nothing_before_it(llama, ids, kind):
    other = ids.clone()
    other[:, 12] = (other[:, 12] + 1) % 256
    with attach(llama, router=make(llama, kind)):
        a, b = logits(llama, ids), logits(llama, other)
    assert torch.equal(a[:, :12], b[:, :12])
    assert not torch.allclose(a[:, 12:], b[:, 12:])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("chunks", [(21,), (1,) * 21, (7, 1, 13)])
def test_cached_decoding_equals_the_full_forward(llama, ids, kind, chunks):
    with attach(llama, router=make(llama, kind)):
        full, past, parts = logits(llama, ids), None, []
        for part in ids.split(chunks, dim=1):
            with torch.no_grad():
                out = llama(part, past_key_values=past, use_cache=True)
            past = out.past_key_values
            parts.append(out.logits)
    torch.testing.assert_close(torch.cat(parts, 1), full, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", KINDS)
def test_padding_equals_no_padding(llama, ids, kind, side):
    padded = torch.full((2, 26), 256)
    mask = torch.zeros_like(padded)
    first, second = (slice(5, 26), slice(12, 26)) if side == "left" else (slice(0, 21), slice(0, 14))
    padded[0, first], mask[0, first] = ids[0], 1
    padded[1, second], mask[1, second] = ids[1, :14], 1
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with attach(llama, router=make(llama, kind)):
        got = logits(llama, padded, attention_mask=mask, position_ids=positions)
        torch.testing.assert_close(got[0, first], logits(llama, ids[:1])[0], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(got[1, second], logits(llama, ids[1:, :14])[0], rtol=1e-4, atol=1e-4)


def test_generate_runs_unchanged(llama, ids):
    with attach(llama, router=make(llama, "norm")):
        once = llama.generate(ids, max_new_tokens=4, do_sample=False)
        for end in range(21, 25):
            assert torch.equal(logits(llama, once[:, :end])[:, -1].argmax(-1), once[:, end])


def test_bfloat16_runs_and_stays_bfloat16(ids):
    model, _ = load_model("tiny-random-llama", dtype="bfloat16")
    for kind in KINDS:
        with attach(model, router=make(model, kind)):
            out = logits(model, ids)
        assert out.dtype == torch.bfloat16
        assert out.isfinite().all()


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_masking_outputs_equals_the_op_with_active_queries(dtype, tolerance):
    """The op that a sparse kernel serves has the meaning of the gates, forward and backward; the kernel: tests/attention."""
    q, k, v = (torch.randn(2, h, 9, 8, dtype=dtype, requires_grad=True) for h in (4, 2, 2))
    active = torch.rand(2, 4, 9, generator=torch.Generator().manual_seed(0)) < 0.5
    upstream = torch.randn(2, 4, 9, 8, dtype=dtype)
    sparse = torch.autograd.grad((attention(q, k, v, active=active) * upstream).sum(), (q, k, v))
    masked = torch.autograd.grad((attention(q, k, v) * active[..., None] * upstream).sum(), (q, k, v))
    for a, b in zip(sparse, masked, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
    with pytest.raises(AttentionError, match="floating"):
        attention(q, k, v, gate=active)


# statistics


def test_skip_rate_is_one_minus_the_active_share(llama, ids):
    router = make(llama, "norm")
    with attach(llama, router=router), router.recording() as load:
        logits(llama, ids)
        logits(llama, ids)
    torch.testing.assert_close(load.skip_rate(), torch.full((3,), 0.25, dtype=torch.float64))
    assert load.tokens["all"].tolist() == [84, 84, 84]
    assert (load.share()[:, 1] == 1).all()


def test_load_by_category_leaves_padding_out(llama, ids):
    router = make(llama, "norm")
    mask = torch.ones_like(ids)
    mask[1, :6] = 0
    with attach(llama, router=router), router.recording(rows=["a", "b"]) as load:
        logits(llama, ids, attention_mask=mask)
        load.rows = ["b"]
        logits(llama, ids[:1])
    assert load.tokens["a"].tolist() == [21] * 3
    assert load.tokens["b"].tolist() == [36] * 3
    assert load.share("a").sum(1).tolist() == pytest.approx([3, 3, 3])
    assert 0 <= load.distance("a", "b") <= 1
    assert load.distance("a", "a") == 0
    with pytest.raises(RouteError, match="'c' was seen; seen: a, b"):
        load.share("c")
    with pytest.raises(RouteError, match="2 categories, the batch has 1"), router.recording(["x", "y"]):
        with attach(llama, router=router):
            logits(llama, ids[:1])


def test_dense_layers_cost_nothing_and_count_as_full(llama, ids):
    routes = (LayerRoute(heads=4, routed=4), LayerRoute(heads=4, routed=2), LayerRoute(heads=4, shared=(0, 1, 2, 3)))
    router = HeadRouter(RouterConfig(kind="norm", layers=routes))
    assert [router.for_layer(n) is None for n in range(3)] == [True, False, True]
    with attach(llama, router=router), router.recording() as load:
        logits(llama, ids)
    assert load.skip_rate().tolist() == [0, 0.5, 0]
    assert router.active_counts() == [4, 2, 4]
    assert str(router) == "norm head router: kept 2 to 4 of 4 (0.833) in 3 layers, 0-4 of them shared"


# attach and detach


@pytest.mark.parametrize("kind", KINDS)
def test_detaching_leaves_the_model_as_it_was(llama, ids, kind):
    before, names = logits(llama, ids), list(dict(llama.named_modules()))
    hooks = len(llama._forward_hooks), len(llama.model._forward_pre_hooks)
    with attach(llama, router=make(llama, kind)):
        pass
    assert list(dict(llama.named_modules())) == names
    assert (len(llama._forward_hooks), len(llama.model._forward_pre_hooks)) == hooks
    assert torch.equal(logits(llama, ids), before)


def test_the_model_owns_the_router_while_attached(llama):
    router = make(llama, "trained")
    with attach(llama, router=router):
        own = {id(p) for p in llama.parameters()}
        assert all(id(p) in own for p in router.parameters())
        assert "model.layers.0.self_attn.headwise_router.W_r" in llama.state_dict()
        llama.to(torch.float64)
        assert router.layers[0].W_r.dtype == torch.float64
        llama.train()
        assert router.layers[2].training
    assert not any("headwise" in name for name in llama.state_dict())


def test_one_router_at_a_time(llama, ids):
    first, second = make(llama, "static"), make(llama, "norm")
    with attach(llama, router=first) as handle:
        kept = logits(llama, ids)
        with pytest.raises(AttachError, match="another router"):
            attach(llama, router=second)
        with pytest.raises(AttachError, match="already attached"):
            attach(llama, router=first)
        assert torch.equal(logits(llama, ids), kept)
        with pytest.raises(AttachError, match="detach the router before merging"):
            first.merge(llama)
        handle.detach()
    with attach(llama, router=second):
        pass


def test_a_copy_of_a_routed_model_has_a_router_of_its_own(llama, ids):
    router = make(llama, "trained")
    handle = attach(llama, router=router)
    twin = copy.deepcopy(llama)
    twin.train()
    twin(ids, labels=ids).loss.backward()
    assert twin.model.layers[0].self_attn.headwise_router is not router.layers[0]
    assert twin.model.layers[0].self_attn.headwise_router.W_r.grad is not None
    assert router.layers[0].W_r.grad is None
    assert router.loss() is None
    detach(twin)
    assert not any("headwise" in name for name in twin.state_dict())
    assert "headwise_router" in dict(llama.model.layers[0].self_attn.named_children())
    handle.detach()


def test_routers_and_edits_work_together(llama, ids):
    with attach(llama, router=make(llama, "norm")), attach(llama, edits=Edit.zero(HeadSet.parse("L0H1"))):
        both = logits(llama, ids)
    with attach(llama, edits=Edit.zero(HeadSet.parse("L0H1"))):
        assert not torch.allclose(both, logits(llama, ids))


# merge


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "vit"])
def test_a_static_router_folds_into_the_output_projection(name, ids):
    model, _ = load_model(f"tiny-random-{name}")
    x = torch.randn(1, 3, 32, 32) if name == "vit" else ids
    router = make(model, "static", shared=(0, 2))
    with attach(model, router=router):
        wanted = logits(model, x)
    router.merge(model)
    torch.testing.assert_close(logits(model, x), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["trained", "norm", "fitted"])
def test_gates_that_depend_on_tokens_cannot_be_merged(llama, kind):
    before = copy.deepcopy(llama.state_dict())
    with pytest.raises(RouteError, match=f"a '{kind}' router cannot be merged: in layers \\[0, 1, 2\\]"):
        make(llama, kind).merge(llama)
    assert all(torch.equal(before[name], value) for name, value in llama.state_dict().items())


def test_heads_that_kv_heads_do_not_divide_are_refused_by_the_op():
    with pytest.raises(AttentionError, match="multiple of the kv heads"):
        attention(torch.randn(1, 5, 3, 8), torch.randn(1, 2, 3, 8), torch.randn(1, 2, 3, 8))
