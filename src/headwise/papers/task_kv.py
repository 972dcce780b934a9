"""Paper 11, Task-KV (He et al. 2025, arXiv 2501.15113): per prompt, heads that differ from their layer keep the whole cache."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

import headwise
from headwise.attention.groups import KVGroup, Queries
from headwise.budget._semantic import far_heads, head_distances, rounded
from headwise.errors import HeadwiseError
from headwise.hub import load_model
from headwise.keyscores import Ask
from headwise.papers._one_prefill import Prefill
from headwise.papers._run import Measured, device_of, reproduces
from headwise.papers.catalogue import Paper
from headwise.papers.reproduction import Check
from headwise.plan import Full, HeadPlan, Pattern, Selected, SinkWindow
from headwise.progress import track
from headwise.tasks import english, even_depths, make_needle, make_passkey
from headwise.tasks.texts import encode

PAPER = Paper(
    slug="task-kv",
    status="works",
    api="headwise.budget.task_kv, headwise.score.semantic_distance, headwise.budget.snapkv, headwise.budget.adakv, "
    "headwise.budget.pyramidkv, headwise.budget.headkv, headwise.budget.streaming_llm",
    claim="With 40 % of the cache, one or two whole kv heads of nine a layer, chosen per prompt by their semantic distance, and middle "
    "tokens for the others retrieve within 2 points of the whole cache and no worse than SnapKV, which sinks and recent tokens do not; "
    "whole heads that are chosen as the closest or at random disturb the logits more; and the chosen heads differ more between tasks "
    "than within one",
)
SINKS, RECENT, SHARE = 16, 64, 0.4  # recent: the paper's 256 of 8192 tokens and more, scaled to 1024
BETA = 0.25  # of the kv heads differ in the first layer, one in the last: the paper's settings
READ = 48  # tokens behind a text whose logits are compared
CHECKS = (
    Check("the task is solved with the whole cache", "recall_full", ">=", 0.9),
    Check("within 2 points of it", "recall_loss", "<=", 0.02),
    Check("no worse than SnapKV", "recall_task_kv", ">=", "recall_snapkv"),
    Check("sinks and recent tokens do not retrieve", "recall_streaming", "<", "recall_task_kv"),
    Check("the same bytes as SnapKV or fewer", "bytes_task_kv", "<=", "bytes_snapkv_and_1_percent"),
    Check("nearer than with the closest heads whole", "kl_task_kv", "<", "kl_near"),
    Check("nearer than with random heads whole", "kl_task_kv", "<", "kl_random_heads"),
    Check("middle tokens beat none", "kl_middle_selected", "<", "kl_middle_none"),
    Check("middle tokens beat an averaged one", "kl_middle_selected", "<", "kl_middle_average"),
    Check("heads differ between tasks", "jaccard_between_tasks", "<", 0.8),
    Check("and less within one", "jaccard_between_tasks", "<", "jaccard_within_tasks"),
)


@reproduces(PAPER, CHECKS)
def reproduce(scale: str = "cpu", *, seed: int = 0, progress: bool = False) -> Measured:
    """Measure the claim on smollm2 with its kv heads repeated, 3 seeds. "cpu": 6 passkeys, 6 texts, about 3 minutes. "gpu": 60 and 60."""
    each = 2 if scale == "cpu" else 20
    return measure(each=each, device=device_of(scale), seed=seed, progress=progress)


def measure(
    model_name: str = "smollm2",
    *,
    each: int,
    seeds: int = 3,
    length: int = 1024,
    device: str = "cpu",
    seed: int = 0,
    progress: bool = False,
) -> tuple[dict[str, float], dict[str, float]]:
    """(metrics, baselines): recall of `each` passkeys a seed, divergence on `each` texts a seed, and which heads were chosen."""
    model, tokenizer = load_model(model_name, device=device)
    if tokenizer is None:
        raise HeadwiseError(f"{model_name!r} has no tokenizer; retrieval needs a language model")
    model = with_a_kv_head_for_every_head(model)
    scores = headwise.score.induction(model, tokenizer, length=128, repeats=2, seed=seed, progress=progress)
    plans = plans_of(model, scores, length)
    recall: dict[str, list[float]] = {}
    divergence: dict[str, list[float]] = {}
    size: dict[str, float] = {}
    chosen: dict[str, list[Tensor]] = {"passkey": [], "needle": [], "text": []}
    for one in track(range(seeds), "seeds", progress):
        generator = torch.Generator().manual_seed(seed + 100 * one + 1)
        for depth in even_depths(each * seeds, 0.1, 0.75)[one::seeds]:
            prompt = make_passkey(tokenizer, length=length, depth=depth, generator=generator)
            prefill = Prefill.read(model, prompt.ids[:-1])
            _recall(model, prefill, prompt, plans, recall, size)
            chosen["passkey"].append(far_sets(prefill))
        needle = make_needle(tokenizer, length=length, depth=0.5, generator=generator)
        chosen["needle"].append(far_sets(Prefill.read(model, needle.ids)))
        for ids in _pieces(tokenizer, length, each, generator):
            prefill = Prefill.read(model, ids[:-READ])
            _diverge(model, prefill, ids[-READ:], plans | middles(prefill, model), divergence)
            chosen["text"].append(far_sets(prefill))
    return _tables(recall, divergence, size, chosen)


def with_a_kv_head_for_every_head(model: Any) -> Any:
    """A copy that computes the same function with as many kv heads as query heads, each repeated for its group.

    The method was made for layers of 8 and 32 kv heads: of the three of smollm2, one whole head would take a third of the cache.
    """
    stack = headwise.find_stack(model)
    if stack.heads == stack.kv_heads:
        return model
    config, weights = copy.deepcopy(model.config), dict(model.state_dict())
    config.num_key_value_heads = stack.heads
    for name, weight in weights.items():
        if name.endswith(("k_proj.weight", "v_proj.weight")):
            by_head = weight.unflatten(0, (stack.kv_heads, -1))
            weights[name] = by_head.repeat_interleave(stack.heads // stack.kv_heads, 0).flatten(0, 1)
    made = type(model)._from_config(config, attn_implementation="sdpa", dtype=model.dtype).to(model.device)
    made.load_state_dict(weights)
    return made.eval()


def plans_of(model: Any, scores: Any, length: int) -> dict[str, HeadPlan]:
    """Every method at the same share of the cache."""
    budget, options = f"{SHARE:.0%}", {"window": 32}
    # the closest one beside the farthest would leave the others little: of nine heads one is more than of the paper's 32
    task = headwise.budget.task_kv(
        model, budget=budget, beta=BETA, m=1, closest=False, sinks=SINKS, recent=RECENT, context=length - READ
    )
    return {
        "task_kv": task,
        "near": reordered(task, "near"),
        "random_heads": reordered(task, "random"),
        "snapkv": headwise.budget.snapkv(model, budget=budget, **options),
        "adakv": headwise.budget.adakv(model, budget=budget, **options),
        "pyramidkv": headwise.budget.pyramidkv(model, budget=budget, **options),
        "headkv": headwise.budget.headkv(scores, budget=budget, **options),
        "random_tokens": headwise.budget.random(model, budget=budget, **options),
        "streaming": headwise.budget.streaming_llm(model, budget=budget, sinks=SINKS, prefill="dense"),
    }


def reordered(plan: HeadPlan, order: str) -> HeadPlan:
    """The same plan whose whole heads are the closest, or drawn: controls."""

    def other(pattern: Pattern) -> Pattern:
        return replace_split(pattern, f"order={order}")

    return replace(plan, patterns=tuple(tuple(map(other, row)) for row in plan.patterns), method=order)


def replace_split(pattern: Pattern, option: str) -> Pattern:
    """A `Selected` pattern with one more option of its split; other patterns as they are."""
    if not isinstance(pattern, Selected):
        return pattern
    split = pattern.split.removesuffix(")") + f",{option})"
    return Selected(
        pattern.sinks, pattern.recent, pattern.keep, share=pattern.share, by=pattern.by, split=split, grow=pattern.grow
    )


def middles(prefill: Prefill, model: Any) -> dict[str, HeadPlan]:
    """The same whole heads, and for the others no middle token, one averaged token, or as many chosen ones as the budget holds."""
    far, found = far_sets(prefill), {}
    by = "observation(window=32,kernel=7,pool=avg)"
    for name in ("middle_none", "middle_average", "middle_selected"):
        rows = []
        for whole in far.tolist():
            K, full = len(whole), sum(whole)
            left = max(0, int(SHARE * K * prefill.length) - full * prefill.length) // max(1, K - full)
            others: dict[str, Pattern] = {
                "middle_none": SinkWindow(SINKS, RECENT, grow=True),
                "middle_average": SinkWindow(SINKS, RECENT, compensation="count", grow=True),
                "middle_selected": Selected(SINKS, RECENT, max(0, left - SINKS - RECENT), by=by, grow=True),
            }
            rows.append(tuple(Full() if x else others[name] for x in whole))
        found[name] = HeadPlan(patterns=tuple(rows), prefill="dense")
    return found


def far_sets(prefill: Prefill) -> Tensor:
    """The kv heads of each layer that stay whole, the farthest, (L, K) bool."""
    rows, layers = [], len(prefill.queries)
    for layer, (q, k, v) in enumerate(zip(prefill.queries, prefill.keys, prefill.values, strict=True)):
        queries = Queries(q.shape[2], prefill.length - q.shape[2])
        group = KVGroup(tuple(range(k.shape[1])), k, v)
        ask = Ask(q, group, queries, q.shape[-1] ** -0.5, layer, Selected(0, 1, 0), (prefill.length,))
        far, count = head_distances(ask)[0], max(1, rounded(far_heads(layer, layers, k.shape[1], BETA, 1)))
        rows.append(torch.zeros(len(far), dtype=torch.bool).scatter(0, far.topk(count).indices.cpu(), True))
    return torch.stack(rows)


def _recall(
    model: Any, prefill: Prefill, prompt: Any, plans: dict[str, HeadPlan], found: dict[str, list[float]], size: dict
) -> None:
    """Share of the answer's tokens that are right, given the right ones before, under the whole cache and each plan."""
    after = torch.cat([prompt.ids[-1:], prompt.answer_ids[:-1]])
    for name, plan in {"full": None, **plans}.items():
        said, size[name] = prefill.log_probs(model, after, plan)
        right = said.argmax(-1).cpu() == prompt.answer_ids
        found.setdefault(name, []).append(float(right.double().mean()))


