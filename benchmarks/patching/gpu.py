"""Patching on a GPU (or CPU) against fair loops of one forward pass a head: agreement first, then time and memory.

    PYTHONPATH=src python benchmarks/patching/gpu.py --out benchmarks/results/patching_h200.json

TransformerLens cannot be installed beside this torch everywhere, so its way is written out in plain PyTorch, as lean as it gets: a hook
on the input of the output projection, one forward pass a (layer, head), eval mode, no gradients, no cache. `loop` asks for all logits, as
TransformerLens does; `lean loop` for those of the last token, as headwise does. GPT-2 small's shape, random weights. Loops over
pairs of heads are timed on some pairs and scaled; sweeps are timed whole, their recording passes included.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import time

import torch
import transformers
from transformers import GPT2Config, GPT2LMHeadModel

from headwise.modes import evaluating
from headwise.score._edges import edges
from headwise.score._patching import column_mask
from headwise.score._paths import Paths
from headwise.score._units import chunks, sweep_all
from headwise.tasks.pairs import PromptPairs

AGREE = 1e-4  # of the largest value, in float32


def gpt2_small(device, layers=12, width=768):
    """Random weights of GPT-2 small's shape, a little wider spread so that heads matter."""
    torch.manual_seed(0)
    config = GPT2Config(
        n_layer=layers, n_embd=width, n_head=12, initializer_range=0.05, bos_token_id=None, eos_token_id=None
    )
    return GPT2LMHeadModel._from_config(config, attn_implementation="sdpa").to(device).eval()


def prompts(count, tokens, device, vocabulary=50_000):
    """Random prompts, twins that differ in one early token, and two answers each."""
    drawn = torch.randint(0, vocabulary, (count, tokens + 3), generator=torch.Generator().manual_seed(1))
    ids, twins = drawn[:, :tokens], drawn[:, :tokens].clone()
    twins[:, 2] = drawn[:, tokens]
    mask = torch.ones_like(ids, dtype=torch.bool)
    return PromptPairs(ids, twins, mask, drawn[:, tokens + 1], drawn[:, tokens + 2]).to(device)


class Loop:
    """Plain PyTorch: what a user of hooks writes."""

    def __init__(self, model, pairs, *, all_logits):
        self.model, self.pairs, self.keep = model, pairs, 0 if all_logits else 1
        self.blocks, self.size = model.transformer.h, model.config.n_embd // model.config.n_head

    @torch.no_grad()
    def ld(self, ids):
        logits = self.model(input_ids=ids, use_cache=False, logits_to_keep=self.keep).logits[:, -1].float()
        rows = torch.arange(len(ids), device=ids.device)
        return logits[rows, self.pairs.answers] - logits[rows, self.pairs.contrasts]

    @contextlib.contextmanager
    def hooked(self, layer, change):
        handle = self.blocks[layer].attn.c_proj.register_forward_pre_hook(lambda m, a: (change(a[0]), *a[1:]))
        try:
            yield
        finally:
            handle.remove()

    def record(self, ids, what="attn.c_proj"):
        seen, handles = [None] * len(self.blocks), []
        for l, block in enumerate(self.blocks):
            keep = lambda m, a, l=l: seen.__setitem__(l, a[0].clone())
            handles.append(block.get_submodule(what).register_forward_pre_hook(keep))
        self.ld(ids)
        for handle in handles:
            handle.remove()
        return seen

    def patch(self, units, other):
        """LD (units, B): one head's slice of z from the other run, one pass a head; None: zeros."""
        found = []
        for layer, head in units:
            part = slice(head * self.size, (head + 1) * self.size)

            def change(z, layer=layer, part=part):
                z = z.clone()
                z[..., part] = 0 if other is None else other[layer][..., part]
                return z

            with self.hooked(layer, change):
                found.append(self.ld(self.pairs.ids))
        return torch.stack(found)

    def path(self, jobs, clean, other, column):
        """LD (jobs, B): the sender's change of the residual added to what one later head's query reads, MLPs frozen on the way.

        With everything between frozen the direct path is a sum: one pass a pair is enough, as TransformerLens does it.
        """
        found = []
        for (layer, head), (to, receiver) in jobs:
            part = slice(head * self.size, (head + 1) * self.size)
            weight = self.blocks[layer].attn.c_proj.weight[part]
            delta = (other[layer][..., part] - clean[layer][..., part]) @ weight
            if column is not None:
                delta = torch.zeros_like(delta).index_copy_(1, column, delta.index_select(1, column))
            norm, attention = self.blocks[to].ln_1, self.blocks[to].attn
            mine, entered = slice(receiver * self.size, (receiver + 1) * self.size), {}
            see = self.blocks[to].register_forward_pre_hook(lambda m, a, k: entered.update(x=a[0]), with_kwargs=True)

            def change(module, args, output, delta=delta, mine=mine, norm=norm, attention=attention, entered=entered):
                width = output.shape[-1] // 3
                q = norm(entered["x"] + delta) @ attention.c_attn.weight[:, :width][:, mine]
                output = output.clone()
                output[..., mine] = q + attention.c_attn.bias[:width][mine]
                return output

            put = attention.c_attn.register_forward_hook(change)
            found.append(self.ld(self.pairs.ids))
            see.remove(), put.remove()
        return torch.stack(found)


