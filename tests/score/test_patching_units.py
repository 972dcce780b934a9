"""Experts as units of patching, edges one receiver at a time, and many pairs a few at a time: all against whole passes."""

import copy

import pytest
import torch
from tests.score.test_patching import close, pairs

import headwise.score as S
from headwise.attach import attach
from headwise.attach.experts import find_experts
from headwise.errors import AttachError, ScoreError, UnitError, WrongModelError
from headwise.expert_edits import ExpertEdits
from headwise.hub import load_model
from headwise.score._edges import edges
from headwise.score._expert_sweep import ExpertSweep, split_parts
from headwise.score._patching import answer, column_mask, record
from headwise.score._patching_reference import expert_one, to_experts_one
from headwise.score._path_batch import ExpertPaths, PathBatch
from headwise.score._paths import Paths
from headwise.score._sweep import Sweep
from headwise.score._units import chunks
from headwise.tasks.pairs import PromptPairs, make_induction
from headwise.units import HeadSet

MIXTURES = ("mixtral", "qwen3-moe", "deepseek-v3")


@pytest.fixture(params=MIXTURES)
def mixture(request):
    return load_model(f"tiny-random-{request.param}")[0]


# experts


@torch.no_grad()
def test_silencing_an_expert_is_scaling_its_weight_to_zero(mixture):
    p = pairs()
    base = answer(mixture, p, p.ids)[1]
    scores = S.ablation_effect(mixture, None, pairs=p, unit="expert", rows=5)
    assert scores.kind == "expert"
    assert str(scores.top(1)).count("E") == 1
    for unit in ("L1E0", "L2E3"):
        with attach(mixture, edits=ExpertEdits.scale(unit, 0.0)):
            lost = base - answer(mixture, p, p.ids)[1]
        assert scores[unit] == pytest.approx(float(lost.mean()), abs=1e-4)
    dense = set(range(3)) - set(find_experts(mixture).numbers())
    assert all((scores.values[layer] == 0).all() for layer in dense)


@pytest.mark.parametrize("tokens", ["all", "last", "2:5"])
def test_an_experts_part_from_the_other_run(mixture, tokens):
    p = pairs()
    where = column_mask(p, tokens)
    sweep = ExpertSweep(mixture, p, where, rows=7)
    other = sweep.record(p, p.corrupt)
    for unit in ("L1E1", "L2E0", "L2E3"):
        layer, expert = HeadSet.parse(unit).pairs()[0]
        fast = sweep.layer(layer, range(4), other.z[layer])
        close(fast[expert], expert_one(mixture, p, unit, where))


@pytest.mark.parametrize(("receivers", "through"), [(None, ""), ("L2H1", "q"), ("L2H0,L2H3", "kv")])
@pytest.mark.parametrize("tokens", ["last", "all"])
def test_an_experts_direct_path(mixture, receivers, through, tokens):
    p = pairs(2)
    where = column_mask(p, tokens)
    paths = ExpertPaths(mixture, p, where, rows=5)
    heads, base = HeadSet.parse(receivers) if receivers else None, record(mixture, p, p.ids)
    units = range(4)
    fast = paths.to_logits(1, units) if heads is None else paths.to_units(1, units, heads, through)
    for expert in (0, 3):
        slow = expert_one(mixture, p, f"L1E{expert}", where, base=base, receivers=heads, through=through, direct=True)
        close(fast[expert], slow)


@pytest.mark.parametrize("through", ["x", "w", "xw"])
@pytest.mark.parametrize(("tokens", "freeze"), [("last", False), ("all", True)])
def test_experts_receive_what_they_compute_on_and_their_weight(mixture, through, tokens, freeze):
    p = pairs(2)
    where, receivers = column_mask(p, tokens), HeadSet.parse("L1E1,L1E3,L2E0")
    paths = Paths(mixture, p, where, rows=5, freeze_mlps=freeze)
    moved = 0.0
    for sender in ("L0H1", "L1H2", "L2H3"):  # a head reaches the experts of its own layer
        layer, head = HeadSet.parse(sender).pairs()[0]
        fast = paths.to_units(layer, range(4), receivers, through)
        slow = to_experts_one(mixture, p, paths.base, paths.other, sender, receivers, through, where, freeze)
        close(fast[head], slow)
        moved = max(moved, float((slow - paths.base.difference).abs().max()))
    assert moved > 1e-3


def test_experts_send_to_experts_of_later_layers_alone(mixture):
    p = pairs(2)
    scores = S.path_patching(mixture, None, pairs=p, unit="expert", receivers=HeadSet.parse("L2E0,L2E1"), through="xw")
    assert (scores.values[2] == 0).all() and (scores.values[1] != 0).any()
    assert scores.meta["receivers"] == "xw of L2E0,L2E1"
    if find_experts(mixture).numbers()[0] == 1:
        with pytest.raises(UnitError, match="L0E1 names no routed expert"):
            S.path_patching(mixture, None, pairs=p, receivers=HeadSet.parse("L0E1"), through="x")
    with pytest.raises(ScoreError, match="through='q'.*x: the hidden states"):
        S.path_patching(mixture, None, pairs=p, receivers=HeadSet.parse("L2E0"))


