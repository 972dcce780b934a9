"""What each head looked at while the model wrote an answer, and the rule by which that counts as copying.

Letters: L layers, H query heads, T tokens that the model emitted, A tokens of the answer.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from headwise.attach.observe import Record, observe
from headwise.errors import TaskError
from headwise.progress import track
from headwise.tasks import Prompt, exact_match

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Count = Literal["set", "sum"]
Success = Literal["exact", "rouge", "any"]
Through = Literal["one-forward", "cache", "generate"]
NEW_TOKENS = 50  # of a real decode, as in the reference code
RECALL = 0.5  # of the answer's words, which a response must exceed to count


@dataclass(frozen=True, eq=False)
class Trace:
    """One answered prompt: `emitted` (T,) are the tokens that the model chose, `keys` (L, H, T) the position that each head
    attended to most in the row that produced them, counted among the prompt's real tokens."""

    prompt: Prompt
    emitted: Tensor
    keys: Tensor

    def copies(self) -> Tensor:
        """(L, H, T) bool: the head's top key lies in the answer span and holds the very token that was emitted."""
        start, stop = self.prompt.needle_span
        inside = (self.keys >= start) & (self.keys < stop)
        looked_at = self.prompt.ids[self.keys.clamp(max=len(self.prompt.ids) - 1)]
        return inside & (looked_at == self.emitted)

    def score(self, count: Count) -> Tensor:
        """(L, H): copied tokens over the length of the span. "set" counts each needle token once, "sum" each step."""
        start, stop = self.prompt.needle_span
        copied = self.copies()
        if count == "sum":
            return copied.sum(-1) / (stop - start)
        places = self.keys[..., None] == torch.arange(start, stop)  # (L, H, T, A)
        return (copied[..., None] & places).any(-2).sum(-1) / (stop - start)


def trace_prompts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    prompts: Sequence[Prompt],
    *,
    through: Through,
    batch_size: int,
    progress: bool,
) -> list[Trace]:
    """One `Trace` a prompt, in the order given. Raises TaskError for a prompt that exceeds the model's context."""
    batches = _batches(prompts, batch_size)
    traces: dict[int, Trace] = {}
    read = {"one-forward": _read_at_once, "cache": _read_by_token, "generate": _generate}[through]
    rows: Any = range(-max(len(p.answer_ids) for p in prompts), 0) if through == "one-forward" else "last"
    with observe(model, "argmax", rows=rows) as record:
        for members in track(batches, "retrieval scores", progress):
            batch = [prompts[i] for i in members]
            traces.update(zip(members, read(model, tokenizer, batch, record), strict=True))
            record.clear()
    return [traces[i] for i in range(len(prompts))]


def succeeded(trace: Trace, success: Success, tokenizer: PreTrainedTokenizerBase | None) -> bool:
    """Whether the model's own tokens answer the question: "exact" begins with the answer, "rouge" recalls over half its words."""
    answer = trace.prompt.answer_ids
    if success == "any":
        return True
    if success == "exact":
        return torch.equal(trace.emitted[: len(answer)], answer)
    if tokenizer is None:
        raise TaskError("success='rouge' compares words, so it needs a tokenizer; use success='exact'")
    return rouge1_recall(tokenizer.decode(answer), tokenizer.decode(trace.emitted)) > RECALL


def rouge1_recall(wanted: str, response: str) -> float:
    """Share of the words of `wanted` that `response` holds, each at most as often as it does; words are cut to a stem.

    >>> rouge1_recall("eat a sandwich and sit", "He eats sandwiches.")
    0.4
    """
    left, hits = [_stem(w) for w in _words(response)], 0
    words = [_stem(w) for w in _words(wanted)]
    for word in words:
        if word in left:
            left.remove(word)
            hits += 1
    return hits / len(words) if words else 0.0


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def _stem(word: str) -> str:
    """Plural, -ed and -ing off words of more than three letters."""
    return re.sub(r"(?<=\w{3})(?:ies|es|s|ed|ing)$", "", word) if len(word) > 3 else word


