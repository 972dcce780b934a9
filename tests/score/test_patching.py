"""The patching engine against its definition, one head and whole passes at a time."""

import pytest
import torch
import transformers
from tests.handwired import INDUCTION, MOVER, PREVIOUS, handwired_induction, handwired_name_mover

import headwise.score as S
from headwise.errors import AttachError, ScoreError, TaskError, UnitError, WrongModelError
from headwise.hub import load_model
from headwise.score._patching import answer, column_mask, record, shares
from headwise.score._patching_reference import patch_one, path_one
from headwise.score._paths import Paths
from headwise.score._sweep import Sweep
from headwise.score.activation_patching import activation_patching
from headwise.score.attribution_patching import attribution_patching
from headwise.score.logit_attribution import attribute
from headwise.tasks.pairs import PromptPairs, make_induction
from headwise.units import HeadSet

DECODERS = ("llama", "qwen3", "mistral", "gemma3", "gpt2", "mixtral", "qwen3-moe", "deepseek-v3")


@pytest.fixture(params=DECODERS)
def model(request):
    return load_model(f"tiny-random-{request.param}")[0]


def pairs(count=3, side="left"):
    made = make_induction(200, count=count, length=6, seed=3)
    rows = [made.ids[i][made.mask[i]].tolist() for i in range(count)]
    twins = [made.corrupt[i][made.mask[i]].tolist() for i in range(count)]
    return PromptPairs.of(rows, twins, made.answers.tolist(), made.contrasts.tolist(), side=side)


def close(a, b, tolerance=1e-5):
    scale = max(1.0, float(b.abs().max()))
    assert float((a - b).abs().max()) < tolerance * scale, (a, b)


@pytest.mark.parametrize("tokens", ["all", "2:5"])
def test_a_sweep_is_one_forward_per_head(model, tokens):
    p = pairs()
    where = column_mask(p, tokens)
    sweep = Sweep(model, p, where, rows=7)
    other = record(model, p, p.corrupt)
    fast = sweep.all_units(other.z.__getitem__)
    for unit in ("L0H0", "L1H3", "L2H2"):
        layer, head = HeadSet.parse(unit).pairs()[0]
        close(fast[layer, head], patch_one(model, p, sweep.base, other.z, unit, where))


@pytest.mark.parametrize(
    ("receivers", "through", "tokens", "freeze"),
    [
        (None, "q", "last", False), (None, "q", "all", True), ("L2H1", "q", "last", True), ("L2H3", "k", "all", False),
        ("L1H2,L2H0,L2H1", "v", "all", False), ("L2H0", "qkv", "all", True),
    ],
)  # fmt: skip
def test_paths_are_two_whole_passes(model, receivers, through, freeze, tokens):
    p = pairs(2)
    where = column_mask(p, tokens)
    paths = Paths(model, p, where, freeze_mlps=freeze, rows=5)
    heads = HeadSet.parse(receivers) if receivers else None
    for unit in ("L0H1", "L1H2"):
        layer, head = HeadSet.parse(unit).pairs()[0]
        fast = paths.to_logits(layer, range(4)) if heads is None else paths.to_units(layer, range(4), heads, through)
        slow = path_one(model, p, paths.base, paths.other, unit, heads, through, where, freeze)
        close(fast[head], slow)


def test_paths_at_a_place_of_each_row(model):
    p = pairs(3)
    place = p.last - torch.tensor([1, 2, 1])
    where = column_mask(p, place)
    paths = Paths(model, p, where)
    receivers = HeadSet.parse("L2H1")
    fast = paths.to_units(0, range(4), receivers, "kv")
    close(fast[2], path_one(model, p, paths.base, paths.other, "L0H2", receivers, "kv", where, False))
    with pytest.raises(ScoreError, match="last token"):
        paths.to_logits(0, range(4))


