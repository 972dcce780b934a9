"""The composition of references: one dense attention, written as the equations stand, that applies what several systems say, in the order

    who reads whom → attention → gates → edits        and, in the experts, who is off.

It shares no code with the attached path but the edits' targets of the dense oracle (`tiny_helper`), which are equations themselves.
Letters: B rows, H query heads, K kv heads, G = H/K, N queries, M keys.
"""

import contextlib
from dataclasses import dataclass, field

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from headwise.budget._longheads_reference import attend as long_heads_reference
from tiny_helper import _edited


@dataclass
class Reference:
    """What the systems of a run say, as data.

    `plan`: a HeadPlan; `kept[layer][row][kv head]`: positions that were chosen from the prompt, for plans that choose by content;
    `routes[layer]` = (shared heads, routed heads chosen by the norm of their query); `edits`; `off`: (layer, expert) pairs;
    `far` = (LongHeads, its Shape of a layer).
    """

    plan: object = None
    kept: dict = field(default_factory=dict)
    routes: dict = field(default_factory=dict)
    edits: list = field(default_factory=list)
    off: list = field(default_factory=list)
    far: object = None
    prompt: torch.Tensor | None = None  # (B,) tokens of the prompt
    start: torch.Tensor | None = None  # (B,) first real column

    @contextlib.contextmanager
    def on(self, model):
        """The model computes what the references say."""
        AttentionInterface.register("composition", self._attend)
        AttentionMaskInterface.register("composition", ALL_MASK_ATTENTION_FUNCTIONS["eager"])
        before, model.config._attn_implementation = model.config._attn_implementation, "composition"
        handles = [
            model.model.layers[layer].mlp.experts.register_forward_pre_hook(_without(expert))
            for layer, expert in self.off
        ]
        try:
            yield
        finally:
            model.config._attn_implementation = before
            for handle in handles:
                handle.remove()

    def _attend(self, module, q, k, v, mask, scaling=None, **kwargs):
        layer, G = module.layer_idx, q.shape[1] // k.shape[1]
        B, _, N, M = *q.shape[:3], k.shape[2]
        position = torch.arange(M)[None] - self.start[:, None]
        seen = ((mask == 0) & (position >= 0)[:, None, None]).expand(B, k.shape[1], N, M)
        reads = seen & self._reads(layer, position, N, M, k.shape[1])
        keys, values, alive = k.double(), v.double(), reads
        scores = _scores(q, keys, scaling).masked_fill(~reads.repeat_interleave(G, 1), -torch.inf)
        if self._compensates(layer) and N == 1 and M > 1:
            keys, values, scores, alive = _with_means(q, keys, values, scores, seen & ~reads, reads, scaling)
        weights = scores.softmax(-1).nan_to_num(0.0)
        out = weights @ values.repeat_interleave(G, 1)
        if self.far is not None:
            out = self._far(q, k, v, scaling)
        out = out * self._gates(layer, q)
        for edit in self.edits:
            visible = (
                alive if values.shape[2] == M else seen
            )  # behind a compensation token stand all keys that it averages
            shown = values if values.shape[2] == M else v.double()
            out = _edited(
                edit, layer, out, weights[..., :M], shown.repeat_interleave(G, 1)[:, :, :M],
                visible.repeat_interleave(G, 1), position, M - N,
            )  # fmt: skip
        return out.transpose(1, 2).to(q.dtype), None

    def _compensates(self, layer):
        return self.plan is not None and any(pattern.compensated for pattern in self.plan.layer(layer))

    def _reads(self, layer, position, N, M, kv_heads):
        """(B, K, N, M): who reads whom by the plan; a dense prefill reads everything."""
        if self.plan is None or (self.plan.prefill == "dense" and (N > 1 or M == N)):
            return torch.ones(1, kv_heads, 1, 1, dtype=torch.bool)
        q_pos, k_pos = position[:, M - N :, None], position[:, None]
        rows = []
        for head, pattern in enumerate(self.plan.layer(layer)):
            if layer in self.kept:  # chosen by content from the prompt; what came behind it is kept
                chosen = torch.stack(
                    [torch.isin(position[row], self.kept[layer][row][head]) for row in range(len(position))]
                )
                rows.append((chosen[:, None] | (k_pos >= self.prompt[:, None, None])).expand(-1, N, -1))
            else:
                prompt = self.prompt[:, None, None] if pattern.grow else None
                rows.append(pattern.reads(q_pos, k_pos, prompt=prompt))
        return torch.stack([row.expand(len(position), N, M) for row in rows], 1)

    def _gates(self, layer, q):
        """(B, H, N, 1): 1 for shared heads and for those of the others whose queries are longest."""
        if layer not in self.routes:
            return torch.ones(1, 1, 1, 1, dtype=torch.double)
        shared, count = self.routes[layer]
        gates = torch.zeros(q.shape[:3], dtype=torch.double)
        gates[:, list(shared)] = 1
        pool = [head for head in range(q.shape[1]) if head not in shared]
        best = q[:, pool].double().norm(dim=-1).topk(count, dim=1).indices
        gates[:, pool] = torch.zeros_like(gates[:, pool]).scatter(1, best, 1.0)
        return gates[..., None]

    def _far(self, q, k, v, scaling):
        transform, shape = self.far
        back = -torch.arange(q.shape[2])
        plain = [transform.rotation.turn(x, back) for x in (q, k)]
        return long_heads_reference(*plain, v, shape(scaling), start=transform.start)[0]


def _scores(q, keys, scaling):
    G = q.shape[1] // keys.shape[1]
    return q.double() @ keys.repeat_interleave(G, 1).mT * scaling


def _with_means(q, keys, values, scores, dropped, reads, scaling):
    """One more key a kv head: the mean of those dropped, counting as many tokens as it stands for."""
    G, count = q.shape[1] // keys.shape[1], dropped[:, :, -1].sum(-1)  # (B, K)
    share = dropped[:, :, -1].double() / count.clamp(min=1)[..., None]  # (B, K, M)
    mean_k, mean_v = ((share[:, :, None] @ x) for x in (keys, values))
    extra = _scores(q, mean_k, scaling) + count.double().log()[..., None, None].repeat_interleave(G, 1)
    alive = torch.cat([reads, (count > 0)[..., None, None]], -1)
    return torch.cat([keys, mean_k], 2), torch.cat([values, mean_v], 2), torch.cat([scores, extra], -1), alive


def _without(expert):
    """A pre-hook of experts: one loses its weight, the others of a token take it over in proportion."""

    def hook(module, args):
        hidden, index, weight = args
        left = weight.masked_fill(index == expert, 0.0)
        factor = weight.sum(-1, keepdim=True) / left.sum(-1, keepdim=True)
        return hidden, index, torch.where((index == expert).any(-1, keepdim=True), left * factor, weight)

    return hook