def _diverge(
    model: Any, prefill: Prefill, after: Tensor, plans: dict[str, HeadPlan], found: dict[str, list[float]]
) -> None:
    """KL in nats from the dense model's next-token distribution, the mean over the tokens behind a text."""
    dense = prefill.log_probs(model, after, None)[0]
    for name, plan in plans.items():
        other = prefill.log_probs(model, after, plan)[0]
        found.setdefault(name, []).append(float((dense.exp() * (dense - other)).sum(-1).mean()))


def _tables(
    recall: dict[str, list[float]], divergence: dict[str, list[float]], size: dict, chosen: dict[str, list[Tensor]]
) -> tuple[dict[str, float], dict[str, float]]:
    mean = {f"recall_{name}": sum(xs) / len(xs) for name, xs in recall.items()}
    mean |= {f"kl_{name}": sum(xs) / len(xs) for name, xs in divergence.items()}
    mean |= {f"bytes_{name}": float(x) for name, x in size.items()}
    within, between = jaccard(chosen)
    ours = ("recall_task_kv", "kl_task_kv", "bytes_task_kv", "kl_middle_selected")
    metrics = {name: mean.pop(name) for name in ours}
    metrics |= {"recall_loss": mean["recall_full"] - metrics["recall_task_kv"]}
    metrics |= {"jaccard_within_tasks": within, "jaccard_between_tasks": between}
    wins = [a < b for a, b in zip(divergence["task_kv"], divergence["snapkv"], strict=True)]
    metrics["share_of_texts_nearer_than_snapkv"] = sum(wins) / len(wins)
    return metrics, mean | {"bytes_snapkv_and_1_percent": 1.01 * mean["bytes_snapkv"]}


def jaccard(chosen: dict[str, list[Tensor]]) -> tuple[float, float]:
    """Mean Jaccard index of the sets of two prompts, of one task and of two."""
    items = [(task, x) for task, sets in chosen.items() for x in sets]
    found: dict[bool, list[float]] = {True: [], False: []}
    for at, (task, a) in enumerate(items):
        for other, b in items[at + 1 :]:
            found[task == other].append(float((a & b).sum() / (a | b).sum()))
    same, different = found[True], found[False]
    return sum(same) / max(1, len(same)), sum(different) / max(1, len(different))


def _pieces(tokenizer: Any, length: int, count: int, generator: torch.Generator) -> list[Tensor]:
    """`count` pieces of `length` tokens of English, drawn."""
    ids = torch.tensor(encode(tokenizer, english("eval")))
    starts = torch.randint(0, max(1, len(ids) - length), (count,), generator=generator).tolist()
    return [ids[at : at + length] for at in starts]
