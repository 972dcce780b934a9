"""attach: what it reaches, that nothing active changes nothing, and that the model is always left as it was."""

import copy
import dataclasses
import gc
import weakref

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import headwise
from headwise import Edit, HeadEdits, HeadPlan, HeadSet, HeadwiseCache, HeadwiseError, SinkWindow
from headwise.errors import AttachError, EditError, PlanError, UnitError, WrongModelError
from tiny_helper import DECODERS, STACKS, inputs, logits, padded, random, state, tiny, tokens

ZERO = Edit.zero(HeadSet.parse("L0H1,L1H0"))
SMALL = SinkWindow(sinks=1, window=4)


def a_plan(layers=3, kv_heads=2, **labels):
    return HeadPlan.uniform(SMALL, layers, kv_heads, **labels)


# nothing active changes nothing; something active does


@pytest.mark.parametrize("base", ["sdpa", "eager"])
@pytest.mark.parametrize(("name", "stack"), STACKS)
def test_nothing_active_is_bit_identical(name, stack, base):
    model, batch = tiny(name, base), inputs(name, 40)
    before, clean = logits(model, batch), state(model)
    with headwise.attach(model, stack=stack):
        assert torch.equal(logits(model, batch), before)
    with headwise.attach(model, stack=stack, observers=[lambda call, out: None]):
        assert torch.equal(logits(model, batch), before)
    with headwise.attach(model, stack=stack, edits=ZERO):
        assert not torch.equal(logits(model, batch), before)
    assert torch.equal(logits(model, batch), before) and state(model) == clean


@pytest.mark.parametrize("base", ["sdpa", "eager"])
@pytest.mark.parametrize("name", DECODERS)
def test_nothing_active_is_bit_identical_with_padding_and_generate(name, base):
    model, batch = tiny(name, base), padded([9, 37, 21])
    before = logits(model, batch)
    ids = {k: v for k, v in batch.items() if k != "position_ids"}
    generated = model.generate(**ids, max_new_tokens=4, do_sample=False)
    with headwise.attach(model, observers=[lambda call, out: None]):
        assert torch.equal(logits(model, batch), before)
        assert torch.equal(model.generate(**ids, max_new_tokens=4, do_sample=False), generated)


# the function and its mask are registered together


@pytest.mark.parametrize("base", ["sdpa", "eager"])
@pytest.mark.parametrize("name", DECODERS)
def test_no_token_sees_a_later_one(name, base):
    model, ids = tiny(name, base), tokens(1, 40)
    other = ids.clone()
    other[:, 20] = (other[:, 20] + 1) % 256
    with headwise.attach(model, edits=ZERO):
        a, b = logits(model, {"input_ids": ids}), logits(model, {"input_ids": other})
    torch.testing.assert_close(a[:, :20], b[:, :20], atol=1e-5, rtol=0)  # a batch of other experts rounds otherwise
    assert (a[:, 20:] - b[:, 20:]).abs().amax(-1).min() > 1e-4


def test_function_and_mask_are_registered_under_one_name():
    for base in ("sdpa", "eager"):
        model = tiny("llama", base)
        with headwise.attach(model):
            name = model.config._attn_implementation
            assert name == f"headwise_{base}" and name in ALL_ATTENTION_FUNCTIONS
            assert ALL_MASK_ATTENTION_FUNCTIONS[name] is ALL_MASK_ATTENTION_FUNCTIONS[base]


@pytest.mark.parametrize("plan", [None, a_plan()])
def test_padding_does_not_reach_real_tokens(plan):
    model, batch = tiny(), padded([9, 30])
    other = dict(batch, input_ids=torch.where(batch["attention_mask"] == 0, 77, batch["input_ids"]))
    edit = Edit.mix_uniform(HeadSet.parse("L0H1,L1H0"), 0.7)
    with headwise.attach(model, edits=edit, plan=plan):
        a, b = logits(model, batch), logits(model, other)
    real = batch["attention_mask"].bool()
    assert torch.equal(a[real], b[real])


# handles


def test_handle_nesting_and_detaching_in_any_order():
    model, batch = tiny(), inputs("llama")
    clean, parts = state(model), [Edit.zero(HeadSet.parse(f"L{layer}H1")) for layer in range(3)]
    alone = [_with(model, batch, edits=part) for part in parts]
    both = _with(model, batch, edits=[parts[0], parts[2]])
    plain = logits(model, batch)
    for order in ((0, 1, 2), (2, 1, 0), (1, 0, 2), (1, 2, 0)):
        handles = [headwise.attach(model, edits=part) for part in parts]
        handles[order[0]].detach()
        if order[0] == 1:
            assert torch.equal(logits(model, batch), both)
        handles[order[1]].detach()
        assert torch.equal(logits(model, batch), alone[order[2]])
        handles[order[2]].detach()
        handles[order[2]].detach()  # again: nothing happens
        assert state(model) == clean and torch.equal(logits(model, batch), plain)


