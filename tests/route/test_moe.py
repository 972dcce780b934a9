"""The losses of routers, the layer of experts, and transformers' blocks with the same weights."""

import copy

import pytest
import torch

from distributed_helper import run_distributed
from headwise.attach.experts import find_experts
from headwise.errors import RouteError
from headwise.route import (
    ExpertChoice,
    Experts,
    Hash,
    MoEHost,
    MoELayer,
    NoisyTopK,
    NormTopK,
    Router,
    Routing,
    SigmoidTopK,
    Smear,
    SoftmaxTopK,
    SoftMoE,
    from_transformers,
    upcycle,
)
from headwise.route import _losses as losses
from headwise.route._experts import BACKENDS
from headwise.route._losses import balance_loss
from tiny_helper import padded, tiny, tokens

B, N, C, E, HIDDEN = 2, 11, 16, 5, 8


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def layer(rule=None, *, causal=True, **options):
    router = Router(rule or SoftmaxTopK(k=2), width=C, experts=E, causal=causal, generator=seeded())
    for parameter in router.parameters():
        torch.nn.init.normal_(parameter, std=0.7, generator=seeded(7))
    experts = Experts(experts=E, width=C, hidden=HIDDEN, std=0.4, generator=seeded(1))
    return MoELayer(router, experts, **options)


def hidden(seed=2, rows=B, length=N):
    return torch.randn(rows, length, C, generator=seeded(seed))


# losses


def routing(probs, index, real=None):
    return Routing(index, torch.ones_like(index, dtype=torch.float), probs, probs.log(), real=real)


def test_balance_loss_is_one_at_balance_for_any_k_and_e_at_collapse():
    for k in (1, 2, 3):
        index = torch.stack([(torch.arange(6) + j) % 6 for j in range(k)], -1)[None]
        even = routing(torch.full((1, 6, 6), 1 / 6), index)
        assert float(even.loss({"balance": 1.0})) == pytest.approx(1.0)
        assert float(balance_loss(even.probs, even.mask())) == pytest.approx(k)
    collapsed = torch.zeros(1, 6, 6)
    collapsed[..., 2] = 1
    assert float(routing(collapsed, torch.full((1, 6, 1), 2)).loss({"balance": 1.0})) == pytest.approx(6.0)


def test_information_loss_at_its_two_ends():
    sharp = torch.eye(4)[None]
    assert float(losses.information_loss(sharp)) == pytest.approx(-torch.tensor(4.0).log().item())
    same = torch.tensor([0.1, 0.2, 0.3, 0.4]).expand(1, 9, 4)
    assert float(losses.information_loss(same)) == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("name", ["balance", "importance", "z", "information", "entropy", "spread", "load"])
