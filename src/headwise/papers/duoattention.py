"""Paper 09, DuoAttention (Xiao et al. 2024, arXiv 2410.10819): retrieval heads keep the past, streaming heads sinks and a window.

On a CPU the claim is tested on a real language model: passkeys far from both ends of the text, read through the cache that frees the
memory. On a GPU the memory and the time of a decode step are measured at the shape of Llama-3-8B with random weights.
"""

import math
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import headwise
from headwise.arguments import cache_argument
from headwise.attention import KVGroup
from headwise.errors import HeadwiseError
from headwise.hub import load_model
from headwise.papers._run import Measured, reproduces
from headwise.papers.catalogue import Paper
from headwise.papers.reproduction import Check
from headwise.tasks import Prompt, english, even_depths, exact_match, make_passkey, perplexity
from headwise.units import HeadScores, HeadSet

PAPER = Paper(
    slug="duoattention",
    status="works",
    api="headwise.score.duo_gates, headwise.score.duo_instant, headwise.score.stream_difference, headwise.budget.duo, "
    "headwise.budget.permute_kv_heads, headwise.HeadwiseCache",
    claim="With a quarter of the kv heads full, chosen by their gates, and the rest streaming, a model retrieves about as well as with "
    "its whole cache, which the inverse and a random choice of as many heads do not",
)
SINKS, WINDOW = 16, 128
SHARES = {"25pct": 0.25, "10pct": 0.1}  # of the kv heads, rounded up: 23 and 9 of the 90 of smollm2
GPU_TOKENS = 131072
ROOFLINE = {
    1: 1.35,
    4: 1.68,
}  # decode step, full cache over half of the heads streaming, at GPU_TOKENS on 4.8 TB/s, by rows
ATTENTION_ROOFLINE = 1.99


@reproduces(PAPER)
def reproduce(scale: str = "cpu", *, seed: int = 0, progress: bool = False) -> Measured:
    """Measure the claim. "cpu": recall, perplexity and cache bytes on smollm2, 2-4 minutes on two cores. "gpu": memory and decode
    time of a model of the shape of Llama-3-8B with random weights at 131072 tokens, about 2 minutes and 100 GiB."""
    if scale == "gpu":
        metrics, baselines = measure_decoding(
            llama_3_8b(), tokens=GPU_TOKENS, batches=(1, 4), device="cuda", progress=progress
        )
        checks = _gpu_checks({**metrics, **baselines})
    else:
        metrics, baselines = measure_recall(seed=seed, progress=progress)
        checks = RECALL_CHECKS
    return metrics, baselines, checks


# recall through the cache, on a real model

RECALL_CHECKS = (
    Check("the task is solved with the whole cache", "recall_full", ">=", 0.9),
    Check("a quarter of the heads is on par", "recall_loss_25pct", "<=", 0.1),
    Check("the inverse choice fails", "recall_inverse_25pct", "<=", 0.3),
    Check("random choices do worse", "recall_random_25pct", "<", "recall_duo_25pct"),
    Check("a tenth beats random tenths too", "recall_random_10pct", "<", "recall_duo_10pct"),
    Check("text is read better than by the inverse", "ppl_duo_25pct", "<", "ppl_inverse_25pct"),
    Check("bytes are really freed", "cache_share_25pct", "<=", 0.45),
)


