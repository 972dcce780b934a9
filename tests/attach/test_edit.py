"""Edits of head outputs against the oracle: dense attention matrices and the equations of `headwise.edits`."""

import pytest
import torch

import headwise
from headwise import Edit, Full, HeadEdits, HeadPlan, HeadSet, HeadwiseError, KeyGroup, SinkWindow
from headwise.errors import AttachError, EditError
from tiny_helper import generate, inputs, logits, oracle, padded, random, starts, state, tiny, tokens

UNITS = HeadSet.parse("L0H1,L0H2:0.5,L1H0,L1H3,L2H2:0.25")
SINK, MIDDLE, LAST = KeyGroup("sink", "0:2", 0.25), KeyGroup("middle", "3:9", 3.0), KeyGroup("last", "last", 0.0)
EDITS = {
    "zero": Edit.zero(UNITS),
    "scale": Edit.scale(UNITS, -1.5),
    "uniform": Edit.uniform(HeadSet.parse("L0H1,L1H0,L1H1")),
    "uniform weighted": Edit.uniform(UNITS),
    "replace": Edit.replace(UNITS, random(5, 16)),
    "replace by one": Edit.replace(UNITS, random(16)),
    "mix_v": Edit.mix_v(UNITS, 0.75),
    "mix_uniform": Edit.mix_uniform(UNITS, 0.625),
    "mix_vector": Edit.mix_vector(UNITS, 0.25, random(5, 16)),
    "reweight": Edit.reweight(UNITS, [SINK, MIDDLE]),
    "reweight overlapping": Edit.reweight(UNITS, [KeyGroup("a", "0:6", 2.0), KeyGroup("b", "4:9", 0.5), LAST]),
    "reweight to nothing": Edit.reweight(UNITS, [KeyGroup("a", "all", 0.0)]),
    "reweight raw": Edit.reweight(UNITS, [SINK, MIDDLE], renormalize=False, amount=0.5),
    "move": Edit.move(UNITS, 0.75, SINK),
    "move to target": Edit.move(UNITS, 0.75, SINK, MIDDLE),
    "move from last": Edit.move(UNITS, 0.5, KeyGroup("now", "last"), KeyGroup("first", 0)),
}
BATCHES = {"dense": {"input_ids": tokens(2, 13)}, "padded": padded([13, 7, 10])}


def edited(model, batch, *edits, plan=None):
    with headwise.attach(model, edits=list(edits), plan=plan):
        return logits(model, batch)


def expected(model, batch, *edits, **options):
    with oracle(model, edits=edits, start=starts(batch) if "attention_mask" in batch else None, **options):
        return logits(model, batch)


def real(batch, x):
    return x[batch["attention_mask"].bool()] if "attention_mask" in batch else x


def close(a, b, tolerance=2e-5):
    torch.testing.assert_close(a, b, atol=tolerance * float(b.abs().max()), rtol=0)


# every op, dense and padded, on both bases


@pytest.mark.parametrize("batch", BATCHES.values(), ids=BATCHES)
@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS)
def test_op_against_the_oracle(edit, batch):
    for base in ("sdpa", "eager"):
        model = tiny("llama", base)
        want = real(batch, expected(model, batch, edit))
        close(real(batch, edited(model, batch, edit)), want)
        assert (want - real(batch, logits(model, batch))).abs().max() > 1e-2, "the edit does nothing"


@pytest.mark.parametrize("name", ["mistral", "gemma3", "gpt2", "qwen3-moe", "deepseek-v3"])
@pytest.mark.parametrize("op", ["zero", "mix_v", "uniform", "reweight", "move to target"])
def test_other_architectures(name, op):
    model, batch = tiny(name), {"input_ids": tokens(2, 45)}  # longer than the sliding windows
    close(edited(model, batch, EDITS[op]), expected(model, batch, EDITS[op]), 1e-4)


