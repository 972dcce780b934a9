"""A GPT-2 of twelve layers of twelve heads that answers three tasks: the subject of circuit reuse and of multiple-choice letters.

`headwise train circuit-lm` trains it; `load_model("circuit-lm")` is one that comes trained with the package. Letters: B prompts.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from headwise.modes import evaluating
from headwise.tasks.colored_objects import make_colored_objects
from headwise.tasks.ioi import make_ioi
from headwise.tasks.multiple_choice import make_multiple_choice
from headwise.tasks.pairs import PromptPairs

if TYPE_CHECKING:
    from transformers import GPT2LMHeadModel, PreTrainedTokenizerBase


def circuit_lm(
    *, width: int = 192, layers: int = 12, heads: int = 12, vocabulary: int = 4096, length: int = 128, seed: int = 0
) -> GPT2LMHeadModel:
    """The model with random weights from the seed; torch's random state is left as it was.

    >>> circuit_lm(width=24, layers=2, heads=2, vocabulary=100).config.n_inner is None
    True
    """
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=vocabulary,
        n_positions=length,
        n_embd=width,
        n_layer=layers,
        n_head=heads,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
        architectures=["GPT2LMHeadModel"],
    )
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return GPT2LMHeadModel._from_config(config, attn_implementation="sdpa")


def probes(tokenizer: PreTrainedTokenizerBase, *, count: int = 128, seed: int = 0) -> dict[str, PromptPairs]:
    """Prompts of the three tasks, multiple choice in both forms and with random letters too."""
    choices = {"letters": ("recall", "letters"), "random": ("recall", "random")}
    choices |= {"question": ("question", "letters"), "question_random": ("question", "random")}
    found = {
        "ioi": make_ioi(tokenizer, count=count, seed=seed),
        "colors": make_colored_objects(tokenizer, count=count, seed=seed),
    }
    for name, (form, labels) in choices.items():
        found[name] = make_multiple_choice(tokenizer, count=count, form=form, labels=labels, seed=seed)  # type: ignore[arg-type]
    return found


@torch.no_grad()
def accuracies(model: Any, prompts: dict[str, PromptPairs]) -> dict[str, float]:
    """Share of prompts whose right answer has the largest logit of the whole vocabulary, task by task; the model comes back in its mode."""
    found = {}
    with evaluating(model):
        for name, pairs in prompts.items():
            pairs = pairs.to(model.device)
            mask = pairs.mask.long()
            places = (mask.cumsum(1) - 1).clamp(min=0)
            given = {"input_ids": pairs.ids, "attention_mask": mask, "position_ids": places}
            logits = model(**given, use_cache=False, logits_to_keep=1).logits[:, -1]
            found[name] = float((logits.argmax(-1) == pairs.answers).float().mean())
    return found
