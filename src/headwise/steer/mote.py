"""MoTE: find the experts that go with a behaviour, and switch them off or force them on (arXiv 2502.11096).

No training: the maps of labelled prompts are compared (`expert_maps`), the busiest experts of the behaviour are edited.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from headwise.attach import fingerprint
from headwise.attach.experts import attach_experts
from headwise.checks import whole
from headwise.errors import EditError
from headwise.expert_edits import ExpertEdit, ExpertEdits
from headwise.registry import register
from headwise.steer._ftri import Activity, Statistic, expert_maps
from headwise.storage import parse_json, read_lines

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@register("steer", "mote", paper="18")
def mote(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    behaviour: str,
    data: Path | None = None,
    prompts: Sequence[str | Tensor] | None = None,
    labels: Sequence[str] | None = None,
    experts: int = 10,
    op: Literal["off", "ban", "force", "favour", "scale"] = "off",
    value: float | None = None,
    against: str | None = None,
    activity: Activity = "count",
    by: Statistic = "difference",
    tokens: str = "all",
    new_tokens: int = 0,
    phase: Literal["all", "prefill", "decode"] = "all",
    chat: bool = False,
    batch_size: int = 8,
    progress: bool = False,
) -> ExpertEdits:
    """Edits of the experts that are busier when the model behaves in one way than in others.

        R[l,e] = mean of A_x[l,e] over prompts of the behaviour - mean over the others;    the best `experts` of R are edited

    behaviour: the class whose experts are wanted. against: another class to compare with; by default all others.
    data: a JSON Lines file of objects with "prompt" and "label"; from Python also `prompts` and `labels`.
    experts: how many; only such as are busier for the behaviour.
    op: "off" (the others of the token take their weight over: the paper), "ban" (the next best move in), "force" (always chosen), "favour",
      "scale"; `value` is that of "favour" and "scale", or the floor of "force".
    activity: times chosen, summed weights, or the router's probabilities. by: the statistic that ranks.
    tokens: which tokens of a prompt count; new_tokens: record so many written tokens instead.
    phase: when the edit acts. chat: wrap prompts in the chat template.

    Raises EditError for a class without prompts, too few experts, or an edit that the model cannot take, AttachError for a dense model.

    >>> from headwise.hub import load_model
    >>> model, tokenizer = load_model("tiny-random-qwen3-moe")
    >>> texts = ["What happened in May?", "What happened in June?", "12 + 30 =", "7 + 55 ="]
    >>> edits = mote(model, tokenizer, behaviour="sum", prompts=texts, labels=["ask", "ask", "sum", "sum"], experts=2)
    >>> [(edit.op, len(edit.units)) for edit in edits], edits.method
    ([('off', 2)], 'mote')
    """
    texts, classes = _labelled(data, prompts, labels)
    maps = expert_maps(
        model,
        tokenizer,
        texts,
        classes,
        activity=activity,
        tokens=tokens,
        new_tokens=new_tokens,
        chat=chat,
        batch_size=batch_size,
        progress=progress,
    )
    contrast = maps.contrast(behaviour, against)
    busier = int((contrast.difference > 0).sum())
    if whole("experts", experts, 1, EditError) > busier:
        raise EditError(
            f"experts={experts}, but only {busier} are busier for {behaviour!r} than for the others; ask for fewer"
        )
    units = contrast.scores(by).top(experts)
    edits = ExpertEdits(
        (ExpertEdit(units=units, op=op, value=value, phase=phase),),
        fingerprint=fingerprint(model),
        method="mote",
        meta={
            "behaviour": behaviour,
            "against": against or "all others",
            "activity": activity,
            "by": by,
            "prompts": len(texts),
        },
    )
    with attach_experts(model, edits=edits):
        return replace(edits)


def _labelled(
    data: Path | None, prompts: Sequence[str | Tensor] | None, labels: Sequence[str] | None
) -> tuple[list[str | Tensor], list[str]]:
    """Prompts and labels from the file or from the arguments, which exclude each other."""
    if (data is None) == (prompts is None) or (prompts is None) != (labels is None):
        raise EditError("give data=, a file of prompts and labels, or both prompts= and labels=")
    if data is None:
        return list(prompts or ()), list(labels or ())
    if not Path(data).is_file():
        raise EditError(f"no file at {str(data)!r}; data= is a JSON Lines file of objects with 'prompt' and 'label'")
    texts: list[str | Tensor] = []
    classes: list[str] = []
    for where, line in read_lines(data):
        if not line.strip():
            continue
        row = parse_json(line, where)
        if not all(isinstance(row.get(name), str) for name in ("prompt", "label")):
            raise EditError(f"{where}: a line is an object with the texts 'prompt' and 'label'")
        texts.append(row["prompt"])
        classes.append(row["label"])
    return texts, classes
