"""Training: the balance loss in the model's loss, once, under Trainer, checkpointing, accumulation, resume, DDP."""

import warnings

import pytest
import torch
from transformers import Trainer, TrainingArguments

from distributed_helper import run_distributed
from headwise import attach
from headwise.errors import RouteError
from headwise.hub import load_model
from headwise.route import HeadRouter, moh, train_moh
from headwise.route._losses import balance_loss
from headwise.route._train import Recipe, checkpoint_activations, train_lm


def routed(kind="trained", beta=0.5, seed=0):
    model, _ = load_model("tiny-random-llama")
    return model, moh(model, None, router=kind, shared_count=1, beta=beta, seed=seed)


def losses_of(model, router, ids, **kwargs):
    """(loss with balance, balance part) in training mode."""
    model.train()
    with attach(model, router=router):
        return model(ids, labels=ids, **kwargs).loss, router.loss()


@pytest.mark.parametrize("kind", ["trained", "norm"])
def test_the_loss_is_task_plus_beta_times_mean_balance(ids, kind):
    model, router = routed(kind)
    parts = []
    for layer in router.layers:
        layer.register_forward_hook(lambda m, args, out: parts.append(m.gates(args[0])[2:]))
    loss, extra = losses_of(model, router, ids)
    balance = torch.stack([balance_loss(p, m) for p, m in parts]).mean()
    torch.testing.assert_close(extra, 0.5 * balance)
    model.eval()
    with attach(model, router=router):
        plain = model(ids, labels=ids).loss
        assert router.loss() is None  # nothing is left over, nothing is collected in eval mode
    torch.testing.assert_close(loss, plain + extra)


def test_losses_are_of_the_last_forward_only_and_of_this_router_only(ids):
    model, router = routed()
    other_model, other = routed()
    once, extra = losses_of(model, router, ids)
    again, _ = losses_of(model, router, ids)
    assert torch.equal(once, again)
    model.train()
    with attach(model, router=router):
        for _ in range(3):
            model(ids)
        assert len(router.collector.losses) == 3
        torch.testing.assert_close(router.loss(), extra)
        assert other.loss() is None
    assert router.loss() is None


def test_padding_does_not_count_in_the_loss(ids):
    model, router = routed()
    padded = torch.cat([torch.full((2, 5), 256), ids], 1)
    mask = torch.cat([torch.zeros(2, 5, dtype=torch.long), torch.ones_like(ids)], 1)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    model.train()
    with attach(model, router=router):
        model(ids)
        wanted = router.loss()
        model(padded, attention_mask=mask, position_ids=positions)
        torch.testing.assert_close(router.loss(), wanted)
        model(padded)
        assert not torch.allclose(router.loss(), wanted, rtol=1e-6, atol=1e-7)


def test_tuple_outputs_carry_it_too(ids):
    model, router = routed()
    model.train()
    with attach(model, router=router):
        assert torch.equal(model(ids, labels=ids, return_dict=False)[0], model(ids, labels=ids).loss)
        assert model(ids, return_dict=False)[0].shape == (2, 21, 320)


def test_each_part_of_the_loss_trains_the_router(ids):
    model, router = routed(beta=0.0)
    losses_of(model, router, ids)[0].backward()
    assert all(p.grad.abs().sum() > 0 for p in router.parameters())
    model, router = routed(beta=1.0)
    losses_of(model, router, ids)[1].backward()
    assert all(layer.W_r.grad.abs().sum() > 0 for layer in router.layers)
    assert router.layers[2].W_h.grad is None  # no gate reaches the balance loss of its own layer


def test_the_norm_router_trains_the_query_projections_through_its_gates(ids):
    grads = {}
    for scope in ("selected", "all", "none"):
        model, _ = load_model("tiny-random-llama")
        router = moh(model, None, shared_count=1, active=0.5, ste_scope=scope, beta=0.0)
        losses_of(model, router, ids)[0].backward()
        grads[scope] = model.model.layers[2].self_attn.q_proj.weight.grad
    assert not torch.allclose(grads["selected"], grads["none"])
    assert not torch.allclose(grads["selected"], grads["all"])


# gradient checkpointing