def _with(model, batch, **options):
    with headwise.attach(model, **options):
        return logits(model, batch)


def test_detach_takes_everything_away():
    model = tiny()
    clean = state(model)
    handles = [headwise.attach(model, edits=ZERO), headwise.attach(model, plan=a_plan())]
    headwise.detach(model)
    assert state(model) == clean
    for handle in handles:
        handle.detach()
    assert state(model) == clean


def test_exception_inside_the_context():
    model, batch = tiny(), inputs("llama")
    clean, before = state(model), logits(model, batch)
    with pytest.raises(ZeroDivisionError), headwise.attach(model, edits=ZERO):
        raise ZeroDivisionError
    assert state(model) == clean

    def fail(call, out):
        raise ZeroDivisionError(call.layer)

    with pytest.raises(ZeroDivisionError), headwise.attach(model, observers=[fail]):
        logits(model, batch)
    assert state(model) == clean and torch.equal(logits(model, batch), before)


def test_both_towers_of_clip():
    model, batch = tiny("clip"), inputs("clip")
    clean, before = state(model), logits(model, batch)
    text = headwise.attach(model, edits=ZERO, stack="text_model")
    only_text = logits(model, batch)
    vision = headwise.attach(model, edits=ZERO, stack="vision_model")
    both = logits(model, batch)
    assert not torch.equal(only_text[:2], before[:2]) and torch.equal(only_text[2:], before[2:])
    assert torch.equal(both[:2], only_text[:2]) and not torch.equal(both[2:], before[2:])
    text.detach()
    assert torch.equal(logits(model, batch), torch.cat([before[:2], both[2:]]))
    vision.detach()
    assert state(model) == clean


# several models


@pytest.mark.parametrize("first_goes", [0, 1])
def test_two_models_with_one_config_object(first_goes):
    models = [tiny(), tiny()]
    models[1] = type(models[1])(models[0].config).eval()  # other weights, the same config
    models[1].config = models[0].config
    assert all(a.config is b.config for a, b in zip(models[0].modules(), models[1].modules()) if hasattr(a, "config"))
    batch = inputs("llama")
    plain = [logits(m, batch) for m in models]
    handles = [headwise.attach(m, edits=ZERO) for m in models]
    zeroed = [logits(m, batch) for m in models]
    handles[first_goes].detach()
    other = 1 - first_goes
    assert torch.equal(logits(models[first_goes], batch), plain[first_goes])
    assert torch.equal(logits(models[other], batch), zeroed[other])  # not a silent no-op
    assert torch.equal(logits(models[first_goes], batch), plain[first_goes])
    handles[other].detach()
    assert models[0].config._attn_implementation == "sdpa"
    assert all(torch.equal(logits(m, batch), p) for m, p in zip(models, plain))


def test_two_models_do_not_share_anything():
    a, b, batch = tiny(), tiny("qwen3", "eager"), inputs("llama")
    plain = logits(b, batch)
    with headwise.attach(a, edits=ZERO), headwise.attach(b):
        assert torch.equal(logits(b, batch), plain)
        assert not torch.equal(logits(a, batch), logits(tiny(), batch))


def test_a_changed_attention_implementation_is_refused():
    model = tiny()
    with headwise.attach(model, edits=ZERO):
        model.set_attn_implementation("eager")
        with pytest.raises(AttachError, match="eager"):
            logits(model, inputs("llama"))


# copies and files


def test_deepcopy_is_independent():
    model, batch = tiny(), inputs("llama")
    before = logits(model, batch)
    handle = headwise.attach(model, edits=ZERO, plan=a_plan())
    zeroed = logits(model, batch)
    twin = copy.deepcopy(model)
    handle.detach()
    assert torch.equal(logits(model, batch), before)
    assert torch.equal(logits(twin, batch), zeroed)
    with headwise.attach(twin, edits=Edit.zero(HeadSet.parse("L2H2"))):
        assert not torch.equal(logits(twin, batch), zeroed)
        assert torch.equal(logits(model, batch), before)
    headwise.detach(twin)
    assert torch.equal(logits(twin, batch), before) and state(twin) == state(model)


