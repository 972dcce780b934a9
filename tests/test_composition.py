"""Any two systems in one run: it computes the composition of their references, or is refused with a reason.

All on one tiny mixture-of-experts model with grouped queries: a left-padded batch is prefilled and then decoded with a cache. VHR and
VAR of pictures meet on a tiny vision-language model.
"""

import contextlib
import itertools
import re

import pytest
import torch

from composition_helper import Reference
from headwise.attach import attach, fingerprint
from headwise.budget import duo, longheads, razor, snapkv
from headwise.budget._longheads import Shape
from headwise.edits import Edit, HeadEdits, KeyGroup
from headwise.errors import AttachError, HeadwiseError
from headwise.expert_edits import ExpertEdit, ExpertEdits
from headwise.patterns import Elastic
from headwise.plan import HeadPlan
from headwise.route import moh
from headwise.steer import softpag, var
from headwise.steer.vhr import VHR
from headwise.units import HeadScores, HeadSet
from selected_helper import kept_positions
from tiny_helper import logits, padded, starts, state, tiny, tokens
from vlm_helper import llava, prompt

L, H, K, D, PROMPT, NEW = 3, 4, 2, 16, (13, 9), 4
HEADS = HeadSet.parse("L0H1,L1H2:0.5,L2H3")


def scores(seed=0):
    return HeadScores(values=torch.rand(L, K, generator=torch.Generator().manual_seed(seed)), kind="kv", method="toy")


def vectors(count):
    return torch.randn(count, D, generator=torch.Generator().manual_seed(1))


# what each system attaches, and what its reference says


def a_plan(make):
    def system(model):
        plan = make(model)
        return {"plan": plan}, {"plan": plan}

    return system


def an_edit(make):
    def system(model):
        edit = make(model)
        return {"edits": edit}, {"edits": list(edit) if isinstance(edit, HeadEdits) else [edit]}

    return system


def moh_norm(model):
    router = moh(model, None, active=0.75, router="norm")
    routes = {layer: (route.shared, route.routed) for layer, route in enumerate(router.config.layers)}
    return {"router": router}, {"routes": routes}


def moh_static(model):
    importance = HeadScores(values=torch.arange(L * H).view(L, H).float(), method="toy")
    router = moh(model, None, active=0.5, router="static", importance=importance)
    return {"router": router}, {
        "routes": {layer: (route.shared, 0) for layer, route in enumerate(router.config.layers)}
    }


def mote(model):
    off = ExpertEdits((ExpertEdit(units=HeadSet.parse("L0E1,L2E3"), op="off"),))
    return {"edits": off}, {"off": [(0, 1), (2, 3)]}


def long_heads(model):
    far = longheads(model, chunk=4, window=16)
    return {"transforms": [far]}, {"far": (far, lambda scale: Shape(4, 4, scale, far.rotation))}


SYSTEMS = {
    "duo": a_plan(lambda model: duo(scores(), sparsity=0.5, sinks=1, window=4)),
    "moa": a_plan(lambda model: HeadPlan.uniform(Elastic(1, 0, 0.5, minimum=2), L, K)),
    "razor": a_plan(lambda model: razor(scores(), induction_share=0.34, s0=4, c=5, sinks=1)),
    "snapkv": a_plan(lambda model: snapkv(model, budget="6tok", window=2, kernel=3)),
    "ablation": an_edit(lambda model: Edit.zero(HeadSet.parse("L0H2,L1H0"))),
    "uniform": an_edit(lambda model: Edit.uniform(HeadSet.parse("L0H2,L1H1"))),
    "softpag": an_edit(lambda model: softpag(model, None, heads=HEADS, u=0.7)),
    "soft injection": an_edit(lambda model: Edit.mix_vector(HEADS, 0.6, vectors(3), tokens="last", phase="prefill")),
    "function vector": an_edit(lambda model: Edit.replace(HeadSet.parse("L1H3"), vectors(1), phase="decode")),
    "vhr": an_edit(lambda model: Edit.scale(HeadSet.parse("L0H1,L2H0"), 2.0)),
    "var": an_edit(lambda model: Edit.move(HeadSet.parse("L0H1,L1H2"), 0.6, KeyGroup("sinks", "0:1"))),
    "moh": moh_norm,
    "moh static": moh_static,
    "mote": mote,
    "longheads": long_heads,
}
ONCE = {"duo": "plan", "moa": "plan", "razor": "plan", "snapkv": "plan", "moh": "router", "moh static": "router"}
PLANS = tuple(name for name, what in ONCE.items() if what == "plan")


