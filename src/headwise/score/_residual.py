"""What every part of a decoder adds to a logit difference: an exact split of the residual stream.

    LD = ( (e + sum_l (b_l + sum_h z_lh W_O^lh + m_l)) ⊙ γ / s  + β ) · (u_a − u_c) + bias_a − bias_c

s is the final norm's own scale of the full stream, γ, β its weights, u the rows of the unembedding; LayerNorm also takes off each
part's mean. A norm behind attention or MLP (Gemma, OLMo 2) is linear once its scale is known, and is folded in alike.

Letters: B pairs, N columns, L layers, H query heads, D head dim, C width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from headwise.attach import find_stack
from headwise.attach.projection import head_weights, output_projection
from headwise.errors import AttachError
from headwise.score._blocks import Blocks, Kept, first
from headwise.score._patching import record

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from headwise.tasks.pairs import PromptPairs

TOLERANCE = 1e-4  # of the logit difference in float32, relative to the size of the parts


@dataclass(frozen=True)
class LinearNorm:
    """A norm with its scale frozen: x -> (x − mean x) · γ / s + β, the mean only for LayerNorm."""

    centred: bool
    gamma: Tensor  # (C,)
    beta: Tensor  # (C,)
    inverse: Tensor  # 1 / s, (..., 1)

    def of_part(self, part: Tensor) -> Tensor:
        """What a part (…, C) of the input becomes, without β."""
        if self.centred:
            part = part - part.mean(-1, keepdim=True)
        return part * self.gamma * self.inverse


@torch.no_grad()
def freeze_norm(norm: nn.Module, x: Tensor) -> LinearNorm:
    """The linear map that a LayerNorm or RMSNorm module, of whatever class, is at the input x (…, C)."""
    dtype, x = x.dtype, x.float()
    C = x.shape[-1]
    sign = torch.ones(C, device=x.device)
    sign[1::2] = -1

    def run(value: Tensor) -> Tensor:
        return norm(value.to(dtype)).float()

    beta = run(torch.zeros(1, C, device=x.device))[0]
    centred = bool(
        isinstance(norm, nn.LayerNorm) or float((run(torch.ones(1, C, device=x.device)) - beta).abs().max()) < 1e-6
    )
    probe = sign * 1e3  # so large that eps does not count
    mean, spread = (probe.mean(), probe.std(unbiased=False)) if centred else (probe * 0, probe.square().mean().sqrt())
    gamma = (run(probe[None])[0] - beta) * spread / (probe - mean)
    wide = (x - x.mean(-1, keepdim=True) if centred else x) * gamma
    inverse = ((run(x) - beta) * wide).sum(-1, keepdim=True) / wide.square().sum(-1, keepdim=True).clamp(min=1e-30)
    return LinearNorm(centred, gamma, beta, inverse)


@dataclass(frozen=True, eq=False)
class Attribution:
    """Parts of LD in logits, one row a prompt: `embedding` (B,), `heads` (B, L, H), `attention_bias` (B, L), `mlp` (B, L),
    `constant` (B,): final norm's β and the unembedding's bias. `total` is their sum, `model` what the model itself answers."""

    embedding: Tensor
    heads: Tensor
    attention_bias: Tensor
    mlp: Tensor
    constant: Tensor
    model: Tensor

    @property
    def total(self) -> Tensor:
        """Sum of all parts, (B,)."""
        return self.embedding + self.heads.sum((1, 2)) + self.attention_bias.sum(1) + self.mlp.sum(1) + self.constant

    @property
    def error(self) -> float:
        """Largest difference between the sum of the parts and the model's own logit difference."""
        return float((self.total - self.model).abs().max())

    def parts(self) -> dict[str, float]:
        """Mean over the prompts of every part by name: `embedding`, `L3H1`, `L3.bias`, `L3.mlp`, `constant`."""
        named = {"embedding": float(self.embedding.mean()), "constant": float(self.constant.mean())}
        for layer in range(self.heads.shape[1]):
            named |= {f"L{layer}H{h}": float(v) for h, v in enumerate(self.heads[:, layer].mean(0))}
            named[f"L{layer}.bias"] = float(self.attention_bias[:, layer].mean())
            named[f"L{layer}.mlp"] = float(self.mlp[:, layer].mean())
        return named


