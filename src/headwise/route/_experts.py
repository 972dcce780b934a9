"""Feed-forward experts with stacked weights in transformers' layout, and the back-ends that run tokens through them.

    f_e(x) = W_down^e (act(W_gate^e x) ⊙ W_up^e x)          gate_up_proj (E, 2I, C), down_proj (E, C, I)

| back-end | does | good for |
|---|---|---|
| loop | one expert after the other, tokens found by comparing: the reference | reading |
| dense | every expert for every token, weighed | very few tokens, k close to E |
| sorted | pairs sorted by expert, one matmul each | CPU, float32 |
| grouped_mm | the same with torch's grouped matmul | GPUs from compute capability 8.0, bfloat16 |

Letters: T tokens, C width, I hidden width of an expert, E experts, k slots, S pairs of token and slot that are used.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from headwise.checks import whole
from headwise.errors import RouteError
from headwise.route._names import Activation, Backend
from headwise.route._permute import gather_sum, sort_pairs, spread, swiglu

LITTLE = 4e6  # multiplications of one projection of one expert, below which the grouped matmul is faster on the CPU

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "relu": F.relu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}


class Experts(nn.Module):
    """E feed-forward experts as two stacked parameters; `gated=False` drops the gate half: W_down act(W_up x).

    Raises RouteError for sizes below 1 or an unknown activation.

    >>> experts = Experts(experts=4, width=8, hidden=16, generator=torch.Generator().manual_seed(0))
    >>> experts.gate_up_proj.shape, experts.down_proj.shape
    (torch.Size([4, 32, 8]), torch.Size([4, 8, 16]))
    """

    def __init__(
        self,
        *,
        experts: int,
        width: int,
        hidden: int,
        activation: Activation = "silu",
        gated: bool = True,
        std: float = 0.02,
        generator: torch.Generator | None = None,
    ):
        super().__init__()
        for name, size in (("experts", experts), ("width", width), ("hidden", hidden)):
            whole(name, size, 1, RouteError)
        if activation not in ACTIVATIONS:
            raise RouteError(f"activation is {activation!r}; it must be one of {', '.join(ACTIVATIONS)}")
        self.experts, self.width, self.hidden = experts, width, hidden
        self.activation, self.gated = activation, gated
        rows = 2 * hidden if gated else hidden
        self.gate_up_proj = nn.Parameter(_normal(experts, rows, width, std=std, generator=generator))
        self.down_proj = nn.Parameter(_normal(experts, width, hidden, std=std, generator=generator))

    def inner(self, up: Tensor, weight: Tensor | None = None) -> Tensor:
        """What stands between the two matmuls: (..., 2I or I) -> (..., I); rows (S, …) are multiplied by `weight` (S,)."""
        if self.gated and self.activation == "silu" and up.ndim == 2:
            return swiglu(up, weight)
        act = ACTIVATIONS[self.activation]
        if self.gated:
            gate, value = up.chunk(2, dim=-1)
            made = act(gate) * value
        else:
            made = act(up)
        return made if weight is None else made * weight[:, None]

    def one(self, expert: int, x: Tensor) -> Tensor:
        """Expert `expert` on x (..., C)."""
        return F.linear(self.inner(F.linear(x, self.gate_up_proj[expert])), self.down_proj[expert])

    def every(self, x: Tensor) -> Tensor:
        """All experts on their own tokens: x (E, T, C) -> (E, T, C)."""
        return torch.bmm(self.inner(torch.bmm(x, self.gate_up_proj.mT)), self.down_proj.mT)

    def merged(self, weight: Tensor, x: Tensor) -> Tensor:
        """One pass through Σ_e weight_e θ_e: weight (G, E), x (G, n, C) -> (G, n, C) (SMEAR, Lory)."""
        up = torch.einsum("ge,eij->gij", weight, self.gate_up_proj)
        down = torch.einsum("ge,eij->gij", weight, self.down_proj)
        return torch.bmm(self.inner(torch.bmm(x, up.mT)), down.mT)

    def forward(
        self, x: Tensor, index: Tensor, weight: Tensor, used: Tensor | None = None, backend: Backend = "auto"
    ) -> Tensor:
        """Σ_j weight_j f_{index_j}(x) over the used slots, all if None: x (T, C); index, weight, used (T, k) -> (T, C)."""
        kind, given = x.device.type, x.dtype
        if torch.is_autocast_enabled(kind):  # autocast does not know grouped_mm
            x = x.to(torch.get_autocast_dtype(kind))
        return BACKENDS[pick(self, x, index, backend)](self, x, index, weight.to(x.dtype), used).to(given)

    def extra_repr(self) -> str:
        """Sizes, for printing."""
        kind = "gated " if self.gated else ""
        return f"{self.experts} experts, width {self.width}, hidden {self.hidden}, {kind}{self.activation}"


# -- back-ends ---------------------------------------------------------------------------------------------------------


def loop(experts: Experts, x: Tensor, index: Tensor, weight: Tensor, used: Tensor | None) -> Tensor:
    """The equation: expert after expert, on the tokens that use it."""
    out = torch.zeros_like(x)
    for expert in range(experts.experts):
        mine = index == expert
        token, slot = torch.where(mine if used is None else mine & used)
        if token.numel():
            out = out.index_add(0, token, experts.one(expert, x[token]).to(x.dtype) * weight[token, slot, None])
    return out


def dense(experts: Experts, x: Tensor, index: Tensor, weight: Tensor, used: Tensor | None) -> Tensor:
    """Every expert on every token; gates that are 0 take the rest away again."""
    gates = torch.zeros(len(x), experts.experts, dtype=x.dtype, device=x.device)
    gates = gates.scatter_add(1, index, weight if used is None else weight.masked_fill(~used, 0))
    return torch.einsum("te,etc->tc", gates, experts.every(x.expand(experts.experts, -1, -1)))


def by_sorting(experts: Experts, x: Tensor, index: Tensor, weight: Tensor, used: Tensor | None) -> Tensor:
    """Pairs sorted by expert; one pair of matmuls for each run of like pairs."""
    pairs = sort_pairs(index, used, experts.experts)
    if not len(pairs.order):
        return x.masked_fill(torch.ones_like(x, dtype=torch.bool), 0)
    sizes = pairs.ends.diff(prepend=pairs.ends.new_zeros(1)).tolist()
    rows, gates = spread(x, pairs).split(sizes), weight.reshape(-1).index_select(0, pairs.order).split(sizes)
    each = zip(rows, gates, experts.gate_up_proj.unbind(), experts.down_proj.unbind(), strict=True)
    done = [F.linear(experts.inner(F.linear(part, up), w), down) for part, w, up, down in each if len(part)]
    return gather_sum(torch.cat(done), pairs)


def by_grouped_mm(experts: Experts, x: Tensor, index: Tensor, weight: Tensor, used: Tensor | None) -> Tensor:
    """The same with one grouped matmul per projection: no loop and, if every slot is used, no waiting for the device."""
    pairs = sort_pairs(index, used, experts.experts)
    if not len(pairs.order):
        return x.masked_fill(torch.ones_like(x, dtype=torch.bool), 0)
    gates = weight.reshape(-1).index_select(0, pairs.order)
    up = grouped(spread(x, pairs), experts.gate_up_proj.mT, pairs.ends)
    return gather_sum(grouped(experts.inner(up, gates), experts.down_proj.mT, pairs.ends), pairs)


def routed_linear(x: Tensor, weight: Tensor, index: Tensor) -> Tensor:
    """W_{index} x for every slot: x (T, k or 1, C), weight (E, O, C), index (T, k) -> (T, k, O); no expert runs unasked."""
    T, k = index.shape
    pairs = sort_pairs(index, None, len(weight))
    sizes = pairs.ends.diff(prepend=pairs.ends.new_zeros(1)).tolist()
    rows = x.reshape(-1, x.shape[-1]).index_select(0, pairs.order if x.shape[1] == k else pairs.token)
    done = [F.linear(part, w) for part, w in zip(rows.split(sizes), weight.unbind(), strict=True) if len(part)]
    out = torch.cat(done) if done else rows.new_zeros(0, weight.shape[1])
    return out.index_select(0, pairs.place.reshape(-1)).reshape(T, k, -1)


def grouped(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """Rows of x (S, C) up to ends[e] times weight[e] (E, C, I)."""
    function = getattr(F, "grouped_mm", None) or torch._grouped_mm
    return function(x.contiguous(), weight.to(x.dtype), offs=ends)


BACKENDS: dict[str, Callable[[Experts, Tensor, Tensor, Tensor, Tensor | None], Tensor]] = {
    "loop": loop,
    "dense": dense,
    "sorted": by_sorting,
    "grouped_mm": by_grouped_mm,
}


def grouped_mm_works(experts: Experts, x: Tensor) -> bool:
    """Can torch's grouped matmul run these shapes here? On CUDA it wants bfloat16 and rows of a multiple of 16 bytes."""
    if not (hasattr(F, "grouped_mm") or hasattr(torch, "_grouped_mm")):
        return False
    if x.device.type != "cuda":
        return x.device.type == "cpu" and x.dtype in (torch.float32, torch.bfloat16)
    aligned = experts.width % 8 == 0 and experts.hidden % 8 == 0
    return x.dtype == torch.bfloat16 and aligned and torch.cuda.get_device_capability(x.device) >= (8, 0)