def refusal(a, b):
    """Why two systems cannot run together; None where they can."""
    pair = {a, b}
    if a in ONCE and b in ONCE and ONCE[a] == ONCE[b]:
        return f"already has a {ONCE[a]} attached|another {ONCE[a]} is attached"
    if "longheads" in pair and pair & set(PLANS):
        return "plain DynamicCache|selects from all keys|cannot be used under a KV plan"
    if pair == {"razor", "var"}:
        return "compensation tokens"
    if pair == {"longheads", "var"}:
        return "a transform has put something"
    return None


PAIRS = list(itertools.combinations(SYSTEMS, 2))


@contextlib.contextmanager
def together(model, parts):
    with contextlib.ExitStack() as stack:
        for part in parts:
            stack.enter_context(attach(model, **part))
        yield


def systems(model, names):
    """(what to attach, the reference) of these systems."""
    parts, says = zip(*(SYSTEMS[name](model) for name in names), strict=True)
    joined = {"edits": [edit for said in says for edit in said.get("edits", [])]}
    for said in says:
        joined |= {name: value for name, value in said.items() if name != "edits"}
    return parts, Reference(**joined)


@torch.no_grad()
def prefill_and_decode(model, batch, after=None):
    """Logits of every real token of the prompt and of each new one, read with a cache; `after(cache)` is called between."""
    out = model(**batch, use_cache=True)
    parts, mask, position = [out.logits], batch["attention_mask"], batch["position_ids"][:, -1:]
    if after is not None:
        after(out.past_key_values)
    for token in tokens(len(mask), NEW, seed=9).split(1, 1):
        mask, position = torch.cat([mask, torch.ones_like(token)], 1), position + 1
        out = model(
            token, attention_mask=mask, position_ids=position, past_key_values=out.past_key_values, use_cache=True
        )
        parts.append(out.logits)
    together_ = torch.cat(parts, 1)
    real = torch.cat([batch["attention_mask"].bool(), torch.ones(len(mask), NEW, dtype=torch.bool)], 1)
    return together_[real]


def note_kept(reference):
    """Which tokens a plan that chooses by content kept of the prompt: read from the cache, as the choice has tests of its own."""

    def note(cache):
        if reference.plan is not None and any(p.selects for row in reference.plan.patterns for p in row):
            for layer, stored in enumerate(cache.layers):
                (store,) = stored.stores
                reference.kept[layer] = [
                    [torch.tensor(sorted(held)) for held in kept_positions(store, row)] for row in range(len(PROMPT))
                ]

    return note


@pytest.fixture(scope="module")
def model():
    return tiny("mixtral")


@pytest.mark.parametrize(
    "names", [pair for pair in PAIRS if not refusal(*pair) and "longheads" not in pair], ids="+".join
)
def test_two_systems_are_the_composition_of_their_references(model, names):
    batch = padded(PROMPT)
    parts, reference = systems(model, names)
    reference.start, reference.prompt = starts(batch), torch.tensor(PROMPT)
    before, plain = state(model), prefill_and_decode(model, batch)
    with together(model, parts):
        found = prefill_and_decode(model, batch, note_kept(reference))
    with reference.on(model):
        wanted = prefill_and_decode(model, batch)
    torch.testing.assert_close(found, wanted, atol=2e-4, rtol=1e-3)
    assert not torch.allclose(found, plain, atol=1e-3)
    assert state(model) == before
    commute = (
        not all("edits" in part for part in parts) or "mote" in names
    )  # edits of one head are applied in their order
    if commute:
        with together(model, systems(model, names)[0][::-1]):
            assert torch.equal(prefill_and_decode(model, batch), found)


@pytest.mark.parametrize("names", [pair for pair in PAIRS if not refusal(*pair) and "longheads" in pair], ids="+".join)
def test_far_reading_with_another_system(model, names):
    ids = tokens(1, 31)
    parts, reference = systems(model, names)
    reference.start, reference.prompt = torch.zeros(1, dtype=torch.long), torch.tensor([31])
    with torch.no_grad():
        with together(model, parts):
            found = model(ids, use_cache=False).logits
        with reference.on(model):
            wanted = model(ids, use_cache=False).logits
    torch.testing.assert_close(found, wanted, atol=5e-4, rtol=1e-3)