def test_everything_frozen_is_the_closed_form():
    model, _ = load_model("tiny-random-llama")
    p = pairs()
    paths = Paths(model, p, column_mask(p, "last"), freeze_mlps=True)
    got = paths.to_logits(1, range(4))
    keep = {}
    hook = model.model.norm.register_forward_pre_hook(lambda m, a: keep.update(stream=a[0][:, -1]))
    with torch.no_grad():
        model(input_ids=p.ids, attention_mask=p.mask.long(), position_ids=(p.mask.long().cumsum(1) - 1).clamp(min=0))
        hook.remove()
        logits = model.lm_head(model.model.norm(keep["stream"] + paths.delta(1, range(4))[:, :, 0]))
    rows = torch.arange(len(p))
    close(got, logits[:, rows, p.answers] - logits[:, rows, p.contrasts], 1e-5)


def test_paths_back_in_depth_and_to_oneself_move_nothing():
    model, tokenizer = load_model("tiny-random-llama")
    scores = S.path_patching(model, tokenizer, count=3, receivers=HeadSet.parse("L1H1"), through="qkv")
    assert (scores.values[1:] == 0).all()
    assert (scores.values[0] != 0).all()
    same = pairs()
    clean = PromptPairs(same.ids, same.ids, same.mask, same.answers, same.contrasts)
    paths = Paths(model, clean, column_mask(clean, "last"))
    close(paths.to_logits(0, range(4)), paths.base.difference.expand(4, -1), 1e-5)


@torch.no_grad()
def test_what_all_heads_send_is_the_difference_of_the_streams_without_embeddings_and_mlps():
    """The direct paths of all senders, before the norm, add up to what the two runs differ by at the last token."""
    model, _ = load_model("tiny-random-llama")
    p = pairs()
    paths = Paths(model, p, column_mask(p, "last"))
    heads = sum(paths.delta(layer, range(4))[:, :, 0].sum(0) for layer in range(3))
    parts = []
    for ids in (p.ids, p.corrupt):
        seen = {}
        hooks = [model.model.norm.register_forward_pre_hook(lambda m, a, seen=seen: seen.update(stream=a[0]))]
        for layer, block in enumerate(model.model.layers):
            keep = lambda m, a, out, seen=seen, layer=layer: seen.update({layer: out})
            hooks.append(block.mlp.register_forward_hook(keep))
        answer(model, p, ids)
        for hook in hooks:
            hook.remove()
        rest = model.model.embed_tokens(ids) + sum(seen[layer] for layer in range(3))
        parts.append((seen["stream"] - rest)[torch.arange(len(p)), p.last])
    close(heads, parts[1] - parts[0], 1e-5)


def test_a_run_patched_into_the_twin_is_all_of_the_effect_and_into_itself_none():
    base, other = torch.tensor([2.0, 3.0, 1.0]), torch.tensor([-1.0, -2.0, 0.5])
    for reduce in ("ratio_of_means", "mean_of_ratios"):
        assert shares(torch.stack([other, base]), base, other, reduce).tolist() == [1.0, 0.0]
    same = pairs()
    clean = PromptPairs(same.ids, same.ids, same.mask, same.answers, same.contrasts)
    model, _ = load_model("tiny-random-qwen3")
    paths = Paths(model, clean, column_mask(clean, "all"))
    for through in ("q", "k", "v"):
        close(paths.to_units(0, range(4), HeadSet.parse("L2H1"), through), paths.base.difference.expand(4, -1))


def test_a_key_of_one_head_is_not_the_key_of_its_group():
    model, _ = load_model("tiny-random-llama")
    p = pairs()
    paths = Paths(model, p, column_mask(p, "all"))
    one, other, group = (
        paths.to_units(0, range(4), HeadSet.parse(text), "k") - paths.base.difference
        for text in ("L2H0", "L2H1", "L2H0,L2H1")
    )
    assert (one - other).abs().max() > 1e-3
    assert (group - one).abs().max() > 1e-3


