"""VAR: attention that image-centric heads waste on sinks goes to the rest of the image (visual attention redistribution, arXiv 2503.03321).

Letters: L layers, B batch, N columns, H query heads, K kv heads, D head dim, P positions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from headwise import storage
from headwise.attach import HeadCall, find_stack, fingerprint
from headwise.attach.images import InLayers, decoder_stack, looked_up
from headwise.attach.observe import row_statistics
from headwise.attach.sinks import SinkTokens, check_dims, check_tau, find_sink_dims
from headwise.checks import finite, numbers, shown, whole
from headwise.errors import AttachError, EditError
from headwise.registry import register
from headwise.steer import _var_rows as few_rows
from headwise.storage import StrPath, decoding, field
from headwise.tasks.pictures import picture_batches
from headwise.units import Fingerprint, HeadSet

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


BLOCK = 1 << 24
"""Weights that are made at a time."""


@dataclass(frozen=True, kw_only=True)
class VAR:
    """What is done, as data; `attach(model)` does it.

    For a text query behind an image, in a layer with a sink on an image: a head is image-centric if its mass on the image is
    at least `minimum_mass` and the share of it that is not on sinks at least `rho`. There the share `move` of the mass on all
    sinks (of image and text) goes to the image's other tokens in proportion:

        O' = O − p·O_sinks + (p·P_sinks / P_rest)·O_rest

    P and O are the masses and partial outputs of these groups of keys. `centric=False` edits every head whatever it looks
    at, which the paper shows to fail. `heads` narrows the heads that may be chosen. A query whose P_rest is 0 stays as it is.
    """

    dims: tuple[int, ...]
    layers: tuple[int, ...]
    tau: float = 20.0
    rho: float = 0.8
    minimum_mass: float = 0.2
    move: float = 0.6
    centric: bool = True
    heads: HeadSet | None = None
    fingerprint: Fingerprint | None = None

    def __post_init__(self) -> None:
        if not 0 <= finite("move", self.move, EditError) <= 1:
            raise EditError(f"move is {self.move:g}; it is the share of the sinks' attention that moves, in [0, 1]")
        for name in ("rho", "minimum_mass"):
            if finite(name, getattr(self, name), EditError) < 0:
                raise EditError(f"{name} is {getattr(self, name):g}; it must be at least 0")
        if not self.tau > 0:
            raise EditError(f"tau is {shown(self.tau)}; it must be a number above 0")
        object.__setattr__(self, "dims", check_dims(tuple(self.dims), 2**31))
        layers = tuple(sorted({whole("a layer", layer, 0, EditError) for layer in self.layers}))
        if not layers:
            raise EditError("layers is empty; name at least one layer")
        object.__setattr__(self, "layers", layers)
        if self.heads is not None and (self.heads.kind != "head" or not len(self.heads)):
            raise EditError("heads must be a set of query heads with at least one head")

    def attach(self, model: PreTrainedModel) -> Redistributed:
        """Put it into a model: a context manager with `detach()`; `selected` counts what was edited."""
        print_ = fingerprint(model, decoder_stack(model))
        if self.fingerprint is not None:
            self.fingerprint.require(print_, "VAR")
        if self.heads is not None:
            self.heads.check(print_)
        for layer in self.layers:
            whole("a layer", layer, 0, EditError, high=print_.layers - 1)
        return Redistributed(model, self)

    def save(self, path: StrPath) -> None:
        """Write JSON."""
        plain = {name: getattr(self, name) for name in ("rho", "minimum_mass", "move", "centric")}
        tau = None if self.tau == float("inf") else self.tau
        lists = {"dims": list(self.dims), "layers": list(self.layers), "heads": self.heads and str(self.heads)}
        print_ = self.fingerprint and self.fingerprint.to_dict()
        storage.write_json(path, "var", 1, {**plain, **lists, "tau": tau, "fingerprint": print_})

    @classmethod
    def load(cls, path: StrPath) -> VAR:
        """Read what `save` wrote. Raises ArtifactError."""
        data = storage.read_json(path, "var", 1)
        with decoding(path):
            print_, heads, tau = data.get("fingerprint"), data.get("heads"), data.get("tau")
            return cls(
                dims=tuple(field(data, "dims", list)),
                layers=tuple(field(data, "layers", list)),
                tau=float("inf") if tau is None else field(data, "tau", float),
                rho=field(data, "rho", float),
                minimum_mass=field(data, "minimum_mass", float),
                move=field(data, "move", float),
                centric=field(data, "centric", bool),
                heads=None if heads is None else HeadSet.parse(heads),
                fingerprint=None if print_ is None else Fingerprint.from_dict(print_),
            )

    def __str__(self) -> str:
        which = "image-centric heads" if self.centric else "all heads"
        return (
            f"VAR: {self.move:g} of the attention on sinks (dimensions {','.join(map(str, self.dims))} above {self.tau:g}) goes to "
            f"the rest of the image,\nin {which} (rho {self.rho:g}, mass {self.minimum_mass:g}) of layers {','.join(map(str, self.layers))}"
        )


class Redistributed(SinkTokens):
    """VAR at work in a model: `sinks[layer]` (B, P) bool of the last prompt, by position."""

    def __init__(self, model: PreTrainedModel, rule: VAR):
        super().__init__(model, rule.dims, rule.tau, rule.layers)
        self.rule = rule
        self._selected: dict[int, Tensor] = {}
        self._heads: dict[int, Tensor] = {}
        self._rooms: dict[tuple, few_rows.Room] = {}
        self._steps: dict[int, few_rows.Step] = {}
        self._groups: dict[int, Tensor] = {}
        self._asked: tuple[Tensor, Tensor] | None = None  # queries of the pass at hand, and their columns
        self.attach_with(InLayers(self._transform, rule.layers, own_attention=True, counts=True))

    def begin(self, ids: Tensor, mask: Tensor) -> None:
        """Forget what was seen of the prompt before."""
        super().begin(ids, mask)
        self._selected = {}

    def _before(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        super()._before(module, args, kwargs)
        if self._reading:
            self._steps, self._groups = {}, {}

    @property
    def selected(self) -> dict[int, int]:
        """By layer, how many (row, query, head) were edited since the last prompt began."""
        return {layer: int(count) for layer, count in self._selected.items()}

    def _transform(self, call: HeadCall, attend: Callable[[], Tensor]) -> Tensor:
        if self.paused:
            return attend()
        self.check_call(call)
        step = self._steps.get(call.layer)
        if step is not None and step.fits(call):
            return step(call)
        if not self.rule.move or not self.any_image_sink.get(call.layer):
            return attend()
        if call.options.get("dropout"):
            raise AttachError(
                "VAR works with several attention calls, which dropout would make disagree: call model.eval()"
            )
        if few_rows.serves(call):
            step = self._steps[call.layer] = self._step(call)
            return step(call)
        out = attend()  # (B, N, H, D)
        queries = self.text_queries().to(out.device)  # (B, N)
        if few_rows.is_dense(call):
            return self._by_rows(call, out, queries)
        masses = self._masses(call, queries)
        chosen = self._choose(call, masses) & queries[:, None]  # (B, H, N)
        self._count(call.layer, chosen)
        return self._move(call, out, _ratio(masses, chosen), chosen)

    def _by_rows(self, call: HeadCall, out: Tensor, queries: Tensor) -> Tensor:
        """The rows that may be edited, in blocks, by their weights; the others are not looked at."""
        B, H, N, D = call.q.shape
        columns, groups = self._columns(queries), self._groups_of(call.layer)
        step = max(1, BLOCK // (B * H * call.k.shape[2]))
        for part in columns.split(step, 1):
            rows = few_rows.Rows.of(call, groups, part)
            masses = rows.masses()
            chosen = self._choose(call, masses) & queries.gather(1, part)[:, None]
            self._count(call.layer, chosen)
            at = part[..., None, None].expand(-1, -1, H, out.shape[-1])
            old = out if N == 1 else out.gather(1, at)
            new = rows.moved(old, _ratio(masses, chosen), chosen, self.rule.move)
            out = new if N == 1 else out.scatter(1, at, new)
        return out

    def _groups_of(self, layer: int) -> Tensor:
        """Made once a prompt, or a chunk of one: no token that is decoded belongs to a group."""
        if layer not in self._groups:
            self._groups[layer] = few_rows.groups_of(self.codes(layer))
        return self._groups[layer]

    def _columns(self, queries: Tensor) -> Tensor:
        """`_columns_of` once a pass: all layers ask for the same queries, and counting them waits for the device."""
        if self._asked is None or self._asked[0] is not queries:
            self._asked = queries, _columns_of(queries)
        return self._asked[1]

    def _count(self, layer: int, chosen: Tensor) -> None:
        """Stays on its device, in one tensor a prompt: a decode step waits for nothing, and may be captured."""
        if layer not in self._selected:
            self._selected[layer] = torch.zeros((), dtype=torch.long, device=chosen.device)
        self._selected[layer] += chosen.sum()

    def _step(self, call: HeadCall) -> few_rows.Step:
        """Decode steps of a layer on a GPU: attention and redistribution in one launch."""
        layer, rule = call.layer, self.rule
        if layer not in self._selected:
            self._selected[layer] = torch.zeros((), dtype=torch.long, device=call.q.device)
        return few_rows.Step(
            call,
            self.codes(layer, by_position=call.table is not None),
            None if rule.heads is None else self._allowed(call).view(torch.uint8),
            self._selected[layer],
            self._room(call),
            move=rule.move,
            rho=rule.rho if rule.centric else None,
            minimum_mass=rule.minimum_mass,
        )

    def _room(self, call: HeadCall) -> few_rows.Room:
        """One a shape and device, and kept: captured steps hold its addresses."""
        key = call.q.shape, call.k.shape[1], call.q.device
        if key not in self._rooms:
            self._rooms[key] = few_rows.Room.of(call.q, call.k.shape[1])
        return self._rooms[key]

    def _allowed(self, call: HeadCall) -> Tensor:
        """Which heads of this layer the rule's `heads` leave to choose from, (H,)."""
        if call.layer not in self._heads:
            allowed = torch.zeros(call.q.shape[1], dtype=torch.bool)
            numbers = [u.index - call.site.first_head for u in self.rule.heads or () if u.layer == call.layer]
            allowed[[n for n in numbers if 0 <= n < len(allowed)]] = True
            self._heads[call.layer] = allowed.to(call.q.device)
        return self._heads[call.layer]

    def _keys(self, layer: int) -> dict[str, Callable[[Tensor], Tensor]]:
        """Groups of keys by name, each a test on positions (B or 1, …)."""
        image, sinks = self.table, self.sinks[layer]
        return {
            "sinks": lambda at: looked_up(sinks, at),
            "rest": lambda at: looked_up(image, at) & ~looked_up(sinks, at),
            "image": lambda at: looked_up(image, at),
        }

    def _masses(self, call: HeadCall, queries: Tensor) -> dict[str, Tensor]:
        """Attention mass of each group, (B, H, N) in float32, 0 for queries that are not chosen (B, N).

        Recomputed in blocks of rows: no N × M map is kept.
        """
        tests = {name: _of_key(test) for name, test in self._keys(call.layer).items()}
        B, H, N = call.q.shape[:3]
        columns = self._columns(queries)
        found = row_statistics(call, (), tests, columns)
        at = columns[:, None].expand(-1, H, -1)
        return {name: values.new_zeros(B, H, N).scatter(2, at, values) for name, values in found.items()}

    def _choose(self, call: HeadCall, masses: Mapping[str, Tensor]) -> Tensor:
        image, rest = masses["image"], masses["rest"]
        chosen = (rest > 0) & self.image_sinks[call.layer][:, None, None]
        if self.rule.centric:
            chosen &= (image >= self.rule.minimum_mass) & (rest >= self.rule.rho * image)
        if self.rule.heads is not None:
            chosen &= self._allowed(call)[:, None]
        return chosen

    def _move(self, call: HeadCall, out: Tensor, ratio: Tensor, chosen: Tensor) -> Tensor:
        """O − p·O_sinks + (p·P_sinks / P_rest)·O_rest where chosen; the parts are attention over values that are 0 elsewhere."""
        keys = self._keys(call.layer)
        o_sinks, o_rest = (call.attend(key_weight=keys[name]) for name in ("sinks", "rest"))
        gain = ratio.transpose(1, 2)[..., None]  # (B, N, H, 1)
        moved = out.float() + self.rule.move * (gain * o_rest.float() - o_sinks.float())
        return torch.where(chosen.transpose(1, 2)[..., None], moved.to(out.dtype), out)


