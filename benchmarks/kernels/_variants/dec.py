import os
import sys

import torch

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import cases
from measure import *
from torch.profiler import ProfilerActivity, profile

from headwise.attention.triton import _host, plan_splits, ragged_decode

roof = ceilings()
print(roof)
lengths = dict(cases.decode_lengths(True))["duo50_131k_B1"]
size = 4 * D * int(lengths.sum())
layers = [cases.decode_inputs(lengths) for _ in range(8)]
l32 = layers[0][4]
real = _host.hopper


def go(block, progs, stages, pdl):
    _host.hopper = real if pdl else (lambda x: False)

    def run():
        plan = plan_splits(l32, block=block, programs=progs, stages=stages)
        return [ragged_decode(q, *p, l32, plan=plan) for q, _, _, p, _, _ in layers]

    ms = graph_milliseconds(run) / len(layers)
    print(
        "block",
        block,
        "programs",
        progs,
        "stages",
        stages,
        "pdl",
        pdl,
        f"us {ms * 1e3:.1f} of_copy {size / ms / 1e9 / roof['copy_tbs']:.3f}",
        flush=True,
    )
    return run


for cfg in (
    (64, 264, 3, False),
    (64, 264, 3, True),
    (64, 264, 4, True),
    (64, 396, 3, True),
    (64, 258, 3, True),
    (32, 528, 4, True),
    (128, 132, 3, True),
    (128, 264, 2, True),
    (32, 264, 4, True),
    (32, 264, 6, True),
    (64, 132, 5, True),
):
    try:
        run = go(*cfg)
    except Exception as e:
        print(cfg, "FAILED", str(e)[-200:])
        continue
run = go(64, 264, 3, False)
with profile(activities=[ProfilerActivity.CUDA]) as prof:
    for _ in range(3):
        run()
    torch.cuda.synchronize()
print(prof.key_averages().table(sort_by="cuda_time_total", row_limit=6, max_name_column_width=40)[:2500])
