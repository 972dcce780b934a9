"""MoTE: maps count what routers chose, contrasts find experts that were wired in, edits do what they say."""

import json

import pytest
import torch
import transformers

import headwise
from headwise.attach.experts import observe_experts
from headwise.errors import ArtifactError, AttachError, EditError
from headwise.expert_edits import ExpertEdits
from headwise.hub import load_model
from headwise.steer import ExpertMaps, expert_maps, label_answers, mote
from tiny_helper import state, tiny, tokens

MODELS = ["mixtral", "qwen3-moe", "deepseek-v3"]
PLANTED = [(1, 3), (2, 6)]


def prompts(count=6, seed=0):
    return [tokens(1, 8 + 3 * i, seed=seed + i)[0] for i in range(count)]


def labels(count=6):
    return ["ab"[i % 2] for i in range(count)]


def maps_of(a, b, layers=(1, 2)):
    """Maps given by hand, of a model whose layer 0 is dense."""
    model = tiny("deepseek-v3")
    values = torch.stack([*a, *b]).double()
    return ExpertMaps(values, ("a",) * len(a) + ("b",) * len(b), layers, headwise.fingerprint(model))


def planted(rows=8, seed=0):
    """Two classes of random maps; in class a, two experts are always busier."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.rand(2, rows, 3, 8, generator=generator)
    noise[:, :, 0] = 0
    for layer, expert in PLANTED:
        noise[0, :, layer, expert] += 2
    return maps_of(list(noise[0]), list(noise[1]))


# maps


@pytest.mark.parametrize("name", MODELS)
def test_counts_sum_to_k_and_dense_layers_to_nothing(name):
    maps = expert_maps(tiny(name), None, prompts(), labels(), per_token=False)
    lengths = torch.tensor([len(p) for p in prompts()]).double()
    for layer in range(3):
        wanted = 2 * lengths if layer in maps.layers else 0 * lengths
        assert torch.equal(maps.values[:, layer].sum(-1), wanted)


@pytest.mark.parametrize("activity", ["count", "weight", "prob"])
def test_maps_do_not_depend_on_batch_and_padding(activity):
    model = tiny("qwen3-moe")
    alone, together = (
        expert_maps(model, None, prompts(), labels(), activity=activity, batch_size=b).values for b in (1, 6)
    )
    assert torch.allclose(alone, together, atol=1e-6)
    total = {"count": 2.0, "prob": 1.0}.get(activity)
    assert total is None or torch.allclose(alone.sum(-1), torch.full((6, 3), total).double(), atol=1e-4)


def test_recording_changes_nothing():
    model, ids = tiny("mixtral"), tokens(1, 9)
    before, was = model(ids).logits, state(model)
    expert_maps(model, None, prompts(2), labels(2))
    assert torch.equal(model(ids).logits, before) and state(model) == was


def test_written_tokens_instead_of_the_prompt():
    model = tiny("qwen3-moe")
    model.generation_config.eos_token_id = None
    maps = expert_maps(model, None, prompts(2), labels(2), new_tokens=5, per_token=False)
    assert maps.values[:, 0].sum(-1).tolist() == [10, 10]  # five tokens that were written and read, two experts each


def test_the_last_token_alone():
    maps = expert_maps(tiny("qwen3-moe"), None, prompts(3), labels(3), tokens="last", per_token=False)
    assert (maps.values.sum(-1) == 2).all()


def test_text_chat_and_answers():
    model, tokenizer = load_model("tiny-random-mixtral")
    plain, chat = (
        expert_maps(model, tokenizer, ["hi", "ho"], ["x", "y"], chat=c, per_token=False) for c in (False, True)
    )
    assert chat.values.sum() > plain.values.sum()
    texts = []
    found = label_answers(
        model, tokenizer, ["hi", "hello"], lambda text: texts.append(text) or str(len(texts)), new_tokens=3
    )
    assert found == ["1", "2"] and all(isinstance(t, str) for t in texts)


# contrasts


def test_planted_experts_rank_first_by_every_statistic():
    contrast = planted().contrast("a")
    for by in ("difference", "ratio", "t", "auroc"):
        assert set(contrast.scores(by).top(2).pairs()) == set(PLANTED), by
    assert contrast.auroc[1, 3] == 1
    q = contrast.q_values(400, torch.Generator().manual_seed(0))
    found = {divmod(int(i), 8) for i in (q < 0.1).flatten().nonzero()[:, 0]}
    assert set(PLANTED) <= found and len(found) <= 3 and (q[0] == 1).all()


def test_two_classes_are_antisymmetric_and_order_does_not_matter():
    maps = planted()
    one, other = maps.contrast("a"), maps.contrast("b")
    assert torch.equal(one.difference, -other.difference) and torch.allclose(one.t, -other.t)
    assert torch.allclose(one.auroc, 1 - other.auroc)
    order = torch.randperm(16, generator=torch.Generator().manual_seed(1))
    shuffled = ExpertMaps(maps.values[order], tuple(maps.labels[i] for i in order), maps.layers, maps.fingerprint)
    assert torch.allclose(shuffled.contrast("a").difference, one.difference)


def test_doubling_the_prompts_changes_no_ranking():
    maps = planted()
    twice = ExpertMaps(maps.values.repeat(2, 1, 1), maps.labels * 2, maps.layers, maps.fingerprint)
    assert twice.contrast("a").scores().top(8) == maps.contrast("a").scores().top(8)


def test_without_an_effect_p_values_are_uniform():
    values = torch.rand(30, 3, 8, generator=torch.Generator().manual_seed(2))
    values[:, 0] = 0
    p = maps_of(list(values[:15]), list(values[15:])).contrast("a").p_values(300, torch.Generator().manual_seed(3))[1:]
    assert 0.35 < p.mean() < 0.65 and p.min() > 1 / 301


def test_an_effect_without_variance():
    one, other = torch.zeros(3, 8), torch.zeros(3, 8)
    one[1, 2] = 1.0
    contrast = maps_of([one, one], [other, other]).contrast("a")
    assert contrast.t[1, 2] > 1e6 and contrast.t[1, 0] == 0 and contrast.ratio[1, 0] == 0 and contrast.ratio[1, 2] == 1


def test_layers_without_experts_come_last():
    scores = planted().contrast("a").scores()
    assert {unit.layer for unit, _ in scores.ranking()[16:]} == {0}
    assert scores.kind == "expert"


def test_three_classes():
    values = torch.zeros(3, 3, 8).double()
    values[0, 1, 1], values[1, 1, 2], values[2, 1, 3] = 1, 1, 1
    maps = ExpertMaps(values, ("a", "b", "c"), (1, 2), headwise.fingerprint(tiny("deepseek-v3")))
    assert maps.contrast("a").difference[1, 2] == -0.5 and maps.contrast("a", "b").difference[1, 2] == -1
    assert maps.contrast("a", "b").difference[1, 3] == 0


@pytest.mark.parametrize("arguments, words", [(("z",), "'z'"), (("a", "z"), "'z'"), (("a", "a"), "needs two classes")])
def test_classes_that_are_not_there(arguments, words):
    with pytest.raises(EditError, match=words):
        planted().contrast(*arguments)


def test_one_class_alone_has_no_contrast():
    maps = expert_maps(tiny("mixtral"), None, prompts(2), ["a", "a"])
    with pytest.raises(EditError, match="any other"):
        maps.contrast("a")


# classes that are not among the tiny models

SMALL = dict(
    vocab_size=256, hidden_size=32, intermediate_size=16, moe_intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=2, initializer_range=0.2, num_experts=6, num_local_experts=6, num_experts_per_tok=2,
)  # fmt: skip
LATENT = dict(
    n_routed_experts=6, n_shared_experts=1, first_k_dense_replace=1, kv_lora_rank=8, q_lora_rank=None, qk_nope_head_dim=8,
    qk_rope_head_dim=8, v_head_dim=8, head_dim=8, topk_method="greedy", n_group=None, topk_group=None,
)  # fmt: skip


def made(name, **options):
    torch.manual_seed(1)
    model = getattr(transformers, f"{name}ForCausalLM")(getattr(transformers, f"{name}Config")(**SMALL | options))
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


@torch.no_grad()
def chosen(model, edits, ids):
    with headwise.attach(model, edits=edits), observe_experts(model) as record:
        model(ids)
    return record.count[:, 1].sum(0).tolist()


@pytest.mark.parametrize(("name", "options"), [("GraniteMoe", {}), ("DeepseekV2", LATENT)])
def test_further_classes_take_every_edit(name, options):
    model, ids = made(name, **options), tokens(2, 17)
    assert chosen(model, ExpertEdits.off("L1E1"), ids)[1] == 0 and chosen(model, ExpertEdits.ban("L1E1"), ids)[1] == 0
    assert (
        chosen(model, ExpertEdits.force("L1E1"), ids)[1]
        == chosen(model, ExpertEdits.favour("L1E1", 99.0), ids)[1]
        == 34
    )
    counts = expert_maps(model, None, prompts(2), labels(2), per_token=False).values[:, 1].sum(-1)
    assert counts.tolist() == [2.0 * len(p) for p in prompts(2)]


def test_a_router_with_a_rule_of_its_own_is_switched_off_but_not_asked_again():
    """Phi-MoE masks logits by a jitter threshold between its two choices."""
    model, ids = made("Phimoe"), tokens(2, 17)
    assert chosen(model, ExpertEdits.off("L1E1"), ids)[1] == 0
    for edits in (ExpertEdits.ban("L1E1"), ExpertEdits.force("L1E1")):
        with pytest.raises(AttachError, match="layer 1: the rule of Phimoe"):
            chosen(model, edits, ids)


@pytest.mark.parametrize("name", MODELS)
def test_a_ban_holds_over_ten_thousand_tokens(name):
    assert chosen(tiny(name), ExpertEdits.ban("L1E0,L1E3"), tokens(40, 256))[0] == 0


# the method


@pytest.mark.parametrize("op, value", [("off", None), ("ban", None), ("force", None), ("favour", 0.5), ("scale", 0.0)])
@pytest.mark.parametrize("name", MODELS)
def test_edits_that_the_model_takes(name, op, value, tmp_path):
    model, ids = tiny(name), tokens(2, 10)
    edits = mote(model, None, behaviour="b", prompts=prompts(), labels=labels(), experts=1, op=op, value=value)
    assert edits.method == "mote" and len(edits.edits[0].units) == 1
    edits.save(tmp_path / "e.json")
    assert ExpertEdits.load(tmp_path / "e.json") == edits
    before, was = model(ids).logits, state(model)
    with headwise.attach(model, edits=edits):
        model(ids)
    assert torch.equal(model(ids).logits, before) and state(model) == was


def test_the_edited_experts_are_the_busiest():
    model = tiny("qwen3-moe")
    edits = mote(model, None, behaviour="b", prompts=prompts(), labels=labels(), experts=3, by="auroc", activity="prob")
    wanted = expert_maps(model, None, prompts(), labels(), activity="prob").contrast("b").scores("auroc").top(3)
    assert edits.edits[0].units == wanted


def test_data_from_a_file(tmp_path):
    model, tokenizer = load_model("tiny-random-mixtral")
    file = tmp_path / "d.jsonl"
    rows = [{"prompt": "What happened?", "label": "ask"}, {"prompt": "1 + 1 =", "label": "sum"}]
    file.write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    assert len(mote(model, tokenizer, behaviour="sum", data=file, experts=1)) == 1
    file.write_text('{"prompt": 3, "label": "x"}')
    with pytest.raises(EditError, match="d.jsonl:1"):
        mote(model, tokenizer, behaviour="sum", data=file)
    file.write_text("{")
    with pytest.raises(ArtifactError, match="d.jsonl:1' is not the JSON"):
        mote(model, tokenizer, behaviour="sum", data=file)
    with pytest.raises(EditError, match="no file"):
        mote(model, tokenizer, behaviour="sum", data=tmp_path / "none.jsonl")


@pytest.mark.parametrize(
    "options, words",
    [({"experts": 99}, "busier"), ({"experts": 0}, "experts"), ({"behaviour": "z"}, "'z'"), ({"activity": "loud"}, "activity"),
     ({"by": "luck"}, "by="), ({"labels": ["a"]}, "labels for 6 prompts"), ({"labels": None}, "give data="),
     ({"prompts": [], "labels": []}, "empty"), ({"op": "scale"}, "value"), ({"tokens": "500:"}, "no token"),
     ({"batch_size": 0}, "batch_size"), ({"new_tokens": -1}, "new_tokens")],
)  # fmt: skip
def test_demands_without_sense(options, words):
    options = {"behaviour": "b", "prompts": prompts(), "labels": labels(), "experts": 1} | options
    model = tiny("qwen3-moe")
    was = state(model)
    with pytest.raises(EditError, match=words):
        mote(model, None, **options)
    assert state(model) == was


def test_models_and_prompts_out_of_reach():
    with pytest.raises(AttachError, match="no experts"):
        mote(tiny("llama"), None, behaviour="b", prompts=prompts(), labels=labels())
    with pytest.raises(EditError, match="tokenizer"):
        expert_maps(tiny("mixtral"), None, ["text"], ["a"])
    with pytest.raises(EditError, match="N >= 1"):
        expert_maps(tiny("mixtral"), None, [torch.tensor([], dtype=torch.long)], ["a"])


def test_more_forced_than_a_token_has():
    """Seven experts in three layers are more than two in some layer."""
    with pytest.raises(EditError, match="forced on"):
        mote(tiny("qwen3-moe"), None, behaviour="b", prompts=prompts(), labels=labels(), experts=7, op="force")
