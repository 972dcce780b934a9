"""Agreement: does a model under a plan still write what the untouched model writes? No labels, only the model's own words.

A long text is to be summed up. The untouched model writes a summary greedily; the model with its cache cut, its heads edited or
routed writes another; the two are compared, token by token.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from headwise.arguments import cache_argument
from headwise.errors import TaskError
from headwise.progress import track
from headwise.tasks.batches import padded
from headwise.tasks.prompts import build_to_length
from headwise.tasks.texts import encode

if TYPE_CHECKING:
    from transformers import Cache, PreTrainedModel, PreTrainedTokenizerBase

_ASK = "Sum up the text above in three sentences."
_HAY = "\x00HAY\x00"
_DRAWS = 2000  # of the bootstrap


@dataclass(frozen=True)
class Agreement:
    """Per text, in [0, 1]: `rouge_l`, F1 of the longest common subsequence; `overlap`, F1 of the bags of tokens; `prefix`, the share
    of the reference's tokens before the first that differs; and `chance`, `rouge_l` against the reference of another text."""

    rouge_l: tuple[float, ...]
    overlap: tuple[float, ...]
    prefix: tuple[float, ...]
    chance: tuple[float, ...]

    @classmethod
    def of(cls, reference: Sequence[Sequence[int]], written: Sequence[Sequence[int]]) -> Agreement:
        """Of tokens written against the tokens of reference, text by text. Raises TaskError for none, or unequal numbers.

        >>> Agreement.of([[1, 2, 3, 4], [5, 6]], [[1, 2, 4], [5, 6]])
        Agreement(rouge_l=(0.857..., 1.0), overlap=(0.857..., 1.0), prefix=(0.5, 1.0), chance=(0.0, 0.0))
        """
        if not reference or len(reference) != len(written):
            raise TaskError(f"{len(written)} texts cannot be compared with {len(reference)}")
        pairs = list(zip(reference, written, strict=True))
        others = [*reference[1:], reference[0]]
        return cls(
            rouge_l=tuple(rouge_l(a, b) for a, b in pairs),
            overlap=tuple(_f1(sum((Counter(a) & Counter(b)).values()), len(a), len(b)) for a, b in pairs),
            prefix=tuple(_prefix(a, b) for a, b in pairs),
            chance=tuple(rouge_l(a, b) for a, b in zip(others, written, strict=True)) if len(reference) > 1 else (),
        )

    def interval(self, name: str = "rouge_l") -> tuple[float, float]:
        """95 % interval of the mean over texts by a bootstrap with a fixed seed; (0, 1) for one text, which says nothing."""
        return bootstrap(getattr(self, name))

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, for JSON."""
        names = ("rouge_l", "overlap", "prefix")
        found: dict[str, Any] = {"texts": len(self.rouge_l), "chance": _mean(self.chance) if self.chance else None}
        for name in names:
            low, high = self.interval(name)
            found[name] = {"mean": _mean(getattr(self, name)), "low": low, "high": high}
        return found | {"per_text": {name: list(getattr(self, name)) for name in names}}

    def __str__(self) -> str:
        low, high = self.interval()
        chance = f", {_mean(self.chance):.2f} against another text's" if self.chance else ""
        return (
            f"ROUGE-L {_mean(self.rouge_l):.2f} (95 % interval {low:.2f} to {high:.2f}) with the untouched model's own summaries{chance}; "
            f"the same tokens {_mean(self.overlap):.2f}, the same beginning {_mean(self.prefix):.2f}"
        )


def rouge_l(reference: Sequence[int], written: Sequence[int]) -> float:
    """F1 of the longest common subsequence of two lists of tokens; 1 for two empty ones.

    >>> round(rouge_l([1, 2, 3, 4], [2, 9, 4]), 3)
    0.571
    """
    row = [0] * (len(written) + 1)
    for a in reference:
        diagonal = 0
        for j, b in enumerate(written, 1):
            diagonal, row[j] = row[j], diagonal + 1 if a == b else max(row[j], row[j - 1])
    return _f1(row[-1], len(reference), len(written))


def bootstrap(values: Sequence[float]) -> tuple[float, float]:
    """95 % interval of a mean: the middle of the means of samples drawn with replacement, by a fixed seed."""
    if len(values) < 2:
        return 0.0, 1.0
    drawn = torch.randint(len(values), (_DRAWS, len(values)), generator=torch.Generator().manual_seed(0))
    means = torch.tensor(values, dtype=torch.float64)[drawn].mean(1)
    low, high = means.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high


def make_documents(
    tokenizer: PreTrainedTokenizerBase,
    *,
    count: int,
    length: int,
    generator: torch.Generator,
    haystack: str | None = None,
) -> list[torch.Tensor]:
    """`count` prompts (n,) of at most `length` tokens: a text and the wish to have it summed up, as a chat where the tokenizer knows one.

    >>> from headwise.hub import byte_tokenizer
    >>> made = make_documents(byte_tokenizer(), count=2, length=300, generator=torch.Generator().manual_seed(0))
    >>> [200 < len(ids) <= 300 for ids in made]
    [True, True]
    """
    if count < 1:
        raise TaskError(f"count={count}; at least one text is needed")
    before, after = _frame(tokenizer)
    texts = [build_to_length(tokenizer, before, after, length, generator, haystack) for _ in range(count)]
    return [torch.tensor(encode(tokenizer, text, special=not tokenizer.chat_template)) for text in texts]


def continuations(
    model: PreTrainedModel,
    prompts: Sequence[torch.Tensor],
    *,
    new_tokens: int = 64,
    batch_size: int = 1,
    cache: Callable[[], Cache] | None = None,
    progress: bool = False,
) -> list[list[int]]:
    """What the model writes greedily behind each prompt (n,), in the order given, at most `new_tokens` tokens, cut at its end mark.

    Batches of like lengths, padded on the left, by plain `generate` with its cache.
    """
    if new_tokens < 1 or batch_size < 1:
        raise TaskError(f"new_tokens={new_tokens} and batch_size={batch_size} must be at least 1")
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    parts = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    found: dict[int, list[int]] = {}
    for members in track(parts, "summaries", progress):
        ids, mask = (x.to(model.device) for x in padded([prompts[i] for i in members]))
        options: dict[str, Any] = {} if cache is None else cache_argument(model, cache())
        with torch.no_grad():
            out = model.generate(
                ids,
                attention_mask=mask,
                max_new_tokens=new_tokens,
                do_sample=False,
                num_beams=1,
                pad_token_id=_pad(model),
                **options,
            )
        rows = out[:, ids.shape[1] :].tolist()
        found.update({i: _until_end(row, model) for i, row in zip(members, rows, strict=True)})
    return [found[i] for i in range(len(prompts))]


def _frame(tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    if not tokenizer.chat_template:
        return "", f"\n\n{_ASK}\n\nSummary:"
    messages = [{"role": "user", "content": f"{_HAY}\n\n{_ASK}"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    before, _, after = text.partition(_HAY)
    return before, after


def _ends(model: PreTrainedModel) -> set[int]:
    ends = getattr(model.generation_config, "eos_token_id", None)
    return set(ends) if isinstance(ends, list) else set() if ends is None else {ends}


def _pad(model: PreTrainedModel) -> int:
    pad = getattr(model.generation_config, "pad_token_id", None)
    return min(_ends(model), default=0) if pad is None else pad


def _until_end(row: list[int], model: PreTrainedModel) -> list[int]:
    stop = next((place for place, token in enumerate(row) if token in _ends(model)), len(row))
    return row[:stop]


def _f1(common: int, first: int, second: int) -> float:
    return 2 * common / (first + second) if first + second else 1.0


def _prefix(reference: Sequence[int], written: Sequence[int]) -> float:
    same = next((i for i, (a, b) in enumerate(zip(reference, written, strict=False)) if a != b), None)
    if same is None:
        same = min(len(reference), len(written))
    return same / len(reference) if reference else float(not written)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
