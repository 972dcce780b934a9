"""From dense to mixtures and back: upcycling, MoEfication, pruning, merging, reading transformers' blocks.

Letters: C width, I hidden width of the dense layer, E experts, k slots, g shards of a layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from headwise.attach.expert_stack import ExpertLayer
from headwise.attach.gates import infer_rule
from headwise.attach.locate import find_stack
from headwise.checks import finite, whole
from headwise.errors import RouteError
from headwise.route._experts import ACTIVATIONS, Experts
from headwise.route._moe import MoEHost, MoELayer, MoEState
from headwise.route._router_base import Router, Rule
from headwise.route._rules import Fixed, SigmoidTopK, SoftmaxTopK

How = Literal["copy", "drop", "virtual"]


def upcycle(
    model: nn.Module,
    *,
    experts: int = 8,
    k: int = 2,
    how: How = "copy",
    shards: int = 2,
    drop: float = 0.5,
    noise: float = 0.0,
    rule: Rule | None = None,
    losses: dict[str, float] | None = None,
    layers: Sequence[int] | None = None,
    seed: int = 0,
) -> MoEHost:
    """Turn gated feed-forward layers of a transformers model into mixtures that start from their weights, in place.

    "copy": every expert is the layer (Komatsuzaki et al. 2022), plus `noise` times the std of each weight. "drop": as
    copy, and a share `drop` of the hidden units of each expert is drawn anew with the layer's mean and std (Nakamura et
    al. 2025). "virtual": E experts are E / shards copies of the layer cut into `shards` slices, router rows equal within
    a copy, so that the k = shards · m best form m whole layers (He et al. 2024). With renormalised weights, "copy"
    without noise and "virtual" leave the model's output as it was. `layers`: which to convert, all if None. Returns the
    installed host. Raises RouteError for a model whose layers are not of that form; the model is then as it was.

    >>> from headwise.hub import load_model
    >>> model, _ = load_model("tiny-random-llama")
    >>> ids = torch.arange(9)[None]
    >>> before = model(ids).logits
    >>> host = upcycle(model, experts=4)
    >>> bool(torch.allclose(model(ids).logits, before, atol=1e-4)), len(host.layers)
    (True, 3)
    """
    rule = SoftmaxTopK(k=k, renorm=k > 1) if rule is None else rule
    _check(experts, k, how, shards, drop, noise)
    found = find_stack(model)
    blocks = [model.get_submodule(_block(found.pattern, n)) for n in range(found.layers)]
    wanted = (
        range(found.layers) if layers is None else [whole("layers", n, 0, RouteError, found.layers - 1) for n in layers]
    )
    dense = [_dense(blocks[n], n) for n in wanted]
    generator, state, made = torch.Generator().manual_seed(seed), MoEState(), []
    for mlp in dense:
        stacked = _stacked(mlp, experts, how, shards, drop, noise, generator)
        router = Router(rule, width=stacked.width, experts=experts, causal=found.causal, generator=generator)
        if how == "virtual":
            _tie_rows(router, shards)
        like = mlp.gate_proj.weight
        layer = MoELayer(router, stacked.to(like.dtype), losses=losses, state=state)  # the router stays float32
        made.append(layer.to(like.device).train(mlp.training))
    for n, layer in zip(wanted, made, strict=True):
        blocks[n].mlp = layer
    return MoEHost(model, found.owner, dict(zip(wanted, made, strict=True)), found.causal, state).install()


def _check(experts: int, k: int, how: str, shards: int, drop: float, noise: float) -> None:
    whole("k", k, 1, RouteError, whole("experts", experts, 1, RouteError))
    if how not in ("copy", "drop", "virtual"):
        raise RouteError(f"how is {how!r}; it must be 'copy', 'drop' or 'virtual'")
    if how == "virtual" and (experts % whole("shards", shards, 1, RouteError) or k % shards):
        raise RouteError(f"shards is {shards}; it must divide the {experts} experts and k = {k}")
    if not 0 <= finite("drop", drop, RouteError) <= 1 or finite("noise", noise, RouteError) < 0:
        raise RouteError(f"drop is {drop} and noise {noise}; drop must lie in [0, 1], noise be at least 0")


def _block(pattern: str, number: int) -> str:
    """Path of a decoder layer: `model.layers.*.self_attn` -> `model.layers.3`."""
    head, _, _ = pattern.partition("*")
    return f"{head}{number}"


def _dense(block: nn.Module, number: int) -> Any:
    mlp = getattr(block, "mlp", None)
    if not all(isinstance(getattr(mlp, name, None), nn.Linear) for name in ("gate_proj", "up_proj", "down_proj")):
        raise RouteError(
            f"layer {number} has no gated feed-forward layer 'mlp' with gate_proj, up_proj and down_proj; it is {type(mlp).__name__}"
        )
    if any(getattr(mlp, name).bias is not None for name in ("gate_proj", "up_proj", "down_proj")):
        raise RouteError(f"layer {number}: the feed-forward layer has biases, which experts do not")
    return mlp


def _activation(module: Any) -> Any:
    """Name of a module's `act_fn` among those that experts know, found by what it computes."""
    probe = torch.linspace(-4, 4, 33)
    found = [name for name, act in ACTIVATIONS.items() if torch.allclose(module.act_fn(probe), act(probe), atol=1e-6)]
    if not found:
        raise RouteError(
            f"{type(module.act_fn).__name__} is none of the activations of experts: {', '.join(ACTIVATIONS)}"
        )
    return found[0]


