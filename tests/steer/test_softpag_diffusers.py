"""SoftPAG beside diffusers' own guidance on the same random weights, and inside a diffusers pipeline."""

import copy

import pytest
import torch

from headwise.attach import attach, find_stack
from headwise.attach.diffusers import segments
from headwise.errors import EditError, UnitError
from headwise.steer import FlowSampler, Perturbation, guided, guider, hunt, push, push_with_cfg
from headwise.steer._perturb import strength_table
from headwise.units import HeadSet
from tiny_helper import random

pytest.importorskip("diffusers", reason="needs diffusers: pip install 'headwise[vision]'")

from diffusers.hooks.layer_skip import AttentionScoreSkipFunctionMode, LayerSkipConfig, apply_layer_skip
from diffusers.models.attention_processor import PAGJointAttnProcessor2_0

from vision_helper import inputs, model, predict

EACH = pytest.mark.parametrize("name", ["sd3", "flux", "dit"])


def whole_layer(made, layer):
    return HeadSet.of([(layer, head) for head in range(find_stack(made).heads)])


def skip_scores(attention):
    """The peer's own path for one attention module: attention gives back its values."""
    forward = attention.forward

    def skipped(*args, **kwargs):
        with AttentionScoreSkipFunctionMode():
            return forward(*args, **kwargs)

    attention.forward = skipped


@EACH
def test_identity_of_a_whole_layer_is_the_peers_skipped_scores(name):
    made, batch = model(name), inputs(name)
    peer = copy.deepcopy(made)
    skip_scores(find_stack(peer).modules[1])
    with Perturbation(heads=whole_layer(made, 1), u=1.0).attached(made):
        found = predict(made, batch)
    assert (found - predict(peer, batch)).abs().max() < 1e-5
    assert (found - predict(made, batch)).abs().max() > 1e-4


def test_and_the_peers_guider_hook_where_it_takes_the_model():
    """Of these models diffusers 0.42.1 hooks only DiT: it knows no processor of SD3 and asks FLUX for a missing attribute."""
    made, batch = model("dit"), inputs("dit")
    peer = copy.deepcopy(made)
    skip = {"skip_attention": False, "skip_ff": False, "skip_attention_scores": True}
    apply_layer_skip(peer, LayerSkipConfig(indices=[1], fqn="transformer_blocks", **skip))
    with Perturbation(heads=whole_layer(made, 1), u=1.0).attached(made):
        assert (predict(made, batch) - predict(peer, batch)).abs().max() < 1e-5


@pytest.mark.parametrize("text", [4, 9])
def test_identity_of_the_image_block_is_the_peers_pag_of_sd3(text):
    made, batch = model("sd3"), inputs("sd3", text=text)
    peer = copy.deepcopy(made)
    peer.transformer_blocks[1].attn.set_processor(PAGJointAttnProcessor2_0())
    doubled = {name: torch.cat([value, value]) for name, value in batch.items()}
    original, perturbed = predict(peer, doubled).chunk(2)
    with Perturbation(heads=whole_layer(made, 1), u=1.0, target="image-identity").attached(made):
        assert (predict(made, batch) - perturbed).abs().max() < 1e-5
    assert (predict(made, batch) - original).abs().max() < 1e-5


def test_the_two_definitions_differ():
    made, batch = model("sd3"), inputs("sd3")
    found = []
    for how in ({"target": "image-identity"}, {"scope": "image"}, {}):
        with Perturbation(heads=whole_layer(made, 1), u=1.0, **how).attached(made):
            found.append(predict(made, batch))
    assert all((a - b).abs().max() > 1e-5 for a, b in zip(found, [*found[1:], found[0]], strict=True))


