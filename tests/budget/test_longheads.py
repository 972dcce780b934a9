"""LongHeads on models: every layer against the text; caches, padding, generation, and what cannot be remapped."""

import pytest
import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, StaticCache

from headwise.attach import attach
from headwise.budget import longheads
from headwise.budget._longheads import Shape
from headwise.budget._longheads_reference import attend as reference
from headwise.budget._longheads_state import ChunkLayer
from headwise.budget.longheads import LongHeads
from headwise.cli import main
from headwise.errors import ArtifactError, AttachError, CacheError, PlanError, WrongModelError
from headwise.plan import HeadPlan, SinkWindow
from tiny_helper import generate, logits, padded, random, state, tiny, tokens

W, K = 8, 5  # tokens of a chunk, chunks a query


def run(model, batch, far, **options):
    with torch.no_grad(), attach(model, transforms=[far]):
        return model(**batch, **options)


def test_short_texts_are_dense_bit_for_bit():
    model, batch = tiny(), {"input_ids": tokens(2, 40)}
    far = longheads(model, chunk=W, window=W * K)
    assert torch.equal(run(model, batch, far).logits, logits(model, batch))
    later = longheads(model, chunk=W, window=W * K, start=64)
    batch = {"input_ids": tokens(2, 64)}
    assert torch.equal(run(model, batch, later).logits, logits(model, batch))


def test_as_many_chunks_as_there_are_is_dense_attention():
    model, batch = tiny(), {"input_ids": tokens(2, 6 * W)}
    far = longheads(model, chunk=W, window=6 * W, start=1)
    assert torch.allclose(run(model, batch, far).logits, logits(model, batch), atol=1e-4)


@pytest.mark.parametrize(
    ("name", "select_by", "start"),
    [("llama", "group", None), ("llama", "head", 64), ("qwen3", "group", None), ("mixtral", "head", None)],
)
def test_every_layer_of_a_model_is_the_text(name, select_by, start):
    model, seen = tiny(name), []
    far = longheads(model, chunk=W, window=W * K, start=start, select_by=select_by)

    def check(call, out):
        at = -torch.arange(call.q.shape[2])
        q, k = (far.rotation.turn(x, at) for x in (call.q, call.k))
        how = Shape(W, K, call.scale, far.rotation)
        wanted, _ = reference(q, k, call.v, how, start=start or 0, by_head=select_by == "head")
        assert torch.allclose(out.transpose(1, 2).double(), wanted, atol=1e-4)
        seen.append(call.layer)

    with torch.no_grad(), attach(model, transforms=[far], observers=[check]):
        model(tokens(1, 75))
    assert seen == list(range(3))


def test_it_is_not_dense_attention_and_never_looks_ahead():
    model, ids = tiny(), tokens(1, 120)
    far = longheads(model, chunk=W, window=W * K)
    out = run(model, {"input_ids": ids}, far).logits
    dense = logits(model, {"input_ids": ids})
    assert torch.allclose(out[:, : W * K], dense[:, : W * K], atol=1e-5)
    assert not torch.allclose(out[:, W * K :], dense[:, W * K :], atol=1e-2)
    changed = ids.clone()
    changed[0, 90] = (changed[0, 90] + 1) % 256
    other = run(model, {"input_ids": changed}, far).logits
    assert torch.allclose(other[:, :90], out[:, :90], atol=1e-5)
    assert not torch.allclose(other[:, 90:], out[:, 90:], atol=1e-3)


