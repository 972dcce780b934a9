"""VAR: exact against the map form, what stays untouched, generation, batches, several images, and what is refused."""

import math

import pytest
import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from headwise.attach import attach, fingerprint
from headwise.attach.sinks import sink_value
from headwise.errors import ArtifactError, AttachError, EditError, UnitError, WrongModelError
from headwise.hub import load_model
from headwise.steer import var
from headwise.steer.var import VAR, redistribute_map
from headwise.units import HeadSet
from vlm_helper import IMAGE, llava, one_of, prompt, qwen2_vl

OPTIONS = {"dims": (5, 9), "tau": 2.0, "rho": 0.3, "minimum_mass": 0.05, "layers": (0, 1, 2, 3)}
ROWS = ([1, "img", 7, 8, 9, 10], [1, 2, 3, "img", 7, 8])


def rule(**options):
    return VAR(**{**OPTIONS, **options})


def logits(model, inputs):
    with torch.no_grad():
        return model(**inputs).logits


def oracle_logits(model, inputs, rule):
    """The same by dense maps: an attention function of its own, sinks from hooks of its own; batch of one, no padding."""
    image = inputs["input_ids"] == IMAGE
    behind = torch.arange(image.shape[1]) > int(image[0].int().argmax())
    sinks, handles = {}, []

    def see(layer):
        def hook(module, args, kwargs):
            x = (args[0] if args else kwargs["hidden_states"]).float()
            rms = (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()
            sinks[layer] = ((x / rms)[..., list(rule.dims)].abs().amax(-1)) > rule.tau

        return hook

    def dense(module, q, k, v, mask, scaling=None, **kw):
        G = q.shape[1] // k.shape[1]
        weights = q @ k.repeat_interleave(G, 1).mT * scaling
        N = q.shape[2]
        weights = weights.masked_fill(torch.ones(N, N).triu(1).bool(), -torch.inf).softmax(-1)
        options = {name: getattr(rule, name) for name in ("move", "rho", "minimum_mass", "centric")}
        if module.layer_idx in rule.layers:
            edited = redistribute_map(weights, image, sinks[module.layer_idx], **options)
            weights = torch.where((behind & ~image[0])[:, None], edited, weights)
        return (weights @ v.repeat_interleave(G, 1)).transpose(1, 2), None

    AttentionInterface.register("var_oracle", dense)
    AttentionMaskInterface.register("var_oracle", ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    config = model.config.text_config
    for layer, block in enumerate(model.model.language_model.layers):
        handles.append(block.register_forward_pre_hook(see(layer), with_kwargs=True))
    before, config._attn_implementation = config._attn_implementation, "var_oracle"
    try:
        return logits(model, inputs)
    finally:
        config._attn_implementation = before
        for handle in handles:
            handle.remove()


# -- the map form ----------------------------------------------------------------------------------------------------------


def maps(seed=0, B=2, H=3, N=6, M=10):
    generator = torch.Generator().manual_seed(seed)
    weights = torch.rand(B, H, N, M, generator=generator, dtype=torch.float64) ** 3
    weights = weights.masked_fill(torch.arange(M) > torch.arange(N)[:, None] + M - N, 0)
    image = torch.zeros(B, M, dtype=torch.bool)
    image[:, 1:6] = True
    sinks = torch.zeros(B, M, dtype=torch.bool)
    sinks[:, [0, 2]] = True
    return weights / weights.sum(-1, keepdim=True), image, sinks


def reference_routine(weights, image, sinks, p, rho_code, summ):
    """What the released code does, head by head, for one row; its p and rho are one minus the paper's."""
    out = weights.clone()
    visual_sinks, rest = (image & sinks).nonzero()[:, 0], (image & ~sinks).nonzero()[:, 0]
    for h in range(weights.shape[0]):
        for i in range(weights.shape[1]):
            row = weights[h, i]
            total = row[image].sum()
            if total < summ or row[visual_sinks].sum() / total > rho_code:
                continue
            budget = (1 - p) * row[sinks].sum()
            out[h, i, sinks] = row[sinks] * p
            out[h, i, rest] = row[rest] + budget * row[rest] / row[rest].sum()
    return out


def test_compatible_with_the_reference_routine():
    weights, image, sinks = maps(B=1)
    expected = reference_routine(weights[0], image[0], sinks[0], p=0.6, rho_code=0.5, summ=0.2)
    torch.testing.assert_close(redistribute_map(weights, image, sinks, move=0.4, rho=0.5)[0], expected)
    assert not torch.equal(expected, weights[0])


@pytest.mark.parametrize("move", [0.25, 0.6, 1.0])
def test_rows_keep_their_sum_and_the_rest_its_ratios(move):
    weights, image, sinks = maps()
    edited = redistribute_map(weights, image, sinks, move=move, rho=0.4)
    changed = (edited != weights).any(-1)
    assert changed.any() and not changed.all()
    torch.testing.assert_close(edited.sum(-1), torch.ones_like(edited.sum(-1)))
    assert (edited >= 0).all() and (edited[weights == 0] == 0).all()
    text = ~image & ~sinks
    assert torch.equal(edited[..., text[0]], weights[..., text[0]])
    torch.testing.assert_close(edited[changed][:, sinks[0]], weights[changed][:, sinks[0]] * (1 - move))
    rest = image[0] & ~sinks[0]
    before, after = weights[changed][:, rest], edited[changed][:, rest]
    torch.testing.assert_close(after / after.sum(-1, keepdim=True), before / before.sum(-1, keepdim=True))


def test_moving_all_of_visual_sinks_is_removing_them():
    weights, image, sinks = maps()
    sinks = sinks & image
    edited = redistribute_map(weights, image, sinks, move=1.0, rho=0.0, minimum_mass=0.0)
    kept = weights.masked_fill((image & sinks)[:, None, None], 0.0)
    total, rest = ((x * image[:, None, None]).sum(-1, keepdim=True) for x in (weights, kept))
    expected = torch.where(image[:, None, None], kept * total / rest, kept)
    torch.testing.assert_close(edited, expected)


def test_fewer_are_chosen_as_thresholds_rise():
    weights, image, sinks = maps(N=8, M=12)

    def count(**options):
        return int((redistribute_map(weights, image, sinks, **options) != weights).any(-1).sum())

    by_rho = [count(rho=rho) for rho in (0.0, 0.3, 0.6, 0.9, 1.1)]
    by_mass = [count(rho=0.3, minimum_mass=mass) for mass in (0.0, 0.3, 0.6, 1.1)]
    assert by_rho == sorted(by_rho, reverse=True) and by_rho[0] > by_rho[-1] == 0
    assert by_mass == sorted(by_mass, reverse=True) and by_mass[0] > by_mass[-1] == 0


def test_no_rest_no_change():
    weights, image, sinks = maps()
    edited = redistribute_map(weights, image, sinks | image, move=1.0, rho=0.0, minimum_mass=0.0)
    assert torch.equal(edited, weights)


# -- in a model ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"move": 1.0}, {"centric": False}, {"layers": (1, 3), "rho": 0.6}])
def test_partial_sums_equal_the_map_form(options):
    model, inputs = llava(), prompt(ROWS[0])
    with rule(**options).attach(model) as running:
        found = logits(model, inputs)
    assert sum(running.selected.values()) > 0
    torch.testing.assert_close(found, oracle_logits(model, inputs, rule(**options)), atol=1e-5, rtol=1e-5)


def test_eager_and_bfloat16():
    inputs = prompt(ROWS[0])
    with rule().attach(model := llava()):
        expected = logits(model, inputs)
    with rule().attach(eager := llava(attn_implementation="eager")):
        torch.testing.assert_close(logits(eager, inputs), expected, atol=1e-5, rtol=1e-5)
    half = llava(dtype="bfloat16")
    inputs["pixel_values"] = inputs["pixel_values"].bfloat16()
    with rule().attach(half) as running:
        found = logits(half, inputs)
    assert found.dtype == torch.bfloat16 and sum(running.selected.values()) > 0
    assert (found.float() - expected).norm() < 0.1 * expected.norm()


@pytest.mark.parametrize("dtype, bound", [("float32", 1e-5), ("bfloat16", 2**-7)])
def test_each_layer_is_the_map_of_its_own_queries_up_to_rounding(dtype, bound):
    """Weights are made in float32 from what the layer itself was given: only the outputs are rounded to their dtype."""
    model, inputs, gaps = llava(dtype=dtype), prompt(ROWS[0]), []
    inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
    made = rule(move=1.0)
    with made.attach(model) as running:

        def compare(call, out):
            q, k, v = call.q.float(), call.k.float().repeat_interleave(2, 1), call.v.float().repeat_interleave(2, 1)
            N, image = q.shape[2], running.table
            weights = (q @ k.mT * call.scale).masked_fill(torch.ones(N, N).triu(1).bool(), -torch.inf).softmax(-1)
            edited = redistribute_map(weights, image, running.sinks[call.layer], move=1.0, rho=0.3, minimum_mass=0.05)
            edited = torch.where(running.text_queries()[:, None, :, None], edited, weights)
            wanted = (edited @ v).transpose(1, 2)
            gaps.append(float((out.float() - wanted).abs().max() / wanted.abs().max()))

        with attach(model, observers=[compare], stack="language_model"):
            logits(model, inputs)
        assert sum(running.selected.values()) > 0
    assert len(gaps) == 4 and max(gaps) < bound


@pytest.mark.parametrize("options", [{"move": 0.0}, {"tau": math.inf}, {"rho": 1.01}, {"dims": (3,), "tau": 7.9}])
def test_nothing_to_do_is_bit_identical(options):
    model, inputs = llava(), prompt(*ROWS)
    before = logits(model, inputs)
    with rule(**options).attach(model):
        assert torch.equal(logits(model, inputs), before)


def test_only_text_behind_the_image_changes_and_the_model_is_left_as_it_was():
    model, inputs = llava(), prompt(ROWS[1])
    before = logits(model, inputs)
    with rule().attach(model):
        inside = logits(model, inputs)
    behind = 3 + 16
    assert torch.equal(inside[:, :behind], before[:, :behind])
    assert (inside[:, behind:] != before[:, behind:]).any()
    assert torch.equal(logits(model, inputs), before)
    assert model.config.text_config._attn_implementation == "sdpa"
    assert not model.model._forward_pre_hooks and not model.model.language_model.layers[0]._forward_pre_hooks


def test_only_named_heads():
    model, inputs = llava(), prompt(ROWS[0])
    with rule(heads=HeadSet.parse("L1H2"), layers=(1,), centric=False).attach(model) as running:
        logits(model, inputs)
    assert running.selected == {1: 4}  # one head, four text queries


@pytest.mark.parametrize("padding", ["left", "right"])
def test_batch_is_its_rows(padding):
    model = llava()
    inputs = prompt(*ROWS, padding=padding)
    with rule().attach(model):
        together = logits(model, inputs)
        for row in range(2):
            alone = logits(model, one_of(inputs, row, [row]))[0]
            own = together[row][inputs["attention_mask"][row].bool()]
            torch.testing.assert_close(own, alone, atol=2e-5, rtol=1e-4)


def test_several_images_and_text_between():
    model = llava()
    inputs = prompt([1, "img", 7, 8, "img", 9, 10], [1, "img", 7, 9])
    with rule().attach(model) as running:
        together = logits(model, inputs)
        assert running.table.sum(1).tolist() == [32, 16]
        alone = logits(model, one_of(inputs, 0, [0, 1]))[0]
    own = together[0][inputs["attention_mask"][0].bool()]
    torch.testing.assert_close(own, alone, atol=2e-5, rtol=1e-4)


def test_generate_with_cache_without_and_in_chunks():
    model, inputs = llava(), prompt(*ROWS)
    plain = model.generate(**inputs, max_new_tokens=12, do_sample=False, eos_token_id=None)
    with rule(move=1.0).attach(model):
        cached = model.generate(**inputs, max_new_tokens=12, do_sample=False, eos_token_id=None)
        fresh = model.generate(**inputs, max_new_tokens=12, do_sample=False, eos_token_id=None, use_cache=False)
        beams = model.generate(**inputs, max_new_tokens=4, num_beams=2, do_sample=False, eos_token_id=None)
    assert torch.equal(cached, fresh) and not torch.equal(cached, plain)
    assert beams.shape[0] == 2


def test_decoding_equals_one_forward_pass_with_frozen_sinks():
    model, inputs = llava(), prompt(ROWS[0])
    with rule().attach(model) as running, torch.no_grad():
        out = model(**inputs, use_cache=True)
        sinks = {layer: flags.clone() for layer, flags in running.sinks.items()}
        mask = torch.ones(1, inputs["input_ids"].shape[1] + 1, dtype=torch.long)
        step = model(torch.tensor([[11]]), attention_mask=mask, past_key_values=out.past_key_values)
        assert all(torch.equal(flags, running.sinks[layer]) for layer, flags in sinks.items())
        assert running.selected[3] > 0
    longer = prompt([*ROWS[0], 11])
    expected = oracle_logits(model, longer, rule())  # token 11 is no sink here, else the two would differ by design
    torch.testing.assert_close(step.logits[:, -1], expected[:, -1], atol=2e-5, rtol=1e-4)


def test_qwen2_vl():
    model, inputs = qwen2_vl(rows=2)
    before = logits(model, inputs)
    with rule(layers=(0, 1, 2), tau=0.8, centric=False).attach(model) as running:
        changed = logits(model, inputs)
        answer = model.generate(**inputs, max_new_tokens=3, do_sample=False, eos_token_id=None)
    assert running.table.sum(1).tolist() == [4, 4] and sum(running.selected.values()) > 0
    assert (changed[:, 7:] != before[:, 7:]).any() and torch.equal(changed[:, :6], before[:, :6])
    assert answer.shape[1] == inputs["input_ids"].shape[1] + 3
    assert torch.equal(logits(model, inputs), before)


# -- the method, its artifact, its errors ----------------------------------------------------------------------------------


def test_method_finds_planted_dimensions_and_defaults():
    model, tokenizer = load_model("tiny-random-llava")
    with torch.no_grad():  # a token of the text gets massive activations in dimensions 11 and 40
        model.model.language_model.embed_tokens.weight[ord("e"), [11, 40]] = 60.0
    made = var(model, tokenizer, tau=4.0)
    assert set(made.dims) == {11, 40} and made.layers == (2,) and (made.move, made.rho) == (0.6, 0.8)
    assert made.fingerprint == fingerprint(model, "language_model")


def test_planted_sinks_are_found_and_no_others():
    model, e = llava(), ord("e")
    with torch.no_grad():
        model.model.language_model.embed_tokens.weight[e, [11, 40]] = 60.0
    inputs = prompt([1, "img", e, 7, e, 9], [1, e, 3, "img", 7, 8])
    with rule(dims=(11, 40), tau=4.0, layers=(1, 2, 3)).attach(model) as running:
        logits(model, inputs)
    planted = [[1, *[IMAGE] * 16, e, 7, e, 9], [1, e, 3, *[IMAGE] * 16, 7, 8]]
    for layer in (1, 2, 3):
        for row, ids in enumerate(planted):
            assert running.sinks[layer][row, : len(ids)].tolist() == [token == e for token in ids]


def test_saves_and_loads(tmp_path):
    made = VAR(
        **{**OPTIONS, "tau": math.inf, "heads": HeadSet.parse("L1H2")}, fingerprint=fingerprint(llava(), "language")
    )
    made.save(tmp_path / "var.json")
    assert VAR.load(tmp_path / "var.json") == made
    other, _ = load_model("tiny-random-qwen2-vl")
    with pytest.raises(WrongModelError, match="VAR was made for"):
        made.attach(other)
    (tmp_path / "var.json").write_text("{}")
    with pytest.raises(ArtifactError):
        VAR.load(tmp_path / "var.json")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"move": 1.5}, "move is 1.5"),
        ({"move": -0.1}, "move is -0.1"),
        ({"rho": -1}, "rho is -1"),
        ({"tau": 0}, "tau is 0"),
        ({"tau": math.nan}, "tau is nan"),
        ({"dims": ()}, "dims is empty"),
        ({"layers": ()}, "layers is empty"),
        ({"heads": HeadSet.empty()}, "at least one head"),
    ],
)
def test_bad_options(options, said):
    with pytest.raises(EditError, match=said):
        rule(**options)


