"""The cache among the arguments of a call: one name in transformers before 5.24 and another since, and headwise follows either."""

import ast
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import DynamicCache

import headwise
from headwise.arguments import CACHE_NAMES, argument_names, bound, cache_argument, cache_name, cache_of, with_cache
from headwise.plan import HeadPlan, SinkWindow
from headwise.tasks import perplexity
from tiny_helper import DECODERS, generate, tiny, tokens


class Old(nn.Module):
    def forward(self, hidden_states, past_key_values=None, **kwargs): ...


class New(nn.Module):
    def forward(self, hidden_states, cache=None, **kwargs): ...


class Wrapper(nn.Module):
    def forward(self, *args, **kwargs): ...


NAMES = [(Old(), "past_key_values"), (New(), "cache")]


@pytest.mark.parametrize("module, name", NAMES)
def test_a_cache_is_found_by_either_name_and_at_its_place(module, name):
    for args, kwargs in [(("x", 7), {}), (("x",), {"past_key_values": 7}), (("x",), {"cache": 7, "y": 1})]:
        given = bound(module, args, kwargs)
        assert given["hidden_states"] == "x" and given["cache"] == 7 and "past_key_values" not in given
    assert "cache" not in bound(module, ("x",), {})
    other = next(n for n in CACHE_NAMES if n != name)
    assert bound(module, (), {other: 1, name: 2})["cache"] == 2  # what the module itself would read


@pytest.mark.parametrize("module, name", NAMES)
def test_a_cache_is_put_where_the_module_takes_it(module, name):
    assert with_cache(module, ("x", 7, 8), {"y": 1}, 9) == (("x", 9, 8), {"y": 1})
    assert with_cache(module, ("x",), {"past_key_values": 7, "cache": 8, "y": 1}, None) == (
        ("x",),
        {"y": 1, name: None},
    )
    assert cache_argument(module, 9) == {name: 9}


def test_a_wrapper_is_called_as_transformers_calls_its_models():
    model = tiny()
    assert cache_name(Wrapper()) == cache_name(model) == cache_name(model.base_model)
    assert cache_name(model) in argument_names(model)


def test_an_output_is_read_without_asking_for_the_name_of_before():
    class Output:
        cache = None

        @property
        def past_key_values(self):
            raise AssertionError("the old name was asked for")

    assert cache_of(Output()) is None and cache_of(tiny()(tokens(1, 3), use_cache=False)) is None
    assert isinstance(cache_of(tiny()(tokens(1, 3), use_cache=True)), DynamicCache)


@pytest.mark.parametrize("name", DECODERS)
def test_every_tiny_decoder_and_its_attention_take_the_same_name(name):
    model = tiny(name)
    wanted = cache_name(model)
    for module in (model.base_model, *headwise.find_stack(model).modules):
        assert wanted in argument_names(module)


@torch.no_grad()
@pytest.mark.parametrize("level", ["model", "base_model"])
def test_a_plan_takes_a_cache_by_every_name_that_the_model_takes(level):
    model, plan, ids = tiny(), HeadPlan.uniform(SinkWindow(2, 6), layers=3, kv_heads=2), tokens(2, 20)
    names = {"past_key_values", cache_name(model)}
    with headwise.attach(model, plan=plan):
        for name in sorted(names):
            callee, cache = model if level == "model" else model.base_model, headwise.HeadwiseCache(plan)
            out = callee(ids, **{name: cache}, use_cache=True)
            assert cache_of(out) is cache and cache.get_seq_length() == 20
            none = callee(ids, **{name: None}, use_cache=True)
            assert type(cache_of(none)) is headwise.HeadwiseCache and torch.equal(out[0], none[0])


@torch.no_grad()
def test_own_paths_do_not_use_a_name_that_transformers_gives_up():
    model, plan = tiny(), HeadPlan.uniform(SinkWindow(2, 6), layers=3, kv_heads=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        with headwise.attach(model, plan=plan):
            generate(model, {"input_ids": tokens(2, 20)}, 4)
        through = perplexity(model, tokens(1, 40)[0], window=20, through="cache", step=4)
    assert through > 1


def test_only_one_file_knows_the_names():
    """Everywhere else the cache is passed and read by `headwise.arguments`."""
    package, knows = Path(headwise.__file__).parent, []
    for file in sorted(package.rglob("*.py")):
        text = file.read_text(encoding="utf-8")
        if "past_key_values" not in text:
            continue
        for node in ast.walk(ast.parse(text)):
            said = [getattr(node, field, None) for field in ("arg", "attr", "id", "value")]
            if "past_key_values" in said:
                knows.append(str(file.relative_to(package)))
    assert set(knows) <= {"arguments.py"}
