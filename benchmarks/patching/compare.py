"""Patching side by side with TransformerLens and nnsight: same weights, same prompts, agreement first, then time.

    python -m venv peers && peers/bin/pip install torch==2.13.0 transformer-lens==4.3.0 nnsight==0.8.1
    PYTHONPATH=src peers/bin/python benchmarks/patching/compare.py --out benchmarks/results/cpu/peers_patching.json

The peers spend one forward pass per head. Their loops are timed on every `--every`-th head and scaled to all; the headwise sweep
is timed whole. Nothing is printed as a speed-up unless the numbers agree to 1e-4 of the largest.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import statistics
import tempfile
import time

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from headwise.hub.tiny import byte_tokenizer
from headwise.score._patching import column_mask, record
from headwise.score._paths import Paths
from headwise.score._sweep import Sweep
from headwise.score.logit_attribution import attribute
from headwise.tasks.pairs import PromptPairs, make_induction
from headwise.units import HeadSet


def gpt2_small() -> GPT2LMHeadModel:
    """Random weights of GPT-2 small's shape, a little wider spread so that heads matter."""
    torch.manual_seed(0)
    config = GPT2Config(initializer_range=0.05, bos_token_id=None, eos_token_id=None)
    return GPT2LMHeadModel._from_config(config, attn_implementation="sdpa").eval()


def prompts(count: int, tokens: int, vocabulary: int) -> PromptPairs:
    """Pairs of one length, without padding: the peers' loops take no mask."""
    made = make_induction(vocabulary, count=4 * count, length=tokens, seed=0)
    rows = [made.ids[i][made.mask[i]][-tokens:].tolist() for i in range(count)]
    twins = [made.corrupt[i][made.mask[i]][-tokens:].tolist() for i in range(count)]
    return PromptPairs.of(rows, twins, made.answers[:count].tolist(), made.contrasts[:count].tolist())


def metric(logits: torch.Tensor, pairs: PromptPairs) -> torch.Tensor:
    """LD (B,) of logits (B, N, V)."""
    rows = torch.arange(len(pairs))
    return logits[rows, -1, pairs.answers] - logits[rows, -1, pairs.contrasts]


def timed(function, repeats: int = 1):
    """(result, seconds): the median of some runs."""
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        result = function()
        seconds.append(time.perf_counter() - start)
    return result, statistics.median(seconds)


def lens_bridge(model, name):
    from transformer_lens.model_bridge import TransformerBridge
    from transformers import AutoTokenizer

    with tempfile.TemporaryDirectory() as folder:  # a bridge wants a tokenizer that came from a folder
        byte_tokenizer().save_pretrained(folder)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        return TransformerBridge.boot_transformers(
            name, hf_model=copy.deepcopy(model), tokenizer=tokenizer, device="cpu"
        )


@torch.no_grad()
def lens_patching(bridge, pairs, units):
    """TransformerLens: z of one head from the corrupted run, one forward pass per head."""
    _, cache = bridge.run_with_cache(pairs.corrupt)
    found, start = [], time.perf_counter()
    for layer, head in units:

        def put(z, hook, layer=layer, head=head):
            z = z.clone()
            z[:, :, head] = cache[f"blocks.{layer}.attn.hook_z"][:, :, head]
            return z

        logits = bridge.run_with_hooks(pairs.ids, fwd_hooks=[(f"blocks.{layer}.attn.hook_z", put)])
        found.append(metric(logits, pairs))
    return torch.stack(found), time.perf_counter() - start


@torch.no_grad()
def lens_paths(bridge, pairs, units, receiver):
    """TransformerLens: the direct path of one head into one later head's query, one forward pass per sender."""
    from transformer_lens.patching import _make_direct_path_hook, _split_qkv_input

    _, clean = bridge.run_with_cache(pairs.ids)
    _, other = bridge.run_with_cache(pairs.corrupt)
    found, start = [], time.perf_counter()
    with _split_qkv_input(bridge):
        for layer, head in units:
            name = f"blocks.{layer}.attn.hook_z"
            delta = (other[name][:, :, head] - clean[name][:, :, head]) @ bridge.blocks[layer].attn.W_O[head]
            hook = _make_direct_path_hook(delta, receiver[1], [])
            logits = bridge.run_with_hooks(pairs.ids, fwd_hooks=[(f"blocks.{receiver[0]}.attn.hook_q_input", hook)])
            found.append(metric(logits, pairs))
    return torch.stack(found), time.perf_counter() - start


@torch.no_grad()
def nnsight_patching(model, pairs, units, size, other):
    """nnsight: the slice before the output projection replaced, one trace per head."""
    from nnsight import NNsight

    wrapped = NNsight(model)
    found, start = [], time.perf_counter()
    for layer, head in units:
        part = slice(head * size, head * size + size)
        value = other[layer][:, :, head]
        with wrapped.trace(pairs.ids):
            flat = wrapped.transformer.h[layer].attn.c_proj.input.clone()
            flat[:, :, part] = value
            wrapped.transformer.h[layer].attn.c_proj.input = flat
            logits = wrapped.output.logits.save()
        found.append(metric(logits, pairs))
    return torch.stack(found), time.perf_counter() - start


