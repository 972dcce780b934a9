"""A model whose kv heads are reordered: the same model, another order, and undone to the bit."""

import copy

import pytest
import torch
from duo_helper import ROPE, feed, tokens
from transformers import AutoModelForCausalLM

from headwise.attach import attach, fingerprint
from headwise.budget import permute_kv_heads
from headwise.errors import AttachError, PlanError, WrongModelError
from headwise.hub import load_model
from headwise.plan import Full, HeadPlan, SinkWindow
from headwise.units import HeadSet


def with_biases(arch: str):
    model, _ = load_model(f"tiny-random-{arch}")
    generator = torch.Generator().manual_seed(3)
    for layer in model.model.layers:
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            linear = getattr(layer.self_attn, name)
            linear.bias = torch.nn.Parameter(torch.randn(linear.out_features, generator=generator) * 0.1)
    return model


@pytest.mark.parametrize("arch", [*ROPE, "gemma3", "qwen3-moe"])
def test_permuting_kv_heads_changes_nothing_but_their_order(arch):
    model = with_biases(arch) if arch == "llama" else load_model(f"tiny-random-{arch}")[0]
    ids, before = tokens(2), copy.deepcopy(model.state_dict())
    L, K = fingerprint(model).layers, fingerprint(model).kv_heads
    keep = HeadSet.of([(layer, K - 1) for layer in range(L)], "kv")
    plan = HeadPlan.from_set(keep, SinkWindow(3, 9), L, K, fingerprint=fingerprint(model))
    with torch.no_grad():
        dense = model(ids).logits
    sparse, _ = feed(model, plan, ids, [30, *[1] * 30])
    ordered, undo = permute_kv_heads(model, plan)
    assert [unit.index for unit in ordered.full_heads()] == [0] * L
    assert any(not torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, dense, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(feed(model, ordered, ids, [30, *[1] * 30])[0], sparse, rtol=1e-4, atol=1e-4)
    with pytest.raises(WrongModelError):
        attach(model, plan=plan)
    undo()
    undo()
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    attach(model, plan=plan).detach()


def test_a_permuted_model_is_an_ordinary_checkpoint(tmp_path):
    model, _ = load_model("tiny-random-llama")
    ids, plan = tokens(), HeadPlan.from_set(HeadSet.parse("L0K1,L2K1"), SinkWindow(3, 9), 3, 2)
    with torch.no_grad():
        dense = model(ids).logits
    ordered, _ = permute_kv_heads(model, plan)
    model.save_pretrained(tmp_path)
    ordered.save(tmp_path / "plan.json")
    loaded, back = AutoModelForCausalLM.from_pretrained(tmp_path).eval(), HeadPlan.load(tmp_path / "plan.json")
    assert back == ordered and str(back.full_heads()) == "L0K0,L2K0"
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, dense, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(feed(loaded, back, ids, [60])[0], feed(model, ordered, ids, [60])[0])


def test_norms_over_all_heads_move_with_them():
    from transformers import Olmo2Config, Olmo2ForCausalLM

    config = Olmo2Config(
        vocab_size=320,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    model = Olmo2ForCausalLM(config).eval()
    for layer in model.model.layers:
        torch.nn.init.normal_(layer.self_attn.q_norm.weight)
        torch.nn.init.normal_(layer.self_attn.k_norm.weight)
    ids = tokens()
    with torch.no_grad():
        dense = model(ids).logits
        permute_kv_heads(model, HeadPlan.from_set(HeadSet.parse("L0K1,L1K1"), SinkWindow(3, 9), 2, 2))
        torch.testing.assert_close(model(ids).logits, dense, rtol=1e-5, atol=1e-5)


def test_what_cannot_be_permuted_is_refused_untouched():
    plan = HeadPlan.from_set(HeadSet.parse("L0K1"), SinkWindow(3, 9), 3, 2)
    model, _ = load_model("tiny-random-llama")
    with attach(model, plan=plan), pytest.raises(AttachError, match="something is attached"):
        permute_kv_heads(model, plan)
    permute_kv_heads(model, plan)
    with pytest.raises(AttachError, match="already reordered"):
        permute_kv_heads(model, plan)
    fused, _ = load_model("tiny-random-gpt2")
    with pytest.raises(AttachError, match="no linear q_proj"):
        permute_kv_heads(fused, HeadPlan.uniform(Full(), 3, 4))
    strange, _ = load_model("tiny-random-llama")
    weight = strange.model.layers[0].self_attn.q_proj.weight.clone()
    strange.model.layers[2].self_attn.temperature = torch.nn.Parameter(torch.ones(7))
    with pytest.raises(AttachError, match="temperature"):
        permute_kv_heads(strange, plan)
    assert torch.equal(weight, strange.model.layers[0].self_attn.q_proj.weight)
    with pytest.raises(PlanError, match=r"\(2, 2\)"):
        permute_kv_heads(load_model("tiny-random-llama")[0], HeadPlan.full(2, 2))
