"""DuoAttention at 2048 tokens: digits right and perplexity when instant gates are mixed with a ranking that serves prose.

    python benchmarks/duo_mix.py --heads 23 --shares 0 0.5 1        # smollm2, CPU, about a minute a plan on a quiet core

    python benchmarks/duo_mix.py --device cuda --prompts 40 --tokens 24576 --batch-size 8 --full --gates gates.safetensors

8 passkeys of five digits in 2048 tokens and the first 4096 tokens of held-out text in windows of 2048, both read through the cache,
as `headwise eval --task passkey,perplexity --length 2048` does; 16 sinks and 128 recent tokens for the kv heads that are not whole.
Prints a JSON object a plan.
"""

from __future__ import annotations

import argparse
import json
import time

import torch

import headwise
from headwise.hub import load_model
from headwise.tasks import english, exact_match, perplexity
from headwise.tasks.passkey import make_passkeys
from headwise.tasks.texts import encode

LENGTH, SINKS, WINDOW = 2048, 16, 128


def main() -> None:
    """Scores once, then every number of heads with every share."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--heads", type=int, nargs="+", default=[23, 9])
    parser.add_argument("--shares", type=float, nargs="+", default=[0, 0.25, 0.5, 0.75, 1])
    parser.add_argument("--mix", choices=("difference", "text"), default="difference")
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=4096, help="of held-out text, for the perplexity")
    parser.add_argument("--seed", type=int, default=0, help="of the passkeys; the text is the same")
    parser.add_argument("--full", action="store_true", help="the whole cache too")
    parser.add_argument("--gates", help="a file of headwise score duo-gates, to rank by in the place of instant gates")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch-size", type=int, default=1)
    given = parser.parse_args()
    model, tokenizer = load_model("smollm2")
    model = model.to(given.device)
    begin = time.monotonic()
    options = {"sinks": SINKS, "window": WINDOW}
    instant = (
        headwise.HeadScores.load(given.gates)
        if given.gates
        else headwise.score.duo_instant(model, tokenizer, length=640, **options)
    )
    if given.mix == "difference":
        other = headwise.score.stream_difference(model, tokenizer, **options)
    else:
        other = headwise.score.duo_instant(model, tokenizer, target="text", length=1024, **options)
    print(
        json.dumps({"scoring_seconds": time.monotonic() - begin, "spearman": instant.rank_correlation(other)}),
        flush=True,
    )
    keys = make_passkeys(
        tokenizer, count=given.prompts, length=LENGTH, generator=torch.Generator().manual_seed(given.seed)
    )
    ids = encode(tokenizer, english("eval")[: 12 * given.tokens])
    plans = [
        (
            heads,
            share,
            headwise.budget.duo(instant, sparsity=1 - heads / len(instant), mix=other, mix_share=share, **options),
        )
        for heads in given.heads
        for share in given.shares
    ]
    if given.full:
        plans.append((len(instant), 0.0, headwise.HeadPlan.full(instant.layers, instant.units)))
    for heads, share, plan in plans:
        assert len(plan.full_heads()) == heads
        with headwise.attach(model, plan=plan):
            how = {"through": "cache", "batch_size": given.batch_size}
            ppl = perplexity(model, ids, window=LENGTH, tokens=given.tokens, **how)
            found = exact_match(model, keys, **how)
        row = {"whole_heads": heads, "mix_share": share, "digits": found.tokens, "exact": found.mean, "perplexity": ppl}
        print(json.dumps({**row, "interval": found.interval, "ratio": plan.ratio(LENGTH)}), flush=True)


if __name__ == "__main__":
    main()
