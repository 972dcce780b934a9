"""Read checkpoints of the released mixture-of-head models: their router weights as `HeadRouter`, the rest as plain weights.

The released attention modules hold their router beside the projections, all without bias: `wg` (E, C) is W_r, `wg_0`
(2, C) W_h and `wg_1` (h_s, C) W_s. `wg_1` is missing where one head is shared or none, `wg` and `wg_0` where no head is
routed. How many heads a token chooses, K, is in no tensor: the preset says it. The released LLaMA has no router weights.

Letters: E routed heads, C width of the hidden state, h_s shared heads, K chosen heads.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from headwise.attach import find_stack, fingerprint
from headwise.attach.diffusers import is_diffusers
from headwise.checks import Meta, shown
from headwise.errors import RouteError
from headwise.route._config import LayerRoute, RouterConfig
from headwise.route._presets import MoHPreset, moh_preset
from headwise.route._router import HeadRouter
from headwise.units import Fingerprint

GATES = {"wg": "W_r", "wg_0": "W_h", "wg_1": "W_s"}
"""Name in the released modules → parameter of a trained router's layer."""

_BLOCK = re.compile(r"^(?P<stack>.*?)\.(?P<layer>\d+)\.(?P<attn>attn|self_attn)\.(?P<rest>.+)$")


@dataclass(frozen=True)
class OfficialMoH:
    """A released checkpoint taken apart: a router for each stack of layers, and the weights of the dense model.

    A DiT has one stack, "blocks"; a TransNeXt ViT four, "block1" to "block4", each of its own width and heads.
    """

    routers: dict[str, HeadRouter]
    weights: dict[str, Tensor]

    @property
    def router(self) -> HeadRouter:
        """The only router. Raises RouteError where there are several."""
        if len(self.routers) != 1:
            raise RouteError(f"the checkpoint has routers for the stacks {', '.join(self.routers)}; choose of .routers")
        return next(iter(self.routers.values()))


def load_official(
    state: Mapping[str, Tensor],
    model: nn.Module | None = None,
    *,
    preset: MoHPreset | str | None = None,
    routed: Sequence[int] | None = None,
) -> OfficialMoH:
    """Split the state dict of a released MoH-ViT, MoH-DiT or MoH-LLaMA3 into routers and plain weights.

    state: the flat state dict (of the released files, `torch.load(path, weights_only=True)["model"]` or `["ema"]`).
    model: the dense host, which gets the plain weights: one with the same names (the released backbone without its
      routers, a timm model, a transformers Llama) or diffusers' DiT. It has to have the same heads in each layer.
    preset: which published configuration it is (`MOH_PRESETS`); needed wherever heads are routed, for K.
    routed: K of each layer instead of a preset, for a model of one's own trained with the released module.

    Raises RouteError for a state dict of another layout, or shapes that the preset or the model contradict; the model
    is then as it was.

    >>> state = {"blocks.0.attn.proj.weight": torch.ones(8, 8), "blocks.0.attn.wg.weight": torch.zeros(3, 8),
    ...          "blocks.0.attn.wg_0.weight": torch.zeros(2, 8)}
    >>> official = load_official(state, routed=[2])
    >>> print(official.router, "|", *official.weights)
    trained head router: kept 3 of 4 (0.750) in 1 layers, 1 of them shared | blocks.0.attn.proj.weight
    """
    stacks = _stacks(state)
    chosen = moh_preset(preset) if isinstance(preset, str) else preset
    plain = {name: value for name, value in state.items() if not _gate(name)}
    print_ = None if model is None else fingerprint(model)
    if len(plain) == len(state):
        routers = {stack: _by_norm(stack, layers, chosen, print_) for stack, layers in stacks.items()}
    else:
        routers = _trained(stacks, chosen, routed, print_)
    if model is not None:
        _load_plain(model, plain)
    return OfficialMoH(routers, plain)


Layers = dict[int, dict[str, Tensor]]