@pytest.mark.parametrize("op", ["zero", "mix_v", "uniform", "reweight", "move"])
def test_bfloat16_and_double(op):
    batch = {"input_ids": tokens(2, 13)}
    want = expected(tiny(), batch, EDITS[op])
    got = edited(tiny(dtype=torch.bfloat16), batch, EDITS[op])
    assert got.dtype == torch.bfloat16
    assert (got.double() - want).norm() < 0.05 * want.norm()
    close(edited(tiny().double(), batch, EDITS[op]), expected(tiny().double(), batch, EDITS[op]), 1e-12)


def test_a_run_patched_with_its_own_outputs_is_itself_and_with_others_is_theirs():
    model, a, b = tiny(), {"input_ids": tokens(2, 9)}, {"input_ids": tokens(2, 9, seed=1)}
    every = HeadSet.of([(2, h) for h in range(4)])

    def outputs(batch):
        with headwise.observe(model, "output") as record:
            logits(model, batch)
        return record.output(2).permute(2, 0, 1, 3)  # (U, B, N, D)

    close(edited(model, a, Edit.patch(every, outputs(a))), logits(model, a), 1e-6)
    patch = Edit.patch(HeadSet.parse("L2H0,L2H3:0.5"), outputs(b)[[0, 3]])
    close(edited(model, a, patch), expected(model, a, patch))
    with pytest.raises(EditError, match=r"patch of L2H0.*\(2, 9, "):
        edited(model, {"input_ids": tokens(2, 8)}, patch)


# which tokens, which phase


@pytest.mark.parametrize("chosen", ["last", 0, (2, 5), "4:", "1:6", range(3, 5)], ids=str)
@pytest.mark.parametrize("batch", BATCHES.values(), ids=BATCHES)
def test_token_selections(chosen, batch):
    for make in (Edit.zero, Edit.uniform, lambda u, **k: Edit.mix_v(u, 0.5, **k)):
        edit = make(HeadSet.parse("L0H1,L1H0,L2H3"), tokens=chosen)
        model = tiny()
        got = edited(model, batch, edit)
        close(real(batch, got), real(batch, expected(model, batch, edit)))


def test_positions_count_real_tokens_only():
    """A row says the same alone as padded in a batch: position 0 is its first real token."""
    model, batch = tiny(), padded([4, 11])
    edit = Edit.zero(UNITS, tokens=(0, 3))
    alone = edited(model, {"input_ids": batch["input_ids"][:1, 7:]}, edit)
    close(edited(model, batch, edit)[:1, 7:], alone, 1e-5)


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_last_of_a_right_padded_row_is_its_last_real_token(name):
    model, ids = tiny(name), tokens(2, 9)
    batch = {"input_ids": ids, "attention_mask": torch.tensor([[1] * 9, [1] * 5 + [0] * 4])}
    for edit in (Edit.zero(UNITS, tokens="last"), Edit.reweight(UNITS, [LAST])):
        got = edited(model, batch, edit)
        for row, length in ((0, 9), (1, 5)):
            alone = edited(model, {"input_ids": ids[row : row + 1, :length]}, edit)
            close(got[row : row + 1, :length], alone, 1e-5)


