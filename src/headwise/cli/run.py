"""Commands that use what the others made: `models`, `generate`, `eval`, `demo`."""

import time
from pathlib import Path
from typing import Annotated, Any

import typer

from headwise.cli import common

TASKS = ("passkey", "needle", "multi-key", "multi-value", "variable-tracking", "perplexity", "summary")


def models(json: common.Json = False) -> None:
    """List the models that come bundled and load without a network.

    Example: headwise models
    """
    from rich.table import Table

    from headwise.hub import available_models

    table = Table("name", "what it is", box=None)
    for name, line in available_models():
        table.add_row(name, line)
    common.say({"models": dict(available_models())}, json, table)


def generate(
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="The text to continue; '-' reads standard input.")],
    model: common.Model = "smollm2",
    plan: common.PlanFile = None,
    edits: common.EditsFile = None,
    router: common.RouterFolder = None,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", "-n", min=1, help="At most so many tokens.")] = 64,
    chat: Annotated[bool, typer.Option("--chat/--plain", help="Wrap the prompt in the model's chat template.")] = False,
    temperature: Annotated[float, typer.Option("--temperature", min=0, help="0 is greedy.")] = 0.0,
    seed: common.Seed = 0,
    dtype: common.Dtype = None,
    device: common.Device = None,
    json: common.Json = False,
) -> None:
    """Generate text, under a KV plan, edits of heads or a router of heads.

    Example: headwise generate --plan plan.json --prompt "The capital of France is"
    """
    import torch

    from headwise.arguments import cache_of

    if prompt == "-":
        prompt = typer.get_text_stream("stdin").read()
    loaded, tokenizer = common.load(model, dtype, device)
    inputs = _encode(common.tokenizer_of(model, tokenizer), prompt, chat).to(loaded.device)
    _fits(loaded, inputs["input_ids"].shape[1] + max_new_tokens)
    sampling: dict[str, Any] = {"do_sample": temperature > 0}
    if temperature > 0:
        sampling["temperature"] = temperature
    with common.attached(loaded, plan, edits, router), torch.no_grad():
        torch.manual_seed(seed)
        start = time.perf_counter()
        out = loaded.generate(**inputs, max_new_tokens=max_new_tokens, return_dict_in_generate=True, **sampling)
        seconds = time.perf_counter() - start
    new = out.sequences[0, inputs["input_ids"].shape[1] :]
    text = tokenizer.decode(new, skip_special_tokens=True)
    data = {
        "prompt": prompt,
        "text": text,
        "prompt_tokens": inputs["input_ids"].shape[1],
        "new_tokens": len(new),
        "seconds": round(seconds, 3),
        "cache_bytes": cache_bytes(cache_of(out)),
    }
    common.say(data, json, text)
    if not json:
        summary = f"{len(new)} tokens in {seconds:.1f} s, KV cache {data['cache_bytes'] / 2**20:.2f} MiB"
        typer.secho(summary, err=True, dim=True)


def evaluate(
    model: common.Model = "smollm2",
    plan: common.PlanFile = None,
    edits: common.EditsFile = None,
    router: common.RouterFolder = None,
    task: Annotated[
        str, typer.Option("--task", "-t", help=f"One or more of {', '.join(TASKS)}, split by commas.")
    ] = "passkey",
    length: Annotated[int, typer.Option("--length", help="Tokens of each prompt, and of each window of text.")] = 1024,
    prompts: Annotated[int, typer.Option("--prompts", min=1, help="Prompts of each task but perplexity.")] = 8,
    summary_tokens: Annotated[int, typer.Option("--summary-tokens", min=1, help="Tokens of a summary.")] = 64,
    tokens: Annotated[int, typer.Option("--tokens", min=2, help="Tokens of text for the perplexity.")] = 4096,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Prompts in one forward.")] = 1,
    seed: common.Seed = 0,
    dtype: common.Dtype = None,
    device: common.Device = None,
    progress: common.Progress = None,
    json: common.Json = False,
) -> None:
    """Measure recall, perplexity, and how far summaries agree with those of the untouched model, each with a 95 % interval.

    Under a plan, everything is read through its cache, as `generate` would.

    Example: headwise eval --plan plan.json --task passkey,perplexity,summary
    """
    tasks = _tasks(task)
    loaded, tokenizer = common.load(model, dtype, device)
    tokenizer = common.tokenizer_of(model, tokenizer)
    shown = common.show_progress(progress, json)
    results: dict[str, Any] = {}
    how: dict[str, Any] = {"batch_size": batch_size, "progress": shown, "through": "one-forward"}
    if plan:  # given from outside, as generate gives it: what the model would make inside, LongHeads could not follow
        how |= {"through": "cache", "cache": lambda: _cache_of(loaded)}
    writing = {"new_tokens": summary_tokens, "batch_size": batch_size, "progress": shown}
    summary = _Summary(loaded, tokenizer, prompts, length, seed, writing) if "summary" in tasks else None
    with common.attached(loaded, plan, edits, router):
        for name in tasks:
            if name == "perplexity":
                results[name] = _perplexity(loaded, tokenizer, length, tokens, how)
            elif summary and name == "summary":
                results[name] = summary.agreement()
            else:
                results[name] = _recall(name, loaded, tokenizer, length, prompts, seed, how)
    data = {"model": model, "plan": plan, "edits": edits, "router": router, "length": length}
    data["tasks"] = {name: r if isinstance(r, float) else r.to_dict() for name, r in results.items()}  # type: ignore[assignment]
    if "perplexity" in results:
        data["perplexity_interval"] = results["perplexity"].interval
    common.say(data, json, "\n".join(f"{name:<18}{r}" for name, r in results.items()))


