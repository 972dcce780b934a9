"""Attention rows that are said from outside."""

import pytest
import torch

from headwise.attach import attach
from headwise.attach.observe import observe
from headwise.attach.set_pattern import SetPattern
from headwise.edits import Edit
from headwise.errors import EditError
from headwise.hub import load_model
from headwise.units import HeadSet

HEAD = HeadSet.parse("L1H2")


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3-moe"])
@pytest.mark.parametrize("base", ["sdpa", "eager"])
def test_equal_weights_on_all_keys_are_a_uniform_head(name, base):
    model, _ = load_model(f"tiny-random-{name}", attn_implementation=base)
    ids = torch.arange(9)[None]
    with attach(model, edits=Edit.uniform(HEAD, tokens="last")):
        wanted = model(ids).logits[:, -1]
    look = SetPattern(HEAD, torch.tensor([8]), torch.arange(9)[None])
    with attach(model, transforms=[look]):
        got = model(ids).logits[:, -1]
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3-moe"])
@pytest.mark.parametrize("base", ["sdpa", "eager"])
def test_the_heads_own_pattern_is_the_identity(name, base):
    model, _ = load_model(f"tiny-random-{name}", attn_implementation=base)
    ids = torch.arange(9)[None]
    with torch.no_grad():
        tests = {str(j): (lambda pos, j=j: pos == j) for j in range(9)}
        with observe(model, rows="last", mass=tests) as record:
            before = model(ids).logits
        own = torch.stack([record.table(str(j))[1, 0, 2, -1] for j in range(9)])[None]
        assert own.sum() == pytest.approx(1.0, abs=1e-5)
        with attach(model, transforms=[SetPattern(HEAD, torch.tensor([8]), torch.arange(9)[None], own)]):
            torch.testing.assert_close(model(ids).logits, before, rtol=1e-6, atol=1e-6)


def test_cached_decoding_is_the_whole_pass():
    model, _ = load_model("tiny-random-llama")
    ids = torch.arange(18).view(2, 9)
    look = SetPattern(HEAD, torch.tensor([8, 8]), torch.tensor([[1, 3], [0, 2]]))
    with torch.no_grad(), attach(model, transforms=[look]):
        whole = model(ids).logits[:, -1]
        cache = model(ids[:, :8], use_cache=True).past_key_values
        step = model(ids[:, 8:], past_key_values=cache).logits[:, -1]
    torch.testing.assert_close(step, whole, rtol=1e-5, atol=1e-5)


def test_padding_and_the_future_are_refused():
    model, _ = load_model("tiny-random-llama")
    with pytest.raises(EditError, match="behind its query"):
        SetPattern(HEAD, torch.tensor([3]), torch.tensor([[4]]))
    with pytest.raises(EditError, match="sum 1"):
        SetPattern(HEAD, torch.tensor([3]), torch.tensor([[1, 2]]), torch.tensor([[0.5, 0.4]]))
    mask = torch.tensor([[0, 0, 1, 1, 1, 1]])
    look = SetPattern(HEAD, torch.tensor([5]), torch.tensor([[1]]))
    with pytest.raises(EditError, match="padding"), attach(model, transforms=[look]):
        model(torch.arange(6)[None], attention_mask=mask)
