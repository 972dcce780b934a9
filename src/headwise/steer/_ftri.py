"""Functional token resonance imaging (fTRI): which experts are busier when a model behaves in one way than in another.

    A_x[l,e]     activity of expert e of layer l while the model reads prompt x      (the map of the prompt)
    R_c = mean of A_x over the prompts of class c - mean over the prompts of the others

Dahlke et al. 2025, arXiv 2502.11096. Letters: R prompts, L layers, E experts, N tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from headwise.addresses import Fingerprint
from headwise.attach import fingerprint
from headwise.attach.experts import find_experts, observe_experts
from headwise.checks import whole
from headwise.errors import EditError
from headwise.progress import track
from headwise.tasks.texts import encode
from headwise.units import HeadScores

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Activity = Literal["count", "weight", "prob"]
Statistic = Literal["difference", "ratio", "t", "auroc"]


@dataclass(frozen=True, eq=False)
class ExpertMaps:
    """The maps of labelled prompts: `values` (R, L, E) float64, 0 in the layers without experts; `layers` are those with."""

    values: Tensor
    labels: tuple[str, ...]
    layers: tuple[int, ...]
    fingerprint: Fingerprint
    activity: Activity = "count"

    def __post_init__(self) -> None:
        if len(self.labels) != len(self.values):
            raise EditError(f"{len(self.labels)} labels for {len(self.values)} prompts; one label a prompt")

    def contrast(self, behaviour: str, against: str | None = None) -> ExpertContrast:
        """One class against another, or against all others. Raises EditError for a class without prompts, or without a counterpart."""
        mine = torch.tensor([label == behaviour for label in self.labels])
        other = ~mine if against is None else torch.tensor([label == against for label in self.labels])
        for name, rows in ((behaviour, mine), (against or "any other", other)):
            if not bool(rows.any()):
                known = ", ".join(sorted(set(self.labels)))
                raise EditError(f"no prompt is labelled {name!r}; the classes are: {known}. A contrast needs two")
        if behaviour == against:
            raise EditError(f"behaviour and against are both {behaviour!r}; a contrast needs two classes")
        return ExpertContrast(self.values[mine], self.values[other], self, behaviour)


@dataclass(frozen=True, eq=False)
class ExpertContrast:
    """The maps of a behaviour, `mine` (R1, L, E), and of its counterpart, `others` (R2, L, E), and what tells them apart."""

    mine: Tensor
    others: Tensor
    maps: ExpertMaps
    behaviour: str

    @property
    def difference(self) -> Tensor:
        """(L, E) the resonance: difference of the mean activities. Of counts per token it is the difference of activation rates."""
        return self.mine.mean(0) - self.others.mean(0)

    @property
    def ratio(self) -> Tensor:
        """(L, E) (a - b) / (a + b) of the mean activities, in [-1, 1]; 0 for an expert that nobody chose."""
        a, b = self.mine.mean(0), self.others.mean(0)
        return (a - b) / (a + b).clamp(min=torch.finfo(a.dtype).tiny)

    @property
    def t(self) -> Tensor:
        """(L, E) Welch's t; 0 where neither class varies and the means agree, huge where they differ without any variance."""
        spread = self._variance(self.mine) + self._variance(self.others)
        return self.difference / (spread.sqrt() + 1e-12)

    @property
    def auroc(self) -> Tensor:
        """(L, E) how well the activity tells the classes apart: 0.5 not at all, 1 the behaviour is always busier."""
        higher = (self.mine[:, None] > self.others).double() + 0.5 * (self.mine[:, None] == self.others).double()
        return higher.mean((0, 1))

    def p_values(self, shuffles: int, generator: torch.Generator) -> Tensor:
        """(L, E) two-sided p of the difference when labels are shuffled `shuffles` times; at least 1 / (shuffles + 1)."""
        whole("shuffles", shuffles, 1, EditError)
        everyone, count = torch.cat([self.mine, self.others]), len(self.mine)
        total, seen = everyone.sum(0), torch.zeros_like(self.difference)
        for _ in range(shuffles):
            drawn = everyone[torch.randperm(len(everyone), generator=generator)[:count]].sum(0)
            shuffled = drawn / count - (total - drawn) / len(self.others)
            seen += shuffled.abs() >= self.difference.abs() - 1e-12
        return (seen + 1) / (shuffles + 1)

    def q_values(self, shuffles: int, generator: torch.Generator) -> Tensor:
        """(L, E) `p_values` made a false discovery rate over all experts of the model (Benjamini-Hochberg); 1 in other layers."""
        from scipy.stats import false_discovery_control

        table = torch.ones_like(self.difference)
        rows = list(self.maps.layers)
        p = self.p_values(shuffles, generator)[rows]
        table[rows] = torch.from_numpy(false_discovery_control(p.flatten().numpy())).view_as(p)
        return table

    def scores(self, by: Statistic = "difference") -> HeadScores:
        """The experts ranked by a statistic; layers without experts come after all others."""
        if by not in get_args(Statistic):
            raise EditError(f"by={by!r}; choose {', '.join(get_args(Statistic))}")
        table: Tensor = getattr(self, by).clone()
        rows = list(self.maps.layers)
        dense = [layer for layer in range(len(table)) if layer not in rows]
        table[dense] = table[rows].min() - 1
        data = f"{self.behaviour!r}: {len(self.mine)} prompts against {len(self.others)}"
        method = f"ftri-{self.maps.activity}-{by}"
        return HeadScores(values=table, kind="expert", method=method, data=data, fingerprint=self.maps.fingerprint)

    def _variance(self, maps: Tensor) -> Tensor:
        return maps.var(0, unbiased=True) / len(maps) if len(maps) > 1 else torch.zeros_like(maps[0])