@pytest.mark.parametrize("sizes", [[30] + [1] * 40, [50, 40], [41, 1, 1, 47], [7] * 12 + [6]])
def test_a_cache_changes_nothing(sizes):
    model, ids = tiny(), tokens(2, sum(sizes))
    far = longheads(model, chunk=W, window=W * K)
    whole = run(model, {"input_ids": ids}, far, use_cache=False).logits
    cache, at, parts = DynamicCache(config=model.config), 0, []
    for size in sizes:
        parts.append(run(model, {"input_ids": ids[:, at : at + size]}, far, past_key_values=cache).logits)
        at += size
    assert torch.allclose(torch.cat(parts, 1), whole, atol=2e-4)
    layer = cache.layers[0]
    assert isinstance(layer, ChunkLayer) and layer.chunks.keys.shape == (2, 2, sum(sizes) // W, 16)
    assert layer.chunks.keys.untyped_storage().nbytes() == 4 * layer.chunks.keys.numel()
    assert layer.nbytes == 2 * int(far.bytes(sum(sizes), head_dim=16, dtype=torch.float32)[0])


@pytest.mark.parametrize("step", [None, 3])
def test_left_padding_changes_nothing(step):
    lengths = [90, 61, 35, 83]
    model, batch = tiny(), padded(lengths)
    far = longheads(model, chunk=W, window=W * K)
    width, cache, parts = max(lengths), DynamicCache(config=model.config), []
    for at in range(0, width, step or width):
        end = min(at + (step or width), width)
        piece = {"input_ids": batch["input_ids"][:, at:end], "position_ids": batch["position_ids"][:, at:end]}
        piece["attention_mask"] = batch["attention_mask"][:, :end]
        parts.append(run(model, piece, far, past_key_values=cache).logits)
    got = torch.cat(parts, 1)
    for row, length in enumerate(lengths):
        alone = run(model, {"input_ids": batch["input_ids"][row : row + 1, width - length :]}, far).logits
        assert torch.allclose(got[row : row + 1, width - length :], alone, atol=5e-4)


def test_right_padding_changes_nothing():
    model, far_of = tiny(), lambda m: longheads(m, chunk=W, window=W * K)
    ids, mask = tokens(2, 90), torch.ones(2, 90, dtype=torch.long)
    mask[1, 70:] = 0
    got = run(model, {"input_ids": ids, "attention_mask": mask}, far_of(model)).logits
    alone = run(model, {"input_ids": ids[1:, :70]}, far_of(model)).logits
    assert torch.isfinite(got).all() and torch.allclose(got[1:, :70], alone, atol=5e-4)


def test_positions_that_the_model_counts_from_padding_on():
    """A plain forward numbers columns, padding included: rotations differ by the start, the result must not."""
    model, batch = tiny(), padded([90, 61])
    far = longheads(model, chunk=W, window=W * K)
    by_token = run(model, batch, far).logits
    del batch["position_ids"]
    by_column = run(model, batch, far).logits
    assert torch.allclose(by_token[1, 29:], by_column[1, 29:], atol=1e-3)


@pytest.mark.parametrize("options", [{}, {"num_beams": 2, "num_return_sequences": 2}])
def test_generate_with_and_without_a_cache(options):
    model, batch = tiny(), padded([60, 44])
    far = longheads(model, chunk=W, window=W * K)
    with attach(model, transforms=[far]):
        kept = generate(model, batch, new=10, **options)
        again = generate(model, batch, new=10, use_cache=False, **options)
    assert torch.equal(kept, again)
    assert not torch.equal(kept, generate(model, batch, new=10, **options))


def test_assisted_decoding_takes_back_drafts():
    model, draft = tiny(), tiny(dtype=torch.float32)
    with torch.no_grad():
        for p in draft.parameters():
            p.add_(0.02 * random(*p.shape))
    batch = {"input_ids": tokens(1, 60), "attention_mask": torch.ones(1, 60, dtype=torch.long)}
    with attach(model, transforms=[longheads(model, chunk=W, window=W * K)]):
        plain = generate(model, batch, new=12)
        assisted = generate(model, batch, new=12, assistant_model=draft)
    assert torch.equal(plain, assisted)


def test_crop_takes_back_one_chunk_and_refuses_more():
    model, ids = tiny(), tokens(1, 90)
    far, cache = longheads(model, chunk=W, window=W * K), DynamicCache(config=tiny().config)
    run(model, {"input_ids": ids}, far, past_key_values=cache)
    cache.crop(-W)
    assert cache.get_seq_length() == 90 - W and cache.layers[0].chunks.keys.shape[2] == (90 - W) // W
    again = run(model, {"input_ids": ids[:, 90 - W :]}, far, past_key_values=cache).logits
    assert torch.allclose(again, run(model, {"input_ids": ids}, far).logits[:, 90 - W :], atol=2e-4)
    with pytest.raises(CacheError, match="one chunk, 8 columns"):
        cache.crop(-30)


def test_the_published_slip_can_be_had():
    model, batch = tiny(), {"input_ids": tokens(1, 90)}
    right, slip = (longheads(model, chunk=W, window=W * K, reference_compat=c) for c in (False, True))
    a, b = run(model, batch, right).logits, run(model, batch, slip).logits
    assert torch.allclose(a[:, : W * K], b[:, : W * K], atol=1e-5) and not torch.allclose(a[:, W * K :], b[:, W * K :])


def test_bfloat16_is_near_float32():
    model, batch = tiny(), {"input_ids": tokens(1, 90)}
    far = longheads(model, chunk=W, window=W * K, start=60)
    with torch.no_grad(), attach(model.bfloat16(), transforms=[far]):
        low = model(**batch).logits.float()
    assert torch.isfinite(low).all()
    assert float((low[:, 60:] - run(tiny(), batch, far).logits[:, 60:]).abs().mean()) < 0.2


@pytest.mark.parametrize("scaling", [{"rope_type": "linear", "factor": 4.0}, {"rope_type": "yarn", "factor": 4.0}])
def test_position_interpolation_below(scaling):
    options = {"rope_theta": 10000.0, "original_max_position_embeddings": 64, **scaling}
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        rope_parameters=options,
    )
    model, ids = LlamaForCausalLM(config).eval(), tokens(1, 6 * W) % 64
    far = longheads(model, chunk=W, window=6 * W, start=1)
    assert torch.allclose(run(model, {"input_ids": ids}, far).logits, model(ids).logits, atol=1e-4)


