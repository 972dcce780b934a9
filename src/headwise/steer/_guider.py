"""SoftPAG as a guider of diffusers' modular pipelines. Needs diffusers: pip install 'headwise[vision]'.

The peer `PerturbedAttentionGuidance` takes layers only, and without classifier-free guidance it prepares two branches of which
none is perturbed; here the branches are named, and the one called "pred_cond_skip" is perturbed whatever stands beside it.
"""

from __future__ import annotations

import math
from contextlib import ExitStack
from typing import Any

from diffusers.configuration_utils import register_to_config
from diffusers.guiders.guider_utils import BaseGuidance, GuiderOutput
from torch import Tensor, nn

from headwise.errors import EditError
from headwise.steer._perturb import Perturbation, push, push_with_cfg
from headwise.units import HeadSet


class HeadGuidance(BaseGuidance):
    """Perturbation guidance by heads, with or without classifier-free guidance; saved and loaded like every diffusers guider.

    heads: text such as "L11H15:0.5,L12H3" (a file: `HeadSet.load`); u, target, geodesic, scope, beta: as in `Perturbation`.
    w: scale of perturbation guidance; guidance_scale: that of classifier-free guidance, 1 for none. Perturbation guidance acts in the steps
    from share `perturbed_start` to share `perturbed_stop`, classifier-free guidance from `start` to `stop`.
    """

    _input_predictions = ["pred_cond", "pred_uncond", "pred_cond_skip"]  # noqa: RUF012 - as diffusers declares it

    @register_to_config
    def __init__(
        self,
        heads: str = "",
        u: float = 0.5,
        target: str = "identity",
        geodesic: str = "linear",
        scope: str = "all",
        beta: float = 0.5,
        w: float = 3.0,
        guidance_scale: float = 1.0,
        perturbed_start: float = 0.0,
        perturbed_stop: float = 1.0,
        start: float = 0.0,
        stop: float = 1.0,
        enabled: bool = True,
    ):
        super().__init__(start, stop, enabled)
        if not 0 <= perturbed_start <= perturbed_stop <= 1:
            raise EditError(
                f"perturbed_start={perturbed_start}, perturbed_stop={perturbed_stop}: 0 <= start <= stop <= 1"
            )
        chosen = HeadSet.parse(heads) if heads else HeadSet.empty()
        how: dict[str, Any] = {"target": target, "geodesic": geodesic, "scope": scope}
        self.perturbation = Perturbation(heads=chosen, u=u, beta=beta, **how)
        self.w, self.guidance_scale = w, guidance_scale
        self.perturbed_start, self.perturbed_stop = perturbed_start, perturbed_stop
        self._attached = ExitStack()

    def _within(self, start: float, stop: float) -> bool:
        if not self._enabled:
            return False
        steps = self._num_inference_steps
        return steps is None or int(start * steps) <= self._step < max(int(stop * steps), int(start * steps) + 1)

    @property
    def _uses_cfg(self) -> bool:
        return self._within(self._start, self._stop) and not math.isclose(self.guidance_scale, 1.0)

    @property
    def _perturbs(self) -> bool:
        return self._within(self.perturbed_start, self.perturbed_stop) and self.w != 0

    @property
    def _branches(self) -> list[tuple[int, str]]:
        """(which of the given conditions, name of the prediction) of each branch of this step, in order."""
        found = [(0, "pred_cond")] + ([(1, "pred_uncond")] if self._uses_cfg else [])
        return found + ([(0, "pred_cond_skip")] if self._perturbs else [])

    @property
    def num_conditions(self) -> int:
        """Branches of this step."""
        return len(self._branches)

    @property
    def is_conditional(self) -> bool:
        """Does the branch that was prepared last read the condition?"""
        return self._branches[max(self._count_prepared, 1) - 1][0] == 0

    def prepare_models(self, denoiser: nn.Module) -> None:
        """Attach the perturbation before its branch runs."""
        self._count_prepared += 1
        if self._branches[self._count_prepared - 1][1] == "pred_cond_skip":
            self._attached.enter_context(self.perturbation.attached(denoiser))

    def cleanup_models(self, denoiser: nn.Module) -> None:
        """Detach it again."""
        self._attached.close()

    def prepare_inputs(self, data: Any) -> list[Any]:
        """One batch of data for each branch."""
        return [self._prepare_batch(data, index, name) for index, name in self._branches]

    def prepare_inputs_from_block_state(self, data: Any, input_fields: Any) -> list[Any]:
        """The same, from a block's state."""
        return [self._prepare_batch_from_block_state(input_fields, data, index, name) for index, name in self._branches]

    def forward(
        self, pred_cond: Tensor, pred_uncond: Tensor | None = None, pred_cond_skip: Tensor | None = None
    ) -> GuiderOutput:
        """cond + w · (cond − skip), or uncond + s · (cond − uncond) + w · (cond − skip)."""
        w, skip = (0.0, pred_cond) if pred_cond_skip is None else (self.w, pred_cond_skip)
        if pred_uncond is None:
            pred = push(pred_cond, skip, w)
        else:
            pred = push_with_cfg(pred_cond, pred_uncond, skip, self.guidance_scale, w)
        return GuiderOutput(pred=pred, pred_cond=pred_cond, pred_uncond=pred_uncond)
