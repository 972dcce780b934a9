"""Paper 22, vision-aware head divergence (He et al., arXiv 2412.13949): louder vision-aware heads invent fewer objects."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from headwise.attach.divergence import vision_aware
from headwise.hub import load_model
from headwise.papers._run import Measured, Table, mean_of, reproduces
from headwise.papers._scene_models import MODELS, drawn, named, of_each_model, parted
from headwise.papers.catalogue import Paper
from headwise.papers.reproduction import Check, Reproduction
from headwise.score.vhd import token_vhd
from headwise.steer.vhr import VHR, ReinforcedHeads, vhr
from headwise.tasks.descriptions import Descriptions, describe, pull_of_habit
from headwise.tasks.scenes import EOS, FIRST_OBJECT, OBJECTS, Scenes, make_scenes

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PAPER = Paper(
    slug="vision-aware-head-divergence",
    status="partial",  # the specificity to vision-aware heads does not show on the bundled models
    api="headwise.score.vhd, headwise.steer.vhr",
    claim="Multiplying the outputs of the vision-aware half of the heads by 2 in the second and the last 14/32 of the layers makes a "
    "vision-language model invent fewer objects, at equal recall; the more the larger the factor; random halves of the same "
    "layers do less; and tokens that it invents have a lower T-VHD than those that it sees",
)
ALPHAS = (0.2, 0.5, 1.5, 2.0, 3.0)
SIZES: dict[str, dict[str, Any]] = {"cpu": {"scenes": 200, "draws": 3}, "gpu": {"scenes": 2000, "draws": 10}}
CHECKS = (
    Check("the model describes what it sees", "recall_greedy", ">=", 0.8),
    Check("and invents", "chair_i_greedy", ">=", 0.05),
    Check("fewer inventions", "chair_i_ratio_alpha2", "<=", 0.85),
    Check("with every seed", "chair_i_ratio_alpha2_worst_seed", "<", 1.0),
    Check("at equal recall", "recall_lost_alpha2", "<=", 0.03),
    Check("fewer the louder, 0.2 to 0.5", "chair_i_alpha0.5", "<", "chair_i_alpha0.2"),
    Check("fewer the louder, 0.5 to 1", "chair_i_greedy", "<", "chair_i_alpha0.5"),
    Check("fewer the louder, 1 to 2", "chair_i_alpha2", "<", "chair_i_greedy"),
    Check("random halves do less", "chair_i_alpha2", "<", "chair_i_random_half"),
    Check("the blind half does less", "chair_i_alpha2", "<", "chair_i_blind_half"),
    Check("T-VHD tells invented tokens", "auroc_tvhd", ">", 0.6),
)
PUBLISHED = {
    "published_llava15_chair_i_greedy": 0.1432,
    "published_llava15_chair_i_alpha2": 0.0971,
    "published_llava15_chair_i_fixed_heads": 0.1381,
}
"""LLaVA-1.5-7B on 500 images of COCO; "fixed heads" were chosen on one sample."""


@reproduces(PAPER, CHECKS, PUBLISHED)
def reproduce(scale: str = "cpu", *, seed: int = 0, progress: bool = False) -> Measured:
    """Measure the claim on three bundled scene models, trained with three seeds, on scenes that break the habit of their training."""
    return summarise(of_each_model(measure, SIZES[scale], scale, seed=seed, progress=progress))


def sections(result: Reproduction, *, seed: int = 0, progress: bool = False) -> list[Any]:
    """The chapters of `reproduce --page`: the rates by alpha, and where the first model looks in three scenes and what it says of them."""
    from headwise.report.figures import COLOURS, Line, lines
    from headwise.report.looking import looking_section
    from headwise.report.page import Section

    alphas = sorted((*ALPHAS, 1.0))
    panels = {}
    for name, title in (
        ("chair_i", "share invented"),
        ("recall", "recall"),
        ("length", "objects named"),
        ("repeats", "repeated"),
    ):
        curve = [result.numbers[f"{name}_greedy" if a == 1 else f"{name}_alpha{a:g}"] for a in alphas]
        series = [Line("vision-aware half", alphas, curve)]
        for half, colour in (("random_half", "random"), ("blind_half", "inverse")):
            ends = [result.numbers[f"{name}_greedy"], result.numbers[f"{name}_{half}"]]
            series.append(Line(half.replace("_", " "), [1.0, 2.0], ends, colour=COLOURS[colour], dash="dot"))
        panels[title] = series
    rates = Section(
        title="What louder heads do",
        text=[
            "Means over the bundled models. A lower rate of inventions is worth something only at equal recall and without repetitions."
        ],
        figures=[lines(panels, x_title="alpha: heads are multiplied by it")],
    )
    model, _ = load_model(MODELS[0])
    data = make_scenes(3, habit="broken", generator=torch.Generator().manual_seed(seed))
    return [rates, looking_section(model, data.inputs(), said=list(_texts(model, data)))]


def _texts(model: PreTrainedModel, data: Scenes) -> Iterator[tuple[str, str]]:
    """(label, what is there, or what the model says) of each scene, plain and under VHR; inventions in capitals."""
    rule = vhr(model, None)
    said = {"greedy": describe(model, data)}
    for alpha in (2.0, 3.0):
        with ReinforcedHeads(model, _with(rule, alpha)):
            said[f"alpha {alpha:g}"] = describe(model, data)
    for row in range(len(data)):
        real = data.objects(row)
        yield f"picture {row + 1} shows", ", ".join(OBJECTS[kind] for kind in sorted(real))
        for name, answers in said.items():
            yield name, ", ".join(OBJECTS[k] if k in real else OBJECTS[k].upper() for k in answers.said(row))


def measure(model: PreTrainedModel, *, scenes: int, draws: int, seed: int = 0) -> Table:
    """All numbers of one model: greedy, every alpha, random halves, heads fixed from one scene, and how T-VHD separates
    tokens; and the chance of an absent second behind its first, with the picture (`second_seen`) and without (`second_unseen`)."""
    generator = torch.Generator().manual_seed(seed)
    data = make_scenes(scenes, habit="broken", generator=generator)
    greedy = describe(model, data)
    found = named(greedy, "greedy")
    rule = vhr(model, None)
    for alpha in ALPHAS:
        found |= _under(model, data, _with(rule, alpha), f"alpha{alpha:g}")
    for name, choose in (("blind_half", _blind_half), ("fixed_heads", _fixed(model, rule, generator))):
        found |= _under(model, data, rule, name, choose)
    found |= drawn(lambda: _under(model, data, rule, "random_half", _random_half(generator)), draws)
    found |= {f"second_{name}": chance for name, chance in pull_of_habit(model, data).items()}
    return found | {"auroc_tvhd": _auroc(model, greedy)}


def summarise(tables: Sequence[Table]) -> tuple[Table, Table]:
    """(metrics, baselines): means over models, and what the checks compare."""
    means = mean_of(tables)
    ratios = [table["chair_i_alpha2"] / max(table["chair_i_greedy"], 1e-9) for table in tables]
    means["chair_i_ratio_alpha2"] = means["chair_i_alpha2"] / max(means["chair_i_greedy"], 1e-9)
    means["chair_i_ratio_alpha2_worst_seed"] = max(ratios)
    means["recall_lost_alpha2"] = means["recall_greedy"] - means["recall_alpha2"]
    return parted(means, ("_greedy", "_random_half", "_blind_half", "_fixed_heads"))


def _with(rule: VHR, alpha: float) -> VHR:
    return VHR(layers=rule.layers, alpha=alpha, fingerprint=rule.fingerprint)


def _under(
    model: PreTrainedModel, data: Scenes, rule: VHR, name: str, choose: Callable[[int, Tensor], Tensor] | None = None
) -> Table:
    with ReinforcedHeads(model, rule, choose):
        return named(describe(model, data), name)


def _random_half(generator: torch.Generator) -> Callable[[int, Tensor], Tensor]:
    """A random half of the heads for every row, instead of the vision-aware half."""

    def choose(layer: int, values: Tensor) -> Tensor:
        order = torch.rand(values.shape, generator=generator).argsort(-1).to(values.device)
        return order < values.shape[-1] // 2

    return choose


def _blind_half(layer: int, values: Tensor) -> Tensor:
    """The other half: heads at or below the median."""
    return ~vision_aware(values)


def _fixed(model: PreTrainedModel, rule: VHR, generator: torch.Generator) -> Callable[[int, Tensor], Tensor]:
    """The heads that one scene chooses, for all."""
    one = make_scenes(1, generator=generator)
    with rule.attach(model) as running, torch.no_grad():
        model(**{key: value.to(model.device) for key, value in one.inputs().items()})
    heads = dict(running.heads)
    return lambda layer, values: heads[layer].expand_as(values)


def _auroc(model: PreTrainedModel, said: Descriptions) -> float:
    """How often a token that is right has a higher T-VHD than one that is invented; 0.5 is chance, NaN without inventions."""
    from scipy.stats import mannwhitneyu

    right: list[float] = []
    invented: list[float] = []
    longest = said.answers.shape[1]
    values = token_vhd(model, said.training(), tokens=longest).cpu()  # of the last tokens, aligned on the right
    for row in range(len(said.scenes)):
        answer = said.answers[row].tolist()
        length = answer.index(EOS) + 1 if EOS in answer else longest
        for place, token in enumerate(answer[:length]):
            if token >= FIRST_OBJECT:
                seen = token - FIRST_OBJECT in said.scenes.objects(row)
                (right if seen else invented).append(float(values[row, longest - length + place]))
    if not right or not invented:
        return float("nan")
    return float(mannwhitneyu(right, invented).statistic) / (len(right) * len(invented))