def test_refused_where_it_cannot_be_applied():
    model = llava()
    with pytest.raises(EditError, match=r"sink dimension is 64.*0 to 63"):
        rule(dims=(64,)).attach(model)
    with pytest.raises(EditError, match="layer is 4"):
        rule(layers=(4,)).attach(model)
    with pytest.raises(UnitError, match="L9H0"):
        rule(heads=HeadSet.parse("L9H0")).attach(model)
    with pytest.raises(EditError, match="phi is at most √C = 8.0"):
        rule(tau=20.0).attach(model)
    with pytest.raises(AttachError, match="no image token"):
        rule().attach(load_model("tiny-random-llama")[0])
    with pytest.raises(EditError, match="no massive activations"):
        var(*load_model("tiny-random-llava"), tau=7.9)
    with rule().attach(model):
        with pytest.raises(AttachError, match=r"no image token \(259,\) in row \[1\]"):
            model(torch.tensor([[1, *[IMAGE] * 16, 5], [1] * 18]), pixel_values=torch.randn(1, 3, 32, 32))
        with pytest.raises(AttachError, match="inputs_embeds"):
            model(inputs_embeds=torch.randn(1, 4, 64))
    with rule().attach(model.train()), pytest.raises(AttachError, match=r"the decoder reads|no image"):
        model.model.language_model(torch.arange(5)[None])
    assert not model.model._forward_pre_hooks


def test_sink_value_is_the_formula_and_ignores_scale():
    x = torch.randn(3, 7, 64, generator=torch.Generator().manual_seed(1))
    x[0, 0, 5] = 300.0
    brute = torch.stack([x[..., d].abs() for d in (5, 9)]).amax(0) / (x.pow(2).mean(-1) + 1e-6).sqrt()
    torch.testing.assert_close(sink_value(x, (5, 9)), brute)
    torch.testing.assert_close(sink_value(37.0 * x, (5, 9)), brute, atol=1e-4, rtol=1e-4)
    assert sink_value(x, (5, 9)).max() <= 8.0 and sink_value(x.half() * 200, (5,)).isfinite().all()
