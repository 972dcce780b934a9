"""What every router of the zoo has in common: `Rule` (data), `Seen` (what a rule may read), `Router` (a rule with parameters).

Letters: B batch, N tokens, C width, E units, D features of a unit.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from headwise.attach.gates import GateRule
from headwise.checks import finite, whole
from headwise.errors import RouteError
from headwise.route._fused import fused_choice, fused_works
from headwise.route._routing import Ready, Routing


@dataclass
class Seen:
    """What a rule may read: tokens, its parameters, which tokens are real, and whether this is training.

    `token_ids` (B, N) for hash routing, `units` (B, N, E, D) features per unit for routing by norm. `generator` draws
    noise; None takes torch's own random state, as dropout does, so that gradient checkpointing repeats it.
    """

    x: Tensor
    weights: Mapping[str, Tensor]
    experts: int
    real: Tensor | None = None
    training: bool = False
    token_ids: Tensor | None = None
    units: Tensor | None = None
    generator: torch.Generator | None = None
    causal: bool = True

    def logits(self, name: str = "W") -> Tensor:
        """l = W x, (B, N, E)."""
        return F.linear(self.x, self.weights[name].to(self.x.dtype))

    def noise(self, like: Tensor, *, uniform: bool = False) -> Tensor:
        """Standard normal or uniform [0, 1) numbers of the shape of `like`."""
        device = like.device if self.generator is None else self.generator.device
        draw = torch.rand if uniform else torch.randn
        return draw(like.shape, generator=self.generator, device=device, dtype=like.dtype).to(like.device)


@dataclass(frozen=True, kw_only=True)
class Rule:
    """Common to all rules. `jitter`: in training x is first multiplied by U(1 − jitter, 1 + jitter) (Switch)."""

    jitter: float = 0.0
    future: ClassVar[bool] = False  # does the choice for a token depend on later ones?
    decodes: ClassVar[bool] = False  # does decoding need a cache of earlier tokens' routing?

    @property
    def reads_heads(self) -> bool:
        """Does it need q and k of the block's attention?"""
        return False

    def __post_init__(self) -> None:
        if not 0 <= finite("jitter", self.jitter, RouteError) < 1:
            raise RouteError(f"jitter is {self.jitter}; it must lie in [0, 1)")
        self.check()

    def check(self) -> None:
        """Raises RouteError for options out of range."""

    def check_experts(self, experts: int) -> None:
        """Raises RouteError if the rule cannot choose among this many units."""
        k = getattr(self, "k", 1)
        if k > experts:
            raise RouteError(f"k is {k} but there are {experts} experts; k must be at most that")

    def parameters(self, width: int, experts: int, generator: torch.Generator | None) -> dict[str, Tensor]:
        """Initial parameters by name."""
        return {"W": projection(experts, width, generator)}

    def buffers(self, experts: int) -> dict[str, Tensor]:
        """Initial state that is saved but not trained."""
        return {}

    def student(self) -> tuple[str, ...]:
        """Names of the parameters that `Router.freeze` takes out of training."""
        return ()

    def route(self, seen: Seen) -> Routing:
        """The routing of the tokens."""
        raise NotImplementedError

    def plain_gate(self) -> GateRule | None:
        """The gate rule, where the routing is this rule of l = W x and nothing else: kernels know that case."""
        return None

    def __call__(self, seen: Seen, **more: Any) -> Routing:
        """Jitter, then `route`."""
        if self.jitter and seen.training:
            factor = 1 + self.jitter * (2 * seen.noise(seen.x, uniform=True) - 1)
            seen = replace(seen, x=seen.x * factor)
        return self.route(seen, **more)


def checked_ids(seen: Seen, vocabulary: int, what: str) -> Tensor:
    """Token ids (B, N) inside 0 … vocabulary − 1; on a GPU the check waits for nobody."""
    ids = seen.token_ids
    if ids is None:
        raise RouteError(f"{what} needs token_ids=(B, N): it looks the unit up by token id")
    if ids.is_cuda:
        torch._assert_async(((ids >= 0) & (ids < vocabulary)).all(), f"a token id is outside 0 … {vocabulary - 1}")
    elif ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < vocabulary:
        raise RouteError(f"token ids from {int(ids.min())} to {int(ids.max())}; the table has {vocabulary} ids")
    return ids


def projection(rows: int, width: int, generator: torch.Generator | None, std: float = 0.02) -> Tensor:
    """(rows, width), normal."""
    return torch.zeros(rows, width).normal_(0.0, std, generator=generator)


