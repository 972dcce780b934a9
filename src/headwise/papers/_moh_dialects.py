"""Mixture-of-head attention from scratch: small models on dialects, where each head can be of use to one kind of text only."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import combinations
from typing import Any

import torch

from headwise.attach import attach
from headwise.progress import track
from headwise.route import HeadLoad, HeadRouter, LayerRoute, RouterConfig
from headwise.tasks.dialects import Dialects, make_dialects

HEADS, WIDTH, LAYERS, WORDS, KINDS = 8, 64, 2, 32, 4
RUNS: Mapping[str, tuple[int, int, float] | None] = {  # shared heads, routed heads of a token, beta
    "dense": None,
    "75pct": (3, 3, 0.01),
    "50pct": (2, 2, 0.01),
    "75pct_unshared": (0, 6, 0.01),
    "75pct_unbalanced": (3, 3, 0.0),
}


def measure_dialects(*, steps: int = 200, seed: int = 0, progress: bool = False) -> dict[str, float]:
    """Held-out loss of each run; balance and head-load distances of the routed ones. All see the same data from the same start."""
    found: dict[str, float] = {}
    for name, shape in track(RUNS.items(), "dialects", progress):
        model = small_model(seed)
        router = None if shape is None else _router(*RUNS[name], seed=seed)  # type: ignore[misc]
        handle = None if router is None else attach(model, router=router)
        _train(model, steps, seed)
        held_out = _batch(512, torch.Generator().manual_seed(seed + 999))
        with torch.no_grad():
            found[f"dialects_loss_{name}"] = float(model(held_out.ids, labels=held_out.labels).loss)
        if router is not None and handle is not None:
            found |= {f"dialects_{key}_{name}": value for key, value in _load(model, router, held_out, seed).items()}
            handle.detach()
    return found


def small_model(seed: int) -> Any:
    """A Llama of 2 layers, width 64, 8 heads; weights from the seed, torch's random state untouched."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=WORDS + KINDS,
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        max_position_embeddings=64,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return LlamaForCausalLM(config)


def _router(shared: int, routed: int, beta: float, *, seed: int) -> HeadRouter:
    layers = (LayerRoute.first(HEADS, shared, routed),) * LAYERS
    config = RouterConfig(kind="trained", width=WIDTH, beta=beta, layers=layers)
    return HeadRouter(config, generator=torch.Generator().manual_seed(seed))


def _batch(count: int, generator: torch.Generator) -> Dialects:
    return make_dialects(count, dialects=KINDS, vocabulary=WORDS, generator=generator)


def _train(model: Any, steps: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed + 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps, pct_start=0.1)
    model.train()
    for _ in range(steps):
        data = _batch(64, generator)
        optimizer.zero_grad()
        model(data.ids, labels=data.labels).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    model.eval()


@torch.no_grad()
def _load(model: Any, router: HeadRouter, data: Dialects, seed: int) -> dict[str, float]:
    """Distance of the dialects' head loads, the same with shuffled labels, and the busiest head's load over the mean."""
    names = [f"d{int(kind)}" for kind in data.dialect]
    order = torch.randperm(len(names), generator=torch.Generator().manual_seed(seed)).tolist()
    with router.recording(names) as load:
        model(data.ids)
    with router.recording([names[i] for i in order]) as shuffled:
        model(data.ids)
    pool = list(router.config.layers[0].pool)
    share = load.share()[:, pool]
    peak = float((share.amax(1) / share.mean(1)).max())
    return {"distance": _mean_distance(load), "shuffled": _mean_distance(shuffled), "peak": peak}


def _mean_distance(load: HeadLoad) -> float:
    pairs = list(combinations(sorted(load.tokens), 2))
    return sum(load.distance(a, b) for a, b in pairs) / len(pairs)