@torch.no_grad()
def split(model: PreTrainedModel, pairs: PromptPairs, stack: str | None = None) -> Attribution:
    """The parts of LD of the prompts. Raises AttachError where they do not add up to the model's own logits."""
    found = find_stack(model, stack)
    blocks = Blocks(model, found, stack)
    kept = Kept(blocks)
    entries: dict[int, tuple[nn.Module, Tensor]] = {}
    with kept.recording(), _inputs(_norms(model, blocks), entries):
        run = record(model, pairs, pairs.ids, stack)
    rows, last = torch.arange(len(pairs), device=pairs.ids.device), pairs.last
    stream = first(kept.outputs[found.layers - 1])[rows, last]  # (B, C)
    norm = _final_norm(entries, first(kept.outputs[found.layers - 1]))
    final = (
        freeze_norm(norm, stream)
        if norm is not None
        else LinearNorm(False, stream.new_ones(()), stream.new_zeros(()), stream.new_ones(()))
    )
    direction, bias = _direction(model, pairs)

    def said(part: Tensor) -> Tensor:
        """(B, …, C) -> logits (B, …)."""
        extra = (1,) * (part.ndim - 2)
        shaped = LinearNorm(
            final.centred,
            final.gamma,
            final.beta,
            final.inverse.view(-1, *extra, 1) if final.inverse.ndim else final.inverse,
        )
        return (shaped.of_part(part.float()) * direction.view(len(pairs), *extra, -1)).sum(-1)

    heads, biases, mlps = [], [], []
    for layer in range(found.layers):
        out = first(kept.attention[layer])
        after = _behind(entries, out, rows, last)
        weight = head_weights(output_projection(found, layer), found.heads).float()
        writes = torch.einsum("bhd,hdc->bhc", run.z[layer][rows, last].float(), weight)
        rest = out[rows, last].float() - writes.sum(1)  # the projection's bias, and nothing else
        _need_constant(layer, rest, writes)
        heads.append(said(_through(after, writes)))
        biases.append(said(_through(after, rest) + (0 if after is None else after.beta)))
        small = first(kept.mlp[layer])
        behind = _behind(entries, small, rows, last)
        wrote = small[rows, last].float()
        mlps.append(said(_through(behind, wrote) + (0 if behind is None else behind.beta)))
    constant = (final.beta * direction).sum(-1) + bias
    embedding = said(first(kept.entered[0])[rows, last])
    result = Attribution(
        embedding, torch.stack(heads, 1), torch.stack(biases, 1), torch.stack(mlps, 1), constant, run.difference
    )
    _need_complete(result, run.z[0].dtype)
    return result


def _norms(model: nn.Module, blocks: Blocks) -> list[nn.Module]:
    """Every module that looks like a norm: of the stack's layers, and of the modules that hold the stack."""
    return [m for m in model.modules() if "norm" in type(m).__name__.lower() and not list(m.children())]


class _inputs:  # noqa: N801 - used like a function
    """Notes which tensor each norm was given, by identity."""

    def __init__(self, norms: list[nn.Module], into: dict[int, tuple[nn.Module, Tensor]]):
        self.norms, self.into = norms, into
        self.handles: list[Any] = []

    def __enter__(self) -> None:
        for norm in self.norms:
            self.handles.append(norm.register_forward_pre_hook(self._see))

    def _see(self, norm: nn.Module, args: tuple) -> None:
        if args and isinstance(args[0], Tensor):
            self.into[id(args[0])] = (norm, args[0])  # the tensor is kept, so its id stays its own

    def __exit__(self, *error: object) -> None:
        for handle in self.handles:
            handle.remove()


def _behind(entries: dict[int, tuple[nn.Module, Tensor]], out: Tensor, rows: Tensor, last: Tensor) -> LinearNorm | None:
    """The norm that reads exactly this output, frozen at its rows: Gemma's norm behind attention or MLP."""
    found = entries.get(id(out))
    return None if found is None else freeze_norm(found[0], out[rows, last])


def _through(norm: LinearNorm | None, part: Tensor) -> Tensor:
    if norm is None:
        return part
    inverse = norm.inverse.view(-1, *[1] * (part.ndim - 1))
    return LinearNorm(norm.centred, norm.gamma, norm.beta, inverse).of_part(part)


def _final_norm(entries: dict[int, tuple[nn.Module, Tensor]], stream: Tensor) -> nn.Module | None:
    found = entries.get(id(stream))
    return None if found is None else found[0]


def _direction(model: PreTrainedModel, pairs: PromptPairs) -> tuple[Tensor, Tensor]:
    """(u_answer − u_contrast (B, C), difference of their biases (B,)), float32."""
    head = model.get_output_embeddings()
    weight, bias = head.weight, getattr(head, "bias", None)
    direction = weight[pairs.answers].float() - weight[pairs.contrasts].float()
    if bias is None:
        return direction, direction.new_zeros(len(pairs))
    return direction, bias[pairs.answers].float() - bias[pairs.contrasts].float()


def _need_constant(layer: int, rest: Tensor, writes: Tensor) -> None:
    spread = float((rest - rest[:1]).abs().max())
    size = max(float(writes.abs().max()), 1e-6)
    if spread > 0.05 * size:
        raise AttachError(
            f"layer {layer}: attention gives more than the sum of its heads through the output projection (a gate or a norm "
            "between them); its heads cannot be told apart in the residual stream"
        )


def _need_complete(result: Attribution, dtype: torch.dtype) -> None:
    size = max(1.0, float(result.heads.abs().sum((1, 2)).max()), float(result.mlp.abs().sum(1).max()))
    allowed = TOLERANCE * size if dtype in (torch.float32, torch.float64) else 0.1 * size
    if result.error > allowed:
        raise AttachError(
            f"the parts add up to the logit difference only within {result.error:.2g}: the model scales or caps its residual "
            "stream or its logits in a way that is not split here"
        )