@torch.no_grad()
def _stacked(
    mlp: Any, experts: int, how: How, shards: int, drop: float, noise: float, generator: torch.Generator
) -> Experts:
    """The experts that a dense layer becomes."""
    gate, up, down = (
        getattr(mlp, name).weight.detach().float().cpu() for name in ("gate_proj", "up_proj", "down_proj")
    )
    hidden, width = gate.shape
    slices = shards if how == "virtual" else 1
    if hidden % slices:
        raise RouteError(f"shards is {shards}; it must divide the {hidden} hidden units of the layer")
    size = hidden // slices
    made = Experts(experts=experts, width=width, hidden=size, activation=_activation(mlp), generator=generator)
    for e in range(experts):
        part = slice((e % slices) * size, (e % slices + 1) * size)
        made.gate_up_proj[e] = torch.cat([gate[part], up[part]])
        made.down_proj[e] = down[:, part] * slices  # each slice is given 1 / slices of the weight
        if how == "drop":
            _draw_anew(made, e, drop, generator)
    if noise:
        for weight in (made.gate_up_proj, made.down_proj):
            weight.add_(noise * weight.std() * torch.randn(weight.shape, generator=generator))
    return made


def _draw_anew(experts: Experts, expert: int, share: float, generator: torch.Generator) -> None:
    """A share of the hidden units of an expert gets weights of the same mean and std as the layer's."""
    count = round(share * experts.hidden)
    units = torch.randperm(experts.hidden, generator=generator)[:count]
    for half in (0, experts.hidden):
        rows = experts.gate_up_proj[expert, half : half + experts.hidden]
        rows[units] = rows.mean() + rows.std() * torch.randn(count, experts.width, generator=generator)
    down = experts.down_proj[expert]
    down[:, units] = down.mean() + down.std() * torch.randn(experts.width, count, generator=generator)


@torch.no_grad()
def _tie_rows(router: Router, shards: int) -> None:
    weight = router.get_parameter("W")
    weight.copy_(weight[::shards].repeat_interleave(shards, dim=0))


def moefy(
    model: nn.Module, *, experts: int = 8, k: int = 2, layers: Sequence[int] | None = None, seed: int = 0
) -> MoEHost:
    """Cut the hidden units of each dense layer into E equal clusters and run the k best for each token (MoEfication).

    Units are clustered by balanced k-means on their rows of W_gate and W_up; the router's rows are the clusters' mean
    gate rows, and every chosen expert has weight 1, so that k = E is the dense layer exactly. No training.
    Zhang et al. 2022. Returns the installed host; RouteError as in `upcycle`.
    """
    whole("k", k, 1, RouteError, whole("experts", experts, 1, RouteError))
    found = find_stack(model)
    blocks = [model.get_submodule(_block(found.pattern, n)) for n in range(found.layers)]
    wanted = range(found.layers) if layers is None else list(layers)
    state, made = MoEState(), []
    dense = [_dense(blocks[n], n) for n in wanted]
    for mlp in dense:
        like = mlp.gate_proj.weight
        made.append(_cut(mlp, experts, k, state, seed).to(like.device, like.dtype).train(mlp.training))
    for n, layer in zip(wanted, made, strict=True):
        blocks[n].mlp = layer
    return MoEHost(model, found.owner, dict(zip(wanted, made, strict=True)), found.causal, state).install()


