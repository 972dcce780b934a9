"""Steer: what heads give is changed on purpose, by one method a file. Results are `HeadEdits` or `ExpertEdits`.

`Perturbation` and `guided` make a sampler push away from a degraded pass; `hunt` gives what `headhunter` condenses.
`TaskEmbedding` holds a task learned by soft injection, `serve` puts one into each row of a batch; function and task
vectors are `ResidualVector`s. `expert_maps` shows which experts go with a behaviour, `mote_check` proves it.
"""

from headwise.registry import expose
from headwise.steer._flow import FlowSampler
from headwise.steer._ftri import ExpertContrast, ExpertMaps, expert_maps, label_answers
from headwise.steer._guide import guided
from headwise.steer._mote_check import MoteCheck, mote_check
from headwise.steer._perturb import Perturbation, push, push_with_cfg
from headwise.steer._residual import ResidualInjection, ResidualVector
from headwise.steer._soft_fit import fit_tasks
from headwise.steer._task_embedding import TaskEmbedding, serve
from headwise.steer.function_vector import causal_effects
from headwise.steer.headhunter import Hunt, hunt
from headwise.steer.softpag import guider

__all__ = [
    "ExpertContrast",
    "ExpertMaps",
    "FlowSampler",
    "Hunt",
    "MoteCheck",
    "Perturbation",
    "ResidualInjection",
    "ResidualVector",
    "TaskEmbedding",
    "causal_effects",
    "expert_maps",
    "fit_tasks",
    "guided",
    "guider",
    "hunt",
    "label_answers",
    "mote_check",
    "push",
    "push_with_cfg",
    "serve",
]

expose(__name__)
