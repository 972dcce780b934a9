"""UoE: a dense model cut into experts; tokens that leave heads whole; no look ahead; ragged caches; errors."""

import copy

import pytest
import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, StaticCache
from typer.testing import CliRunner

from headwise.cli import app
from headwise.errors import CacheError, RouteError
from headwise.route import (
    Router,
    SelectiveAttention,
    UnionCacheLayer,
    UnionModel,
    _uoe_attention,
    load_rebuilt,
)
from headwise.route._uoe_attention import naive
from headwise.route._uoe_select import compact
from headwise.route.uoe import uoe
from tiny_helper import tiny, tokens


def llama(**options):
    """Four kv heads, so that there is something to choose; two query heads each."""
    sizes = {"vocab_size": 320, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "head_dim": 8}
    torch.manual_seed(0)
    config = LlamaConfig(
        **sizes, num_attention_heads=8, num_key_value_heads=4, initializer_range=0.12, pad_token_id=256, **options
    )
    return LlamaForCausalLM(config).eval()


def sharp(union):
    """Routers that differ between tokens as trained ones do."""
    with torch.no_grad():
        for module in union.model.modules():
            if isinstance(module, Router):
                module.W.mul_(50)
    return union


@torch.no_grad()
def logits(model, ids=None, **more):
    return model(tokens(2, 17) if ids is None else ids, **more).logits


@pytest.mark.parametrize("name", ["llama", "qwen3", "mistral"])
def test_a_union_of_all_experts_is_the_dense_model(name):
    model = tiny(name)
    before = logits(model)
    union = uoe(model, None, active=1.0, mlp_k=4, combine="none")
    torch.testing.assert_close(logits(model), before, rtol=1e-4, atol=1e-4)
    assert torch.equal(logits(union.restore()), before)