def test_every_loss_reaches_the_router_and_is_differentiated_right(name):
    router = layer(NoisyTopK(k=2)).router.double().train()
    x = hidden().double()

    def value():
        return router(x, generator=seeded(3)).loss({name: 1.0})

    value().backward()
    grad, step = router.W.grad, 1e-6
    assert grad.abs().sum() > 0
    for place in ((0, 0), (3, 5)):
        with torch.no_grad():
            router.W[place] += step
            above = value()
            router.W[place] -= 2 * step
            below = value()
            router.W[place] += step
        torch.testing.assert_close(grad[place], (above - below) / (2 * step), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("name", ["balance", "importance", "z", "information", "entropy", "spread"])
@pytest.mark.parametrize("rule", [SoftmaxTopK(k=2), SigmoidTopK(k=2)])
def test_losses_reach_softmax_and_sigmoid_routers_and_leave_padding_out(rule, name):
    module = layer(rule, losses={name: 1.0})
    real = torch.arange(N)[None] < torch.tensor([[N], [6]])
    x = hidden()
    loss = module.router(x, real=real).loss({name: 1.0})
    loss.backward()
    assert module.router.W.grad.abs().sum() > 0
    other = x.clone()
    other[1, 6:] = 100.0
    torch.testing.assert_close(module.router(other, real=real).loss({name: 1.0}), loss)
    if name not in ("spread", "information"):
        assert float(module.router(x[:1], real=torch.zeros(1, N).bool()).loss({name: 1.0}).detach()) == pytest.approx(
            0, abs=1e-6
        )


def test_load_is_the_chance_of_being_chosen_when_the_noise_is_drawn_again():
    clean, std = torch.randn(1, 1, 5, generator=seeded(1)), torch.full((1, 1, 5), 0.7)
    noisy = clean + 0.7 * torch.randn(1, 1, 5, generator=seeded(2))
    top = noisy.topk(3).values[0, 0]
    for i in range(5):
        others = torch.cat([noisy[0, 0, :i], noisy[0, 0, i + 1 :]]).sort(descending=True).values
        threshold = top[2] if noisy[0, 0, i] >= top[1] else top[1]
        assert others[1] == threshold  # the second best of the others
    total = torch.special.ndtr((clean - torch.where(noisy >= top[1], top[2], top[1])) / std)[0, 0]
    expected = total.var(unbiased=False) / total.mean() ** 2
    torch.testing.assert_close(losses.load_loss(clean, noisy, std, 2), expected)
    assert float(losses.load_loss(clean, noisy, std, 5)) == 0


def test_per_sequence_balance_is_the_mean_of_rows():
    module = layer()
    whole = module.router(hidden())
    rows = [module.router(hidden()[b : b + 1]).loss({"balance": 1.0}) for b in range(B)]
    torch.testing.assert_close(whole.loss({"balance": 1.0}, "sequence"), torch.stack(rows).mean())


def test_unknown_losses_scopes_and_missing_parts_are_named():
    found = layer().router(hidden())
    for bad, text in (("balanced", "no loss is called"), ("load", "noisy router in training")):
        with pytest.raises(RouteError, match=text):
            found.loss({bad: 1.0})
    with pytest.raises(RouteError, match="scope is"):
        found.loss({"balance": 1.0}, "world")
    hashed = Router(Hash(vocabulary=9), width=C, experts=E)(hidden(), token_ids=torch.zeros(B, N, dtype=torch.long))
    with pytest.raises(RouteError, match="needs logits"):
        hashed.loss({"z": 1.0})


# the layer


def test_one_expert_is_a_plain_feed_forward_layer():
    experts = Experts(experts=1, width=C, hidden=HIDDEN, std=0.4)
    module = MoELayer(Router(SigmoidTopK(k=1), width=C, experts=1), experts)
    torch.testing.assert_close(module(hidden()), experts.one(0, hidden()))


def test_shared_experts_always_run_and_their_gate_is_a_sigmoid():
    shared = Experts(experts=1, width=C, hidden=12, std=0.4)
    plain, both = layer(), layer(shared=shared)
    torch.testing.assert_close(both(hidden()), plain(hidden()) + shared.one(0, hidden()))
    gated = layer(shared=shared, shared_gate=True)
    torch.testing.assert_close(gated(hidden()), plain(hidden()) + 0.5 * shared.one(0, hidden()))


@pytest.mark.parametrize("rule", [SoftmaxTopK(k=2), SoftMoE(), Smear(), ExpertChoice(), NormTopK(k=2)])
def test_padded_tokens_give_zero_and_change_nobody(rule):
    module = layer(rule, causal=False).eval()
    real = torch.ones(B, N + 4, dtype=torch.bool)
    real[:, N:] = False
    x = torch.cat([hidden(), torch.full((B, 4, C), 9.0)], dim=1)
    out = module(x, real)
    assert not out[:, N:].any()
    torch.testing.assert_close(out[:, :N], module(hidden()), rtol=1e-4, atol=1e-5)


def test_dropped_tokens_get_only_the_shared_expert():
    module = layer(SoftmaxTopK(k=1, renorm=False), capacity=(0.5, 0.5))
    routed = module.route(hidden())
    out, gone = module(hidden()), ~routed.used().any(-1)
    assert gone.any() and not out[gone].any() and (out[~gone].abs().sum(-1) > 0).all()
    assert routed.load().max() <= -(-N * B // (2 * E))
    wide = layer(SoftmaxTopK(k=1, renorm=False), capacity=(10.0, 10.0))
    torch.testing.assert_close(wide(hidden()), layer(SoftmaxTopK(k=1, renorm=False))(hidden()))


def test_the_batch_does_not_change_a_tokens_output():
    module = layer().eval()
    torch.testing.assert_close(module(hidden())[1:], module(hidden()[1:]))


def test_sizes_that_do_not_fit_are_refused():
    experts = Experts(experts=E, width=C, hidden=HIDDEN)
    with pytest.raises(RouteError, match="the router is for 4 experts"):
        MoELayer(Router(SoftmaxTopK(), width=C, experts=4), experts)
    with pytest.raises(RouteError, match="shared experts have width 8"):
        layer(shared=Experts(experts=1, width=8, hidden=4))
    with pytest.raises(RouteError, match="capacity is -1"):
        layer(capacity=(-1.0, None))
    with pytest.raises(RouteError, match="hidden is 0"):
        Experts(experts=1, width=C, hidden=0)
    with pytest.raises(RouteError, match="activation is"):
        Experts(experts=1, width=C, hidden=4, activation="tanh")


def test_the_layer_is_saved_and_loaded_with_its_bias(tmp_path):
    module = layer(SigmoidTopK(k=2)).train()
    module(hidden())
    module.router.update_bias()
    from safetensors.torch import load_file, save_file

    save_file(module.state_dict(), tmp_path / "moe.safetensors")
    other = layer(SigmoidTopK(k=2))
    other.load_state_dict(load_file(tmp_path / "moe.safetensors"))
    assert torch.equal(other.router.bias, module.router.bias) and module.router.bias.abs().sum() > 0
    assert torch.equal(other(hidden()), module.eval()(hidden()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes_run_and_agree(dtype):
    module = layer().eval()
    out = copy.deepcopy(module).to(dtype)(hidden().to(dtype))
    assert out.dtype == dtype
    torch.testing.assert_close(out.float(), module(hidden()), rtol=0.05, atol=0.1 if dtype == torch.bfloat16 else 1e-4)


@pytest.mark.parametrize("rule", [SoftmaxTopK(k=2), SoftMoE(), Smear()])
@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_runs_every_backend_and_gives_back_the_dtype_it_got(backend, rule):
    module = layer(rule, causal=False, backend=backend).eval()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = module(hidden())
        out.float().sum().backward()
    assert out.dtype == torch.float32 or not isinstance(rule, SoftmaxTopK)
    torch.testing.assert_close(out.float(), module(hidden()), rtol=0.05, atol=0.1)
    assert module.experts.down_proj.grad.dtype == torch.float32


# transformers


@pytest.mark.parametrize("name", ["mixtral", "qwen3-moe", "deepseek-v3"])
def test_transformers_blocks_are_computed_with_their_own_weights(name):
    model = tiny(name)
    found = find_experts(model).layers[-1]
    bias = getattr(found.router, "e_score_correction_bias", None)
    if bias is not None:
        bias.copy_(torch.randn(bias.shape, generator=seeded(5)) * 0.1)
    mine = from_transformers(found)
    x = torch.randn(2, 33, 64, generator=seeded(1))
    for backend in BACKENDS:
        mine.backend = backend
        torch.testing.assert_close(mine(x), found.block(x), rtol=1e-4, atol=1e-4)
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    mine(ours).square().sum().backward()
    found.block(theirs).square().sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(mine.router.W.grad, found.router.weight.grad, rtol=1e-3, atol=1e-3)


def mixture(losses=None, **options):
    model = tiny("llama")
    host = upcycle(model, experts=4, k=2, noise=0.05, losses=losses, **options)
    return model, host


def test_losses_are_added_in_training_only_and_are_of_the_last_pass():
    ids = tokens(2, 17)
    model, host = mixture({"balance": 0.5})
    bare, _ = mixture()
    bare.load_state_dict(model.state_dict())
    task = bare.train()(ids, labels=ids).loss
    model.train()
    model(tokens(2, 9, seed=5), labels=tokens(2, 9, seed=5))
    torch.testing.assert_close(model(ids, labels=ids).loss, task + host.loss())
    assert 0.5 <= float(host.loss()) < 1.0
    assert model.eval()(ids, labels=ids).loss == bare.eval()(ids, labels=ids).loss
    host.remove()
    torch.testing.assert_close(model.train()(ids, labels=ids).loss, task)


def test_losses_of_two_models_do_not_mix():
    (one, host), (other, second) = mixture({"balance": 1.0}), mixture({"balance": 1.0})
    ids = tokens(2, 17)
    one.train()(ids, labels=ids)
    before = host.loss()
    other.train()(tokens(2, 30, seed=4), labels=tokens(2, 30, seed=4))
    assert torch.equal(host.loss(), before) and not torch.equal(second.loss(), before)


def test_checkpointing_and_accumulation_give_the_same_gradients():
    ids, grads = tokens(4, 17), []
    for checkpointed in (False, True):
        model, _ = mixture({"balance": 1.0, "z": 0.1}, rule=SigmoidTopK(k=2))
        model.train()
        if checkpointed:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        for part in ids.split(2):
            (model(part, labels=part).loss / 2).backward()
        grads.append(model.model.layers[1].mlp.router.W.grad)
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-4, atol=1e-6)


def test_padding_reaches_the_layers_of_a_model_and_generation_runs():
    model, host = mixture()
    model.eval()
    batch = padded([5, 12])
    with host.recording() as record, torch.no_grad():
        model(**batch)
    assert record[0][0].load().sum() == 2 * 17
    ids = batch["input_ids"]
    many = model.generate(**{k: v for k, v in batch.items() if k != "position_ids"}, max_new_tokens=5, do_sample=False)
    one = model.generate(ids[:1, 7:], max_new_tokens=5, do_sample=False)
    assert torch.equal(many[0, -5:], one[0, -5:])


def _ddp_step(rank: int, world_size: int) -> None:
    data = tokens(4, 17)
    model, _ = mixture({"balance": 1.0})
    wrapped = torch.nn.parallel.DistributedDataParallel(model.train())
    mine = data[rank * 2 : rank * 2 + 2]
    wrapped(mine, labels=mine).loss.backward()
    got = model.model.layers[0].mlp.router.W.grad.clone()
    model, _ = mixture({"balance": 1.0})
    for part in data.split(2):
        (model.train()(part, labels=part).loss / 2).backward()
    torch.testing.assert_close(got, model.model.layers[0].mlp.router.W.grad, rtol=1e-4, atol=1e-6)


def _global_scope(rank: int, world_size: int) -> None:
    module = layer(SigmoidTopK(k=2, speed=0.1)).train()
    x = hidden(rows=4)
    mine = x[rank * 2 : rank * 2 + 2]
    local = module.router(mine).loss({"balance": 1.0}, "global")
    local.backward()
    grad = module.router.W.grad
    torch.distributed.all_reduce(grad)
    load = module.router.update_bias()
    alone = layer(SigmoidTopK(k=2, speed=0.1)).train()
    whole = alone.router(x)
    whole.loss({"balance": 1.0}).backward()
    torch.testing.assert_close(grad / 2, alone.router.W.grad, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(load, whole.load())


@pytest.mark.distributed
@pytest.mark.slow
def test_ddp_averages_the_losses_of_local_batches():
    run_distributed(_ddp_step, 2)


@pytest.mark.distributed
@pytest.mark.slow
def test_the_global_scope_and_the_bias_see_the_tokens_of_all_ranks():
    run_distributed(_global_scope, 2)


def test_a_host_is_installed_once():
    model, host = mixture()
    with pytest.raises(RuntimeError, match="already installed"):
        host.install()
    assert isinstance(host, MoEHost)
