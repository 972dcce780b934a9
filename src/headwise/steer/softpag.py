"""SoftPAG: sampling guidance that pushes away from a pass in which a few heads attend, in part, only to themselves.

Ahn et al. 2025, arXiv 2506.10978: O~_h = (1 − u) · O_h + u · V_h for the chosen heads, and
pred = pred_orig + w · (pred_orig − pred_perturbed).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from headwise.attach import fingerprint
from headwise.errors import EditError
from headwise.registry import register
from headwise.steer._perturb import Perturbation
from headwise.units import HeadSet

if TYPE_CHECKING:
    from torch import nn

    from headwise.edits import HeadEdits


@register("steer", "softpag", paper="07")
def softpag(
    model: nn.Module,
    tokenizer: Any,
    *,
    heads: HeadSet,
    u: float = 0.5,
    target: Literal["identity", "uniform"] = "identity",
) -> HeadEdits:
    """Edits of the degraded pass of SoftPAG: the heads attend, by a share u, only to themselves (or to everything alike).

    Works on every model that `attach` reaches: diffusers transformers and all transformers models. `guided` makes a sampler push
    away from that pass; `Perturbation` has the other targets, scopes and geodesics. `tokenizer` is not used.

    Raises UnitError for a head that the model lacks, EditError for u outside [0, 1].

    >>> from headwise.hub import load_model
    >>> model, _ = load_model("tiny-random-vit")
    >>> print(softpag(model, None, heads=HeadSet.parse("L0H1,L1H2:0.5"), u=0.8))
    1. mix_v L0H1,L1H2:0.5, amount 0.8, tokens all, phase all
    """
    from dataclasses import replace

    made_for = fingerprint(model)
    perturbation = Perturbation(heads=heads, u=u, target=target)
    perturbation.check(made_for)
    return replace(perturbation.edits(), fingerprint=made_for)


def guider(heads: HeadSet | str, **options: Any) -> Any:
    """A guider for diffusers' modular pipelines: `HeadGuidance` of `steer/_guider.py` with these heads and options.

    `guider("L11H15,L12H3", u=0.5, w=3.0, guidance_scale=5.0)`. Raises EditError where diffusers is not installed.
    """
    try:
        from headwise.steer._guider import HeadGuidance
    except ImportError as error:
        raise EditError("a guider needs diffusers: pip install 'headwise[vision]'") from error
    return HeadGuidance(heads=str(heads), **options)
