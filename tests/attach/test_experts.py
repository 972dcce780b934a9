"""Experts of transformers models: read, recorded, switched off, forced, re-routed; the model's own numbers otherwise."""

import copy

import pytest
import torch
import transformers

import headwise
from headwise.attach.experts import attach_experts, find_experts, observe_experts
from headwise.attach.gates import GateRule, infer_rule
from headwise.errors import AttachError, EditError, RouteError, UnitError, WrongModelError
from headwise.expert_edits import ExpertEdit, ExpertEdits
from headwise.units import HeadSet
from tiny_helper import padded, tiny, tokens

SMALL = dict(
    vocab_size=320,
    hidden_size=32,
    intermediate_size=16,
    moe_intermediate_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=2,
    head_dim=16,
    initializer_range=0.2,
    num_experts=6,
    num_local_experts=6,
    num_experts_per_tok=2,
)
OTHERS = {"Olmoe": {}, "GptOss": {"layer_types": ["full_attention"] * 2}, "Qwen2Moe": {"decoder_sparse_step": 1}}
NAMES = ["mixtral", "qwen3-moe", "deepseek-v3", *OTHERS]


def moe(name):
    if name not in OTHERS:
        return tiny(name)
    torch.manual_seed(1)
    config = getattr(transformers, f"{name}Config")(**SMALL | OTHERS[name])
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    return model


@pytest.fixture(params=NAMES)
def model(request):
    return moe(request.param)


@pytest.fixture
def ids():
    return tokens(2, 17)


def last(model):
    return find_experts(model).layers[-1]


@torch.no_grad()
def logits(model, **batch):
    return model(**batch).logits


def test_every_moe_class_is_found_and_dense_models_are_refused(model):
    stack = find_experts(model)
    assert stack.experts == last(model).count and stack.depth == model.config.num_hidden_layers
    with pytest.raises(AttachError, match="no experts to reach"):
        find_experts(tiny("llama"))
    with pytest.raises(AttachError, match="no transformers model"):
        find_experts(torch.nn.Linear(2, 2))


def test_weights_of_one_expert_are_views_found_by_its_address(model, ids):
    stack = find_experts(model)
    number = stack.numbers()[-1]
    mine = stack.weights(f"L{number}E1")
    assert {"gate_up_proj", "down_proj"} <= set(mine) and all(part.ndim <= 2 for part in mine.values())
    with attach_experts(model, edits=ExpertEdits.scale(f"L{number}E1", 0.0)):
        without = logits(model, input_ids=ids)
    with torch.no_grad():
        for name, part in mine.items():
            if name.startswith("down_proj"):
                part.zero_()  # of the model's own parameter
    torch.testing.assert_close(logits(model, input_ids=ids), without, rtol=1e-4, atol=1e-4)
    for address, text in ((f"L{number}E99", "names no routed expert"), ("L0H0", "E0 to E"), ("L77E0", "in layers")):
        with pytest.raises(UnitError, match=text):
            stack.weights(address)


def test_nothing_active_is_bit_identical_and_leaves_no_hook(model, ids):
    before = logits(model, input_ids=ids)
    with attach_experts(model, edits=ExpertEdits()):
        assert torch.equal(logits(model, input_ids=ids), before)
        assert not last(model).experts._forward_pre_hooks
    with observe_experts(model, probs=True, per_token=True):
        assert torch.equal(logits(model, input_ids=ids), before)
    assert not last(model).experts._forward_pre_hooks and not last(model).router._forward_hooks
    assert not find_experts(model).owner.__dict__.get("_headwise_experts")


def test_counts_sum_to_tokens_times_k_and_probs_to_tokens(model, ids):
    with observe_experts(model, probs=True, per_token=True) as record:
        logits(model, input_ids=ids)
    layer = last(model).layer
    assert record.tokens.tolist() == [17, 17]
    assert record.count[:, layer].sum(-1).tolist() == [34, 34]
    torch.testing.assert_close(
        record.prob[:, layer].sum(-1), torch.full((2,), 17.0, dtype=torch.float64), atol=1e-4, rtol=0
    )
    assert record.probs(layer).shape == (34, last(model).count)
    torch.testing.assert_close(record.load()[layer].sum(), torch.tensor(1.0, dtype=torch.float64))
    assert record.rows(layer).tolist() == [0] * 17 + [1] * 17 and record.positions(layer)[:3].tolist() == [0, 1, 2]