def test_checkpointing_counts_nothing_twice(ids):
    model, router = routed()
    loss, extra = losses_of(model, router, ids)
    loss.backward()
    wanted = {name: p.grad.clone() for name, p in router.named_parameters()}
    model.zero_grad()
    router.zero_grad()
    checkpoint_activations(model)
    model.train()
    with attach(model, router=router), router.recording() as load:
        again = model(ids, labels=ids, use_cache=False).loss
        torch.testing.assert_close(router.loss(), extra)
        again.backward()
        torch.testing.assert_close(router.loss(), extra)
    torch.testing.assert_close(again, loss)
    for name, p in router.named_parameters():
        torch.testing.assert_close(p.grad, wanted[name], rtol=1e-4, atol=1e-6)
    assert load.tokens["all"].tolist() == [42] * 3


def test_reentrant_checkpointing_is_refused_instead_of_losing_the_gradient(ids):
    model, router = routed()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    with pytest.raises(RouteError, match="use_reentrant"):
        losses_of(model, router, ids, use_cache=False)


# Trainer


def arguments(folder, **options):
    given = {"max_steps": 3, "per_device_train_batch_size": 2, "learning_rate": 1e-2, "logging_steps": 1, "seed": 0}
    quiet = {"report_to": [], "disable_tqdm": True, "save_strategy": "no", "use_cpu": True}
    return TrainingArguments(output_dir=str(folder), **(given | quiet | options))


def rows(count=12, length=16):
    made = torch.randint(0, 256, (count, length), generator=torch.Generator().manual_seed(1))
    return [{"input_ids": row, "labels": row} for row in made]


def logged(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_trainer_runs_unchanged_and_its_loss_holds_the_balance(tmp_path):
    first = {}
    for beta in (0.0, 1.0):
        model, router = routed(beta=beta)
        before = router.layers[0].W_r.detach().clone()
        with attach(model, router=router):
            trainer = Trainer(model=model, args=arguments(tmp_path), train_dataset=rows())
            trainer.train()
        first[beta] = logged(trainer)[0]
        assert len(logged(trainer)) == 3
        assert not torch.equal(router.layers[0].W_r, before)
    balance = first[1.0] - first[0.0]
    assert 1.9 < balance < 3.0  # K = 2 of 3 routed heads at perfect balance, at most E


def test_accumulation_counts_the_balance_loss_once(tmp_path):
    first = {}
    for steps, batch in ((1, 4), (2, 2), (4, 1)):
        for beta in (0.0, 4.0):
            model, router = routed(beta=beta)
            args = arguments(
                tmp_path,
                max_steps=1,
                per_device_train_batch_size=batch,
                gradient_accumulation_steps=steps,
            )
            with attach(model, router=router):
                trainer = Trainer(model=model, args=args, train_dataset=rows())
                trainer.train()
            first[steps, beta] = logged(trainer)[0]
    parts = [first[steps, 4.0] - first[steps, 0.0] for steps in (1, 2, 4)]
    assert parts[1] == pytest.approx(parts[0], rel=0.1)  # the balance of halves is not that of the whole
    assert parts[2] == pytest.approx(parts[0], rel=0.2)


def test_evaluation_in_trainer_has_no_balance_loss(tmp_path):
    found = {}
    for beta in (0.0, 4.0):
        model, router = routed(beta=beta)
        with attach(model, router=router):
            trainer = Trainer(model=model, args=arguments(tmp_path), eval_dataset=rows())
            found[beta] = trainer.evaluate()["eval_loss"]
    assert found[0.0] == found[4.0]


def test_resume_continues_to_the_same_weights(tmp_path):
    def run(folder, **options):
        model, router = routed()
        args = arguments(folder, max_steps=4, **options)
        with attach(model, router=router):
            trainer = Trainer(model=model, args=args, train_dataset=rows())
            trainer.train(resume_from_checkpoint=options.get("save_strategy") is None and str(folder / "checkpoint-2"))
        return model.state_dict(), router.state_dict()

    straight = run(tmp_path / "run", save_strategy="steps", save_steps=2)
    resumed = run(tmp_path / "run")
    for a, b in zip(straight, resumed, strict=True):
        assert all(torch.equal(a[name], b[name]) for name in a)


def test_a_saved_model_reloads_without_its_router(tmp_path, ids):
    from transformers import LlamaForCausalLM

    model, router = routed()
    with attach(model, router=router):
        model.save_pretrained(tmp_path / "with")
    model.save_pretrained(tmp_path / "without")
    a, b = (LlamaForCausalLM.from_pretrained(tmp_path / name).eval()(ids).logits for name in ("with", "without"))
    assert torch.equal(a, b)


# the method


def test_train_moh_returns_a_router_and_changes_the_weights(tmp_path):
    model, tokenizer = load_model("tiny-random-llama")
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    router = train_moh(model, tokenizer, steps=3, batch_size=2, window=32, save_model=str(tmp_path / "model"))
    assert router.config.kind == "norm"
    assert router.config.meta["steps"] == 3
    assert math_close(router.config.meta["first_loss"], 6)
    assert any(not torch.equal(before[name], p) for name, p in model.named_parameters())
    assert not model.training
    assert all(p.requires_grad for p in model.parameters())
    again, _ = load_model(tmp_path / "model")
    assert all(torch.equal(p, dict(again.named_parameters())[name]) for name, p in model.named_parameters())


def math_close(value, wanted):
    return abs(value - wanted) < 2


def test_training_the_router_only_leaves_the_model(tmp_path):
    model, tokenizer = load_model("tiny-random-llama")
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    router = train_moh(model, tokenizer, router="trained", weights="router", steps=2, batch_size=2, window=32)
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())
    assert all(p.requires_grad for p in model.parameters())
    fresh = moh(model, None, router="trained")
    assert not torch.equal(fresh.layers[0].W_r, router.layers[0].W_r)
    router.save_pretrained(tmp_path)
    assert HeadRouter.from_pretrained(tmp_path).config == router.config


