"""Perturbation guidance: on transformers models, on diffusers models beside diffusers' own, and around a pipeline."""

import pytest
import torch
from torch import nn

import headwise
from headwise.attach import attach, fingerprint
from headwise.edits import Edit, HeadEdits
from headwise.errors import EditError, UnitError
from headwise.hub import load_model
from headwise.steer import FlowSampler, Perturbation, guided, push, push_with_cfg
from headwise.steer._perturb import Candidates, strength_table
from headwise.units import HeadSet
from tiny_helper import random, tiny


@torch.no_grad()
def logits(model, seed=0):
    return model(pixel_values=random(2, 3, 32, 32, seed=seed))[0]


SOME = HeadSet.parse("L0H1,L0H2,L1H3:0.5")


def test_the_method_gives_edits_that_do_what_the_perturbation_does():
    model = tiny("vit")
    edits = headwise.steer.softpag(model, None, heads=SOME, u=0.6)
    with attach(model, edits=edits):
        by_edits = logits(model)
    with Perturbation(heads=SOME, u=0.6).attached(model):
        torch.testing.assert_close(logits(model), by_edits)
    uniform = headwise.steer.softpag(model, None, heads=SOME, u=0.6, target="uniform")
    with attach(model, edits=uniform):
        by_edits = logits(model)
    with Perturbation(heads=SOME, u=0.6, target="uniform").attached(model):
        torch.testing.assert_close(logits(model), by_edits)


def test_edits_are_saved_and_loaded(tmp_path):
    model = tiny("vit")
    edits = headwise.steer.softpag(model, None, heads=SOME, u=0.6)
    edits.save(tmp_path / "softpag.json")
    loaded = headwise.HeadEdits.load(tmp_path / "softpag.json")
    assert loaded == edits
    loaded.check(fingerprint(model))


@pytest.mark.parametrize("how", [{"heads": HeadSet.empty()}, {"heads": SOME, "u": 0.0}])
def test_no_heads_or_no_strength_is_the_plain_pass_to_the_bit(how):
    model = tiny("vit")
    plain = logits(model)
    with Perturbation(**how).attached(model):
        assert torch.equal(logits(model), plain)
    for w in (0.0, 3.0, -1.5, 40.0):
        with guided(model, Perturbation(**how), w=w):
            assert torch.equal(logits(model), plain)


def test_the_order_of_heads_means_nothing_and_none_is_named_twice():
    model, found = tiny("vit"), []
    for pairs in ([(0, 1), (1, 3), (0, 2)], [(0, 2), (0, 1), (1, 3)]):
        with Perturbation(heads=HeadSet.of(pairs), u=0.7).attached(model):
            found.append(logits(model))
    assert torch.equal(*found)
    with pytest.raises(UnitError, match="L0H1 is named twice"):
        HeadSet.of([(0, 1), (1, 3), (0, 1)])


def test_guidance_is_affine_in_w_and_exact_at_zero():
    model, p = tiny("vit"), Perturbation(heads=SOME, u=1.0)
    plain = logits(model)
    found = {}
    for w in (0.0, 1.0, 2.5):
        with guided(model, p, w=w):
            found[w] = logits(model)
    assert torch.equal(found[0.0], plain)
    torch.testing.assert_close(found[2.5] - plain, 2.5 * (found[1.0] - plain), atol=1e-5, rtol=1e-4)
    with p.attached(model):
        degraded = logits(model)
    torch.testing.assert_close(found[1.0], 2 * plain - degraded)


def test_a_guided_model_is_attached_once_and_left_as_it_was(monkeypatch):
    from headwise.steer import _guide

    made = []
    monkeypatch.setattr(_guide, "attach", lambda *args, **kw: made.append(attach(*args, **kw)) or made[-1])
    model, _ = load_model("tiny-random-vit")
    pixels, edits = torch.randn(1, 3, 32, 32), HeadEdits.of(Edit.mix_v(HeadSet.parse("L0H1"), 1.0))
    with torch.no_grad():
        plain = model(pixel_values=pixels)[0]
        with attach(model, edits=edits):
            degraded = model(pixel_values=pixels)[0]
        with guided(model, edits, w=2.0):
            pushed = [model(pixel_values=pixels)[0] for _ in range(3)]
        assert torch.equal(model(pixel_values=pixels)[0], plain)
    assert len(made) == 1 and not made[0].attached
    assert all(torch.equal(one, plain + 2.0 * (plain - degraded)) for one in pushed)