def test_gradients_are_those_of_the_function():
    model, ids = tiny().double(), tokens(1, 70)
    far = longheads(model, chunk=W, window=W * K)
    weight = model.model.layers[1].self_attn.k_proj.weight
    with attach(model, transforms=[far]):
        model(ids, labels=ids).loss.backward()
        losses = []
        for step in (1e-2, -2e-2):
            with torch.no_grad():
                weight[3, 5] += step
                losses.append(float(model(ids, labels=ids).loss))
    assert float(weight.grad[3, 5]) == pytest.approx((losses[0] - losses[1]) / 2e-2, rel=3e-2)


def test_the_model_is_left_as_it_was():
    model = tiny()
    before = state(model)
    run(model, {"input_ids": tokens(1, 90)}, longheads(model, chunk=W, window=W * K))
    assert state(model) == before


# bad input


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"chunk": 8, "window": 42}, "window is 42 and chunk 8"),
        ({"chunk": 8, "window": 24}, "four chunks or more"),
        ({"chunk": 1}, "chunk is 1"),
        ({"chunk": 8, "window": 64, "start": 0}, "start is 0"),
        ({"chunk": 8, "window": 64, "select_by": "layer"}, "select_by is 'layer'"),
    ],
)
def test_options_that_make_no_sense(options, text):
    with pytest.raises(PlanError, match=text):
        longheads(tiny(), **options)


def test_a_window_beyond_the_trained_length_is_warned_of():
    with pytest.warns(UserWarning, match="trained for 4096 positions"):
        longheads(tiny(), chunk=8, window=8192)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("gpt2", "no rotary embedding"),
        ("mistral", "sliding windows"),
        ("gemma3", "sliding windows"),
        ("bert", "bidirectional"),
    ],
)
def test_models_that_cannot_be_remapped(name, text):
    with pytest.raises(AttachError, match=text):
        longheads(tiny(name), chunk=8, window=64)


def test_frequencies_that_depend_on_the_length_are_refused():
    options = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        rope_parameters=options,
    )
    with pytest.raises(AttachError, match="depend on the length"):
        longheads(LlamaForCausalLM(config), chunk=8, window=64)


def test_where_it_cannot_be_applied_it_raises():
    model, ids = tiny(), tokens(1, 90)
    far = longheads(model, chunk=W, window=W * K)
    with pytest.raises(AttachError, match="made for a model of"):
        run(tiny("gpt2"), {"input_ids": ids}, far)
    cache = DynamicCache(config=model.config)
    model(ids[:, :20], past_key_values=cache)
    with pytest.raises(CacheError, match="fill a new cache"):
        run(model, {"input_ids": ids[:, 20:]}, far, past_key_values=cache)
    with pytest.raises(AttachError, match="plain DynamicCache"):
        run(model, {"input_ids": ids}, far, past_key_values=StaticCache(config=model.config, max_cache_len=100))
    with attach(model, plan=HeadPlan.uniform(SinkWindow(2, 8), 3, 2)), pytest.raises(AttachError, match="KV plan"):
        run(model, {"input_ids": ids}, far)


def test_masks_that_hide_tokens_are_refused():
    model, ids = tiny(), tokens(1, 90)
    far, mask = longheads(model, chunk=W, window=W * K), torch.ones(1, 90, dtype=torch.long)
    mask[0, 30] = 0
    with pytest.raises(AttachError, match="padding between"):
        run(model, {"input_ids": ids, "attention_mask": mask}, far)
    packed = torch.zeros(1, 1, 90, 90).masked_fill(torch.ones(90, 90, dtype=torch.bool).triu(1), -torch.inf)
    packed[..., 45:, :45] = -torch.inf
    with pytest.raises(AttachError, match="hides tokens"):
        run(model, {"input_ids": ids, "attention_mask": packed}, far)


@pytest.mark.gpu
def test_on_cuda():
    model, batch = tiny(), padded([90, 61])
    far = longheads(model, chunk=W, window=W * K)
    wanted = run(model, batch, far).logits
    got = run(model.cuda(), {name: x.cuda() for name, x in batch.items()}, far).logits.cpu()
    assert torch.allclose(got[0], wanted[0], atol=1e-2) and torch.allclose(got[1, 29:], wanted[1, 29:], atol=1e-2)


def test_it_survives_the_disk_and_refuses_another_model(tmp_path):
    model, file = tiny(), tmp_path / "far.json"
    far = longheads(model, chunk=W, window=W * K, select_by="head")
    far.save(file)
    assert LongHeads.load(file, model) == far and far.ratio(1000) == 1.0
    with pytest.raises(WrongModelError):
        LongHeads.load(file, tiny("qwen3"))
    HeadPlan.full(3, 2).save(file)
    with pytest.raises(ArtifactError, match="head-plan"):
        LongHeads.load(file, model)


def test_the_command_line_plans_and_attaches_it(tmp_path, capsys):
    file = str(tmp_path / "far.json")
    for arguments in (
        ["plan", "longheads", "-m", "tiny-random-llama", "--chunk", "8", "--window", "40", "-o", file],
        ["generate", "-m", "tiny-random-llama", "--plan", file, "-p", "x" * 60, "-n", "4"],
    ):
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        assert not ended.value.code
    assert "100%, " in capsys.readouterr().out