def test_padding_side_batch_and_order_change_nothing():
    model, _ = load_model("tiny-random-llama")
    made = make_induction(200, count=4, length=6, seed=5)
    left = PromptPairs.of(
        *[[t[i][made.mask[i]].tolist() for i in range(4)] for t in (made.ids, made.corrupt)],
        made.answers.tolist(), made.contrasts.tolist(), side="left",
    )  # fmt: skip
    right = PromptPairs.of(
        *[[t[i][made.mask[i]].tolist() for i in range(4)] for t in (made.ids, made.corrupt)],
        made.answers.tolist(), made.contrasts.tolist(), side="right",
    )  # fmt: skip
    assert not left.mask.all()
    for method, options in (
        (S.activation_patching, {}),
        (S.path_patching, {"receivers": HeadSet.parse("L2H1")}),
        (S.path_patching, {"tokens": "all"}),
        (S.attribution_patching, {}),
        (S.ablation_effect, {"how": "mean"}),
    ):
        base = method(model, None, pairs=left, **options).values
        close(method(model, None, pairs=right, **options).values, base)
    base = S.activation_patching(model, None, pairs=left).values
    close(S.activation_patching(model, None, pairs=left, rows=5).values, base)
    turned = left[slice(None)]
    order = torch.tensor([2, 0, 3, 1])
    turned = PromptPairs(*[getattr(left, n)[order] for n in ("ids", "corrupt", "mask", "answers", "contrasts")])
    close(S.activation_patching(model, None, pairs=turned).values, base)
    single = torch.stack(
        [Sweep(model, left[slice(i, i + 1)], column_mask(left, "all")[i : i + 1]).base.difference for i in range(4)]
    )
    close(single[:, 0], Sweep(model, left, column_mask(left, "all")).base.difference)


def test_the_model_is_left_as_it_was(model):
    ids = torch.arange(12)[None]
    before = model(ids).logits
    state = {name: type(m).forward for name, m in model.named_modules()}
    for name in (
        "activation_patching",
        "path_patching",
        "attribution_patching",
        "ablation_effect",
        "logit_attribution",
    ):
        getattr(S, name)(model, None, pairs=pairs(2))
    S.path_patching(model, None, pairs=pairs(2), receivers=HeadSet.parse("L2H1"), through="qk")
    assert torch.equal(before, model(ids).logits)
    assert all("forward" not in vars(m) for m in model.modules())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert state == {name: type(m).forward for name, m in model.named_modules()}


def test_a_first_order_estimate_is_exact_where_the_model_is_linear():
    """Patching a hundredth of the way is linear: gradient times difference."""
    model, _ = load_model("tiny-random-gpt2")
    p = pairs()
    where = column_mask(p, "last")
    sweep, other = Sweep(model, p, where), record(model, p, p.corrupt)
    small = [0.999 * z + 0.001 * o for z, o in zip(sweep.base.z, other.z, strict=True)]
    after = sweep.all_units(small.__getitem__)
    moved = (after - sweep.base.difference).mean(-1) * 1000
    gap = (other.difference - sweep.base.difference).mean()
    slope = attribution_patching(model, None, pairs=p, tokens="last").values * gap
    close(slope, moved, 0.05)


def test_the_parts_add_up_to_the_logits(model):
    for p in (pairs(), pairs(side="right")):
        found = attribute(model, None, pairs=p)
        assert found.error < 1e-4 * max(1.0, float(found.heads.abs().sum((1, 2)).max()))
        assert found.heads.shape == (
            3,
            len(model.base_model.layers if hasattr(model.base_model, "layers") else model.base_model.h),
            4,
        )


PARALLEL = {"use_parallel_residual": True}
FAMILIES = {"Olmo2": {}, "GPTNeoX": PARALLEL, "Phi": {}, "Gemma": {"head_dim": 8}, "StableLm": PARALLEL}


@pytest.fixture(params=FAMILIES)
def family(request):
    """Norms behind attention and MLP (OLMo 2), attention beside the MLP (GPT-NeoX, Phi, StableLM), norms with 1 added (Gemma)."""
    config = getattr(transformers, f"{request.param}Config")(
        vocab_size=220, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        initializer_range=0.2, max_position_embeddings=128, **FAMILIES[request.param],
    )  # fmt: skip
    torch.manual_seed(1)
    return getattr(transformers, f"{request.param}ForCausalLM")(config).eval()