def test_the_record_is_what_the_router_chose(model, ids):
    seen = []
    handle = last(model).experts.register_forward_pre_hook(lambda module, args: seen.append(args))
    with observe_experts(model, per_token=True) as record:
        logits(model, input_ids=ids)
    handle.remove()
    torch.testing.assert_close(record.index(last(model).layer), seen[0][1])
    torch.testing.assert_close(record.weights(last(model).layer), seen[0][2])


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_does_not_count_and_batches_equal_singles(model, side):
    batch = padded([9, 17])
    if side == "right":
        batch = {"input_ids": batch["input_ids"].roll(-8, 1), "attention_mask": batch["attention_mask"].roll(-8, 1)}
        batch["input_ids"][1] = padded([9, 17])["input_ids"][1]
        batch["attention_mask"][1] = 1
    with observe_experts(model) as record:
        logits(model, **batch)
    singles = []
    for row in range(2):
        one = batch["input_ids"][row][batch["attention_mask"][row].bool()][None]
        with observe_experts(model) as alone:
            logits(model, input_ids=one)
        singles.append(alone.count)
    assert record.tokens.tolist() == [9, 17]
    assert torch.equal(record.count, torch.cat(singles))


def test_chunks_and_cached_decoding_count_each_token_once(model, ids):
    with observe_experts(model) as whole:
        logits(model, input_ids=ids)
    with observe_experts(model) as parts, torch.no_grad():
        cache = model(ids[:, :9], use_cache=True).past_key_values
        cache = model(ids[:, 9:16], past_key_values=cache, use_cache=True).past_key_values
        model(ids[:, 16:], past_key_values=cache, use_cache=True)
    assert torch.equal(whole.count, parts.count)
    with observe_experts(model, phase="decode") as decoded:
        model.generate(ids, max_new_tokens=4, min_new_tokens=4, do_sample=False, pad_token_id=0)
    assert decoded.count[:, last(model).layer].sum(-1).tolist() == [6, 6]  # the last token is never fed back


def test_off_equals_the_manual_sum_and_keeps_the_total_weight(model, ids):
    layer = last(model)
    with observe_experts(model, per_token=True) as plain:
        logits(model, input_ids=ids)
    off = int(plain.count[:, layer.layer].sum(0).argmax())
    edits = ExpertEdits.off(HeadSet.of([(layer.layer, off)], "expert"))
    with headwise.attach(model, edits=edits), observe_experts(model, per_token=True) as record:
        logits(model, input_ids=ids)
    index, weight = plain.index(layer.layer), plain.weights(layer.layer)
    kept = weight.masked_fill(index == off, 0)
    expected = kept * (weight.sum(-1, keepdim=True) / kept.sum(-1, keepdim=True))
    torch.testing.assert_close(record.weights(layer.layer), expected)
    torch.testing.assert_close(record.weights(layer.layer).sum(-1), weight.sum(-1))
    assert record.count[:, layer.layer, off].sum() == 0  # its forward is not run for any token
    same = ~(index == off).any(-1)
    assert torch.equal(record.weights(layer.layer)[same], weight[same])


def test_all_chosen_experts_off_leaves_nothing_of_them(ids):
    model = moe("mixtral")
    edits = ExpertEdits.off("L2E0,L2E1,L2E2,L2E3")
    outputs = []
    handle = last(model).experts.register_forward_hook(lambda module, args, out: outputs.append(out))
    with attach_experts(model, edits=edits):
        logits(model, input_ids=ids)
    handle.remove()
    assert not outputs[0].any()


def test_ban_refills_and_never_chooses(model, ids):
    layer, count = last(model), last(model).count
    banned = list(range(count - 3))
    edits = ExpertEdits.ban(HeadSet.of([(layer.layer, e) for e in banned], "expert"))
    with headwise.attach(model, edits=edits), observe_experts(model, per_token=True) as record:
        logits(model, input_ids=ids)
    index = record.index(layer.layer)
    assert not torch.isin(index, torch.tensor(banned)).any()
    assert (index[:, 0] != index[:, 1]).all()