def test_a_kv_head_receives_with_all_heads_that_read_it():
    model, _ = load_model("tiny-random-llama")
    options = {"pairs": pairs(2), "tokens": "all", "through": "kv"}
    group = S.path_patching(model, None, receivers=HeadSet.parse("L2K1"), **options)
    heads = S.path_patching(model, None, receivers=HeadSet.parse("L2H2,L2H3"), **options)
    assert torch.equal(group.values, heads.values) and group.meta["receivers"] == "kv of L2K1"
    with pytest.raises(ScoreError, match="through='q'.*kind 'kv'"):
        S.path_patching(model, None, receivers=HeadSet.parse("L2K1"), pairs=pairs(2))


def test_frozen_mlps_leave_an_expert_its_write(mixture):
    """With everything frozen the part goes straight into the residual stream: the last layer's effect is that of patching it."""
    p = pairs()
    last = find_experts(mixture).numbers()[-1]
    direct = S.path_patching(mixture, None, pairs=p, unit="expert", tokens="last", freeze_mlps=True)
    total = S.activation_patching(mixture, None, pairs=p, unit="expert", tokens="last")
    close(direct.values[last], total.values[last])


def test_mean_and_resample_of_experts(mixture):
    p = pairs()
    for how in ("mean", "resample"):
        scores = S.ablation_effect(mixture, None, pairs=p, unit="expert", how=how)
        close(S.ablation_effect(mixture, None, pairs=p, unit="expert", how=how, rows=4).values, scores.values)
        assert scores.values.abs().max() > 1e-4
    twice = PromptPairs(*[torch.cat([t, t]) for t in (p.ids, p.corrupt, p.mask, p.answers, p.contrasts)])
    close(
        S.ablation_effect(mixture, None, pairs=twice, unit="expert", how="mean").values,
        S.ablation_effect(mixture, None, pairs=p, unit="expert", how="mean").values,
    )


def test_padding_side_and_rows_change_nothing_for_experts():
    model, _ = load_model("tiny-random-qwen3-moe")
    base = S.activation_patching(model, None, pairs=pairs(), unit="expert").values
    close(S.activation_patching(model, None, pairs=pairs(side="right"), unit="expert").values, base)
    close(S.activation_patching(model, None, pairs=pairs(), unit="expert", rows=1).values, base)


def test_the_first_order_estimate_of_experts_is_exact_for_small_changes(mixture):
    """In float64, so that a thousandth of the way is seen; the gradient of the whole layer's experts serves each of them."""
    model = copy.deepcopy(mixture).double()
    model.set_experts_implementation("eager")  # the grouped kernel knows no float64
    p = pairs(2)
    estimate = S.attribution_patching(model, None, pairs=p, tokens="last", unit="expert", reduce="ratio_of_means")
    sweep = ExpertSweep(model, p, column_mask(p, "last"))
    other = sweep.record(p, p.corrupt)
    gap = (other.difference - sweep.base.difference).mean()
    for layer in find_experts(model).numbers():
        own, lent = sweep.base.z[layer], other.z[layer]

        class Near:
            def of(self, experts, own=own, lent=lent):
                return own.of(experts) + 1e-3 * (lent.of(experts) - own.of(experts))

        moved = (sweep.layer(layer, range(4), Near()) - sweep.base.difference).mean(-1) * 1000 / gap
        close(estimate.values[layer, :4], moved.float(), 0.02)


def test_experts_that_are_no_sum_are_refused():
    def experts(hidden, index, weight):
        return hidden * weight.sum(1, keepdim=True) ** 2

    hidden, index, weight = torch.ones(4, 3), torch.tensor([[0, 1]] * 4), torch.full((4, 2), 0.5)
    with pytest.raises(AttachError, match=r"layer 7: .* add up"):
        split_parts(7, experts, hidden, index, weight, experts(hidden, index, weight), shape=(2, 2))
    with pytest.raises(AttachError, match=r"layer 7: .*\(4, 2\) choices"):
        split_parts(7, experts, hidden, index, weight, None, shape=(2, 2))


def test_bad_units_are_named():
    model, tokenizer = load_model("tiny-random-llama")
    with pytest.raises(ScoreError, match="unit='neuron'"):
        S.activation_patching(model, tokenizer, unit="neuron")
    for method in (S.activation_patching, S.ablation_effect, S.path_patching, S.attribution_patching):
        with pytest.raises(AttachError, match="no experts"):
            method(model, tokenizer, unit="expert")
    with pytest.raises(ScoreError, match="from heads to heads"):
        S.path_edges(model, tokenizer, HeadSet.parse("L0E1"), HeadSet.parse("L1H1"))
    with pytest.raises(ScoreError, match="senders is empty"):
        S.path_edges(model, tokenizer, HeadSet.empty(), HeadSet.parse("L1H1"))
    with pytest.raises(ScoreError, match="through='z'"):
        S.path_edges(model, tokenizer, HeadSet.parse("L0H1"), HeadSet.parse("L1H1"), through="z")
    with pytest.raises((UnitError, WrongModelError), match="L9"):
        S.path_edges(model, tokenizer, HeadSet.parse("L0H1"), HeadSet.parse("L9H1"))


