"""VHR: what it chooses and scales, generation, batches, and what is refused."""

import math

import pytest
import torch
from transformers import LlavaConfig, LlavaForConditionalGeneration

from headwise.attach import attach, fingerprint
from headwise.edits import Edit
from headwise.errors import ArtifactError, AttachError, EditError, WrongModelError
from headwise.hub import load_model
from headwise.score.vhd import vhd_samples
from headwise.steer import vhr
from headwise.steer.var import VAR
from headwise.steer.vhr import VHR, ReinforcedHeads, default_layers
from headwise.units import HeadSet
from vlm_helper import IMAGE, llava, one_of, prompt, qwen2_vl

ROWS = ([1, "img", 7, 8, 9, 10], [1, 2, 3, "img", 7, 8])


def logits(model, inputs):
    with torch.no_grad():
        return model(**inputs).logits


def mha():
    config = llava().config.to_dict()
    config["text_config"]["num_key_value_heads"] = 4
    return LlavaForConditionalGeneration(LlavaConfig.from_dict(config)).eval()


def test_alpha_one_changes_nothing():
    model, inputs = llava(), prompt(*ROWS)
    before = logits(model, inputs)
    plain = model.generate(**inputs, max_new_tokens=6, do_sample=False, eos_token_id=None)
    with VHR(layers=(0, 1, 2, 3), alpha=1.0).attach(model):
        assert torch.equal(logits(model, inputs), before)
        assert torch.equal(model.generate(**inputs, max_new_tokens=6, do_sample=False, eos_token_id=None), plain)


@pytest.mark.parametrize("make", [llava, mha])
def test_scaling_is_multiplying_columns_of_the_output_projection(make):
    model, inputs = make(), prompt(ROWS[0])
    with VHR(layers=(1, 3), alpha=2.0).attach(model) as running:
        found = logits(model, inputs)
    assert {layer: int(heads.sum()) for layer, heads in running.heads.items()} == {1: 2, 3: 2}
    with torch.no_grad():
        for layer, factors in running.factors.items():
            weight = model.model.language_model.layers[layer].self_attn.o_proj.weight
            weight.mul_(factors[0].repeat_interleave(16))
    torch.testing.assert_close(logits(model, inputs), found, atol=1e-5, rtol=1e-5)


def test_each_layer_chooses_from_what_the_layers_before_made():
    model, inputs = llava(), prompt(*ROWS)
    with VHR(layers=(1, 3), outliers=False).attach(model) as running:
        logits(model, inputs)
    plain = vhd_samples(model, inputs, outliers=False)
    with VHR(layers=(1,), outliers=False).attach(model):
        after = vhd_samples(model, inputs, outliers=False)
    torch.testing.assert_close(running.divergence[1], plain[:, 1])
    torch.testing.assert_close(running.divergence[3], after[:, 3])
    assert not torch.allclose(running.divergence[3], plain[:, 3])


def test_head_sets_stay_while_an_answer_is_written():
    model, inputs = llava(), prompt(*ROWS)
    with VHR(layers=(1, 2, 3)).attach(model) as running, torch.no_grad():
        out = model(**inputs, use_cache=True)
        before = {layer: factors.clone() for layer, factors in running.factors.items()}
        mask = torch.cat([inputs["attention_mask"], torch.ones(2, 1, dtype=torch.long)], 1)
        model(torch.tensor([[11], [12]]), attention_mask=mask, past_key_values=out.past_key_values)
    assert all(torch.equal(running.factors[layer], factors) for layer, factors in before.items())


def test_generate_with_cache_without_and_with_beams():
    model, inputs = llava(), prompt(*ROWS)
    options = {"max_new_tokens": 10, "do_sample": False, "eos_token_id": None}
    plain = model.generate(**inputs, **options)
    with VHR(layers=(1, 2, 3)).attach(model):
        cached = model.generate(**inputs, **options)
        fresh = model.generate(**inputs, **options, use_cache=False)
        alone = model.generate(**one_of(inputs, 1, [1]), **options)
        beams = model.generate(**inputs, **options, num_beams=2)
    assert torch.equal(cached, fresh) and not torch.equal(cached, plain)
    assert torch.equal(cached[1:], alone)
    assert beams.shape == cached.shape