def expert_maps(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    prompts: Sequence[str | Tensor],
    labels: Sequence[str],
    *,
    activity: Activity = "count",
    tokens: str = "all",
    per_token: bool = True,
    new_tokens: int = 0,
    chat: bool = False,
    batch_size: int = 8,
    progress: bool = False,
) -> ExpertMaps:
    """Record the map of every prompt, text or token ids (N,), in one pass each.

    activity: how often an expert was chosen, the sum of its weights, or of the router's probabilities.
    tokens: which tokens of the prompt count, as in edits ("all", "last", "1:", …); padding never does.
    per_token: divide by the number of tokens that counted, so that longer prompts are not busier.
    new_tokens: record this many tokens that the model then writes, greedily, in place of the prompt's.
    chat: wrap texts in the tokenizer's chat template; its tokens count like others, `tokens` leaves them out.

    Raises EditError for bad options, AttachError for a model without experts that can be reached.

    >>> from headwise.hub import load_model
    >>> model, tokenizer = load_model("tiny-random-mixtral")
    >>> maps = expert_maps(model, tokenizer, ["one", "two, three"], ["short", "long"])
    >>> maps.values.shape, maps.values.sum(-1)[:, 0].tolist(), maps.contrast("long").scores().kind
    (torch.Size([2, 3, 4]), [2.0, 2.0], 'expert')
    """
    if activity not in get_args(Activity):
        raise EditError(f"activity={activity!r}; choose {', '.join(get_args(Activity))}")
    whole("new_tokens", new_tokens, 0, EditError)
    whole("batch_size", batch_size, 1, EditError)
    if not prompts:
        raise EditError("prompts is empty; a map needs at least one")
    if len(prompts) != len(labels):
        raise EditError(f"{len(labels)} labels for {len(prompts)} prompts; one label a prompt")
    stack, rows = find_experts(model), [_ids(p, tokenizer, chat) for p in prompts]
    found: list[Tensor] = [torch.empty(0)] * len(rows)
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    batches = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    for members in track(batches, "expert maps", progress):
        table = _record(model, [rows[i] for i in members], activity, tokens, per_token, new_tokens)
        for member, values in zip(members, table, strict=True):
            found[member] = values
    return ExpertMaps(torch.stack(found), tuple(map(str, labels)), stack.numbers(), fingerprint(model), activity)


def label_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    label: Callable[[str], str],
    *,
    new_tokens: int = 64,
    chat: bool = False,
    batch_size: int = 8,
) -> list[str]:
    """The class of what the model answers to each prompt, greedily: `label` is given the answer's text."""
    whole("new_tokens", new_tokens, 1, EditError)
    found = []
    for start in range(0, len(prompts), whole("batch_size", batch_size, 1, EditError)):
        rows = [_ids(p, tokenizer, chat) for p in prompts[start : start + batch_size]]
        written = _generate(model, *_padded(model, rows), new_tokens)
        found += [label(tokenizer.decode(row, skip_special_tokens=True)) for row in written]
    return found


def _record(
    model: PreTrainedModel, rows: list[Tensor], activity: str, tokens: str, per_token: bool, new_tokens: int
) -> Tensor:
    """(B, L, E) maps of one batch."""
    ids, mask = _padded(model, rows)
    phase = "decode" if new_tokens else "all"
    with observe_experts(model, probs=activity == "prob", tokens=tokens, phase=phase) as record, torch.no_grad():
        if new_tokens:
            _generate(model, ids, mask, new_tokens + 1)  # the last token that is written is not read
        else:
            positions = (mask.cumsum(1) - 1).clamp(min=0)
            model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False)
    if not bool((record.tokens > 0).all()):
        raise EditError(f"tokens={tokens!r} chooses no token of some prompt; a map needs at least one")
    table: Tensor = getattr(record, activity)
    return table / record.tokens[:, None, None] if per_token else table


def _generate(model: PreTrainedModel, ids: Tensor, mask: Tensor, new_tokens: int) -> Tensor:
    pad = model.generation_config.pad_token_id
    options: dict[str, Any] = {"do_sample": False, "num_beams": 1, "max_new_tokens": new_tokens, "use_cache": True}
    with torch.no_grad():
        out = model.generate(ids, attention_mask=mask, pad_token_id=0 if pad is None else pad, **options)
    return out[:, ids.shape[1] :]


def _padded(model: PreTrainedModel, rows: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Ids and mask (B, N), padded on the left."""
    width = max(map(len, rows))
    ids = torch.stack([F.pad(row, (width - len(row), 0)) for row in rows])
    mask = torch.stack([F.pad(torch.ones_like(row), (width - len(row), 0)) for row in rows])
    return ids.to(model.device), mask.to(model.device)


def _ids(prompt: str | Tensor, tokenizer: PreTrainedTokenizerBase | None, chat: bool) -> Tensor:
    if isinstance(prompt, Tensor):
        ids = prompt.long().cpu()
    elif tokenizer is None:
        raise EditError("prompts are text, which needs a tokenizer; or give token ids (N,)")
    elif chat:
        if not tokenizer.chat_template:
            raise EditError("chat=True, but the tokenizer has no chat template")
        messages = [{"role": "user", "content": prompt}]
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        ids = torch.tensor(encode(tokenizer, text), dtype=torch.long)
    else:
        ids = torch.tensor(encode(tokenizer, prompt, special=True), dtype=torch.long)
    if ids.ndim != 1 or not len(ids):
        raise EditError(f"a prompt is text or token ids (N,) with N >= 1; got shape {tuple(ids.shape)}")
    return ids
