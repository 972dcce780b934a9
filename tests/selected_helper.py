"""Rules of `Selected` for tiny texts, and ways to read with them and to look at what was kept."""

import torch

import headwise
from headwise import HeadPlan, HeadwiseCache
from headwise.plan import Selected

SNAP = "observation(window=4,kernel=3,pool=avg)"
MAX = "observation(window=3,kernel=5,pool=max,group=max)"
RULES = {
    "slides": Selected(2, 4, 5, by=SNAP),
    "grows": Selected(0, 4, 6, by=MAX, grow=True),
    "share": Selected(1, 3, -4, share=0.5, by="key-norm"),
    "values": Selected(1, 4, 5, by="observation-values(window=4)", grow=True),
    "random": Selected(1, 2, 6, by="random(seed=3)"),
    "pooled": Selected(1, 3, 5, by=SNAP, split="pooled(floor=0.25)"),
    "pooled grows": Selected(0, 4, -4, share=0.5, by=MAX, split="pooled(floor=0)", grow=True),
}


def kept_positions(store, row):
    """What a store really holds, a set a head."""
    found = {}
    for part in store.parts:
        for place, head in enumerate(part.heads):
            held = part.positions[row, place, : part.length]
            found[head] = held[held >= 0].tolist()
    assert all(len(set(held)) == len(held) for held in found.values())
    return [set(found[head]) for head in sorted(found)]


class Reads:
    """A reader of new columns, as the hook is one."""

    layer, scale = 0, 8**-0.5

    def __init__(self, q, k, past, start):
        self.q, self.k, self.past, self.start = q, k, past, start

    def queries(self):
        return headwise.attention.groups.Queries(self.q.shape[2], self.past, self.start)


def read(layer, q, k, v, begin, end, start=None):
    layer.update(k[:, :, begin:end], v[:, :, begin:end])
    q = q[:, :, begin:end]
    groups, offset, start = layer.take(start, Reads(q, k[:, :, begin:end], begin, start))
    return headwise.attention(q, groups=groups, offset=offset, start=start)


def run(model, batch, plan, cut, cache=None):
    cache = HeadwiseCache(plan) if cache is None else cache
    parts, begin = [], cache.get_seq_length()
    with headwise.attach(model, plan=plan), torch.no_grad():
        for count in cut:
            end, extra = begin + count, {}
            if "attention_mask" in batch:
                extra["attention_mask"] = batch["attention_mask"][:, :end]
                extra["position_ids"] = batch["position_ids"][:, begin:end]
            parts.append(model(batch["input_ids"][:, begin:end], past_key_values=cache, use_cache=True, **extra).logits)
            begin = end
    return torch.cat(parts, dim=1), cache


def uniform(pattern, **labels):
    return HeadPlan.uniform(pattern, 3, 2, prefill="dense", **labels)
