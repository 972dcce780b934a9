"""`headwise select-data`: rank the documents of a corpus by how much they need retrieval heads, and keep the best."""

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from headwise.cli import common

Inputs = Annotated[list[Path], typer.Argument(help="Files of documents: .jsonl, .jsonl.gz, .parquet (needs pyarrow).")]
Output = Annotated[Path, typer.Option("--output", "-o", help="Write the selected documents here, same formats.")]
Heads = Annotated[
    str | None,
    typer.Option("--heads", help="Important heads: L18H6,… or a set or score file. Default: the proxy task."),
]


def select_data(
    inputs: Inputs,
    output: Output,
    model: common.Model = "smollm2",
    heads: Heads = None,
    top: Annotated[float, typer.Option("--top", help="Share of heads that are important.")] = 0.05,
    keep: Annotated[float, typer.Option("--keep", help="Share of each domain's tokens to keep.")] = 0.2,
    text_field: Annotated[str, typer.Option("--text-field", help="Field of the text.")] = "text",
    domain_field: Annotated[
        str | None, typer.Option("--domain-field", help="Field of the domain that documents are ranked within.")
    ] = None,
    mode: Annotated[
        Literal["uniform", "zero", "mean"], typer.Option("--mode", help="How heads are weakened.")
    ] = "uniform",
    random_sets: Annotated[int, typer.Option("--random-sets", min=0, help="Random sets of heads to score beside.")] = 0,
    context: Annotated[
        int | None, typer.Option("--context", help="Tokens of a chunk; longer documents are cut.")
    ] = None,
    min_tokens: Annotated[int, typer.Option("--min-tokens", help="Shorter documents get no score.")] = 64,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Chunks in one forward.")] = 4,
    scores: Annotated[
        Path | None, typer.Option("--scores", help="Folder of the scores. Default: OUTPUT.scores")
    ] = None,
    processes: Annotated[
        int, typer.Option("--processes", min=1, help="Processes, one a GPU where there are GPUs.")
    ] = 1,
    shard: Annotated[
        str | None,
        typer.Option("--shard", help="i/n: score only part i of n here, 0/n to (n-1)/n; the last one selects."),
    ] = None,
    seed: common.Seed = 0,
    dtype: common.Dtype = None,
    device: common.Device = None,
    progress: common.Progress = None,
    json: common.Json = False,
) -> None:
    """Select training data by AttentionInfluence: keep the documents that suffer most when retrieval heads are weakened.

    A run that broke off goes on where it stopped.

    Example: headwise select-data corpus.jsonl --domain-field source --keep 0.2 -o selected.jsonl
    """
    from headwise.errors import ScoreError
    from headwise.score import _corpus, _select_job

    if not 0 < keep <= 1:
        raise ScoreError(f"--keep {keep}; a share of the tokens, in (0, 1]")
    _corpus.kind(output)
    number, shards = _shard(shard, processes)
    folder = scores or output.with_name(output.name + ".scores")
    fields = _corpus.Fields(text_field, domain_field)
    shown = common.show_progress(progress, json)
    options = {"mode": mode, "context": context, "min_tokens": min_tokens}
    how = {"model": model, "dtype": dtype, "top": top, "random_sets": random_sets, "seed": seed}
    job = _select_job.SelectJob(tuple(inputs), folder, fields, shards, {**how, **options, "heads": _named(heads)})
    how, options = {**how, "device": device}, {**options, "batch_size": batch_size}
    here = number is not None or processes == 1
    todo = job.missing() if number is None else [number]
    chosen = _score(job, todo, how, heads, options, 1 if here else processes, shown) if todo else None
    _finish(job, output, keep, chosen, json)


def _score(
    job: Any,
    todo: list[int],
    how: dict[str, Any],
    heads: str | None,
    options: dict[str, Any],
    processes: int,
    shown: bool,
) -> list[Any]:
    """Score the shards, in this process or in several; gives the sets of heads."""
    from headwise.score import _select_job

    loaded = common.load(how["model"], how["dtype"], how["device"])
    chosen = _sets(*loaded, heads, how["top"], how["random_sets"], how["seed"], shown)
    texts = [str(one) for one in chosen]
    if processes == 1:
        scorer = _scorer(*loaded, texts, options)
        for shard in todo:
            job.score(scorer, shard, progress=shown)
    else:
        del loaded
        _select_job.share_out(job, _in_process, (how, texts, options), processes)
    return chosen