@pytest.mark.parametrize("padding", ["left", "right"])
def test_batch_is_its_rows(padding):
    model = llava()
    inputs = prompt(*ROWS, padding=padding)
    with VHR(layers=(1, 2, 3)).attach(model) as running:
        together = logits(model, inputs)
        heads = dict(running.heads)
        for row in range(2):
            alone = logits(model, one_of(inputs, row, [row]))[0]
            own = together[row][inputs["attention_mask"][row].bool()]
            torch.testing.assert_close(own, alone, atol=2e-5, rtol=1e-4)
            assert all(torch.equal(running.heads[layer][0], heads[layer][row]) for layer in heads)
    assert any(not torch.equal(heads[layer][0], heads[layer][1]) for layer in heads)  # each row has heads of its own


def test_equal_scores_leave_a_layer_alone():
    model, inputs = llava(), prompt(ROWS[0])
    with torch.no_grad():
        model.model.language_model.layers[1].self_attn.v_proj.weight.zero_()
    before = logits(model, inputs)
    with VHR(layers=(1,)).attach(model) as running:
        assert torch.equal(logits(model, inputs), before)
    assert not running.heads[1].any() and not running.divergence[1].any()


def test_another_rule_of_choice():
    model, inputs = llava(), prompt(ROWS[0])
    chosen = torch.tensor([[True, False, False, False]])
    with ReinforcedHeads(model, VHR(layers=(2,), alpha=3.0), choose=lambda layer, values: chosen):
        found = logits(model, inputs)
    with attach(model, edits=Edit.scale(HeadSet.parse("L2H0"), 3.0), stack="language_model"):
        torch.testing.assert_close(logits(model, inputs), found)


def test_left_as_it_was_also_after_an_error():
    model, inputs = llava(), prompt(*ROWS)
    before = logits(model, inputs)
    with VHR(layers=(1,)).attach(model), pytest.raises(AttachError, match=r"no image token \(259,\) in row \[0\]"):
        model(torch.tensor([[1, 5, 6]]))
    assert torch.equal(logits(model, inputs), before)
    assert not model.model._forward_pre_hooks
    assert model.config.text_config._attn_implementation == "sdpa"


def test_nested_rules_leave_in_any_order():
    model, inputs = llava(), prompt(*ROWS)
    plain, outer, inner = logits(model, inputs), VHR(layers=(1,)), VHR(layers=(2,), alpha=3.0)
    with outer.attach(model):
        alone = logits(model, inputs)
        with inner.attach(model):
            assert not torch.equal(logits(model, inputs), alone)
        assert torch.equal(logits(model, inputs), alone)
    first, second = outer.attach(model), inner.attach(model)
    first.detach()
    assert not torch.equal(logits(model, inputs), plain)
    second.detach()
    assert torch.equal(logits(model, inputs), plain) and not model.model._forward_pre_hooks


def test_bfloat16_and_qwen2_vl():
    half = llava(dtype="bfloat16")
    inputs = prompt(ROWS[0])
    inputs["pixel_values"] = inputs["pixel_values"].bfloat16()
    with VHR(layers=(1, 2)).attach(half):
        assert logits(half, inputs).dtype == torch.bfloat16
    model, inputs = qwen2_vl(rows=2)
    plain = logits(model, inputs)
    deltas = model.model.rope_deltas.clone()
    with VHR(layers=(1, 2)).attach(model) as running:
        changed = logits(model, inputs)
        model.generate(**inputs, max_new_tokens=3, do_sample=False, eos_token_id=None)
    assert (changed != plain).any() and running.heads[1].sum(1).tolist() == [2, 2]
    assert torch.equal(model.model.rope_deltas, deltas)  # the pass without images leaves the model's positions alone
    with VHR(layers=(1,), reference="masked").attach(model), pytest.raises(AttachError, match="M-RoPE"):
        logits(model, inputs)