def _stacks(state: Mapping[str, Tensor]) -> dict[str, Layers]:
    """Router tensors of each layer of each stack, empty where a layer has none."""
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise RouteError('the state dict must map names to tensors; of a released file take its entry "model" or "ema"')
    stacks: dict[str, Layers] = {}
    for name, value in state.items():
        found = _BLOCK.match(name)
        if found is None:
            continue
        layer = stacks.setdefault(found["stack"], {}).setdefault(int(found["layer"]), {})
        if gate := _gate(name):
            layer[gate] = value
    if not stacks:
        raise RouteError(
            f"no attention weights such as blocks.0.attn.wg.weight among {shown(sorted(state)[:3])}: not a MoH checkpoint"
        )
    for stack, layers in stacks.items():
        if sorted(layers) != list(range(len(layers))):
            raise RouteError(f"{stack} has the layers {sorted(layers)}; they must be numbered from 0 without a gap")
    return dict(sorted(stacks.items()))


def _gate(name: str) -> str | None:
    """The router parameter that a tensor of the released module is, if it is one."""
    found = _BLOCK.match(name)
    return GATES.get(found["rest"].removesuffix(".weight")) if found else None


def _trained(
    stacks: dict[str, Layers],
    preset: MoHPreset | None,
    routed: Sequence[int] | None,
    print_: Fingerprint | None,
) -> dict[str, HeadRouter]:
    total = sum(map(len, stacks.values()))
    if routed is None and preset is None:
        raise RouteError("how many heads a token chooses is not in the checkpoint: give preset= or routed=")
    counts = [route.routed for route in preset.layers] if routed is None and preset else list(routed or ())
    if len(counts) != total:
        raise RouteError(f"the checkpoint has {total} attention layers, preset or routed names {len(counts)}")
    routers, start = {}, 0
    for stack, layers in stacks.items():
        tensors = [layers[i] for i in range(len(layers))]
        rows = range(start, start + len(layers))
        routes = [_route(f"{stack}.{i}", tensors[i], counts[row]) for i, row in enumerate(rows)]
        if preset is not None:
            _agree(stack, routes, preset.layers[start : start + len(layers)])
        routers[stack] = _router(stack, routes, tensors, print_ if len(stacks) == 1 else None, preset)
        start += len(layers)
    return routers


def _route(where: str, tensors: dict[str, Tensor], routed: int) -> LayerRoute:
    """Heads from shapes: `wg_1` has a row for each of several shared heads, `wg_0` alone means one."""
    E = tensors["W_r"].shape[0] if "W_r" in tensors else 0
    S = tensors["W_s"].shape[0] if "W_s" in tensors else int("W_h" in tensors or not E)
    if bool(E) != bool(routed):
        raise RouteError(f"{where}: {routed} heads are to be chosen, the checkpoint has {E} to choose from")
    if ("W_h" in tensors) != bool(E and S):
        raise RouteError(f"{where}: wg_0 must be there where heads are both shared and routed, and only there")
    return LayerRoute.first(S + E, S, routed)


def _agree(stack: str, routes: Sequence[LayerRoute], wanted: Sequence[LayerRoute]) -> None:
    for layer, (route, want) in enumerate(zip(routes, wanted, strict=True)):
        if route != want:
            raise RouteError(
                f"{stack}.{layer} has {len(route.shared)} shared heads of {route.heads}, the preset "
                f"{len(want.shared)} of {want.heads}: another preset?"
            )


def _router(
    stack: str,
    routes: Sequence[LayerRoute],
    tensors: Sequence[dict[str, Tensor]],
    print_: Fingerprint | None,
    preset: MoHPreset | None,
) -> HeadRouter:
    widths = {tensor.shape[-1] for row in tensors for tensor in row.values()}
    if len(widths) != 1 or any(tensor.ndim != 2 for row in tensors for tensor in row.values()):
        raise RouteError(f"{stack}: router weights read hidden states of widths {sorted(widths)}; there must be one")
    meta: Meta = {"source": "released checkpoint", "stack": stack, **({"preset": preset.name} if preset else {})}
    config = RouterConfig(layers=tuple(routes), kind="trained", width=widths.pop(), fingerprint=print_, meta=meta)
    router = HeadRouter(config)
    weights = {f"layers.{i}.{name}": t.float() for i, row in enumerate(tensors) for name, t in row.items()}
    mine = {name: tuple(t.shape) for name, t in router.state_dict().items()}
    if mine != {name: tuple(t.shape) for name, t in weights.items()}:
        raise RouteError(f"{stack}: router weights of shapes that do not belong together: {mine}")
    router.load_state_dict(weights)
    return router