@pytest.mark.parametrize("order", [1, -1], ids=["forwards", "backwards"])
@pytest.mark.parametrize("names", [pair for pair in PAIRS if refusal(*pair)], ids="+".join)
def test_what_cannot_run_together_says_why_and_leaves_the_model_as_it_was(model, names, order):
    batch, before = padded((40, 31)), state(model)  # long enough for far reading
    plain = prefill_and_decode(model, batch)
    with pytest.raises(HeadwiseError) as refused, together(model, systems(model, names)[0][::order]):
        prefill_and_decode(model, batch)
    assert re.search(refusal(*names), str(refused.value))
    assert state(model) == before
    assert torch.equal(prefill_and_decode(model, batch), plain)


def test_three_of_them_generate(model):
    """MoH heads under a DuoAttention cache with an expert switched off, through plain generate."""
    batch = {name: value for name, value in padded(PROMPT).items() if name != "position_ids"}
    parts, reference = systems(model, ("duo", "moh", "mote"))
    reference.start, reference.prompt = starts(batch), torch.tensor(PROMPT)
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    with together(model, parts):
        found = model.generate(**batch, **options)
    with reference.on(model):
        wanted = model.generate(**batch, **options)
    assert torch.equal(found, wanted)


def test_artifacts_of_other_models_are_refused_in_company_too(model):
    other = tiny("llama")
    plan = HeadPlan.full(L, K, fingerprint=fingerprint(other))
    with attach(model, edits=Edit.zero(HeadSet.parse("L0H0"))), pytest.raises(HeadwiseError, match="was made for"):
        attach(model, plan=plan)
    with pytest.raises(AttachError, match="stand alone|attached on their own"):
        attach(model, plan=HeadPlan.full(L, K), edits=mote(model)[0]["edits"])


@pytest.mark.parametrize("order", [1, -1], ids=["VAR first", "VHR first"])
def test_vhr_scales_what_var_has_redistributed(order):
    """alpha · A' V, where VAR made A' of A: VAR works on the attention of the layer, so it is the inner one whatever the order."""
    model, inputs = llava(), prompt([9, "img", 5, 6, 7])
    rules = [
        var(model, None, dims="5", tau=1.0, minimum_mass=0.0, rho=0.0, layers="1:4"),
        VHR(layers=(1, 3), alpha=2.0),
    ]
    with contextlib.ExitStack() as stack:
        running = [stack.enter_context(rule.attach(model)) for rule in rules[::order]][::order]
        found = logits(model, inputs)
    changed, heads = running[0].selected, running[1].factors
    assert sum(changed.values()) > 0
    assert any((factors != 1).any() for factors in heads.values())
    with torch.no_grad():  # scaling a head is scaling its columns of the output projection
        for layer, factors in heads.items():
            model.model.language_model.layers[layer].self_attn.o_proj.weight.mul_(factors[0].repeat_interleave(16))
    with rules[0].attach(model):
        torch.testing.assert_close(logits(model, inputs), found, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("order", [1, -1], ids=["inner", "outer"])
def test_a_transform_of_outputs_acts_on_what_far_reading_gives(model, order):
    """A transform that doubles head outputs, attached before or after LongHeads, is the edit that scales them by 2."""
    ids, far = tokens(1, 31), longheads(model, chunk=4, window=16)
    heads = HeadSet.of([(layer, head) for layer in range(L) for head in range(H)])
    with torch.no_grad(), attach(model, transforms=[far], edits=Edit.scale(heads, 2.0)):
        wanted = model(ids, use_cache=False).logits
    with (
        torch.no_grad(),
        together(model, [{"transforms": [t]} for t in (far, lambda call, attend: 2 * attend())[::order]]),
    ):
        torch.testing.assert_close(model(ids, use_cache=False).logits, wanted)


def test_two_that_make_the_attention_anew_are_refused(model):
    far, before = longheads(model, chunk=4, window=16), state(model)
    with attach(model, transforms=[far]), pytest.raises(AttachError, match="make this layer's attention anew"):
        attach(model, transforms=[longheads(model, chunk=2, window=8)])
    assert state(model) == before