@torch.no_grad()
def _cut(mlp: Any, experts: int, k: int, state: MoEState, seed: int) -> MoELayer:
    gate, up, down = (
        getattr(mlp, name).weight.detach().float().cpu() for name in ("gate_proj", "up_proj", "down_proj")
    )
    hidden, width = gate.shape
    if hidden % experts:
        raise RouteError(f"experts is {experts}; it must divide the {hidden} hidden units of the layer")
    groups = balanced_clusters(torch.cat([gate, up], dim=1), experts, seed=seed)
    made = Experts(experts=experts, width=width, hidden=hidden // experts, activation=_activation(mlp))
    router = Router(Fixed(k=k), width=width, experts=experts)
    for e in range(experts):
        units = (groups == e).nonzero()[:, 0]
        made.gate_up_proj[e] = torch.cat([gate[units], up[units]])
        made.down_proj[e] = down[:, units]
        router.get_parameter("W")[e] = gate[units].mean(0)
    return MoELayer(router, made, state=state)


def balanced_clusters(rows: Tensor, clusters: int, *, seed: int = 0) -> Tensor:
    """(n,) cluster of each row of (n, F), all clusters of one size: k-means, then the best assignment of equal size."""
    from scipy.optimize import linear_sum_assignment

    points, generator = rows.double(), torch.Generator().manual_seed(seed)
    centres = points[torch.randperm(len(points), generator=generator)[:clusters]]
    for _ in range(20):
        near = torch.nn.functional.one_hot(torch.cdist(points, centres).argmin(1), clusters).double()
        held = near.sum(0)[:, None]
        centres = torch.where(held > 0, near.T @ points / held.clamp(min=1), centres)
    distance = torch.cdist(points, centres).square()
    places = torch.arange(len(rows)) % clusters
    _, columns = linear_sum_assignment(distance[:, places].numpy())
    return places[torch.as_tensor(columns)]


# -- fewer experts -----------------------------------------------------------------------------------------------------


@torch.no_grad()
def prune_experts(layer: MoELayer, keep: Sequence[int]) -> MoELayer:
    """A layer with only the experts `keep`, in that order, and their router rows; the old layer is left alone."""
    chosen = [whole("keep", e, 0, RouteError, layer.experts.experts - 1) for e in keep]
    if len(set(chosen)) != len(chosen) or not chosen:
        raise RouteError(f"keep is {list(keep)}; name each expert that stays once")
    weights = layer.experts.gate_up_proj[chosen], layer.experts.down_proj[chosen]
    return _smaller(layer, weights, {name: value[chosen] for name, value in _rows(layer).items()})


@torch.no_grad()
def merge_experts(
    layer: MoELayer, groups: Sequence[Sequence[int]], usage: Tensor | None = None, *, align: bool = True
) -> MoELayer:
    """One expert for each group: the mean of its members, weighed by `usage` (E,), after matching their hidden units.

    `align` permutes the hidden units of each member to fit the first one's best (linear assignment), because a
    permutation of hidden units is the same function. Router rows are averaged likewise. Groups must hold every expert once.
    """
    experts = layer.experts
    if sorted(e for group in groups for e in group) != list(range(experts.experts)):
        raise RouteError(
            f"groups is {[list(g) for g in groups]}; they must hold each of the {experts.experts} experts once"
        )
    share = torch.ones(experts.experts) if usage is None else usage.float()
    if share.shape != (experts.experts,) or not bool((share >= 0).all()):
        raise RouteError(f"usage has shape {tuple(share.shape)}; it must be ({experts.experts},) and not negative")
    ups, downs, rows = [], [], {name: [] for name in _rows(layer)}  # type: ignore[var-annotated]
    for group in groups:
        part = share[list(group)] + 1e-12
        part = (part / part.sum()).to(experts.down_proj.device, experts.down_proj.dtype)
        members = [_aligned(experts, group[0], e) if align else _weights(experts, e) for e in group]
        ups.append(sum(p * up for p, (up, _) in zip(part, members, strict=True)))
        downs.append(sum(p * down for p, (_, down) in zip(part, members, strict=True)))
        for name, value in _rows(layer).items():
            rows[name].append(torch.einsum("e,e...->...", part.to(value.dtype), value[list(group)]))
    return _smaller(layer, (torch.stack(ups), torch.stack(downs)), {n: torch.stack(v) for n, v in rows.items()})


@torch.no_grad()
def to_dense(layer: MoELayer, usage: Tensor | None = None) -> Experts:
    """One feed-forward layer in place of all experts: their (aligned, weighed) mean, as `Experts` of one."""
    experts = layer.experts
    share = torch.ones(experts.experts) if usage is None else usage.float()
    share = (share / share.sum()).to(experts.down_proj.dtype)
    members = [_aligned(experts, 0, e) for e in range(experts.experts)]
    made = Experts(
        experts=1, width=experts.width, hidden=experts.hidden, activation=experts.activation, gated=experts.gated
    )
    made.gate_up_proj.copy_(sum(p * up for p, (up, _) in zip(share, members, strict=True))[None])
    made.down_proj.copy_(sum(p * down for p, (_, down) in zip(share, members, strict=True))[None])
    return made


def _weights(experts: Experts, e: int) -> tuple[Tensor, Tensor]:
    return experts.gate_up_proj[e], experts.down_proj[e]


def _aligned(experts: Experts, first: int, e: int) -> tuple[Tensor, Tensor]:
    from scipy.optimize import linear_sum_assignment

    up, down = _weights(experts, e)
    if e == first:
        return up, down
    other_up, other_down = _weights(experts, first)

    def features(up: Tensor, down: Tensor) -> Tensor:
        halves = up.reshape(-1, experts.hidden, experts.width)
        return torch.cat([*halves, down.T], dim=1).double().cpu()

    likeness = features(other_up, other_down) @ features(up, down).T
    order = torch.as_tensor(linear_sum_assignment(likeness.numpy(), maximize=True)[1], device=up.device)
    return up.reshape(-1, experts.hidden, experts.width)[:, order].reshape(up.shape), down[:, order]


def _rows(layer: MoELayer) -> dict[str, Tensor]:
    """Parameters and buffers of the router that have a row for each expert."""
    state, E = layer.router.state_dict(), layer.experts.experts
    return {name: value for name, value in state.items() if value.ndim and value.shape[0] == E and name != "table"}


def _smaller(layer: MoELayer, weights: tuple[Tensor, Tensor], rows: dict[str, Tensor]) -> MoELayer:
    old, count = layer.experts, len(weights[0])
    made = Experts(experts=count, width=old.width, hidden=old.hidden, activation=old.activation, gated=old.gated)
    made.gate_up_proj.data, made.down_proj.data = weights[0].clone(), weights[1].clone()
    router = Router(layer.router.rule, width=old.width, experts=count, causal=layer.router.causal, future=True)
    router.load_state_dict({**layer.router.state_dict(), **rows})
    return MoELayer(
        router.to(old.down_proj.device), made, shared=layer.shared, capacity=layer.capacity, priority=layer.priority,
        losses=layer.losses, scope=layer.scope, backend=layer.backend, layer=layer.layer, state=layer.state,
    )  # fmt: skip


# -- transformers ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def from_transformers(layer: ExpertLayer, *, probe: int = 64, seed: int = 0) -> MoELayer:
    """A `MoELayer` that computes what a mixture-of-experts block of transformers computes, with copied weights.

    `layer` comes from `headwise.find_experts(model).layers`. The routing rule is inferred from the router's own choice
    on `probe` random tokens. Works for blocks with gated experts in the concatenated layout and, if any, one shared
    expert; RouteError otherwise.
    """
    experts, router, block = layer.experts, layer.router, layer.block
    down, up = experts.get_parameter("down_proj"), getattr(experts, "gate_up_proj", None)
    if (
        not isinstance(up, Tensor)
        or up.shape[1] != 2 * down.shape[2]
        or getattr(experts, "gate_up_proj_bias", None) is not None
    ):
        raise RouteError(
            f"{type(experts).__name__} does not hold gated experts as gate_up_proj (E, 2I, C) without biases"
        )
    E, width, hidden = down.shape
    tokens = torch.randn(probe, width, generator=torch.Generator().manual_seed(seed)).to(down.device, down.dtype)
    logits, weight, index = router(tokens)
    found = infer_rule(logits.reshape(-1, E), weight, index, router)
    if found is None:
        raise RouteError(f"the rule of {type(router).__name__} is none that headwise knows")
    gate, bias = found
    if gate.score == "sigmoid":
        rule: Rule = SigmoidTopK(
            k=gate.k, renorm=gate.renorm, scale=gate.scale, groups=gate.groups, top_groups=gate.top_groups
        )
    elif gate.scale == 1 and gate.groups == 1:
        rule = SoftmaxTopK(k=gate.k, renorm=gate.renorm)
    else:
        raise RouteError(f"{type(router).__name__} scales or groups a softmax, which SoftmaxTopK does not")
    mine = Router(rule, width=width, experts=E).to(down.device)
    mine.get_parameter("W").copy_(router.get_parameter("weight"))
    if bias is not None and "bias" in mine._buffers:
        mine.get_buffer("bias").copy_(bias)
    act = _activation(experts)
    made = Experts(experts=E, width=width, hidden=hidden, activation=act)
    made.gate_up_proj.data, made.down_proj.data = up.detach().clone(), down.detach().clone()
    return MoELayer(mine, made, shared=_shared(block, act))


def _shared(block: nn.Module, activation: Any) -> Experts | None:
    mlp = getattr(block, "shared_experts", None) or getattr(block, "shared_expert", None)
    if mlp is None:
        return None
    if getattr(block, "shared_expert_gate", None) is not None:
        raise RouteError("a gated shared expert is not read from transformers yet; build the MoELayer by hand")
    hidden, width = mlp.gate_proj.weight.shape
    made = Experts(experts=1, width=width, hidden=hidden, activation=activation)
    made.gate_up_proj.data = torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight])[None].detach().clone()
    made.down_proj.data = mlp.down_proj.weight[None].detach().clone()
    return made
