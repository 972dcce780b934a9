"""DuoAttention's gates: the mix, its gradient, the projected optimisation, the two quick rankings, and the gate files."""

import pytest
import torch

from headwise.attach import attach, find_stack, fingerprint
from headwise.attach.controller import controllers
from headwise.errors import AttachError, HeadwiseError, ScoreError, TaskError
from headwise.hub import load_model
from headwise.plan import HeadPlan, SinkWindow
from headwise.score import duo_gates, duo_instant, stream_difference
from headwise.score._gates import GateMix, GateOptimiser, frozen, trapezoid
from headwise.units import HeadScores

STREAM = SinkWindow(4, 16)
SMALL = dict(sinks=4, window=16, min_length=300, max_length=320, passphrases=1, words=2)


@pytest.fixture
def model():
    return load_model("tiny-random-llama", attn_implementation="eager")[0]


def tokens(rows: int = 1, count: int = 64, seed: int = 0) -> torch.Tensor:
    return torch.randint(256, (rows, count), generator=torch.Generator().manual_seed(seed))


def optimiser(model, **options) -> GateOptimiser:
    return GateOptimiser(model, STREAM, **{"steps": 10, "lr": 0.05, "l1": 0.05, "mix_source": "teacher"} | options)


def tail(ids: torch.Tensor) -> torch.Tensor:
    labelled = torch.zeros_like(ids, dtype=torch.bool)
    labelled[:, -20:] = True
    return labelled


# the mix


@pytest.mark.parametrize("source", ["teacher", "self"])
def test_open_gates_leave_the_student_equal_to_the_teacher(model, source):
    ids = tokens()
    gates = optimiser(model, mix_source=source)
    distill, penalty = gates.backward(ids, tail(ids))
    assert (distill, penalty) == (0.0, 1.0)
    plain = model(ids).logits
    with attach(model, transforms=[GateMix(torch.ones(3, 2), STREAM)]):
        assert torch.equal(model(ids).logits, plain)


def test_closed_gates_are_streaming_heads(model):
    ids = tokens()
    with attach(model, transforms=[GateMix(torch.zeros(3, 2), STREAM)]):
        mixed = model(ids).logits
    with attach(model, plan=HeadPlan.uniform(STREAM, 3, 2)):
        torch.testing.assert_close(mixed, model(ids, use_cache=False).logits)


def test_the_mix_is_the_equation_with_a_lambda_mask(model):
    ids, alpha = tokens(), torch.tensor([[0.25, 0.75]]).expand(3, 2)
    seen = {}

    def see(call, out):
        i, j = torch.arange(64)[:, None], torch.arange(64)
        causal = j <= i
        stream = causal & ((j < 4) | (i - j < 16))
        k, v = (x.repeat_interleave(2, dim=1) for x in (call.k, call.v))
        logits = call.q @ k.transpose(-1, -2) * call.scale
        full, windowed = (logits.masked_fill(~m, -torch.inf).softmax(-1) @ v for m in (causal, stream))
        a = alpha[call.layer].repeat_interleave(2)[:, None, None]
        seen[call.layer] = (out, (a * full + (1 - a) * windowed).transpose(1, 2))

    with attach(model, transforms=[GateMix(alpha, STREAM)], observers=[see]):
        model(ids)
    assert sorted(seen) == [0, 1, 2]
    for out, wanted in seen.values():
        torch.testing.assert_close(out, wanted)


