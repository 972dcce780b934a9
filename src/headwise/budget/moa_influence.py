"""MoA's influence profile (Fu et al. 2024, arXiv 2406.14909): which keys of which head the model's own answers depend on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from headwise.attach import attach, find_stack, fingerprint
from headwise.budget._moa_calibration import Calibration, answer_loss, calibration_set
from headwise.budget._moa_influence import InfluenceProbe
from headwise.budget._moa_profile import InfluenceProfile
from headwise.checks import whole
from headwise.errors import ScoreError
from headwise.registry import register
from headwise.score._gates import frozen

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@register("score", "moa-influence", paper="02")
def moa_influence(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    lengths: str | Sequence[int] = "512,1024,2048",
    samples: int = 2,
    block: int = 64,
    questions: int = 2,
    answer_tokens: int = 24,
    haystack: str | None = None,
    calibration: Sequence[Calibration] | None = None,
    seed: int = 0,
    progress: bool = False,
) -> InfluenceProfile:
    """Influence of every key on the loss of the model's own answers, by head, blockwise, at several lengths (MoA).

    For each row i and key j of each head, with A the attention and g = dL/dA, L the mean cross entropy in nats of the answer tokens,

        dL_ij = -A_ij (g_ij - sum_k A_ik g_ik) / (1 - A_ij + eps)

    is the first-order change of L if key j is taken from row i and the row is renormalised. Its size is summed over blocks and
    averaged over samples. One forward and one backward pass a sample; only gradients of activations are made, no weight gets one,
    and no N × N matrix is kept: memory is that of the backward pass and 4 · L · H · (N/b)² bytes.

    lengths: profiled lengths in tokens, split by commas; multiples of the block.
    samples: texts a length, with answers that the model writes first.
    block: tokens of a block, also the sinks of every head later.
    questions: questions a text, facts and quotations in turn.
    answer_tokens: tokens that the model writes to each question.
    haystack: the text between; by default the packaged English.
    `calibration`: finished samples instead, one `Calibration` a length.

    Returns an `InfluenceProfile` of query heads: `HeadScores` (L, H) with the maps (L, H, N/b, N/b) of each length.
    Raises ScoreError for lengths that do not fit, AttachError for a model whose softmax headwise cannot recompute, TaskError
    without a causal language model.

    >>> from headwise.hub import load_model
    >>> model, tokenizer = load_model("tiny-random-llama")
    >>> profile = moa_influence(model, tokenizer, lengths="256", samples=1, block=32, questions=1, answer_tokens=4)
    >>> profile.maps[256].shape, bool((profile.maps[256].triu(1) == 0).all())
    (torch.Size([3, 4, 8, 8]), True)
    """
    whole("block", block, 1, ScoreError)
    if calibration is None:
        wanted = _lengths(lengths, block, model)
        generator = torch.Generator().manual_seed(whole("seed", seed, 0, ScoreError))
        how: dict[str, Any] = {
            "questions": questions,
            "answer_tokens": answer_tokens,
            "haystack": haystack,
            "generator": generator,
        }
        sets: Iterator[Calibration] = (
            calibration_set(model, tokenizer, length=n, samples=samples, **how) for n in wanted
        )
        data = f"{samples} texts of {', '.join(map(str, wanted))} tokens with the model's own answers"
    else:
        wanted = _lengths([one.length for one in calibration], block, model)
        sets, data = iter(calibration), f"{sum(len(one.ids) for one in calibration)} given texts"
    stack, maps = find_stack(model), {}
    with _bar(len(wanted), progress) as advance:
        for one in sets:
            maps[one.length] = profile_of(model, one, block, stack.layers)
            advance()
    return InfluenceProfile.of(maps, block, data=data, fingerprint=fingerprint(model))


def profile_of(model: Any, calibration: Calibration, block: int, layers: int) -> Tensor:
    """Mean influence maps (L, H, c, c) of the samples of one length; the model is left as it was."""
    probe, total = InfluenceProbe(layers, block), torch.zeros(())
    with frozen(model), attach(model, transforms=[probe]), torch.enable_grad():
        for ids, answers in zip(calibration.ids, calibration.answers, strict=True):
            answer_loss(model, ids, answers).backward()
            total = total + probe.taken()
    if not bool(torch.isfinite(total).all()):
        raise ScoreError("the influence is not finite: profile the model in float32 or bfloat16")
    return total / len(calibration.ids)


def _lengths(lengths: str | Sequence[int], block: int, model: Any) -> list[int]:
    parts = lengths.split(",") if isinstance(lengths, str) else lengths
    try:
        wanted = sorted(int(part) for part in parts)
    except (TypeError, ValueError):
        raise ScoreError(f"lengths is {lengths!r}; give tokens split by commas, such as 512,1024,2048") from None
    if not wanted or len(set(wanted)) != len(wanted) or any(n < 2 * block or n % block for n in wanted):
        raise ScoreError(
            f"lengths is {lengths!r}; each must be a multiple of the block of {block} tokens, two at least"
        )
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if context and wanted[-1] > context:
        raise ScoreError(f"lengths is {lengths!r}; the model's context is {context} tokens")
    return wanted


class _bar:  # noqa: N801 - used like a function
    """A progress bar over the lengths; gives the function that advances it."""

    def __init__(self, total: int, shown: bool):
        from rich.progress import Progress

        self.progress = Progress(disable=not shown)
        self.task = self.progress.add_task("influence", total=total)

    def __enter__(self) -> Any:
        self.progress.start()
        return lambda: self.progress.advance(self.task)

    def __exit__(self, *error: object) -> None:
        self.progress.stop()
