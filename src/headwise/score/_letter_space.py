"""The few dimensions of a head's queries, keys and values that say which option is meant, and what is left when only these are kept.

    x' = μ + B_r B_rᵀ (x − μ)        x: the query of the last token, the keys and values of the labels, after rotary positions

B_r: the first r axes of the centred class means (one class an option), behind them those of what is left of the samples. The head's
own copy of the keys is changed: heads that share a kv head with it read what they read before.

Letters: B prompts, C options, D head dim, M key columns, H query heads, K kv heads.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, get_args

import torch
from torch import Tensor

from headwise.attach import HeadCall, Transform, attach, fingerprint
from headwise.attach.hook import as_bool
from headwise.checks import shown, whole
from headwise.errors import AttachError, ScoreError
from headwise.modes import evaluating
from headwise.score._letters import need_decoder, need_labels
from headwise.score._patching import SHORT, answer, read_prefix
from headwise.tasks.multiple_choice import chosen
from headwise.tasks.pairs import PromptPairs
from headwise.units import HeadSet

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Basis = Literal["classes", "samples", "joint"]
PARTS = ("q", "k", "v")
Change = Callable[[dict[str, Tensor]], dict[str, Tensor]]


@dataclass(frozen=True, eq=False)
class Axes:
    """One part (q, k or v) of one head: `mean` (D,), `classes` (C, D), orthonormal `axes` (D, D) in columns, `variance` (D,) of the
    samples along them, as shares."""

    mean: Tensor
    classes: Tensor
    axes: Tensor
    variance: Tensor

    def keep(self, x: Tensor, rank: int) -> Tensor:
        """x (…, D) with all but the first `rank` axes set to the mean."""
        mean, axes = self.mean.to(x.device), self.axes[:, :rank].to(x.device)
        return (mean + (x.float() - mean) @ axes @ axes.T).to(x.dtype)

    @property
    def deltas(self) -> Tensor:
        """Class means without the mean over the classes, (C, D)."""
        return self.classes - self.classes.mean(0)


@dataclass(frozen=True, eq=False)
class LetterSpace:
    """`Axes` of q, k and v of each of `heads`, by (layer, head). `keep`, `recall` and `move` give transforms for `attach`."""

    heads: HeadSet
    parts: Mapping[tuple[int, int], Mapping[str, Axes]]

    @property
    def dims(self) -> int:
        """Head dim D, the largest rank."""
        return len(next(iter(self.parts.values()))["q"].mean)

    def keep(self, pairs: PromptPairs, rank: int, parts: str = "qk") -> LastRow:
        """Only `rank` dimensions of the named parts are left; the head's size changes nothing, 0 leaves the mean."""
        whole("rank", rank, 0, ScoreError, self.dims)
        _need_parts(parts)

        def change(at: tuple[int, int]) -> Change:
            return lambda x: {name: self.parts[at][name].keep(x[name], rank) for name in parts}

        return LastRow.of(pairs, {at: change(at) for at in self.parts})

    def recall(self, pairs: PromptPairs) -> LastRow:
        """In the place of each prompt's query stands the class mean of its right option."""
        correct = pairs.marks["correct"]
        return LastRow.of(pairs, {at: _recalled(of["q"].classes, correct) for at, of in self.parts.items()})

    def move(self, pairs: PromptPairs, to: Tensor) -> LastRow:
        """Each prompt's query goes from its right option to option `to` (B,): q + q̄_to − q̄_correct."""
        if to.shape != (len(pairs),) or to.is_floating_point():
            raise ScoreError(f"to is {tuple(to.shape)}; it is the number of an option for each of {len(pairs)} prompts")
        correct = pairs.marks["correct"]
        return LastRow.of(pairs, {at: _moved(of["q"].classes, correct, to) for at, of in self.parts.items()})

    def random(self, generator: torch.Generator) -> LetterSpace:
        """The same means with random axes: a control for `keep`."""

        def turned(axes: Axes) -> Axes:
            drawn = torch.linalg.qr(torch.randn(axes.axes.shape, generator=generator)).Q
            return replace(axes, axes=drawn)

        return LetterSpace(
            self.heads, {at: {name: turned(axes) for name, axes in of.items()} for at, of in self.parts.items()}
        )

    def cosines(self, other: LetterSpace, part: str = "q") -> Tensor:
        """Cosine between deltas of option i here and of option j there, mean over the heads, (C, C)."""
        _need_parts(part)
        if set(self.parts) != set(other.parts):
            raise ScoreError(f"the spaces are of {self.heads} and of {other.heads}; cosines compare the same heads")
        tables = [_unit(self.parts[at][part].deltas) @ _unit(other.parts[at][part].deltas).T for at in self.parts]
        return torch.stack(tables).mean(0)