def test_ban_of_an_expert_nobody_chose_changes_nothing(model, ids):
    before = logits(model, input_ids=ids[:1, :3])
    with observe_experts(model) as record:
        logits(model, input_ids=ids[:1, :3])
    layer = last(model).layer
    unused = (record.count[0, layer] == 0).nonzero()[:, 0].tolist()
    if not unused:
        pytest.skip("all experts are used by these three tokens")
    units = HeadSet.of([(layer, unused[0])], "expert")
    for edits in (ExpertEdits.ban(units), ExpertEdits.off(units)):
        with headwise.attach(model, edits=edits):
            torch.testing.assert_close(logits(model, input_ids=ids[:1, :3]), before)


def test_force_is_always_chosen_with_its_own_score(model, ids):
    layer = last(model)
    edits = ExpertEdits.force(f"L{layer.layer}E0")
    with observe_experts(model, per_token=True) as plain:
        logits(model, input_ids=ids)
    with headwise.attach(model, edits=edits), observe_experts(model, per_token=True) as record:
        logits(model, input_ids=ids)
    index = record.index(layer.layer)
    assert (index == 0).any(-1).all() and index.shape[1] == 2
    had = (plain.index(layer.layer) == 0).any(-1)
    mine, theirs = (r.weights(layer.layer)[had].sort(-1).values for r in (record, plain))
    torch.testing.assert_close(mine, theirs)  # forcing what was chosen anyway is no change
    before = (plain.index(layer.layer)[~had], index[~had])
    assert all(set(b.tolist()) & set(a.tolist()) for b, a in zip(*before, strict=True))  # the worst one left


def test_favour_and_scale(model, ids):
    layer, before = last(model), logits(model, input_ids=ids)
    unit = f"L{layer.layer}E1"
    with observe_experts(model, per_token=True) as plain:
        logits(model, input_ids=ids)
    with headwise.attach(model, edits=ExpertEdits.scale(unit, 1.0) + ExpertEdits.favour(unit, 0.0)):
        torch.testing.assert_close(logits(model, input_ids=ids), before)
    with headwise.attach(model, edits=ExpertEdits.favour(unit, 100.0)), observe_experts(model) as record:
        logits(model, input_ids=ids)
    assert record.count[:, layer.layer, 1].tolist() == [17, 17]
    with headwise.attach(model, edits=ExpertEdits.scale(unit, 0.0)), observe_experts(model, per_token=True) as zero:
        logits(model, input_ids=ids)
    index, weight = plain.index(layer.layer), plain.weights(layer.layer)
    torch.testing.assert_close(zero.weights(layer.layer), weight.masked_fill(index == 1, 0))


def test_tokens_phases_and_rows_are_respected(ids):
    model = moe("qwen3-moe")
    edits = ExpertEdits.force("L2E0", tokens="4:8", rows=(1,))
    with observe_experts(model, per_token=True) as plain:
        logits(model, input_ids=ids)
    with headwise.attach(model, edits=edits), observe_experts(model, per_token=True) as record:
        logits(model, input_ids=ids)
    concerned = torch.zeros(34, dtype=torch.bool)
    concerned[17 + 4 : 17 + 8] = True
    assert (record.index(2)[concerned] == 0).any(-1).all()
    assert torch.equal(record.index(2)[~concerned], plain.index(2)[~concerned])
    with headwise.attach(model, edits=ExpertEdits.off("L2E0", rows=(5,))), pytest.raises(EditError, match="row 5"):
        logits(model, input_ids=ids)
    before = logits(model, input_ids=ids)
    with headwise.attach(model, edits=ExpertEdits.force("L2E0", phase="decode")):
        assert torch.equal(logits(model, input_ids=ids), before)


def test_transforms_replay_a_record(ids):
    model = moe("mixtral")
    with observe_experts(model, per_token=True) as record:
        before = logits(model, input_ids=ids)
    other = tokens(2, 17, seed=5)
    with attach_experts(model, transforms=[lambda call: (record.index(call.layer), record.weights(call.layer))]):
        replayed, same = logits(model, input_ids=other), logits(model, input_ids=ids)
        with observe_experts(model, per_token=True) as again:
            logits(model, input_ids=other)
    assert torch.equal(again.index(0), record.index(0)) and torch.equal(again.index(2), record.index(2))
    assert torch.equal(same, before) and not torch.allclose(replayed, logits(model, input_ids=other))