def measure_recall(
    model_name: str = "smollm2",
    *,
    prompts: int = 4,
    length: int = 1024,
    draws: int = 3,
    seed: int = 0,
    progress: bool = False,
) -> tuple[dict[str, float], dict[str, float]]:
    """(metrics, baselines) of `duo-instant` against random and inverse choices of as many kv heads."""
    model, tokenizer = load_model(model_name)
    if tokenizer is None:
        raise HeadwiseError(f"{model_name!r} has no tokenizer; recall needs a language model")
    generator = torch.Generator().manual_seed(
        seed + 1000
    )  # other keys and texts than those that the scores are made of
    keys = [
        make_passkey(tokenizer, length=length, depth=depth, generator=generator)
        for depth in even_depths(prompts, 0.1, 0.75)
    ]
    ids = torch.tensor(tokenizer(english("eval"), verbose=False)["input_ids"][: 2 * length])
    scores = headwise.score.duo_instant(model, tokenizer, sinks=SINKS, window=WINDOW, seed=seed, progress=progress)
    quality = headwise.score.stream_difference(
        model, tokenizer, sinks=SINKS, window=WINDOW, seed=seed, progress=progress
    )
    mixed = HeadScores.mean([scores.normalized(), quality.normalized()])
    bench = Bench(model, keys, ids, length)
    full = HeadSet.empty("kv").complement(scores.layers, scores.units)
    metrics: dict[str, float] = {}
    baselines = bench.named("full", full, scores) | bench.named("streaming", HeadSet.empty("kv"), scores)
    counts = {share: math.ceil(part * len(scores)) for share, part in SHARES.items()}
    for share, count in counts.items():
        metrics |= bench.named(f"duo_{share}", _top(scores, count), scores)
        random = scores.random_sets(count, draws, generator=generator)
        recalls = [bench.recall(heads, scores)[0] for heads in random]
        baselines[f"recall_random_{share}"] = sum(recalls) / len(recalls)
        baselines[f"recall_random_best_{share}"] = max(recalls)
    baselines |= bench.named("inverse_25pct", _top(replace(scores, values=-scores.values), counts["25pct"]), scores)
    metrics |= bench.named("difference_25pct", _top(quality, counts["25pct"]), scores)
    metrics |= bench.named("mixed_25pct", _top(mixed, counts["25pct"]), scores)
    metrics["recall_loss_25pct"] = baselines["recall_full"] - metrics["recall_duo_25pct"]
    metrics["cache_share_25pct"] = metrics["cache_bytes_duo_25pct"] / baselines["cache_bytes_full"]
    return metrics, baselines


class Bench:
    """Passkeys, and text for perplexity, read through the cache of a plan."""

    def __init__(self, model: Any, keys: list[Prompt], ids: Tensor, length: int):
        self.model, self.keys, self.ids, self.length = model, keys, ids, length

    def recall(self, full: HeadSet, scores: HeadScores) -> tuple[float, int]:
        """(share of the digits that are right, bytes of the cache after the last prompt)."""
        made: list[headwise.HeadwiseCache] = []
        plan = _plan(full, scores)

        def cache() -> headwise.HeadwiseCache:
            made[:] = [headwise.HeadwiseCache(plan)]
            return made[0]

        with headwise.attach(self.model, plan=plan):
            result = exact_match(self.model, self.keys, through="cache", cache=cache)
        return result.tokens, made[0].nbytes

    def named(self, name: str, full: HeadSet, scores: HeadScores) -> dict[str, float]:
        """Recall, perplexity and bytes under their names."""
        recall, size = self.recall(full, scores)
        with headwise.attach(self.model, plan=_plan(full, scores)):
            ppl = perplexity(self.model, self.ids, window=self.length, through="cache", step=self.length // 4)
        return {f"recall_{name}": recall, f"ppl_{name}": ppl, f"cache_bytes_{name}": float(size)}


def _plan(full: HeadSet, scores: HeadScores) -> headwise.HeadPlan:
    return headwise.HeadPlan.from_set(full, headwise.SinkWindow(SINKS, WINDOW), scores.layers, scores.units)


def _top(scores: HeadScores, count: int) -> HeadSet:
    return headwise.budget.duo(scores, sparsity=1 - count / len(scores), sinks=SINKS, window=WINDOW).full_heads()


# memory and time of a decode step, on a GPU


def llama_3_8b() -> Any:
    """The config of a model of the shape of Llama-3-8B, with room for long contexts."""
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=1 << 20,
        rope_theta=500000.0,
    )


def _gpu_checks(numbers: dict[str, float]) -> tuple[Check, ...]:
    """Cache within 2 % of the formula; times within 85 % of the roofline, for the batches that were measured."""
    found = [Check("cache is the formula's", "cache_over_formula", "<=", 1.02)]
    found += [Check("attention", "attention_speedup", ">=", round(0.85 * ATTENTION_ROOFLINE, 3))]
    for B, bound in ROOFLINE.items():
        if f"step_speedup_b{B}" in numbers:
            found.append(Check(f"step of {B} rows", f"step_speedup_b{B}", ">=", round(0.85 * bound, 3)))
    return tuple(found)


