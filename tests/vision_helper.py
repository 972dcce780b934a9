"""Tiny random diffusers transformers with their inputs; importing this module needs diffusers."""

import torch
from diffusers import (
    DiTTransformer2DModel,
    FluxTransformer2DModel,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
)

from tiny_helper import random


def sd3(**options):
    fields = dict(sample_size=8, patch_size=2, in_channels=4, num_layers=3, attention_head_dim=8, num_attention_heads=4)
    fields |= dict(joint_attention_dim=32, caption_projection_dim=32, pooled_projection_dim=16, out_channels=4)
    return SD3Transformer2DModel(**fields, pos_embed_max_size=16, **options)


def flux():
    fields = dict(patch_size=1, in_channels=4, num_layers=2, num_single_layers=2, attention_head_dim=16)
    fields |= dict(num_attention_heads=2, joint_attention_dim=32, pooled_projection_dim=16, axes_dims_rope=(4, 4, 8))
    return FluxTransformer2DModel(**fields)


def pixart():
    fields = dict(num_attention_heads=4, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=2)
    fields |= dict(cross_attention_dim=32, sample_size=8, patch_size=2, caption_channels=16)
    return PixArtTransformer2DModel(**fields, use_additional_conditions=False)


def dit():
    fields = dict(num_attention_heads=4, attention_head_dim=8, in_channels=4, num_layers=3, sample_size=8)
    return DiTTransformer2DModel(**fields, patch_size=2, num_embeds_ada_norm=10, norm_num_groups=4)


MODELS = {"sd3": sd3, "flux": flux, "pixart": pixart, "dit": dit}


def model(name, **options):
    """A model whose freshly zeroed layers are random too, in eval mode."""
    torch.manual_seed(0)
    made = MODELS[name](**options).eval()
    generator = torch.Generator().manual_seed(1)
    for parameter in made.parameters():
        if not parameter.detach().any():
            torch.nn.init.normal_(parameter, std=0.05, generator=generator)
    return made


def inputs(name, *, batch=2, text=7):
    grid = random(batch, 4, 8, 8)
    if name == "sd3":
        t = torch.linspace(100, 900, batch)
        return dict(hidden_states=grid, encoder_hidden_states=random(batch, text, 32, seed=1), timestep=t,
                    pooled_projections=random(batch, 16, seed=2))  # fmt: skip
    if name == "flux":
        return dict(hidden_states=random(batch, 16, 4), encoder_hidden_states=random(batch, text, 32, seed=1),
                    pooled_projections=random(batch, 16, seed=2), timestep=torch.linspace(0.1, 0.9, batch),
                    img_ids=torch.arange(48.0).reshape(16, 3), txt_ids=torch.zeros(text, 3))  # fmt: skip
    if name == "pixart":
        return dict(hidden_states=grid, encoder_hidden_states=random(batch, text, 16, seed=1),
                    timestep=torch.arange(batch), added_cond_kwargs={"resolution": None, "aspect_ratio": None})  # fmt: skip
    return dict(hidden_states=grid, timestep=torch.arange(batch), class_labels=torch.arange(batch))


@torch.no_grad()
def predict(made, batch):
    return made(**batch).sample
