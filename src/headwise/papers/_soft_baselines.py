"""Function vectors and task vectors of many tasks at once, as baselines of soft injection: one row of a batch a question.

Letters: R cells (task and seed), L layers, H query heads, D head dim, C width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from headwise.steer import ResidualInjection, causal_effects
from headwise.steer._residual import Mode, last_hidden
from headwise.steer.function_vector import shuffled_prompts, summed
from headwise.tasks.icl import Item, Template, draw_few_shot, encode_item
from headwise.tasks.icl_batch import exact_rows, pack, row_losses

if TYPE_CHECKING:
    from headwise.papers.soft_injection import Cell

TOP = 10


def function_vectors(
    model: Any,
    tokenizer: Any,
    cells: Sequence[Cell],
    vectors: Sequence[Tensor],
    *,
    trials: int,
    shots: int,
    seed: int,
    **sizes: int,
) -> dict[str, Tensor]:
    """Ten heads by mean causal effect over tasks, and ten random others; each cell its own sum, all behind the same best layer."""
    generator = torch.Generator().manual_seed(seed)
    which = [i % len(cells) for i in range(0, trials * 7, 7)]  # trials go around the tasks
    items = [shuffled_prompts(tokenizer, cells[i].split.train, 1, shots, Template(), generator)[0] for i in which]
    effects = causal_effects(model, items, torch.stack([vectors[i] for i in which]))
    top = effects.top(min(TOP, len(effects) // 5))
    most = effects.top(
        min(4 * len(top), len(effects) - len(top))
    )  # a control never holds a head that might do the work
    heads = {
        "function_vector": top,
        "function_vector_random_heads": effects.random_sets(len(top), 1, generator=generator, exclude=most)[0],
    }
    found = {}
    for name, chosen in heads.items():
        sums = _sums(model, vectors, chosen)  # (R, C), the same behind every layer
        table = sums[:, None].expand(-1, effects.layers, -1)
        found[name] = _best(model, tokenizer, cells, table, "add", **sizes)
    return found


def _sums(model: Any, vectors: Sequence[Tensor], heads: Any) -> Tensor:
    return torch.stack([summed(model, own, heads) for own in vectors])


def task_vectors(
    model: Any, tokenizer: Any, cells: Sequence[Cell], *, prompts: int, shots: int, seed: int, **sizes: int
) -> dict[str, Tensor]:
    """States of `prompts` prompts with examples, averaged, put behind the best layer; the source takes one prompt."""
    generator, template = torch.Generator().manual_seed(seed), Template()
    states = []
    for cell in cells:
        drawn = [draw_few_shot(cell.split.train, shots, generator) for _ in range(prompts)]
        items = [encode_item(tokenizer, template.few_shot(examples, x), y) for examples, (x, y) in drawn]
        states.append(last_hidden(model, items).mean(0))
    table = torch.stack(states)  # (R, L, C)
    return {"task_vector": _best(model, tokenizer, cells, table, "replace", **sizes)}


def _best(
    model: Any,
    tokenizer: Any,
    cells: Sequence[Cell],
    table: Tensor,
    mode: Mode,
    *,
    every: int,
    held_out: int,
    **rest: int,
) -> Tensor:
    """(R,) exact answers with vectors table[:, layer] (R, L, C) behind the layer of lowest held-out loss, one layer for all cells."""
    ask = Template().ask
    held = [[encode_item(tokenizer, ask(x), y) for x, y in c.split.validation[:held_out]] for c in cells]
    layers = range(every // 2, model.config.num_hidden_layers, every)
    losses = [torch.cat(_run(model, held, table[:, layer], layer, mode, row_losses)).mean() for layer in layers]
    layer = layers[int(torch.stack(losses).argmin())]
    right = _run(model, [c.asked for c in cells], table[:, layer], layer, mode, exact_rows)
    return torch.stack([part.double().mean() for part in right])


@torch.no_grad()
def _run(
    model: Any, groups: Sequence[Sequence[Item]], vectors: Tensor, layer: int, mode: Mode, measure: Any, rows: int = 64
) -> list[Tensor]:
    """What `measure` gives for each question, by group; group r is injected with vectors[r] (R, C)."""
    device = next(model.parameters()).device
    flat = [(item, r) for r, group in enumerate(groups) for item in group]
    found = []
    for begin in range(0, len(flat), rows):
        items, own = zip(*flat[begin : begin + rows], strict=True)
        batch = pack(items, device)
        with ResidualInjection(model, layer, vectors[list(own)], mode, batch.ends):
            found.append(measure(model, batch).cpu())
    return list(torch.cat(found).split([len(group) for group in groups]))