def _by_norm(stack: str, layers: Layers, preset: MoHPreset | None, print_: Fingerprint | None) -> HeadRouter:
    """The released LLaMA: no router weights, the first half of the heads shared, a quarter chosen by query norm."""
    if preset is None and print_ is None:
        raise RouteError("this checkpoint has no router weights (routing by query norm): give preset= or model=")
    if preset is not None and preset.kind != "norm":
        raise RouteError(f"preset {preset.name} has router weights (wg, wg_0, wg_1); the checkpoint has none")
    routes = preset.layers if preset else ()
    if print_ is not None and preset is None:
        heads = print_.heads
        routes = (LayerRoute.first(heads, int(heads * 0.5), int(heads * (0.75 - 0.5))),) * print_.layers
    if len(routes) != len(layers):
        raise RouteError(
            f"{stack} has {len(layers)} layers, {preset.name if preset else 'the model'} has {len(routes)}"
        )
    meta: Meta = {"source": "released checkpoint", "stack": stack}
    return HeadRouter(RouterConfig(layers=routes, kind="norm", fingerprint=print_, meta=meta))


# the dense host


@torch.no_grad()
def _load_plain(model: nn.Module, plain: Mapping[str, Tensor]) -> None:
    if is_diffusers(model):
        plain = dit_to_diffusers(plain, find_stack(model).layers)
    mine = model.state_dict()
    tied = set(getattr(model, "_tied_weights_keys", None) or ())
    missing = [name for name in mine if name not in plain and name not in tied]
    wrong = [name for name in plain if name not in mine or mine[name].shape != plain[name].shape]
    if missing or wrong:
        raise RouteError(
            f"the weights do not fit {type(model).__name__}: it misses {shown(missing[:3])}, and has not or in another "
            f"shape {shown(wrong[:3])}"
        )
    model.load_state_dict(dict(plain), strict=False)


def dit_to_diffusers(plain: Mapping[str, Tensor], layers: int) -> dict[str, Tensor]:
    """Weights of a DiT by the names of its released code → by those of diffusers' DiTTransformer2DModel.

    The sine table of positions is a constant of both and left out. Raises RouteError for a weight that is missing.
    """
    left = {name: value for name, value in plain.items() if name != "pos_embed"}
    made: dict[str, Tensor] = {}
    shared = {
        "t_embedder.mlp.0": "timestep_embedder.linear_1",
        "t_embedder.mlp.2": "timestep_embedder.linear_2",
        "y_embedder.embedding_table": "class_embedder.embedding_table",
    }
    copied = [(theirs, value) for theirs in shared for value in _take(left, theirs).items()]
    for layer in range(layers):
        old, new = f"blocks.{layer}", f"transformer_blocks.{layer}"
        for theirs, (end, value) in copied:  # diffusers gives each block a copy of the condition's embedders
            made[f"{new}.norm1.emb.{shared[theirs]}.{end}"] = value.clone()
        for end, value in _take(left, f"{old}.attn.qkv").items():
            for name, part in zip("qkv", value.chunk(3), strict=True):
                made[f"{new}.attn1.to_{name}.{end}"] = part.clone()
        pairs = {
            "attn.proj": "attn1.to_out.0",
            "mlp.fc1": "ff.net.0.proj",
            "mlp.fc2": "ff.net.2",
            "adaLN_modulation.1": "norm1.linear",
        }
        for theirs, name in pairs.items():
            made |= {f"{new}.{name}.{end}": value for end, value in _take(left, f"{old}.{theirs}").items()}
    ends = {
        "x_embedder.proj": "pos_embed.proj",
        "final_layer.adaLN_modulation.1": "proj_out_1",
        "final_layer.linear": "proj_out_2",
    }
    for theirs, name in ends.items():
        made |= {f"{name}.{end}": value for end, value in _take(left, theirs).items()}
    return made | left  # what is left over has no place and is named by whoever loads it


def _take(left: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Take the tensors under a prefix out of a state dict: weight, and bias where there is one."""
    found = {name[len(prefix) + 1 :]: name for name in left if name.startswith(prefix + ".")}
    if not found:
        raise RouteError(f"the checkpoint has no {prefix}.weight: it is no DiT of the released layout")
    return {end: left.pop(name) for end, name in found.items()}
