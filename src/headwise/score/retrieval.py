"""Retrieval heads: how often each head copies the needle (arXiv 2404.15574).

Letters: L layers, H query heads, S successful tests.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, get_args

import torch
from torch import Tensor

from headwise import storage
from headwise.attach import find_stack, fingerprint
from headwise.attach.controller import sliding_window
from headwise.checks import Meta
from headwise.errors import TaskError
from headwise.registry import register
from headwise.score._copying import Count, Success, Through, Trace, succeeded, trace_prompts
from headwise.storage import StrPath
from headwise.tasks import NEEDLES, Prompt, even_depths, make_needle, make_passkey
from headwise.units import Fingerprint, HeadScores

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Task = Literal["passkey", "needle", "both"]


@dataclass(frozen=True, eq=False)
class RetrievalTests:
    """The tests one by one: `values` (S, L, H) of the successful ones, the `traces` of all, which of them `succeeded`."""

    values: Tensor
    traces: tuple[Trace, ...]
    succeeded: tuple[bool, ...]
    fingerprint: Fingerprint
    data: str = ""
    meta: Meta = field(default_factory=dict)

    def scores(self) -> HeadScores:
        """The retrieval score: the mean over successful tests."""
        return self._table(self.values.mean(0), "retrieval")

    def activation(self) -> HeadScores:
        """Share of the successful tests in which a head copied at all."""
        return self._table((self.values > 0).float().mean(0), "retrieval-activation")

    def to_retrieval_json(self, path: StrPath) -> None:
        """Write {"layer-head": [score of each successful test]}, the format of the Retrieval_Head repository."""
        _, layers, heads = self.values.shape
        table = {f"{l}-{h}": self.values[:, l, h].tolist() for l in range(layers) for h in range(heads)}
        storage.write_plain_json(path, table)

    def _table(self, values: Tensor, method: str) -> HeadScores:
        return HeadScores(values=values, method=method, data=self.data, fingerprint=self.fingerprint, meta=self.meta)


@register("score", "retrieval", paper="13")
def retrieval(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    tests: int = 20,
    length: int = 1024,
    depths: Sequence[float] | None = None,
    task: Task = "passkey",
    prompts: Sequence[Prompt] | None = None,
    count: Count = "set",
    success: Success = "exact",
    through: Through = "one-forward",
    batch_size: int = 1,
    seed: int = 0,
    progress: bool = False,
) -> HeadScores:
    """Score how often each head copies the needle: the top key of the row that wrote a token is that token in the needle.

        score[l,h] = |{needle tokens that head (l,h) copied}| / |answer span|,  mean over the tests that were answered

    arXiv 2404.15574. Gives HeadScores of kind "head", (L, H) in [0, 1]; `to_kv(kv_heads)` reduces them to kv heads.

    tests: number of prompts, at even depths from 0.05 to 0.95 of the text.
    length: tokens of a prompt.
    depths: depths to go round through instead, each in [0, 1].
    task: a passkey of five digits, a needle sentence, or every other one of each.
    prompts: prompts of your own instead of `tests`, `length`, `depths` and `task`.
    count: "set" counts each token of the needle once; "sum" counts every copying step, as the reference code does (may pass 1).
    success: which tests count: "exact" the model's own tokens are the answer, "rouge" they recall more than half of its words, "any" all.
    through: "one-forward" reads prompt and answer in one pass: the same rows as greedy decoding wherever the answer is right;
      "cache" feeds the answer token by token; "generate" decodes freely, up to 50 tokens or a line break.
    batch_size: prompts a forward pass, padded on the left; the scores do not depend on it.

    Raises TaskError where no test succeeds, or a prompt exceeds the model's context; AttachError for a model out of reach.

    >>> from headwise.hub import load_model
    >>> model, tokenizer = load_model("tiny-random-llama")
    >>> scores = retrieval(model, tokenizer, tests=2, length=300, success="any")
    >>> tuple(scores.values.shape), scores.meta["tests"], bool((scores.values <= 1).all())
    ((3, 4), 2, True)
    """
    found = retrieval_tests(
        model,
        tokenizer,
        tests=tests,
        length=length,
        depths=depths,
        task=task,
        prompts=prompts,
        count=count,
        success=success,
        through=through,
        batch_size=batch_size,
        seed=seed,
        progress=progress,
    )
    return found.scores()


def retrieval_tests(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    tests: int = 20,
    length: int = 1024,
    depths: Sequence[float] | None = None,
    task: Task = "passkey",
    prompts: Sequence[Prompt] | None = None,
    count: Count = "set",
    success: Success = "exact",
    through: Through = "one-forward",
    batch_size: int = 1,
    seed: int = 0,
    progress: bool = False,
) -> RetrievalTests:
    """What `retrieval` averages, test by test: scores, activation frequency, traces, and the reference's score file."""
    for name, value, allowed in (("count", count, Count), ("success", success, Success), ("through", through, Through)):
        if value not in get_args(allowed):
            raise TaskError(f"{name}={value!r}; choose {', '.join(get_args(allowed))}")
    if batch_size < 1:
        raise TaskError(f"batch_size={batch_size}; at least 1")
    made_for = fingerprint(model)
    chosen = list(prompts) if prompts is not None else make_prompts(tokenizer, tests, length, depths, task, seed)
    if not chosen:
        raise TaskError("prompts is empty; at least one test is needed")
    traces = trace_prompts(model, tokenizer, chosen, through=through, batch_size=batch_size, progress=progress)
    right = tuple(succeeded(trace, success, tokenizer) for trace in traces)
    if not any(right):
        raise TaskError(
            f"none of {len(traces)} tests succeeded by the rule success={success!r}, so there is nothing to average: take shorter "
            "prompts, an easier task, or success='any'"
        )
    values = torch.stack([t.score(count) for t, ok in zip(traces, right, strict=True) if ok]).float()
    what = "own prompts" if prompts is not None else f"{task} of {length} tokens"
    meta: Meta = {
        "tests": len(traces),
        "successful": sum(right),
        "count": count,
        "success": success,
        "through": through,
    }
    meta |= {"seed": seed, "sliding_layers": _sliding_layers(model)}
    data = f"{what}, {sum(right)} of {len(traces)} tests answered"
    return RetrievalTests(values, tuple(traces), right, made_for, data, meta)


