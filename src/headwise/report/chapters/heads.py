"""Which heads retrieve, and the proof that they are the cause."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from headwise.report import figures
from headwise.report.figures import COLOURS, Line
from headwise.report.page import Card, Section, Table
from headwise.score import retrieval_check
from headwise.score.retrieval import retrieval
from headwise.tasks import wilson

if TYPE_CHECKING:
    from headwise.report.demo import Story
    from headwise.score import CheckRow, RetrievalCheck


def scores(story: Story) -> Section:
    """Which heads copy the needle."""
    s = story.settings
    found = retrieval(story.model, story.tokenizer, tests=s.score_tests, length=s.length, seed=s.seed)
    found.save(story.folder / "scores.safetensors")
    story.artifacts["scores"] = found
    values = found.values
    strong, zero = int((values >= 0.1).sum()), float((values == 0).float().mean())
    top = found.ranking()[:12]
    story.findings["scores"] = {
        "at_least_0.1": strong, "share_zero": zero, "top": {str(u): v for u, v in top}, "data": found.data,
    }  # fmt: skip
    story.cards.append(Card(f"{strong} of {values.numel()}", "heads copy what is retrieved (score at least 0.1)"))
    return Section(
        title="A few heads retrieve, most never do",
        text=[
            f"A five-digit key is hidden in {s.length} tokens of English and asked for at the end. Whenever the model "
            "writes a digit, each head is asked where it looks most: a head scores when that is the very digit in the text.",
            f"{strong} of {values.numel()} heads score 0.1 or more; {zero:.0%} score exactly 0. The strongest is {top[0][0]} "
            f"with {top[0][1]:.2f}.",
        ],
        figures=[figures.head_map(values, label="score")],
        table=Table(["head", "score"], [[str(u), v] for u, v in top]),
        command=f"headwise score retrieval --model {story.name} --tests {s.score_tests} --length {s.length} -o scores.safetensors",
    )


def ablation(story: Story) -> Section:
    """Take the best heads out, and as many random others."""
    s, ranking = story.settings, story.artifacts["scores"]
    top = s.out
    check = retrieval_check(
        story.model,
        story.tokenizer,
        ranking,
        top=top,
        random_sets=s.random_draws,
        tests=s.prompts,
        length=s.length,
        text_tokens=s.perplexity_tokens,
        seed=s.seed + 1,
    )
    story.findings["ablation"] = check.to_dict()
    three, random = check.top(3), check.random(3)
    lost, kept = three.result.mean, sum(r.result.mean for r in random) / len(random)
    story.cards.append(
        Card(
            f"{check.intact.result.mean:.0%} → {lost:.0%}",
            f"recall without the 3 best heads; without 3 random ones {kept:.0%}",
        )
    )
    return Section(
        title="Take three heads out and the model cannot find the key" if lost < 0.5 <= kept else "Taking heads out",
        text=[
            f"Each point is {check.prompts} fresh prompts of {s.length} tokens with heads zeroed before the output projection: "
            f"blue takes out the best ones, grey as many others, drawn {s.random_draws} times from outside the best {len(check.barred)}.",
            f"Without the 3 best heads recall falls from {check.intact.result.mean:.0%} to {lost:.0%} while perplexity goes from "
            f"{check.intact.perplexity:.1f} to {three.perplexity:.1f}: the model still writes English, it just cannot look things up.",
        ],
        figures=[_figure(check, top)],
        table=Table(
            ["heads out", "which", "exact", "95 % interval", "digits", "perplexity"],
            [_row(row) for row in check.rows],
        ),
        command=f"headwise edit zero --units {three.heads} -o edits.json\n"
        f"headwise eval --model {story.name} --edits edits.json --task passkey,perplexity --length {s.length}",
    )


def _row(row: CheckRow) -> list[Any]:
    low, high = row.result.interval
    return [row.k, row.kind, row.result.mean, f"{low:.2f} – {high:.2f}", row.result.tokens, row.perplexity]


def _figure(check: RetrievalCheck, top: Sequence[int]) -> Any:
    sizes = [0, *top]
    best = [[check.intact], *([check.top(k)] for k in top)]
    random = [[check.intact], *(list(check.random(k)) for k in top)]
    pairs = ((best, "best heads out", "score"), (random, "random heads out", "random"))
    return figures.lines(
        {
            "prompts answered": [_recall(sizes, rows, name, COLOURS[c]) for rows, name, c in pairs],
            "perplexity": [
                Line(name, sizes, [_mean(row.perplexity for row in r) for r in rows], colour=COLOURS[c])
                for rows, name, c in pairs
            ],
        },
        x_title="heads taken out",
    )


def _recall(sizes: Sequence[int], rows: Sequence[Sequence[CheckRow]], name: str, colour: str) -> Line:
    """Pooled over the draws, with Wilson's interval."""
    hits = [sum(sum(row.result.exact) for row in r) for r in rows]
    trials = [sum(len(row.result.exact) for row in r) for r in rows]
    bounds = [wilson(h, n) for h, n in zip(hits, trials, strict=True)]
    y = [h / n for h, n in zip(hits, trials, strict=True)]
    return Line(name, sizes, y, [low for low, _ in bounds], [high for _, high in bounds], colour=colour)


def _mean(values: Any) -> float:
    found = [float(v) for v in values]
    return sum(found) / len(found)