def demo(
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the report.")] = Path("report"),
    quick: Annotated[
        bool, typer.Option("--quick", help="Fewer prompts: a first look in a fraction of the time.")
    ] = False,
    progress: common.Progress = None,
) -> None:
    """The whole story on a real language model: score, ablate, plan, generate, convert. Ends in report.html.

    Example: headwise demo --out report
    """
    from headwise.report.demo import run

    run(out, quick=quick, progress=common.show_progress(progress, as_json=False))
    typer.echo(f"report: {out / 'report.html'}")


def cache_bytes(cache: Any) -> int:
    """Bytes of the tensors that a KV cache holds; 0 where generation ran without one (`use_cache` off in the config)."""
    if cache is None:
        return 0
    if hasattr(cache, "nbytes"):
        return int(cache.nbytes)
    held = [t for layer in cache.layers for t in (getattr(layer, "keys", None), getattr(layer, "values", None))]
    return sum(t.nbytes for t in held if t is not None)


def _fits(model: Any, tokens: int) -> None:
    """Beyond its context a model writes nonsense without a word of warning."""
    from headwise.errors import TaskError

    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if context and tokens > context:
        raise TaskError(f"prompt and new tokens are {tokens} together; this model reads {context}: shorten either")


def _encode(tokenizer: Any, prompt: str, chat: bool) -> Any:
    from headwise.errors import TaskError

    if chat and not tokenizer.chat_template:
        raise TaskError("this model has no chat template; leave --chat out")
    if chat:
        messages = [{"role": "user", "content": prompt}]
        return tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
    inputs = tokenizer(prompt, return_tensors="pt")
    if inputs["input_ids"].shape[1] == 0:
        raise TaskError("the prompt is empty")
    return inputs


def _tasks(text: str) -> list[str]:
    from headwise.errors import TaskError

    names = [name.strip() for name in text.split(",") if name.strip()]
    unknown = [name for name in names if name not in TASKS]
    if unknown or not names:
        raise TaskError(f"no task is called {', '.join(unknown) or repr(text)}; there are {', '.join(TASKS)}")
    return names


def _recall(name: str, model: Any, tokenizer: Any, length: int, count: int, seed: int, how: dict[str, Any]) -> Any:
    import torch

    from headwise.tasks.evaluate import exact_match
    from headwise.tasks.needle import make_needles
    from headwise.tasks.passkey import make_passkeys
    from headwise.tasks.ruler import make_ruler

    generator = torch.Generator().manual_seed(seed)
    make: Any = {"passkey": make_passkeys, "needle": make_needles}.get(name)
    options: dict[str, Any] = {"count": count, "length": length, "generator": generator}
    made = make(tokenizer, **options) if make else make_ruler(tokenizer, name, **options)
    return exact_match(model, made, **how)


def _cache_of(model: Any) -> Any:
    """An empty cache of the kind that `generate` gives this model."""
    from transformers import DynamicCache

    return DynamicCache(config=model.config)


class _Perplexity(float):
    """A perplexity that knows its 95 % interval over the windows of text."""

    interval: tuple[float, float] | None

    def __str__(self) -> str:
        if self.interval is None:
            return f"{float(self):.3f} (one window of text: no interval)"
        return f"{float(self):.3f} (95 % interval {self.interval[0]:.3f} to {self.interval[1]:.3f} over windows)"


def _perplexity(model: Any, tokenizer: Any, window: int, tokens: int, how: dict[str, Any]) -> _Perplexity:
    import math

    from headwise.errors import TaskError
    from headwise.tasks.agreement import bootstrap
    from headwise.tasks.evaluate import window_losses
    from headwise.tasks.texts import encode, english

    ids = encode(tokenizer, english("eval")[: 12 * tokens])  # far more characters than a token has
    if len(ids) < tokens:
        raise TaskError(f"--tokens {tokens}: the packaged text has {len(ids)} tokens")
    losses = window_losses(model, ids, window=window, tokens=tokens, **how)
    found = _Perplexity(math.exp(losses.mean().item()))
    low, high = bootstrap(losses.tolist()) if len(losses) > 1 else (0.0, 0.0)
    found.interval = (math.exp(low), math.exp(high)) if len(losses) > 1 else None
    return found


class _Summary:
    """Summaries by the untouched model, made before anything is attached, and what to compare with them."""

    def __init__(self, model: Any, tokenizer: Any, count: int, length: int, seed: int, writing: dict[str, Any]):
        import torch

        from headwise.tasks.agreement import continuations, make_documents

        generator = torch.Generator().manual_seed(seed)
        self.model, self.writing = model, writing
        _fits(model, length + writing["new_tokens"])
        self.documents = make_documents(tokenizer, count=count, length=length, generator=generator)
        self.reference = continuations(model, self.documents, **writing)

    def agreement(self) -> Any:
        """Of the model as it is now with the model as it was."""
        from headwise.tasks.agreement import Agreement, continuations

        return Agreement.of(self.reference, continuations(self.model, self.documents, **self.writing))