def _columns_of(queries: Tensor) -> Tensor:
    """Columns (B, R) of the queries that may be edited, (B, N) bool, in order; rows that have fewer get others to fill up."""
    if queries.shape[1] == 1:
        return queries.new_zeros(queries.shape, dtype=torch.long)
    count = max(1, int(queries.sum(1).max()))
    return queries.long().argsort(dim=1, descending=True, stable=True)[:, :count].sort(1).values


def _ratio(masses: Mapping[str, Tensor], chosen: Tensor) -> Tensor:
    """P_sinks / P_rest where chosen, elsewhere a number that nobody uses; finite even where the sinks leave next to nothing."""
    rest = masses["rest"].masked_fill(~chosen, 1.0)
    return masses["sinks"] / rest.clamp(min=torch.finfo(torch.float32).tiny)


def _of_key(test: Callable[[Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda queries, keys: test(keys)


def redistribute_map(
    weights: Tensor,
    image: Tensor,
    sinks: Tensor,
    *,
    move: float = 0.6,
    rho: float = 0.8,
    minimum_mass: float = 0.2,
    centric: bool = True,
) -> Tensor:
    """The same on attention weights (B, H, N, M) themselves: the readable reference, and what to draw.

    image, sinks (B, M) bool. Rows keep their sum; weights on text that is no sink do not change. In the released code's terms
    move = 1 − p and rho = 1 − rho_code.

    >>> weights = torch.tensor([0.1, 0.5, 0.3, 0.1]).view(1, 1, 1, 4)  # a sink and two tokens of an image, then text
    >>> image, sinks = torch.tensor([[True, True, True, False]]), torch.tensor([[True, False, False, False]])
    >>> [round(w, 4) for w in redistribute_map(weights, image, sinks, move=1.0).flatten().tolist()]
    [0.0, 0.5625, 0.3375, 0.1]
    """
    on_image, on_sinks = (mask[:, None, None].to(weights.dtype) for mask in (image, sinks))
    on_rest = on_image * (1 - on_sinks)
    total, source, rest = ((weights * part).sum(-1, keepdim=True) for part in (on_image, on_sinks, on_rest))
    chosen = (rest > 0) & (image & sinks).any(-1)[:, None, None, None]
    if centric:
        chosen = chosen & (total >= minimum_mass) & (rest >= rho * total)
    tiny = torch.finfo(weights.dtype).tiny
    moved = weights * (1 - move * on_sinks) + move * source * on_rest * weights / rest.clamp(min=tiny)
    return torch.where(chosen, moved, weights)


@register("steer", "var", paper="33")
def var(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    move: float = 0.6,
    rho: float = 0.8,
    minimum_mass: float = 0.2,
    tau: float = 20.0,
    dims: str | None = None,
    layers: str | None = None,
    centric: bool = True,
    heads: HeadSet | None = None,
    batches: Sequence[Mapping[str, Any]] | None = None,
    seed: int = 0,
) -> VAR:
    """Move attention from sinks to the rest of the image, in the heads that look at it.

        O' = O − p·O_sinks + (p·P_sinks / P_rest)·O_rest,   in heads with P_image ≥ 0.2 and P_rest / P_image ≥ rho

    arXiv 2503.03321. Gives a `VAR`; `with headwise.steer.var(model, tokenizer).attach(model): model.generate(…)`. Works under
    generate with cache, batches, padding and several images; the attention kernel stays.

    move: the share p of the sinks' attention that moves (the released code's p is the share that stays).
    rho: least share of a head's attention on the image that is not on sinks: 0.8, or 0.5 against hallucination, 0.9 for details.
    minimum_mass: least attention on the image of an image-centric head.
    tau: a token whose phi passes it is a sink; 20 was set at width 4096, phi is at most the root of the width.
    dims: sink dimensions such as 1415,2533; by default they are found in the model.
    layers: such as 2:31; by default all but the first two and the last.
    centric: only image-centric heads; without, all heads, which the paper shows to fail.
    heads: only these heads.
    `batches`: what the sink dimensions are found on, keyword arguments of the model; by default four packaged scenes.

    Raises EditError for bad options, for a dimension that does not exist, or where no dimension carries massive activations.

    >>> from headwise.hub import load_model
    >>> model, tokenizer = load_model("tiny-random-llava")
    >>> print(var(model, tokenizer, dims="5", tau=2.5))
    VAR: 0.6 of the attention on sinks (dimensions 5 above 2.5) goes to the rest of the image,
    in image-centric heads (rho 0.8, mass 0.2) of layers 2
    """
    stack = find_stack(model, decoder_stack(model))
    width = int(stack.config.hidden_size)  # type: ignore[attr-defined]
    check_tau(tau, width)
    if dims is not None:
        found = numbers("dims", dims, EditError, width)
    else:
        seen = picture_batches(model, tokenizer, 4, seed=seed) if batches is None else batches
        found = find_sink_dims(model, stack, seen, tau=tau)
        if not found:
            raise EditError(
                f"no dimension passes tau = {tau:g} in 90 % of the layers: this model has no massive activations to take sinks "
                "from; lower tau, or name dims= if you know them"
            )
    chosen = tuple(range(2, stack.layers - 1)) if layers is None else numbers("layers", layers, EditError, stack.layers)
    return VAR(
        dims=found,
        layers=chosen,
        tau=tau,
        rho=rho,
        minimum_mass=minimum_mass,
        move=move,
        centric=centric,
        heads=heads,
        fingerprint=fingerprint(model, stack.pattern),
    )