def test_attachments_nest_and_the_model_is_restored_after_an_error(model, ids):
    before, layer = logits(model, input_ids=ids), last(model).layer
    outer = headwise.attach(model, edits=ExpertEdits.off(f"L{layer}E0"))
    with headwise.attach(model, edits=ExpertEdits.off(f"L{layer}E1")), observe_experts(model) as record:
        logits(model, input_ids=ids)
        outer.detach()
        assert not torch.equal(logits(model, input_ids=ids), before)
    assert record.count[:2, layer, :2].sum() == 0
    with pytest.raises(RuntimeError, match="boom"), headwise.attach(model, edits=ExpertEdits.off(f"L{layer}E1")):
        raise RuntimeError("boom")
    assert torch.equal(logits(model, input_ids=ids), before)
    handle = headwise.attach(model, edits=ExpertEdits.off(f"L{layer}E1"))
    copied = copy.deepcopy(model)
    headwise.detach(copied)
    assert torch.equal(logits(copied, input_ids=ids), before)
    assert not torch.equal(logits(model, input_ids=ids), before)
    handle.detach()
    assert torch.equal(logits(model, input_ids=ids), before)


def test_heads_and_experts_are_edited_together(ids):
    model = moe("mixtral")
    with headwise.attach(model, edits=headwise.Edit.zero(HeadSet.parse("L0H1"))):
        heads = logits(model, input_ids=ids)
        with headwise.attach(model, edits=ExpertEdits.off("L1E0")):
            both = logits(model, input_ids=ids)
        assert torch.equal(logits(model, input_ids=ids), heads)
    assert not torch.allclose(heads, both)


def test_what_cannot_be_applied_raises(ids):
    model = moe("deepseek-v3")
    with pytest.raises(UnitError, match="L0E1 does not exist"):  # layer 0 is dense
        headwise.attach(model, edits=ExpertEdits.off("L0E1"))
    with pytest.raises(UnitError, match="L1E8"):
        headwise.attach(model, edits=ExpertEdits.off("L1E8"))
    with pytest.raises(EditError, match="3 experts of a layer are forced"):
        headwise.attach(model, edits=ExpertEdits.force("L1E0,L1E1,L1E2"))
    with pytest.raises(EditError, match="banned"):
        headwise.attach(model, edits=ExpertEdits.ban(",".join(f"L1E{e}" for e in range(7))))
    with pytest.raises(AttachError, match="no experts"):
        headwise.attach(tiny("llama"), edits=ExpertEdits.off("L1E0"))
    print_ = headwise.fingerprint(tiny("mixtral"))
    with pytest.raises(WrongModelError):
        headwise.attach(model, edits=ExpertEdits(ExpertEdits.off("L1E0").edits, fingerprint=print_))
    with pytest.raises(AttachError, match="on their own"):
        headwise.attach(model, edits=ExpertEdits.off("L1E0"), observers=[print])
    two = ExpertEdits.force("L1E0,L1E1") + ExpertEdits.force("L1E2")
    with headwise.attach(model, edits=two), pytest.raises(EditError, match="3 experts are forced"):
        logits(model, input_ids=ids)
    model.model.layers[1].mlp.forward = lambda hidden: hidden
    with attach_experts(model, edits=ExpertEdits.off("L1E0")), pytest.raises(AttachError, match="never called"):
        logits(model, input_ids=ids)


def test_a_rule_is_only_inferred_where_it_explains_the_choice():
    logits_ = torch.randn(11, 8)
    for rule in (
        GateRule(k=2),
        GateRule(k=3, renorm=True),
        GateRule(k=2, score="kept"),
        GateRule(k=2, score="sigmoid"),
    ):
        weight, index = rule.choose(logits_)
        found, _ = infer_rule(logits_, weight, index, object())
        torch.testing.assert_close(found.choose(logits_)[0], weight)
        assert found == (GateRule(k=2, renorm=True) if rule.score == "kept" else rule)
    weight, index = GateRule(k=2, renorm=True).choose(logits_)
    assert infer_rule(logits_, weight.flip(0), index.flip(0), object()) is None


