"""Soft injection: the mixture against a plain hook on the output projection, its gradient, padding, generation, files and errors."""

import itertools
from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import headwise
from headwise.attach import attach, fingerprint
from headwise.attach.projection import output_projection
from headwise.edits import Edit, HeadEdits
from headwise.errors import ArtifactError, AttachError, EditError, TaskError, WrongModelError
from headwise.hub import load_model
from headwise.steer import TaskEmbedding, fit_tasks, serve
from headwise.steer._injection import Injection, inject, last_outputs
from headwise.tasks.icl import Template, encode_item, icl_pairs
from headwise.tasks.icl_batch import exact_rows, pack, row_losses
from headwise.units import HeadSet
from tiny_helper import generate, logits, padded, random, state, tiny, tokens

PAIRS = [(letter, letter.upper()) for letter in "abcdefghijklmnopqrst"]
QUICK = {"prompts": 2, "shots": 2, "steps": 4, "validate": 2}


def embedding(model, seed=0, alpha=None):
    """A made-up task for a tiny model of 3 layers and 4 heads."""
    made_for = fingerprint(model)
    shape = (made_for.layers, made_for.heads)
    shares = (
        torch.rand(shape, generator=torch.Generator().manual_seed(seed)) if alpha is None else torch.full(shape, alpha)
    )
    return TaskEmbedding(random(*shape, 16, seed=seed), shares, made_for)


def hooked(model, task, batch, columns):
    """The oracle: a pre-hook on each output projection, as the released code edits, at given columns; biases stay."""
    stack = headwise.find_stack(model)
    handles = []
    for layer in range(stack.layers):

        def change(module, args, layer=layer):
            x = args[0].clone().unflatten(-1, (stack.heads, -1))
            rows = torch.arange(len(x))
            alpha = task.alpha[layer][:, None]
            x[rows, columns] = (1 - alpha) * x[rows, columns] + alpha * task.vectors[layer]
            return (x.flatten(-2),)

        handles.append(output_projection(stack, layer).register_forward_pre_hook(change))
    try:
        return logits(model, batch)
    finally:
        for handle in handles:
            handle.remove()


# the mixture


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3", "gemma3"])
@pytest.mark.parametrize("base", ["sdpa", "eager"])
def test_equals_a_hook_on_the_output_projection_with_and_without_bias(name, base):
    model = tiny(name, base)
    task, batch = embedding(model), {"input_ids": tokens(2, 9)}
    wanted = hooked(model, task, batch, torch.tensor([8, 8]))
    with task.attach(model):
        torch.testing.assert_close(logits(model, batch), wanted, rtol=0, atol=2e-5)
    with serve(model, [task, task]):
        torch.testing.assert_close(logits(model, batch), wanted, rtol=0, atol=2e-5)
    assert (logits(model, batch) - wanted).abs().max() > 1e-2


def test_share_zero_changes_nothing_and_share_one_replaces_only_the_last_token():
    model, batch = tiny(), {"input_ids": tokens(1, 7)}
    plain = logits(model, batch)
    with embedding(model, alpha=0.0).attach(model):
        torch.testing.assert_close(logits(model, batch), plain, rtol=0, atol=1e-6)
    task = embedding(model, alpha=1.0)
    with headwise.observe(model, "output") as before:
        logits(model, batch)
    with task.attach(model), headwise.observe(model, "output") as after:
        logits(model, batch)
    for layer in range(3):
        assert after.output(layer)[0, -1].equal(task.vectors[layer])
    assert after.output(0)[0, :-1].equal(before.output(0)[0, :-1])


def test_padding_on_either_side_gives_what_single_rows_give():
    model = tiny()
    task, lengths = embedding(model), (4, 9, 1)
    left = padded(lengths)
    rows = [left["input_ids"][r, 9 - n :] for r, n in enumerate(lengths)]
    right = {
        "input_ids": torch.stack([torch.nn.functional.pad(r, (0, 9 - len(r))) for r in rows]),
        "attention_mask": torch.stack([(torch.arange(9) < n).long() for n in lengths]),
    }
    for r, row in enumerate(rows):
        with task.attach(model):
            alone = logits(model, {"input_ids": row[None]})[0, -1]
            with_left, with_right = logits(model, left)[r, -1], logits(model, right)[r, len(row) - 1]
        with serve(model, [task] * 3):
            by_row = logits(model, right)[r, len(row) - 1]
        for got in (with_left, with_right, by_row):
            torch.testing.assert_close(got, alone, rtol=0, atol=1e-5)
        assert (alone - logits(model, {"input_ids": row[None]})[0, -1]).abs().max() > 1e-2  # a prompt of one token too


