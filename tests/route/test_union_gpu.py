"""BAM and UoE on a GPU: the same numbers as on the CPU, and bfloat16 training steps."""

import copy

import pytest
import torch

from headwise.route.bam import bam
from headwise.route.uoe import uoe
from tiny_helper import tiny, tokens


def built(kind):
    model = tiny("llama")
    if kind == "uoe":
        return uoe(model, None)
    return bam([model, copy.deepcopy(model)], None, kv=kind)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["uoe", "expert", "shared"])
def test_the_gpu_says_what_the_cpu_says(kind):
    made, ids = built(kind), tokens(2, 33)
    with torch.no_grad():
        want = made.model(ids).logits
        model = made.model.to("cuda")
        out = model(ids[:, :20].cuda(), use_cache=True)
        rest = model(ids[:, 20:].cuda(), past_key_values=out.past_key_values).logits
    torch.testing.assert_close(torch.cat([out.logits, rest], 1).cpu(), want, rtol=1e-3, atol=1e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["uoe", "expert", "shared"])
def test_autocast_steps_train(kind):
    model, ids = built(kind).model.to("cuda").train(), tokens(2, 40).cuda()
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=1e-3), []
    for _ in range(8):
        with torch.autocast("cuda", dtype=torch.bfloat16):
            loss = model(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]


@pytest.mark.gpu
def test_long_rows_generate_in_bfloat16():
    made = built("uoe")
    model = made.model.to("cuda", torch.bfloat16)
    ids = tokens(2, 1500).cuda()
    out = model.generate(ids, max_new_tokens=4, do_sample=False, eos_token_id=None, return_dict_in_generate=True)
    assert out.sequences.shape == (2, 1504) and made.kv_ratio(out.past_key_values) < 0.9