class Router(nn.Module):
    """A rule with its parameters: tokens (B, N, C) to `Routing`. Float32 inside, autocast or not.

    Raises RouteError for units that the rule cannot choose among, for logits that are not finite, and, in a causal
    model, for rules whose choice looks at later tokens (`future=True` allows it where one knows what one does).

    >>> from headwise.route._rules import SoftmaxTopK
    >>> router = Router(SoftmaxTopK(k=2), width=8, experts=4, generator=torch.Generator().manual_seed(0))
    >>> routing = router(torch.randn(1, 5, 8, generator=torch.Generator().manual_seed(1)))
    >>> routing.index.shape, bool((routing.weight.sum(-1) - 1).abs().max() < 1e-6)
    (torch.Size([1, 5, 2]), True)
    """

    def __init__(
        self,
        rule: Rule,
        *,
        width: int,
        experts: int,
        causal: bool = True,
        future: bool = False,
        generator: torch.Generator | None = None,
    ):
        super().__init__()
        whole("width", width, 1, RouteError)
        whole("experts", experts, 1, RouteError)
        if not isinstance(rule, Rule):
            raise RouteError(f"rule is a {type(rule).__name__}; it must be a routing rule such as SoftmaxTopK(k=2)")
        rule.check_experts(experts)
        if causal and rule.future and not future:
            raise RouteError(
                f"{type(rule).__name__} lets a token's experts depend on later tokens, which leaks the future in a causal "
                "model; use causal=False, or future=True if the leak is wanted"
            )
        self.rule, self.width, self.experts, self.causal = rule, width, experts, causal
        for name, value in rule.parameters(width, experts, generator).items():
            self.register_parameter(name, nn.Parameter(value))
        for name, value in rule.buffers(experts).items():
            self.register_buffer(name, value)

    def forward(
        self,
        x: Tensor,
        *,
        real: Tensor | None = None,
        token_ids: Tensor | None = None,
        units: Tensor | None = None,
        generator: torch.Generator | None = None,
        **more: Any,
    ) -> Routing:
        """Route x (B, N, C); `real` (B, N) bool leaves padding out; token_ids, units: see `Seen`; `more`: see the rule."""
        if x.ndim != 3 or x.shape[-1] != self.width:
            raise RouteError(f"x has shape {tuple(x.shape)}; it must be (batch, tokens, {self.width})")
        if real is not None and real.shape != x.shape[:2]:
            raise RouteError(f"real has shape {tuple(real.shape)}; it must be {tuple(x.shape[:2])}")
        gate, W = self.rule.plain_gate(), self._parameters.get("W")
        if gate is not None and W is not None and not more and fused_works(x, W, gate):
            return self._fused(x, W, gate, real)
        with torch.autocast(x.device.type, enabled=False):
            wide = x.to(torch.promote_types(x.dtype, torch.float32))
            weights = {**self._parameters, **self._buffers}
            seen = Seen(wide, weights, self.experts, real, self.training, token_ids, units, generator, self.causal)  # type: ignore[arg-type]
            routing = self.rule(seen, **more)
            _must_be_finite(routing)
        self._note(routing)
        return routing

    def _fused(self, x: Tensor, W: Tensor, gate: GateRule, real: Tensor | None) -> Routing:
        """The same by kernels, with the batch's balance and z losses."""
        found = fused_choice(x.flatten(0, 1), W, gate, None if real is None else real.flatten())
        _assert(found.good)
        index, weight, probs, logits = (part.unflatten(0, x.shape[:2]) for part in found[:4])
        ready = Ready(index, probs, {"balance": found.balance, "z": found.z})
        return Routing(index, weight, probs, logits, real=real, ready=ready)

    def _apply(self, fn: Any, recurse: bool = True) -> Router:
        """`.to()` and friends: state stays float32, or bfloat16 would swallow counts above 256 and small steps of the bias."""
        before = {
            name: value for name, value in self._buffers.items() if value is not None and value.is_floating_point()
        }
        super()._apply(fn, recurse)
        for name, value in before.items():
            moved = self._buffers[name]
            if moved is not None and moved.dtype != value.dtype:
                self._buffers[name] = value.to(moved.device)
        return self

    @torch.no_grad()
    def _note(self, routing: Any) -> None:
        load = self._buffers.get("load")
        if self.training and load is not None:
            load += routing.load().to(load.device)

    @torch.no_grad()
    def update_bias(self) -> Tensor:
        """b += speed · sign(mean load − load) over what was routed in training since the last call, on all ranks; the load.

        Call it once after each optimizer step. Raises RouteError for a rule without a bias.
        """
        bias, load = self._buffers.get("bias"), self._buffers.get("load")
        if bias is None or load is None:
            raise RouteError(f"{type(self.rule).__name__} has no bias to update; SigmoidTopK has")
        seen = load.clone()
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(seen)
        bias += getattr(self.rule, "speed", 0.0) * torch.sign(seen.mean() - seen)
        load.zero_()
        return seen

    @torch.no_grad()
    def freeze(self) -> None:
        """Second stage of a two-stage rule: what was distilled chooses from now on. Saved; raises RouteError for other rules."""
        frozen = self._buffers.get("frozen")
        if frozen is None:
            raise RouteError(f"{type(self.rule).__name__} has one stage and nothing to freeze; Stable has two")
        frozen.fill_(1.0)
        for name in self.rule.student():
            self.get_parameter(name).requires_grad_(False)

    def extra_repr(self) -> str:
        """The rule, for printing."""
        return f"{self.rule}, width {self.width}, {self.experts} experts"


def _must_be_finite(routing: Any) -> None:
    """NaN logits choose unit 0 and look like a router that works; on a GPU the check waits for nobody."""
    logits = getattr(routing, "logits", None)
    if logits is None or logits.device.type == "meta":
        return
    _assert(logits.isfinite().all())


def _assert(good: Tensor) -> None:
    text = "router logits are not finite (NaN or infinity): the hidden states or the router's weights are broken"
    if good.is_cuda:
        torch._assert_async(good, text)
    elif not bool(good):
        raise RouteError(text)