def test_cached_generation_equals_full_recompute_with_the_injection_where_the_prompt_ended():
    model = tiny()
    task, ids = embedding(model), tokens(1, 6)
    with task.attach(model):
        written = generate(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, new=5)
        steps = model.generate(
            ids, max_new_tokens=5, min_new_tokens=5, do_sample=False, output_logits=True, return_dict_in_generate=True
        )
    with serve(model, [task], columns=torch.tensor([5])):
        full = logits(model, {"input_ids": written[:, :-1]})
    assert full[0, 5:].argmax(-1).equal(written[0, 6:])
    torch.testing.assert_close(full[0, 5:], torch.cat(steps.logits), rtol=0, atol=2e-5)


def test_each_row_of_a_batch_has_its_own_task_under_generate():
    model = tiny()
    tasks, batch = [embedding(model, seed) for seed in range(3)], padded((3, 7, 5))
    with serve(model, tasks):
        together = generate(model, batch)
    for r, task in enumerate(tasks):
        with task.attach(model):
            assert generate(model, batch)[r].equal(together[r])
    assert not together.equal(generate(model, batch))
    with serve(model, tasks[:2]), pytest.raises(AttachError, match="2 rows, this batch has 3"):
        logits(model, batch)
    with pytest.raises(EditError, match="tasks is empty"):
        serve(model, [])


def test_the_constant_part_folds_into_the_residual_stream():
    for name in ("llama", "gpt2"):
        model = tiny(name)
        task, x = embedding(model), random(4, 16)
        stack = headwise.find_stack(model)
        for layer, constant in enumerate(task.residual(model)):
            project, alpha = output_projection(stack, layer), task.alpha[layer][:, None]
            mixed = project(((1 - alpha) * x + alpha * task.vectors[layer]).flatten())
            torch.testing.assert_close(project(((1 - alpha) * x).flatten()) + constant, mixed, rtol=0, atol=1e-5)


def test_bf16_runs():
    model, tokenizer = load_model("tiny-random-llama", dtype="bfloat16")
    task = TaskEmbedding.fit(model, tokenizer, PAIRS, **QUICK)
    assert task.vectors.dtype == torch.float32 and task.alpha.isfinite().all()
    with task.attach(model):
        assert logits(model, {"input_ids": tokens(1, 5)}).isfinite().all()


# learning


def test_only_theta_has_a_gradient_and_it_matches_finite_differences():
    model = tiny(dtype="float64")
    items = [encode_item(load_model("tiny-random-llama")[1], Template().ask(x), y) for x, y in PAIRS[:2]]
    batch = pack(items, "cpu")
    vectors, theta = random(1, 3, 4, 16).double(), random(1, 3, 4, seed=5).double().requires_grad_(True)

    def loss(theta):
        with inject(model, Injection(theta.sigmoid(), vectors, batch.ends)):
            return row_losses(model.requires_grad_(False), batch).sum()

    (grad,) = torch.autograd.grad(loss(theta), [theta])
    assert all(p.grad is None for p in model.parameters())
    for place in ((0, 0, 1), (0, 1, 3), (0, 2, 0)):
        step = torch.zeros_like(theta)
        step[place] = 1e-3
        with torch.no_grad():
            numeric = (loss(theta + step) - loss(theta - step)) / 2e-3
        assert grad[place].item() == pytest.approx(numeric.item(), rel=1e-2, abs=1e-5)  # losses are in float32


def test_training_lowers_the_loss_and_leaves_the_model_as_it_was():
    model, tokenizer = load_model("tiny-random-llama")
    model.train()
    before, trainable = state(model), [p.requires_grad for p in model.parameters()]
    task = TaskEmbedding.fit(model, tokenizer, [(a, "Z") for a, _ in PAIRS], prompts=4, shots=2, steps=30, validate=10)
    losses = dict(task.history)
    assert task.history[-1][1] < losses[0]
    assert state(model) == before and model.training and [p.requires_grad for p in model.parameters()] == trainable
    assert all(p.grad is None for p in model.parameters())


