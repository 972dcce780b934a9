"""Routers on hosts that are no language models: vision transformers and image generators, trained for a step."""

import pytest
import torch
from torch.nn import functional as F

from headwise import attach
from headwise.hub import load_model
from headwise.models.flow_vit import flow_vit
from headwise.route import HeadRouter, moh, moh_preset


def vit():
    return load_model("tiny-random-vit")[0]


def deit():
    transformers = pytest.importorskip("transformers")
    config = transformers.DeiTConfig(
        hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=64, image_size=16, patch_size=8
    )
    torch.manual_seed(0)
    return transformers.DeiTForImageClassification(config).eval()


def step(model, router, loss_of):
    """One training step with the router attached: (loss with balance loss, the balance part)."""
    model.train()
    with attach(model, router=router):
        names = [name for name, _ in model.named_parameters() if "headwise_router" in name]
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        loss = loss_of(model, router)
        balance = router.loss()
        loss.backward()
        optimizer.step()
    model.eval()
    return names, float(loss.detach()), float(balance.detach())


def classify(model, router):
    size = model.config.image_size
    x = torch.randn(3, 3, size, size, generator=torch.Generator().manual_seed(1))
    return model(x, labels=torch.tensor([0, 1, 0])).loss


@pytest.mark.parametrize("gate_norm", ["official", "paper"])
@pytest.mark.parametrize("host", [vit, deit], ids=["vit", "deit"])
def test_a_training_step_of_an_image_classifier(host, gate_norm):
    model = host()
    router = moh(model, None, router="trained", active=0.75, shared_count=1, gate_norm=gate_norm, beta=0.5)
    before = {name: value.clone() for name, value in router.state_dict().items()}
    names, loss, balance = step(model, router, classify)
    assert len(names) == 2 * len(router.layers)  # W_r and W_h; one shared head has no W_s
    assert 0 < balance < loss
    assert balance == pytest.approx(0.5 * 2, rel=0.2)  # near its value K at even routing
    moved = [name for name, value in router.state_dict().items() if not torch.equal(value, before[name])]
    assert sorted(moved) == sorted(before)
    assert not any("headwise" in name for name, _ in model.named_parameters())


@pytest.mark.parametrize("gate_norm", ["official", "paper"])
def test_the_sum_of_gates_on_a_vision_transformer(gate_norm):
    model = vit()
    router = moh(model, None, router="trained", active=0.75, shared_count=2, gate_norm=gate_norm).eval()
    for layer in router.layers:
        for weight in layer.parameters():
            weight.data.zero_()
    seen = []

    class Ones:
        def __call__(self, call, attend):
            return torch.ones_like(attend())

    with torch.no_grad(), attach(model, router=router, transforms=[Ones()], observers=[lambda c, o: seen.append(o)]):
        model(torch.randn(2, 3, model.config.image_size, model.config.image_size))
    assert len(seen) == len(router.layers)
    for out in seen:  # the outputs are the gates
        gates = out[..., 0]
        assert ((gates != 0).sum(-1) == 3).all()
        wanted = 3.0 if gate_norm == "official" else 0.5 + 0.5 * 0.5  # α (1 of both shared) + α · p of the one chosen
        torch.testing.assert_close(gates.sum(-1), torch.full(gates.shape[:2], wanted))


def test_a_published_budget_on_a_vision_transformer_and_back(tmp_path):
    model = vit()
    layers = len(load_layers(model))
    router = moh(model, None, preset=moh_preset("vit-b-75").scaled(layers, 4), seed=3)
    router.save_pretrained(tmp_path)
    again = HeadRouter.from_pretrained(tmp_path)
    x = torch.randn(2, 3, model.config.image_size, model.config.image_size)
    outputs = []
    for one in (router.eval(), again.eval()):
        with torch.no_grad(), attach(model, router=one):
            outputs.append(model(x).logits)
    assert torch.equal(*outputs)
    assert again.config.meta["preset"].startswith("vit-b-75")


def load_layers(model):
    from headwise.attach import find_stack

    return find_stack(model).modules


def flow_loss(model, router):
    generator = torch.Generator().manual_seed(2)
    x, noise = (torch.randn(4, 1, 16, 16, generator=generator) for _ in range(2))
    t = torch.rand(4, generator=generator)
    mix = t[:, None, None, None]
    velocity = model((1 - mix) * x + mix * noise, t, torch.tensor([0, 1, 2, 16]))
    return F.mse_loss(velocity, noise - x) + router.loss()  # this model's output has no loss to add to


def test_a_training_step_of_an_image_generator():
    model = flow_vit(patch=4, width=32, layers=3, heads=4)
    preset = moh_preset("dit-s/2-75").scaled(3, 4)
    router = moh(model, None, preset=preset)
    names, loss, balance = step(model, router, flow_loss)
    assert names
    assert 0 < balance < loss


def test_a_trained_router_on_a_dit_of_diffusers():
    diffusers = pytest.importorskip("diffusers", reason="needs diffusers: pip install 'headwise[vision]'")
    torch.manual_seed(0)
    model = diffusers.DiTTransformer2DModel(
        num_attention_heads=4, attention_head_dim=8, in_channels=4, out_channels=4, num_layers=3, sample_size=8,
        patch_size=2, num_embeds_ada_norm=5,
    )  # fmt: skip
    router = moh(model, None, router="trained", active=0.75, shared_count=1)
    assert router.config.width == 32

    def denoise(model, router):
        x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(2))
        out = model(x, timestep=torch.tensor([3, 5]), class_labels=torch.tensor([1, 2])).sample
        return out.square().mean() + router.loss()

    names, loss, balance = step(model, router, denoise)
    assert names
    assert 0 < balance < loss