def test_every_form_of_a_block_is_split_and_patched(family):
    p = pairs()
    found = attribute(family, None, pairs=p)
    assert found.error < 1e-5 * float(found.heads.abs().sum((1, 2)).max())
    where = column_mask(p, "all")
    sweep, other = Sweep(family, p, where), record(family, p, p.corrupt)
    close(sweep.layer(0, range(4), other.z[0])[2], patch_one(family, p, sweep.base, other.z, "L0H2", where), 1e-5)
    for freeze in (False, True):
        paths = Paths(family, p, where, freeze_mlps=freeze)
        slow = path_one(family, p, paths.base, paths.other, "L0H1", HeadSet.parse("L1H2"), "qk", where, freeze)
        close(paths.to_units(0, range(4), HeadSet.parse("L1H2"), "qk")[1], slow, 1e-5)
        slow = path_one(family, p, paths.base, paths.other, "L0H1", None, "", where, freeze)
        close(paths.to_logits(0, range(4))[1], slow, 1e-5)


def test_scaled_or_capped_logits_are_refused():
    from transformers import Gemma2Config, Gemma2ForCausalLM

    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, final_logit_softcapping=1.0, initializer_range=0.3,
    )  # fmt: skip
    capped = Gemma2ForCausalLM(config).eval()
    with pytest.raises(AttachError, match="add up"):
        attribute(capped, None, pairs=make_induction(60, count=2, length=5))


def test_the_exact_induction_head_is_found_by_every_measure():
    model = handwired_induction()
    p = make_induction(32, count=4, length=8, seed=1)
    induction, previous = INDUCTION, PREVIOUS
    patched = activation_patching(model, None, pairs=p)
    assert patched.values[induction] == pytest.approx(1.0, abs=1e-3)
    assert (
        patched.values.flatten().abs() > 1e-3
    ).sum() == 1  # what stands before the answer is the same in both prompts
    swapped = PromptPairs.of([[1, 2, 3, 4, 1]], [[3, 2, 1, 4, 1]], [2], [4])
    patched = activation_patching(model, None, pairs=swapped)
    assert [patched.values[unit].item() for unit in (induction, previous)] == pytest.approx([1.0, 1.0], abs=1e-3)
    assert (patched.values.flatten().abs() > 1e-3).sum() == 2
    direct = S.path_patching(model, None, pairs=swapped)
    assert direct.values[induction] == pytest.approx(1.0, abs=1e-3)
    assert direct.values[previous].abs() < 1e-3
    keys = S.path_patching(model, None, pairs=swapped, receivers=HeadSet.parse("L1H1"), through="k", tokens="all")
    assert keys.values[previous] == pytest.approx(1.0, abs=1e-3)
    for through in ("q", "v"):
        other = S.path_patching(
            model, None, pairs=swapped, receivers=HeadSet.parse("L1H1"), through=through, tokens="all"
        )
        assert other.values.abs().max() < 1e-3
    parts = attribute(model, None, pairs=p).parts()
    assert max(parts, key=parts.get) == "L1H1"
    ablated = S.ablation_effect(model, None, pairs=p)
    assert ablated.values[induction] > 0.9 * ablated.meta["base"]


def indirect_objects():
    """[A, B, and, S, gave]: the answer is the name that S is not; the twin's giver is the other one. Rows of two lengths."""
    names = [(1, 2, 1), (1, 2, 2), (5, 3, 5), (8, 6, 6)]
    rows, twins = [], []
    for n, (a, b, giver) in enumerate(names):
        before = [20] * (n % 2)
        rows.append([*before, a, 21, b, 22, giver, 23])
        twins.append([*before, a, 21, b, 22, a + b - giver, 23])
    givers = [giver for *_, giver in names]
    return PromptPairs.of(rows, twins, [a + b - g for a, b, g in names], givers)


