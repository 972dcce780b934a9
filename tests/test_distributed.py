"""Tensor parallelism: head numbers of edits and plans are global, each rank holds and serves its own share."""

import os

import pytest
import torch

import headwise
from distributed_helper import run_distributed
from headwise import Edit, Elastic, Full, HeadPlan, HeadSet, SinkWindow
from tiny_helper import random, tiny, tokens

pytestmark = pytest.mark.distributed

PLAN = HeadPlan(
    patterns=((Full(), SinkWindow(1, 4)), (SinkWindow(2, 3), Full()), (SinkWindow(0, 5), Elastic(1, 2, 0.25)))
)
EDITS = {
    "first rank": Edit.zero(HeadSet.parse("L0H1,L1H0")),
    "second rank": Edit.zero(HeadSet.parse("L0H2,L1H3")),
    "both ranks": Edit.replace(HeadSet.parse("L0H1,L0H3,L2H0,L2H2:0.5"), random(4, 16)),
    "uniform": Edit.uniform(HeadSet.parse("L1H1,L1H2")),
    "reweight": Edit.reweight(HeadSet.parse("L1H3,L2H2"), [headwise.KeyGroup("first", "0:2", 0.25)]),
}


@torch.no_grad()
def steps(model, ids, **attach):
    """Logits of a prompt of 9 and single tokens behind it, and the cache."""
    out, parts = None, []
    with headwise.attach(model, **attach):
        for begin, end in ((0, 9), (9, 10), (10, 11), (11, 12)):
            out = model(ids[:, begin:end], past_key_values=out and out.past_key_values, use_cache=True)
            parts.append(out.logits)
    return torch.cat(parts, dim=1), out.past_key_values


@torch.no_grad()
def everything(model):
    """What a single process and every rank compute alike."""
    ids, found = tokens(2, 12), {}
    for name, edit in EDITS.items():
        with headwise.attach(model, edits=edit):
            found[name] = model(ids).logits
    found["plain"] = model(ids).logits
    found["plan"], cache = steps(model, ids, plan=PLAN)
    found["plan and edits"], _ = steps(model, ids, plan=PLAN, edits=list(EDITS.values()))
    found["generated"] = torch.zeros(1)
    with headwise.attach(model, plan=PLAN, edits=EDITS["second rank"]):
        found["generated"] = model.generate(ids, max_new_tokens=5, min_new_tokens=5, do_sample=False).double()
    with headwise.observe(model, "entropy", "output") as record:
        model(ids)
    return found, record, cache


def on_rank(rank, world_size, folder):
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(f"{folder}/model", tp_plan="auto", attn_implementation="sdpa").eval()
    shard = model.model.layers[0].self_attn.q_proj.weight
    assert shard.to_local().shape[0] == 64 // world_size, "the model is not split"
    want = torch.load(f"{folder}/want.pt", weights_only=True)
    found, record, cache = everything(model)
    for name, value in found.items():
        value = value.full_tensor() if hasattr(value, "full_tensor") else value
        torch.testing.assert_close(
            value, want[name], atol=1e-4, rtol=1e-4, msg=lambda text, name=name: f"{name}: {text}"
        )
    heads = slice(2 * rank, 2 * rank + 2)  # a record holds the heads of its rank
    torch.testing.assert_close(record.table("entropy"), want["entropy"][:, :, heads], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(record.output(1), want["output"][:, :, heads], atol=1e-4, rtol=1e-4)
    held = [[str(store.pattern) for store in layer.stores] for layer in cache.layers]
    assert held == [[str(row[rank])] for row in PLAN.patterns] and all(layer.kv_heads == 1 for layer in cache.layers)
    assert cache.nbytes < want["bytes"].item()
    assert headwise.fingerprint(model) == headwise.fingerprint(tiny())


def test_tensor_parallel_ranks_say_what_one_process_says(tmp_path):
    model = tiny()
    model.save_pretrained(tmp_path / "model")
    found, record, cache = everything(model)
    assert all(not torch.equal(found[name], found["plain"]) for name in found if name not in ("plain", "generated"))
    found |= {"entropy": record.table("entropy"), "output": record.output(1), "bytes": torch.tensor(cache.nbytes)}
    torch.save(found, tmp_path / "want.pt")
    run_distributed(on_rank, 2, str(tmp_path), seconds=120)
