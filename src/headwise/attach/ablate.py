"""One-line ablation."""

from __future__ import annotations

from torch import Tensor, nn

from headwise.attach import Attachment, attach
from headwise.edits import Edit, Phase
from headwise.errors import EditError
from headwise.units import HeadSet


def ablate(
    model: nn.Module,
    heads: HeadSet | str,
    *,
    mode: str = "zero",
    phase: Phase = "all",
    mean: Tensor | None = None,
    stack: str | None = None,
) -> Attachment:
    """Take heads out: `with headwise.ablate(model, "L11H15,L12H3"): ...`.

    `mode`: "zero" (the head's slice before the output projection is 0), "uniform" (it attends to all visible keys
    alike), "mean" (its output is `mean`, (U, D): one vector per head, in the order of the set, from a calibration run).
    `phase`: "all", "prefill" or "decode". Zeroing a slice *behind* the output projection would not be a head.

    >>> import torch
    >>> from headwise.hub import load_model
    >>> model, _ = load_model("tiny-random-llama")
    >>> with ablate(model, "L0H0,L1H3"):
    ...     _ = model(torch.arange(8)[None])
    """
    units = HeadSet.parse(heads) if isinstance(heads, str) else heads
    if mode == "mean":
        if mean is None:
            raise EditError(
                "mode='mean' needs mean=, one vector per head: observe(model, 'output') on calibration text gives it"
            )
        return attach(model, edits=Edit.replace(units, mean, phase=phase), stack=stack)
    makers = {"zero": Edit.zero, "uniform": Edit.uniform}
    if mode not in makers:
        raise EditError(f"mode={mode!r}; choose zero, uniform or mean")
    return attach(model, edits=makers[mode](units, phase=phase), stack=stack)
