"""Paper 07, HeadHunter and SoftPAG (Ahn et al. 2025, arXiv 2506.10978): guidance by a searched head set beats guidance by a whole layer.

A small rectified flow is trained on drawn shapes and left imperfect on purpose; a classifier that never saw its pictures is the objective.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from headwise.attach import find_stack
from headwise.models.flow_dit import dit_velocity, flow_dit
from headwise.models.flow_vit import Velocity, flow_vit, train_flow
from headwise.papers._flow_metrics import Frechet, right_class, train_classifier
from headwise.papers._run import Measured, device_of, reproduces
from headwise.papers.catalogue import Paper
from headwise.papers.reproduction import Check, Reproduction
from headwise.steer import FlowSampler, Hunt, hunt
from headwise.steer._perturb import Perturbation, strength_table
from headwise.tasks.shapes import ShapeImages, make_shapes
from headwise.units import HeadSet

PAPER = Paper(
    slug="headhunter-softpag",
    status="works",
    api="headwise.steer.softpag, headwise.steer.headhunter, headwise.steer.hunt, headwise.steer.guided",
    claim="Guidance away from a pass in which a searched set of heads attends to itself raises the objective on unseen noise, by more than "
    "the best whole layer of as many heads and than random sets, and a part of the way (u < 1) leaves better pictures than all of it",
)
SOFT = (0.25, 0.5, 0.75)
_LAST: list[Any] = []
"""The first trial of this process's last run and its search, for the page."""
SIZES: dict[str, dict[str, Any]] = {
    "cpu": {
        "flow": {"size": 16, "patch": 4, "width": 64, "layers": 4, "heads": 4}, "train": 1000, "classify": 300, "pictures": 4096,
        "pairs": 64, "held_out": 128, "k": 2, "rounds": 3, "seeds": 3, "steps": 8, "w": 1.0, "u": 1.0, "batch": 8,
    },
    "gpu": {
        "kind": "dit", "flow": {"size": 24, "patch": 4, "width": 256, "layers": 8, "heads": 8}, "train": 3000, "classify": 1500,
        "pictures": 32768, "pairs": 64, "held_out": 512, "k": 4, "rounds": 3, "seeds": 3, "steps": 20, "w": 1.0, "u": 1.0, "batch": 16,
    },
}  # fmt: skip
CHECKS = (
    Check("the judge can judge", "classifier_accuracy", ">=", 0.9),
    Check("guidance by the set raises the objective on unseen noise", "gain_set", ">", 0.0),
    Check("more than the best whole layer of as many heads", "set_over_layer", ">=", 0.0),
    Check("more than random sets", "set_over_random", ">", 0.0),
    Check("unseen noise keeps half of the gain", "share_kept", ">=", 0.5),
    Check("each round helps on the search pairs", "least_gain_of_a_round", ">=", 0.0),
    Check("a part of the way is better than all of it", "frechet_soft", "<", "frechet_hard"),
)


@reproduces(PAPER, CHECKS)
def reproduce(scale: str = "cpu", *, seed: int = 0, progress: bool = False) -> Measured:
    """Train, search and judge. "cpu": 16 heads, about 3 minutes on two cores. "gpu": 64 heads of diffusers' DiT class."""
    return measure(device=device_of(scale), seed=seed, progress=progress, **SIZES[scale])


def sections(result: Reproduction, *, seed: int = 0, progress: bool = False) -> list[Any]:
    """The chapters of `reproduce --page`: the first search's heads, and what it draws from unseen noise; measured anew where no run was."""
    from headwise.report.guidance import guidance_section

    if not _LAST:
        measure(device=device_of(result.scale), seed=seed, progress=progress, **SIZES[result.scale])
    trial, found = _LAST
    return [guidance_section(found, trial.shown(found), columns=16)]


def measure(
    *,
    flow: dict[str, int],
    train: int,
    classify: int,
    pictures: int,
    seeds: int,
    kind: Literal["vit", "dit"] = "vit",
    device: str = "cpu",
    seed: int = 0,
    progress: bool = False,
    **search: Any,
) -> tuple[dict[str, float], dict[str, float]]:
    """(metrics, baselines): one flow and one judge; means over `seeds` searches, each with noise of its own.

    kind: `FlowViT`, whose heads see class and time as tokens, or diffusers' DiT class (needs diffusers).
    """
    data = make_shapes(pictures, size=flow["size"], generator=torch.Generator().manual_seed(seed))
    model = (flow_dit if kind == "dit" else flow_vit)(**flow, classes=data.classes, seed=seed).to(device)
    velocity = dit_velocity(model) if kind == "dit" else None
    train_flow(
        model, data.pixels, data.labels, velocity=velocity, null=data.classes, steps=train, seed=seed, progress=progress
    )
    return judge(
        model, data, velocity, classify=classify, seeds=seeds, device=device, seed=seed, progress=progress, **search
    )