def test_push_with_and_without_classifier_free_guidance():
    cond, uncond, skip = random(3, 4), random(3, 4, seed=1), random(3, 4, seed=2)
    assert torch.equal(push(cond, skip, 0.0), cond)
    torch.testing.assert_close(
        push_with_cfg(cond, uncond, skip, 4.0, 3.0), uncond + 4 * (cond - uncond) + 3 * (cond - skip)
    )
    torch.testing.assert_close(push_with_cfg(cond, uncond, skip, 1.0, 3.0), push(cond, skip, 3.0))


def test_a_batched_pipeline_gets_both_guidances():
    """The pipeline's own uncond + s (cond − uncond) becomes the sum of both."""
    model, p, s, w = tiny("vit"), Perturbation(heads=SOME, u=1.0), 5.0, 2.0
    with torch.no_grad():
        both = random(4, 3, 32, 32)
        plain = model(pixel_values=both)[0]
        with p.attached(model):
            skip = model(pixel_values=both[2:])[0]
        with guided(model, p, w=w, cfg=s):
            rows = model(pixel_values=both)[0]
    uncond, cond = rows.chunk(2)
    assert torch.equal(uncond, plain[:2])
    wanted = push_with_cfg(plain[2:], plain[:2], skip, s, w)
    torch.testing.assert_close(uncond + s * (cond - uncond), wanted, atol=1e-4, rtol=1e-4)
    with guided(model, p, cfg=s), pytest.raises(EditError, match="3 rows are no pairs"):
        model(pixel_values=random(3, 3, 32, 32))


def test_steps_and_branches_in_which_guidance_acts():
    model, p = tiny("vit"), Perturbation(heads=SOME, u=1.0)
    plain = logits(model)
    with guided(model, p, start=0.5, stop=1.0, steps=4):
        changed = [not torch.equal(logits(model), plain) for _ in range(4)]
    assert changed == [False, False, True, True]
    with guided(model, p, calls=2, which=1):
        changed = [not torch.equal(logits(model), plain) for _ in range(4)]
    assert changed == [False, True, False, True]
    with guided(model, p, start=0.5) as guidance:
        changed = []
        for step in range(4):
            changed.append(not torch.equal(logits(model), plain))
            guidance.callback(type("Pipe", (), {"num_timesteps": 4}), step, None, {})
    assert changed == [False, False, True, True]
    with guided(model, p, start=0.5):
        logits(model)
        with pytest.raises(EditError, match="nothing says how many"):
            logits(model)


@pytest.mark.parametrize(
    "options, words",
    [
        ({"start": 0.8, "stop": 0.2}, "start=0.8"),
        ({"cfg": 0.0}, "cfg is 0"),
        ({"w": float("inf")}, "w is inf"),
        ({"which": 1}, "which is 1"),
    ],
)
def test_bad_guidance_is_refused(options, words):
    with pytest.raises(EditError, match=words):
        guided(tiny("vit"), Perturbation(heads=SOME), **options)


def test_a_head_that_is_not_there_is_refused_on_entering():
    model = tiny("vit")
    with (
        pytest.raises(UnitError, match="L7H0 does not exist"),
        guided(model, Perturbation(heads=HeadSet.parse("L7H0"))),
    ):
        pass
    with pytest.raises(UnitError, match="L0H9 does not exist"):
        headwise.steer.softpag(model, None, heads=HeadSet.parse("L0H9"))
    assert not model._forward_hooks


def test_other_targets_are_no_edits():
    with pytest.raises(EditError, match="edits express identity and uniform"):
        Perturbation(heads=SOME, target="query-mean").edits()


