"""Paper 15, LongHeads (Lu et al. 2024, arXiv 2402.10685): each query of each head reads its own few chunks, at positions in range."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor

import headwise
from headwise.budget.longheads import LongHeads, longheads
from headwise.errors import HeadwiseError
from headwise.hub import load_model
from headwise.papers._run import Measured, device_of, reproduces
from headwise.papers._short_model import ShortTask, trained_model
from headwise.papers.catalogue import Paper
from headwise.papers.reproduction import Check
from headwise.plan import HeadPlan, SinkWindow
from headwise.tasks import english, even_depths, exact_match, make_passkey, window_losses
from headwise.tasks.texts import encode

PAPER = Paper(
    slug="longheads",
    status="partial",
    api="headwise.budget.longheads",
    claim="Without training, queries that read 16 chunks of 16 tokens each, chosen by every head for itself, a quarter of a text, at "
    "positions below 256, find passkeys nearly as well as dense attention, where a window of as many tokens and randomly chosen "
    "chunks do not",
)
CHECKS = (
    Check("the task is solved by dense attention", "recall_dense", ">=", 0.9),
    Check("nearly as well", "recall_longheads", ">=", 0.8),
    Check("a window of as many tokens does not", "recall_window", "<=", 0.5),
    Check("chance does not either", "recall_random_chunks_best", "<", "recall_longheads"),
    Check("text is not lost against chance", "ppl_longheads", "<", "ppl_random_chunks"),
)
LONG_CHECKS = (
    Check("in range, the short model recalls", "recall_in_range", ">=", 0.9),
    Check("dense attention collapses at 8 times that", "recall_dense_8x", "<=", "recall_longheads_8x"),
    Check("LongHeads keeps 80 % at 4 times", "kept_4x", ">=", 0.8),
    Check("and 60 % at 8 times", "kept_8x", ">=", 0.6),
    Check("more than a window", "recall_longheads_8x", ">", "recall_window_8x"),
    Check("more than chance", "recall_longheads_8x", ">", "recall_random_8x"),
)


@reproduces(PAPER)
def reproduce(scale: str = "cpu", *, seed: int = 0, progress: bool = False) -> Measured:
    """Measure the claim. "cpu": selection and remapping on smollm2 within its context, about 3 minutes on two quiet cores.

    "gpu" also trains a model on 128 tokens by recipe and tests it at 512 and 1024: the extension beyond a trained length.
    """
    sizes: dict[str, Any] = (
        {"prompts": 4, "draws": 3, "windows": 1} if scale == "cpu" else {"prompts": 40, "draws": 5, "windows": 8}
    )
    device = device_of(scale)
    metrics, baselines = measure(device=device, seed=seed, **sizes)
    checks: tuple[Check, ...] = CHECKS
    if scale == "gpu":
        more = measure_extension(device=device, seed=seed, progress=progress)
        metrics, baselines, checks = metrics | more[0], baselines | more[1], CHECKS + LONG_CHECKS
    return metrics, baselines, checks


@dataclass(frozen=True)
class RandomChunks(LongHeads):
    """The control: as many chunks, the forced ones among them, the others drawn by lot for each query and layer."""

    generator: torch.Generator = field(default_factory=torch.Generator, compare=False, repr=False)

    @classmethod
    def like(cls, other: LongHeads, seed: int) -> RandomChunks:
        """The same sizes as `other`."""
        values = {item.name: getattr(other, item.name) for item in fields(LongHeads)}
        return cls(**values, generator=torch.Generator().manual_seed(seed))

    def _select(self, q: Tensor, chunk_keys: Tensor, *rest: Any) -> Tensor:
        return super()._select(_noise(q, self.generator), _noise(chunk_keys, self.generator), *rest)


def _noise(x: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(x.shape, generator=generator).to(x.device)


def measure(
    model_name: str = "smollm2",
    *,
    prompts: int,
    draws: int,
    windows: int,
    length: int = 1024,
    chunk: int = 16,
    window: int = 256,
    device: str = "cpu",
    seed: int = 0,
) -> tuple[dict[str, float], dict[str, float]]:
    """(metrics, baselines) of a small chunk budget on a real model, within its trained length: selection and remapping alone.

    As published, a query reads window / chunk = 16 chunks, and every query head selects for itself. Chunks are small because texts are.
    """
    model, tokenizer = load_model(model_name, device=device)
    if tokenizer is None:
        raise HeadwiseError(f"{model_name!r} has no tokenizer; retrieval needs a language model")
    generator = torch.Generator().manual_seed(seed + 1000)
    depths = even_depths(prompts, 0.1, 0.7)  # in front of the window
    keys = [make_passkey(tokenizer, length=length, depth=d, generator=generator) for d in depths]
    text = torch.tensor(encode(tokenizer, english("eval")))[: windows * length]
    far = longheads(model, chunk=chunk, window=window, select_by="head")
    stack = headwise.find_stack(model)
    near = HeadPlan.uniform(SinkWindow(chunk, window - chunk), stack.layers, stack.kv_heads)

    def numbers(**attached: Any) -> tuple[float, float]:
        with headwise.attach(model, **attached):
            recall = exact_match(model, keys).tokens
            losses = window_losses(model, text, window=length, tokens=len(text))
        return recall, float(losses.mean().exp())

    metrics = dict(zip(("recall_longheads", "ppl_longheads"), numbers(transforms=[far]), strict=True))
    metrics |= {"keys_read": float(window), "share_of_keys": window / length}
    baselines = dict(zip(("recall_dense", "ppl_dense"), numbers(), strict=True))
    baselines |= dict(zip(("recall_window", "ppl_window"), numbers(plan=near), strict=True))
    chance = [numbers(transforms=[RandomChunks.like(far, seed + i)]) for i in range(draws)]
    baselines["recall_random_chunks"] = sum(recall for recall, _ in chance) / draws
    baselines["recall_random_chunks_best"] = max(recall for recall, _ in chance)
    baselines["ppl_random_chunks"] = sum(ppl for _, ppl in chance) / draws
    return metrics, baselines


def measure_extension(
    *, steps: int = 4000, batch: int = 64, tests: int = 128, device: str = "cpu", seed: int = 0, progress: bool = False
) -> tuple[dict[str, float], dict[str, float]]:
    """(metrics, baselines) of a small model trained on texts of at most 128 tokens, at 1, 4 and 8 times that length.

    As published, a query reads 16 chunks and every query head selects for itself; `few` has half as many chunks, chosen by the group.
    """
    task = ShortTask(length=128)
    model = trained_model(task, steps=steps, batch=batch, device=device, seed=seed, progress=progress)
    far = longheads(model, chunk=task.length // 16, window=task.length, select_by="head")
    few = longheads(model, chunk=task.length // 8, window=task.length)
    stack = headwise.find_stack(model)
    near = HeadPlan.uniform(SinkWindow(16, task.length - 16), stack.layers, stack.kv_heads)
    ways: dict[str, dict[str, Any]] = {"dense": {}, "longheads": {"transforms": [far]}, "window": {"plan": near}}
    ways |= {"few": {"transforms": [few]}, "random": {"transforms": [RandomChunks.like(far, seed)]}}
    metrics = {"recall_in_range": task.recall(model, task.length, tests, seed + 1)}
    baselines: dict[str, float] = {}
    for times in (4, 8):
        for name, attached in ways.items():
            with headwise.attach(model, **attached):
                found = task.recall(model, times * task.length, tests, seed + 1)
            (metrics if name == "longheads" else baselines)[f"recall_{name}_{times}x"] = found
        metrics[f"kept_{times}x"] = metrics[f"recall_longheads_{times}x"] / max(metrics["recall_in_range"], 1e-9)
    return metrics, baselines
