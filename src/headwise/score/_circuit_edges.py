"""The edges of a circuit: how far each head carries the answer to each later head alone, on the direct path.

Letters: S senders, R receivers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from headwise.errors import ScoreError
from headwise.progress import track
from headwise.score._patching import ROWS, Reduce, Task, column_mask, make_pairs, need_language_model
from headwise.score._path_batch import PathBatch
from headwise.score._receivers import checked_receivers, checked_through
from headwise.units import HeadSet, Unit

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from headwise.score._circuit import Circuit
    from headwise.tasks.pairs import PromptPairs


@dataclass(frozen=True)
class Edge:
    """One direct path: from a head to another one's q, k or v, or (receiver None) to the logits; `share` of the effect it carries."""

    sender: Unit
    receiver: Unit | None
    through: str
    share: float

    def __str__(self) -> str:
        to = "logits" if self.receiver is None else f"{self.receiver}.{self.through}"
        return f"{self.sender} -> {to}: {self.share:+.3f}"


def path_edges(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    senders: HeadSet,
    receivers: HeadSet,
    *,
    pairs: PromptPairs | None = None,
    task: Task = "induction",
    count: int = 16,
    through: str = "q",
    tokens: Any = "last",
    freeze_mlps: bool = False,
    reduce: Reduce = "ratio_of_means",
    rows: int = ROWS,
    seed: int = 0,
    progress: bool = False,
) -> tuple[Edge, ...]:
    """Every edge between two sets of heads whose receiver stands above its sender, strongest first.

    The equation and the options are those of `path_patching`, with one receiver at a time; all receivers of a layer share pass A
    and one attention call. Raises ScoreError for empty sets, UnitError for heads that the model lacks.

    >>> from headwise.hub import load_model
    >>> found = path_edges(*load_model("tiny-random-llama"), HeadSet.parse("L0H1,L1H2"), HeadSet.parse("L1H0,L2H3"), count=4)
    >>> [(str(edge.sender), str(edge.receiver)) for edge in sorted(found, key=str)]
    [('L0H1', 'L1H0'), ('L0H1', 'L2H3'), ('L1H2', 'L2H3')]
    """
    need_language_model(model)
    for name, heads in (("senders", senders), ("receivers", receivers)):
        if not isinstance(heads, HeadSet) or heads.kind != "head":
            raise ScoreError(f"{name}={heads}; edges lead from heads to heads: HeadSet.parse('L9H6,L9H9')")
        checked_receivers(heads, model, name)
    checked_through(through)
    chosen = make_pairs(model, tokenizer, pairs, task, count, seed)
    batch = PathBatch(model, chosen, column_mask(chosen, tokens), freeze_mlps=freeze_mlps, rows=rows)
    below = {l: sorted(heads) for l, heads in sorted(senders.by_layer().items())}
    above = {l: sorted(heads) for l, heads in sorted(receivers.by_layer().items())}
    shares = batch.edges(below, above, through, reduce, lambda layers: track(layers, "paths", progress))
    places = [[Unit("head", l, h) for l, heads in group.items() for h in heads] for group in (below, above)]
    found = [
        Edge(sender, receiver, through, float(shares[s, r]))
        for s, sender in enumerate(places[0])
        for r, receiver in enumerate(places[1])
        if sender.layer < receiver.layer
    ]
    return tuple(sorted(found, key=lambda edge: -abs(edge.share)))


def circuit_edges(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, circuit: Circuit, **options: Any
) -> tuple[Edge, ...]:
    """The edges between the stages of a circuit and from its first stage to the logits, strongest first.

    `options`: those that the circuit was found with (`pairs` or `task`, `count`, `seed`; `freeze_mlps`, `rows`).

    >>> from headwise.hub import load_model
    >>> from headwise.score import find_circuit
    >>> model, tokenizer = load_model("tiny-random-llama")
    >>> found = find_circuit(model, tokenizer, count=4, share=0.1)
    >>> len(circuit_edges(model, tokenizer, found, count=4)) >= 2
    True
    """
    first = circuit.stages[0]
    edges = [Edge(unit, None, "logits", first.scores[str(unit)]) for unit in first.kept]
    for stage in circuit.stages[1:]:
        if stage.receivers is not None:
            edges += path_edges(model, tokenizer, stage.kept, stage.receivers, through=stage.through, **options)
    return tuple(sorted(edges, key=lambda edge: -abs(edge.share)))