def timed(function, device, repeats):
    """(result, median seconds, peak bytes over what was there before)."""
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    result, seconds, peak = None, [], 0
    for _ in range(repeats):
        del result
        wait()
        before = torch.cuda.memory_allocated() if device == "cuda" else 0
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        with torch.no_grad():
            result = function()
        wait()
        seconds.append(time.perf_counter() - start)
        peak = torch.cuda.max_memory_allocated() - before if device == "cuda" else 0
    return result, statistics.median(seconds), peak


def difference(mine, theirs):
    """Largest difference, relative to the largest value."""
    return float((mine - theirs).abs().max() / theirs.abs().max().clamp(min=1e-9))


def sweep_case(model, count, tokens, rows, device, every, repeats, gate):
    """All heads patched with the twin's outputs, and all heads zeroed: against the loop."""
    pairs, H = prompts(count, tokens, device), model.config.n_head
    units = [(u // H, u % H) for u in range(0, model.config.n_layer * H, every)]
    scale = model.config.n_layer * H / len(units)
    where = column_mask(pairs, "all")
    twin = lambda sweep, part: sweep.record(sweep.pairs, sweep.pairs.corrupt)
    none = lambda sweep, part: sweep.lent(None)
    found = {"pairs": count, "tokens": tokens, "rows": rows, "chunk": chunks(count, H, rows)[0].stop}
    weights = sum(p.numel() * p.element_size() for p in {id(p): p for p in model.parameters()}.values())
    for name, other in (("patching", twin), ("ablation", none)):
        mine, seconds, peak = timed(
            lambda: sweep_all(model, "head", pairs, where, other, rows=rows).after, device, repeats
        )
        row = {"s": seconds, "peak_mib": peak / 2**20}
        for kind in ("loop", "lean loop"):
            loop = Loop(model, pairs, all_logits=kind == "loop")

            def run(loop=loop):
                start = loop.record(pairs.corrupt) if name == "patching" else None
                return loop.patch(units, start)

            theirs, loop_s, loop_peak = timed(run, device, 1)
            error = difference(torch.stack([mine[u] for u in units]), theirs)
            need(error, gate, f"{name}, {kind}")
            row[kind] = {"s": loop_s * scale, "peak_mib": loop_peak / 2**20, "error": error}
            row[kind]["times_faster"] = loop_s * scale / seconds
        found[name] = row
    for kind, keep in (("forward", 0), ("forward_last_logits", 1)):
        for size, ids in (("", pairs.ids), ("_of_rows", pairs.ids.repeat(max(1, rows // count), 1))):
            call = lambda keep=keep, ids=ids: model(input_ids=ids, use_cache=False, logits_to_keep=keep).logits
            _, s, peak = timed(call, device, 2)
            found[f"{kind}{size}"] = {"s": s, "peak_mib": peak / 2**20}
    found["weights_mib"] = weights / 2**20
    for kind in ("forward", "forward_last_logits", "forward_of_rows", "forward_last_logits_of_rows"):
        of = found[kind]["peak_mib"]
        total = (found["patching"]["peak_mib"] + weights / 2**20) / (of + weights / 2**20)
        found[f"memory_of_{kind}"] = {"activations": found["patching"]["peak_mib"] / max(of, 1e-9), "total": total}
    return found


def path_case(model, count, tokens, rows, device, sample, repeats, gate, where):
    """All senders to every receiver's query, one receiver at a time: against one pass a pair."""
    pairs, L, H = prompts(count, tokens, device), model.config.n_layer, model.config.n_head
    below = {l: range(H) for l in range(L - 1)}
    above = {l: range(H) for l in range(1, L)}

    def run():
        with evaluating(model):
            paths = Paths(model, pairs, column_mask(pairs, where), freeze_mlps=True, rows=rows)
            return edges(paths, below, above, "q")

    mine, seconds, peak = timed(run, device, repeats)
    jobs = [((l, h), (r, g)) for l in below for h in range(H) for r in above if r > l for g in range(H)]
    picked = [jobs[i] for i in torch.randperm(len(jobs), generator=torch.Generator().manual_seed(0))[:sample].tolist()]
    column = pairs.last[:1] if where == "last" else None
    found = {"pairs": count, "tokens": tokens, "rows": rows, "where": where, "jobs": len(jobs), "timed": len(picked)}
    found |= {"s": seconds, "peak_mib": peak / 2**20}
    for kind in ("loop", "lean loop"):
        loop = Loop(model, pairs, all_logits=kind == "loop")
        clean, other = loop.record(pairs.ids), loop.record(pairs.corrupt)
        theirs, loop_s, _ = timed(lambda loop=loop: loop.path(picked, clean, other, column), device, 1)
        ours = torch.stack([mine[l * H + h, (r - 1) * H + g] for (l, h), (r, g) in picked])
        error = difference(ours, theirs)
        need(error, gate, f"paths, {kind}")
        whole = loop_s * len(jobs) / len(picked)
        found[kind] = {"s": whole, "error": error, "times_faster": whole / seconds}
    return found


def need(error, gate, what):
    """No time is shown where the numbers differ."""
    if not error <= gate:
        raise SystemExit(f"{what}: the two disagree by {error:.2e} of the largest value; allowed {gate:.0e}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--pairs", default="1,4,16,64")
    parser.add_argument("--rows", default="96,384")
    parser.add_argument("--every", type=int, default=1, help="loops are timed on every n-th head and scaled")
    parser.add_argument("--sample", type=int, default=150, help="pairs of heads that the path loop is timed on")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=768)
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    name = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    report = {"shape": "GPT-2 small, random weights", "device": name, "torch": torch.__version__}
    report |= {"transformers": transformers.__version__, "gate": AGREE, "cases": []}
    report["environment"] = {"threads": torch.get_num_threads(), "date": time.strftime("%Y-%m-%d")}
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    model = gpt2_small(device, options.layers, options.width)
    Loop(model, prompts(1, options.tokens, device), all_logits=False).record(prompts(1, options.tokens, device).ids)
    for kind, dtype, tf32, gate in precisions(device):
        torch.backends.cuda.matmul.allow_tf32 = tf32
        model = model.to(dtype)
        for count in map(int, options.pairs.split(",")):
            for rows in map(int, options.rows.split(",")):
                case = sweep_case(model, count, options.tokens, rows, device, options.every, options.repeats, gate)
                keep(report, {"case": "sweep", "precision": kind, **case}, options.out)
        for where in ("last", "all"):
            rows = max(map(int, options.rows.split(",")))
            case = path_case(model, 1, options.tokens, rows, device, options.sample, 1, gate, where)
            keep(report, {"case": "paths to all receivers", "precision": kind, **case}, options.out)


def keep(report, case, out):
    """Say a case, and write all so far: a run that is cut off has measured something."""
    report["cases"].append(case)
    tell(case)
    if out:
        with open(out, "w", encoding="utf-8") as file:
            json.dump(report, file, indent=1)
            file.write("\n")


def precisions(device):
    """(name, dtype, TF32, largest difference allowed): the gate of 1e-4 is held in float32 before anything else runs."""
    yield "float32", torch.float32, False, AGREE
    if device == "cuda":
        yield "float32 with TF32", torch.float32, True, 5e-2
        yield "bfloat16", torch.bfloat16, False, 0.3  # one ulp of a logit is most of a small effect: time only


def tell(case):
    """One line."""
    rows = [case] if case["case"] != "sweep" else [{"part": part, **case[part]} for part in ("patching", "ablation")]
    for row in rows:
        fast = ", ".join(
            f"{kind} {row[kind]['times_faster']:.1f}x ({row[kind]['error']:.0e})" for kind in ("loop", "lean loop")
        )
        what = f"{case['case']} {row.get('part', case.get('where', ''))}, {case['precision']}, {case['pairs']} pairs, rows {case['rows']}"
        print(f"{what}: {row['s'] * 1e3:.0f} ms; {fast}; peak {row['peak_mib']:.0f} MiB", flush=True)
    if case["case"] == "sweep":
        print({k: v for k, v in case.items() if k.startswith("memory")}, flush=True)


if __name__ == "__main__":
    main()
