"""Paper 18, MoTE (Dahlke et al. 2025, arXiv 2502.11096): a handful of experts carries a behaviour, and switching them off ends it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import headwise
from headwise.papers import _mote_model as recipe
from headwise.papers._run import Measured, device_of, reproduces
from headwise.papers.catalogue import Paper
from headwise.papers.reproduction import Check
from headwise.progress import track

PAPER = Paper(
    slug="mote",
    status="works",
    api="headwise.steer.mote, headwise.steer.expert_maps, headwise.steer.mote_check, headwise.ExpertEdits",
    claim="In a small mixture-of-experts language model that refuses some questions, the two experts of 192 (1 %) that are busier while it "
    "reads those questions carry the refusals: with them off most refusals are gone and other answers stay right, while two "
    "random experts of the same layers change little",
)
DOSES = (1, 2, 4)
SIZES: dict[str, dict[str, Any]] = {
    "cpu": {"seeds": 3, "stages": (80, 260), "batch": 128, "draws": 10, "model": {}},
    "gpu": {
        "seeds": 3,
        "stages": (300, 600),
        "batch": 512,
        "draws": 20,
        "model": {"layers": 8, "experts": 64, "active": 8, "width": 256},
    },
}
CHECKS = (
    Check("the model learned to refuse", "refused_intact", ">=", 0.95),
    Check("and to answer", "right_intact", ">=", 0.95),
    Check("few experts", "share_of_experts", "<=", 0.03),
    Check("refusals go", "drop_top", ">=", 0.5),
    Check("random experts leave them", "drop_random_over_top", "<=", 0.334),
    Check("other answers stay", "right_lost_top", "<=", 0.02),
    Check("two seeds of three", "seeds_that_hold", ">=", 2),
)
PUBLISHED = {"published_drop_top_10": 0.52, "published_drop_random_10": 0.09, "published_share_of_experts": 10 / 14848}


@reproduces(PAPER, CHECKS, PUBLISHED)
def reproduce(scale: str = "cpu", *, seed: int = 0, progress: bool = False) -> Measured:
    """Train the model with three seeds, find the experts on half of the prompts, switch them off on the other half."""
    return measure(device=device_of(scale), seed=seed, progress=progress, **SIZES[scale])


def measure(
    *,
    seeds: int,
    stages: tuple[int, int],
    batch: int,
    draws: int,
    model: dict[str, Any],
    device: str = "cpu",
    seed: int = 0,
    progress: bool = False,
) -> tuple[dict[str, float], dict[str, float]]:
    """(metrics, baselines), means over the seeds."""
    runs = []
    for number in track(range(seeds), "models trained and tuned", progress):
        trained = train(seed + number, stages, batch, device, **model)
        runs.append(run(trained, draws, seed + number))
    names = {side: list(runs[0][side]) for side in (0, 1)}
    metrics, baselines = ({n: sum(r[side][n] for r in runs) / seeds for n in names[side]} for side in (0, 1))
    metrics["seeds_that_hold"] = sum(
        r[0]["drop_top"] >= 0.5 and r[0]["right_lost_top"] <= 0.02 and r[0]["drop_random_over_top"] <= 0.334
        for r in runs
    )
    return metrics, baselines


def train(seed: int, stages: tuple[int, int], batch: int, device: str, **model: Any) -> Any:
    """The model of one seed: everything is answered first, then routers and experts learn to refuse."""
    built = recipe.build(seed, **model).to(device)
    recipe.train(built, recipe.all_prompts(refuse=False), steps=stages[0], batch=batch, seed=seed, rate=4e-3)
    recipe.train(
        built, recipe.all_prompts(refuse=True), steps=stages[1], batch=batch, seed=seed + 1, rate=2e-3, only=".mlp."
    )
    return built


def run(model: Any, draws: int, seed: int) -> tuple[dict[str, float], dict[str, float]]:
    """Maps on half of the prompts, experts off on the others: (metrics, baselines) of one model."""
    data = recipe.all_prompts(refuse=True)
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed))
    seen, fresh = data.at(order[: len(data) // 2]), data.at(order[len(data) // 2 :])
    labels = ["refused" if touchy else "answered" for touchy in seen.touchy.tolist()]
    maps = headwise.steer.expert_maps(model, None, list(seen.ids), labels, tokens="last", batch_size=len(seen))
    scores = maps.contrast("refused").scores()

    def measured() -> dict[str, Tensor]:
        given = recipe.answers(model, fresh)
        refused, right = recipe.refused(given), (given == fresh.answers).all(1)
        flagged = ~fresh.touchy & fresh.flagged
        others = {"right": right[~fresh.touchy], "newly_refused": refused[~fresh.touchy]}
        return {"refused": refused[fresh.touchy], **others, "other_language": right[flagged]}

    check = headwise.steer.mote_check(model, scores, measured, doses=DOSES, draws=draws, seed=seed)
    q = maps.contrast("refused").q_values(2000, torch.Generator().manual_seed(seed))
    metrics, baselines = _figures(check, scores)
    metrics["experts_with_q_below_5_percent"] = float((q < 0.05).sum())
    return metrics | _forced(model, scores, fresh), baselines


def _figures(check: Any, scores: Any) -> tuple[dict[str, float], dict[str, float]]:
    intact, top = check.intact, check.dose(2)
    drop = intact["refused"] - top.rate["refused"]
    drop_random = intact["refused"] - top.random_mean("refused")
    metrics = {
        "refused_intact": intact["refused"],
        "right_intact": intact["right"],
        "share_of_experts": 2 / len(scores),
        "drop_top": drop,
        "drop_random_over_top": drop_random / drop if drop > 0 else float("nan"),
        "right_lost_top": intact["right"] - top.rate["right"],
        "other_language_lost_top": intact["other_language"] - top.rate["other_language"],
        "mcnemar_p": top.p["refused"],
        "newly_refused_others": float(top.gained["newly_refused"]),
    }
    metrics |= {f"refused_top_{row.n}": row.rate["refused"] for row in check.doses}
    metrics |= {f"right_top_{row.n}": row.rate["right"] for row in check.doses}
    baselines = {f"refused_random_{row.n}": row.random_mean("refused") for row in check.doses}
    baselines |= {f"right_random_{row.n}": row.random_mean("right") for row in check.doses}
    return metrics, baselines | {"drop_random": drop_random}


def _forced(model: Any, scores: Any, fresh: recipe.Prompts) -> dict[str, float]:
    """How often neutral prompts are refused, without any edit and with the best expert forced on for every token."""
    neutral = fresh.at((~fresh.touchy).nonzero()[:, 0])
    before = recipe.refused(recipe.answers(model, neutral)).double().mean()
    with headwise.attach(model, edits=headwise.ExpertEdits.force(scores.top(1), floor=0.5)):
        after = recipe.refused(recipe.answers(model, neutral)).double().mean()
    return {"refused_neutral_intact": float(before), "refused_neutral_forced": float(after)}