def test_training_can_start_from_a_router(ids):
    model, tokenizer = load_model("tiny-random-llama")
    fitted = moh(model, tokenizer, router="fitted", fit_tokens=512, active=0.5)
    before = fitted.layers[0].W.detach().clone()
    out = train_moh(model, tokenizer, start=fitted, weights="router", steps=2, batch_size=2, window=32)
    assert out is fitted
    assert not torch.equal(out.layers[0].W, before)


def test_killed_and_resumed_training_ends_in_the_same_loss(tmp_path):
    text = {"steps": 4, "batch_size": 2, "window": 32, "router": "trained"}
    whole = train_moh(*load_model("tiny-random-llama"), folder=str(tmp_path), save_every=2, **text)
    resumed = train_moh(*load_model("tiny-random-llama"), folder=str(tmp_path), resume=True, **text)
    assert resumed.config.meta["last_loss"] == whole.config.meta["last_loss"]


@pytest.mark.parametrize(
    "options, problem",
    [
        ({"steps": 0}, "steps is 0"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"learning_rate": 0.0}, "learning_rate is 0.0"),
        ({"save_every": 5}, "save_every needs folder"),
        ({"weights": "some"}, "weights is 'some'"),
        ({"weights": "router"}, "has no parameters"),
        ({"resume": True}, "holds no checkpoint"),
    ],
)
def test_bad_recipes(options, problem):
    model, tokenizer = load_model("tiny-random-llama")
    with pytest.raises(RouteError, match=problem):
        train_moh(model, tokenizer, **({"steps": 1, "window": 32, "batch_size": 1} | options))
    assert not any("headwise" in name for name in model.state_dict())


def test_checkpointed_training_gives_the_same_losses():
    found = []
    for checkpointing in (False, True):
        model, router = routed()
        data = torch.stack([row["input_ids"] for row in rows()])
        recipe = Recipe(steps=2, batch_size=2, learning_rate=1e-3, checkpointing=checkpointing)
        with attach(model, router=router):
            found.append(train_lm(model, data, recipe))
    assert found[0] == pytest.approx(found[1], rel=1e-4)


# several processes


def _ddp_step(rank: int, world_size: int) -> None:
    model, router = routed(beta=1.0)
    data = torch.stack([row["input_ids"] for row in rows(4)])
    with attach(model, router=router):
        wrapped = torch.nn.parallel.DistributedDataParallel(model.train())
        wrapped(data[rank * 2 : rank * 2 + 2], labels=data[rank * 2 : rank * 2 + 2]).loss.backward()
        mine = router.layers[0].W_r.grad.clone()
    model, router = routed(beta=1.0)
    with attach(model, router=router):
        model.train()
        for part in data.split(2):
            (model(part, labels=part).loss / 2).backward()
    torch.testing.assert_close(mine, router.layers[0].W_r.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.distributed
@pytest.mark.slow
def test_ddp_averages_the_losses_of_local_batches():
    run_distributed(_ddp_step, 2)
