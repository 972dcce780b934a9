"""Correct-letter heads and letter subspaces against whole passes and hand-made patterns."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from headwise.attach import attach, find_stack
from headwise.attach.projection import head_weights, output_projection
from headwise.errors import AttachError, ScoreError, UnitError
from headwise.hub import load_model
from headwise.score import Quiz, Resample, label_pattern, letter_effects, letter_heads, letter_space, mlp_effects
from headwise.score._blocks import Blocks, Kept, first, with_first
from headwise.score._letters import KINDS, LabelPattern
from headwise.score._patching import answer, record
from headwise.score._patching_reference import patch_one
from headwise.tasks.multiple_choice import choice_pairs, make_multiple_choice
from headwise.tasks.pairs import make_induction
from headwise.units import HeadSet

MODELS = ("llama", "gpt2", "qwen3", "gemma3", "mixtral")


def quiz(count=8, side="left", seed=0, uneven=True):
    """Prompts 9 … L1 v1 L2 v2 L3 v3 v of tokens below 300; every other one longer."""
    generator, rows = torch.Generator().manual_seed(seed), ([], [], [], [], [], [])
    for n in range(count):
        drawn = (torch.randperm(200, generator=generator)[:6] + 50).tolist()
        before = [9] * (1 + 2 * (n % 2) * uneven)
        body = before + [t for pair in zip(drawn[:3], drawn[3:], strict=True) for t in pair]
        at = [len(before) + 2 * i for i in range(3)]
        k, j = n % 3, (n % 3 + 1 + n % 2) % 3
        for into, row in zip(rows, (body + [drawn[3 + k]], body + [drawn[3 + j]], at, drawn[:3], k, j), strict=True):
            into.append(row)
    return choice_pairs(*rows[:4], correct=rows[4], other=rows[5], side=side)


@pytest.fixture(params=MODELS)
def model(request):
    return load_model(f"tiny-random-{request.param}")[0]


def test_total_effect_is_one_pass_a_head(model):
    p = quiz(6)
    found = letter_effects(model, p, rows=7)
    base, other = record(model, p, p.ids), record(model, p, p.corrupt)
    last = torch.arange(p.ids.shape[1]) == p.last[:, None]
    for unit in ("L0H1", "L1H3"):
        layer, head = HeadSet.parse(unit).pairs()[0]
        want = base.difference - patch_one(model, p, base, other.z, unit, last)
        torch.testing.assert_close(found.total[layer, head], want, atol=2e-4, rtol=1e-4)


def test_direct_effect_is_a_change_of_the_final_residual():
    model, _ = load_model("tiny-random-llama")
    p = quiz(6)
    found, stack = letter_effects(model, p), find_stack(model)
    base, other = record(model, p, p.ids), record(model, p, p.corrupt)
    stream = []
    hook = model.model.norm.register_forward_pre_hook(lambda m, args: stream.append(args[0]))
    with torch.no_grad():
        answer(model, p, p.ids)
    hook.remove()
    rows = torch.arange(len(p))
    for layer, head in ((0, 1), (2, 3)):
        weight = head_weights(output_projection(stack, layer), stack.heads)[head]
        moved = (other.z[layer] - base.z[layer])[rows, p.last, head] @ weight
        logits = model.lm_head(model.model.norm(stream[0][rows, p.last] + moved))
        want = base.difference - (logits[rows, p.answers] - logits[rows, p.contrasts])
        torch.testing.assert_close(found.direct[layer, head], want.detach(), atol=1e-5, rtol=1e-4)
    assert not torch.allclose(found.direct[2], found.total[2], atol=1e-6)  # the last block's MLP lies between


def test_effects_of_mlps_are_changes_of_the_residual_and_whole_passes(model):
    """Direct: the write exchanged before the live final norm. Total: a hook on the MLP. The last one's are the same."""
    p = quiz(6)
    found, stack = mlp_effects(model, p), find_stack(model)
    blocks = Blocks(model, stack, None)
    rows, last = torch.arange(len(p)), torch.arange(p.ids.shape[1]) == p.last[:, None]
    twin = Kept(blocks)
    with torch.no_grad(), twin.recording():
        answer(model, p, p.corrupt)

    def put(layer):
        return lambda m, a, out: with_first(out, torch.where(last[..., None], first(twin.mlp[layer]), first(out)))

    with torch.no_grad():
        base = answer(model, p, p.ids)[1]
        for layer in (0, 2):
            handle = blocks.mlps[layer].register_forward_hook(put(layer))
            want = base - answer(model, p, p.ids)[1]
            handle.remove()
            torch.testing.assert_close(found.total[layer], want, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found.direct[-1], found.total[-1], atol=1e-5, rtol=1e-4)
    assert not torch.allclose(found.direct[0], found.total[0], atol=1e-4)
    assert torch.equal(found.base, base.cpu()) and len(rows) == found.direct.shape[1]
    names = [name for name, _ in found.ranking(letter_effects(model, p))]
    assert len(names) == len(found.direct) * (1 + stack.heads) and {"L0 mlp", "L2H3"} <= set(names)


