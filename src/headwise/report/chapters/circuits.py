"""Figures behind the claims about heads: circuits of two tasks, letters, retrieval, task embeddings; each measured for the page.

What a function gives are the sections that `headwise reproduce NAME --page` shows behind the checks. One seed and few prompts are enough
to see what the numbers, which come from several seeds, say.

Letters: L layers, H query heads, C options.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from headwise.report import figures
from headwise.report.circuit_figures import scatter, signed_map
from headwise.report.circuit_page import circuit_sections, measure
from headwise.report.figures import COLOURS, Line, bars, head_map
from headwise.report.page import Section, Table
from headwise.score import find_circuit, label_pattern, letter_effects
from headwise.score.ablation_effect import ablation_effect
from headwise.score.retrieval import retrieval
from headwise.steer import causal_effects, fit_tasks
from headwise.steer.function_vector import shuffled_prompts
from headwise.tasks.icl import Template, icl_split
from headwise.units import HeadScores

if TYPE_CHECKING:
    import torch

    from headwise.papers.reproduction import Reproduction
    from headwise.tasks.pairs import PromptPairs

GREY = COLOURS["random"]


def reuse(
    result: Reproduction, model: Any, tokenizer: Any, *, name: str, prefix: str = "", seed: int = 0
) -> list[Section]:
    """Paper 29: the circuits of both tasks on one map each, what the repair does, and the first task's circuit in full."""
    story = measure(model, tokenizer, task="ioi", count=6, seed=seed)
    colors = find_circuit(model, tokenizer, task="colored-objects", count=6, seed=seed)
    both = story.circuit.heads & colors.heads
    rows: list[list[Any]] = [
        [str(unit), "yes" if unit in story.circuit.heads else "", "yes" if unit in colors.heads else ""]
        for unit in story.circuit.heads | colors.heads
    ]
    shared = Section(
        title=f"The heads of two tasks ({name})",
        text=[
            "How far each head moves the logits by itself, on its direct path: indirect objects above, coloured objects below. Framed is "
            f"what the first stage of each search kept. In both circuits, over all stages: {both if len(both) else 'no head'}.",
        ],
        figures=[signed_map(c.stages[0].scores, label="share", kept=c.stages[0].kept) for c in (story.circuit, colors)],
        table=Table(["head", "indirect objects", "coloured objects"], rows),
    )
    return [shared, repair(result, name, prefix), *circuit_sections(story)]


def repair(result: Reproduction, name: str, prefix: str = "") -> Section:
    """Paper 29: colour questions that are right as the model is, repaired, and with random heads."""
    numbers = {key.removeprefix(prefix): value for key, value in result.numbers.items() if key.startswith(prefix)}
    before = numbers["colors_accuracy_of_three"]
    values = [before, numbers["repaired_accuracy_of_three"], before + numbers["repair_gain_random_most"]]
    return Section(
        title=f"Four heads that look elsewhere ({name})",
        text=[
            "Share of colour questions that are right among the three colours, before and after four heads of the first task's circuit "
            "are made to look at the two wrong ones, and at best when four random heads look there."
        ],
        figures=[
            bars(
                ["as it is", "repaired", "random heads, best"],
                values,
                y_title="right, of three",
                colours=[COLOURS["dense"], COLOURS["score"], GREY],
            )
        ],
    )


def letters(result: Reproduction, model: Any, pairs: PromptPairs, *, name: str, prefix: str = "") -> list[Section]:
    """Paper 19: direct against total effect of every head, what the letter heads look at, and choices by number of dimensions."""
    effects, pattern = letter_effects(model, pairs), label_pattern(model, pairs)
    direct, total = (
        HeadScores(values=t.double().mean(-1).float(), method="x") for t in (effects.direct, effects.total)
    )
    heads, nodes = pattern.of_kind("correct-letter"), effects.output_nodes()
    shown = heads if len(heads) else direct.top(1)
    best = max(shown, key=lambda unit: direct[unit])
    rows: list[list[Any]] = [[str(u), v, total[u], u in heads, u in nodes] for u, v in direct.ranking()[:40]]
    written = Section(
        title=f"Who writes the label ({name})",
        text=[
            "Logits of the right label over its twin's that are lost when a head's last output comes from the twin: on its direct path "
            f"alone, and with all that follows live. Framed: the {len(nodes)} heads that hold 80 % of the direct effect.",
        ],
        figures=[
            signed_map(direct, label="direct", kept=nodes),
            scatter(direct, total, x_title="direct effect (logits)", y_title="total effect (logits)", kept=nodes),
        ],
        table=Table(["head", "direct", "total", "correct-letter head", "output node"], rows),
    )
    mass = pattern.mass[best.layer, best.index]
    look = Section(
        title=f"What it looks at ({name})",
        text=[
            f"Attention of {best} from the last token to the labels: one line of cells a right option. "
            f"{len(heads)} heads are correct-letter heads by the default thresholds{': ' + str(heads) if len(heads) else ''}.",
        ],
        figures=[label_map(mass)],
    )
    return [written, look, _dimensions(result, name, prefix)]