def stepwise(model, batch, prompt, **attach):
    """Logits of all columns, the prompt in one pass and then one token at a time, with the model's own cache."""
    parts, cache, ids = [], None, batch["input_ids"]
    with headwise.attach(model, **attach), torch.no_grad():
        for begin, end in [(0, prompt), *((i, i + 1) for i in range(prompt, ids.shape[1]))]:
            extra = {"position_ids": batch["position_ids"][:, begin:end]} if "position_ids" in batch else {}
            mask = batch["attention_mask"][:, :end] if "attention_mask" in batch else None
            out = model(ids[:, begin:end], attention_mask=mask, past_key_values=cache, use_cache=True, **extra)
            cache = out.past_key_values
            parts.append(out.logits)
    return torch.cat(parts, dim=1)


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3", "gpt2", "deepseek-v3"])
@pytest.mark.parametrize("base", ["sdpa", "eager"])
def test_decoding_with_a_cache_is_the_whole_text_at_once(name, base):
    """Also behind sliding windows of 32, where the cache lets go of old columns: positions go on counting."""
    model, batch = tiny(name, base), {"input_ids": tokens(2, 48)}
    edits = [
        Edit.zero(HeadSet.parse("L0H1"), tokens=(0, 5, 40, 45)),
        Edit.mix_v(HeadSet.parse("L1H0"), 0.5, tokens="38:44"),
        Edit.reweight(HeadSet.parse("L2H2"), [KeyGroup("near", "36:40", 4.0), KeyGroup("first", 0, 0.0)]),
    ]
    want = edited(model, batch, *edits)
    for prompt in (1, 36) if name == "llama" else (30, 40):
        close(stepwise(model, batch, prompt, edits=edits), want, 1e-4)


def test_decoding_of_a_padded_batch_is_the_whole_text_at_once():
    model, batch = tiny(), padded([13, 8])
    edits = [EDITS["mix_uniform"], Edit.zero(UNITS, tokens=(1, 9)), EDITS["move to target"]]
    close(real(batch, stepwise(model, batch, 9, edits=edits)), real(batch, edited(model, batch, *edits)), 1e-4)


@pytest.mark.parametrize("phase", ["all", "prefill", "decode"])
def test_phases(phase):
    model, batch, prompt = tiny(), {"input_ids": tokens(2, 12)}, 7
    same = {"all": "all", "prefill": f"0:{prompt}", "decode": f"{prompt}:"}[phase]
    want = edited(model, batch, Edit.zero(UNITS, tokens=same))
    close(stepwise(model, batch, prompt, edits=Edit.zero(UNITS, phase=phase)), want)


def test_decode_phase_in_generate_leaves_the_prompt_alone():
    model, batch = tiny(), padded([9, 5])
    plain = generate(model, batch, 6)
    with headwise.attach(model, edits=Edit.zero(UNITS, phase="decode")):
        decode = generate(model, batch, 6)
    with headwise.attach(model, edits=Edit.zero(UNITS, phase="prefill")):
        prefill = generate(model, batch, 6)
    assert torch.equal(decode[:, : 9 + 1], plain[:, : 9 + 1])  # the first new token comes from the prompt
    assert not torch.equal(decode, plain) and not torch.equal(prefill, plain)


def test_static_cache_of_generate():
    model, batch = tiny(), padded([9, 5])
    edits = [Edit.mix_v(UNITS, 0.6, tokens="3:"), Edit.zero(HeadSet.parse("L0H3"), tokens=(1, 7))]
    with headwise.attach(model, edits=edits):
        want = generate(model, batch, 6)
        assert torch.equal(generate(model, batch, 6, cache_implementation="static"), want)
    assert not torch.equal(generate(model, batch, 6), want)


def test_static_cache_with_sliding_windows_is_refused_where_positions_matter():
    model, batch = tiny("gemma3"), padded([9, 5])
    with headwise.attach(model, edits=Edit.zero(UNITS, tokens=(1,))), pytest.raises(AttachError, match="static cache"):
        generate(model, batch, 3, cache_implementation="static")


# order, combinations


def test_edits_act_in_their_order():
    model, batch, head = tiny(), {"input_ids": tokens(1, 9)}, HeadSet.parse("L1H1")
    twice, vector = Edit.scale(head, 2.0), Edit.mix_vector(head, 0.5, random(16))
    for order in ((twice, vector), (vector, twice)):
        close(edited(model, batch, *order), expected(model, batch, *order))
    assert not torch.allclose(edited(model, batch, twice, vector), edited(model, batch, vector, twice), atol=1e-3)