def measure_decoding(
    config: Any,
    *,
    tokens: int,
    batches: tuple[int, ...],
    device: str,
    sinks: int = 64,
    window: int = 256,
    progress: bool = False,
) -> tuple[dict[str, float], dict[str, float]]:
    """(metrics, baselines): cache bytes and decode times at `tokens`, half of the kv heads streaming, against the whole cache.

    The whole cache is measured as transformers' DynamicCache with SDPA, which copies itself at every step, and as `HeadwiseCache` with
    all heads full; on a GPU steps under a plan run called eagerly and as CUDA graphs. Speed-ups are ratios of the fastest way with the
    whole cache to the fastest way of the plan; every way is in the numbers. Keys and values are random.
    """
    from transformers import AutoModelForCausalLM

    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa").eval()
    L, K = config.num_hidden_layers, config.num_key_value_heads
    gates = torch.rand(L, K, generator=torch.Generator().manual_seed(0))
    scores = HeadScores(values=gates, kind="kv", method="random gates")
    plan = headwise.budget.duo(scores, sparsity=0.5, sinks=sinks, window=window, prefill="dense")
    metrics, baselines = _attention_times(config, tokens, device, headwise.SinkWindow(sinks, window))
    for B in batches:
        run = Decoding(model, config, B, tokens, device)
        sizes: dict[str, int] = {}
        steps: dict[str, dict[str, float]] = {}
        for name, chosen in (("dynamic", None), ("full", headwise.HeadPlan.full(L, K)), ("duo", plan)):
            try:
                sizes[name], steps[name] = run.measure(chosen)
            except torch.OutOfMemoryError:
                break
        if len(steps) < 3:
            continue
        for name, ways in steps.items():
            kept = metrics if name == "duo" else baselines
            kept[f"cache_bytes_{name}_b{B}"] = float(sizes[name])
            kept |= {f"step_ms_{name}_{way}_b{B}": ms for way, ms in ways.items()}
        whole = min(min(steps["dynamic"].values()), min(steps["full"].values()))
        metrics[f"step_speedup_b{B}"] = whole / min(steps["duo"].values())
        formula = int(plan.bytes(tokens, head_dim=run.head_dim, dtype=torch.bfloat16, batch=B).sum())
        metrics["cache_over_formula"] = max(sizes["duo"] / formula, metrics.get("cache_over_formula", 0.0))
    return metrics, baselines


class Decoding:
    """Decode steps of one model over caches that hold random keys and values."""

    def __init__(self, model: Any, config: Any, batch: int, tokens: int, device: str):
        self.model, self.device, self.layers = model, device, config.num_hidden_layers
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.shape = (batch, config.num_key_value_heads, tokens, self.head_dim)

    def measure(self, plan: headwise.HeadPlan | None) -> tuple[int, dict[str, float]]:
        """(bytes of the cache, milliseconds of a step by way) under a plan, or with a DynamicCache.

        The bytes are those that the cache reports or those that the device allocated for it, whichever are more.
        """
        from transformers import DynamicCache

        k, v = (torch.randn(self.shape, device=self.device, dtype=torch.bfloat16) for _ in range(2))
        before = _allocated(self.device)
        if plan is None:
            dynamic = DynamicCache()
            for layer in range(self.layers):
                dynamic.update(k.clone(), v.clone(), layer)
            size = max(2 * self.layers * k.nbytes, _allocated(self.device) - before)
            return size, self._dynamic(dynamic)
        size, found = 0, {}
        for way, capture in (("eager", False), ("graph", True)) if self.device != "cpu" else (("eager", False),):
            cache = headwise.HeadwiseCache(plan).fill(k, v)
            size = max(size, cache.nbytes, _allocated(self.device) - before)
            with headwise.attach(self.model, plan=plan, capture=capture):
                found[way] = self._step(cache)
            del cache  # the next one would stand beside it
        return size, found

    def _dynamic(self, cache: Any) -> dict[str, float]:
        """By PyTorch's choice of kernel; and by FlashAttention, as cuDNN, its choice on Hopper, plans anew for every length."""
        found = {"eager": self._step(cache)}
        if self.device != "cpu":
            with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.MATH], set_priority=True):
                found["flash"] = self._step(cache)
        return found

    def _step(self, cache: Any) -> float:
        token = torch.zeros(self.shape[0], 1, dtype=torch.long, device=self.device)

        def step() -> None:
            self.model(input_ids=token, use_cache=True, **cache_argument(self.model, cache))

        with torch.no_grad():
            return milliseconds(step, self.device)


