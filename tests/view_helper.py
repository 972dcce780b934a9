"""A folder with one artifact of each kind, for a tiny model."""

import torch

from headwise.attach import fingerprint
from headwise.edits import Edit, HeadEdits
from headwise.hub import load_model
from headwise.plan import HeadPlan, SinkWindow
from headwise.units import HeadScores, HeadSet

LLAMA = "tiny-random-llama"


def folder_of(path, model=LLAMA):
    loaded, _ = load_model(model)
    made_for = fingerprint(loaded)
    generator = torch.Generator().manual_seed(0)
    shape = made_for.layers, made_for.heads
    values = torch.rand(shape, generator=generator)
    HeadScores(values=values, method="alpha", data="toy", fingerprint=made_for).save(path / "alpha.safetensors")
    noisy = values + 0.3 * torch.rand(shape, generator=generator)
    HeadScores(values=noisy, method="beta", data="toy", fingerprint=made_for).save(path / "beta.safetensors")
    kv = torch.rand(made_for.layers, made_for.kv_heads, generator=generator)
    gates = HeadScores(values=kv, kind="kv", method="gates", fingerprint=made_for)
    gates.save(path / "gates.safetensors")
    HeadSet.parse("L0H1,L2H3").save(path / "set.safetensors", fingerprint=made_for)
    labels = {"layers": made_for.layers, "kv_heads": made_for.kv_heads, "fingerprint": made_for}
    HeadPlan.from_set(gates.top(2), SinkWindow(1, 7), method="duo", **labels).save(path / "plan.json")
    HeadPlan.from_set(gates.top(4), SinkWindow(1, 7), prefill="dense", **labels).save(path / "wide.json")
    HeadEdits.of(Edit.zero(HeadSet.parse("L1H2")), Edit.scale(HeadSet.parse("L0H0"), 2.0), fingerprint=made_for).save(
        path / "edits.json"
    )
    return loaded