def agreement(mine: torch.Tensor, theirs: torch.Tensor) -> float:
    """Largest difference, relative to the largest value."""
    return float((mine - theirs).abs().max() / theirs.abs().max().clamp(min=1e-9))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out")
    parser.add_argument("--count", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--every", type=int, default=6)
    parser.add_argument("--rows", type=int, default=32)
    options = parser.parse_args()
    model = gpt2_small()
    pairs = prompts(options.count, options.tokens, 50000)
    report = {"shape": "GPT-2 small, random weights", "pairs": len(pairs), "tokens": pairs.ids.shape[1]}
    report |= {"torch": torch.__version__, "threads": torch.get_num_threads(), "machine": platform.machine()}
    report |= compare(model, pairs, options.every, options.rows)
    text = json.dumps(report, indent=2)
    print(text)
    if options.out:
        with open(options.out, "w", encoding="utf-8") as file:
            file.write(text + "\n")


def compare(model, pairs, every, rows):
    """All figures of one model."""
    L, H = model.config.n_layer, model.config.n_head
    units = [(u // H, u % H) for u in range(0, L * H, every)]
    bridge = lens_bridge(model, "gpt2")
    theirs, lens_s = lens_patching(bridge, pairs, units)
    where = column_mask(pairs, "all")

    def sweep():
        run = Sweep(model, pairs, where, rows=rows)
        return run.all_units(record(model, pairs, pairs.corrupt).z.__getitem__)

    mine, seconds = timed(sweep)
    picked = torch.stack([mine[layer, head] for layer, head in units])
    scale = L * H / len(units)
    found = {"patching_lens_error": agreement(picked, theirs), "patching_s": seconds}
    found |= {"patching_lens_s": lens_s * scale, "patching_times_faster_than_lens": lens_s * scale / seconds}
    other = record(model, pairs, pairs.corrupt)
    nn, nn_s = nnsight_patching(copy.deepcopy(model), pairs, units, 64, other.z)
    found |= {"patching_nnsight_error": agreement(picked, nn), "patching_nnsight_s": nn_s * scale}
    found["patching_times_faster_than_nnsight"] = nn_s * scale / seconds
    found |= paths(model, bridge, pairs, every, rows)
    found |= attribution(model, bridge, pairs)
    for name in [n for n in found if n.endswith("_error")]:
        if not found[name] <= 1e-4:
            raise SystemExit(f"{name} = {found[name]:.2e}: the peers disagree, so no time is shown")
    return found


def paths(model, bridge, pairs, every, rows):
    """All heads of layers 0 to 8 to the query of L9H3, attention and MLPs frozen on the way."""
    receiver = (9, 3)
    units = [(u // 12, u % 12) for u in range(0, receiver[0] * 12, every)]
    theirs, lens_s = lens_paths(bridge, pairs, units, receiver)

    def mine():
        path = Paths(model, pairs, column_mask(pairs, "all"), freeze_mlps=True, rows=rows)
        to = HeadSet.parse("L9H3")
        return torch.stack([path.to_units(layer, range(12), to, "q") for layer in range(receiver[0])])

    ours, seconds = timed(mine)
    picked = torch.stack([ours[layer, head] for layer, head in units])
    scale = receiver[0] * 12 / len(units)
    found = {"paths_lens_error": agreement(picked, theirs), "paths_s": seconds, "paths_lens_s": lens_s * scale}
    return found | {"paths_times_faster_than_lens": lens_s * scale / seconds}


@torch.no_grad()
def attribution(model, bridge, pairs):
    """Logits of every head's own write, against TransformerLens' hook_z and weights with its own final norm scale."""
    _, cache = bridge.run_with_cache(pairs.ids)
    mine = attribute(model, None, pairs=pairs)
    direction = model.lm_head.weight[pairs.answers] - model.lm_head.weight[pairs.contrasts]
    scale = cache["ln_final.hook_scale"][:, -1]
    theirs = []
    for layer in range(model.config.n_layer):
        write = torch.einsum("bhd,hdc->bhc", cache[f"blocks.{layer}.attn.hook_z"][:, -1], bridge.blocks[layer].attn.W_O)
        write = (write - write.mean(-1, keepdim=True)) / scale[:, None] * model.transformer.ln_f.weight
        theirs.append((write * direction[:, None]).sum(-1))
    return {
        "attribution_lens_error": agreement(mine.heads, torch.stack(theirs, 1)),
        "attribution_sum_error": mine.error,
    }


if __name__ == "__main__":
    main()