def test_the_exact_name_mover_is_found_by_every_measure():
    model, p = handwired_name_mover(), indirect_objects()
    run = record(model, p, p.ids)
    assert torch.equal(run.logits.argmax(1), p.answers)
    assert run.difference == pytest.approx(
        -record(model, p, p.corrupt).difference, rel=1e-4
    )  # the twin's answer is the mirror
    exact = {"rel": 1e-3, "abs": 1e-3}
    for tokens in ("last", "all"):
        patched = activation_patching(model, None, pairs=p, tokens=tokens).values
        assert [patched[unit].item() for unit in (MOVER, PREVIOUS)] == pytest.approx([1.0, 1.0], **exact)
        assert (patched.flatten().abs() > 1e-3).sum() == 2
    direct = S.path_patching(model, None, pairs=p).values
    assert direct[MOVER] == pytest.approx(1.0, **exact) and (direct.flatten().abs() > 1e-3).sum() == 1
    for through, share in (("q", 1.0), ("k", 0.0), ("v", 0.0)):
        to_mover = S.path_patching(model, None, pairs=p, receivers=HeadSet.parse("L1H1"), through=through).values
        assert to_mover[PREVIOUS] == pytest.approx(share, **exact)
    parts = attribute(model, None, pairs=p).parts()
    assert parts["L1H1"] == pytest.approx(float(run.difference.mean()), **exact)
    assert all(abs(value) < 1e-3 for name, value in parts.items() if name != "L1H1")
    lost = S.ablation_effect(model, None, pairs=p)
    assert lost["L1H1"] == pytest.approx(lost.meta["base"], **exact)  # nothing is said about either name
    assert lost["L0H0"] > lost.meta["base"]  # all tokens are read alike, and the giver stands there twice
    found = S.find_circuit(model, None, pairs=p, share=0.125)
    assert [str(stage.kept) for stage in found.stages] == ["L1H1", "L0H0"]


def test_bad_input_is_named():
    model, tokenizer = load_model("tiny-random-llama")
    with pytest.raises(TaskError, match="length"):
        PromptPairs.of([[1, 2]], [[1]], [1], [2])
    with pytest.raises(TaskError, match="one token"):
        S.activation_patching(model, tokenizer, task="ioi")
    with pytest.raises(ScoreError, match="task="):
        S.activation_patching(model, tokenizer, task="nope")
    with pytest.raises(ScoreError, match="direction="):
        S.activation_patching(model, tokenizer, direction="up")
    with pytest.raises(ScoreError, match="through="):
        S.path_patching(model, tokenizer, receivers=HeadSet.parse("L2H1"), through="z")
    with pytest.raises((UnitError, WrongModelError), match="L9"):
        S.path_patching(model, tokenizer, receivers=HeadSet.parse("L9H1"))
    with pytest.raises(ScoreError, match="selects no token"):
        S.activation_patching(model, tokenizer, tokens="500:501")
    with pytest.raises(ScoreError, match="one token a row, or of all"):
        S.path_patching(model, tokenizer, tokens="2:4")
    same = pairs()
    same = PromptPairs(same.ids, same.ids, same.mask, same.answers, same.contrasts)
    with pytest.raises(ScoreError, match="no effect"):
        S.activation_patching(model, None, pairs=same)
    with pytest.raises(ScoreError, match="at least two"):
        S.ablation_effect(model, None, pairs=pairs(1), how="resample")
    bert, _ = load_model("tiny-random-bert")
    with pytest.raises((AttachError, ScoreError)):
        S.activation_patching(bert.bert, None, pairs=pairs())


def test_dropout_is_off_during_patching():
    model, _ = load_model("tiny-random-gpt2")
    model.train()
    try:
        first = S.activation_patching(model, None, pairs=pairs()).values
        assert model.training
    finally:
        model.eval()
    close(S.activation_patching(model, None, pairs=pairs()).values, first, 1e-6)


def test_bfloat16_scores_are_near_those_of_float32():
    model, _ = load_model("tiny-random-gpt2")
    exact = S.path_patching(model, None, pairs=pairs())
    rough = S.path_patching(model.to(torch.bfloat16), None, pairs=pairs())
    assert exact.correlation(rough) > 0.9
