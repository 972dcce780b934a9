"""One attention layer that learns to regress in context, and nothing else: no residual, norm, positions, MLP or biases.

    f(Z, z_q) = sum_h O_h V_h Z^T softmax(Z K_h^T Q_h z_q / sqrt(n)),        Q, K, V (n, n), O_h (T, n)

The query reads the L pairs and never itself. Two products are all that the function depends on, the effective circuits

    KQ_h = K_h^T Q_h / sqrt(n)  (n, n),        OV_h = O_h V_h  (T, n)

so `circuit_forward` computes it from them, for several models at once. Sizes: d covariates, T tasks, n = d + T; S models, B sequences,
L pairs, H heads.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from headwise.checks import whole
from headwise.errors import TaskError


class Circuits(NamedTuple):
    """kq (…, H, n, n): logit of a pair z is z^T kq z_q; ov (…, T, H, n): what a head writes of the pair it reads."""

    kq: Tensor
    ov: Tensor


class Weights(NamedTuple):
    """q, k, v (…, H, n, n) and o (…, T, H, n)."""

    q: Tensor
    k: Tensor
    v: Tensor
    o: Tensor

    def circuits(self) -> Circuits:
        """The effective circuits of every head; gradients flow."""
        kq = self.k.mT @ self.q / self.q.shape[-1] ** 0.5
        return Circuits(kq, torch.einsum("...thi,...hij->...thj", self.o, self.v))


def circuit_forward(circuits: Circuits, z: Tensor, z_q: Tensor, *, linear: bool = False) -> Tensor:
    """Per-head outputs (S, B, T, H), whose sum over H is the prediction; z (S, B, L, n), z_q (S, B, n).

    linear: logits / L in place of their softmax: attention without normalisation, at the length of the data at hand.
    """
    reading = torch.einsum("shij,sbj->sbhi", circuits.kq, z_q)
    logits = reading @ z.mT  # (S, B, H, L)
    rows = logits / z.shape[-2] if linear else logits.softmax(-1)
    return torch.einsum("sthi,sbhi->sbth", circuits.ov, rows @ z)


class RegressionConfig(PreTrainedConfig):
    """d covariates, T tasks, H heads of n = d + T."""

    model_type = "headwise-icl-regression"

    def __init__(self, dim: int = 5, tasks: int = 1, heads: int = 2, **options: Any):
        for name, value in (("dim", dim), ("tasks", tasks), ("heads", heads)):
            whole(name, value, 1, TaskError)
        self.dim, self.tasks, self.heads = dim, tasks, heads
        self.num_attention_heads, self.num_hidden_layers = heads, 1
        self.hidden_size = self.head_dim = dim + tasks
        super().__init__(**options)


class RegressionAttention(nn.Module):
    """The attention of the model, through transformers' interface: `headwise.ablate`, `attach` and `observe` reach its heads."""

    is_causal = False

    def __init__(self, config: RegressionConfig):
        super().__init__()
        n, H = config.head_dim, config.num_attention_heads
        self.config, self.head_dim, self.layer_idx, self.num_key_value_groups = config, n, 0, 1
        self.scaling = n**-0.5
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(n, H * n, bias=False) for _ in range(3))
        self.out_proj = nn.Linear(H * n, config.tasks, bias=False)

    def forward(self, z: Tensor, z_q: Tensor) -> Tensor:
        """(B, T) from z (B, L, n) and z_q (B, n)."""
        q, k, v = (
            proj(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for proj, x in ((self.q_proj, z_q[:, None]), (self.k_proj, z), (self.v_proj, z))
        )
        implementation = self.config._attn_implementation
        attend = eager_attention_forward if implementation == "eager" else ALL_ATTENTION_FUNCTIONS[implementation]
        out, _ = attend(self, q, k, v, None, scaling=self.scaling, dropout=0.0, is_causal=False)
        return self.out_proj(out.flatten(2))[:, 0]


def eager_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """The literal softmax: out (B, N, H, D), weights (B, H, N, L)."""
    weights = (query @ key.mT * scaling).softmax(-1)
    return (weights @ value).transpose(1, 2).contiguous(), weights


class _Layer(nn.Module):
    def __init__(self, config: RegressionConfig):
        super().__init__()
        self.attention = RegressionAttention(config)

    def forward(self, z: Tensor, z_q: Tensor) -> Tensor:
        return self.attention(z, z_q)


class RegressionModel(PreTrainedModel):
    """The attention layer as a transformers model: `save_pretrained`, `from_pretrained`, `headwise.attach`.

    >>> model = RegressionModel(RegressionConfig(dim=3, heads=2))
    >>> model(torch.ones(4, 8, 4), torch.ones(4, 4)).shape
    torch.Size([4, 1])
    """

    config_class = RegressionConfig
    _supports_sdpa = True
    main_input_name = "z"

    def __init__(self, config: RegressionConfig):
        super().__init__(config)
        self.layers = nn.ModuleList([_Layer(config)])
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """torch's own initialisation of linear layers stays."""

    def forward(self, z: Tensor, z_q: Tensor) -> Tensor:
        """Predictions (B, T) from z (B, L, n) and z_q (B, n)."""
        size = self.config.head_dim
        if z.ndim != 3 or z.shape[-1] != size or z_q.shape != (z.shape[0], size) or not z.shape[1]:
            raise TaskError(
                f"z {tuple(z.shape)} and z_q {tuple(z_q.shape)} must be (B, L, n) and (B, n) with n = {size}, L > 0"
            )
        return self.layers[0](z, z_q)

    @property
    def weights(self) -> Weights:
        """The projections, head by head; views, so that gradients reach them."""
        module: Any = self.layers[0].attention
        n = self.config.head_dim
        q, k, v = (proj.weight.unflatten(0, (-1, n)) for proj in (module.q_proj, module.k_proj, module.v_proj))
        return Weights(q, k, v, module.out_proj.weight.unflatten(1, (-1, n)))

    @property
    def circuits(self) -> Circuits:
        """kq (H, n, n) and ov (T, H, n)."""
        return self.weights.circuits()

    @classmethod
    @torch.no_grad()
    def of(cls, weights: Weights) -> RegressionModel:
        """A model with these weights: q, k, v (H, n, n), o (T, H, n)."""
        H, n = weights.q.shape[:2]
        T = len(weights.o)
        model = cls(RegressionConfig(dim=n - T, tasks=T, heads=H)).to(weights.q.dtype)
        for mine, given in zip(model.weights, weights, strict=True):
            mine.copy_(given)
        return model.eval()
