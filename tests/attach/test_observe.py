"""observe: the numbers of dense attention weights, read while the model keeps its own attention and no N x N tensor exists."""

import pytest
import torch

import headwise
from headwise import Edit, Full, HeadPlan, HeadSet, SinkWindow
from headwise.attach import observe as observe_module
from headwise.errors import AttachError
from tiny_helper import STACKS, generate, inputs, logits, oracle, padded, starts, state, tiny, tokens

SOME = ("argmax", "entropy", "distance", "top_mass")
MASS = {"sinks": lambda pos: (pos >= 0) & (pos < 2), "even": lambda pos: pos % 2 == 0}
BATCHES = {"dense": {"input_ids": tokens(2, 13)}, "padded": padded([13, 7, 10])}


def dense(weights, start=None):
    """Every statistic (B, H, N) from attention weights (B, H, N, M), whose queries are the last N columns."""
    B, _, N, M = weights.shape
    weights = weights.double()
    first = torch.zeros(B, dtype=torch.long) if start is None else start
    position = torch.arange(M)[None] - first[:, None]
    k_pos, q_pos = position[:, None, None, :], position[:, None, M - N :, None]
    found = {
        "argmax": weights.argmax(-1) - first[:, None, None],
        "entropy": -torch.xlogy(weights, weights).sum(-1),
        "distance": (weights * (q_pos - k_pos)).sum(-1),
        "top_mass": weights.max(-1).values,
    }
    return found | {name: (weights * test(k_pos)).sum(-1) for name, test in MASS.items()}


def eager(name, batch):
    """Attention weights of the untouched eager model, a tensor a layer."""
    with torch.no_grad():
        return tiny(name, "eager")(**batch, output_attentions=True).attentions


def same(record, weights, batch, rows=slice(None)):
    padding = "attention_mask" in batch
    start = starts(batch) if padding else None
    real = batch["attention_mask"].bool()[:, rows] if padding else None
    for layer, w in enumerate(weights):
        for name, want in dense(w, start).items():
            got, want = record.table(name)[layer], want[:, :, rows]
            got, want = (x if real is None else x.movedim(1, 2)[real] for x in (got, want))
            torch.testing.assert_close(got.double(), want.double(), atol=1e-5, rtol=1e-5, msg=f"{name}, layer {layer}")