def _named(heads: str | None) -> str | None:
    """The heads as asked for; a file by its content."""
    from headwise import storage

    return storage.digest(heads) if heads is not None and Path(heads).is_file() else heads


def _shard(text: str | None, processes: int) -> tuple[int | None, int]:
    """(the one shard to score here or None for all, number of shards)."""
    import re

    from headwise.errors import ScoreError

    if text is None:
        return None, processes
    found = re.fullmatch(r"(\d+)/(\d+)", text)
    if not found or int(found[1]) >= int(found[2]):
        raise ScoreError(f"--shard {text!r}; write i/n with i from 0 to n - 1, such as 0/4")
    if processes > 1:
        raise ScoreError("--shard scores one part in this process; leave --processes out")
    return int(found[1]), int(found[2])


def _sets(
    model: Any, tokenizer: Any, heads: str | None, top: float, draws: int, seed: int, progress: bool
) -> list[Any]:
    """The important heads, then random sets that hold none of them."""
    import torch

    from headwise import registry, storage
    from headwise.addresses import draw
    from headwise.score import important_heads
    from headwise.units import HeadScores, HeadSet

    if heads is None:
        method = registry.get("score", "attention-influence")
        found = important_heads(method(model, tokenizer, seed=seed, progress=progress), top)
    elif Path(heads).is_file():
        scores = storage.holds_kind(heads, "head-scores")
        found = important_heads(HeadScores.load(heads), top) if scores else HeadSet.load(heads)
    else:
        found = HeadSet.parse(heads)
    if not draws:
        return [found]
    from headwise.attach import fingerprint

    made_for = fingerprint(model)
    pool = found.complement(made_for.layers, made_for.heads)
    generator = torch.Generator().manual_seed(seed)
    return [found, *(draw(pool, len(found), generator) for _ in range(draws))]


def _scorer(model: Any, tokenizer: Any, sets: list[str], options: dict[str, Any]) -> Any:
    from headwise.score import InfluenceScorer
    from headwise.units import HeadSet

    first, *controls = (HeadSet.parse(text) for text in sets)
    return InfluenceScorer(model, tokenizer, first, controls=controls, **options)


def _in_process(how: dict[str, Any], sets: list[str], options: dict[str, Any], process: int, processes: int) -> Any:
    """The scorer of one process: a GPU of its own where there are several, its share of the threads elsewhere."""
    import torch

    device = how["device"]
    if device in (None, "cuda") and torch.cuda.device_count() > 1:
        device = f"cuda:{process % torch.cuda.device_count()}"
    torch.set_num_threads(max(1, torch.get_num_threads() // processes))
    return _scorer(*common.load(how["model"], how["dtype"], device), sets, options)


def _finish(job: Any, output: Path, keep: float, sets: list[Any] | None, json: bool) -> None:
    """Select once every shard is there, and say what was kept."""
    missing = job.missing()
    data: dict[str, Any] = {"heads": sets and str(sets[0]), "scores": job.scores, "missing_shards": missing}
    if missing:
        common.say(data, json, f"scored; shards {missing} of {job.shards} are still to come")
        return
    selection = job.select(output, keep)
    data |= {"file": output, "kept": len(selection.keep), "domains": selection.to_dict()}
    lines = [f"{'domain':<20}{'documents':>10}{'kept':>7}{'tokens':>10}{'kept':>9}{'threshold':>11}{'undefined':>10}"]
    for name, d in selection.domains.items():
        lines.append(
            f"{name or 'all':<20}{d.documents:>10}{d.kept_documents:>7}{d.tokens:>10}{d.kept_tokens:>9}"
            f"{d.threshold:>11.4f}{d.undefined:>10}"
        )
    common.say(data, json, "\n".join([*lines, f"written: {output}"]))