def test_copy_of_a_detached_model_is_clean():
    model = tiny()
    headwise.attach(model, edits=ZERO).detach()
    assert state(copy.deepcopy(model)) == state(tiny())


@pytest.mark.parametrize("base", ["sdpa", "eager"])
def test_save_and_reload_while_attached(tmp_path, base):
    model, batch = tiny("llama", base), inputs("llama")
    before = logits(model, batch)
    with headwise.attach(model, edits=ZERO, plan=a_plan()):
        inside = logits(model, batch)
        model.save_pretrained(tmp_path)
        assert torch.equal(logits(model, batch), inside)
    assert "headwise" not in (tmp_path / "config.json").read_text()
    again = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation=base).eval()
    assert again.config._attn_implementation == base
    assert torch.equal(logits(again, batch), before)
    assert headwise.fingerprint(again) == headwise.fingerprint(model)


def test_fingerprint_is_the_same_before_and_after_saving(tmp_path):
    """transformers fills entries of the config in when a model is saved or first trained; its heads stay what they are."""
    model = tiny("llama")
    before = headwise.fingerprint(model)
    model.save_pretrained(tmp_path)
    model.config.problem_type = "single_label_classification"
    assert headwise.fingerprint(model) == before
    assert headwise.fingerprint(type(model).from_pretrained(tmp_path)) == before


def test_fingerprint_is_the_same_attached_or_not():
    model = tiny("gemma3")
    before = headwise.fingerprint(model)
    with headwise.attach(model, edits=ZERO):
        assert headwise.fingerprint(model) == before
    assert headwise.fingerprint(tiny("gemma3", "eager")) == before
    assert headwise.fingerprint(tiny("llama")) != before


def test_the_cache_of_a_pass_is_not_kept_alive():
    model = tiny()
    with headwise.attach(model, plan=a_plan()), torch.no_grad():
        out = model(tokens(1, 12))
        assert isinstance(out.past_key_values, HeadwiseCache)
        cache = weakref.ref(out.past_key_values)
        del out
        gc.collect()
        assert cache() is None


# refusals, by name and reason, with the model left as it was

HEADS_2 = HeadSet.parse("L0H0,L0H1")
OTHER = headwise.Fingerprint(architecture="llama", config_hash="0" * 16, layers=3, heads=4, kv_heads=2)
REFUSED = [
    ("unknown head", {"edits": lambda: Edit.zero(HeadSet.parse("L0H4"))}, UnitError, "L0H4"),
    ("unknown layer", {"edits": lambda: Edit.zero(HeadSet.parse("L3H0"))}, UnitError, "L3H0"),
    ("empty set", {"edits": lambda: Edit.zero(HeadSet.empty())}, UnitError, "empty"),
    ("kv heads", {"edits": lambda: Edit.zero(HeadSet.parse("L0K1"))}, EditError, "kind"),
    ("other model's edits", {"edits": lambda: HeadEdits.of(ZERO, fingerprint=OTHER)}, WrongModelError, "config_hash"),
    ("other model's plan", {"plan": lambda: a_plan(fingerprint=OTHER)}, WrongModelError, "config_hash"),
    ("plan of other depth", {"plan": lambda: a_plan(layers=4)}, PlanError, "4"),
    ("plan of other width", {"plan": lambda: a_plan(kv_heads=4)}, PlanError, "4"),
    ("no plan", {"plan": lambda: "sinks1+window4"}, AttachError, "HeadPlan"),
    ("no edit", {"edits": lambda: "L0H1"}, EditError, "Edit"),
    ("no such stack", {"stack": lambda: "vision_model"}, AttachError, "vision_model"),
]


@pytest.mark.parametrize(("options", "error", "says"), [r[1:] for r in REFUSED], ids=[r[0] for r in REFUSED])
@pytest.mark.parametrize("already", [False, True])
def test_a_refused_attach_leaves_the_model_as_it_was(options, error, says, already):
    model, batch = tiny(), inputs("llama")
    handle = headwise.attach(model, edits=ZERO) if already else None
    clean, before = state(model), logits(model, batch)
    with pytest.raises(error, match=says) as caught:
        headwise.attach(model, **{name: make() for name, make in options.items()})
    assert isinstance(caught.value, HeadwiseError)
    assert state(model) == clean and torch.equal(logits(model, batch), before)
    if handle:
        handle.detach()
    assert state(model) == state(tiny())


def test_only_one_plan_at_a_time():
    model = tiny()
    with headwise.attach(model, plan=a_plan()):
        inside = state(model)
        with pytest.raises(AttachError, match="already has a plan"):
            headwise.attach(model, plan=HeadPlan.full(3, 2))
        assert state(model) == inside
    headwise.attach(model, plan=HeadPlan.full(3, 2)).detach()


