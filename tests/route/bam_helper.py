"""Models to be mixed, for the tests of BAM: small ones of four kinds, and copies of them as if trained apart."""

import copy

import torch
from transformers import CohereConfig, CohereForCausalLM, Qwen2Config, Qwen2ForCausalLM

from tiny_helper import tiny, tokens

KV = ("expert", "shared")


def specialists(model, count=2, noise=0.05):
    """The model and copies of it with noise on every weight, as if trained apart."""
    made = [model]
    for seed in range(count):
        other, generator = copy.deepcopy(model), torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for value in other.parameters():
                value.add_(noise * torch.randn(value.shape, generator=generator).to(value.dtype))
        made.append(other)
    return made


def cohere(**options):
    """The paper's block: one norm, attention and gated feed-forward layer in parallel."""
    sizes = {"vocab_size": 320, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    config = CohereConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, logit_scale=1.0, **options)
    torch.manual_seed(0)
    return CohereForCausalLM(config).eval()


def with_biases():
    sizes = {"vocab_size": 320, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    model = Qwen2ForCausalLM(Qwen2Config(**sizes, num_attention_heads=4, num_key_value_heads=2)).eval()
    with torch.no_grad():
        for name, value in model.named_parameters():
            if name.endswith("bias"):
                value.normal_(generator=torch.Generator().manual_seed(1))
    return model


MODELS = {"llama": lambda: tiny("llama"), "qwen3": lambda: tiny("qwen3"), "cohere": cohere, "biases": with_biases}


@torch.no_grad()
def logits(model, ids=None):
    return model(tokens(2, 15) if ids is None else ids).logits
