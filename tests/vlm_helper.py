"""Small vision-language models and prompts for tests."""

import torch

from headwise.hub import load_model

IMAGE = 259
PATCHES = 16


def llava(**options):
    return load_model("tiny-random-llava", **options)[0]


def prompt(*rows, padding="left", seed=0):
    """Inputs of tiny-random-llava. A row is a list of token ids in which "img" stands for one picture."""
    lists = [[i for part in row for i in ([IMAGE] * PATCHES if part == "img" else [part])] for row in rows]
    longest = max(map(len, lists))
    ids, mask = [], []
    for row in lists:
        pad = [256] * (longest - len(row))
        ids.append(pad + row if padding == "left" else row + pad)
        mask.append([0] * len(pad) + [1] * len(row) if padding == "left" else [1] * len(row) + [0] * len(pad))
    pictures = sum(row.count("img") for row in rows)
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randn(pictures, 3, 32, 32, generator=generator)
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask), "pixel_values": pixels}


def one_of(inputs, row, pictures):
    """One row of a batch by itself, without padding; `pictures`: which of the batch's pictures are its own."""
    real = inputs["attention_mask"][row].bool()
    ids = inputs["input_ids"][row][real][None]
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": inputs["pixel_values"][pictures]}


def qwen2_vl(text=(5, 6, 7), grid=(1, 4, 4), rows=1, seed=0):
    """Model and inputs of tiny-random-qwen2-vl: one picture a row, 2 × 2 merged patches."""
    model = load_model("tiny-random-qwen2-vl")[0]
    count = grid[0] * grid[1] * grid[2]
    merged = count // 4
    ids = torch.tensor([[9, 261, *[IMAGE] * merged, 262, *text]]).repeat(rows, 1)
    generator = torch.Generator().manual_seed(seed)
    features = 3 * 2 * 8 * 8
    return model, {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": torch.randn(rows * count, features, generator=generator),
        "image_grid_thw": torch.tensor([grid]).repeat(rows, 1),
        "mm_token_type_ids": (ids == IMAGE).int(),
    }