def test_group_limited_choice_with_a_whole_group_banned():
    rule = GateRule(k=2, score="sigmoid", renorm=True, scale=2.5, groups=2, top_groups=1)
    logits_ = torch.randn(10_000, 8)
    banned = torch.tensor([True] * 4 + [False] * 4)
    weight, index = rule.choose(logits_, banned=banned)
    assert (index >= 4).all()
    torch.testing.assert_close(weight.sum(-1), torch.full((10_000,), 2.5))
    banned = torch.tensor([True] * 3 + [False] * 5)  # one is left of the first group: the rest comes from the other
    weight, index = rule.choose(logits_, banned=banned)
    assert not banned[index].any() and (index[:, 0] != index[:, 1]).all()
    with pytest.raises(RouteError, match="fewer than k = 2"):
        rule.choose(logits_, banned=torch.tensor([True] * 7 + [False]))


def test_bad_rules_and_edits_name_what_is_wrong():
    for bad, text in (
        (dict(k=0), "k is 0"),
        (dict(k=1, score="tanh"), "score is"),
        (dict(k=1, groups=2, top_groups=3), "top_groups is 3"),
    ):
        with pytest.raises(RouteError, match=text):
            GateRule(**bad)
    with pytest.raises(RouteError, match="k is 9 but there are 8 experts"):
        GateRule(k=9).choose(torch.zeros(1, 8))
    with pytest.raises(EditError, match="kind 'expert'"):
        ExpertEdits.off("L1H2")
    with pytest.raises(EditError, match="both forced on and switched off"):
        ExpertEdits.off("L1E2") + ExpertEdits.force("L1E2,L1E3")
    with pytest.raises(EditError, match="value is None"):
        ExpertEdit(units=HeadSet.parse("L1E2"), op="scale")
    with pytest.raises(EditError, match="at least 0"):
        ExpertEdits.scale("L1E2", -1.0)
    with pytest.raises(EditError, match="op is"):
        ExpertEdits.parse("explode L1E2")
    with pytest.raises(EditError, match="no number"):
        ExpertEdits.parse("scale much L1E2")


def test_edits_are_saved_and_read_again(tmp_path):
    edits = ExpertEdits.off("L1E2:0.5", tokens="4:8", rows=(0, 2)) + ExpertEdits.favour("L2E0", -0.25, phase="decode")
    edits.save(tmp_path / "e.json")
    assert ExpertEdits.load(tmp_path / "e.json") == edits
    assert ExpertEdits.parse("off L8E5,L8E7; scale 0.5 L2E1").edits[1].value == 0.5


def test_gradients_and_checkpointing_pass_through_an_edit(ids):
    model = moe("qwen3-moe").train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    with headwise.attach(model, edits=ExpertEdits.force("L2E0")), observe_experts(model) as record:
        model(ids, labels=ids).loss.backward()
    assert last(model).router.weight.grad.abs().sum() > 0
    assert record.tokens.tolist() == [17, 17] and record.count[:, 2].sum() == 68


def test_bfloat16_and_every_experts_implementation(ids):
    for implementation in ("eager", "grouped_mm", "batched_mm"):
        model = moe("mixtral")
        model.set_experts_implementation(implementation)
        with headwise.attach(model, edits=ExpertEdits.off("L1E0")):
            out = logits(model, input_ids=ids)
        if implementation == "eager":
            expected = out
        torch.testing.assert_close(out, expected, atol=1e-4, rtol=1e-4)
    half = moe("mixtral").bfloat16()
    with headwise.attach(half, edits=ExpertEdits.ban("L1E0")), observe_experts(half, probs=True) as record:
        assert logits(half, input_ids=ids).isfinite().all()
    assert record.count[:, 1, 0].sum() == 0


def test_experts_are_edited_under_a_kv_plan_too(ids):
    model = moe("mixtral")
    plan = headwise.HeadPlan.uniform(headwise.SinkWindow(sinks=2, window=6), 3, 2)
    edits = ExpertEdits.ban("L1E0", phase="decode")
    with headwise.attach(model, plan=plan), headwise.attach(model, edits=edits), observe_experts(model) as record:
        out = model.generate(ids, max_new_tokens=5, min_new_tokens=5, do_sample=False, pad_token_id=0)
    assert out.shape == (2, 22) and record.tokens.tolist() == [21, 21]
    with headwise.attach(model, plan=plan), headwise.attach(model, edits=edits):
        with observe_experts(model, phase="decode") as decoded:
            model.generate(ids, max_new_tokens=5, min_new_tokens=5, do_sample=False, pad_token_id=0)
    assert decoded.count[:, 1, 0].sum() == 0 and decoded.count[:, 1].sum() == 16
