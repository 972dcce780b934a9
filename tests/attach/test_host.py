"""An attached model inside what transformers and torch do with it: training, checkpointing, compilation, pipelines."""

import pytest
import torch
import torch._dynamo

import headwise
from headwise import Edit, HeadPlan, HeadSet, HeadwiseCache, KeyGroup, SinkWindow
from headwise.hub import load_model
from tiny_helper import generate, inputs, logits, oracle, padded, state, tiny, tokens

UNITS = HeadSet.parse("L0H1,L1H0,L2H2")
EDITS = [
    Edit.mix_v(UNITS, 0.5),
    Edit.reweight(UNITS, [KeyGroup("sink", "0:2", 0.25)]),
    Edit.zero(HeadSet.parse("L1H3")),
]
PLAN = HeadPlan.uniform(SinkWindow(1, 4), 3, 2)


def train_step(checkpointing, **attach):
    model = tiny().train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    with headwise.attach(model, **attach):
        loss = model(**padded([9, 6]), labels=tokens(2, 9), use_cache=False).loss
        loss.backward()
    return loss.detach(), [p.grad for p in model.parameters()]


@pytest.mark.parametrize(
    "attach", [{"edits": EDITS}, {"plan": PLAN}, {"plan": PLAN, "edits": EDITS}], ids=lambda a: "+".join(a)
)
def test_gradient_checkpointing(attach):
    loss, grads = train_step(True, **attach)
    plain_loss, plain_grads = train_step(False, **attach)
    assert torch.equal(loss, plain_loss) and loss != train_step(False)[0]
    for a, b in zip(grads, plain_grads, strict=True):
        torch.testing.assert_close(a, b, atol=1e-7, rtol=1e-5)


def test_a_recomputation_after_detaching_is_noticed():
    """Detached between forward and backward, the checkpointed layers are computed anew without the edits: torch refuses."""
    model = tiny().train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    with headwise.attach(model, edits=EDITS):
        loss = model(tokens(1, 9), labels=tokens(1, 9), use_cache=False).loss
    with pytest.raises(torch.utils.checkpoint.CheckpointError):
        loss.backward()


def test_plan_in_training_reads_by_pattern():
    """Gradients under a plan are those of dense attention with the pattern's mask."""

    def gradients(context):
        model = tiny().double()
        with context(model):
            model(tokens(1, 12), labels=tokens(1, 12)).loss.backward()
        return [p.grad for p in model.parameters()]

    mine = gradients(lambda model: headwise.attach(model, plan=PLAN))
    theirs = gradients(lambda model: oracle(model, patterns=PLAN.patterns))
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=1e-9, rtol=1e-6)