def test_mixing_in_the_teacher_equals_a_double_batch_in_one_pass(model):
    """The reference runs both streams as one batch of 2B rows; two passes are the same function."""
    ids, alpha = tokens(2), torch.rand(3, 2, generator=torch.Generator().manual_seed(1)).requires_grad_()

    def double(call, attend):
        full, stream = attend(), call.attend_pattern(STREAM)
        teacher = full[:2].detach()
        a = alpha[call.layer].repeat_interleave(2)[:, None]
        return torch.cat([teacher, (1 - a) * stream[2:] + a * teacher])

    with frozen(model), attach(model, transforms=[double]):
        hidden = model.base_model(torch.cat([ids, ids]), use_cache=False).last_hidden_state
        loss = (hidden[:2].detach() - hidden[2:])[tail(ids)].square().mean()
        (loss + 0.05 * alpha.abs().mean()).backward()
    gates = optimiser(model)
    gates.alpha.data.copy_(alpha)
    with frozen(model):
        distill, _ = gates.backward(ids, tail(ids))
    assert distill == pytest.approx(loss.item(), rel=1e-4)
    torch.testing.assert_close(gates.alpha.grad, alpha.grad, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("source", ["teacher", "self"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_gradient_is_the_finite_difference(source, checkpointing):
    model = load_model("tiny-random-qwen3", dtype="float64")[0]
    ids = tokens()
    gates = optimiser(model, mix_source=source)
    gates.alpha = (0.2 + 0.6 * torch.rand(3, 2, dtype=torch.float64)).requires_grad_()

    def objective() -> float:
        distill, penalty = gates.backward(ids, tail(ids))
        return distill + gates.l1 * penalty

    with frozen(model, checkpointing=checkpointing):
        objective()
        slope, gates.alpha.grad = gates.alpha.grad.clone(), None
        for place in [(0, 0), (1, 1), (2, 0)]:
            with torch.no_grad():
                gates.alpha[place] += 1e-3
                above = objective()
                gates.alpha[place] -= 2e-3
                below = objective()
                gates.alpha[place] += 1e-3
            assert (above - below) / 2e-3 == pytest.approx(float(slope[place]), rel=0.02, abs=1e-5)


def test_gates_near_one_are_not_rounded_in_bf16():
    model = load_model("tiny-random-llama", dtype="bfloat16")[0]
    seen = {}
    with attach(
        model,
        transforms=[GateMix(torch.full((3, 2), 0.999), STREAM)],
        observers=[lambda c, o: seen.update({c.layer: o})],
    ):
        assert torch.isfinite(model(tokens()).logits).all()
    assert seen[0].dtype == torch.bfloat16
    gates = optimiser(model)
    gates.alpha.data.fill_(0.9)
    distill, _ = gates.backward(tokens(), tail(tokens()))
    assert distill > 0 and gates.alpha.grad.dtype == torch.float32 and gates.alpha.grad.abs().min() > 0


# the optimisation


def test_the_learning_rate_is_a_trapezoid():
    assert [round(trapezoid(k, 2000), 4) for k in (0, 39, 199, 399, 1000, 1600, 1800, 1999)] == [
        0.1,
        0.1,
        0.5,
        1,
        1,
        1,
        0.5,
        0.1,
    ]
    assert [trapezoid(k, 3) for k in range(3)] == [1.0, 1.0, 1.0]


def test_a_larger_penalty_closes_more_and_gates_stay_in_range(model):
    means = []
    for l1 in (0.0, 0.05, 5.0):
        gates = optimiser(model, l1=l1, lr=0.2)
        with frozen(model):
            for step in range(10):
                ids = tokens(seed=step)
                done = gates.step(ids, tail(ids))
                assert 0 <= float(done.alpha.min()) <= float(done.alpha.max()) <= 1
        means.append(float(gates.alpha.detach().mean()))
    assert means[0] == 1 and means[0] > means[1] > means[2]


def test_weights_get_no_gradient_and_everything_is_put_back():
    model, tokenizer = load_model("tiny-random-llama")
    model.train()
    model.lm_head.requires_grad_(False)
    wanted = [p.requires_grad for p in model.parameters()]
    weights = [p.clone() for p in model.parameters()]
    scores = duo_gates(model, tokenizer, steps=2, **SMALL)
    assert scores.kind == "kv" and scores.fingerprint == fingerprint(model) and scores.values.shape == (3, 2)
    assert [p.requires_grad for p in model.parameters()] == wanted and all(p.grad is None for p in model.parameters())
    assert all(torch.equal(a, b) for a, b in zip(weights, model.parameters(), strict=True))
    assert all(m.training for m in model.modules()) and not controllers(model)
    assert not any(getattr(m, "gradient_checkpointing", False) for m in model.modules())


def test_an_error_on_the_way_leaves_the_model_as_it_was():
    model, tokenizer = load_model("tiny-random-llama")
    calls = []

    def fails(module, args):
        calls.append(1)
        if len(calls) > 2:
            raise KeyError("on purpose")

    handle = model.model.norm.register_forward_pre_hook(fails)
    with pytest.raises(KeyError, match="on purpose"):
        duo_gates(model, tokenizer, steps=4, **SMALL)
    handle.remove()
    assert all(p.requires_grad for p in model.parameters()) and not controllers(model)
    assert not any(m.training for m in model.modules()) and model.config._attn_implementation == "sdpa"


def test_the_same_seed_gives_the_same_gates_whatever_is_recomputed():
    model, tokenizer = load_model("tiny-random-llama")
    runs = [
        duo_gates(model, tokenizer, steps=3, seed=7, gradient_checkpointing=c, **SMALL) for c in (True, False, False)
    ]
    assert torch.equal(runs[1].values, runs[2].values)
    torch.testing.assert_close(runs[0].values, runs[1].values)
    other = duo_gates(model, tokenizer, steps=3, seed=8, gradient_checkpointing=False, **SMALL)
    assert not torch.equal(other.values, runs[1].values)


@pytest.mark.parametrize("arch", ["gpt2", "gemma3", "qwen3", "mistral"])
def test_other_architectures_have_gates_too(arch):
    """GPT-2 has no rotary positions; layers of Gemma and Mistral have windows of their own."""
    model, tokenizer = load_model(f"tiny-random-{arch}")
    scores = duo_gates(model, tokenizer, steps=1, batch_size=2, **SMALL)
    assert scores.values.shape == (find_stack(model).layers, find_stack(model).kv_heads)
    assert duo_instant(model, tokenizer, prompts=1, length=300, sinks=4, window=16).values.abs().sum() > 0


def test_models_whose_heads_have_no_cache_of_their_own_are_refused():
    for arch, reason in (("deepseek-v3", "one latent"), ("bert", "causal")):
        model, tokenizer = load_model(f"tiny-random-{arch}")
        with pytest.raises(AttachError, match=reason):
            duo_gates(model, tokenizer, steps=1, **SMALL)
        assert not controllers(model)


@pytest.mark.parametrize(
    "options, text",
    [
        ({"steps": 0}, "steps is 0"),
        ({"lr": 0.0}, "lr is 0.0; it must be above 0"),
        ({"l1": -1.0}, "l1 is -1.0; it must be at least 0"),
        ({"sinks": -1}, "sinks is -1"),
        ({"window": 0}, "window is 0"),
        ({"mix_source": "both"}, "mix_source is 'both'"),
        ({"min_length": 321}, "min_length=321 and max_length=320"),
        ({"max_length": 5000}, "at most 4096"),
        ({"words": 400}, "lower passphrases= or words="),
        ({"passphrases": 0}, "phrases"),
        ({"batch_size": 0}, "batch_size=0"),
    ],
)
def test_options_without_sense_are_refused(options, text):
    model, tokenizer = load_model("tiny-random-llama")
    with pytest.raises(HeadwiseError, match=text) as caught:
        duo_gates(model, tokenizer, **{"steps": 1} | SMALL | options)
    assert isinstance(caught.value, ValueError)
    assert all(p.requires_grad for p in model.parameters()) and not controllers(model)


# the quick rankings


def test_the_instant_score_is_the_slope_of_the_answers_loss():
    model, tokenizer = load_model("tiny-random-llama", dtype="float64")
    options = dict(prompts=1, length=300, sinks=4, window=32, seed=3)
    scores = duo_instant(model, tokenizer, alpha=0.7, **options)
    unsigned = duo_instant(model, tokenizer, alpha=0.7, signed=False, **options)
    torch.testing.assert_close(unsigned.values, scores.values.abs())
    from headwise.score.duo import _answer_loss, _far_depths, make_passkey

    pattern = SinkWindow(4, 32)
    (depth,) = _far_depths(1, pattern, 300)
    prompt = make_passkey(tokenizer, length=300, depth=depth, generator=torch.Generator().manual_seed(3))
    start, stop = prompt.needle_span
    assert start >= 4 and stop < len(prompt) - 32
    for place in [(0, 1), (2, 0)]:
        losses = []
        for shift in (1e-2, -1e-2):
            gates = torch.full((3, 2), 0.7, dtype=torch.float64)
            gates[place] += shift
            with torch.no_grad(), attach(model, transforms=[GateMix(gates, pattern)]):
                losses.append(float(_answer_loss(model, prompt)))
        assert -(losses[0] - losses[1]) / 2e-2 == pytest.approx(scores.values[place].item(), rel=0.05, abs=1e-5)


def test_the_instant_score_of_text_is_the_slope_of_its_loss():
    from headwise.tasks import english
    from headwise.tasks.texts import draw_tokens

    model, tokenizer = load_model("tiny-random-llama", dtype="float64")
    scores = duo_instant(model, tokenizer, target="text", prompts=1, length=80, sinks=4, window=16, seed=3)
    assert scores.meta["target"] == "text" and scores.data == "1 texts of 80 tokens"
    ids = torch.tensor([draw_tokens(tokenizer, english(), 80, torch.Generator().manual_seed(3))])

    def loss(**gates):
        with torch.no_grad(), attach(model, **gates):
            said = model(ids).logits[0].log_softmax(-1)
        return -said[torch.arange(19, 79), ids[0, 20:]].mean().item()

    for place in [(0, 1), (2, 0)]:
        found = []
        for shift in (1e-2, -1e-2):
            gates = torch.full((3, 2), 0.7, dtype=torch.float64)
            gates[place] += shift
            found.append(loss(transforms=[GateMix(gates, SinkWindow(4, 16))]))
        assert -(found[0] - found[1]) / 2e-2 == pytest.approx(scores.values[place].item(), rel=0.05, abs=1e-5)


def test_stream_difference_is_the_move_of_the_layers_output(model):
    _, tokenizer = load_model("tiny-random-llama")
    scores = stream_difference(model, tokenizer, texts=1, length=60, sinks=4, window=16, seed=2)
    from headwise.tasks.texts import draw_tokens, english

    ids = torch.tensor([draw_tokens(tokenizer, english(), 60, torch.Generator().manual_seed(2))])
    outputs = []
    for keep in ("L0K0", "L0K0,L0K1"):
        plan = HeadPlan.from_set(_heads(keep), STREAM, 3, 2)
        handle = model.model.layers[0].self_attn.o_proj.register_forward_hook(lambda m, a, out: outputs.append(out[0]))
        with torch.no_grad(), attach(model, plan=plan):
            model(ids)
        handle.remove()
    moved = (outputs[1] - outputs[0])[20:].norm(dim=-1).mean()
    assert scores.values[0, 1].item() == pytest.approx(moved.item(), rel=1e-4)
    assert torch.equal(outputs[0][:20], outputs[1][:20])


def _heads(text):
    from headwise.units import HeadSet

    return HeadSet.parse(text)


def test_two_rankings_mix():
    model, tokenizer = load_model("tiny-random-llama")
    recall = duo_instant(model, tokenizer, prompts=1, length=300, sinks=4, window=32)
    quality = stream_difference(model, tokenizer, texts=1, length=100, sinks=4, window=32)
    mixed = HeadScores.mean([recall.normalized(), quality.normalized()])
    assert mixed.fingerprint == fingerprint(model)
    torch.testing.assert_close(
        mixed.values, (recall.values / recall.values.max() + quality.values / quality.values.max()) / 2
    )


@pytest.mark.parametrize(
    "options, text",
    [
        ({"alpha": 1.5}, "alpha is 1.5"),
        ({"prompts": 0}, "prompts is 0"),
        ({"target": "poems"}, "target is 'poems'"),
        ({"length": 144}, "sinks \\+ window 144"),
        ({"sinks": -2}, "sinks is -2"),
    ],
)
def test_the_instant_score_refuses(options, text):
    model, tokenizer = load_model("tiny-random-llama")
    with pytest.raises(ValueError, match=text):
        duo_instant(model, tokenizer, **options)


def test_stream_difference_refuses_texts_within_the_window():
    model, tokenizer = load_model("tiny-random-llama")
    with pytest.raises(ScoreError, match="lengthen the text"):
        stream_difference(model, tokenizer, length=100)
    with pytest.raises(ScoreError, match="texts is 0"):
        stream_difference(model, tokenizer, texts=0)


# the real model


@pytest.mark.smollm2
@pytest.mark.slow
def test_the_instant_score_finds_known_retrieval_heads():
    model, tokenizer = load_model("smollm2")
    top = {str(unit) for unit in duo_instant(model, tokenizer, length=512).top(23)}
    assert len(top & {"L18K2", "L20K2", "L17K1", "L23K0", "L21K2"}) >= 3


def test_phrases_that_do_not_fit_name_the_remedy():
    model, tokenizer = load_model("tiny-random-llama")
    with pytest.raises((ScoreError, TaskError), match="passphrases"):
        duo_gates(model, tokenizer, steps=1)
