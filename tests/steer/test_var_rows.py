"""VAR by the weights of a few rows, and by one kernel for a decode step: both give what the partial sums give."""

import importlib
from types import SimpleNamespace

import pytest
import torch

from headwise.attach import attach
from headwise.attention.triton import _host
from headwise.plan import HeadPlan, SinkWindow
from headwise.steer import _var_rows as few_rows
from headwise.steer.var import VAR
from headwise.units import HeadSet
from vlm_helper import llava, prompt

var_module = importlib.import_module("headwise.steer.var")
RULE = {"dims": (5,), "tau": 1.2, "layers": (1, 2, 3), "rho": 0.3, "minimum_mass": 0.05}
RULES = {
    "centric": {},
    "all": {"centric": False, "move": 1.0},
    "some heads": {"heads": HeadSet.parse("L1H0,L2H3"), "centric": False},
    "never": {"rho": 1.5},
}
PADDED = prompt(["img", 5, 6, 7], [3, 4, "img", 8, 9, 10, 11])
ALONE = prompt([3, "img", 5, 6, 7])


@torch.no_grad()
def answer(model, inputs, rule, ways, monkeypatch, steps=3):
    """Logits of the steps behind a prompt, and how many (row, query, head) were edited, when only these ways are open."""
    monkeypatch.setattr(few_rows, "serves", SERVES if "kernel" in ways else lambda call: False)
    monkeypatch.setattr(few_rows, "is_dense", IS_DENSE if ways else lambda call: False)
    inputs, said = {k: v.to(model.device) for k, v in inputs.items()}, []
    inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
    mask = inputs["attention_mask"]
    with rule.attach(model) as running:
        out = model(**inputs, use_cache=True)
        for step in range(steps):
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
            ids = torch.full((len(mask), 1), 20 + step, device=mask.device)
            out = model(input_ids=ids, attention_mask=mask, past_key_values=out.past_key_values)
            said.append(out.logits[:, -1])
        return torch.stack(said).float().cpu(), running.selected


SERVES, IS_DENSE = few_rows.serves, few_rows.is_dense


@pytest.mark.parametrize("inputs", [PADDED, ALONE], ids=["padded", "alone"])
@pytest.mark.parametrize("options", RULES.values(), ids=RULES)
def test_the_row_is_the_partial_sums(options, inputs, monkeypatch):
    model, rule = llava(), VAR(**RULE | options)
    row, counted = answer(model, inputs, rule, ("row",), monkeypatch)
    parts, also = answer(model, inputs, rule, (), monkeypatch)
    torch.testing.assert_close(row, parts, atol=1e-5, rtol=1e-5)
    assert counted == also and bool(sum(counted.values())) is ("rho" not in options)


def test_rows_serve_dense_keys_only(monkeypatch):
    seen = []
    monkeypatch.setattr(
        few_rows, "is_dense", lambda call: seen.append((call.groups is None, IS_DENSE(call))) or seen[-1][1]
    )
    model = llava()
    with VAR(**RULE).attach(model), torch.no_grad():
        model.generate(**ALONE, max_new_tokens=2, do_sample=False, pad_token_id=256)
        assert set(seen) == {(True, True)}
        seen.clear()
        with attach(model, plan=HeadPlan(patterns=((SinkWindow(2, 30),) * 2,) * 4), stack="language_model"):
            model.generate(**ALONE, max_new_tokens=2, do_sample=False, pad_token_id=256)
        assert set(seen) == {(False, False)}


@pytest.mark.parametrize("block", [1, 1 << 11])
@torch.no_grad()
def test_blocks_of_rows_change_nothing(block, monkeypatch):
    model, rule = llava(), VAR(**RULE)
    with rule.attach(model):
        whole = model(**PADDED).logits
        monkeypatch.setattr(var_module, "BLOCK", block)
        torch.testing.assert_close(model(**PADDED).logits, whole)


def test_sinks_that_leave_next_to_nothing_give_no_nan():
    weights = torch.tensor([1.0, 1e-42, 0.0]).view(1, 1, 1, 3)  # a sink, the rest of the image, text
    groups = torch.tensor([[1.0, 0, 0], [0, 1, 0], [1, 1, 0]])[None]
    call = SimpleNamespace(v=torch.tensor([[2.0], [3.0], [5.0]]).view(1, 1, 3, 1))
    rows, chosen = few_rows.Rows(call, weights, groups), torch.ones(1, 1, 1, dtype=torch.bool)
    masses = rows.masses()
    moved = rows.moved(torch.full((1, 1, 1, 1), 2.0), var_module._ratio(masses, chosen), chosen, 1.0)
    assert masses["rest"] > 0 and bool(moved.isfinite().all()) and abs(float(moved)) < 1e-3


def test_gradients_flow_as_through_the_partial_sums(monkeypatch):
    grads = []
    for dense in (IS_DENSE, lambda call: False):
        monkeypatch.setattr(few_rows, "is_dense", dense)
        model = llava()
        with VAR(**RULE).attach(model):
            model(**PADDED).logits.square().mean().backward()
        grads.append(model.model.language_model.layers[0].self_attn.v_proj.weight.grad)
    torch.testing.assert_close(*grads)


def kernel_device():
    pytest.importorskip("triton", reason="triton is not installed")
    if not (torch.cuda.is_available() or _host.interpreting()):
        pytest.skip("needs a CUDA device, or TRITON_INTERPRET=1")
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("inputs", [PADDED, ALONE], ids=["padded", "alone"])
@pytest.mark.parametrize("options", RULES.values(), ids=RULES)
def test_the_kernel_is_the_rows(options, inputs, dtype, monkeypatch):
    device = kernel_device()
    model, rule = llava().to(device, dtype), VAR(**RULE | options)
    fast, counted = answer(model, inputs, rule, ("kernel",), monkeypatch)
    rows, also = answer(
        model, inputs, rule, ("row",), monkeypatch
    )  # the same prompt: in bfloat16 sinks may flip at tau
    tolerance = 2e-4 if dtype == torch.float32 else 5e-2
    torch.testing.assert_close(fast, rows, atol=tolerance, rtol=tolerance)
    if dtype == torch.float32:
        assert counted == also


def test_the_kernel_serves_a_decode_step(monkeypatch):
    device, served = kernel_device(), []
    monkeypatch.setattr(few_rows, "serves", lambda call: served.append(SERVES(call)) or served[-1])
    model = llava().to(device)
    with VAR(**RULE).attach(model), torch.no_grad():
        made = model.generate(
            **{k: v.to(device) for k, v in ALONE.items()}, max_new_tokens=3, do_sample=False, pad_token_id=256
        )
    assert True in served and made.shape[0] == 1