@pytest.mark.parametrize("text", [3, 11])
@pytest.mark.parametrize("scope", ["image", "text"])
@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_a_scope_touches_its_rows_whatever_the_lengths(name, scope, text):
    """Head 1 of layer 0 on the rows of one kind: the other rows and heads of that layer stay to the bit."""
    made, batch, seen = model(name), inputs(name, text=text), []

    def watch(call, out):
        if call.layer == 0:
            seen.append((out.clone(), segments(call)))

    with attach(made, observers=[watch]):
        predict(made, batch)
        with Perturbation(heads=HeadSet.parse("L0H1"), u=0.5, scope=scope).attached(made):
            predict(made, batch)
    (plain, parts), (changed, _) = seen
    other = parts["text" if scope == "image" else "image"]
    assert torch.equal(plain[:, other], changed[:, other])
    assert not torch.equal(plain[:, parts[scope]], changed[:, parts[scope]])
    assert torch.equal(plain[:, :, 0], changed[:, :, 0])


def test_batched_guidance_of_a_diffusers_model():
    made, batch = model("sd3"), inputs("sd3")
    p = Perturbation(heads=HeadSet.parse("L0H1,L2H3"), u=0.5)
    plain = predict(made, batch)
    with p.attached(made):
        skip = predict(made, batch)
    with guided(made, p, w=3.0):
        torch.testing.assert_close(predict(made, batch), push(plain, skip, 3.0))
    assert torch.equal(predict(made, batch), plain)


# inside a pipeline


