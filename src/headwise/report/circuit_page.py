"""One page about the circuit of a task: what every part writes, what patching moves, the graph of heads, and whether scores are causal.

`headwise circuit --model smollm2 --task ioi -o circuit.html` writes it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from headwise.errors import UnitError
from headwise.papers.reproduction import environment
from headwise.report.circuit_figures import attribution_bars, circuit_graph, scatter, signed_map
from headwise.report.page import Card, Section, Table, render
from headwise.score import attribute, circuit_edges, find_circuit
from headwise.score.activation_patching import activation_patching
from headwise.score.attribution_patching import attribution_patching
from headwise.score.logit_attribution import logit_attribution

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from headwise.score import Attribution, Circuit, Edge
    from headwise.tasks.pairs import PromptPairs
    from headwise.units import HeadScores

TITLE = "The circuit of a task, head by head"
LEAD = "Two prompts that differ in little are answered differently: which heads carry the difference, and over which paths."


@dataclass(frozen=True, eq=False)
class CircuitStory:
    """What the page shows: the split of the logit difference, effects of single heads (and experts), the circuit and its edges."""

    parts: Attribution
    patched: HeadScores
    estimate: HeadScores
    written: HeadScores
    circuit: Circuit
    edges: tuple[Edge, ...]
    experts: HeadScores | None
    data: str

    def to_dict(self) -> dict[str, Any]:
        """Every number of the page by name."""
        edges = [[str(e.sender), str(e.receiver or "logits"), e.through, e.share] for e in self.edges]
        tables = {s.method: s.values.tolist() for s in (self.written, self.patched, self.estimate)}
        if self.experts is not None:
            tables["activation-patching of experts"] = self.experts.values.tolist()
        stages = [[s.through, str(s.receivers or "logits"), str(s.kept)] for s in self.circuit.stages]
        return {"data": self.data, "stages": stages, "edges": edges, "scores": tables, "parts": self.parts.parts()}


def measure(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    pairs: PromptPairs | None = None,
    task: str = "induction",
    count: int = 12,
    through: str = "q",
    share: float = 0.02,
    freeze_mlps: bool = False,
    rows: int = 64,
    seed: int = 0,
    stage: Callable[[str], Any] = contextlib.nullcontext,
) -> CircuitStory:
    """Measure what the page shows; options and errors are those of `score.circuit`. `stage(title)` is a context of each part.

    >>> from headwise.hub import load_model
    >>> story = measure(*load_model("tiny-random-llama"), count=4, share=0.1)
    >>> len(story.edges) >= len(story.circuit.stages[0].kept)
    True
    """
    given: dict[str, Any] = {"pairs": pairs, "task": task, "count": count, "seed": seed}
    swept = {**given, "rows": rows}
    with stage("splitting the logit difference"):
        parts = attribute(model, tokenizer, **given)
        written = logit_attribution(model, tokenizer, **given)
    with stage("patching every head"):
        patched = activation_patching(model, tokenizer, **swept)
        estimate = attribution_patching(model, tokenizer, **given)
    experts = None
    if patched.fingerprint is not None and patched.fingerprint.experts:
        with stage("patching every expert"):
            experts = activation_patching(model, tokenizer, unit="expert", **swept)
    with stage("following paths"):
        circuit = find_circuit(model, tokenizer, through=through, share=share, freeze_mlps=freeze_mlps, **swept)
    with stage("weighing edges"):
        edges = circuit_edges(model, tokenizer, circuit, freeze_mlps=freeze_mlps, **swept)
    return CircuitStory(parts, patched, estimate, written, circuit, edges, experts, patched.data)


def circuit_page(story: CircuitStory, *, model: str = "", command: str = "", seconds: float | None = None) -> str:
    """The page as HTML. Raises TaskError where plotly is missing.

    >>> from headwise.hub import load_model
    >>> text = circuit_page(measure(*load_model("tiny-random-gpt2"), count=4, share=0.1))
    >>> "</html>" in text
    True
    """
    top = story.patched.ranking()[0]
    first, kept = story.circuit.stages[0], story.circuit.heads
    strongest = story.edges[0]
    cards = [
        Card(str(top[0]), f"carries the most of the answer: {top[1]:.0%} of the difference between prompt and twin"),
        Card(f"{len(kept)} of {len(first.scores)}", f"heads in a circuit of {len(story.circuit.stages)} stages"),
        Card(f"{strongest.share:+.0%}", f"the strongest path: {str(strongest).rpartition(':')[0].replace('->', 'to')}"),
    ]
    sections = [*circuit_sections(story, command=command)]
    facts = [("model", model), ("data", story.data), *environment().items()]
    if seconds is not None:
        facts.append(("took", f"{seconds:.0f} s"))
    return render(TITLE, LEAD, cards=cards, sections=sections, facts=[(k, str(v)) for k, v in facts if v])


def circuit_sections(story: CircuitStory, *, command: str = "") -> list[Section]:
    """The sections, also as chapters of another page."""
    made = [_written(story), _patched(story), _graph(story), _causal(story)]
    if story.experts is not None:
        made.insert(2, _experts(story.experts))
    last = made[-1]
    made[-1] = Section(last.title, last.text, last.figures, last.table, command or last.command)
    return made


def _written(story: CircuitStory) -> Section:
    parts = story.parts
    rows = sorted(parts.parts().items(), key=lambda item: -abs(item[1]))
    return Section(
        title="What each part writes into the answer",
        text=[
            "The last token's residual stream is a sum, and once the final norm's scale is known the logit of the answer minus that of its "
            "contrast is a sum too: every head, every MLP and the embedding has its share. Hatched bars are whole layers' MLPs, "
            "biases and the embedding.",
            f"The parts add up to the model's own difference of {float(parts.model.mean()):+.2f} logits within {parts.error:.1e}.",
        ],
        figures=[attribution_bars(parts)],
        table=Table(["part", "logits"], [list(row) for row in rows[:60]]),
    )


def _patched(story: CircuitStory) -> Section:
    first, kept = story.circuit.stages[0], story.circuit.heads
    figures = [signed_map(story.patched, label="total", kept=kept)]
    figures += [signed_map(s.scores, label=s.through, kept=s.kept) for s in story.circuit.stages]
    to = (
        "straight to the logits" if s.receivers is None else f"to {s.through} of {s.receivers}"
        for s in story.circuit.stages
    )
    names = ", then ".join(to)
    return Section(
        title="What the answer loses when one head listens to the other prompt",
        text=[
            "Each head in turn gives what it gave on the twin prompt. 1: the model answers as on the twin; below 0: the head spoke "
            "against the answer. First with all that follows live, framed are the heads of the circuit below.",
            f"Then on direct paths alone: {names}. Framed is what each stage kept.",
        ],
        figures=figures,
        table=Table(
            ["head", "total", "straight to the logits", "first-order estimate"],
            [[str(u), v, first.scores[str(u)], story.estimate[str(u)]] for u, v in story.patched.ranking()[:40]],
        ),
    )


def _experts(scores: HeadScores) -> Section:
    top = scores.ranking()[0]
    return Section(
        title="Experts, one by one",
        text=[
            "The same with what single experts add to their layer, weight included; an expert that a token did not choose adds nothing. "
            f"{top[0]} carries the most: {top[1]:.0%}.",
        ],
        figures=[signed_map(scores, label="total")],
        table=Table(["expert", "share"], [[str(u), v] for u, v in scores.ranking()[:40]]),
    )


def _graph(story: CircuitStory) -> Section:
    rows: list[list[Any]] = [[str(e.sender), str(e.receiver or "logits"), e.through, e.share] for e in story.edges]
    return Section(
        title="The circuit",
        text=[
            "Heads by layer, those nearest to the answer at the bottom. An edge is as wide as the share of the answer that one head "
            "carries to the next one's query, key or value, or to the logits, and to nothing else; each is measured alone.",
        ],
        figures=[circuit_graph(story.circuit, story.edges)],
        table=Table(["from", "to", "through", "share"], rows),
    )


def _causal(story: CircuitStory) -> Section:
    kept = story.circuit.heads
    pairs = {"what a head writes (logits)": story.written, "first-order estimate": story.estimate}
    return Section(
        title="Do scores say what is causal?",
        text=[
            "Two cheap scores against the effect of patching, a point a head: logit attribution looks at one forward pass, attribution "
            "patching at one backward pass.",
            *(
                f"Pearson correlation with the {name}: {_correlation(scores, story.patched)}."
                for name, scores in pairs.items()
            ),
        ],
        figures=[
            scatter(scores, story.patched, x_title=name, y_title="effect of patching", kept=kept)
            for name, scores in pairs.items()
        ],
    )


def _correlation(one: HeadScores, other: HeadScores) -> str:
    try:
        return f"{one.correlation(other):.2f}"
    except UnitError:
        return "none, one of them is constant"


@contextlib.contextmanager
def told(title: str) -> Iterator[None]:
    """A line that spins while a part is measured."""
    from rich import get_console

    with get_console().status(f"{title} …"):
        yield