def _attention_times(
    config: Any, tokens: int, device: str, pattern: headwise.SinkWindow
) -> tuple[dict[str, float], dict[str, float]]:
    """Milliseconds of one layer's decode attention, half of the kv heads streaming, against the fastest dense kernel.

    On a GPU both are also run as CUDA graphs, as a captured step runs them, and the faster way of each is compared: a call that takes
    a tenth of a millisecond is the host's time.
    """
    H, K = config.num_attention_heads, config.num_key_value_heads
    D, half = config.hidden_size // H, K // 2
    q = torch.randn(1, H, 1, D, device=device, dtype=torch.bfloat16)
    k, v = (torch.randn(1, K, tokens, D, device=device, dtype=torch.bfloat16) for _ in range(2))
    slots = pattern.kept(tokens)
    groups = [
        KVGroup(heads=tuple(range(half)), k=k[:, :half].contiguous(), v=v[:, :half].contiguous()),
        KVGroup(
            heads=tuple(range(half, K)),
            k=k[:, half:, :slots].contiguous(),
            v=v[:, half:, :slots].contiguous(),
            pattern=pattern,
            positions=_stream_positions(pattern, tokens, device),
            complete=True,
        ),
    ]
    mine = _ways("duo", lambda: headwise.attention(q, groups=groups, offset=tokens - 1), device)
    dense: dict[str, float] = {}
    for name, run in _dense_kernels(q, k, v, device).items():
        dense |= _ways(name, run, device)
    return mine | {"attention_speedup": min(dense.values()) / min(mine.values())}, dense


def _ways(name: str, run: Callable[[], Any], device: str) -> dict[str, float]:
    """Milliseconds of a call by name: eager and, on a GPU, in a CUDA graph."""
    found = {f"attention_ms_{name}": milliseconds(run, device)}
    if device != "cpu":
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.graph(graph, stream=stream):
            run()
        found[f"attention_ms_{name}_graph"] = milliseconds(graph.replay, device)
    return found


def _stream_positions(pattern: headwise.SinkWindow, tokens: int, device: str) -> Tensor:
    """(1, 1, S): the first and the last tokens."""
    places = [*range(min(pattern.sinks, tokens)), *range(max(pattern.sinks, tokens - pattern.recent), tokens)]
    return torch.tensor(places, device=device)[None, None]


def _dense_kernels(q: Tensor, k: Tensor, v: Tensor, device: str) -> dict[str, Callable[[], Tensor]]:
    """Every SDPA kernel that takes one query over the whole cache, plain and with the G queries of a kv head as rows."""
    G = q.shape[1] // k.shape[1]
    folded = q.view(q.shape[0], k.shape[1], G, q.shape[3])
    found: dict[str, Callable[[], Tensor]] = {}
    names = ("MATH",) if device == "cpu" else ("CUDNN_ATTENTION", "FLASH_ATTENTION", "EFFICIENT_ATTENTION", "MATH")
    for name in names:
        for shape, query in (("gqa", q), ("folded", folded)):
            run = partial(_dense, getattr(SDPBackend, name), query, k, v)
            try:
                run()
            except RuntimeError:  # this kernel does not take the shape
                continue
            found[f"{name.partition('_')[0].lower()}_{shape}"] = run
    return found


def _dense(backend: SDPBackend, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=q.shape[1] != k.shape[1])


def milliseconds(run: Callable[[], Any], device: str, repeats: int = 10) -> float:
    """Median time of a call after three warm-ups; on a GPU five calls in a row, so that it is not the wait that is measured."""
    calls = 1 if device == "cpu" else 5
    for _ in range(3):
        run()
    times = []
    for _ in range(repeats):
        _wait(device)
        started = time.perf_counter()
        for _ in range(calls):
            run()
        _wait(device)
        times.append(1e3 * (time.perf_counter() - started) / calls)
    return sorted(times)[repeats // 2]


def _wait(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()


def _allocated(device: str) -> int:
    return torch.cuda.memory_allocated() if device != "cpu" else 0