def pipeline(made):
    from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline

    parts = dict.fromkeys(
        ("vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "text_encoder_3", "tokenizer_3")
    )
    pipe = StableDiffusion3Pipeline(transformer=made, scheduler=FlowMatchEulerDiscreteScheduler(), **parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def run(made, s, callback=None):
    texts = {
        "prompt_embeds": random(1, 5, 32),
        "negative_prompt_embeds": random(1, 5, 32, seed=1),
        "pooled_prompt_embeds": random(1, 16, seed=2),
        "negative_pooled_prompt_embeds": random(1, 16, seed=3),
    }
    return pipeline(made)(
        **texts, height=64, width=64, num_inference_steps=4, guidance_scale=s, output_type="latent",
        latents=random(1, 4, 8, 8), callback_on_step_end=callback,
    ).images  # fmt: skip


def by_hand(made, s, w, p, active=(True,) * 4):
    """The pipeline's loop, written out."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(4)
    x = random(1, 4, 8, 8)
    conditions = [(random(1, 5, 32), random(1, 16, seed=2)), (random(1, 5, 32, seed=1), random(1, 16, seed=3))]

    def at(x, t, which):
        text, pooled = conditions[which]
        return predict(
            made,
            {"hidden_states": x, "timestep": t.expand(1), "encoder_hidden_states": text, "pooled_projections": pooled},
        )

    for step, t in enumerate(scheduler.timesteps):
        cond, uncond = at(x, t, 0), at(x, t, 1)
        with p.attached(made):
            skip = at(x, t, 0)
        pred = push_with_cfg(cond, uncond, skip, s, w if active[step] else 0.0)
        x = scheduler.step(pred, t, x).prev_sample
    return x


def test_a_pipeline_with_classifier_free_guidance():
    made, p = model("sd3"), Perturbation(heads=HeadSet.parse("L0H1,L2H3"), u=0.5)
    plain = run(made, 4.0)
    with guided(made, p, w=3.0, cfg=4.0):
        found = run(made, 4.0)
    torch.testing.assert_close(found, by_hand(made, 4.0, 3.0, p), atol=1e-4, rtol=1e-4)
    assert not torch.equal(found, plain)
    with guided(made, p, w=3.0, cfg=4.0, start=0.5) as guidance:
        found = run(made, 4.0, guidance.callback)
    torch.testing.assert_close(found, by_hand(made, 4.0, 3.0, p, (False, False, True, True)), atol=1e-4, rtol=1e-4)


# as a guider


def guide(guidance, made, batch, null, step=0, steps=4):
    """What a modular pipeline does in one step."""
    guidance.set_state(step=step, num_inference_steps=steps, timestep=torch.tensor(500))
    data = {name: (value, null[name]) for name, value in batch.items()}
    states = guidance.prepare_inputs(data)
    for state in states:
        guidance.prepare_models(made)
        state.noise_pred = predict(made, {name: getattr(state, name) for name in batch})
        guidance.cleanup_models(made)
    return guidance(states).pred


@pytest.mark.parametrize("s", [1.0, 5.0])
def test_a_guider_with_and_without_classifier_free_guidance(s):
    made, batch = model("sd3"), inputs("sd3")
    null = {**batch, "encoder_hidden_states": random(2, 7, 32, seed=9)}
    guidance = guider("L0H1,L2H3:0.5", u=0.8, w=3.0, guidance_scale=s)
    cond, uncond = predict(made, batch), predict(made, null)
    with guidance.perturbation.attached(made):
        skip = predict(made, batch)
    torch.testing.assert_close(
        guide(guidance, made, batch, null), push_with_cfg(cond, uncond, skip, s, 3.0), atol=1e-5, rtol=1e-4
    )
    assert torch.equal(predict(made, batch), cond)


def test_a_guider_acts_in_its_steps_and_is_saved(tmp_path):
    made, batch = model("sd3"), inputs("sd3")
    guidance = guider("L0H1", u=1.0, w=3.0, perturbed_start=0.5)
    plain = predict(made, batch)
    assert torch.equal(guide(guidance, made, batch, batch, step=1), plain)
    assert not torch.equal(guide(guidance, made, batch, batch, step=2), plain)
    guidance.save_pretrained(tmp_path)
    loaded = type(guidance).from_pretrained(tmp_path)
    assert loaded.perturbation == guidance.perturbation
    assert torch.equal(guide(loaded, made, batch, batch, step=2), guide(guidance, made, batch, batch, step=2))
    guidance.disable()
    assert torch.equal(guide(guidance, made, batch, batch, step=2), plain)


def test_a_guider_of_nonsense_is_refused():
    with pytest.raises(EditError, match="u is 2"):
        guider("L0H1", u=2.0)
    with pytest.raises(EditError, match="perturbed_start=0.9"):
        guider("L0H1", perturbed_start=0.9, perturbed_stop=0.1)
    made, batch = model("sd3"), inputs("sd3")
    with pytest.raises(UnitError, match="L9H0 does not exist"):
        guide(guider("L9H0"), made, batch, batch)


# a search on a diffusers model


@torch.no_grad()
def test_a_search_on_a_diffusers_transformer_finds_the_planted_head():
    """Only head L1H2 of this DiT reaches its output: the search must find it, and its images are those of a plain loop."""
    made = model("dit")
    for layer, block in enumerate(made.transformer_blocks):
        kept = block.attn1.to_out[0].weight[:, 16:24].clone()
        block.attn1.to_out[0].weight.mul_(0.01)
        if layer == 1:
            block.attn1.to_out[0].weight[:, 16:24] = 20 * kept

    def velocity(x, t, class_labels):
        return made(x, timestep=t * 1000, class_labels=class_labels)

    noise, labels = random(2, 4, 8, 8), torch.tensor([1, 7])
    sampler = FlowSampler(made, noise, {"class_labels": labels}, velocity=velocity, steps=3, w=2.0)
    plain = sampler(None)[0]
    found = hunt(made, sampler, lambda images: (images - plain).flatten(1).norm(dim=1), k=1, rounds=1, batch=5)
    assert found.order == ((1, 2),)
    x = noise
    for step in range(3):
        t = torch.full((2,), 1 - step / 3)
        v = velocity(x, t, labels).sample
        with Perturbation(heads=HeadSet.parse("L1H2"), u=1.0).attached(made):
            skip = velocity(x, t, labels).sample
        x = x - push(v, skip, 2.0) / 3
    images = sampler(strength_table([HeadSet.parse("L1H2")], 1.0, sampler.made_for()))[0]
    torch.testing.assert_close(images, x, atol=1e-4, rtol=1e-4)
