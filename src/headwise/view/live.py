"""A model at hand: what its heads do on one sample, and what becomes of its prediction without them, under a plan or edits.

Letters: L layers, H query heads, N tokens, V vocabulary or classes.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from headwise.arguments import cache_argument, cache_of
from headwise.attach import attach, find_stack, fingerprint
from headwise.attach.images import decoder_stack
from headwise.attach.maps import each_map
from headwise.attach.observe import observe
from headwise.edits import Edit, HeadEdits
from headwise.errors import ViewError
from headwise.plan import HeadPlan
from headwise.units import HeadScores, HeadSet, Unit
from headwise.view.samples import Sample, make_sample, wants

Mode = Literal["zero", "uniform"]
TOP = 6  # predictions that are shown
STEP = 16  # tokens a time, where a plan is only felt through its cache


@dataclass(frozen=True)
class Prediction:
    """What a model says: the most likely continuations or classes, and the loss of each token that it had to predict."""

    top: tuple[tuple[str, float], ...]
    losses: Tensor | None  # (N - 1,), or those of the last tokens only; None where nothing is predicted token by token
    logits: Tensor  # (V,) float32 at the end

    @property
    def loss(self) -> float | None:
        """Mean loss in nats."""
        return None if self.losses is None else float(self.losses.mean())


@dataclass(frozen=True)
class Effect:
    """A prediction before and after something was done to the model, on one sample."""

    before: Prediction
    after: Prediction

    @property
    def kl(self) -> float:
        """KL(before ‖ after) of the last prediction, in nats."""
        p, q = self.before.logits.log_softmax(-1), self.after.logits.log_softmax(-1)
        return max(0.0, float((p.exp() * (p - q)).sum()))

    @property
    def change(self) -> float:
        """Change of the mean loss in nats; the KL divergence where there is no loss."""
        if self.before.losses is None or self.after.losses is None:
            return self.kl
        return float(self.after.losses.mean() - self.before.losses.mean())


class Live:
    """One model, its tokenizer and a lock: attaching is not for two threads at a time.

    >>> from headwise.hub import load_model
    >>> live = Live(*load_model("tiny-random-llama"), name="tiny")
    >>> sample = live.sample("a quick brown fox")
    >>> live.maps(sample, 0).shape, sorted(live.tables(sample))[:2]
    (torch.Size([4, 17, 17]), ['entropy', 'mass on the first token'])
    >>> live.effect(sample, edits=ablation(Unit.parse("L0H1"))).change != 0
    True
    """

    def __init__(self, model: Any, tokenizer: Any, *, name: str, stack: str | None = None):
        self.model, self.tokenizer, self.name = model, tokenizer, name
        self.reads_text, self.reads_pictures = wants(model, tokenizer)
        self.stack = stack or (decoder_stack(model) if self.reads_text and self.reads_pictures else None)
        self.fingerprint = fingerprint(model, self.stack)
        self.found = find_stack(model, self.stack)
        self.lock = threading.RLock()

    @property
    def shape(self) -> tuple[int, int]:
        """(L, H)."""
        return self.found.layers, self.found.heads

    def sample(self, prompt: str = "", picture: int = 0, upload: str | None = None) -> Sample:
        """See `make_sample`."""
        made = make_sample(self.model, self.tokenizer, prompt, picture, upload)
        return replace(made, causal=self.found.causal)

    def check(self, unit: Unit) -> None:
        """Raises UnitError for a head that the model lacks."""
        HeadSet.of([(unit.layer, unit.index)], unit.kind).check(self.fingerprint)

    def _each(self, sample: Sample, use: Callable[[int, Tensor], None], **attached: Any) -> None:
        with self.lock, torch.no_grad(), attach(self.model, observers=[each_map(use)], stack=self.stack, **attached):
            self.model(**sample.inputs)

    def maps(self, sample: Sample, layer: int, **attached: Any) -> Tensor:
        """The attention maps of a layer, (H, N, N) float32 on the CPU; `attached` goes to `attach`: plan=, edits=."""
        found: list[Tensor] = []
        self._each(sample, lambda at, maps: found.append(maps[0].cpu()) if at == layer else None, **attached)
        if not found:
            raise ViewError(f"layer {layer} did not run; the model has {self.found.layers} of them")
        return found[0]

    def nearest(self, sample: Sample, unit: Unit, count: int = 8) -> list[tuple[Unit, float]]:
        """The heads whose maps on this sample correlate most with that of `unit` (Pearson), the first key left out.

        Most heads park attention on the first token; with it, all of them would look alike.
        """
        own = _centred(self.maps(sample, unit.layer)[unit.index : unit.index + 1])[0]
        table = torch.zeros(self.shape)

        def compare(layer: int, maps: Tensor) -> None:
            table[layer] = (_centred(maps[0].cpu()) @ own).clamp(-1, 1)

        self._each(sample, compare)
        order = table.flatten().sort(descending=True, stable=True).indices.tolist()
        units = [Unit("head", *divmod(place, self.shape[1])) for place in order]
        return [(u, float(table[u.layer, u.index])) for u in units if u != unit][:count]

    def tables(self, sample: Sample) -> dict[str, HeadScores]:
        """What every head does on this sample, by statistic: scores that are measured now, not read from a file."""
        first = {"mass on the first token": lambda position: position == 0}
        previous = {"mass on the token before": lambda query, key: key == query - 1}
        observed = observe(self.model, "entropy", "distance", "norm", mass=first, pair_mass=previous, stack=self.stack)
        with self.lock, torch.no_grad(), observed as record:
            self.model(**sample.inputs)
        names = {"entropy": "entropy", "mean distance": "distance", **{n: n for n in (*first, *previous)}}
        values = {name: record.table(key).mean(dim=(1, 3)) for name, key in names.items()}
        values["output norm"] = record.norm_mean
        data = f"the prompt of {sample.tokens} tokens"
        return {
            name: HeadScores(values=table, method=name, data=data, fingerprint=self.fingerprint)
            for name, table in values.items()
        }

    def predict(self, sample: Sample, *, by_steps: bool = False, **attached: Any) -> Prediction:
        """The model's prediction with whatever `attached` says. `by_steps` reads the second half through the cache, STEP tokens a time."""
        with self.lock, torch.no_grad(), attach(self.model, stack=self.stack, **attached):
            logits = self._by_steps(sample) if by_steps else self._logits(self.model(**sample.inputs))
        logits = logits.float().cpu()
        losses = None
        if sample.next_token and len(logits) > 1:
            skip = max(0, len(logits) - 1 - (sample.tokens - sample.first))
            targets = sample.inputs["input_ids"][0].cpu()[-(len(logits) - 1) :]
            losses = F.cross_entropy(logits[:-1][skip:], targets[skip:], reduction="none")
        return Prediction(self._top(logits[-1], sample), losses, logits[-1])

    def _logits(self, out: Any) -> Tensor:
        """(N or 1, V) of a batch of one."""
        if getattr(out, "logits", None) is None:
            raise ViewError(f"{type(self.model).__name__} predicts nothing (no logits), so no effect can be measured")
        return out.logits[0] if out.logits.ndim == 3 else out.logits

    def _by_steps(self, sample: Sample) -> Tensor:
        if set(sample.inputs) != {"input_ids"}:
            raise ViewError(
                "a plan with dense prefill is felt only in text that is read in steps; this model reads pictures"
            )
        parts: list[Tensor] = []
        ids, past = sample.inputs["input_ids"], None
        half = max(1, ids.shape[1] // 2)
        for piece in (ids[:, :half], *ids[:, half:].split(STEP, 1)):
            out = self.model(piece, use_cache=True, **cache_argument(self.model, past))
            past, logits = cache_of(out), out.logits[0]
            parts.append(logits if parts else logits[-1:])
        return torch.cat(parts)

    def _top(self, logits: Tensor, sample: Sample) -> tuple[tuple[str, float], ...]:
        best = logits.softmax(-1).topk(min(TOP, len(logits)))
        pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
        return tuple((self._name(place), share) for place, share in pairs)

    def _name(self, place: int) -> str:
        if self.tokenizer is not None:
            return self.tokenizer.decode([place])
        return str((getattr(self.model.config, "id2label", None) or {}).get(place, place))

    def effect(self, sample: Sample, *, plan: HeadPlan | None = None, edits: HeadEdits | Edit | None = None) -> Effect:
        """The prediction with and without a plan or edits; both are read in the same way."""
        by_steps = plan is not None and plan.prefill == "dense"
        return Effect(
            self.predict(sample, by_steps=by_steps), self.predict(sample, by_steps=by_steps, plan=plan, edits=edits)
        )

    def others(self, unit: Unit, count: int, seed: int = 0) -> list[Unit]:
        """`count` random heads that are not `unit`: what taking out any head would do."""
        layers, heads = self.shape
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(layers * heads, generator=generator).tolist()
        units = [Unit("head", *divmod(place, heads)) for place in order]
        return [other for other in units if other != unit][:count]


def ablation(unit: Unit, mode: Mode = "zero") -> Edit:
    """The edit that takes one head out: its output 0, or the mean over all keys that it may see."""
    makers: dict[str, Callable[[HeadSet], Edit]] = {"zero": Edit.zero, "uniform": Edit.uniform}
    if mode not in makers:
        raise ViewError(f"mode is {str(mode)[:40]!r}; it must be one of {', '.join(makers)}")
    return makers[mode](HeadSet.of([(unit.layer, unit.index)]))


def _centred(maps: Tensor) -> Tensor:
    """Maps (H, N, N) without the first key, as vectors of mean 0 and length 1, (H, N·(N - 1)); a constant map becomes 0."""
    flat = maps[:, :, 1:].flatten(1)
    flat = flat - flat.mean(1, keepdim=True)
    return flat / flat.norm(dim=1, keepdim=True).clamp(min=1e-12)


def distance_profile(map_: Tensor, sample: Sample) -> list[tuple[str, float, float]]:
    """Share of a head's attention (N, N) by distance, mean over queries: (name of the bin, share, share if it looked everywhere alike)."""
    distances = sample.distances()
    visible = distances >= 0  # false for NaN
    even = visible.float() / visible.sum(1, keepdim=True).clamp(min=1)
    rows, found = visible.any(1), []
    for name, low, high in _bins(float(distances[visible].max()), patches=sample.side is not None):
        inside = (visible & (distances >= low) & (distances < high)).float()
        share, alike = (float((m * inside).sum(1)[rows].mean()) for m in (map_, even))
        found.append((name, share, alike))
    return found


def _bins(longest: float, patches: bool) -> list[tuple[str, float, float]]:
    if patches:
        return [(str(d), d - 0.5, d + 0.5) for d in range(int(longest + 0.5) + 1)]
    bins, low = [("0", 0.0, 1.0), ("1", 1.0, 2.0)], 2
    while low <= longest:
        bins.append((f"{low}–{2 * low - 1}", float(low), 2.0 * low))
        low *= 2
    return bins


def lost_mass(map_: Tensor, plan: HeadPlan, unit: Unit, group: int) -> Tensor | None:
    """(N,) share of each query's attention on keys that the plan's pattern would not let it read; None where content decides."""
    pattern = plan.layer(unit.layer)[unit.index // group]
    if pattern.selects and not pattern.keeps_all:
        return None
    place = torch.arange(len(map_))
    return (map_ * ~pattern.reads(place[:, None], place)).sum(1)