def test_the_best_shares_are_those_of_the_lowest_validation_loss():
    model, tokenizer = load_model("tiny-random-llama")
    options = {**QUICK, "steps": 8, "validate": 1, "lr": 2.0}  # too large a step, so that the last is not the best
    best = TaskEmbedding.fit(model, tokenizer, PAIRS, **options)
    last = TaskEmbedding.fit(model, tokenizer, PAIRS, select="last", **options)
    assert best.history == last.history and [s for s, _ in best.history] == list(range(9))
    assert best.meta["best_step"] == min(best.history, key=lambda row: row[1])[0]
    assert last.meta["best_step"] == 8
    short = TaskEmbedding.fit(model, tokenizer, PAIRS, select="last", **{**options, "steps": best.meta["best_step"]})
    assert short.alpha.equal(best.alpha)


def test_a_seed_gives_the_same_shares_bit_by_bit_and_another_gives_others():
    model, tokenizer = load_model("tiny-random-llama")
    runs = [TaskEmbedding.fit(model, tokenizer, PAIRS, seed=s, select="last", **QUICK) for s in (0, 0, 1)]
    assert runs[0].alpha.equal(runs[1].alpha) and runs[0].vectors.equal(runs[1].vectors)
    assert not runs[0].alpha.equal(runs[2].alpha)


def test_tasks_side_by_side_learn_what_each_learns_alone():
    model, tokenizer = load_model("tiny-random-llama")
    lists = {"upper": PAIRS, "next": list(icl_pairs("next-letter"))}
    together = fit_tasks(model, tokenizer, lists, select="last", loss="full", batch=2, **QUICK)
    first = fit_tasks(model, tokenizer, {"upper": PAIRS}, select="last", loss="full", batch=2, **QUICK)["upper"]
    second = fit_tasks(model, tokenizer, {"next": lists["next"]}, select="last", loss="full", batch=2, seed=1, **QUICK)[
        "next"
    ]
    for got, alone in ((together["upper"], first), (together["next"], second)):
        torch.testing.assert_close(got.vectors, alone.vectors, rtol=0, atol=1e-5)
        torch.testing.assert_close(got.alpha, alone.alpha, rtol=0, atol=1e-4)


def test_one_alpha_for_all_tasks():
    model, tokenizer = load_model("tiny-random-llama")
    lists = {"upper": PAIRS, "next": list(icl_pairs("next-letter"))}
    found = fit_tasks(model, tokenizer, lists, shared_alpha=True, select="last", **QUICK)
    assert found["upper"].alpha.equal(found["next"].alpha)
    assert not found["upper"].vectors.equal(found["next"].vectors)
    assert (found["upper"].alpha != 0.5).any()


def test_the_embedding_is_the_mean_over_prompts_and_does_not_depend_on_the_batch():
    model, tokenizer = load_model("tiny-random-llama")
    items = [encode_item(tokenizer, Template().few_shot(PAIRS[:n], "x"), "X") for n in (0, 1, 3)]
    batched, alone = last_outputs(model, items), torch.cat([last_outputs(model, [i]) for i in items])
    torch.testing.assert_close(batched, alone, rtol=0, atol=1e-5)
    with headwise.observe(model, "output") as record:
        logits(model, {"input_ids": items[2].ids[None]})
    assert batched[2, 1].allclose(record.output(1)[0, -1], atol=1e-5)


# artifacts


def test_save_and_load_give_the_same_task_and_refuse_another_model(tmp_path):
    model, tokenizer = load_model("tiny-random-llama")
    template = Template("in: {} out:", "\n")
    task = TaskEmbedding.fit(model, tokenizer, PAIRS, template=template, **QUICK)
    task.save(tmp_path / "task.json")
    back = TaskEmbedding.load(tmp_path / "task.json")
    assert back.alpha.equal(task.alpha) and back.vectors.equal(task.vectors)
    assert back.template == template and back.meta == task.meta and back.fingerprint == task.fingerprint
    assert HeadEdits.load(tmp_path / "task.json").method == "soft-injection"
    with pytest.raises(WrongModelError):
        back.attach(tiny("gpt2"))
    with pytest.raises(ArtifactError, match="no task embedding"):
        TaskEmbedding.from_edits(HeadEdits.of(Edit.zero(HeadSet.parse("L0H0"))))


def test_heads_that_are_not_width_over_count():
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=24
    )  # fmt: skip
    model, made_for = LlamaForCausalLM(config).eval(), None
    made_for = fingerprint(model)
    task = TaskEmbedding(random(2, 4, 24), torch.full((2, 4), 0.5), made_for)
    with task.attach(model):
        logits(model, {"input_ids": torch.arange(5)[None]})
    with pytest.raises(WrongModelError, match="8 entries"):
        TaskEmbedding(random(2, 4, 8), torch.full((2, 4), 0.5), made_for).attach(model)