@pytest.mark.parametrize(
    ("name", "layers", "kv_heads", "stack", "says"),
    [
        ("bert", 3, 4, None, "bidirectional"),
        ("vit", 2, 4, None, "bidirectional"),
        ("deepseek-v3", 3, 4, None, "latent"),
    ],
)
def test_a_plan_that_cannot_be_applied_is_refused(name, layers, kv_heads, stack, says):
    model = tiny(name)
    clean = state(model)
    with pytest.raises(AttachError, match=says):
        headwise.attach(model, plan=a_plan(layers, kv_heads), stack=stack)
    assert state(model) == clean


def test_models_that_cannot_be_reached_are_named_with_the_reason():
    from transformers import AlbertConfig, AlbertModel, FNetConfig, FNetModel

    with pytest.raises(AttachError, match="Linear is no transformers model"):
        headwise.attach(torch.nn.Linear(2, 2))
    fnet = FNetModel(FNetConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, intermediate_size=32))
    with pytest.raises(AttachError, match="FNetModel cannot be attached.*ALL_ATTENTION_FUNCTIONS"):
        headwise.attach(fnet)
    shape = {"hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 3, "intermediate_size": 32}
    albert = AlbertModel(AlbertConfig(vocab_size=64, embedding_size=16, **shape))
    with pytest.raises(AttachError, match="AlbertModel.*3 times.*shared weights"):
        headwise.attach(albert)


def test_stack_must_be_chosen_where_there_are_several():
    model = tiny("clip")
    with pytest.raises(AttachError, match=r"text_model.*vision_model.*stack="):
        headwise.attach(model)
    with pytest.raises(AttachError, match="matches 2"):
        headwise.attach(model, stack="encoder")
    with pytest.raises(AttachError, match="matches 0"):
        headwise.attach(model, stack="audio")
    assert headwise.find_stack(model, "text_model").owner is model.text_model.encoder


def test_what_find_stack_says():
    expected = {"llama": (3, 4, 2, 16), "gpt2": (3, 4, 4, 16), "deepseek-v3": (3, 4, 4, 16), "vit": (2, 4, 4, 16)}
    for name, numbers in expected.items():
        stack = headwise.find_stack(tiny(name))
        assert (stack.layers, stack.heads, stack.kv_heads, stack.head_dim) == numbers
    assert headwise.fingerprint(tiny("qwen3-moe")).experts == 8 and headwise.fingerprint(tiny("mixtral")).experts == 4


def test_ablate_in_one_line():
    model, batch = tiny(), inputs("llama")
    with headwise.ablate(model, "L0H1,L1H0"):
        assert torch.equal(logits(model, batch), _with(tiny(), batch, edits=ZERO))
    with headwise.ablate(model, "L0H0,L0H1", mode="uniform"):
        assert torch.equal(logits(model, batch), _with(tiny(), batch, edits=Edit.uniform(HEADS_2)))
    with headwise.ablate(model, "L0H0,L0H1", mode="mean", mean=random(2, 16)):
        assert torch.equal(logits(model, batch), _with(tiny(), batch, edits=Edit.replace(HEADS_2, random(2, 16))))
    for mode in ("mean", "random"):
        with pytest.raises(EditError, match="mean"):
            headwise.ablate(model, "L0H1", mode=mode)
    assert state(model) == state(tiny())


def test_a_dense_prefill_means_the_same_with_and_without_a_cache():
    model, ids = tiny("llama"), torch.arange(3, 43)[None]
    plan = headwise.HeadPlan.uniform(headwise.SinkWindow(2, 8), 3, 2, prefill="dense")
    with torch.no_grad(), headwise.attach(model, plan=plan):
        kept, bare = model(ids, use_cache=True).logits, model(ids, use_cache=False).logits
    assert torch.equal(kept, bare)
    with torch.no_grad(), headwise.attach(model, plan=dataclasses.replace(plan, prefill="masked")):
        assert not torch.allclose(model(ids, use_cache=False).logits, bare)


def test_a_window_longer_than_the_models_context_is_refused():
    model = tiny("llama")
    context, before = model.config.max_position_embeddings, state(model)
    with pytest.raises(PlanError, match="saves nothing"):
        headwise.attach(model, plan=headwise.HeadPlan.uniform(headwise.SinkWindow(4, context), 3, 2))
    assert state(model) == before
    headwise.attach(model, plan=headwise.HeadPlan.uniform(headwise.SinkWindow(4, context - 5), 3, 2)).detach()
