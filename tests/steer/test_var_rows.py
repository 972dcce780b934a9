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
    if dtype == torch.bfloat16 and device == "cpu":
        pytest.skip("Triton's interpreter multiplies the bits of bfloat16 as integers in a dot product")
    model, rule = llava().to(device, dtype), VAR(**RULE | options)
    fast, counted = answer(model, inputs, rule, ("kernel",), monkeypatch)
    rows, also = answer(
        model, inputs, rule, ("row",), monkeypatch
    )  # the same prompt: in bfloat16 sinks may flip at tau
    tolerance = 2e-4 if dtype == torch.float32 else 5e-2
    torch.testing.assert_close(fast, rows, atol=tolerance, rtol=tolerance)
    if dtype == torch.float32:
        assert counted == also


def one_call(B, H, K, M, D, dtype, device, *, masked=False, table=False, seed=0):
    """A decode step of one layer as the kernel sees it."""
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(B, h, n, D, generator=generator).to(device, dtype) for h, n in ((H, 1), (K, M), (K, M)))
    mask, addresses = None, None
    if masked:
        mask = torch.rand(B, 1, 1, M, generator=generator) < 0.7
        if B > 1:
            mask[-1] = False  # a row that sees nothing
        mask = mask.to(device)
    if table:
        starts = [[x[b, h].data_ptr() for b in range(B) for h in range(K)] for x in (k, v)]
        k_ptr, v_ptr = (torch.tensor(x, device=device).view(B, K) for x in starts)
        filled = torch.full((B, K), M, dtype=torch.int32, device=device)
        addresses = SimpleNamespace(k_ptr=k_ptr, v_ptr=v_ptr, filled=filled)
    return SimpleNamespace(
        q=q, k=k, v=v, mask=mask, table=addresses, scale=D**-0.5, first_column=0, past=M - 1, options={}
    )


def by_the_map(call, codes, heads, rho, move=0.6, minimum_mass=0.2):
    """The same by whole attention maps, in float64: outputs (B, 1, H, D), and how many heads were edited."""
    q, k, v = (x.double() for x in (call.q, call.k, call.v))
    group, M = q.shape[1] // k.shape[1], k.shape[2]
    k, v = (x.repeat_interleave(group, 1) for x in (k, v))
    logits = q @ k.mT * call.scale
    if call.mask is not None:
        logits = logits.masked_fill(~call.mask, -torch.inf)
    weights = logits.softmax(-1).nan_to_num(0.0)
    code = torch.nn.functional.pad(codes, (0, M - codes.shape[1]))
    image, sinks = (code & 1) != 0, (code & 2) != 0
    moved = var_module.redistribute_map(
        weights, image, sinks, move=move, rho=rho or 0.0, minimum_mass=minimum_mass, centric=rho is not None
    )
    edited = (moved != weights).any(-1, keepdim=True)
    if heads is not None:
        edited &= heads.bool()[:, None, None]
    return (torch.where(edited, moved, weights) @ v).transpose(1, 2), int(edited.sum())


SHAPES = {  # B, H, K, M, D, shares
    "one share": (1, 2, 2, 40, 16, 1),
    "shares of several blocks": (2, 2, 2, 300, 32, 2),
    "more shares than blocks": (2, 4, 2, 70, 64, 5),
    "many heads a kv head": (1, 12, 2, 130, 80, 3),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("way", ["plain", "masked", "table"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("rho", [None, 0.8])
@torch.no_grad()
def test_a_step_is_the_edited_map(shape, way, rho, dtype):
    """Each share of the keys by itself and joined, against the naive map; twice, as the room is used again and again."""
    device = kernel_device()
    if dtype == torch.bfloat16 and device == "cpu":
        pytest.skip("Triton's interpreter multiplies the bits of bfloat16 as integers in a dot product")
    B, H, K, M, D, shares = shape
    call = one_call(B, H, K, M, D, dtype, device, masked=way == "masked", table=way == "table")
    codes = torch.zeros(B, M - 3, dtype=torch.uint8, device=device)  # three tokens were decoded
    codes[:, 1 : M // 2], codes[:, 0], codes[:, [3, 7]] = 1, 2, 3
    codes[0, 7] = 1
    heads = None if rho is None else (torch.arange(H, device=device) % 3 != 1).to(torch.uint8)
    count = torch.zeros((), dtype=torch.long, device=device)
    room = few_rows.Room.of(call.q, K, shares)
    room.parts.fill_(float("nan"))
    step = few_rows.Step(call, codes, heads, count, room, move=0.6, rho=rho, minimum_mass=0.2)
    wanted, edited = by_the_map(call, codes, heads, rho)
    tolerance = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 2e-2}[dtype]
    for turn in (1, 2):
        assert step.fits(call)
        torch.testing.assert_close(step(call).double(), wanted, atol=tolerance, rtol=tolerance)
        assert int(room.arrived.abs().sum()) == 0
        if dtype == torch.float32:
            assert int(count) == turn * edited and edited


def test_a_step_serves_calls_like_its_first_alone():
    call = one_call(2, 4, 2, 40, 16, torch.float32, "cpu", masked=True)
    codes, count = torch.zeros(2, 30, dtype=torch.uint8), torch.zeros((), dtype=torch.long)
    room = few_rows.Room.of(call.q, 2, 2)
    step = few_rows.Step(call, codes, None, count, room, move=0.6, rho=0.8, minimum_mass=0.2)
    with torch.no_grad():
        assert step.fits(call)
        longer = one_call(2, 4, 2, 41, 16, torch.float32, "cpu", masked=True)
        assert step.fits(longer)
        for name, value in (
            ("mask", None),
            ("first_column", 1),
            ("q", torch.zeros(1, 4, 1, 16)),
            ("k", torch.zeros(2, 40, 2, 16).transpose(1, 2)),
            ("options", {"dropout": 0.1}),
        ):
            assert not step.fits(SimpleNamespace(**{**vars(call), name: value})), name
    assert not step.fits(call)  # a gradient may be wanted


def test_layers_are_watched_while_a_prompt_is_read_alone():
    model = llava()
    blocks = model.model.language_model.layers
    with VAR(**RULE).attach(model) as running, torch.no_grad():
        out = model(**ALONE, use_cache=True)
        watched = [len(b._forward_pre_hooks) for b in blocks]
        model(input_ids=torch.tensor([[20]]), past_key_values=out.past_key_values)
        assert watched == [0, 1, 1, 1] and not any(b._forward_pre_hooks for b in blocks)
        kept = {layer: sinks.clone() for layer, sinks in running.sinks.items()}
        model(input_ids=torch.tensor([[5, 6]]), past_key_values=out.past_key_values)  # a chunk is read again
        assert [len(b._forward_pre_hooks) for b in blocks] == watched
        assert all(running.sinks[layer].shape[1] > kept[layer].shape[1] for layer in kept)
    assert not any(b._forward_pre_hooks for b in blocks)


def test_the_kernel_serves_a_decode_step(monkeypatch):
    device, served = kernel_device(), []
    monkeypatch.setattr(few_rows, "serves", lambda call: served.append(SERVES(call)) or served[-1])
    model = llava().to(device)
    with VAR(**RULE).attach(model), torch.no_grad():
        made = model.generate(
            **{k: v.to(device) for k, v in ALONE.items()}, max_new_tokens=3, do_sample=False, pad_token_id=256
        )
    assert True in served and made.shape[0] == 1
