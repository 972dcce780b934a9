"""BAM: models that become one mixture; what each expert is, that folding is exact, caches, bookkeeping."""

import copy

import pytest
import torch
from bam_helper import KV, MODELS, cohere, logits, specialists
from typer.testing import CliRunner

from headwise.attach import attach, find_stack
from headwise.cli import app
from headwise.edits import Edit, HeadEdits
from headwise.errors import ArtifactError
from headwise.route import MixedModel, load_rebuilt, soup
from headwise.route.bam import bam
from headwise.units import HeadSet
from tiny_helper import tiny, tokens


def force(mixed, expert):
    """Every router sends everything to one expert."""
    with torch.no_grad():
        for module in mixed.model.modules():
            if hasattr(module, "router"):
                module.router.W.zero_()
                handle = module.router.register_forward_pre_hook(_constant(expert, module.router), with_kwargs=True)
                assert handle is not None


def _constant(expert, router):
    """Logits of ±40 whatever the token: a constant input on a row of the weight."""

    def hook(module, args, kwargs):
        x = torch.ones_like(args[0])
        router.W.data.fill_(-40 / x.shape[-1])
        router.W.data[expert].fill_(40 / x.shape[-1])
        return (x,), kwargs

    return hook


@pytest.mark.parametrize("kv", KV)
@pytest.mark.parametrize("name", MODELS)
def test_identical_models_give_the_model_itself_whatever_the_routers(name, kv):
    model = MODELS[name]()
    before = logits(model)
    mixed = bam([model, model, model], None, kv=kv, ffn_top_k=3, ffn_gate="renorm", router_std=2.0)
    torch.testing.assert_close(logits(mixed.model), before, rtol=1e-4, atol=1e-4)
    assert torch.equal(logits(model), before)


def test_identical_models_with_the_papers_gate_scale_the_feed_forward_part_by_p():
    model = tiny("llama")
    mixed = bam([model, model], None)
    layer = mixed.host.layers[0]
    u = torch.randn(1, 7, 64)
    p = layer.router(u).probs.amax(-1, keepdim=True)
    torch.testing.assert_close(layer(u), p * model.model.layers[0].mlp(u), rtol=1e-4, atol=1e-5)


