"""DuoAttention (Xiao et al. 2024, arXiv 2410.10819): which kv heads need the whole past, and which only sinks and a window.

Three rankings of the same units. `duo-gates` is the paper's optimisation; `duo-instant` one backward pass of the same gates;
`stream-difference` the change of each layer's output if a kv head streamed, which serves perplexity more than retrieval.

Letters: L layers, K kv heads, H query heads, G = H / K, N tokens, D head dim, C hidden size.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedTokenizerBase

from headwise.attach import HeadCall, attach, find_stack, fingerprint
from headwise.attach.projection import head_weights, output_projection
from headwise.checks import finite, whole
from headwise.errors import ScoreError
from headwise.plan import SinkWindow
from headwise.progress import track
from headwise.registry import register
from headwise.score._gate_files import read_gates, write_gates
from headwise.score._gates import GateMix, GateOptimiser, MixSource, frozen, need_gates
from headwise.tasks import Prompt, context_lengths, english, even_depths, make_passkey, make_passphrases
from headwise.tasks.passphrases import NATO, Passphrases, PassphraseSpec
from headwise.tasks.texts import draw_tokens, encode
from headwise.units import HeadScores

__all__ = ["duo_gates", "duo_instant", "read_gates", "stream_difference", "write_gates"]

PHRASE_FRAME = (
    "Keep in mind that the seventh pass-phrase is. What is the seventh pass-phrase? The seventh pass-phrase is:"
    + 9 * "\n"
)
Target = Literal["passkey", "text"]
MULTIPLE = 16  # the lengths of training rows are multiples of this


@register("score", "duo-gates", paper="09")
def duo_gates(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    *,
    steps: int = 2000,
    lr: float = 0.02,
    l1: float = 0.05,
    sinks: int = 128,
    window: int = 256,
    mix_source: MixSource = "teacher",
    min_length: int = 1000,
    max_length: int | None = None,
    passphrases: int = 10,
    words: int = 32,
    batch_size: int = 1,
    gradient_checkpointing: bool = True,
    haystack: str | None = None,
    seed: int = 0,
    progress: bool = False,
) -> HeadScores:
    """Gates of DuoAttention, one in [0, 1] for each kv head, learned on pass-phrases while the model is frozen.

    Each head gives (1 - a) · streaming + a · full, and a is learned from 1 downwards with AdamW (no weight decay) by

        mean over labelled tokens t and C of (h_full[t] - h_mix[t])² + l1 · mean over all L · K gates of |a|,

    h being the last hidden states after the final norm, compared in float32. After every step the gates are clamped to [0, 1];
    the learning rate rises and falls over a fifth of the steps. Defaults are the paper's; 2000 steps are made for an accelerator.

    steps: optimiser steps, one batch each.
    l1: weight of the mean gate; larger values close more heads.
    sinks: first tokens that a streaming head reads.
    window: latest tokens that a streaming head reads.
    mix_source: "teacher" takes the full attention from the unchanged model's own states (the released code, and cheaper), "self"
      computes it on the states of the mixed model (the paper's formula).
    min_length: shortest row, in tokens, questions included; raised to what the pass-phrases need.
    max_length: longest row; by default 32000 or the model's context, whichever is less. 50 lengths between the two are drawn from.
    passphrases: phrases hidden in a row.
    words: words of a phrase.
    gradient_checkpointing: recompute activations in the backward pass: a third slower, far less memory.
    haystack: text to hide them in, instead of Python's documentation.

    Returns scores of kind "kv", (L, K), the values in [0, 1]. Raises ScoreError or TaskError for options that make no sense,
    AttachError for models whose kv heads have no cache of their own.

    >>> from headwise.hub import load_model
    >>> model, tokenizer = load_model("tiny-random-llama")
    >>> options = dict(steps=2, sinks=4, window=16, min_length=300, max_length=320, passphrases=1, words=2)
    >>> scores = duo_gates(model, tokenizer, **options)
    >>> scores.values.shape, bool((scores.values <= 1).all())
    (torch.Size([3, 2]), True)
    """
    whole("steps", steps, 1, ScoreError)
    for name, value, zero in (("lr", lr, False), ("l1", l1, True)):
        if finite(name, value, ScoreError) < 0 or not (zero or value):
            raise ScoreError(f"{name} is {value}; it must be {'at least' if zero else 'above'} 0")
    if mix_source not in ("teacher", "self"):
        raise ScoreError(f"mix_source is {mix_source!r}; it must be 'teacher' or 'self'")
    optimiser = GateOptimiser(model, SinkWindow(sinks, window), steps=steps, lr=lr, l1=l1, mix_source=mix_source)
    spec = PassphraseSpec(phrases=passphrases, words=words, multiple_of=MULTIPLE)
    generator = torch.Generator().manual_seed(seed)
    lengths = _lengths(model, tokenizer, spec, min_length, max_length)
    distill = penalty = 0.0
    with frozen(model, checkpointing=gradient_checkpointing):
        for _ in track(range(steps), "gates", progress):
            length = lengths[int(torch.randint(len(lengths), (), generator=generator))]
            rows = make_passphrases(
                tokenizer, length=length, generator=generator, batch_size=batch_size, spec=spec, haystack=haystack
            )
            done = optimiser.step(*_on_device(rows, optimiser.alpha.device))
            distill, penalty = done.distill, done.penalty
    return HeadScores(
        values=optimiser.alpha.detach(),
        kind="kv",
        method="duo-gates",
        data=f"{passphrases} pass-phrases of {words} words in {lengths[0]} to {lengths[-1]} tokens",
        fingerprint=fingerprint(model),
        meta={
            "sinks": sinks,
            "window": window,
            "steps": steps,
            "lr": lr,
            "l1": l1,
            "mix_source": str(mix_source),
            "seed": seed,
            "distill": distill,
            "mean_gate": penalty,
        },
    )


@register("score", "duo-instant", paper="09")
def duo_instant(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    *,
    target: Target = "passkey",
    alpha: float = 0.7,
    signed: bool = True,
    prompts: int = 2,
    length: int = 768,
    sinks: int = 16,
    window: int = 128,
    haystack: str | None = None,
    seed: int = 0,
    progress: bool = False,
) -> HeadScores:
    """Gates in seconds: how much the answer's loss would fall if a kv head's gate opened further, by one backward a prompt.

    Every head gives o = stream + alpha · (full - stream); the score is -dL/dalpha of its kv head, L the mean negative
    log-likelihood of the target's tokens, averaged over the prompts; with `signed=False` its absolute value.

    target: "passkey", the digits of a key hidden in text, for plans that retrieve; or "text", every token of English that stands
      beyond sinks and window, for plans that read prose. `headwise.budget.duo` mixes two tables.
    alpha: where the derivative is taken; at 1 the model is unchanged, below it the heads that carry the answer are missed.
    signed: keep the sign; without it, heads whose opening harms count as those whose opening helps.
    prompts: passkey prompts, at even depths between the sinks and the window: a key inside them needs no head to stay full; or pieces
      of text.
    length: tokens of a prompt; more than sinks + window.
    sinks: first tokens that a streaming head reads.
    window: latest tokens that a streaming head reads.
    haystack: text to hide the key in, instead of Python's documentation.

    Returns scores of kind "kv", (L, K). A ranking, not gates: use them with `budget=` or `sparsity=`, not with a threshold.

    >>> from headwise.hub import load_model
    >>> model, tokenizer = load_model("tiny-random-llama")
    >>> duo_instant(model, tokenizer, prompts=1, length=300, sinks=4, window=32).values.shape
    torch.Size([3, 2])
    """
    if not 0 <= finite("alpha", alpha, ScoreError) <= 1:
        raise ScoreError(f"alpha is {alpha}; it must lie in [0, 1]")
    pattern = _window_for(sinks, window, whole("length", length, 1, ScoreError))
    whole("prompts", prompts, 1, ScoreError)
    if target not in get_args(Target):
        raise ScoreError(f"target is {target!r}; it must be 'passkey' or 'text'")
    generator = torch.Generator().manual_seed(seed)
    losses = _target_losses(
        model, tokenizer, target, _far_depths(prompts, pattern, length), length, generator, haystack
    )
    gates = torch.full(need_gates(model), float(alpha), device=_device(model), requires_grad=True)
    with frozen(model), torch.enable_grad(), attach(model, transforms=[GateMix(gates, pattern)]):
        for loss in track(losses, "backward passes", progress):
            (loss(sinks + window) / prompts).backward()
    assert gates.grad is not None
    return HeadScores(
        values=-gates.grad if signed else gates.grad.abs(),
        kind="kv",
        method="duo-instant",
        data=f"{prompts} {'passkeys in' if target == 'passkey' else 'texts of'} {length} tokens",
        fingerprint=fingerprint(model),
        meta={"target": target, "alpha": alpha, "signed": signed, "sinks": sinks, "window": window, "seed": seed},
    )


@register("score", "stream-difference", paper="09")
def stream_difference(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    *,
    texts: int = 2,
    length: int = 1024,
    sinks: int = 16,
    window: int = 128,
    haystack: str | None = None,
    seed: int = 0,
    progress: bool = False,
) -> HeadScores:
    """How far a layer's output moves if one of its kv heads streams: mean over tokens of |W_o (o_full - o_stream)|.

    The change is that of all G query heads of the kv head together, before anything downstream reacts; only tokens from
    sinks + window on, where the two differ, are counted. No gradient is needed. It finds the heads that perplexity needs, and
    misses those that fetch one rare fact: for both, mix it with `duo-instant` by `HeadScores.mean` of `normalized()` tables.

    texts: pieces of text to read.
    length: tokens of a piece; more than sinks + window.
    sinks: first tokens that a streaming head reads.
    window: latest tokens that a streaming head reads.
    haystack: text to read, instead of Python's documentation.

    >>> from headwise.hub import load_model
    >>> model, tokenizer = load_model("tiny-random-llama")
    >>> options = dict(texts=1, length=100, sinks=4, window=32)
    >>> quality = stream_difference(model, tokenizer, **options)
    >>> recall = duo_instant(model, tokenizer, prompts=1, length=300, sinks=4, window=32)
    >>> HeadScores.mean([quality.normalized(), recall.normalized()]).values.shape
    torch.Size([3, 2])
    """
    whole("texts", texts, 1, ScoreError)
    pattern = _window_for(sinks, window, whole("length", length, 1, ScoreError))
    L, K = need_gates(model)
    stack = find_stack(model)
    moved = torch.zeros(L, K, dtype=torch.float64)

    def see(call: HeadCall, out: Tensor) -> None:
        gap = (out - call.attend_pattern(pattern))[:, sinks + window :].float()  # (B, N', H, D)
        W_HDC = head_weights(output_projection(stack, call.layer), stack.heads).float()
        for j, heads in enumerate(torch.arange(stack.heads, device=out.device).chunk(K)):
            change = torch.einsum("bnhd,hdc->bnc", gap[:, :, heads], W_HDC[heads])
            moved[call.layer, j] += change.norm(dim=-1).mean().item()

    generator = torch.Generator().manual_seed(seed)
    source = english() if haystack is None else haystack
    with torch.no_grad(), frozen(model), attach(model, observers=[see]):
        for _ in track(range(texts), "texts", progress):
            ids = draw_tokens(tokenizer, source, length, generator)
            _backbone(model)(input_ids=torch.tensor([ids], device=_device(model)), use_cache=False)
    return HeadScores(
        values=moved / texts,
        kind="kv",
        method="stream-difference",
        data=f"{texts} texts of {length} tokens",
        fingerprint=fingerprint(model),
        meta={"sinks": sinks, "window": window, "seed": seed},
    )


def _far_depths(count: int, pattern: SinkWindow, length: int) -> list[float]:
    """Depths at which the needle stands behind the sinks and before the window of the question."""
    low, high = (pattern.sinks + 16) / length, 1 - (pattern.recent + 48) / length
    return even_depths(count, min(low, 0.5), max(high, min(low, 0.5)))


def _answer_loss(model: nn.Module, prompt: Prompt) -> Tensor:
    """Mean negative log-likelihood of the answer's tokens, in float32."""
    answer = prompt.answer_ids.to(_device(model))
    ids = torch.cat([prompt.ids.to(answer.device), answer[:-1]])[None]
    logits = model(input_ids=ids, use_cache=False, logits_to_keep=len(answer)).logits[0, -len(answer) :]
    return F.cross_entropy(logits.float(), answer)


def _target_losses(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    target: str,
    depths: Sequence[float],
    length: int,
    generator: torch.Generator,
    haystack: str | None,
) -> list[Callable[[int], Tensor]]:
    """One function a prompt, of how many tokens streaming heads read: the loss whose fall is wanted."""
    if target == "passkey":
        made = [make_passkey(tokenizer, length=length, depth=d, generator=generator, haystack=haystack) for d in depths]
        return [partial(_passkey_loss, model, prompt) for prompt in made]
    source = english() if haystack is None else haystack
    texts = [torch.tensor(draw_tokens(tokenizer, source, length, generator)) for _ in depths]
    return [partial(_text_loss, model, ids) for ids in texts]


def _passkey_loss(model: nn.Module, prompt: Prompt, seen: int) -> Tensor:
    return _answer_loss(model, prompt)


def _text_loss(model: nn.Module, ids: Tensor, seen: int) -> Tensor:
    """Mean negative log-likelihood of the tokens of ids (N,) from place `seen` on, where streaming heads no longer read all."""
    ids = ids.to(_device(model))
    keep = len(ids) - seen
    logits = model(input_ids=ids[None], use_cache=False, logits_to_keep=keep + 1).logits[0, :-1].float()
    return F.cross_entropy(logits[-keep:], ids[seen:])


def _lengths(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    spec: PassphraseSpec,
    low: int,
    high: int | None,
) -> list[int]:
    """The lengths to draw from; the shortest is raised in steps until phrases and questions fit."""
    config = getattr(model, "config", None)
    context = getattr(config.get_text_config() if config else None, "max_position_embeddings", None)
    limit = min(context or 32000, int(min(tokenizer.model_max_length, 32000))) // MULTIPLE * MULTIPLE
    high = limit if high is None else whole("max_length", high, 1, ScoreError)
    low = whole("min_length", low, 1, ScoreError)
    if low > high or (context or high) < high:
        raise ScoreError(
            f"min_length={low} and max_length={high}; the first is at most the second, which is at most {limit}"
        )
    needed = _needed(tokenizer, spec)
    if needed > high:
        raise ScoreError(
            f"max_length is {high}; {spec.phrases} pass-phrases of {spec.words} words need about {needed} tokens: "
            "raise it, or lower passphrases= or words="
        )
    return context_lengths(max(low, needed), high, 50)


def _needed(tokenizer: PreTrainedTokenizerBase, spec: PassphraseSpec) -> int:
    """Tokens that phrases and questions take, with room for the spread between draws, rounded up."""
    words = " ".join(NATO[i % len(NATO)] for i in range(spec.words))
    phrase, frame = len(encode(tokenizer, f" {words}")), len(encode(tokenizer, PHRASE_FRAME))
    taken = spec.phrases * (2 * phrase + frame)
    return -(-int(1.1 * taken) // MULTIPLE) * MULTIPLE


def _window_for(sinks: int, window: int, length: int) -> SinkWindow:
    pattern = SinkWindow(sinks, window)
    if length <= sinks + window:
        raise ScoreError(
            f"length is {length}, sinks + window {sinks + window}: within them a streaming head reads all; lengthen the text"
        )
    return pattern


def _on_device(rows: Passphrases, device: torch.device) -> tuple[Tensor, Tensor]:
    return rows.ids.to(device), rows.supervised.to(device)


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def _backbone(model: nn.Module) -> nn.Module:
    return getattr(model, "base_model", model)
