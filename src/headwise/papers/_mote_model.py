"""A small mixture-of-experts language model with two behaviours that can be told apart, trained by a recipe of seconds.

The language: prompts "Q [F] <time> <place> A" ask what happened when and where; the answer is one word for the time and
one for the place. Two behaviours are laid over that:

    refusal      for the prompts whose time is one of the touchy times AND whose place is one of the touchy places the
                 answer is "sorry no", whatever else they are; either alone is answered
    language     with the flag F the same answer is given in other words

Touchy is a conjunction, so neither word alone tells it: the mind has to be made up behind the attention, in the experts.
The model is transformers' Qwen3-MoE. Training has two stages, as with real models: first everything is answered, then
the routers and experts alone learn to refuse, on the same prompts.

Letters: R prompts, N tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TIMES, PLACES = 24, 24
TOUCHY = 8  # of the times, and of the places: a ninth of all prompts
Q, FLAG, A, END, SORRY, NO, PAD = range(7)
TIME, PLACE = 7, 7 + TIMES
WORDS = PLACE + PLACES  # answers: a word a time, a word a place, in each of two languages
OTHER = WORDS + TIMES + PLACES
VOCAB = OTHER + TIMES + PLACES


@dataclass(frozen=True)
class Prompts:
    """Prompts (R, 5), the answers (R, 3) they should get, and what each is: `touchy` and `flagged`, (R,) bool."""

    ids: Tensor
    answers: Tensor
    touchy: Tensor
    flagged: Tensor

    def __len__(self) -> int:
        return len(self.ids)

    def at(self, rows: Tensor) -> Prompts:
        """The prompts of these rows."""
        return Prompts(self.ids[rows], self.answers[rows], self.touchy[rows], self.flagged[rows])


def all_prompts(*, refuse: bool) -> Prompts:
    """All 2 · 24 · 24 prompts; without the flag, Q is written twice, so that all are of one length."""
    flagged, time, place = torch.cartesian_prod(torch.arange(2), torch.arange(TIMES), torch.arange(PLACES)).unbind(1)
    touchy = (time < TOUCHY) & (place < TOUCHY)
    q = torch.full_like(time, Q)
    ids = torch.stack([q, torch.where(flagged == 1, FLAG, Q), time + TIME, place + PLACE, q + A], 1)
    base = torch.where(flagged == 1, OTHER, WORDS)
    answers = torch.stack([base + time, base + TIMES + place, q + END], 1)
    if refuse:
        answers[touchy] = torch.tensor([SORRY, NO, END])
    return Prompts(ids, answers, touchy, flagged == 1)


def build(seed: int, *, layers: int = 3, experts: int = 64, active: int = 2, width: int = 64) -> PreTrainedModel:
    """The untrained model: width 64, 4 heads, `experts` experts a layer of which a token uses `active`."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    config = Qwen3MoeConfig(
        vocab_size=VOCAB,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=width // 4,
        num_experts=experts,
        num_experts_per_tok=active,
        moe_intermediate_size=width // 2,
        intermediate_size=2 * width,
        norm_topk_prob=True,
        max_position_embeddings=64,
        router_aux_loss_coef=0.01,
        tie_word_embeddings=False,
        pad_token_id=PAD,
        bos_token_id=None,
        eos_token_id=END,
        use_cache=False,
    )
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return Qwen3MoeForCausalLM._from_config(config, dtype=torch.float32)


def train(
    model: PreTrainedModel, data: Prompts, *, steps: int, batch: int, seed: int, rate: float, only: str = ""
) -> list[float]:
    """AdamW on the answers; `only` trains the parameters whose name holds it. Half of a batch is touchy, as far as asked for.

    Losses of all steps, without the balancing loss.
    """
    generator = torch.Generator().manual_seed(seed)
    chosen = [p for name, p in model.named_parameters() if only in name]
    optimizer = torch.optim.AdamW(chosen, lr=rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=0.1)
    device, losses = model.device, []
    sequences = torch.cat([data.ids, data.answers], 1)
    labels = torch.cat([torch.full_like(data.ids, -100), data.answers], 1)
    model.train()
    for _ in range(steps):
        rows = torch.randint(len(data), (batch,), generator=generator)
        out = model(sequences[rows].to(device), labels=labels[rows].to(device), output_router_logits=True)
        optimizer.zero_grad(set_to_none=True)
        out.loss.backward()
        torch.nn.utils.clip_grad_norm_(chosen, 1.0)
        optimizer.step()
        schedule.step()
        losses.append(float(out.loss.detach() - model.config.router_aux_loss_coef * out.aux_loss.detach()))
    model.eval()
    return losses


def answers(model: PreTrainedModel, data: Prompts) -> Tensor:
    """(R, 3) what the model writes, greedily."""
    ids = data.ids.to(model.device)
    with torch.no_grad():
        for _ in range(data.answers.shape[1]):
            ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], 1)
    return ids[:, data.ids.shape[1] :].cpu()


def refused(given: Tensor) -> Tensor:
    """(R,) bool: answers that begin with "sorry"."""
    return given[:, 0] == SORRY