def test_other_shares_and_scores():
    task = embedding(tiny())
    hard, top = task.hard(0.5), task.top(3)
    assert set(hard.alpha.unique().tolist()) <= {0.0, 1.0} and hard.alpha.sum() == (task.alpha > 0.5).sum()
    assert (top.alpha > 0).sum() == 3 and top.alpha.max() == task.alpha.max()
    assert task.with_alpha(hard).alpha.equal(hard.alpha)
    assert task.scores().top(3).mask(3, 4).equal(top.alpha > 0)


# errors


@pytest.mark.parametrize(
    "pairs, options, error, word",
    [
        (PAIRS[:10], {"shots": 10}, TaskError, "at least 11"),
        ([], {}, TaskError, "0 training"),
        (PAIRS, {"lr": 0}, EditError, "lr"),
        (PAIRS, {"steps": -1}, EditError, "steps"),
        (PAIRS, {"loss": "some"}, EditError, "loss"),
        (PAIRS, {"select": "mean"}, EditError, "select"),
        (PAIRS, {"prompts": 0}, EditError, "prompts"),
    ],
)
def test_bad_input_is_named_and_the_model_stays(pairs, options, error, word):
    model, tokenizer = load_model("tiny-random-llama")
    before = state(model)
    with pytest.raises(error, match=word):
        TaskEmbedding.fit(model, tokenizer, pairs, **{**QUICK, **options})
    assert state(model) == before


class _Stripping:
    """A tokenizer that drops trailing space, so that an empty answer has no token."""

    all_special_ids = ()

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer

    def __call__(self, text):
        return self.tokenizer(text.rstrip())


class _Merging(_Stripping):
    """One token for two bytes: the end of the prompt and the first space become one."""

    def __call__(self, text):
        return SimpleNamespace(
            input_ids=["".join(p) for p in itertools.zip_longest(text[::2], text[1::2], fillvalue="")]
        )


def test_an_answer_without_a_token_and_a_tokenizer_that_merges_it_with_the_prompt_are_refused():
    with pytest.raises(TaskError, match="no token"):
        encode_item(_Stripping(load_model("tiny-random-llama")[1]), "x", "")
    with pytest.raises(TaskError, match="merges"):
        encode_item(_Merging(None), "Q:A", "b")


def test_shares_outside_their_range_and_wrong_shapes():
    task = embedding(tiny())
    with pytest.raises(EditError, match=r"\[0, 1\]"):
        task.with_alpha(1.5)
    with pytest.raises(EditError, match="must be"):
        TaskEmbedding(task.vectors[:2], task.alpha, task.fingerprint)
    with pytest.raises(EditError, match="must be"):
        Injection(task.alpha, task.vectors)


def test_the_registered_method_and_its_file(tmp_path):
    model, tokenizer = load_model("tiny-random-llama")
    edits = headwise.steer.soft_injection(model, tokenizer, task="next-letter", prompts=2, shots=2, steps=1)
    edits.save(tmp_path / "e.json")
    with attach(model, edits=HeadEdits.load(tmp_path / "e.json")):
        assert logits(model, {"input_ids": tokens(1, 4)}).isfinite().all()
    with pytest.raises(TaskError, match="choose"):
        headwise.steer.soft_injection(model, tokenizer, task="poem")


def test_exact_rows_want_every_token_of_the_answer():
    model, tokenizer = load_model("tiny-random-llama")
    item = encode_item(tokenizer, "ab", "cd")
    ids = item.ids.tolist()
    for _ in range(3):
        ids.append(int(logits(model, {"input_ids": torch.tensor(ids)[None]})[0, -1].argmax()))
    good = item._replace(answer=torch.tensor(ids[-3:]))
    bad = item._replace(answer=torch.tensor([*ids[-3:-1], (ids[-1] + 1) % 256]))
    assert exact_rows(model, pack([good, bad, item], "cpu")).tolist()[:2] == [True, False]


@pytest.mark.smollm2
@pytest.mark.slow
def test_a_real_model_answers_without_examples_after_few_steps():
    model, tokenizer = load_model("smollm2", dtype="bfloat16")
    found = fit_tasks(
        model, tokenizer, {"plural": icl_pairs("plural")}, prompts=8, steps=40, validate=20, validation_items=16
    )
    pairs = icl_pairs("plural")[:12]
    batch = pack([encode_item(tokenizer, Template().ask(x), y) for x, y in pairs], "cpu")
    plain = exact_rows(model, batch).float().mean()
    with serve(model, [found["plural"]] * len(pairs), columns=batch.ends):
        assert exact_rows(model, batch).float().mean() >= plain + 0.5
