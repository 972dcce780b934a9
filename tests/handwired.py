"""Two-layer, attention-only GPT-2s whose weights are set by hand: an exact induction head and a same-token head, or an exact name mover.

The hidden state has three one-hot fields: the token, its position, and the previous token, which head L0H0 writes. Every
number stands beside its negative, so that the mean is 0 and LayerNorm only scales. Head L1H1 asks for the key whose
previous token is the query's token, and writes that key's token into the token field, which the tied head reads out.
Head L1H2 asks for the query's own token. The others look at their own position and write nothing.

The name mover L1H1 asks for names other than the previous token, which L0H0 has written into the query's stream: at the word behind
the second mention of the giver it finds the other name, and writes it into the token field.
"""

import torch
from transformers import GPT2Config, GPT2LMHeadModel

VOCAB, POSITIONS, HEADS = 32, 64, 4
WIDTH = 2 * (VOCAB + POSITIONS + VOCAB)  # 256, 64 a head
TOKEN, PLACE, BEFORE = slice(0, VOCAB), slice(VOCAB, VOCAB + POSITIONS), slice(VOCAB + POSITIONS, WIDTH // 2)
SHARP = 40.0  # difference of a match's logit to all others
PREVIOUS, INDUCTION, ECHO = (0, 0), (1, 1), (1, 2)
MOVER, NAMES = (1, 1), range(1, 9)  # tokens 1 to 8 are names


def handwired_induction(base="sdpa"):
    model = _silent(base)
    with torch.no_grad():
        second = model.transformer.h[1].attn
        _head(second, 1, TOKEN, torch.eye(VOCAB), BEFORE, write=(TOKEN, TOKEN, 3.0), norm=6)
        _head(second, 2, TOKEN, torch.eye(VOCAB), TOKEN, norm=6)
        for head in (0, 3):
            _head(second, head, PLACE, torch.eye(POSITIONS), PLACE, norm=6)
    return model


def handwired_name_mover(base="sdpa"):
    others = torch.zeros(VOCAB, VOCAB)  # from the previous token to the tokens that are asked for
    others[:, list(NAMES)] = 1.0
    others -= torch.diag(others.diagonal())
    model = _silent(base)
    with torch.no_grad():
        second = model.transformer.h[1].attn
        _head(second, 1, BEFORE, others, TOKEN, write=(TOKEN, TOKEN, 3.0), norm=6)
        for head in (0, 2, 3):
            _head(second, head, PLACE, torch.eye(POSITIONS), PLACE, norm=6)
    return model


def _silent(base):
    """Embeddings, a first layer in which L0H0 writes the previous token, and a second one without heads."""
    config = GPT2Config(
        vocab_size=VOCAB,
        n_positions=POSITIONS,
        n_embd=WIDTH,
        n_layer=2,
        n_head=HEADS,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = GPT2LMHeadModel._from_config(config, attn_implementation=base).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.fill_(1.0 if name.endswith(("ln_1.weight", "ln_2.weight", "ln_f.weight")) else 0.0)
        _mirrored(model.transformer.wte.weight, TOKEN, torch.eye(VOCAB))
        _mirrored(model.transformer.wpe.weight, PLACE, torch.eye(POSITIONS))
        first = model.transformer.h[0].attn
        shift = torch.eye(POSITIONS).roll(-1, dims=1)  # position p asks for p - 1
        shift[0] = torch.eye(POSITIONS)[0]
        _head(first, 0, PLACE, shift, PLACE, write=(TOKEN, BEFORE, 1.0), norm=4)
        for head in range(1, HEADS):
            _head(first, head, PLACE, torch.eye(POSITIONS), PLACE, norm=4)
    return model


def _mirrored(weight, field, rows):
    weight[:, field] = rows
    weight[:, field.start + WIDTH // 2 : field.stop + WIDTH // 2] = -rows


def _head(attention, head, asks, match, holds, *, norm, write=None):
    """W_q reads the field `asks` through `match`, W_k the field `holds`; `norm` = squared length of the hidden state."""
    scale = (WIDTH / norm) ** 0.5  # LayerNorm makes every 1 of the hidden state this large
    size = WIDTH // HEADS
    gain = (SHARP * size**0.5) ** 0.5 / scale
    at = slice(head * size, head * size + match.shape[1])
    attention.c_attn.weight[asks, at] = match * gain
    width = holds.stop - holds.start
    keys = slice(WIDTH + head * size, WIDTH + head * size + width)
    attention.c_attn.weight[holds, keys] = torch.eye(width) * gain
    if write is not None:
        source, target, strength = write
        width = source.stop - source.start
        values = slice(2 * WIDTH + head * size, 2 * WIDTH + head * size + width)
        attention.c_attn.weight[source, values] = torch.eye(width) * (strength / scale)
        out = torch.eye(width)
        attention.c_proj.weight[head * size : head * size + width, target] = out
        attention.c_proj.weight[
            head * size : head * size + width, target.start + WIDTH // 2 : target.stop + WIDTH // 2
        ] = -out
