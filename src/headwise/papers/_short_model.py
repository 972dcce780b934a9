"""A small Llama that is trained on short texts only, so that its trained length is known: the subject of length extension.

Letters: B batch, N tokens, V words.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from headwise.progress import track


@dataclass(frozen=True)
class ShortTask:
    """Recall of a passage: random words, among them a passage of `passage` words, whose first `cue` words stand again at the end.

    The model continues the passage. In training, texts are full of such repetitions, all within `length` tokens; in a test there is one.
    """

    length: int = 128
    words: int = 512
    passage: int = 8
    cue: int = 3

    def training_rows(self, batch: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Ids (B, N) and which of them are to be predicted (B, N) bool: half a text, then its passages in another order."""
        half = self.length // 2
        first = torch.randint(self.words, (batch, half), generator=generator).view(batch, -1, self.passage)
        order = torch.rand(first.shape[:2], generator=generator).argsort(1)[..., None].expand_as(first)
        second = first.gather(1, order).flatten(1)
        wanted = (torch.arange(half) % self.passage >= self.cue).expand(batch, -1)
        return torch.cat([first.flatten(1), second], 1), torch.cat([torch.zeros_like(wanted), wanted], 1)

    def test_rows(self, length: int, count: int, generator: torch.Generator) -> Tensor:
        """Ids (count, length): words, with a passage at an even depth from 0.05 to 0.75 of the text, and the passage again at its end."""
        ids = torch.randint(self.words, (count, length), generator=generator)
        for row in range(count):
            depth = 0.05 + 0.7 * row / max(1, count - 1)
            place = min(int(depth * length), length - 2 * self.passage)
            ids[row, -self.passage :] = ids[row, place : place + self.passage]
        return ids

    @torch.no_grad()
    def recall(self, model: Any, length: int, count: int, seed: int) -> float:
        """Share of the passage's words behind the cue that are the model's first choice."""
        ids = self.test_rows(length, count, torch.Generator().manual_seed(seed)).to(model.device)
        keep, right = self.passage - self.cue + 1, []
        for rows in ids.split(16):
            said = model(rows[:, :-1], use_cache=False, logits_to_keep=keep - 1).logits.argmax(-1)
            right.append((said == rows[:, 1 - keep :]).float().mean(1))
        return float(torch.cat(right).mean())


def trained_model(
    task: ShortTask, *, steps: int, batch: int, device: str, seed: int, progress: bool = False, lr: float = 1e-3
) -> Any:
    """A Llama of 4 layers, 4 heads, 2 kv heads, 128 wide, trained for `steps` on texts of `task.length` tokens; in eval mode.

    Its config allows longer texts, so that nothing but its training limits it. Warm-up over a tenth, then cosine decay; AdamW.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=task.words,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=16 * task.length,
        tie_word_embeddings=False,
    )
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        model = LlamaForCausalLM(config).to(device).train()
    generator = torch.Generator().manual_seed(seed)
    optimiser = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.01, betas=(0.9, 0.98))
    warm = max(1, steps // 10)
    rates = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda k: min(1.0, (k + 1) / warm) * 0.5 * (1 + float(torch.cos(torch.tensor(torch.pi * k / steps))))
    )
    for _ in track(range(steps), "training", progress):
        ids, wanted = (x.to(device) for x in task.training_rows(batch, generator))
        logits = model(ids[:, :-1], use_cache=False).logits
        loss = F.cross_entropy(logits[wanted[:, 1:]], ids[:, 1:][wanted[:, 1:]])
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        rates.step()
    return model.eval()