@pytest.mark.parametrize("batch", BATCHES.values(), ids=BATCHES)
@pytest.mark.parametrize("base", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3", "gpt2", "deepseek-v3", "bert"])
def test_rows_are_those_of_eager_attention(name, base, batch):
    if name == "bert":
        batch = {k: v for k, v in batch.items() if k != "position_ids"}
    model = tiny(name, base)
    with headwise.observe(model, *SOME, mass=MASS) as record:
        logits(model, batch)
    same(record, eager(name, batch), batch)
    assert state(model) == state(tiny(name, base))


@pytest.mark.parametrize(("name", "stack"), [s for s in STACKS if s[0] in ("vit", "clip")])
def test_rows_of_towers(name, stack):
    model, batch = tiny(name, "eager"), inputs(name)
    seen = {}

    def keep(layer):
        return lambda module, args, out: seen.update({layer: out[1]})

    found = headwise.find_stack(model, stack)
    handles = [m.register_forward_hook(keep(layer)) for layer, m in enumerate(found.modules)]
    logits(model, batch)
    for handle in handles:
        handle.remove()
    fused = tiny(name)
    with headwise.observe(fused, *SOME, mass=MASS, stack=stack) as record:
        logits(fused, batch)
    assert set(seen) == set(range(found.layers)) and all(w is not None for w in seen.values())
    same(record, [seen[layer] for layer in range(found.layers)], {})


def test_longer_than_a_sliding_window():
    batch = {"input_ids": tokens(1, 45)}
    model = tiny("gemma3")
    with headwise.observe(model, *SOME, mass=MASS) as record:
        logits(model, batch)
    same(record, eager("gemma3", batch), batch)


@pytest.mark.parametrize("batch", BATCHES.values(), ids=BATCHES)
@pytest.mark.parametrize("rows", ["last", [5, 6], [0], [-1], [-3, -1]], ids=str)
def test_chosen_rows(rows, batch):
    model = tiny()
    with headwise.observe(model, *SOME, mass=MASS, rows=rows) as record:
        logits(model, batch)
    start = starts(batch) if "attention_mask" in batch else torch.zeros(2, dtype=torch.long)
    for layer, weights in enumerate(eager("llama", batch)):
        for name, want in dense(weights, start).items():
            columns = [[12 if rows == "last" else r + (13 if r < 0 else int(s)) for r in _listed(rows)] for s in start]
            picked = torch.stack([w[:, c] for w, c in zip(want, columns, strict=True)])
            torch.testing.assert_close(record.table(name)[layer].double(), picked.double(), atol=1e-5, rtol=1e-5)


def _listed(rows):
    return [0] if rows == "last" else rows


def test_last_is_the_last_real_token_of_right_padded_rows():
    batch = {"input_ids": tokens(2, 9), "attention_mask": torch.tensor([[1] * 9, [1] * 5 + [0] * 4])}
    for name in ("llama", "bert"):
        model = tiny(name)
        with headwise.observe(model, "entropy", rows="last") as record:
            logits(model, batch)
        want = [dense(w)["entropy"] for w in eager(name, batch)]
        want = torch.stack([torch.stack([w[0, :, 8], w[1, :, 4]]) for w in want])
        torch.testing.assert_close(record.table("entropy")[..., 0].double(), want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3"])
@pytest.mark.parametrize("base", ["sdpa", "eager"])
def test_decoding_with_a_cache(name, base):
    """Rows of all passes in a row are the rows of the whole text, also behind a sliding cache that forgets."""
    batch, model = padded([44, 39]), tiny(name, base)
    cache = None
    with headwise.observe(model, *SOME, mass=MASS) as record, torch.no_grad():
        for begin, end in [(0, 40), (40, 41), (41, 42), (42, 44)]:
            out = model(
                batch["input_ids"][:, begin:end],
                attention_mask=batch["attention_mask"][:, :end],
                position_ids=batch["position_ids"][:, begin:end],
                past_key_values=cache,
                use_cache=True,
            )
            cache = out.past_key_values
    same(record, eager(name, batch), batch)


def test_the_model_generates_the_same_text_while_observed():
    model, batch = tiny(), padded([9, 5])
    plain = generate(model, batch, 6)
    with headwise.observe(model, "argmax", rows="last") as record:
        assert torch.equal(generate(model, batch, 6), plain)
    assert record.table("argmax").shape == (3, 2, 4, 6)


def test_the_backend_is_not_changed(monkeypatch):
    """The base function sees exactly the calls of a bare run: no eager attention, no weights asked for."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    calls, sdpa = [], ALL_ATTENTION_FUNCTIONS["sdpa"]

    def counted(module, q, k, v, mask, **options):
        calls.append((q.shape, k.shape, mask is None))
        return sdpa(module, q, k, v, mask, **options)

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "sdpa", counted)
    model, batch = tiny(), {"input_ids": tokens(1, 9)}
    bare = logits(model, batch)
    plain, calls[:] = list(calls), []
    with headwise.observe(model, *SOME, mass=MASS):
        assert torch.equal(logits(model, batch), bare)
    assert calls == plain and len(calls) == 3


def test_small_blocks_give_the_same_numbers_and_bound_the_logits(monkeypatch):
    model, batch = tiny(), padded([40, 33])
    with headwise.observe(model, *SOME, mass=MASS) as record:
        logits(model, batch)
    largest, group_block = [], observe_module._probability_statistics
    monkeypatch.setattr(
        observe_module,
        "_probability_statistics",
        lambda block, *rest: largest.append(block.numel()) or group_block(block, *rest),
    )
    monkeypatch.setattr(observe_module, "BLOCK", 1500)
    with headwise.observe(model, *SOME, mass=MASS) as again:
        logits(model, batch)
    assert max(largest) <= 1500 < 2 * 4 * 40 * 40
    for name in (*SOME, *MASS):
        torch.testing.assert_close(again.table(name), record.table(name), atol=1e-6, rtol=1e-6)


# under a plan

PLAN = HeadPlan(patterns=((Full(), SinkWindow(2, 4)), (SinkWindow(2, 4), Full()), (SinkWindow(0, 6), SinkWindow(1, 3))))


@pytest.mark.parametrize("batch", BATCHES.values(), ids=BATCHES)
def test_under_a_plan(batch):
    model, seen = tiny(), {}
    with oracle(model, patterns=PLAN.patterns, start=starts(batch) if "attention_mask" in batch else None, seen=seen):
        logits(model, batch)
    with headwise.attach(model, plan=PLAN), headwise.observe(model, *SOME, mass=MASS) as record:
        logits(model, batch)
    same(record, [seen[layer][0] for layer in range(3)], batch)


def test_under_a_plan_while_decoding():
    batch = padded([13, 9])
    model, seen = tiny(), {}
    with oracle(model, patterns=PLAN.patterns, start=starts(batch), seen=seen):
        logits(model, batch)
    cache = None
    with headwise.attach(model, plan=PLAN), headwise.observe(model, *SOME, mass=MASS) as record, torch.no_grad():
        for begin, end in [(0, 8), (8, 9), (9, 10), (10, 13)]:
            out = model(
                batch["input_ids"][:, begin:end],
                attention_mask=batch["attention_mask"][:, :end],
                position_ids=batch["position_ids"][:, begin:end],
                past_key_values=cache,
                use_cache=True,
            )
            cache = out.past_key_values
    same(record, [seen[layer][0] for layer in range(3)], batch)


@pytest.mark.parametrize("compensation", ["count", "one"])
def test_a_compensation_token_takes_its_share_of_the_softmax(compensation):
    """The mass on all keys and on the compensation token is 1, so the mass on keys alone is below 1 and falls with its count."""
    plan = HeadPlan.uniform(SinkWindow(1, 4, compensation=compensation), 3, 2, prefill="dense")
    model, ids = tiny(), tokens(1, 21)
    every = {"all": lambda pos: pos >= 0}
    with headwise.attach(model, plan=plan), torch.no_grad():
        cache = model(ids[:, :20]).past_key_values
        groups = [layer.stores[0] for layer in cache.layers]
        with headwise.observe(model, "entropy", "top_mass", mass=every) as record:
            model(ids[:, 20:], past_key_values=cache)
    mass = record.table("all")
    assert bool((mass < 1).all()) and bool((mass > 0).all())
    assert all(int(store.folded[2][0]) == 21 - 5 for store in groups)
    rest = 1 - mass.double()
    assert bool((record.table("entropy").double() >= -torch.xlogy(rest, rest) - 1e-6).all())


# outputs and norms


def test_outputs_are_what_the_projection_gets():
    model, batch, got = tiny(), {"input_ids": tokens(2, 9)}, {}
    for layer, block in enumerate(model.model.layers):
        block.self_attn.o_proj.register_forward_pre_hook(lambda m, args, layer=layer: got.update({layer: args[0]}))
    edit = Edit.scale(HeadSet.parse("L1H2"), 3.0)
    with headwise.attach(model, edits=edit), headwise.observe(model, "output", "norm") as record:
        logits(model, batch)
    for layer in range(3):
        want = got[layer].view(2, 9, 4, 16)
        assert torch.equal(record.output(layer), want)
        torch.testing.assert_close(record.norm_mean[layer], want.norm(dim=-1).mean((0, 1)))


@pytest.mark.parametrize("name", ["llama", "bert"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_norms_leave_padding_out(name, side):
    model, batch = tiny(name), padded([9, 5])
    batch.pop("position_ids")
    if side == "right":
        batch = {k: torch.stack([v[0], v[1].roll(-4)]) for k, v in batch.items()}
    real = batch["attention_mask"].bool()
    with headwise.observe(model, "output", "norm") as record:
        logits(model, batch)
    for layer in range(3):
        norms = record.output(layer).norm(dim=-1)  # (B, N, H)
        torch.testing.assert_close(record.norm_mean[layer], norms[real].mean(0))
        assert not torch.allclose(record.norm_mean[layer], norms.mean((0, 1)), atol=1e-4)


def test_norms_add_up_over_passes_and_clear_forgets():
    model, a, b = tiny(), {"input_ids": tokens(1, 9)}, {"input_ids": tokens(1, 5, seed=1)}
    with headwise.observe(model, "output", "norm", "entropy") as record:
        logits(model, a)
        logits(model, b)
        both = torch.cat([record.output(1), torch.empty(1, 0, 4, 16)], dim=1)
        torch.testing.assert_close(record.norm_mean[1], both.norm(dim=-1).mean((0, 1)))
        assert record.table("entropy").shape[-1] == 14
        record.clear()
        logits(model, b)
    assert record.table("entropy").shape[-1] == 5 and record.output(0).shape[1] == 5


def test_nothing_of_the_graph_is_kept():
    model = tiny()
    with headwise.observe(model, "output", "norm", *SOME) as record:
        model(tokens(1, 5), labels=tokens(1, 5)).loss.backward()
    assert not record.output(0).requires_grad and not record.table("entropy").requires_grad


def test_bfloat16():
    model, batch = tiny(dtype=torch.bfloat16), {"input_ids": tokens(1, 13)}
    with headwise.observe(model, *SOME) as record:
        logits(model, batch)
    weights = eager("llama", batch)
    assert record.table("entropy").dtype == torch.float32
    for layer, w in enumerate(weights):
        assert (record.table("entropy")[layer] - dense(w)["entropy"]).abs().max() < 0.15


# refusals


def test_bad_input():
    model = tiny()
    with pytest.raises(AttachError, match=r"'median'.*argmax"):
        headwise.observe(model, "median")
    with pytest.raises(AttachError, match="choose from"):
        headwise.observe(model)
    with pytest.raises(AttachError, match="rows='first'"):
        headwise.observe(model, "argmax", rows="first")
    with pytest.raises(AttachError, match="do not mix"):
        headwise.observe(model, "argmax", rows=[-1, 2])
    with headwise.observe(model, "argmax") as record, pytest.raises(AttachError, match="no forward pass ran"):
        record.table("argmax")
    with pytest.raises(AttachError, match="no norms"):
        _ = record.norm_mean
    with pytest.raises(AttachError, match="no output of layer 1"):
        record.output(1)


def test_rows_that_some_rows_of_the_batch_lack():
    model, batch = tiny(), padded([13, 7])
    with headwise.observe(model, "argmax", rows=[9]), pytest.raises(AttachError, match="one by one"):
        logits(model, batch)
    assert state(model) == state(tiny())
