"""The adapter for timm's vision transformers: on a stand-in with timm's attention module, and on timm itself where it is installed.

timm needs torchvision, which has no build for the CPU machines that run these tests; the stand-in keeps the hook honest there.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from headwise.attach import attach, find_stack, fingerprint
from headwise.attach.ablate import ablate
from headwise.edits import Edit
from headwise.errors import AttachError
from headwise.steer import Perturbation
from headwise.units import HeadSet
from tiny_helper import random


class Attention(nn.Module):
    """What timm.layers.Attention does: qkv in one projection, heads of equal size, torch's attention or the plain product."""

    def __init__(self, dim, num_heads, fused=True):
        super().__init__()
        self.num_heads, self.head_dim, self.fused_attn = num_heads, dim // num_heads, fused
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x):
        B, N, C = x.shape
        q, k, v = self.qkv(x).reshape(B, N, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
        if self.fused_attn:
            x = F.scaled_dot_product_attention(q, k, v, dropout_p=0.0)
        else:
            x = (q * self.head_dim**-0.5 @ k.mT).softmax(-1) @ v
        return self.proj(x.transpose(1, 2).reshape(B, N, C))


class Block(nn.Module):
    def __init__(self, dim, heads, fused):
        super().__init__()
        self.attn, self.mlp = Attention(dim, heads, fused), nn.Linear(dim, dim)

    def forward(self, x):
        x = x + self.attn(x)
        return x + self.mlp(x)


class StandIn(nn.Module):
    def __init__(self, heads=(4, 4, 4), fused=True):
        super().__init__()
        self.blocks = nn.Sequential(*[Block(32, h, fused) for h in heads])

    def forward(self, x):
        return self.blocks(x)


StandIn.__module__ = "timm.models.vision_transformer"


def made(**options):
    torch.manual_seed(0)
    return StandIn(**options).eval()


@torch.no_grad()
def test_edits_are_felt_and_gone_afterwards():
    model, x = made(), random(2, 9, 32)
    stack, plain = find_stack(model), model(x)
    assert (stack.pattern, stack.layers, stack.heads, stack.head_dim) == ("blocks.*.attn", 3, 4, 8)
    assert fingerprint(model).layers == 3
    for layer in range(3):
        for head in range(4):
            with ablate(model, HeadSet.of([(layer, head)])):
                assert not torch.equal(model(x), plain)
    assert torch.equal(model(x), plain)


@torch.no_grad()
def test_zero_is_zeroed_columns_and_identity_is_v():
    model, other, x = made(), made(), random(2, 9, 32)
    other.blocks[1].attn.proj.weight[:, 8:16] = 0
    with ablate(model, "L1H1"):
        torch.testing.assert_close(model(x), other(x))
    seen = []
    with Perturbation(heads=HeadSet.parse("L0H2"), u=1.0).attached(model):
        with attach(model, observers=[lambda call, out: seen.append((call, out.clone()))]):
            model(x)
    call, out = seen[0]
    assert torch.equal(out[:, :, 2], call.v[:, 2])


def test_attention_without_the_fused_kernel_is_refused():
    with pytest.raises(AttachError, match=r"was not reached.*set_fused_attn"):
        attach(made(fused=False), edits=Edit.zero(HeadSet.parse("L0H0")))


def test_stages_of_other_heads_are_refused():
    with pytest.raises(AttachError, match="differ between layers"):
        find_stack(made(heads=(2, 4)))
    with pytest.raises(AttachError, match="one is needed"):
        find_stack(made(), "nowhere")


@torch.no_grad()
def test_a_vit_of_timm_itself():
    timm = pytest.importorskip(
        "timm", reason="needs timm (and torchvision): pip install 'headwise[vision]'", exc_type=ImportError
    )
    model = timm.create_model("vit_tiny_patch16_224", img_size=64, pretrained=False).eval()
    x = random(2, 3, 64, 64)
    plain = model(x)
    assert (find_stack(model).layers, find_stack(model).heads) == (12, 3)
    for head in range(3):
        with ablate(model, HeadSet.of([(5, head)])):
            assert not torch.equal(model(x), plain)
    assert torch.equal(model(x), plain)
