"""Convert a model to mixture-of-head attention (Jin et al., arXiv 2410.11842): each token runs some of the heads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from headwise.attach import find_stack
from headwise.errors import RouteError
from headwise.registry import register
from headwise.route._config import Kind
from headwise.route._convert import Choice, kept_heads, unfitted_router
from headwise.route._fit_steps import FitRecipe, best_options, fit_router
from headwise.route._presets import MoHPreset, moh_preset
from headwise.route._router import HeadRouter
from headwise.units import HeadScores, HeadSet

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@register("route", "moh", paper="01")
def moh(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    active: float = 0.75,
    router: Literal["norm", "fitted", "trained", "static"] | None = None,
    shared: Literal["first", "importance", "none"] | None = None,
    shared_count: int | None = None,
    shared_heads: HeadSet | None = None,
    importance: HeadScores | None = None,
    rounding: Literal["half-up", "floor", "ceil"] = "half-up",
    dense_layers: int = 0,
    active_heads: Sequence[int] | None = None,
    preset: str | MoHPreset | None = None,
    scope: Literal["layer", "global"] = "layer",
    gate_norm: Literal["official", "paper"] = "official",
    ste_scope: Literal["selected", "all", "none"] = "selected",
    beta: float = 0.01,
    fit_tokens: int = 12288,
    fit_text: Literal["english", "mixed"] = "mixed",
    fit_rounds: int = 1,
    target: Literal["norm", "importance"] | None = None,
    features: Literal["hidden", "queries"] | None = None,
    absent: Literal["zero", "mean", "rest"] | None = None,
    allocate: Literal["uniform", "sensitivity"] | None = None,
    stack: str | None = None,
    seed: int = 0,
    progress: bool = False,
) -> HeadRouter:
    """Mixture-of-head attention: each token runs the shared heads and those of the others that its router chooses.

    The attention output sum_h O_h W_O^h becomes sum_h g_h O_h W_O^h with gates g that are 0 for heads a token leaves out.
    Works on decoders, encoders and vision transformers that `attach` reaches. Keys and values are untouched: the KV cache does not shrink.

    active: share of the heads that run for each token; `str(router)` and its meta say how many that really are.
    router: norm (norm of the query, no parameters: the paper's conversion), fitted (ridge regression to what each head
      contributes; best without training), trained (the paper's router, random before training), static (the same heads for all tokens).
      Default: the preset's kind; fitted for a causal model with a tokenizer, where nothing is said of shared heads or
      importance; else norm.
    shared: which heads always run: first, importance (the best by importance) or none. Default: importance if given, else
      first; none for the fitted router.
    shared_count: how many; by default half of the heads.
    shared_heads: the shared heads by address, instead of shared and shared_count.
    importance: scores of the heads, e.g. of `headwise score taylor`.
    rounding: of active times heads.
    dense_layers: so many layers at the bottom keep all heads; most of the damage is done there.
    preset: a published configuration by name, such as dit-b/2-75, or a `MoHPreset`, instead of a share: its shared and
      chosen heads, layer by layer. The model must have its layers and heads; `MoHPreset.scaled` fits one to others.
    scope: whether a static router ranks heads within each layer or over the whole model.
    gate_norm: scale of trained gates: official (mean 1) or paper (sum at most 1).
    ste_scope: heads whose 0/1 gates receive a straight-through gradient.
    beta: weight of the load-balance loss in training.
    fit_tokens: tokens of packaged text that a fitted router reads.
    fit_text: english, or mixed: English and source code in turn.
    fit_rounds: 2 fits a second time on the model under the first router, which costs the same time again.
    target: what a fitted router predicts of a head: importance, the size of the first-order loss change (default for a causal
      language model), or norm of its output.
    features: what a fitted router reads of a token: queries, how its queries meet its own key and a first key besides its hidden
      state (default where the layer hands over such keys), or hidden, the hidden state alone.
    absent: what a head gives that does not run, with a fitted router: rest, its mean output over those tokens that do without
      it (default), mean, its mean output on the text of the fit, or zero.
    allocate: heads per layer of a fitted router: sensitivity, by what leaving them out costs in each layer, so that the share is met
      to one head of the whole model (default for a causal language model, where nothing is said of layers or shared heads), or uniform.
    `active_heads`: number of heads that run in each layer, instead of one share for all.

    Raises RouteError for counts that do not add up, WrongModelError for scores of another model.

    >>> from headwise.attach import attach
    >>> from headwise.hub import load_model
    >>> model, tokenizer = load_model("tiny-random-llama")
    >>> router = moh(model, tokenizer, active=0.75, router="norm")
    >>> print(router, "|", router.config.meta["kept"])
    norm head router: kept 3 of 4 (0.750) in 3 layers, 2 of them shared | 3 of 4 (0.750)
    >>> with attach(model, router=router):
    ...     _ = model.generate(**tokenizer("Hello", return_tensors="pt"), max_new_tokens=2, do_sample=False)
    """
    chosen = moh_preset(preset) if isinstance(preset, str) else preset
    told = any(given is not None for given in (shared, shared_count, shared_heads, importance))
    fits = tokenizer is not None and not told and find_stack(model, stack).causal
    kind: Kind = router or (chosen.kind if chosen else "fitted" if fits else "norm")
    if kind == "fitted" and not chosen and shared is None and shared_heads is None and shared_count is None:
        shared = "none"
    choice = Choice(
        active=active,
        rounding=rounding,
        active_heads=active_heads,
        dense_layers=dense_layers,
        shared=shared,
        shared_count=shared_count,
        shared_heads=shared_heads,
        importance=importance,
        scope=scope,
        preset=chosen,
    )
    options = {"target": target, "features": features, "absent": absent, "allocate": allocate}
    given: dict[str, Any] = {name: value for name, value in options.items() if value is not None}
    if given and kind != "fitted":
        name, value = next(iter(given.items()))
        raise RouteError(f"{name} is {value!r} for a {kind!r} router; only router='fitted' takes it")
    made = unfitted_router(
        model, choice, kind, stack=stack, seed=seed, gate_norm=gate_norm, ste_scope=ste_scope, beta=beta
    )
    if kind != "fitted":
        return made
    free = active_heads is None and not dense_layers and not chosen
    if allocate == "sensitivity" and not free:
        raise RouteError(
            "allocate='sensitivity' sets the heads of each layer: leave active_heads, dense_layers and preset out"
        )
    shares = any(route.shared for route in made.config.layers)
    given = best_options(model, stack, dealt=free and not shares) | given
    recipe = FitRecipe(
        tokens=fit_tokens,
        text=fit_text,
        rounds=fit_rounds,
        total=_total(model, choice, stack) if given["allocate"] == "sensitivity" else None,
        stack=stack,
        seed=seed,
        progress=progress,
        **given,
    )
    return fit_router(made, model, tokenizer, recipe)


def _total(model: Any, choice: Choice, stack: str | None) -> int:
    """Heads of all layers together, dealt out freely: the share asked for is met to one head, not rounded layer by layer."""
    found = find_stack(model, stack)
    return max(found.layers, kept_heads(choice.active, found.layers * found.heads, choice.rounding))
