"""A small LLaVA (a CLIP vision tower, a projector, a Llama decoder) trained on the scenes of `headwise.tasks.scenes`.

Its training data hold a habit of speech that pictures do not bear out, so that it names things that are not there: a model
to study hallucination with, in seconds on a CPU.
"""

from __future__ import annotations

import copy
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, get_args

import torch
from torch import Tensor

from headwise.checks import finite, whole
from headwise.errors import TaskError
from headwise.models.loop import Run, train, warm_cosine
from headwise.tasks.scenes import BOS, CELL, EOS, IMAGE, PAD, SIDE, WORDS, Task, make_scenes, make_talk, scene_tokenizer

if TYPE_CHECKING:
    from transformers import LlavaForConditionalGeneration

RESERVED = 2
"""The last dimensions of the residual stream, in which nothing is written: room for planted activations."""

SIZES: dict[str, dict[str, int]] = {
    "small": {"width": 128, "layers": 4, "heads": 8, "kv_heads": 4, "mlp": 256, "vision": 64},
    "medium": {"width": 128, "layers": 8, "heads": 8, "kv_heads": 4, "mlp": 192, "vision": 64},
    "large": {"width": 256, "layers": 6, "heads": 16, "kv_heads": 8, "mlp": 640, "vision": 128},
}
TASKS = {
    "small": {"describe": 0.6, "count": 0.4},
    "medium": {"describe": 0.5, "at": 0.3, "count": 0.2},
    "large": {"describe": 0.4, "at": 0.4, "count": 0.2},
}
"""Shares of the questions about pictures; what stands at a cell takes more steps to learn than a CPU has time for."""

QUESTIONS = 5
"""How many questions about one picture are asked in a row while training."""


def scene_vlm(size: str = "small", *, seed: int = 0) -> LlavaForConditionalGeneration:
    """The model with random weights; `train_scene_vlm` trains it.

    >>> from headwise.tasks.scenes import make_scenes
    >>> model = scene_vlm()
    >>> made = make_scenes(2, generator=torch.Generator().manual_seed(0))
    >>> model(**made.inputs()).logits.shape
    torch.Size([2, 19, 37])
    """
    from transformers import LlavaForConditionalGeneration

    if size not in SIZES:
        raise TaskError(f"size={size!r}; choose {', '.join(SIZES)}")
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        model = LlavaForConditionalGeneration._from_config(_config(**SIZES[size]), attn_implementation="sdpa")
        places = model.get_submodule("model.vision_tower").get_submodule("embeddings.position_embedding")
        torch.nn.init.normal_(
            places.weight, std=0.2
        )  # as large as the patches: where a thing is counts as much as what
    model.generation_config.pad_token_id = PAD
    _keep_reserved(model)
    return model.eval()


def _config(width: int, layers: int, heads: int, kv_heads: int, mlp: int, vision: int) -> Any:
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig

    ids = {"pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS}
    sight = CLIPVisionConfig(
        hidden_size=vision,
        intermediate_size=2 * vision,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=SIDE * CELL,
        patch_size=CELL,
    )
    text = LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=width,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=16,
        max_position_embeddings=128,
        tie_word_embeddings=False,
        **ids,
    )
    return LlavaConfig(
        vision_config=sight,
        text_config=text,
        image_token_id=IMAGE,
        image_seq_length=SIDE * SIDE,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        architectures=["LlavaForConditionalGeneration"],
    )


@dataclass(frozen=True, kw_only=True)
class SceneData:
    """What a scene model learns from: `talk` of the rows of a batch are speech without a picture, the others questions about pictures.

    The scenes of each task are a pool of `pool`, of which rows are drawn with fresh `noise`. `slip` of the descriptions' firsts
    are followed by a second that is not in the picture.
    """

    batch: int = 64
    talk: float = 0.5
    slip: float = 0.25
    noise: float = 0.7
    pool: int = 6000

    def __post_init__(self) -> None:
        for name in ("batch", "pool"):
            whole(name, getattr(self, name), 1, TaskError)
        for name in ("talk", "slip"):
            if not 0 <= finite(name, getattr(self, name), TaskError) <= 1:
                raise TaskError(f"{name} is {getattr(self, name):g}; it is a share, in [0, 1]")
        if finite("noise", self.noise, TaskError) < 0:
            raise TaskError(f"noise is {self.noise:g}; it is a standard deviation, at least 0")