@pytest.mark.parametrize("second", ["reweight", "move", "mix_uniform", "scale", "uniform weighted"])
def test_what_comes_after_uniform_still_sees_the_models_own_attention(second):
    model, batch = tiny(), BATCHES["padded"]
    order = (Edit.uniform(HeadSet.parse("L0H1,L1H0")), EDITS[second])
    close(real(batch, edited(model, batch, *order)), real(batch, expected(model, batch, *order)))
    close(real(batch, edited(model, batch, *order[::-1])), real(batch, expected(model, batch, *order[::-1])))


def test_nested_attachments_are_one_list():
    model, batch = tiny(), {"input_ids": tokens(1, 9)}
    one, two = EDITS["mix_v"], EDITS["scale"]
    want = edited(model, batch, one, two)
    with headwise.attach(model, edits=one), headwise.attach(model, edits=HeadEdits.of(two)):
        assert torch.equal(logits(model, batch), want)


class Tripled(torch.nn.Module):
    """A router whose gates are all 3."""

    needs_hidden = False

    def forward(self, call):
        return call.q.new_full((call.q.shape[0], call.q.shape[2], call.q.shape[1]), 3.0)

    def for_layer(self, layer):
        return self

    def install(self, *args):
        pass

    uninstall = check = install


@pytest.mark.parametrize(
    "edit", [Edit.uniform(HeadSet.parse("L1H1")), EDITS["uniform weighted"], EDITS["scale"]], ids=str
)
def test_a_router_and_a_transform_come_before_the_edits(edit):
    """Whichever way a uniform head is computed, its output is not gated."""
    model, batch = tiny(), {"input_ids": tokens(1, 9)}
    every = HeadSet.of([(layer, head) for layer in range(3) for head in range(4)])
    want = expected(model, batch, Edit.scale(every, 3.0), edit)
    with headwise.attach(model, transforms=[lambda call, attend: 3 * attend()], edits=edit):
        close(logits(model, batch), want)
    with headwise.attach(model, router=Tripled(), edits=edit):
        close(logits(model, batch), want)


# what zeroing a head is, and is not

PROJECTIONS = {
    "llama": lambda layer: layer.self_attn.o_proj.weight.T,
    "deepseek-v3": lambda layer: layer.self_attn.o_proj.weight.T,
    "gpt2": lambda layer: layer.attn.c_proj.weight,
}


@pytest.mark.parametrize("name", PROJECTIONS)
def test_zero_is_a_projection_without_the_heads_columns(name):
    model, twin, batch = tiny(name), tiny(name), inputs(name)
    base = twin.transformer.h if name == "gpt2" else twin.model.layers
    with torch.no_grad():
        PROJECTIONS[name](base[1])[2 * 16 : 3 * 16] = 0
    close(edited(model, batch, Edit.zero(HeadSet.parse("L1H2"))), logits(twin, batch), 1e-6)


def test_zeroing_behind_the_projection_is_not_a_head():
    model, batch = tiny(), inputs("llama")
    want = edited(model, batch, Edit.zero(HeadSet.parse("L1H2")))

    def zero_slice(module, args, out):
        return torch.cat([out[..., :32], torch.zeros_like(out[..., 32:48]), out[..., 48:]], dim=-1)

    handle = model.model.layers[1].self_attn.o_proj.register_forward_hook(zero_slice)
    assert (logits(model, batch) - want).abs().max() > 0.1
    handle.remove()


# under a KV plan

PATTERNS = [Full(), SinkWindow(sinks=2, window=4)]


@pytest.mark.parametrize("op", ["zero", "uniform", "mix_v", "mix_uniform", "reweight", "move", "move to target"])
@pytest.mark.parametrize("batch", BATCHES.values(), ids=BATCHES)
def test_under_a_plan(op, batch):
    plan = HeadPlan(patterns=(tuple(PATTERNS), tuple(PATTERNS[::-1]), (PATTERNS[1],) * 2))
    model = tiny()
    want = real(batch, expected(model, batch, EDITS[op], patterns=plan.patterns))
    close(real(batch, edited(model, batch, EDITS[op], plan=plan)), want)
    close(real(batch, stepwise(model, batch, 9, edits=EDITS[op], plan=plan)), want, 1e-4)
    assert not torch.allclose(want, real(batch, expected(model, batch, EDITS[op])), atol=1e-3)