def test_rows_of_a_batch_have_sets_of_their_own():
    model, made_for = tiny("vit"), fingerprint(tiny("vit"))
    sets = [HeadSet.parse("L0H1"), HeadSet.parse("L0H1:0.25,L1H2"), HeadSet.empty()]
    pixels = random(2, 3, 32, 32)
    for target in ("identity", "uniform"):
        how = Candidates(Perturbation(heads=HeadSet.empty(), target=target), strength_table(sets, 0.8, made_for))
        with torch.no_grad(), attach(model, transforms=[how]):
            together = model(pixel_values=pixels.repeat(3, 1, 1, 1))[0].unflatten(0, (3, 2))
        for one, found in zip(sets, together, strict=True):
            with torch.no_grad(), Perturbation(heads=one, u=0.8, target=target).attached(model):
                torch.testing.assert_close(found, model(pixel_values=pixels)[0], atol=1e-5, rtol=1e-4)


class Toy(nn.Module):
    """A velocity from a ViT, so that a sampler can be run: pixels in, pixels out."""

    def __init__(self):
        super().__init__()
        self.vit = tiny("vit")
        self.calls = 0

    def velocity(self, x, t, scale):
        self.calls += len(x)
        out = self.vit(pixel_values=x)[0]
        return out[:, 0, None, None, None] * x + scale[:, None, None, None] * t[:, None, None, None]


def sampler(toy, **options):
    noise = random(2, 3, 32, 32)
    return FlowSampler(
        toy.vit, noise, conditions={"scale": torch.tensor([1.0, 2.0])}, velocity=toy.velocity, steps=4, w=2.0, **options
    )


def loop(toy, s, heads, null=None):
    """The same sampling, one set at a time, step by step."""
    x = s.noise
    for step in range(s.steps):
        t = torch.full((2,), 1 - step / s.steps)
        v = toy.velocity(x, t, s.conditions["scale"])
        with Perturbation(heads=heads, u=0.7).attached(toy.vit):
            skip = toy.velocity(x, t, s.conditions["scale"])
        active = int(s.start * 4) <= step < int(s.stop * 4)
        if null is None:
            v = push(v, skip, 2.0 if active else 0.0)
        else:
            v = push_with_cfg(v, toy.velocity(x, t, null), skip, 3.0, 2.0 if active else 0.0)
        x = x - v / s.steps
    return x


@torch.no_grad()
@pytest.mark.parametrize("span", [(0.0, 1.0), (0.25, 0.75)])
@pytest.mark.parametrize("with_cfg", [False, True])
def test_the_sampler_is_the_loop(span, with_cfg):
    toy = Toy()
    null = {"scale": torch.zeros(2)} if with_cfg else None
    s = sampler(toy, start=span[0], stop=span[1], null=null, cfg=3.0 if with_cfg else None)
    sets = [HeadSet.parse("L0H1"), HeadSet.parse("L0H0,L1H2")]
    images = s(strength_table(sets, 0.7, s.made_for()))
    for one, found in zip(sets, images, strict=True):
        torch.testing.assert_close(found, loop(toy, s, one, null and null["scale"]), atol=1e-5, rtol=1e-4)
    again = s(strength_table(sets[1:], 0.7, s.made_for()))  # the shared prefix is used again
    torch.testing.assert_close(again[0], images[1], atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_the_sampler_computes_once_what_candidates_share():
    toy = Toy()
    s = sampler(toy, start=0.5)
    table = strength_table([HeadSet.parse("L0H1")] * 3, 0.7, s.made_for())
    s(table)
    # two shared steps and the first guided plain pass: M rows; one degraded pass there, and two passes of the last step: R·M rows
    assert toy.calls == s.passes == 3 * 2 + 6 + 2 * 6


def test_a_sampler_of_nonsense_is_refused():
    toy = Toy()
    with pytest.raises(EditError, match="start=0.9"):
        sampler(toy, start=0.9, stop=0.1)
    with pytest.raises(EditError, match="cfg needs null"):
        sampler(toy, cfg=2.0)
    with pytest.raises(EditError, match="condition 'scale' has 3 rows"):
        FlowSampler(toy.vit, random(2, 3, 32, 32), conditions={"scale": torch.zeros(3)})