@pytest.mark.slow
def test_compiled():
    """torch.compile makes whole graphs of an attached model without a cache, and sees what is attached and detached after it."""
    torch._dynamo.reset()
    model, batch = tiny(), {"input_ids": tokens(2, 12), "use_cache": False}
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    plain = logits(model, batch)
    torch.testing.assert_close(logits(compiled, batch), plain, atol=1e-5, rtol=1e-5)
    with headwise.attach(model, edits=EDITS, plan=PLAN):
        want = logits(model, batch)
        torch.testing.assert_close(logits(compiled, batch), want, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(want, plain, atol=1e-3)
    torch.testing.assert_close(logits(compiled, batch), plain, atol=1e-5, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("attach", [{"edits": EDITS}, {"plan": PLAN}], ids=lambda a: "+".join(a))
def test_compiled_decoding(attach):
    """Prefill and single steps with the model's cache or a HeadwiseCache; torch compiles anew as the cache grows."""
    torch._dynamo.reset()
    model, ids = tiny(), tokens(2, 11)

    @torch.no_grad()
    def steps(call):
        out, parts = None, []
        for begin, end in ((0, 8), (8, 9), (9, 10), (10, 11)):
            out = call(ids[:, begin:end], past_key_values=out and out.past_key_values, use_cache=True)
            parts.append(out.logits)
        return torch.cat(parts, dim=1)

    with headwise.attach(model, **attach):
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        torch.testing.assert_close(steps(compiled), steps(model), atol=1e-5, rtol=1e-5)


def test_attention_weights_of_an_eager_base():
    """What output_attentions gives is the model's own softmax; edits change outputs, not these weights (layer 0 sees no edit before it)."""
    model, batch = tiny("llama", "eager"), inputs("llama")
    with torch.no_grad():
        plain = model(**batch, output_attentions=True).attentions
        with headwise.attach(model, edits=EDITS):
            inside = model(**batch, output_attentions=True).attentions
    assert torch.equal(inside[0], plain[0]) and not torch.equal(inside[1], plain[1])
    assert len(inside) == 3 and inside[0].shape == (2, 4, 24, 24)


def test_pipeline():
    from transformers import pipeline

    model, tokenizer = load_model("tiny-random-llama")
    write = pipeline("text-generation", model=model, tokenizer=tokenizer)
    options = {"max_new_tokens": 8, "do_sample": False, "return_full_text": False}
    texts = ["The cat", "A longer sentence about dogs"]
    plain = write(texts, batch_size=2, **options)
    with headwise.attach(model, edits=Edit.zero(UNITS), plan=PLAN):
        inside = write(texts, batch_size=2, **options)
        batch = tokenizer(texts, return_tensors="pt", padding=True)
        direct = tokenizer.batch_decode(
            model.generate(**batch, max_new_tokens=8, do_sample=False)[:, batch.input_ids.shape[1] :], True
        )
    assert [row[0]["generated_text"] for row in inside] == direct
    assert inside != plain and write(texts, batch_size=2, **options) == plain


def test_trainer(tmp_path):
    from transformers import Trainer, TrainingArguments

    def train(attached):
        model = tiny()
        data = [{"input_ids": row, "labels": row} for row in tokens(4, 12)]
        quiet = {"report_to": [], "save_strategy": "no", "disable_tqdm": True, "use_cpu": True, "seed": 1}
        arguments = TrainingArguments(tmp_path, max_steps=2, per_device_train_batch_size=2, learning_rate=1e-2, **quiet)
        handle = headwise.attach(model, edits=EDITS) if attached else None
        result = Trainer(model=model, args=arguments, train_dataset=data).train()
        if handle:
            handle.detach()
        return result.training_loss, model

    loss, model = train(True)
    plain_loss, plain = train(False)
    assert loss != plain_loss and state(model)[:3] == state(plain)[:3]
    changed = [not torch.equal(a, b) for a, b in zip(model.parameters(), tiny().parameters(), strict=True)]
    assert any(changed)
    dead = slice(
        3 * 16, 4 * 16
    )  # L1H3 is zeroed: its columns of the projection get no gradient, so only weight decay (0) moves them
    assert torch.equal(
        model.model.layers[1].self_attn.o_proj.weight[:, dead], tiny().model.layers[1].self_attn.o_proj.weight[:, dead]
    )
    assert not torch.equal(
        plain.model.layers[1].self_attn.o_proj.weight[:, dead], tiny().model.layers[1].self_attn.o_proj.weight[:, dead]
    )


def test_inputs_embeds_and_positional_arguments():
    model, ids = tiny(), tokens(1, 9)
    with headwise.attach(model, edits=EDITS, plan=PLAN), torch.no_grad():
        want = model(input_ids=ids).logits
        embeds = model.get_input_embeddings()(ids)
        assert torch.equal(model(inputs_embeds=embeds).logits, want)
        cache = HeadwiseCache(PLAN)
        assert torch.equal(model.model(ids, None, None, cache).last_hidden_state, model.model(ids).last_hidden_state)
        assert cache.get_seq_length() == 9


def test_four_dimensional_masks():
    """A 4-D mask from the caller says the same as the 2-D one, to the model and to the edits."""
    model, batch = tiny(), padded([9, 6])
    mask = batch["attention_mask"].bool()
    four = mask[:, None, None, :] & torch.ones(9, 9, dtype=torch.bool).tril()
    edits = [Edit.zero(UNITS, tokens=(0, 3)), *EDITS]
    with headwise.attach(model, edits=edits):
        want = logits(model, batch)
        got = logits(model, dict(batch, attention_mask=four))
    torch.testing.assert_close(got[mask], want[mask], atol=1e-5, rtol=1e-5)


def test_sampling_and_streaming_are_untouched():
    model, batch = tiny(), padded([9, 6])
    with headwise.attach(model):
        torch.manual_seed(3)
        inside = generate(model, batch, 5, do_sample=True, top_k=20)
    torch.manual_seed(3)
    assert torch.equal(inside, generate(model, batch, 5, do_sample=True, top_k=20))
