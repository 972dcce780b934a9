"""Tiny models, inputs, and an oracle: a dense attention that applies plans and edits as their equations are written.

The oracle shares no code with the attached path: it is its own attention function, registered with transformers, that makes the whole
attention matrix. `start` (B,) is the first real column of each row.
"""

import contextlib

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from headwise.hub import load_model

DECODERS = ("llama", "qwen3", "mistral", "gemma3", "gpt2", "mixtral", "qwen3-moe", "deepseek-v3")
STACKS = [(name, None) for name in (*DECODERS, "bert", "vit")] + [("clip", "text_model"), ("clip", "vision_model")]


def tiny(name="llama", base="sdpa", **options):
    return load_model(f"tiny-random-{name}", attn_implementation=base, **options)[0]


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def tokens(rows, length, seed=0):
    return torch.randint(0, 256, (rows, length), generator=torch.Generator().manual_seed(seed))


def padded(lengths, seed=0):
    """Left-padded rows of these lengths: input_ids, attention_mask and position_ids."""
    width = max(lengths)
    ids, mask = tokens(len(lengths), width, seed), torch.zeros(len(lengths), width, dtype=torch.long)
    for row, length in enumerate(lengths):
        mask[row, width - length :] = 1
        ids[row, : width - length] = 256
    return {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}


def starts(batch):
    return (batch["attention_mask"] == 0).sum(1)


def inputs(name, length=24):
    if name == "vit":
        return {"pixel_values": random(2, 3, 32, 32)}
    if name == "clip":
        return {"input_ids": tokens(2, length), "pixel_values": random(2, 3, 32, 32)}
    return {"input_ids": tokens(2, length)}


@torch.no_grad()
def logits(model, batch):
    """Whatever the model says in the end, as one tensor."""
    out = model(**batch)
    return out.logits if "logits" in out else torch.cat([out.text_embeds, out.image_embeds])


def generate(model, batch, new=8, **options):
    batch = {k: v for k, v in batch.items() if k != "position_ids"}
    options = {"do_sample": False, "max_new_tokens": new, "min_new_tokens": new, **options}
    return model.generate(**batch, **options)


def state(model):
    """What attaching may not leave behind: names of the attention implementation, hooks, attributes of modules."""
    implementations = [m.config._attn_implementation for m in model.modules() if hasattr(m, "config")]
    hooks = [len(getattr(m, name)) for m in model.modules() for name in ("_forward_pre_hooks", "_forward_hooks")]
    return implementations, hooks, [sorted(vars(m)) for m in model.modules()], sorted(vars(model.config))


def allocated(cache):
    """Bytes of every tensor that the cache can reach, counted by storage, without its own help."""
    storages, todo, seen = {}, [cache.layers], set()
    while todo:
        item = todo.pop()
        if id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, torch.Tensor):
            storages[item.untyped_storage().data_ptr()] = item.untyped_storage().nbytes()
        elif isinstance(item, list | tuple):
            todo += item
        elif hasattr(item, "__dict__") and type(item).__module__ in (
            "headwise.cache",
            "headwise.stores",
            "headwise.window_store",
            "headwise.selected_store",
        ):
            todo += [
                value for name, value in vars(item).items() if name != "start"
            ]  # B numbers, one tensor for all layers
    return sum(storages.values())


# -- the oracle ----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def oracle(model, *, edits=(), patterns=None, start=None, seen=None):
    """Switch the model to dense attention by the equations; `patterns[layer][kv head]`, `edits` a list of Edit.

    `seen`, a dict, is filled with {layer: (attention (B,H,N,M), values (B,H,M,D), output (B,N,H,D))}.
    """

    def attend(module, q, k, v, mask, scaling=None, **kwargs):
        G, layer = q.shape[1] // k.shape[1], module.layer_idx
        k, v = k.repeat_interleave(G, 1), v.repeat_interleave(G, 1)
        B, H, N, M = *q.shape[:3], k.shape[2]
        first = torch.zeros(B, dtype=torch.long) if start is None else start
        position = torch.arange(M)[None] - first[:, None]  # (B, M)
        q_pos, k_pos = position[:, None, M - N :, None], position[:, None, None, :]
        visible = ((mask == 0) & (k_pos >= 0)).expand(B, H, N, M)
        if patterns is not None:
            visible = visible & torch.cat([p.reads(q_pos, k_pos).expand(B, G, N, M) for p in patterns[layer]], dim=1)
        scores = (q.double() @ k.double().transpose(-1, -2)) * scaling
        weights = torch.softmax(scores.masked_fill(~visible, -torch.inf), dim=-1).nan_to_num(0.0)
        out, v = weights @ v.double(), v.double()
        if seen is not None:
            seen[layer] = weights, v, out.transpose(1, 2)
        for edit in edits:
            out = _edited(edit, layer, out, weights, v, visible, position, M - N)
        return out.transpose(1, 2).to(q.dtype), weights

    AttentionInterface.register("oracle", attend)
    AttentionMaskInterface.register("oracle", ALL_MASK_ATTENTION_FUNCTIONS["eager"])
    before, model.config._attn_implementation = model.config._attn_implementation, "oracle"
    try:
        yield
    finally:
        model.config._attn_implementation = before


def _edited(edit, layer, out, weights, v, visible, position, past):
    """O' = (1 - s) O + s T for one edit; out (B, H, N, D)."""
    out, N = out.clone(), out.shape[2]
    q_pos, last = position[:, past:], position[:, -1:]
    phase = "decode" if N == 1 and past > 0 else "prefill"
    if edit.phase not in ("all", phase):
        return out
    chosen = edit.tokens.mask(q_pos, last=last)  # (B, N)
    for place, (unit, weight) in enumerate(zip(edit.units, edit.units.weights(), strict=True)):
        if unit.layer == layer:
            h, s = unit.index, edit.amount * weight
            target = _target(edit, place, out[:, h], weights[:, h], v[:, h], visible[:, h], position, last, past)
            out[:, h] = torch.where(chosen[..., None], (1 - s) * out[:, h] + s * target, out[:, h])
    return out


def _target(edit, place, out, weights, v, visible, position, last, past):
    """T of one head: out (B, N, D), weights and visible (B, N, M), v (B, M, D)."""
    if edit.op == "zero":
        return torch.zeros_like(out)
    if edit.op == "scale":
        return edit.value * out
    if edit.op in ("uniform", "mix_uniform"):
        return (visible.double() / visible.sum(-1, keepdim=True).clamp(min=1)) @ v
    if edit.op in ("replace", "mix_vector"):
        return edit.tensor[place].double().expand_as(out)
    if edit.op == "patch":
        return edit.tensor[place].double()
    if edit.op == "mix_v":
        return v[:, past:]
    groups = [group.tokens.mask(position, last=last)[:, None].double() for group in edit.keys]  # (B, 1, M)
    if edit.op == "reweight":
        factor = torch.ones_like(groups[0])
        for group, key_group in reversed(list(zip(groups, edit.keys, strict=True))):
            factor = torch.where(group > 0, key_group.weight, factor)
        total = weights * factor
        return total @ v / (total.sum(-1, keepdim=True).clamp(min=1e-300) if edit.renormalize else 1.0)
    source = weights * groups[0]
    target = weights * (1 - groups[0]) * (groups[1] if len(groups) > 1 else 1.0)
    p_s, p_n = source.sum(-1, keepdim=True), target.sum(-1, keepdim=True)
    return torch.where(p_n > 0, out + (target * p_s / p_n.clamp(min=1e-300) - source) @ v, out)