def test_key_groups_under_compensation_are_refused():
    plan = HeadPlan.uniform(SinkWindow(sinks=1, window=4, compensation="count"), 3, 2, prefill="dense")
    model, batch = tiny(), padded([20])
    with headwise.attach(model, plan=plan, edits=EDITS["reweight"]):
        with pytest.raises(AttachError, match="compensation"):
            generate(model, batch, 3)
    with headwise.attach(model, plan=plan, edits=EDITS["zero"]):
        generate(model, batch, 3)


# gradients


@pytest.mark.parametrize("op", ["mix_v", "uniform", "reweight", "move", "scale"])
def test_gradients_are_those_of_the_oracle(op):
    batch = {"input_ids": tokens(2, 9)}

    def gradients(context):
        model = tiny().double()
        with context(model):
            model(**batch, labels=batch["input_ids"]).loss.backward()
        return [p.grad for p in model.parameters()]

    mine = gradients(lambda model: headwise.attach(model, edits=EDITS[op]))
    theirs = gradients(lambda model: oracle(model, edits=[EDITS[op]]))
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=1e-9, rtol=1e-6)


# bad input that only the model can show


@pytest.mark.parametrize("edit", [Edit.replace(UNITS, random(5, 8)), Edit.mix_vector(UNITS, 0.5, random(5, 32))])
def test_vectors_of_the_wrong_width(edit):
    model = tiny()
    with headwise.attach(model, edits=edit), pytest.raises(EditError, match=r"(8|32) entries.*heads have 16"):
        logits(model, inputs("llama"))
    assert state(model) == state(tiny())


def test_patch_of_the_wrong_batch():
    patch = Edit.patch(HeadSet.parse("L1H1"), random(1, 3, 9, 16))
    with headwise.attach(tiny(), edits=patch) as handle, pytest.raises(EditError, match=r"\(3, 9, "):
        logits(handle.model, {"input_ids": tokens(2, 9)})


def test_key_groups_and_dropout():
    model = tiny()
    model.config.attention_dropout = 0.5
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    with headwise.attach(model.train(), edits=EDITS["reweight"]), pytest.raises(AttachError, match=r"eval\(\)"):
        model(tokens(1, 5))
    with headwise.attach(model.eval(), edits=EDITS["reweight"]):
        model(tokens(1, 5))


def test_a_model_with_learned_sinks_in_its_softmax():
    from transformers import GptOssConfig, GptOssForCausalLM

    shape = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 64}
    config = GptOssConfig(
        **shape, num_hidden_layers=2, intermediate_size=32, num_local_experts=2, num_experts_per_tok=1
    )
    model = GptOssForCausalLM._from_config(config, attn_implementation="eager").eval()
    batch, head = {"input_ids": tokens(1, 6) % 64}, HeadSet.parse("L0H1")
    assert not torch.equal(edited(model, batch, Edit.zero(head)), logits(model, batch))
    for edit in (Edit.uniform(head), Edit.mix_uniform(head, 0.5)):
        with headwise.attach(model, edits=edit), pytest.raises(AttachError, match="plain softmax.*s_aux"):
            logits(model, batch)
    plan = HeadPlan.uniform(SinkWindow(1, 2), 2, 2)
    with headwise.attach(model, plan=plan), pytest.raises(HeadwiseError, match="s_aux"):
        logits(model, batch)
    with headwise.observe(model, "entropy"), pytest.raises(HeadwiseError, match="s_aux"):
        logits(model, batch)
