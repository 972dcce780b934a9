"""Measures: exact match of known answers and perplexity, each in one forward or through the model's KV cache.

Why two ways: `through="one-forward"` reads prompt and answer in a single prefill. A KV plan that only shrinks what is
*kept* leaves that prefill dense, so it would look free. `through="cache"` prefills the prompt first and then feeds the
rest in small steps through the cache that the model returned, as `generate` does. Both take any causal language model of
transformers, with or without hooks attached.
"""

from __future__ import annotations

import contextlib
import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import torch
from torch.nn import functional as F

from headwise.arguments import cache_argument, cache_of
from headwise.errors import TaskError
from headwise.modes import evaluating
from headwise.progress import track
from headwise.tasks.batches import Batch, Padding, collate, groups
from headwise.tasks.prompts import Prompt
from headwise.tasks.texts import windows

if TYPE_CHECKING:
    from transformers import Cache, PreTrainedModel

Through = Literal["one-forward", "cache"]
T = TypeVar("T")

_Z95 = 1.959963984540054  # 97.5 % quantile of the normal distribution
_ROWS = 512  # logits rows turned to float32 at a time


@dataclass(frozen=True)
class Result:
    """Per prompt, in the order given: all answer tokens right, share of them right, and the tokens that the model chose."""

    exact: tuple[bool, ...]
    token_accuracy: tuple[float, ...]
    predicted: tuple[tuple[int, ...], ...]

    @property
    def mean(self) -> float:
        """Share of prompts answered exactly."""
        return sum(self.exact) / len(self.exact)

    @property
    def tokens(self) -> float:
        """Mean over prompts of the share of answer tokens that are right."""
        return sum(self.token_accuracy) / len(self.token_accuracy)

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's 95 % confidence interval of `mean`."""
        return wilson(sum(self.exact), len(self.exact))

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and lists, for JSON."""
        low, high = self.interval
        return {
            "prompts": len(self.exact),
            "exact": self.mean,
            "low": low,
            "high": high,
            "tokens": self.tokens,
            "per_prompt": {"exact": list(self.exact), "tokens": list(self.token_accuracy)},
        }

    def __str__(self) -> str:
        low, high = self.interval
        counts = f"{sum(self.exact)}/{len(self.exact)}"
        return f"{counts} exact (95 % interval {low:.2f} to {high:.2f}), {self.tokens:.2f} of the answer tokens"


def wilson(successes: int, trials: int) -> tuple[float, float]:
    """Wilson's 95 % score interval of a proportion; unlike the normal one it is never empty at 0 or all successes.

    >>> [round(x, 3) for x in wilson(8, 8)]
    [0.676, 1.0]
    """
    if trials < 1 or not 0 <= successes <= trials:
        raise TaskError(f"{successes} successes of {trials} trials is no proportion")
    share, z2 = successes / trials, _Z95**2
    centre = (share + z2 / (2 * trials)) / (1 + z2 / trials)
    half = _Z95 * math.sqrt(share * (1 - share) / trials + z2 / (4 * trials**2)) / (1 + z2 / trials)
    return max(0.0, centre - half), min(1.0, centre + half)


def exact_match(
    model: PreTrainedModel,
    prompts: Sequence[Prompt],
    *,
    batch_size: int = 1,
    through: Through = "one-forward",
    tail: int = 1,
    step: int = 1,
    padding: Padding = "left",
    cache: Callable[[], Cache] | None = None,
    progress: bool = False,
) -> Result:
    """Greedy exact match without generating: the arg-max at every answer token, given the right tokens before it.

    All are right exactly when greedy decoding would write the answer. Batches are padded on the left, or on the right
    where all is read in one forward.
    `through="cache"` prefills each prompt but for its last `tail` tokens, then feeds those and the answer `step` tokens at
    a time through the cache that came back (`step=0`: all at once). `cache` makes the cache of each batch; by default the
    model does. Raises TaskError for no prompts, or a prompt that exceeds the model's context.

    >>> from headwise.hub import load_model
    >>> from headwise.tasks.passkey import make_passkeys
    >>> model, tokenizer = load_model("tiny-random-llama")
    >>> prompts = make_passkeys(tokenizer, count=3, length=300, generator=torch.Generator().manual_seed(0))
    >>> exact_match(model, prompts, batch_size=3).exact
    (False, False, False)
    """
    _check_through(through)
    if tail < 1 or step < 0:
        raise TaskError(f"tail={tail} must be at least 1 and step={step} at least 0 (0: all in one step)")
    if padding not in ("left", "right") or (padding == "right" and through == "cache"):
        raise TaskError(
            f"padding={padding!r}; it is 'left', or 'right' with through='one-forward': decoding goes on at the right end"
        )

    def predict(batch: Batch) -> torch.Tensor:
        if through == "one-forward":
            return _one_forward(model, batch, padding).argmax(-1)
        return _through_cache(model, batch, tail, step, cache).argmax(-1)

    return _match(model, prompts, predict, batch_size, progress)


def generate_match(
    model: PreTrainedModel,
    prompts: Sequence[Prompt],
    *,
    batch_size: int = 1,
    cache: Callable[[], Cache] | None = None,
    progress: bool = False,
) -> Result:
    """The same as `exact_match` by real greedy `model.generate` with its cache: slower, and the check of cache code.

    Token accuracy counts the generated tokens, so one early mistake may spoil those after it.
    """
    pad = getattr(model.generation_config, "pad_token_id", None)

    def predict(batch: Batch) -> torch.Tensor:
        kwargs: dict[str, Any] = {} if cache is None else cache_argument(model, cache())
        out = model.generate(
            batch.ids,
            attention_mask=batch.mask,
            max_new_tokens=batch.answers.shape[1],
            do_sample=False,
            num_beams=1,
            repetition_penalty=1.0,
            pad_token_id=0 if pad is None else pad,
            **kwargs,
        )
        new = out[:, batch.ids.shape[1] :]
        return F.pad(new, (0, batch.answers.shape[1] - new.shape[1]), value=-1)  # all rows may end early

    return _match(model, prompts, predict, batch_size, progress)


def perplexity(
    model: PreTrainedModel,
    ids: torch.Tensor | Sequence[int],
    *,
    window: int,
    tokens: int = 4096,
    batch_size: int = 1,
    through: Through = "one-forward",
    step: int = 128,
    cache: Callable[[], Cache] | None = None,
    progress: bool = False,
) -> float:
    """Perplexity of the first `tokens` of ids (N,) in windows that do not overlap: exp of the mean of `window_losses`."""
    losses = window_losses(
        model,
        ids,
        window=window,
        tokens=tokens,
        batch_size=batch_size,
        through=through,
        step=step,
        cache=cache,
        progress=progress,
    )
    return math.exp(losses.mean().item())


def window_losses(
    model: PreTrainedModel,
    ids: torch.Tensor | Sequence[int],
    *,
    window: int,
    tokens: int = 4096,
    batch_size: int = 1,
    through: Through = "one-forward",
    step: int = 128,
    cache: Callable[[], Cache] | None = None,
    progress: bool = False,
) -> torch.Tensor:
    """Mean loss in nats of each window, (n,) float64; every window predicts its `window` - 1 last tokens.

    `through="cache"` feeds each window `step` tokens at a time through the model's cache, so that a KV plan is felt.
    """
    _check_through(through)
    ids = torch.as_tensor(ids, dtype=torch.long)
    if window < 2 or step < 1:
        raise TaskError(f"window={window} must be at least 2 and step={step} at least 1")
    _check_context(model, window)
    rows = windows(ids[:tokens], window)
    losses = []
    with _measuring(model):
        for batch in track(rows.split(_positive(batch_size)), "perplexity", progress):
            batch = batch.to(model.device)
            losses.append(_losses(model, batch, window if through == "one-forward" else step, through, cache))
    return torch.cat(losses)


def _match(
    model: PreTrainedModel,
    prompts: Sequence[Prompt],
    predict: Callable[[Batch], torch.Tensor],
    batch_size: int,
    progress: bool,
) -> Result:
    if not prompts:
        raise TaskError("no prompts to evaluate")
    _check_context(model, max(len(p.ids) + len(p.answer_ids) for p in prompts))
    predicted: dict[int, torch.Tensor] = {}
    with _measuring(model):
        for members in track(groups(prompts, _positive(batch_size)), "exact match", progress):
            rows = predict(collate([prompts[i] for i in members], model.device)).cpu()
            predicted.update(zip(members, rows, strict=True))
    right = [predicted[i] == prompt.answer_ids for i, prompt in enumerate(prompts)]
    return Result(
        exact=tuple(bool(r.all()) for r in right),
        token_accuracy=tuple(r.double().mean().item() for r in right),
        predicted=tuple(tuple(predicted[i].tolist()) for i in range(len(prompts))),
    )


def _one_forward(model: PreTrainedModel, batch: Batch, padding: Padding) -> torch.Tensor:
    """Logits (B, A, V) that predict the answer tokens."""
    keep = batch.answers.shape[1]
    if padding == "left":
        ids, mask = batch.with_answers()
        return _call(model, ids, mask, 0, keep=keep, use_cache=False).logits[:, -keep:]
    ids, mask, last = batch.padded_right()
    logits = _call(model, ids, mask, 0, use_cache=False).logits
    columns = last[:, None] + torch.arange(keep, device=last.device)
    return logits.gather(1, columns[..., None].expand(-1, -1, logits.shape[2]))


def _through_cache(
    model: PreTrainedModel, batch: Batch, tail: int, step: int, cache: Callable[[], Cache] | None
) -> torch.Tensor:
    """Logits (B, A, V) that predict the answer tokens, read through the cache after the prefill."""
    ids, mask = batch.with_answers()
    prefill = batch.ids.shape[1] - tail
    if not bool(batch.mask[:, :prefill].any(1).all()):
        raise TaskError(f"tail={tail} leaves no token of a prompt for the prefill")
    keep = batch.answers.shape[1]
    sizes = [prefill, *[step or ids.shape[1]] * ids.shape[1]]
    return torch.cat(list(_feed(model, ids, mask, sizes, cache)), 1)[:, -keep:]


def _feed(
    model: PreTrainedModel,
    ids: torch.Tensor,
    mask: torch.Tensor,
    sizes: Iterable[int],
    cache: Callable[[], Cache] | None,
    keep: int = 1,
) -> Iterator[torch.Tensor]:
    """Reads ids (B, N) in pieces of the given sizes through one cache; logits of the first piece's last `keep` tokens
    (0: all), and of all tokens of the others."""
    past, start = (None if cache is None else cache()), 0
    for size in sizes:
        stop = min(start + size, ids.shape[1])
        if stop == start:
            return
        out = _call(
            model, ids[:, start:stop], mask[:, :stop], start, keep=0 if start else keep, past=past, use_cache=True
        )
        past = cache_of(out)
        if past is None:
            raise TaskError(f"{type(model).__name__} returns no cache, so nothing can be measured through it")
        yield out.logits
        start = stop


def _losses(
    model: PreTrainedModel, ids: torch.Tensor, step: int, through: Through, cache: Callable[[], Cache] | None
) -> torch.Tensor:
    """Mean loss of each row of ids (B, N), (B,) float64 on the CPU."""
    mask = torch.ones_like(ids)
    if through == "one-forward":
        pieces: Iterable[torch.Tensor] = [_call(model, ids, mask, 0, use_cache=False).logits]
    else:
        pieces = _feed(model, ids, mask, [step] * (ids.shape[1] // step + 1), cache, keep=0)
    total, start = torch.zeros(len(ids), dtype=torch.float64), 0
    for logits in pieces:
        for part in logits.split(_ROWS, 1):
            targets = ids[:, start + 1 : start + 1 + part.shape[1]]
            scored = part[:, : targets.shape[1]].float().transpose(1, 2)
            total += F.cross_entropy(scored, targets, reduction="none").double().sum(1).cpu()
            start += part.shape[1]
    return total / (ids.shape[1] - 1)


def _call(
    model: PreTrainedModel,
    ids: torch.Tensor,
    mask: torch.Tensor,
    start: int,
    *,
    keep: int = 0,
    past: Cache | None = None,
    use_cache: bool,
) -> Any:
    """One forward of ids (B, n), the tokens `start` to `start + n` of rows whose mask so far is (B, start + n)."""
    positions = (mask.cumsum(1) - 1).clamp(min=0)[:, start:]
    kwargs: dict[str, Any] = {"position_ids": positions, "logits_to_keep": keep, "use_cache": use_cache}
    if past is not None:
        kwargs |= cache_argument(model, past)
    takes = inspect.signature(model.forward).parameters
    if not any(p.kind is p.VAR_KEYWORD for p in takes.values()):
        kwargs = {name: value for name, value in kwargs.items() if name in takes}
    return model(input_ids=ids, attention_mask=mask, **kwargs)


def _check_through(through: str) -> None:
    if through not in ("one-forward", "cache"):
        raise TaskError(f"through={through!r}; it is 'one-forward' or 'cache'")


@contextlib.contextmanager
def _measuring(model: PreTrainedModel) -> Iterator[None]:
    """No gradients, no dropout; afterwards the model is in the mode it was in."""
    with evaluating(model), torch.no_grad():
        yield


def _check_context(model: PreTrainedModel, length: int) -> None:
    if not model.can_generate():
        raise TaskError(f"{type(model).__name__} is no causal language model: nothing to predict here")
    window = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if window is not None and length > window:
        raise TaskError(f"{length} tokens exceed the model's context of {window}")


def _positive(batch_size: int) -> int:
    if batch_size < 1:
        raise TaskError(f"batch_size={batch_size}; at least 1")
    return batch_size