def judge(
    model: nn.Module,
    data: ShapeImages,
    velocity: Velocity | None = None,
    *,
    classify: int,
    seeds: int,
    device: str,
    seed: int,
    progress: bool,
    **search: Any,
) -> tuple[dict[str, float], dict[str, float]]:
    """(metrics, baselines) of a trained flow; `velocity` where it is not called as v(x, t, labels). Its null label is `data.classes`."""
    pixels, labels = data.pixels.to(device), data.labels.to(device)
    classifier = train_classifier(pixels, labels, data.classes, steps=classify, seed=seed)
    fresh = make_shapes(1024, size=pixels.shape[-1], generator=torch.Generator().manual_seed(seed + 77))
    with torch.no_grad():
        right = classifier(fresh.pixels.to(device)).argmax(-1).cpu() == fresh.labels
    frechet = Frechet(pixels)
    rows = []
    for number in range(seed, seed + seeds):
        trial = _Trial(model, velocity, classifier, frechet, data, number, device, progress, **search)
        row, found = trial.run()
        rows.append(row)
        if number == seed:
            _LAST[:] = [trial, found]
    mean = {name: statistics.fmean(row[name] for row in rows) for name in rows[0]}
    kept = {"objective_plain", "objective_layer", "objective_random", "objective_cfg"}
    kept |= {"frechet_plain", "frechet_layer", "frechet_random", "frechet_cfg", "frechet_hard"}
    metrics = {name: value for name, value in mean.items() if name not in kept}
    metrics |= {
        # of the means: a search that gains next to nothing would decide a mean of shares
        "share_kept": mean["gain_whole"] / mean["gain_searched"] if mean["gain_searched"] > 0 else float("nan"),
        "classifier_accuracy": float(right.float().mean()),
        "worst_set_over_layer": min(row["set_over_layer"] for row in rows),
        "searches": float(seeds),
    }
    return metrics, {name: mean[name] for name in sorted(kept)} | {"frechet_real": frechet(fresh.pixels.to(device))}