def letter_space(
    model: PreTrainedModel, pairs: PromptPairs, heads: HeadSet | str, *, basis: Basis = "classes"
) -> LetterSpace:
    """The letter subspaces of some heads, from the prompts of `pairs`.

    basis: "classes" puts the axes of the class means first (C − 1 of them), "samples" takes those of all samples, "joint" turns the
    axes of queries and keys so that the i-th of one meets the i-th of the other in the attention scores of the class means.
    Raises ScoreError where an option is right in no prompt, UnitError for heads that the model lacks, AttachError for a softmax
    that cannot be computed anew.
    """
    need_decoder(model)
    pairs = need_labels(pairs).to(model.device)
    units = HeadSet.parse(heads) if isinstance(heads, str) else heads
    units.check(fingerprint(model))
    if basis not in get_args(Basis):
        raise ScoreError(f"basis={basis!r}; choose {', '.join(get_args(Basis))}")
    if not len(units):
        raise ScoreError("heads is empty; name the heads whose subspaces are wanted, such as L5H3")
    C, correct = pairs.marks["labels"].shape[1], pairs.marks["correct"].cpu()
    missing = sorted({*range(C)} - {*correct.tolist()})
    if missing:
        raise ScoreError(f"no prompt is answered by option {missing[0]} of {C}; take prompts for every option")
    seen: dict[tuple[int, int], dict[str, Tensor]] = {}
    reading = LastRow.of(pairs, {at: _keeping(seen, at) for at in units.pairs()})
    with torch.no_grad(), evaluating(model), attach(model, transforms=[reading]):
        answer(model, pairs, pairs.ids)
    labels = torch.arange(C).repeat(len(pairs), 1).flatten()
    found = {}
    for at, parts in seen.items():
        lead = _joint(parts, correct, labels, C) if basis == "joint" else {}
        found[at] = {
            name: _axes(x.flatten(0, -2), correct if name == "q" else labels, C, basis, lead.get(name))
            for name, x in parts.items()
        }
    return LetterSpace(units, found)


class Quiz:
    """Multiple-choice prompts that are answered again and again, each time with other changes at the last token.

    All before each row's last token is read once into a cache; `choose` runs the rest. Raises ScoreError for pairs without labels.
    """

    def __init__(self, model: PreTrainedModel, pairs: PromptPairs):
        need_decoder(model)
        self.model, self.pairs = model, need_labels(pairs).to(model.device)
        columns = int(self.pairs.last.min())
        with evaluating(model):
            self.prefix = read_prefix(model, self.pairs, columns) if columns >= SHORT else None

    @torch.no_grad()
    def choose(self, *transforms: Transform) -> tuple[Tensor, Tensor]:
        """(option chosen among the labels (B,), loss −log p(right label) with p over the labels (B,)), with transforms attached."""
        prefix = None if self.prefix is None else self.prefix.copied(1, 0)
        with evaluating(self.model), attach(self.model, transforms=list(transforms)):
            logits = answer(self.model, self.pairs, self.pairs.ids, 1, prefix)[0]
        among = logits.gather(1, self.pairs.marks["choices"])
        loss = torch.nn.functional.cross_entropy(among, self.pairs.marks["correct"], reduction="none")
        return chosen(logits, self.pairs).cpu(), loss.cpu()