def test_scale_n_starts_near_the_dense_model():
    model = tiny("llama")
    mixed = bam([model, model], None, ffn_gate="scale-n", router_std=0.0)
    torch.testing.assert_close(logits(mixed.model), logits(model), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_a_router_of_one_hot_gates_gives_that_expert(name):
    models = specialists(MODELS[name]())
    mixed = bam(models, None)
    wanted = logits(mixed.expert(2))
    force(mixed, 2)
    torch.testing.assert_close(logits(mixed.model), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kv", KV)
@pytest.mark.parametrize("name", ["llama", "biases"])
def test_folded_heads_equal_a_loop_over_experts(name, kv):
    models = specialists(MODELS[name]())
    mixed = bam(models, None, kv=kv)
    x, dense = torch.randn(2, 9, mixed.config.hidden_size), [mixed.expert(i) for i in range(3)]
    angles = mixed.model.model.rotary_emb(x, torch.arange(9)[None])
    causal = torch.full((1, 1, 9, 9), -1e30).triu(1)
    for n, module in enumerate(find_stack(mixed.model).modules):
        g = (x @ module.o_proj.router.W.T).softmax(-1)
        outs = [d.model.layers[n].self_attn(x, position_embeddings=angles, attention_mask=causal)[0] for d in dense]
        wanted = sum(g[..., i : i + 1] * out for i, out in enumerate(outs))
        torch.testing.assert_close(
            module(x, position_embeddings=angles, attention_mask=causal)[0], wanted, rtol=1e-4, atol=1e-5
        )


@pytest.mark.parametrize("kv", KV)
@pytest.mark.parametrize("name", ["llama", "cohere"])
def test_taken_out_experts_are_their_sources_and_the_rest_is_the_mean(name, kv):
    models = specialists(MODELS[name]())
    mixed = bam(models, None, kv=kv)
    own = ("q_proj", "o_proj", "mlp") + (("k_proj", "v_proj") if kv == "expert" else ())
    for number, model in enumerate(models):
        taken = mixed.expert(number).state_dict()
        for key, value in model.state_dict().items():
            mean = torch.stack([m.state_dict()[key] for m in models]).mean(0)
            assert torch.equal(taken[key], value if any(part in key for part in own) else mean), key


def test_routers_alone_depend_on_the_seed():
    models = specialists(tiny("llama"))
    one, two = (bam(models, None, seed=s).model.state_dict() for s in (0, 1))
    assert {k for k in one if not torch.equal(one[k], two[k])} == {k for k in one if "router" in k}


def test_means_are_taken_in_float32():
    models = [m.to(torch.bfloat16) for m in specialists(tiny("llama"), 3)]
    name = "model.norm.weight"
    wanted = torch.stack([m.state_dict()[name].float() for m in models]).mean(0).to(torch.bfloat16)
    mixed = bam(models, None)
    assert torch.equal(mixed.model.state_dict()[name], wanted)
    assert logits(mixed.model).isfinite().all() and mixed.model.dtype == torch.bfloat16


def test_autocast_trains():
    mixed, ids = bam(specialists(tiny("llama"), 1), None), tokens(2, 12)
    exact = logits(mixed.model, ids)
    mixed.model.train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = mixed.model(ids, labels=ids)
        out.loss.backward()
    assert (out.logits - exact).abs().mean() < 0.1 * exact.abs().mean()
    assert mixed.model.model.layers[0].self_attn.o_proj.router.W.grad.abs().sum() > 0


def test_every_attention_expert_learns_from_every_token_and_idle_feed_forward_experts_do_not():
    mixed = bam(specialists(tiny("llama")), None, balance=0.0, z=0.0)
    force(mixed, 1)
    mixed.model.train()
    ids = tokens(1, 12)
    with mixed.recording() as (experts, gates):
        mixed.model(ids, labels=ids).loss.backward()
    layer = mixed.host.layers[0].experts.gate_up_proj.grad
    assert layer[1].abs().sum() > 0 and layer[0].abs().sum() == layer[2].abs().sum() == 0
    assert experts[0][0].load().tolist() == [0, 12, 0] and gates[0][0].shape == (1, 12, 3)
    free = bam(specialists(tiny("llama")), None)
    free.model.train()
    free.model(ids, labels=ids).loss.backward()
    output = free.model.model.layers[0].self_attn.o_proj
    parts = output.weight.grad.unflatten(1, (3, -1))
    assert (parts.abs().sum((0, 2)) > 0).all() and output.router.W.grad.abs().sum() > 0
    with torch.no_grad(), free.recording() as (_, gates):
        free.model(ids)
    torch.testing.assert_close(gates[0][0].sum(-1), torch.ones(1, 12))
    assert (gates[0][0] > 0).all()


def test_losses_are_those_of_the_feed_forward_routers_and_add_up_over_layers():
    models, ids = specialists(tiny("llama")), tokens(2, 12)
    plain, lossy = bam(models, None, balance=0.0, z=0.0), bam(models, None, balance=0.01, z=0.001)
    for mixed in (plain, lossy):
        mixed.model.train()
    with lossy.recording() as (experts, _):
        total = lossy.model(ids, labels=ids).loss
    extra = sum(e[0].loss({"balance": 0.01, "z": 0.001}) for e in experts.values())
    torch.testing.assert_close(total, plain.model(ids, labels=ids).loss + extra, rtol=1e-5, atol=1e-6)
    gates = torch.full((1, 8, 2), 0.5)
    even = experts[0][0].__class__(torch.arange(8).remainder(2).view(1, 8, 1), gates[..., :1], gates)
    assert float(even.loss({"balance": 1.0})) == pytest.approx(1.0)


@pytest.mark.parametrize("kv", KV)
def test_cached_decoding_equals_the_full_pass_and_the_cache_has_the_right_size(kv):
    models = specialists(tiny("llama"))
    mixed, ids = bam(models, None, kv=kv), tokens(2, 14)
    full = logits(mixed.model, ids)
    with torch.no_grad():
        out = mixed.model(ids[:, :9], use_cache=True)
        dense = models[0](ids[:, :9], use_cache=True).past_key_values
        steps = [out.logits]
        for t in range(9, 14):
            steps.append(mixed.model(ids[:, t : t + 1], past_key_values=out.past_key_values).logits)
    torch.testing.assert_close(torch.cat(steps, 1), full, rtol=1e-4, atol=1e-4)
    ratio = out.past_key_values.layers[0].keys[:, :, :9].numel() / dense.layers[0].keys.numel()
    assert ratio == (3 if kv == "expert" else 1)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_and_batch_mates_change_nothing(side):
    mixed, ids = bam(specialists(tiny("llama")), None, kv="shared"), tokens(1, 9)
    pad = torch.full((1, 4), 256)
    row = torch.cat([pad, ids] if side == "left" else [ids, pad], 1)
    mask = (row != 256).long()
    batch, masks = torch.cat([row, tokens(1, 13, seed=5)]), torch.cat([mask, torch.ones(1, 13).long()])
    places = (masks.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        out = mixed.model(batch, attention_mask=masks, position_ids=places).logits[0][mask[0].bool()]
    torch.testing.assert_close(out, logits(mixed.model, ids)[0], rtol=1e-4, atol=1e-4)


def test_heads_of_experts_are_addressable():
    models, ids = specialists(tiny("llama")), tokens(1, 11)
    mixed = bam(models, None)
    before = logits(mixed.model, ids)
    assert find_stack(mixed.model).heads == 12 and find_stack(mixed.model).kv_heads == 6
    every = HeadSet.parse(",".join(f"L0H{h}" for h in range(4, 8)))  # all heads of expert 1
    with attach(mixed.model, edits=HeadEdits([Edit.zero(every)])):
        without = logits(mixed.model, ids)
    with torch.no_grad():
        mixed.model.model.layers[0].self_attn.o_proj.weight.unflatten(1, (3, -1))[:, 1] = 0
    torch.testing.assert_close(logits(mixed.model, ids), without, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(without, before)


def test_btx_and_the_soup():
    models = specialists(tiny("llama"))
    btx, average = bam(models, None, attention="average"), soup(models)
    assert not btx.attention_outputs() and "BTX" in str(btx)
    q = "model.layers.0.self_attn.q_proj.weight"
    assert torch.equal(btx.model.state_dict()[q], average.state_dict()[q])
    mean = torch.stack([m.state_dict()[q] for m in models]).mean(0)
    assert torch.equal(average.state_dict()[q], mean)


def test_top_k_attention_is_the_ablation():
    mixed = bam(specialists(tiny("llama")), None, attention_k=1)
    with torch.no_grad(), mixed.recording() as (_, gates):
        mixed.model(tokens(1, 8))
    assert ((gates[0][0] > 0).sum(-1) == 1).all()


def test_parameter_counts_are_the_published_ones():
    def count(C, hidden, heads_ratio, layers, vocab, N, kind):
        attention, ffn = 2 * C * C + 2 * C * C // heads_ratio, 3 * C * hidden
        routers = 0 if kind == "dense" else N * C * (1 if kind == "btx" else 2)
        block = C + (N if kind == "bam" else 1) * attention + (1 if kind == "dense" else N) * ffn + routers
        return 2 * vocab * C + C + layers * block

    shape = {"C": 1024, "hidden": 2048, "heads_ratio": 1, "layers": 6, "vocab": 256000, "N": 4}
    assert count(**shape, kind="dense") == 587_209_728
    assert count(**shape, kind="btx") == 700_480_512
    assert count(**shape, kind="bam") == 776_002_560
    model = cohere(tie_word_embeddings=False)
    mine = {"C": 32, "hidden": 48, "heads_ratio": 2, "layers": 2, "vocab": 320, "N": 3}
    for kind, made in (
        ("dense", model),
        ("btx", bam([model] * 3, None, attention="average").model),
        ("bam", bam([model] * 3, None).model),
    ):
        assert sum(p.numel() for p in made.parameters()) == count(**mine, kind=kind), kind


@pytest.mark.parametrize("name", ["llama", "cohere"])
@pytest.mark.parametrize("kv", KV)
def test_saved_mixtures_come_back(name, kv, tmp_path):
    mixed = bam(specialists(MODELS[name]()), None, kv=kv, ffn_gate="scale-n")
    mixed.save_pretrained(tmp_path)
    again = load_rebuilt(tmp_path)
    assert isinstance(again, MixedModel) and str(again) == str(mixed) and again.recipe == mixed.recipe
    assert torch.equal(logits(again.model), logits(mixed.model))
    with pytest.raises(
        OSError, match="safetensors"
    ):  # plain transformers must not fill a dense model with the rest at random
        type(mixed.model).from_pretrained(tmp_path)
    (tmp_path / "headwise.json").write_text('{"headwise": "other", "schema": 1}')
    with pytest.raises(ArtifactError, match="other"):
        load_rebuilt(tmp_path)


def test_copies_and_checkpointing_train_alike():
    mixed, ids = bam(specialists(tiny("llama"), 1), None), tokens(2, 10)
    twin = copy.deepcopy(mixed)
    twin.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    grads = []
    for one in (mixed, twin):
        one.model.train()
        one.model(ids, labels=ids, use_cache=False).loss.backward()
        grads.append({n: p.grad for n, p in one.model.named_parameters()})
    assert twin.model.model.layers[0].self_attn.o_proj is not mixed.model.model.layers[0].self_attn.o_proj
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, rtol=1e-4, atol=1e-6)


def test_one_command_mixes_several_models(tmp_path):
    tiny("llama").save_pretrained(tmp_path / "A")
    names = [str(tmp_path / "A"), "tiny-random-llama", str(tmp_path / "A")]
    run = CliRunner().invoke(app, ["convert", "bam", "--models", *names, "--kv", "shared", "-o", str(tmp_path / "mix")])
    assert run.exit_code == 0, run.output
    assert "3 experts" in run.output
    again = load_rebuilt(tmp_path / "mix")
    assert again.recipe.kv == "shared" and again.recipe.experts == 3
    generated = ["generate", "--model", str(tmp_path / "mix"), "--prompt", "ab", "--max-new-tokens", "2"]
    assert CliRunner().invoke(app, generated).exit_code == 0


def test_z_loss_gradient_by_finite_differences():
    mixed = bam(specialists(tiny("llama"), 1), None)
    router = mixed.host.layers[0].router.double()
    x, W = torch.randn(1, 5, 64, dtype=torch.float64), router.W
    (grad,) = torch.autograd.grad(router(x).loss({"z": 1.0}), W)
    step, losses = torch.zeros_like(W), []
    step[1, 3] = 1e-6
    for move in (step, -2 * step):
        W.data.add_(move)
        losses.append(router(x).loss({"z": 1.0}).item())
    assert (losses[0] - losses[1]) / 2e-6 == pytest.approx(float(grad[1, 3]), rel=1e-4, abs=1e-8)