def make_prompts(
    tokenizer: PreTrainedTokenizerBase | None,
    tests: int,
    length: int,
    depths: Sequence[float] | None,
    task: Task,
    seed: int,
) -> list[Prompt]:
    """`tests` prompts of a task at the depths in turn; every draw from one generator of this seed."""
    if tokenizer is None:
        raise TaskError("making prompts needs a tokenizer; or give prompts= of your own")
    if task not in get_args(Task):
        raise TaskError(f"task={task!r}; choose {', '.join(get_args(Task))}")
    if tests < 1 or (depths is not None and not len(depths)):
        raise TaskError(f"tests={tests}, depths={depths}: at least one test at one depth is needed")
    places = even_depths(tests) if depths is None else list(depths)
    generator = torch.Generator().manual_seed(seed)
    made = []
    for i in range(tests):
        depth = places[i % len(places)]
        if task == "passkey" or (task == "both" and i % 2 == 0):
            made.append(make_passkey(tokenizer, length=length, depth=depth, generator=generator))
        else:
            needle = NEEDLES[(i if task == "needle" else i // 2) % len(NEEDLES)]
            made.append(make_needle(tokenizer, length=length, depth=depth, generator=generator, needle=needle))
    return made


def _sliding_layers(model: PreTrainedModel) -> str:
    """Layers with a sliding window, as text: their heads cannot retrieve from beyond it, whatever their score."""
    windows = enumerate(map(sliding_window, find_stack(model).modules))
    return ",".join(str(layer) for layer, window in windows if window)