def label_map(mass: torch.Tensor) -> Any:
    """Attention (C, C) from the last token: right option by label."""
    figure = head_map(mass.T, unit="right option", label="attention")
    figure.update_xaxes(title="label", dtick=1)
    figure.data[0].update(zmin=0.0, zmax=1.0, hovertemplate="option %{y} is right, label %{x}: %{z:.3f}<extra></extra>")
    return figure


def _dimensions(result: Reproduction, name: str, prefix: str) -> Section:
    numbers, ranks = result.numbers, (0, 1, 3, 8, 16)
    kept = [numbers[f"{prefix}accuracy_rank_{r}"] for r in ranks]
    line = {"x": ranks, "colour": COLOURS["score"]}
    whole = Line("all dimensions", ranks, [numbers[f"{prefix}accuracy_letters"]] * len(ranks), colour=COLOURS["dense"])
    random = Line("random axes", [3], [numbers[f"{prefix}accuracy_rank_3_random"]], colour=GREY)
    return Section(
        title=f"How many dimensions are enough ({name})",
        text=[
            "Right answers with so many dimensions of the letter heads' queries and keys left; axes come from other prompts."
        ],
        figures=[
            figures.lines({"right": [Line("class axes", y=kept, **line), whole, random]}, x_title="dimensions")  # type: ignore[arg-type]
        ],
    )


def copying(
    model: Any, tokenizer: Any, *, prompts: Sequence[Any], success: Any = "exact", seed: int = 0
) -> list[Section]:
    """Paper 13: retrieval scores as a map, and against what taking single heads out costs where random tokens repeat."""
    scores: HeadScores = retrieval(model, tokenizer, prompts=prompts, success=success)
    cost = ablation_effect(model, tokenizer, count=3, seed=seed)
    top = scores.at_least(0.1)
    rows: list[list[Any]] = [[str(unit), value, cost[unit]] for unit, value in scores.ranking()[:40]]
    return [
        Section(
            title="Few heads copy",
            text=[
                f"Share of the answer's tokens that a head looked at when the model wrote them. {len(top)} heads reach 0.1."
            ],
            figures=[head_map(scores.values, label="score")],
            table=Table(["head", "retrieval score", "logits lost without it"], rows),
        ),
        Section(
            title="Does the score say what is causal?",
            text=[
                "Against the logits that are lost when the head alone gives zeros, where a series of random tokens repeats. Taken out "
                "one by one, heads can stand in for each other: the claim takes several out together.",
            ],
            figures=[
                scatter(scores, cost, x_title="retrieval score", y_title="logits lost without the head", kept=top)
            ],
        ),
    ]


def injection(
    result: Reproduction, model: Any, tokenizer: Any, *, tasks: Sequence[str], steps: int = 30, seed: int = 0
) -> list[Section]:
    """Paper 27: exact answers by method; the learned shares as a map, and against the causal effect of each head's vector."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    splits = {task: icl_split(task, generator=generator) for task in tasks}
    found = fit_tasks(
        model, tokenizer, {t: s.train for t, s in splits.items()}, validation={t: s.validation for t, s in splits.items()},
        prompts=4, steps=steps, validate=steps, validation_items=4, seed=seed,
    )  # fmt: skip
    share = HeadScores.mean([found[task].scores() for task in tasks])
    items = [shuffled_prompts(tokenizer, splits[t].train, 1, 10, Template(), generator)[0] for t in tasks]
    causal = causal_effects(model, items, torch.stack([found[t].vectors for t in tasks]))
    kept = causal.top(10)
    rows: list[list[Any]] = [[str(unit), value, causal[unit]] for unit, value in share.ranking()[:40]]
    return [
        _answered(result),
        Section(
            title="Which heads take the task",
            text=[
                f"Learned shares, {steps} steps, means over {', '.join(tasks)}: 1, the head says what it says behind ten examples; "
                "0, what it says without any. Beside that, what one head's vector does to the answer alone, in prompts with shuffled "
                "answers; blue are the ten of most effect, which make up the function vector. A share is no measure of effect: a head "
                "may take its vector because that does no harm.",
            ],
            figures=[
                head_map(share.values, label="share"),
                scatter(share, causal, x_title="share", y_title="gain of p(answer)", kept=kept),
            ],
            table=Table(["head", "share", "causal effect"], rows),
        ),
    ]


def _answered(result: Reproduction) -> Section:
    names = {"exact_soft": "soft injection", "exact_ten_shot": "ten examples", "exact_zero_shot": "no examples"}
    others = [name for name in result.baselines if name.startswith("exact_") and name not in names]
    names |= {name: name.removeprefix("exact_").replace("_", " ") for name in others}
    colours = {"exact_soft": COLOURS["score"], "exact_ten_shot": COLOURS["dense"]}
    figure = bars(
        list(names.values()),
        [result.numbers[n] for n in names],
        y_title="exact",
        colours=[colours.get(n, GREY) for n in names],
    )
    figure.update_layout(height=380)
    return Section(
        title="Answers without examples", text=["Share of held-out questions answered exactly."], figures=[figure]
    )
