"""The output projection of an attention module: where the heads' outputs are summed into the residual stream.

Letters: H query heads, D head dim (of the values), C hidden size.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from headwise.errors import AttachError

OUTPUT_NAMES = ("o_proj", "out_proj", "c_proj", "dense", "wo")


def output_matrix(module: nn.Module) -> Tensor:
    """W_o of an attention module as (C, H * D), so that head h adds `out[h] @ W_o[:, h * D : (h + 1) * D].T` to the stream.

    Raises `AttachError` where the module has no output projection of its own, or one whose weight is not a plain matrix.

    >>> from headwise.attach import find_stack
    >>> from headwise.hub import load_model
    >>> model, _ = load_model("tiny-random-llama")
    >>> output_matrix(find_stack(model).modules[0]).shape
    torch.Size([64, 64])
    """
    projection = next((getattr(module, name) for name in OUTPUT_NAMES if hasattr(module, name)), None)
    if projection is None:
        raise AttachError(f"{type(module).__name__} has no output projection among {', '.join(OUTPUT_NAMES)}")
    weight = getattr(projection, "weight", None)
    if not isinstance(weight, Tensor) or weight.ndim != 2 or not torch.is_floating_point(weight):
        raise AttachError(f"the output projection of {type(module).__name__} has no plain weight (a quantised model?)")
    return weight if isinstance(projection, nn.Linear) else weight.T  # GPT-2's Conv1D stores (in, out)