def test_even_gates_of_all_experts_are_the_dense_model_too():
    model = llama()
    before = logits(model)
    union = uoe(model, None, active=1.0, mlp_k=4)
    with torch.no_grad():
        for layer in [*union.attention.values(), *union.host.layers.values()]:
            layer.router.W.zero_()
    torch.testing.assert_close(logits(model), before, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("how", ["all", "selected"])
def test_output_biases(how):
    model = llama(attention_bias=True)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.bias.normal_()
    before = logits(model)
    dense = copy.deepcopy(model)
    uoe(model, None, active=1.0, mlp_k=4, combine="none", out_bias=how)
    torch.testing.assert_close(logits(model), before, rtol=1e-4, atol=1e-4)
    half = uoe(dense, None, active=0.5, combine="none", out_bias=how, mlp_experts=0).attention[0]
    on = torch.tensor([[[1, 1, 0, 0], [0, 0, 0, 0]]]).bool()
    part = half._bias(on, torch.zeros(1))
    bias = half.o_proj.bias
    assert torch.equal(part, bias if how == "all" else torch.stack([bias / 2, bias * 0])[None])


def test_cutting_changes_no_weight_and_restoring_brings_trained_ones_back():
    model = llama()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    union = uoe(model, None)
    here = model.state_dict()
    assert all(torch.equal(here[n], v) for n, v in before.items() if "mlp" not in n)
    with torch.no_grad():
        union.host.layers[0].experts.gate_up_proj.mul_(2)
        union.attention[0].q_proj.weight.mul_(3)
    after = union.restore().state_dict()
    assert after.keys() == before.keys()
    factor = {"model.layers.0.mlp.gate_proj.weight": 2, "model.layers.0.mlp.up_proj.weight": 2}
    factor["model.layers.0.self_attn.q_proj.weight"] = 3
    assert all(torch.equal(after[n], factor.get(n, 1) * v) for n, v in before.items())


@pytest.mark.parametrize("combine", ["gate", "none"])
@pytest.mark.parametrize("length", [1, 2, 16, 31])
def test_gathering_equals_the_masked_equation_forward_and_backward(combine, length):
    union = sharp(uoe(llama(attention_bias=True), None, combine=combine))
    layer, x = union.attention[0], torch.randn(3, length, 64, requires_grad=True)
    angles = union.model.model.rotary_emb(x, torch.arange(length)[None])
    real = torch.ones(3, length, dtype=torch.bool)
    real[0, length // 2 :] = length == 1
    union.host.state.real = real
    out = layer(x, angles)[0]
    want = naive(layer, x, layer.router(x, real=real), angles)
    torch.testing.assert_close(out, want, rtol=1e-4, atol=1e-5)
    inputs = [x, layer.q_proj.weight, layer.k_proj.weight, layer.v_proj.weight, layer.o_proj.weight]
    weigh = torch.randn_like(out)
    for mine, other in zip(
        torch.autograd.grad((out * weigh).sum(), inputs, allow_unused=True),
        torch.autograd.grad((want * weigh).sum(), inputs, allow_unused=True),
        strict=True,
    ):
        torch.testing.assert_close(mine, other, rtol=1e-3, atol=1e-4)


def test_lists_of_different_lengths_go_alone(monkeypatch):
    union = sharp(uoe(llama(), None))
    layer, x = union.attention[0], torch.randn(2, 33, 64)
    with torch.no_grad():
        layer.router.b[1] += 50.0  # everybody takes expert 1
    calls = []
    attend = _uoe_attention.attention
    monkeypatch.setattr(_uoe_attention, "LONG", 1)
    monkeypatch.setattr(_uoe_attention, "attention", lambda *a, **k: calls.append(a[0].shape) or attend(*a, **k))
    angles = union.model.model.rotary_emb(x, torch.arange(33)[None])
    out = layer(x, angles)[0]
    assert len(calls) == 4 and calls[1][2] == 33 and min(shape[2] for shape in calls) < 33
    torch.testing.assert_close(out, naive(layer, x, layer.router(x), angles), rtol=1e-4, atol=1e-5)


def test_whole_lists_train_alike_and_serve_nothing_else():
    union = sharp(uoe(llama(), None, active=0.5))
    model, ids, found = union.model.train(), tokens(2, 17), []
    for whole in (False, True):
        for layer in union.attention.values():
            layer.whole_lists = whole
        loss = model(ids, labels=ids).loss
        found.append([loss, *torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)])
    for a, b in zip(*found, strict=True):
        assert (a is None) is (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
    with pytest.raises(RouteError, match="whole_lists is for training"):
        logits(model)
    with pytest.raises(RouteError, match="whole_lists is for training"):
        model.eval()(ids)


def test_bidirectional_selection_equals_the_masked_equation():
    layer = uoe(llama(), None).attention[0]
    layer.causal = False
    x = torch.randn(2, 13, 64)
    angles = layer._aside[1](x, torch.arange(13)[None])
    torch.testing.assert_close(layer(x, angles)[0], naive(layer, x, layer.router(x), angles), rtol=1e-4, atol=1e-5)


def test_tokens_that_no_head_takes_get_nothing_and_lists_are_right():
    mask = torch.rand(3, 19, 5, generator=torch.Generator().manual_seed(0)) < 0.4
    index, valid = compact(mask)
    for b in range(3):
        for e in range(5):
            listed = index[b, e][valid[b, e]]
            assert listed.tolist() == mask[b, :, e].nonzero()[:, 0].tolist()  # increasing, none twice
    x, served = torch.randn(3, 19, 4), torch.zeros(3, 19, 4)
    for e in range(5):  # scatter-add of experts that do nothing: count(token) x
        rows = x.gather(1, index[:, e, :, None].expand(-1, -1, 4)) * valid[:, e, :, None]
        served.scatter_add_(1, index[:, e, :, None].expand(-1, -1, 4), rows)
    torch.testing.assert_close(served, mask.sum(-1, keepdim=True) * x)
    layer = uoe(llama(), None).attention[0]
    gates, none = torch.zeros(1, 4, 4), torch.zeros(1, 4, 4).bool()
    rotary = layer._aside[1](torch.zeros(1, 4, 64), torch.arange(4)[None])
    assert layer._fresh(torch.randn(1, 4, 64), gates, none, rotary, None).abs().max() == 0


@pytest.mark.parametrize("positions", ["original", "compact"])
def test_the_future_does_not_leak(positions):
    """Equal up to rounding: how many tokens the busiest head takes changes the shapes that kernels see."""
    union, ids = sharp(uoe(llama(), None, positions=positions)), tokens(2, 24)
    full = logits(union.model, ids)
    for cut in (1, 7, 20):
        changed = ids.clone()
        changed[:, cut:] = tokens(2, 24 - cut, seed=9)
        torch.testing.assert_close(logits(union.model, changed)[:, :cut], full[:, :cut], rtol=1e-4, atol=2e-5)
        assert (logits(union.model, changed)[:, cut:] - full[:, cut:]).abs().max() > 0.01


@pytest.mark.parametrize("positions", ["original", "compact"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_and_batch_mates_change_nothing_whole_and_decoding(side, positions):
    union, ids = sharp(uoe(llama(), None, positions=positions)), tokens(1, 9)
    pad, steps = torch.full((1, 4), 256), tokens(1, 3, seed=7)
    row = torch.cat([pad, ids] if side == "left" else [ids, pad], 1)
    mask = torch.cat([(row != 256).long(), torch.ones(1, 13).long()])
    batch = torch.cat([row, tokens(1, 13, seed=5)])
    with torch.no_grad():
        places = (mask.cumsum(1) - 1).clamp(min=0)
        out = union.model(batch, attention_mask=mask, position_ids=places, use_cache=True)
        alone = union.model(ids, use_cache=True)
        torch.testing.assert_close(out.logits[0][mask[0].bool()], alone.logits[0], rtol=1e-4, atol=1e-4)
        for t in range(3 if side == "left" else 0):
            mask = torch.cat([mask, torch.ones(2, 1).long()], 1)
            token, place = steps[:, t : t + 1].expand(2, 1), mask.sum(1, keepdim=True) - 1
            more = {"attention_mask": mask, "position_ids": place, "past_key_values": out.past_key_values}
            mine = union.model(token, **more).logits[0]
            theirs = union.model(steps[:, t : t + 1], past_key_values=alone.past_key_values).logits[0]
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("positions", ["original", "compact"])
@pytest.mark.parametrize("chunks", [[1] * 8, [3, 5], [8]])
def test_cached_decoding_equals_the_full_pass(positions, chunks):
    union, ids = sharp(uoe(llama(), None, positions=positions)), tokens(3, 17)
    full = logits(union.model, ids)
    with torch.no_grad():
        out, at = union.model(ids[:, :9], use_cache=True), 9
        parts = [out.logits]
        for size in chunks:
            parts.append(union.model(ids[:, at : at + size], past_key_values=out.past_key_values).logits)
            at += size
    torch.testing.assert_close(torch.cat(parts, 1), full, rtol=1e-4, atol=1e-4)


def test_the_cache_holds_what_heads_took_and_nothing_else():
    union, ids = sharp(uoe(llama(), None, active=0.5)), tokens(1, 40)
    with torch.no_grad(), union.recording() as record:
        cache = union.model(ids, use_cache=True).past_key_values
    dense = llama()(ids, use_cache=True).past_key_values
    assert union.kv_ratio(cache) == 0.5  # exactly k / E: one row needs no filling up
    for n, layer in enumerate(cache.layers):
        assert isinstance(layer, UnionCacheLayer) and layer.counts[0].tolist() == record[-1 - n][0].load().tolist()
        assert layer.kv_bytes * 2 == 2 * dense.layers[n].keys.numel() * 4
        assert layer.nbytes > layer.kv_bytes
    many = union.model(tokens(4, 40), use_cache=True).past_key_values
    assert 0.5 <= union.kv_ratio(many) < 1
    with pytest.raises(RouteError, match="union"):
        union.kv_ratio(dense)


def test_generate_beams_and_assisted_crops():
    union, ids = sharp(uoe(llama(), None)), tokens(2, 9)
    greedy = union.model.generate(ids, max_new_tokens=6, do_sample=False, eos_token_id=None)
    with torch.no_grad():
        for t in range(9, 15):
            assert torch.equal(union.model(greedy[:, :t]).logits[:, -1].argmax(-1), greedy[:, t])
    slow = union.model.generate(ids, max_new_tokens=4, num_beams=3, do_sample=False, use_cache=False, eos_token_id=None)
    beams = union.model.generate(ids, max_new_tokens=4, num_beams=3, do_sample=False, eos_token_id=None)
    assert torch.equal(slow, beams)
    with torch.no_grad():
        cache = union.model(ids, use_cache=True).past_key_values
        union.model(tokens(2, 4, seed=3), past_key_values=cache)
        cache.crop(-4)
        assert cache.get_seq_length() == 9
        again = union.model(greedy[:, 9:11], past_key_values=cache).logits
    torch.testing.assert_close(again, logits(union.model, greedy[:, :11])[:, 9:], rtol=1e-4, atol=1e-4)


def test_caches_that_do_not_fit_are_refused():
    model, ids = llama(), tokens(1, 5)
    dense = model(ids, use_cache=True).past_key_values
    union = uoe(model, None)
    with pytest.raises(CacheError, match="dense keys"):
        union.model(ids, past_key_values=dense)
    with pytest.raises(CacheError, match="static"):
        union.model(ids, past_key_values=StaticCache(config=model.config, max_cache_len=16))
    cache = DynamicCache()
    union.model(ids, past_key_values=cache)
    with pytest.raises(CacheError, match="union"):
        union.restore()(ids, past_key_values=cache)


def test_routers_learn_where_gates_weigh_and_only_there():
    ids = tokens(2, 12)
    for combine, learns in (("gate", True), ("none", False)):
        union = uoe(llama(), None, combine=combine)
        union.model.train()
        union.model(ids, labels=ids).loss.backward()
        for layer in [*union.attention.values(), *union.host.layers.values()]:
            grad = layer.router.W.grad
            assert (grad is not None and grad.abs().sum() > 0) if learns else grad is None


def test_a_balance_loss_reaches_attention_and_feed_forward_routers():
    ids = tokens(2, 12)
    union = uoe(llama(), None, combine="none", balance=0.1)
    union.model.train()
    with union.recording() as record:
        loss = union.model(ids, labels=ids).loss
    plain = union.model.eval()(ids, labels=ids).loss
    mean = sum(float(r[0].loss({"balance": 0.1}).detach()) for r in record.values()) / 4
    assert len(record) == 4 and float((loss - plain).detach()) == pytest.approx(mean, abs=1e-5)
    loss.backward()
    assert all(layer.router.W.grad.abs().sum() > 0 for layer in union.attention.values())
    assert all(layer.router.W.grad.abs().sum() > 0 for layer in union.host.layers.values())


def test_checkpointing_and_copies():
    union, ids = uoe(llama(), None, balance=0.1), tokens(2, 12)
    twin = copy.deepcopy(union)
    twin.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    grads = []
    for one in (union, twin):
        one.model.train()
        one.model(ids, labels=ids, use_cache=False).loss.backward()
        grads.append({n: p.grad for n, p in one.model.named_parameters()})
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, rtol=1e-4, atol=1e-6)


def test_bfloat16_and_autocast():
    union, ids = sharp(uoe(llama(), None)), tokens(1, 12)
    exact = logits(union.model, ids)
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        out = union.model(ids[:, :11], use_cache=True)
        step = union.model(ids[:, 11:], past_key_values=out.past_key_values).logits
    assert (torch.cat([out.logits, step], 1) - exact).abs().mean() < 0.1 * exact.abs().mean()
    half, layer = copy.deepcopy(union).model.to(torch.bfloat16), union.attention[0]
    assert logits(half).dtype == torch.bfloat16
    x = torch.randn(2, 9, 64, dtype=torch.bfloat16)  # one layer: over several, rounding sends some tokens elsewhere
    angles, mine = half.model.rotary_emb(x, torch.arange(9)[None]), half.model.layers[0].self_attn
    want = naive(layer, x.float(), mine.router(x), tuple(t.float() for t in angles))
    torch.testing.assert_close(mine(x, angles)[0].float(), want, rtol=0.05, atol=0.05)
    union.model.train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        union.model(ids, labels=ids).loss.backward()
    assert all(layer.router.W.grad.isfinite().all() for layer in union.attention.values())


@pytest.mark.parametrize("options", [{"over": "patch", "patch": 4}, {"over": "sequence"}, {"capacity": 0.5}])
def test_choices_that_see_later_tokens_must_be_asked_for(options):
    model = llama()
    before = logits(model)
    with pytest.raises(RouteError, match="leaks the future"):
        uoe(model, None, **options)
    assert torch.equal(logits(model), before)
    union = uoe(model, None, **options, allow_noncausal=True)
    assert logits(union.model, tokens(2, 16)).isfinite().all()


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"active": 0.0}, "active"),
        ({"active": 1.5}, "active"),
        ({"mlp_k": 5}, "mlp_k"),
        ({"mlp_experts": 5}, "mlp_experts"),
        ({"mlp_experts": -1}, "mlp_experts"),
        ({"combine": "sum"}, "combine"),
        ({"over": "word"}, "over"),
        ({"patch": 2}, "patch"),
        ({"capacity": 0.0}, "capacity"),
        ({"positions": "own"}, "positions"),
        ({"out_bias": "none"}, "out_bias"),
    ],
)
def test_bad_options_are_refused_and_the_model_is_left_alone(options, text):
    model = llama()
    names = [type(m).__name__ for m in model.modules()]
    with pytest.raises(RouteError, match=text):
        uoe(model, None, **options)
    assert [type(m).__name__ for m in model.modules()] == names


@pytest.mark.parametrize("name", ["gpt2", "gemma3", "deepseek-v3", "bert"])
def test_models_that_cannot_be_cut_are_refused(name):
    with pytest.raises(RouteError):
        uoe(tiny(name), None)


def test_saved_unions_come_back(tmp_path):
    union = sharp(uoe(llama(), None, positions="compact"))
    union.save_pretrained(tmp_path)
    again = load_rebuilt(tmp_path)
    assert isinstance(again, UnionModel) and again.cut == union.cut and str(again) == str(union)
    assert torch.equal(logits(again.model), logits(union.model))
    assert isinstance(again.model.model.layers[0].self_attn, SelectiveAttention)


def test_one_command_cuts_a_model(tmp_path):
    where = ["--model", "tiny-random-llama", "-o", str(tmp_path / "union")]
    run = CliRunner().invoke(app, ["convert", "uoe", *where, "--active", "0.5"])
    assert run.exit_code == 0 and "1 of 2 kv heads" in run.output
    generated = ["generate", "--model", str(tmp_path / "union"), "--prompt", "ab", "--max-new-tokens", "2"]
    assert CliRunner().invoke(app, generated).exit_code == 0
