"""What BAM refuses: models and tokenizers that do not fit together, options that make no sense."""

import copy

import pytest
import torch
from bam_helper import cohere

from headwise.errors import RouteError
from headwise.route.bam import bam
from tiny_helper import tiny


def test_models_that_do_not_fit_together_are_refused():
    llama, qwen = tiny("llama"), tiny("qwen3")
    with pytest.raises(RouteError, match="at least 2"):
        bam([llama], None)
    with pytest.raises(RouteError, match="Qwen3"):
        bam([llama, qwen], None)
    other = cohere(rope_theta=7.0)
    with pytest.raises(RouteError, match="config"):
        bam([cohere(), other], None)
    with pytest.raises(RouteError, match="dtype"):
        bam([llama, copy.deepcopy(llama).to(torch.bfloat16)], None)
    with torch.no_grad():
        odd = copy.deepcopy(llama)
        odd.model.norm.bias = torch.nn.Parameter(torch.zeros(64))
    with pytest.raises(RouteError, match="differ in tensors: model.norm.bias"):
        bam([llama, odd], None)
    with pytest.raises(RouteError, match="layer 0"):
        bam([tiny("gpt2")] * 2, None)
    with pytest.raises(RouteError, match="tie_word_embeddings"):
        bam([cohere(tie_word_embeddings=True), cohere(tie_word_embeddings=False)], None)


def test_tokenizers_must_share_a_vocabulary():
    class Words:
        def __init__(self, words):
            self.words = words

        def get_vocab(self):
            return self.words

    llama = tiny("llama")
    with pytest.raises(RouteError, match="vocabulary"):
        bam([llama, llama], [Words({"a": 0}), Words({"b": 0})])
    with pytest.raises(RouteError, match="1 tokenizers"):
        bam([llama, llama], [Words({"a": 0})])


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"ffn_top_k": 3}, "ffn_top_k"),
        ({"attention_k": 0}, "attention_k"),
        ({"attention_k": 3}, "attention_k"),
        ({"attention_k": 1, "attention": "average"}, "attention_k"),
        ({"kv": "own"}, "kv"),
        ({"ffn_gate": "sum"}, "ffn_gate"),
        ({"ffn_gate": "renorm"}, "renorm"),
        ({"balance": -1.0}, "balance"),
        ({"router_std": float("nan")}, "router_std"),
        ({"parallel": True}, "sequential"),
    ],
)
def test_bad_options_are_refused(options, text):
    llama = tiny("llama")
    with pytest.raises(RouteError, match=text):
        bam([llama, llama], None, **options)


def test_parallel_blocks_are_known():
    assert bam([cohere()] * 2, None, parallel=True).parallel
    with pytest.raises(RouteError, match="parallel"):
        bam([cohere()] * 2, None, parallel=False)
