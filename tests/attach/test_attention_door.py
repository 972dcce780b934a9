"""The attention call of a module is taken, and nobody else's: other threads, other tools and torch itself stay as they were."""

import threading

import pytest
import test_timm
import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

from headwise.attach import attach, find_stack
from headwise.attach.attention_door import ATTENTION, DOOR
from headwise.attach.diffusers_hook import _BY_DOOR
from headwise.edits import Edit
from headwise.errors import AttachError
from headwise.units import HeadSet
from tiny_helper import random

Q = random(1, 2, 5, 8)


class Times:
    """A taker that multiplies, and calls torch itself."""

    def __init__(self, factor):
        self.factor, self.calls = factor, 0

    def take(self, attention, args, kwargs):
        self.calls += 1
        assert torch.equal(F.scaled_dot_product_attention(*args, **kwargs), attention(*args, **kwargs))
        return self.factor * attention(*args, **kwargs)


def call():
    return F.scaled_dot_product_attention(Q, Q, Q)


PLAIN = call()


def test_blocks_nest_and_end_with_errors_too():
    outer, inner = Times(2), Times(3)

    def breaks():
        with DOOR.inside(inner):
            assert torch.equal(call(), 3 * PLAIN)
            raise ZeroDivisionError

    with DOOR.inside(outer):
        with pytest.raises(ZeroDivisionError):
            breaks()
        assert torch.equal(call(), 2 * PLAIN)
    assert F.scaled_dot_product_attention is ATTENTION and (outer.calls, inner.calls) == (1, 1)


def test_each_thread_has_a_taker_of_its_own():
    """Twenty threads, half of them with a taker, all inside at once."""
    barrier, found = threading.Barrier(20), {}

    def work(n):
        barrier.wait()
        if n % 2:
            found[n] = [torch.equal(call(), PLAIN) for _ in range(50)]
            return
        with DOOR.inside(Times(n + 2)):
            found[n] = [torch.equal(call(), (n + 2) * PLAIN) for _ in range(50)]

    threads = [threading.Thread(target=work, args=(n,)) for n in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 20 and all(all(rows) for rows in found.values())
    assert F.scaled_dot_product_attention is ATTENTION


def test_function_modes_of_others_still_see_torch():
    """diffusers' own hooks compare what is called with what stands in torch's place."""

    class Peer(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            if func is torch.nn.functional.scaled_dot_product_attention:
                return args[2] + 1
            return func(*args, **(kwargs or {}))

    with DOOR.inside(taker := Times(2)), Peer():
        found = call()
    assert taker.calls == 1 and torch.equal(found, 2 * (Q + 1))


def test_what_another_library_put_there_is_called(monkeypatch):
    seen = []
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *args, **kw: seen.append(1) or ATTENTION(*args, **kw))
    theirs = F.scaled_dot_product_attention
    with DOOR.inside(Times(2)):
        assert torch.equal(call(), 2 * PLAIN)
    assert len(seen) == 3 and F.scaled_dot_product_attention is theirs


class Direct(test_timm.Attention):
    """Holds on to torch's function itself."""

    def forward(self, x):
        B, N, C = x.shape
        q, k, v = self.qkv(x).reshape(B, N, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
        return self.proj(ATTENTION(q, k, v).transpose(1, 2).reshape(B, N, C))


def model(kind):
    made = test_timm.made()
    for block in made.blocks:
        block.attn = kind(32, 4).eval()
    return made


@pytest.mark.parametrize("kind, by_door", [(test_timm.Attention, True), (Direct, False)])
@torch.no_grad()
def test_modules_are_reached_however_they_call(kind, by_door):
    made, x = model(kind), random(2, 6, 32)
    plain = made(x)
    with attach(made, edits=Edit.zero(HeadSet.parse("L1H2"))):
        assert bool(_BY_DOOR[find_stack(made).owner]) is by_door
        assert not torch.equal(made(x), plain)
    assert torch.equal(made(x), plain)


def test_without_torchs_attention_nothing_is_reached():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.num_heads, self.qkv, self.proj = 4, nn.Linear(32, 96), nn.Linear(32, 32)

        def forward(self, x):
            return self.proj(self.qkv(x)[..., :32])

    made = test_timm.made()
    for block in made.blocks:
        block.attn = Own()
    with pytest.raises(AttachError, match="was not reached"):
        attach(made, edits=Edit.zero(HeadSet.parse("L0H0")))
    assert F.scaled_dot_product_attention is ATTENTION
