"""What a perturbed head attends to instead, in exact forms that need no N × M attention map.

With a row a = softmax(q K^T / √D) of a head, its output O = a V, and a target row a', every linear mixture is

    O~ = (1 − u) · O + u · T,      T = a' V

| target | a' | T |
|---|---|---|
| identity | e_i | v_i |
| uniform | 1/M | mean of V over the visible keys |
| query-mean | softmax(q̄ K^T / √D), q̄ the mean query of the scope | one more attention, of one query |
| temperature | softmax(β q K^T / √D); β = ∞ is the arg-max | one more attention, of β·q |
| image-identity | before the softmax image tokens lose all other image tokens | text keys and the own key |
| image-identity-renormalized | the mass of all image tokens goes to the own one | O_text + P_image · v_i |
| mask-XY | before the softmax rows X lose keys Y | attention of rows X over the other keys |
| zero-XY | after the softmax rows X lose keys Y; rows sum to less than 1 | O − O_Y |

Geodesics to identity mix rows in other ways. Chordal Fisher-Rao and slerp square s = α·e_i + β·√a and renormalise, so that with the own
probability a_i alone, and w = (α + β √a_i)²,

    O~ = (β² (O − a_i v_i) + w v_i) / (β² (1 − a_i) + w)

and the log-linear one is the same with a softmax of temperature 1/(1 − u). The own probability needs the log-sum-exp of the row,
computed in blocks of rows. So no target and no geodesic needs an attention map.

Letters: B batch, N queries, M keys, U heads that are perturbed, K kv heads, D head dim.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from headwise.attach import HeadCall
from headwise.attach.diffusers import segments
from headwise.errors import EditError

BLOCK = 1 << 22  # logits of one block of rows
EPS = 1e-6  # mass that the log-linear geodesic leaves off the diagonal
SMALL_ANGLE = 1e-4  # slerp falls back to the straight line below it

Target = Literal[
    "identity",
    "uniform",
    "query-mean",
    "temperature",
    "image-identity",
    "image-identity-renormalized",
    "mask-image-image",
    "mask-image-text",
    "mask-text-image",
    "mask-text-text",
    "zero-image-image",
    "zero-image-text",
    "zero-text-image",
    "zero-text-text",
]
Geodesic = Literal["linear", "fisher-rao", "slerp", "log-linear"]
Scope = Literal["all", "image", "text"]


@dataclass(frozen=True)
class View:
    """The perturbed heads of one attention call: `out` (B, N, U, D) is what they gave; rows outside `rows` stay as they are."""

    call: HeadCall
    heads: tuple[int, ...]
    out: Tensor
    rows: slice

    @property
    def kv(self) -> Any:
        """The kv head that each perturbed head reads, as `place` gives it."""
        size = self.call.q.shape[1] // self.call.k.shape[1]
        return place([h // size for h in self.heads], self.out.device)

    @property
    def q(self) -> Tensor:
        """(B, U, N, D)."""
        return self.call.q[:, place(self.heads, self.out.device)]

    @property
    def k(self) -> Tensor:
        """(B, U, M, D)."""
        return self.call.k[:, self.kv]

    @property
    def v(self) -> Tensor:
        """(B, U, M, D)."""
        return self.call.v[:, self.kv]

    def own_values(self) -> Tensor:
        """(B, N, U, D): the value of the query's own token. EditError where a query has none."""
        call = self.call
        if call.options.get("cross") or call.k.shape[2] != call.q.shape[2]:
            raise EditError(
                f"layer {call.layer}: a target of identity needs self-attention; here {call.q.shape[2]} queries read "
                f"{call.k.shape[2]} keys of other tokens. Choose 'uniform' or 'temperature', or heads of another stack"
            )
        return call.own_values[:, self.kv].transpose(1, 2)

    def part(self, name: str) -> slice:
        """The image or the text tokens. EditError where the call does not say which they are."""
        found = segments(self.call).get(name)
        if found is None:
            raise EditError(
                f"layer {self.call.layer}: this call does not say which tokens are {name} tokens, so a target or scope that "
                "names them cannot be applied; use scope='all' with identity, uniform, query-mean or temperature"
            )
        return found

    def attend(self, q: Tensor, keys: slice | None = None) -> Tensor:
        """Attention (B, R, U, D) of other queries (B, U, R, D) of the same heads, over all keys or a part of them."""
        keys = slice(None) if keys is None else keys
        k, v = self.k[:, :, keys], self.v[:, :, keys]
        mask = self.call.mask
        if mask is not None:
            mask = mask[..., keys]
            mask = mask[:, :, :1] if q.shape[2] == 1 else mask
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=_bool_or_float(mask, q), scale=self.call.scale)
        return out.transpose(1, 2)

    def logits(self, beta: float = 1.0) -> Iterator[tuple[slice, Tensor]]:
        """(rows, logits (B, U, R, M) in float32 or wider) of β · q k / √D in blocks of rows, masked keys at −inf."""
        q, k = self.q, self.k
        wide = torch.promote_types(q.dtype, torch.float32)
        q, k = q.to(wide) * (self.call.scale * beta), k.to(wide)
        step = max(1, BLOCK // max(1, q.shape[0] * q.shape[1] * k.shape[2]))
        for begin in range(0, q.shape[2], step):
            rows = slice(begin, min(begin + step, q.shape[2]))
            logits = q[:, :, rows] @ k.mT
            if self.call.mask is not None:
                mask = self.call.mask[:, :, rows]
                logits = logits.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else logits + beta * mask
            yield rows, logits

    def own_probability(self, beta: float = 1.0) -> Tensor:
        """(B, N, U, 1): the weight that softmax(β q k / √D) gives to the query's own token."""
        found = []
        for rows, logits in self.logits(beta):
            own = logits.diagonal(offset=rows.start, dim1=-2, dim2=-1)  # (B, U, R)
            found.append(torch.exp(own - torch.logsumexp(logits, dim=-1)))
        return torch.cat(found, dim=-1).transpose(1, 2)[..., None]


def place(numbers: Sequence[int], device: torch.device | str = "cpu") -> Any:
    """Numbers as a slice where they are evenly spaced, which copies nothing; else as an index on the device, kept for the next call.

    >>> place([4, 5, 6]), place([0, 2, 4]), place([1, 2, 5])
    (slice(4, 7, 1), slice(0, 5, 2), tensor([1, 2, 5]))
    """
    first, step = numbers[0], numbers[1] - numbers[0] if len(numbers) > 1 else 1
    last = first + step * (len(numbers) - 1)
    if step > 0 and list(numbers) == list(range(first, last + 1, step)):
        return slice(first, last + 1, step)
    return _index(tuple(numbers), torch.device(device))


@functools.lru_cache(maxsize=1024)
def _index(numbers: tuple[int, ...], device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return torch.tensor(numbers, device=device)


def _bool_or_float(mask: Tensor | None, q: Tensor) -> Tensor | None:
    return mask if mask is None or mask.dtype == torch.bool else mask.to(q.dtype)


def _identity(view: View, beta: float) -> Tensor:
    return view.own_values()


def _uniform(view: View, beta: float) -> Tensor:
    if view.call.mask is None:
        return view.v.mean(dim=2)[:, None].expand_as(view.out)
    return view.attend(torch.zeros_like(view.q))


def _query_mean(view: View, beta: float) -> Tensor:
    q = view.q
    mean = q[:, :, view.rows].mean(dim=2, keepdim=True)
    if view.call.mask is None:
        return view.attend(mean).expand_as(view.out)
    return view.attend(mean.expand_as(q).contiguous())


def _temperature(view: View, beta: float) -> Tensor:
    if math.isinf(beta):
        return _argmax(view)
    return view.attend(view.q * beta)


def _argmax(view: View) -> Tensor:
    """The value of the key with the largest weight; the lowest position among equals."""
    best = torch.cat([logits.argmax(-1) for _, logits in view.logits()], dim=-1)  # (B, U, N)
    return view.v.gather(2, best[..., None].expand(-1, -1, -1, view.v.shape[-1])).transpose(1, 2)


def _image_identity(view: View, beta: float) -> Tensor:
    """Image rows: softmax over their own key and the text keys, in blocks of rows that are as wide as the text."""
    image, text = view.part("image"), view.part("text")
    own = view.own_values()[:, image]
    target = view.out.clone()
    wide = torch.promote_types(view.out.dtype, torch.float32)
    q, k = view.q[:, :, image].to(wide) * view.call.scale, view.k.to(wide)
    self_logit = (q * k[:, :, image]).sum(-1, keepdim=True)  # (B, U, n, 1)
    values, parts = view.v[:, :, text].to(wide), []
    step = max(1, BLOCK // max(1, q.shape[0] * q.shape[1] * max(1, values.shape[2])))
    for begin in range(0, q.shape[2], step):
        rows = slice(begin, begin + step)
        weights = torch.cat([q[:, :, rows] @ k[:, :, text].mT, self_logit[:, :, rows]], dim=-1).softmax(-1)
        parts.append(weights[..., :-1] @ values + weights[..., -1:] * own.transpose(1, 2)[:, :, rows].to(wide))
    target[:, image] = torch.cat(parts, dim=2).transpose(1, 2).to(target.dtype)
    return target


def _partial(view: View, rows: slice, keys: slice, ones: bool = False) -> Tensor:
    """(B, R, U, D) = sum over `keys` of a_ij v_j, the softmax over all keys; with `ones` the mass sum of a_ij."""
    v = torch.zeros_like(view.v)
    v[:, :, keys] = 1 if ones else view.v[:, :, keys]
    mask = view.call.mask
    mask = mask if mask is None else mask[:, :, rows]
    out = F.scaled_dot_product_attention(view.q[:, :, rows], view.k, v, attn_mask=mask, scale=view.call.scale)
    return out.transpose(1, 2)


def _image_identity_renormalized(view: View, beta: float) -> Tensor:
    image, text = view.part("image"), view.part("text")
    target = view.out.clone()
    mass = _partial(view, image, image, ones=True)
    target[:, image] = _partial(view, image, text) + mass * view.own_values()[:, image]
    return target


def _mask(rows: str, keys: str) -> Callable[[View, float], Tensor]:
    def masked(view: View, beta: float) -> Tensor:
        queries, others = view.part(rows), view.part("text" if keys == "image" else "image")
        if others.stop == others.start:
            raise EditError(f"layer {view.call.layer}: without its {keys} keys a row of this call sees nothing")
        target = view.out.clone()
        target[:, queries] = view.attend(view.q[:, :, queries], others)
        return target

    return masked


def _zero(rows: str, keys: str) -> Callable[[View, float], Tensor]:
    def zeroed(view: View, beta: float) -> Tensor:
        queries, target = view.part(rows), view.out.clone()
        target[:, queries] -= _partial(view, queries, view.part(keys)).to(target.dtype)
        return target

    return zeroed


TARGETS: dict[str, Callable[[View, float], Tensor]] = {
    "identity": _identity,
    "uniform": _uniform,
    "query-mean": _query_mean,
    "temperature": _temperature,
    "image-identity": _image_identity,
    "image-identity-renormalized": _image_identity_renormalized,
}
for _rows in ("image", "text"):
    for _keys in ("image", "text"):
        TARGETS[f"mask-{_rows}-{_keys}"] = _mask(_rows, _keys)
        TARGETS[f"zero-{_rows}-{_keys}"] = _zero(_rows, _keys)


def geodesic(view: View, u: Tensor, kind: str) -> Tensor:
    """(B, N, U, D): the rows that lie a share u (1 or B, 1, U, 1) of the way to identity on a curve; equations above."""
    own, wide = view.own_values(), torch.promote_types(view.out.dtype, torch.float32)
    if kind == "log-linear":
        return _log_linear(view, u, own)
    a = view.own_probability().clamp(0, 1)
    out, own, u = view.out.to(wide), own.to(wide), u.to(wide)
    if kind == "fisher-rao":
        alpha, beta = u.expand_as(a), (1 - u).expand_as(a)
    else:
        theta = torch.acos(a.sqrt().clamp(max=1.0))
        sine = theta.sin().clamp(min=torch.finfo(wide).tiny)
        alpha, beta = (u * theta).sin() / sine, ((1 - u) * theta).sin() / sine
    weight = (alpha + beta * a.sqrt()) ** 2
    mixed = (beta**2 * (out - a * own) + weight * own) / (beta**2 * (1 - a) + weight)
    if kind == "slerp":
        mixed = torch.where(theta < SMALL_ANGLE, (1 - u) * out + u * own, mixed)
    return mixed.to(view.out.dtype)


def _log_linear(view: View, u: Tensor, own: Tensor) -> Tensor:
    """a~ ∝ p^u a^(1−u) with p = 1 − ε at the own token and ε / (M − 1) elsewhere; one u at a time."""
    M, wide = view.k.shape[2], torch.promote_types(view.out.dtype, torch.float32)
    strengths = set(u.flatten().tolist())
    if len(strengths) > 1:
        raise EditError("the log-linear geodesic takes one strength for all heads of a layer")
    share = strengths.pop()
    b = view.own_probability(1.0 - share)
    cooled = view.attend(view.q * (1.0 - share)).to(wide)
    ratio = ((1 - EPS) / (EPS / max(1, M - 1))) ** share  # of the own token's p^u to any other's
    own = own.to(wide)
    return ((cooled - b * own + ratio * b * own) / (1 - b + ratio * b)).to(view.out.dtype)