def test_masked_reference_keeps_positions():
    model, inputs = llava(), prompt(ROWS[0])
    with VHR(layers=(0,), reference="masked").attach(model) as masked:
        logits(model, inputs)
    with VHR(layers=(0,)).attach(model) as removed:
        logits(model, inputs)
    assert not torch.allclose(masked.divergence[0], removed.divergence[0])


def test_method_defaults_and_file(tmp_path):
    model, tokenizer = load_model("tiny-random-llava")
    made = vhr(model, tokenizer, layers="1,3:")
    assert made.layers == (1, 3) and made.alpha == 2.0 and made.fingerprint == fingerprint(model, "language_model")
    assert default_layers(32) == (1, *range(18, 32)) and default_layers(1) == (0,)
    made.save(tmp_path / "vhr.json")
    assert VHR.load(tmp_path / "vhr.json") == made
    with pytest.raises(WrongModelError, match="VHR was made for"):
        made.attach(load_model("tiny-random-qwen2-vl")[0])
    (tmp_path / "vhr.json").write_text('{"headwise": "vhr", "schema": 1}')
    with pytest.raises(ArtifactError):
        VHR.load(tmp_path / "vhr.json")


@pytest.mark.parametrize("alpha", [0.0, -1.0, math.inf, math.nan, "2"])
def test_bad_alpha(alpha):
    with pytest.raises(EditError, match="alpha is"):
        VHR(layers=(1,), alpha=alpha)


def test_refused():
    model, tokenizer = load_model("tiny-random-llava")
    with pytest.raises(EditError, match="layer is 4"):
        VHR(layers=(4,)).attach(model)
    with pytest.raises(EditError, match="there are 0 to 3"):
        vhr(model, tokenizer, layers="1,7")
    with pytest.raises(EditError, match="layers is empty"):
        VHR(layers=())
    with pytest.raises(EditError, match="metric='l1'"):
        VHR(layers=(1,), metric="l1")
    with pytest.raises(EditError, match="reference='gone'"):
        VHR(layers=(1,), reference="gone")
    with pytest.raises(AttachError, match="no image token"):
        vhr(*load_model("tiny-random-llama"))
    with VHR(layers=(1,)).attach(model), pytest.raises(AttachError, match="nothing but image tokens"):
        model(torch.tensor([[IMAGE] * 16]), pixel_values=torch.randn(1, 3, 32, 32))


@pytest.mark.parametrize("var_first", [True, False])
def test_beside_var(var_first):
    """VAR stands aside in the pass without images, whichever came first."""
    model, inputs = llava(), prompt(*ROWS)
    var = VAR(dims=(5, 9), tau=2.0, rho=0.3, minimum_mass=0.05, layers=(0, 1, 2))
    with var.attach(model):
        alone = logits(model, inputs)
    same = VHR(layers=(1, 2, 3), alpha=1.0)
    first, second = (var, same) if var_first else (same, var)
    with first.attach(model), second.attach(model):
        assert torch.equal(logits(model, inputs), alone)
    with var.attach(model), VHR(layers=(1, 2, 3)).attach(model):
        assert not torch.allclose(logits(model, inputs), alone)
        answer = model.generate(**inputs, max_new_tokens=4, do_sample=False, eos_token_id=None)
    assert answer.shape[1] == inputs["input_ids"].shape[1] + 4


def test_cosine_with_a_scaled_part_rises():
    """What scaling a head does to the direction of the sum: cos(x + y, x) < cos(alpha·x + y, x) for alpha > 1."""
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, 200, 16, generator=generator, dtype=torch.float64)
    alpha = 1 + 3 * torch.rand(200, 1, generator=generator, dtype=torch.float64)
    cos = torch.nn.functional.cosine_similarity
    assert (cos(alpha * x + y, x) > cos(x + y, x)).all()