def train_scene_vlm(
    size: str = "small",
    *,
    steps: int = 1200,
    data: SceneData | None = None,
    lr: float = 2e-3,
    seed: int = 0,
    device: str | torch.device = "cpu",
    run: Run | None = None,
    progress: bool = False,
) -> tuple[LlavaForConditionalGeneration, list[float]]:
    """Train one; gives it and the loss of every step. `run` has a folder with checkpoints, and takes the place of `steps`.

    AdamW; the rate rises for a tenth of the steps and falls along a cosine. 1200 steps of 64 rows take under three minutes on two
    cores for size "small".
    """
    run = run or Run(steps=steps, progress=progress, title="training on scenes")
    data = data or SceneData()
    generator = torch.Generator().manual_seed(seed + 1)
    pools = _pools(min(data.pool, run.steps * data.batch), data.slip, generator, device)
    model = scene_vlm(size, seed=seed).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.05)
    spoken = round(data.batch * data.talk)

    def loss_of(step: int) -> Tensor:
        parts = []
        for name, count in ((_task_of(step, TASKS[size]), data.batch - spoken), ("talk", spoken)):
            if count:
                rows = _sample(pools[name], count, data.noise, generator)
                parts.append(model(**rows).loss * (count / data.batch))
        return torch.stack(parts).sum()

    losses = train(
        run,
        model,
        [optimizer],
        loss_of,
        rate=warm_cosine(max(1, run.steps // 10), run.steps),
        generator=generator,
        after_step=lambda: _keep_reserved(model),
    )
    return model, losses


def save_scene_vlm(model: LlavaForConditionalGeneration, folder: str | os.PathLike[str]) -> None:
    """Write model (bfloat16) and tokenizer to a folder that `load_model` reads; the model given stays as it is."""
    copy.deepcopy(model).to("cpu", torch.bfloat16).save_pretrained(folder)
    scene_tokenizer().save_pretrained(folder)


def _pools(
    size: int, slip: float, generator: torch.Generator, device: str | torch.device
) -> dict[str, dict[str, Tensor]]:
    """Rows of each task and of speech, ready for training, with pictures without noise."""
    made = {"talk": make_talk(size, generator=generator)}
    for task in get_args(Task):
        questions = 1 if task == "describe" else QUESTIONS
        scenes = make_scenes(size, task=task, questions=questions, slip=slip, noise=0.0, generator=generator)
        made[task] = scenes.training()
    return {task: {name: rows.to(device) for name, rows in pool.items()} for task, pool in made.items()}


def _sample(pool: dict[str, Tensor], count: int, noise: float, generator: torch.Generator) -> dict[str, Tensor]:
    """`count` rows of a pool, their pictures with fresh noise; drawn on the CPU, so that every device gets the same."""
    device = pool["input_ids"].device
    chosen = torch.randint(len(pool["input_ids"]), (count,), generator=generator).to(device)
    rows = {name: tensor[chosen] for name, tensor in pool.items()}
    if "pixel_values" in rows:
        pixels = rows["pixel_values"]
        rows["pixel_values"] = pixels + noise * torch.randn(pixels.shape, generator=generator).to(device)
    return rows


def _task_of(step: int, shares: dict[str, float]) -> str:
    """Tasks in turn, in their shares, every ten steps."""
    order = [name for name, share in shares.items() for _ in range(round(10 * share))]
    return order[step * 7 % 10]


@torch.no_grad()
def _keep_reserved(model: LlavaForConditionalGeneration) -> None:
    """Nothing writes to the reserved dimensions, and nothing reads them."""
    decoder = model.model.language_model
    for weight in (decoder.embed_tokens.weight, model.lm_head.weight):
        weight[:, -RESERVED:] = 0
    linear = model.model.multi_modal_projector.linear_2
    linear.weight[-RESERVED:] = 0
    linear.bias[-RESERVED:] = 0
    for layer in decoder.layers:
        for writes in (layer.self_attn.o_proj, layer.mlp.down_proj):
            writes.weight[-RESERVED:] = 0
        attention, mlp = layer.self_attn, layer.mlp
        for reads in (attention.q_proj, attention.k_proj, attention.v_proj, mlp.gate_proj, mlp.up_proj):
            reads.weight[:, -RESERVED:] = 0


__all__ = ["RESERVED", "SIZES", "SceneData", "scene_vlm", "train_scene_vlm"]