def pick(experts: Experts, x: Tensor, index: Tensor, backend: Backend = "auto") -> str:
    """The back-end that runs: the one asked for, else what measurements say (docs/methods/experts.md).

    grouped_mm on a GPU that has it; on the CPU dense for k = E, grouped_mm where an expert has little to do, else
    sorted. Raises RouteError for an unknown or impossible back-end.
    """
    if backend not in get_args(Backend):
        raise RouteError(f"backend is {backend!r}; it must be one of {', '.join(get_args(Backend))}")
    can = grouped_mm_works(experts, x)
    if backend == "grouped_mm" and not can:
        raise RouteError(
            f"backend 'grouped_mm' cannot run {x.dtype} of width {experts.width} on {x.device.type}; use 'sorted' or 'auto'"
        )
    if backend != "auto":
        return backend
    if index.shape[1] >= experts.experts and x.device.type == "cpu":
        return "dense"
    work = index.numel() / experts.experts * experts.width * experts.hidden
    return "grouped_mm" if can and (x.device.type == "cuda" or work < LITTLE) else "sorted"


def measure(experts: Experts, x: Tensor, index: Tensor, weight: Tensor, *, repeats: int = 5) -> dict[str, float]:
    """Seconds of one forward and backward pass by each back-end that can run here: the best of `repeats`."""
    seconds = {}
    for name in BACKENDS:
        if name != "grouped_mm" or grouped_mm_works(experts, x):
            seconds[name] = min(_timed(experts, x, index, weight, name) for _ in range(repeats + 1))  # type: ignore[arg-type]
    return seconds


def _timed(experts: Experts, x: Tensor, index: Tensor, weight: Tensor, name: Backend) -> float:
    x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
    _wait(x)
    start = time.perf_counter()
    experts(x, index, weight, None, name).sum().backward()
    _wait(x)
    return time.perf_counter() - start


def _wait(x: Tensor) -> None:
    if x.device.type == "cuda":
        torch.cuda.synchronize(x.device)


def _normal(*shape: int, std: float, generator: torch.Generator | None) -> Tensor:
    return torch.zeros(shape).normal_(0.0, std, generator=generator)