def test_the_model_is_left_as_it_was(mixture):
    ids = torch.arange(12)[None]
    before = mixture(ids).logits
    for method in (S.activation_patching, S.ablation_effect, S.path_patching, S.attribution_patching):
        method(mixture, None, pairs=pairs(2), unit="expert")
    S.path_edges(mixture, None, HeadSet.parse("L0H1"), HeadSet.parse("L2H1,L2H2"), pairs=pairs(2))
    assert torch.equal(before, mixture(ids).logits)
    assert all("forward" not in vars(m) for m in mixture.modules())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in mixture.modules())


# edges


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3", "deepseek-v3", "qwen3-moe"])
@pytest.mark.parametrize(("tokens", "through", "freeze"), [("last", "q", False), ("all", "kv", True)])
def test_edges_are_path_patching_one_receiver_at_a_time(name, tokens, through, freeze):
    model, _ = load_model(f"tiny-random-{name}")
    p = pairs(2)
    paths = Paths(model, p, column_mask(p, tokens), rows=11, freeze_mlps=freeze)
    heads = range(4)
    found = edges(paths, {0: heads, 1: heads}, {1: heads, 2: heads}, through)
    for layer in (0, 1):
        for unit in ("L1H0", "L1H3", "L2H2"):
            to, head = HeadSet.parse(unit).pairs()[0]
            one = paths.to_units(layer, heads, HeadSet.parse(unit), through)
            close(found[4 * layer : 4 * layer + 4, 4 * (to - 1) + head], one)


def test_edges_of_a_circuit_reach_the_logits_with_the_scores_of_its_first_stage():
    model, tokenizer = load_model("tiny-random-llama")
    circuit = S.find_circuit(model, tokenizer, count=5, share=0.2)
    found = S.circuit_edges(model, tokenizer, circuit, count=5)
    ends = {str(e.sender): e.share for e in found if e.receiver is None}
    scores = circuit.stages[0].scores
    assert ends == {str(u): pytest.approx(scores[str(u)]) for u in circuit.stages[0].kept}
    for edge in found:
        if edge.receiver is not None:
            alone = S.path_patching(
                model, tokenizer, count=5, receivers=HeadSet.parse(str(edge.receiver)), through=edge.through
            )
            assert edge.share == pytest.approx(alone[str(edge.sender)], abs=1e-4)
    assert [abs(e.share) for e in found] == sorted((abs(e.share) for e in found), reverse=True)


# many pairs


def test_pairs_are_taken_a_few_at_a_time():
    assert [(s.start, s.stop) for s in chunks(10, 4, 12)] == [(0, 3), (3, 6), (6, 9), (9, 10)]
    assert len(chunks(10, 4, 1)) == 10
    with pytest.raises(ScoreError, match="rows"):
        chunks(10, 4, 0)


def test_no_pass_is_larger_than_rows():
    """The bound on memory: whatever the number of pairs, a pass has `rows` rows of whole columns at most."""
    model, _ = load_model("tiny-random-gpt2")
    p = make_induction(200, count=9, length=6, seed=3)
    seen = []
    handle = model.transformer.h[-1].mlp.register_forward_hook(lambda m, a, out: seen.append(out.shape[:2]))
    for method in (S.activation_patching, S.ablation_effect, S.path_patching):
        method(model, None, pairs=p, tokens="all", rows=8)
    handle.remove()
    assert max(rows for rows, _ in seen) == 8


def test_a_resumed_sweep_attaches_once(monkeypatch):
    from headwise.score import _sweep

    model, _ = load_model("tiny-random-llama")
    p, calls = pairs(), []
    attach_ = _sweep.attach
    monkeypatch.setattr(_sweep, "attach", lambda *a, **k: calls.append(1) or attach_(*a, **k))
    sweep = Sweep(model, p, column_mask(p, "all"))
    sweep.all_units(record(model, p, p.corrupt).z.__getitem__)
    assert len(calls) == 1


def test_stages_of_a_circuit_do_not_depend_on_the_chunks():
    model, tokenizer = load_model("tiny-random-llama")
    one, other = (S.find_circuit(model, tokenizer, count=7, share=0.2, rows=rows) for rows in (64, 5))
    assert one.heads == other.heads
    for a, b in zip(one.stages, other.stages, strict=True):
        close(a.scores.values, b.scores.values)
    batch = PathBatch(model, pairs(), column_mask(pairs(), "last"))
    batch.scores(None)
    assert batch.kept is not None  # a second stage reads nothing again