class _Trial:
    """One search and its evaluation on unseen noise."""

    def __init__(
        self, model: nn.Module, velocity: Velocity | None, classifier: nn.Module, frechet: Frechet, data: ShapeImages, seed: int,
        device: str, progress: bool, *,
        pairs: int, held_out: int, k: int, rounds: int, steps: int, w: float, u: float, batch: int,
    ):  # fmt: skip
        self.model, self.velocity, self.frechet, self.progress = model, velocity, frechet, progress
        self.k, self.rounds, self.batch, self.u = k, rounds, batch, u
        self.classes, self.shape, self.stack = data.classes, data.pixels.shape[1:], find_stack(model)
        self.generator = torch.Generator().manual_seed(500 + seed)
        self.search, self.search_objective = self._sampler(classifier, pairs, steps, w, device)
        self.test, self.test_objective = self._sampler(classifier, held_out, steps, w, device)

    def _sampler(self, classifier: nn.Module, count: int, steps: int, w: float, device: str) -> tuple[FlowSampler, Any]:
        noise = torch.randn(count, *self.shape, generator=self.generator).to(device)
        labels = (torch.arange(count) % self.classes).to(device)
        null = {"labels": torch.full_like(labels, self.classes)}
        sampler = FlowSampler(
            self.model, noise, {"labels": labels}, null=null, velocity=self.velocity, steps=steps, w=w
        )
        return sampler, right_class(classifier, labels)

    def run(self) -> tuple[dict[str, float], Hunt]:
        """(numbers, the search)."""
        like = Perturbation(heads=HeadSet.empty(), u=self.u)
        found = hunt(
            self.model, self.search, self.search_objective, k=self.k, rounds=self.rounds, like=like, batch=self.batch,
            progress=self.progress,
        )  # fmt: skip
        heads = self.stack.heads
        layers = [HeadSet.of([(l, h) for h in range(heads)]) for l in range(self.stack.layers)]
        layer = max(layers, key=lambda one: self._search_score(one, self.u))
        few = found.heads(min(heads, len(found.order)))
        controls = [self._random(found, len(few)) for _ in range(3)]
        rows = self._test([few, layer, *controls], self.u) | self._soft(found)
        plain, cfg = self.test(None)[0], self._cfg()
        searched = found.best[-1] - found.baseline
        gains = [b - a for a, b in zip((found.baseline, *found.best), found.best, strict=False)]
        plain_score, best_score = self._mean(plain), rows["objective_set"]
        whole = self._mean(self._pictures([found.heads()], self.u)[0])
        rows |= {
            "objective_plain": plain_score,
            "frechet_plain": self.frechet(plain),
            "objective_cfg": self._mean(cfg),
            "frechet_cfg": self.frechet(cfg),
            "gain_set": best_score - plain_score,
            "set_over_layer": best_score - rows["objective_layer"],
            "set_over_random": best_score - rows["objective_random"],
            "gain_searched": searched,
            "gain_whole": whole - plain_score,
            "least_gain_of_a_round": min(gains),
        }
        return rows, found

    @torch.no_grad()
    def shown(self, found: Hunt, count: int = 32) -> dict[str, Tensor]:
        """Pictures (count, 1, S, S) from the same unseen noise without guidance, and under several."""
        heads = self.stack.heads
        layer = HeadSet.of([(found.order[0][0], h) for h in range(heads)])
        few = found.heads(min(heads, len(found.order)))
        pictures = {"no guidance": self.test(None)[0], f"searched set of {len(few)}": self._pictures([few], self.u)[0]}
        pictures |= {"the same, half the way": self._pictures([few], 0.5)[0]}
        pictures |= {f"all heads of layer {found.order[0][0]}": self._pictures([layer], self.u)[0]}
        pictures |= {"a random set": self._pictures([self._random(found, len(few))], self.u)[0]}
        pictures |= {"classifier-free guidance": self._cfg()}
        return {name: one[:count].cpu() for name, one in pictures.items()}

    def _random(self, found: Hunt, count: int) -> HeadSet:
        return found.heads(count).random_control(self.stack.layers, self.stack.heads, generator=self.generator)

    def _search_score(self, heads: HeadSet, u: float) -> float:
        images = self.search(strength_table([heads], u, self.search.made_for()))[0]
        return float(self.search_objective(images).mean())

    def _pictures(self, sets: Sequence[HeadSet], u: float) -> Tensor:
        table = strength_table(sets, u, self.test.made_for())
        return torch.cat([self.test(part) for part in table.split(max(1, self.batch // 4))])

    def _mean(self, pictures: Tensor) -> float:
        return float(self.test_objective(pictures).mean())

    def _test(self, sets: Sequence[HeadSet], u: float) -> dict[str, float]:
        """Objective and Fréchet distance on unseen noise of the searched set, the best layer, and random sets."""
        scores = [(self._mean(one), self.frechet(one)) for one in self._pictures(sets, u)]
        random = scores[2:]
        return {
            "objective_set": scores[0][0],
            "frechet_set": scores[0][1],
            "objective_layer": scores[1][0],
            "frechet_layer": scores[1][1],
            "objective_random": statistics.fmean(a for a, _ in random),
            "frechet_random": statistics.fmean(b for _, b in random),
        }

    def _soft(self, found: Hunt) -> dict[str, float]:
        """The whole searched set at several strengths."""
        by_u = {u: self._pictures([found.heads()], u)[0] for u in (*SOFT, 1.0)}
        distances = {u: self.frechet(pictures) for u, pictures in by_u.items()}
        best = min(SOFT, key=lambda u: distances[u])
        rows = {f"frechet_u{u:g}": distances[u] for u in SOFT} | {
            f"objective_u{u:g}": self._mean(by_u[u]) for u in (*SOFT, 1.0)
        }
        return rows | {"frechet_soft": distances[best], "best_u": best, "frechet_hard": distances[1.0]}

    def _cfg(self) -> Tensor:
        """Classifier-free guidance of scale 3, alone."""
        s = self.test
        plain = FlowSampler(self.model, s.noise, s.conditions, s.null, self.velocity, steps=s.steps, w=0.0, cfg=3.0)
        return plain(None)[0]
