"""VHR and VAR beside a KV plan: in decode steps whose books stand on the device, and as CUDA graphs, they do what they do without."""

import pytest
import torch

from headwise import HeadPlan, HeadwiseCache
from headwise.attach import attach
from headwise.attach.images import decoder_stack
from headwise.attention.triton import _host
from headwise.plan import SinkWindow
from headwise.steer import _var_rows as few_rows
from headwise.steer.var import VAR
from headwise.steer.vhr import VHR
from vlm_helper import llava, prompt

RULES = {
    "vhr": VHR(layers=(1, 3)),
    "var": VAR(dims=(5,), tau=1.2, layers=(1, 2, 3), rho=0.3, minimum_mass=0.05),
    "var, all heads": VAR(dims=(5,), tau=1.2, layers=(1, 2), centric=False, move=1.0),
}
PADDED = prompt(["img", 5, 6, 7], [3, 4, "img", 8, 9, 10, 11])
ALONE = prompt([3, "img", 5, 6, 7])
BOTH = pytest.mark.parametrize("inputs", [PADDED, ALONE], ids=["padded", "alone"])
EACH = pytest.mark.parametrize("rule", RULES.values(), ids=RULES)


@torch.no_grad()
def steps(model, inputs, rule, *, plan=None, everywhere=False, capture=False, count=8):
    """Logits of forced decode steps, what was edited, and the cache's steps."""
    inputs = {k: v.to(model.device) for k, v in inputs.items()}
    inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
    mask, said, cache = inputs["attention_mask"], [], None if plan is None else HeadwiseCache(plan)
    position = mask.sum(1, keepdim=True) - 1
    handle = None if plan is None else attach(model, plan=plan, stack=decoder_stack(model), capture=capture)
    try:
        if handle is not None:
            handle.controller.steps_everywhere = everywhere
        with rule.attach(model) as running:
            out = model(**inputs, use_cache=True, past_key_values=cache)
            for step in range(count):
                mask, position = torch.cat([mask, mask.new_ones(len(mask), 1)], 1), position + 1
                ids = torch.full((len(mask), 1), 20 + step, device=mask.device)
                options = {"attention_mask": mask, "position_ids": position, "past_key_values": out.past_key_values}
                out = model(input_ids=ids, **options)
                said.append(out.logits[:, -1].float().cpu())
            replays = 0 if not capture else handle.controller._capture.replays
            return torch.stack(said), dict(getattr(running, "selected", {})), (cache and cache.steps, replays)
    finally:
        if handle is not None:
            handle.detach()


def full(model):
    return HeadPlan.full(
        layers=model.config.text_config.num_hidden_layers, kv_heads=model.config.text_config.num_key_value_heads
    )


@BOTH
@EACH
def test_steps_on_the_device_are_the_plain_steps(rule, inputs):
    model = llava()
    plain, counted, _ = steps(model, inputs, rule)
    under, also, (books, _) = steps(model, inputs, rule, plan=full(model), everywhere=True)
    assert books is not None and books.count >= 7
    torch.testing.assert_close(under, plain, atol=1e-5, rtol=1e-5)
    assert counted == also


def test_windows_beside_the_rules():
    """Under a plan that lets tokens go, the same on the host and on the device."""
    model = llava()
    plan = HeadPlan(patterns=((SinkWindow(20, 4),) * 2,) * 4)
    for rule in RULES.values():
        host, counted, _ = steps(model, PADDED, rule, plan=plan)
        device, also, (books, _) = steps(model, PADDED, rule, plan=plan, everywhere=True)
        assert books is not None and counted == also
        torch.testing.assert_close(device, host, atol=1e-5, rtol=1e-5)


@BOTH
@pytest.mark.parametrize("options", [{}, {"centric": False, "move": 1.0}], ids=["centric", "all"])
def test_the_kernel_reads_addresses(options, inputs, monkeypatch):
    pytest.importorskip("triton", reason="triton is not installed")
    if not (torch.cuda.is_available() or _host.interpreting()):
        pytest.skip("needs a CUDA device, or TRITON_INTERPRET=1")
    model = llava().to("cuda" if torch.cuda.is_available() else "cpu")
    rule = VAR(**{"dims": (5,), "tau": 1.2, "layers": (1, 2, 3), "rho": 0.3, "minimum_mass": 0.05} | options)
    if not torch.cuda.is_available():  # in the interpreter, addresses are the CPU's
        monkeypatch.setattr("headwise.steps.unable", lambda x: None)
    served, by_address = [], few_rows.by_address
    monkeypatch.setattr(few_rows, "by_address", lambda call: served.append(by_address(call)) or served[-1])
    plain, counted, _ = steps(model, inputs, rule)
    served.clear()
    found, also, _ = steps(model, inputs, rule, plan=full(model), everywhere=True)
    assert True in served and sum(counted.values()) and counted == also
    torch.testing.assert_close(found, plain, atol=2e-4, rtol=2e-4)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@BOTH
@EACH
def test_captured_steps_are_the_plain_steps(rule, inputs):
    model = llava().to("cuda")
    plain, counted, _ = steps(model, inputs, rule, count=12)
    graph, also, (_, replays) = steps(model, inputs, rule, plan=full(model), capture=True, count=12)
    assert replays >= 9 and counted == also
    torch.testing.assert_close(graph, plain, atol=2e-4, rtol=2e-4)
