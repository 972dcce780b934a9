"""Tiny models for the tests of routers."""

import pytest
import torch

from headwise.hub import load_model


@pytest.fixture
def llama():
    """A tiny Llama (3 layers, 4 heads, 2 kv heads, width 64), fresh for each test."""
    return load_model("tiny-random-llama")[0]


@pytest.fixture
def ids():
    return torch.randint(0, 256, (2, 21), generator=torch.Generator().manual_seed(3))