def _batches(prompts: Sequence[Prompt], batch_size: int) -> list[list[int]]:
    """Indices of each batch: one length of answer, shorter prompts first. `exact_match` then leaves the order as it is."""
    order = sorted(range(len(prompts)), key=lambda i: (len(prompts[i].answer_ids), len(prompts[i].ids)))
    batches: list[list[int]] = []
    for i in order:
        answer = len(prompts[i].answer_ids)
        if batches and len(batches[-1]) < batch_size and len(prompts[batches[-1][0]].answer_ids) == answer:
            batches[-1].append(i)
        else:
            batches.append([i])
    return batches


def _read_at_once(model: PreTrainedModel, tokenizer: Any, batch: list[Prompt], record: Record) -> list[Trace]:
    """Prompt and answer in one forward pass; the last A rows are those that produce the answer's tokens."""
    return _teacher_forced(batch, exact_match(model, batch, batch_size=len(batch)).predicted, record)


def _read_by_token(model: PreTrainedModel, tokenizer: Any, batch: list[Prompt], record: Record) -> list[Trace]:
    """The prompt but for its last token in one pass, then that one and the answer token by token through the cache."""
    result = exact_match(model, batch, batch_size=len(batch), through="cache", tail=1, step=1)
    return _teacher_forced(batch, result.predicted, record)


def _teacher_forced(batch: list[Prompt], predicted: Sequence[Sequence[int]], record: Record) -> list[Trace]:
    keys = record.table("argmax")[..., -len(batch[0].answer_ids) :]  # (L, B, H, A)
    return [Trace(p, torch.tensor(predicted[row]), keys[:, row].long()) for row, p in enumerate(batch)]


def _generate(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, batch: list[Prompt], record: Record
) -> list[Trace]:
    """Greedy decoding by `model.generate`, up to 50 tokens or a line break."""
    longest = max(len(p.ids) for p in batch)
    ids = torch.stack([F.pad(p.ids, (longest - len(p.ids), 0)) for p in batch])
    mask = torch.stack([F.pad(torch.ones_like(p.ids), (longest - len(p.ids), 0)) for p in batch])
    _fits(model, longest + NEW_TOKENS)
    ended = _ended(model, tokenizer)
    with torch.no_grad():
        out = model.generate(
            ids.to(model.device),
            attention_mask=mask.to(model.device),
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            num_beams=1,
            repetition_penalty=1.0,
            pad_token_id=0 if model.generation_config.pad_token_id is None else model.generation_config.pad_token_id,
            stopping_criteria=[
                lambda seen, scores, **_: torch.tensor([ended(int(t)) for t in seen[:, -1]], device=seen.device)
            ],
        )
    new, keys = out[:, longest:].cpu(), record.table("argmax").long()
    return [_cut(p, new[row], keys[:, row], ended) for row, p in enumerate(batch)]


def _cut(prompt: Prompt, emitted: Tensor, keys: Tensor, ended: Callable[[int], bool]) -> Trace:
    """The trace up to the token that ended the row; what the batch decoded behind it is no part of the answer."""
    stop = next((t + 1 for t, token in enumerate(emitted.tolist()) if ended(token)), len(emitted))
    return Trace(prompt, emitted[:stop], keys[..., :stop])


def _ended(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> Callable[[int], bool]:
    """Whether a token ends an answer: the model's end token, or one whose text has a line break."""
    ends = model.generation_config.eos_token_id
    known = set() if ends is None else {ends} if isinstance(ends, int) else set(ends)
    return lambda token: token in known or (tokenizer is not None and "\n" in tokenizer.decode([token]))


def _fits(model: PreTrainedModel, length: int) -> None:
    window = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if window is not None and length > window:
        raise TaskError(f"{length} tokens exceed the model's context of {window}")