def test_the_direct_effect_of_an_mlp_is_its_write_exchanged():
    model, _ = load_model("tiny-random-llama")
    p = quiz(6)
    found, seen = mlp_effects(model, p), []
    for ids in (p.ids, p.corrupt):
        keep = {}
        hooks = [
            model.model.norm.register_forward_pre_hook(lambda m, a, keep=keep: keep.update(stream=a[0])),
            model.model.layers[1].mlp.register_forward_hook(lambda m, a, out, keep=keep: keep.update(mlp=out)),
        ]
        with torch.no_grad():
            answer(model, p, ids)
        for hook in hooks:
            hook.remove()
        seen.append(keep)
    rows = torch.arange(len(p))
    stream = seen[0]["stream"][rows, p.last] + (seen[1]["mlp"] - seen[0]["mlp"])[rows, p.last]
    logits = model.lm_head(model.model.norm(stream)).detach()
    want = found.base - (logits[rows, p.answers] - logits[rows, p.contrasts])
    torch.testing.assert_close(found.direct[1], want, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_and_order_change_nothing(model, side):
    one, other = quiz(6, "left"), quiz(6, side)
    order = torch.tensor([3, 1, 5, 0, 4, 2])
    for f in (lambda p: letter_effects(model, p).direct.mean(-1), lambda p: label_pattern(model, p).mass):
        torch.testing.assert_close(f(one), f(other), atol=2e-5, rtol=1e-4)
    mixed = choice_pairs(
        *[[x[i] for i in order.tolist()] for x in _rows(one)], correct=one.marks["correct"][order].tolist(),
        other=one.marks["other"][order].tolist(), side=side,
    )  # fmt: skip
    assert label_pattern(model, one).kinds() == label_pattern(model, mixed).kinds()


def _rows(p):
    first = p.mask.long().argmax(1)
    return (
        [p.ids[i][p.mask[i]].tolist() for i in range(len(p))],
        [p.corrupt[i][p.mask[i]].tolist() for i in range(len(p))],
        (p.marks["labels"] - first[:, None]).tolist(),
        p.marks["choices"].tolist(),
    )


def test_attention_on_labels_is_the_models_own():
    model, _ = load_model("tiny-random-llama", attn_implementation="eager")
    p = quiz(6, uneven=False)
    weights = torch.stack(model(p.ids, output_attentions=True).attentions)[:, :, :, -1]  # (L, B, H, M)
    at = p.marks["labels"]
    on = weights.gather(3, at[None, :, None].expand(len(weights), -1, weights.shape[2], -1))
    want = torch.stack([on[:, p.marks["correct"] == k].mean(1) for k in range(3)], 2)
    found = label_pattern(model, p)
    torch.testing.assert_close(found.mass, want.detach(), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(found.recent, weights[..., -3:].sum(-1).mean(1).detach(), atol=1e-5, rtol=1e-4)


def test_kinds_of_heads():
    mass = torch.zeros(1, 5, 4, 4)
    mass[0, 0] = 0.8 * torch.eye(4) + 0.02
    mass[0, 1] = 0.01
    mass[0, 1, 1, 1] = 0.7
    mass[0, 2] = 0.2
    found = LabelPattern(mass, torch.tensor([[0.0, 0.0, 0.0, 0.9, 0.1]]))
    assert found.kinds() == [["correct-letter", "single-letter", "uniform", "amplification", "other"]]
    assert sum(found.counts().values()) == 5 and set(found.counts()) == set(KINDS)
    assert str(found.of_kind("correct-letter")) == "L0H0"
    assert found.counts(least=0.99)["correct-letter"] == 0
    with pytest.raises(ScoreError, match="kind="):
        found.of_kind("letter")


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("basis", ["classes", "samples", "joint"])
def test_all_dimensions_are_the_model_itself(model, basis, side):
    p = quiz(6, side)
    space = letter_space(model, p, "L0H1,L1H2", basis=basis)
    plain, changed = _logits(model, p), _logits(model, p, space.keep(p, space.dims, "qkv"))
    torch.testing.assert_close(plain, changed, atol=3e-4, rtol=1e-3)
    none = _logits(model, p, space.keep(p, 0, "qkv"))
    assert not torch.allclose(plain, none, atol=1e-4)
    assert torch.equal(plain, _logits(model, p))  # nothing stays behind
    axes = space.parts[0, 1]["q"].axes
    torch.testing.assert_close(axes.T @ axes, torch.eye(space.dims), atol=1e-4, rtol=0)


def _logits(model, p, *transforms):
    with torch.no_grad(), attach(model, transforms=transforms):
        return answer(model, p, p.ids)[0]


def test_no_dimension_is_the_mean_and_classes_fill_the_first():
    model, _ = load_model("tiny-random-llama")
    p = quiz(12, uneven=False)
    axes = letter_space(model, p, "L1H2").parts[1, 2]["q"]
    x = torch.randn(5, len(axes.mean))
    torch.testing.assert_close(axes.keep(x, 0), axes.mean.expand(5, -1))
    torch.testing.assert_close(axes.keep(axes.classes, 2), axes.classes, atol=1e-5, rtol=1e-4)  # rank C − 1
    assert axes.variance.sum() == pytest.approx(1.0, abs=1e-3)
    off = [float((axes.keep(x, r) - x).norm()) for r in range(len(axes.mean) + 1)]
    assert all(a >= b - 1e-5 for a, b in zip(off, off[1:], strict=False))


def test_siblings_keep_their_keys():
    model, _ = load_model("tiny-random-llama")  # 2 query heads share a kv head
    p = quiz(6)
    space = letter_space(model, p, "L1H2")
    plain = record(model, p, p.ids).z[1]
    with attach(model, transforms=[space.keep(p, 0, "kv")]):
        changed = record(model, p, p.ids).z[1]
    same = (plain - changed).abs().amax((0, 1, 3)) < 1e-7
    assert same.tolist() == [True, True, False, True]
    elsewhere = torch.arange(p.ids.shape[1]) != p.last[:, None]
    assert torch.equal(plain[elsewhere], changed[elsewhere])


def test_moved_and_recalled_queries():
    model, _ = load_model("tiny-random-llama")
    p = quiz(6)
    space = letter_space(model, p, "L1H2")
    plain = _logits(model, p)
    torch.testing.assert_close(plain, _logits(model, p, space.move(p, p.marks["correct"])), atol=1e-4, rtol=1e-3)
    assert not torch.allclose(plain, _logits(model, p, space.move(p, p.marks["other"])), atol=1e-5)
    assert not torch.allclose(plain, _logits(model, p, space.recall(p)), atol=1e-5)
    torch.testing.assert_close(space.cosines(space).diagonal(), torch.ones(3))
    found, loss = Quiz(model, p).choose()
    assert found.shape == loss.shape == (6,) and bool((loss > 0).all())
    with attach(model, transforms=[space.move(p, p.marks["other"])]):
        tokens = model.generate(p.ids, attention_mask=p.mask.long(), max_new_tokens=3, do_sample=False)
    assert tokens.shape[1] == p.ids.shape[1] + 3


def test_a_whole_group_is_all_its_heads():
    """Heads of a group read the same keys, so their axes are the same, and to change the kv head is to name both."""
    model, _ = load_model("tiny-random-llama")
    p = quiz(6)
    space = letter_space(model, p, "L1H2,L1H3")
    one, other = space.parts[1, 2]["k"], space.parts[1, 3]["k"]
    assert torch.equal(one.mean, other.mean) and torch.equal(one.classes, other.classes)
    plain = record(model, p, p.ids).z[1]
    with attach(model, transforms=[space.keep(p, 0, "k")]):
        changed = record(model, p, p.ids).z[1]
    assert [(plain - changed)[:, :, h].abs().max() > 1e-5 for h in range(4)] == [False, False, True, True]


def test_more_dimensions_lose_less_on_the_prompts_that_gave_the_axes():
    """On a trained model: all dimensions are the model, few of them most of it, none the mean query and the mean keys."""
    model, tokenizer = load_model("circuit-lm")
    p = make_multiple_choice(tokenizer, count=24, form="question", seed=3)
    space, asked = letter_space(model, p, "L6H6"), Quiz(model, p)
    losses = [float(asked.choose(space.keep(p, rank))[1].mean()) for rank in (0, 1, 3, 8, 16)]
    assert all(more < less + 0.03 for less, more in zip(losses, losses[1:], strict=False)), losses
    assert losses[-1] == pytest.approx(float(asked.choose()[1].mean()), abs=1e-4) and losses[0] > losses[2] + 0.05


class Shapes(TorchDispatchMode):
    """Every shape that an operation gives."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            self.seen.add(tuple(out.shape))
        return out


def test_no_whole_attention_matrix_is_made():
    """Rows of the last token only, whatever the number of heads; the model keeps its attention function."""
    model, _ = load_model("tiny-random-llama")
    body = (torch.randperm(200, generator=torch.Generator().manual_seed(1))[:90] + 50).tolist()
    rows = [body[:80] + [body[80 + k]] for k in range(3)]
    p = choice_pairs(
        rows,
        rows[1:] + rows[:1],
        [[3, 30, 60]] * 3,
        [[body[3], body[30], body[60]]] * 3,
        correct=[0, 1, 2],
        other=[1, 2, 0],
    )
    with Shapes() as shapes, torch.no_grad():
        label_pattern(model, p)
    assert model.config._attn_implementation == "sdpa"
    assert any(81 in shape for shape in shapes.seen)
    assert not any(len(shape) >= 3 and shape.count(81) > 1 for shape in shapes.seen)


def test_bfloat16():
    model, _ = load_model("tiny-random-llama", dtype=torch.bfloat16)
    p = quiz(6)
    space = letter_space(model, p, "L1H2")
    torch.testing.assert_close(_logits(model, p), _logits(model, p, space.keep(p, space.dims)), atol=0.05, rtol=0.05)


def test_output_nodes():
    model, _ = load_model("tiny-random-llama")
    found = letter_effects(model, quiz(6))
    curve = found.cumulative()
    assert bool((curve[1:] >= curve[:-1]).all()) and float(curve[-1]) == pytest.approx(1.0)
    some = found.output_nodes(0.5)
    assert curve[len(some) - 1] >= 0.5 - 1e-6 and (len(some) == 1 or curve[len(some) - 2] < 0.5)
    with pytest.raises(ScoreError, match="share="):
        found.output_nodes(0.0)


def test_bad_input():
    model, _ = load_model("tiny-random-llama")
    p = quiz(6)
    with pytest.raises(ScoreError, match="no marks labels"):
        label_pattern(model, make_induction(200, count=2))
    with pytest.raises(ScoreError, match="option 1 of 3"):
        label_pattern(model, p[0:1])
    with pytest.raises(ScoreError, match="by='pattern'"):
        letter_heads(model, None, pairs=p, by="pattern")
    with pytest.raises(ScoreError, match="needs a tokenizer"):
        letter_heads(model, None)
    with pytest.raises(UnitError):
        letter_space(model, p, "L9H0")
    with pytest.raises(ScoreError, match="basis="):
        letter_space(model, p, "L1H0", basis="letters")
    bert, _ = load_model("tiny-random-bert")
    for ask in (label_pattern, letter_effects, Quiz):
        with pytest.raises(AttachError, match="bidirectional|output embeddings"):
            ask(bert, p)
    space = letter_space(model, p, "L1H2")
    with pytest.raises(ScoreError, match="rank is 999"):
        space.keep(p, 999)
    with pytest.raises(ScoreError, match="parts='x'"):
        space.keep(p, 1, "x")
    with pytest.raises(ScoreError, match="number of an option"):
        space.move(p, torch.tensor([1]))
    with pytest.raises(AttachError, match="6 prompts, this batch has 2"):
        _logits(model, p[0:2], space.keep(p, 1))


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_quiz_from_a_cache_is_whole_passes(model, side):
    p = quiz(6, side)
    quizzed, space = Quiz(model, p), letter_space(model, p, "L0H1,L1H2")
    for change in ([], [space.keep(p, 1)], [space.move(p, p.marks["other"])], [space.random(_seeded()).keep(p, 3)]):
        among = _logits(model, p, *change).gather(1, p.marks["choices"])
        found, loss = quizzed.choose(*change)
        want = torch.nn.functional.cross_entropy(among, p.marks["correct"], reduction="none")
        torch.testing.assert_close(loss, want, atol=2e-4, rtol=1e-3)
        assert torch.equal(found, among.argmax(1))


def _seeded():
    return torch.Generator().manual_seed(0)


def test_resampled_heads_together_and_alone(model):
    p = quiz(6)
    every = Resample.all_heads(model, p)
    one = HeadSet.parse("L1H2")
    base = letter_effects(model, p)
    rows = torch.arange(len(p))
    logits = _logits(model, p, every.only(one))
    change = base.base - (logits[rows, p.answers] - logits[rows, p.contrasts])
    torch.testing.assert_close(change, base.total[1, 2], atol=2e-4, rtol=1e-3)
    with pytest.raises(ScoreError, match="no outputs"):
        every.only(one).only(HeadSet.parse("L0H0"))
    with pytest.raises(AttachError, match="6 last tokens"):
        _logits(model, p[0:2], every)


def test_random_axes_are_axes():
    model, _ = load_model("tiny-random-llama")
    p = quiz(6)
    space = letter_space(model, p, "L1H2")
    axes = space.random(_seeded()).parts[1, 2]["q"]
    torch.testing.assert_close(axes.axes.T @ axes.axes, torch.eye(space.dims), atol=1e-5, rtol=0)
    assert torch.equal(axes.mean, space.parts[1, 2]["q"].mean)


def test_joint_axes_meet_in_the_scores():
    model, _ = load_model("tiny-random-llama")
    p = quiz(12, uneven=False)
    plain, joint = letter_space(model, p, "L1H2").parts[1, 2], letter_space(model, p, "L1H2", basis="joint").parts[1, 2]
    for part in "qk":  # the same span of C − 1 = 2 dimensions, turned
        one, other = plain[part].axes[:, :2], joint[part].axes[:, :2]
        torch.testing.assert_close(one @ one.T, other @ other.T, atol=1e-3, rtol=0)
    q, k = joint["q"], joint["k"]
    moved = q.axes[:, :2].T @ q.deltas.T @ (q.deltas @ k.deltas.T) @ k.deltas @ k.axes[:, :2]
    off = moved - torch.diag(moved.diagonal())
    assert float(off.abs().max()) < 1e-3 * float(moved.diagonal().abs().max())