@dataclass(frozen=True, eq=False)
class LastRow:
    """The transform: at one row, chosen heads attend with other queries, label keys or label values. All else is as it was.

    rows (B,): column of the query; labels (B, C): columns of the labels; changes: by (layer, head), a function of q (B, D), k and v
    (B, C, D) that gives some of them anew.
    """

    rows: Tensor
    labels: Tensor
    changes: Mapping[tuple[int, int], Change]

    @classmethod
    def of(cls, pairs: PromptPairs, changes: Mapping[tuple[int, int], Change]) -> LastRow:
        """For the last tokens of multiple-choice prompts."""
        return cls(pairs.last, need_labels(pairs).marks["labels"], changes)

    def __call__(self, call: HeadCall, attend: Callable[[], Tensor]) -> Tensor:
        out = attend()
        mine = {head - call.site.first_head: f for (layer, head), f in self.changes.items() if layer == call.layer}
        here = self.rows.to(out.device) - call.past
        if not mine or bool((here < 0).all()):
            return out
        self._check(call, out, here)
        out, batch = out.clone(), torch.arange(len(out), device=out.device)
        columns = self.labels.to(out.device) - call.first_column
        seen = _seen(call, here)
        group = call.q.shape[1] // call.k.shape[1]
        for head, change in mine.items():
            k, v = call.k[:, head // group].clone(), call.v[:, head // group].clone()  # (B, M, D)
            parts = {"q": call.q[batch, head, here], "k": k[batch[:, None], columns], "v": v[batch[:, None], columns]}
            parts |= change(parts)
            k[batch[:, None], columns], v[batch[:, None], columns] = parts["k"], parts["v"]
            logits = torch.einsum("bd,bmd->bm", parts["q"].float(), k.float()) * call.scale
            weights = logits.masked_fill(~seen, -torch.inf).softmax(-1)
            out[batch, here, head] = torch.einsum("bm,bmd->bd", weights, v.float()).to(out.dtype)
        return out

    def _check(self, call: HeadCall, out: Tensor, here: Tensor) -> None:
        call.need_expressible("a changed query or key")
        if len(self.rows) != len(out):
            raise AttachError(f"a change for {len(self.rows)} prompts, this batch has {len(out)}")
        if call.groups is not None:
            raise AttachError(f"layer {call.layer}: label keys cannot be changed in a cache that a KV plan thins out")
        if bool(((here < 0) | (here >= out.shape[1])).any()) or int(self.labels.min()) < call.first_column:
            raise AttachError(f"layer {call.layer}: the last tokens or their labels are not all within this pass")


def _seen(call: HeadCall, here: Tensor) -> Tensor:
    """Which key columns each row's query sees, (B, M) bool."""
    M, batch = call.k.shape[2], torch.arange(len(here), device=here.device)
    seen = torch.arange(M, device=here.device)[None] + call.first_column <= (here + call.past)[:, None]
    if call.mask is not None:
        seen = seen & as_bool(call.mask).expand(len(here), -1, -1, -1)[batch, 0, here][:, :M]
    return seen


def _means(x: Tensor, label: Tensor, C: int) -> Tensor:
    return torch.stack([x[label == k].mean(0) for k in range(C)])


def _axes(x: Tensor, label: Tensor, C: int, basis: str, lead: Tensor | None = None) -> Axes:
    """Axes of samples x (n, D) of C classes; `lead` (D, r) orthonormal, if given, stand first."""
    classes = _means(x, label, C)
    mean = classes.mean(0)
    if lead is None:
        first, most = (x - mean, None) if basis == "samples" else (classes - mean, C - 1)
        lead = torch.linalg.svd(first, full_matrices=False).Vh[:most].T
    rest = (x - mean) - (x - mean) @ lead @ lead.T
    behind = torch.linalg.svd(torch.cat([rest, torch.eye(x.shape[1]) * 1e-6 * x.norm()]), full_matrices=False).Vh.T
    axes = torch.linalg.qr(torch.cat([lead, behind], 1)).Q  # (D, D): the lead first, then what is left of the space
    power = ((x - mean) @ axes).square().sum(0)
    return Axes(mean, classes, axes, power / power.sum().clamp(min=1e-30))


def _joint(parts: Mapping[str, Tensor], correct: Tensor, labels: Tensor, C: int) -> dict[str, Tensor]:
    """Matching axes (D, C − 1) of queries and keys: singular vectors of Q_cᵀ (Q_c K_cᵀ) K_c, of the centred class means (C, D)."""
    q, k = _means(parts["q"], correct, C), _means(parts["k"].flatten(0, 1), labels, C)
    q, k = q - q.mean(0), k - k.mean(0)
    U, _, Vh = torch.linalg.svd(q.T @ (q @ k.T) @ k)
    return {"q": U[:, : C - 1], "k": Vh[: C - 1].T}


def _keeping(into: dict[tuple[int, int], dict[str, Tensor]], at: tuple[int, int]) -> Change:
    def look(parts: dict[str, Tensor]) -> dict[str, Tensor]:
        into[at] = {name: x.detach().float().cpu() for name, x in parts.items()}
        return {}

    return look


def _recalled(classes: Tensor, correct: Tensor) -> Change:
    return lambda x: {"q": classes.to(correct.device)[correct].to(x["q"])}


def _moved(classes: Tensor, correct: Tensor, to: Tensor) -> Change:
    step = classes[to.cpu()] - classes[correct.cpu()]
    return lambda x: {"q": x["q"] + step.to(x["q"])}


def _unit(x: Tensor) -> Tensor:
    return x / x.norm(dim=-1, keepdim=True).clamp(min=1e-12)


def _need_parts(parts: str) -> None:
    if not isinstance(parts, str) or not parts or set(parts) - set(PARTS):
        raise ScoreError(f"parts={shown(parts)}; write some of the letters {', '.join(PARTS)}")
