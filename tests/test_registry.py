"""The register of methods: conventions are held when a method is registered, and names are found or explained."""

import inspect
from typing import Any

import pytest

from headwise import registry
from headwise.errors import HeadwiseError
from headwise.registry import Method, MethodError, declared, get, methods, register


@pytest.fixture
def empty(monkeypatch: pytest.MonkeyPatch) -> dict[tuple[str, str], Method]:
    """A register without the library's own methods."""
    held: dict[tuple[str, str], Method] = {}
    monkeypatch.setattr(registry, "_methods", held)
    monkeypatch.setattr(registry, "load_all", lambda: None)
    return held


def scorer(model, tokenizer, *, tests: int = 3, seed: int = 0) -> Any:
    """Counts tests.

    More text.
    """
    return tests + seed


def test_registering_returns_the_function_and_keeps_its_summary(empty):
    assert register("score", "count-tests", paper="13")(scorer) is scorer
    method = get("score", "count-tests")
    assert (method.verb, method.paper, method.summary) == ("score", "13", "Counts tests.")
    assert method(None, None, tests=4, seed=1) == 5
    assert list(method.options) == ["tests", "seed"]
    assert method.options["tests"].annotation is int


def test_types_that_only_a_type_checker_imports_stay_text(empty):
    def typed(model: "Unknown", tokenizer: "Unknown", *, text: "Unknown | None" = None, count: "int" = 1) -> "Unknown":  # noqa: F821
        """Typed."""

    register("score", "typed")(typed)
    options = get("score", "typed").options
    assert options["text"].annotation == "Unknown | None"
    assert options["count"].annotation is int


def test_methods_are_sorted_and_filtered_by_verb(empty):
    for name in ("b", "a"):
        register("score", name)(_renamed(scorer, name))
    register("budget", "c")(_planner)
    assert [m.name for m in methods("score")] == ["a", "b"]
    assert [m.verb for m in methods()] == ["budget", "score", "score"]


def test_unknown_names_are_answered_with_close_ones(empty):
    register("score", "retrieval")(scorer)
    with pytest.raises(MethodError, match="did you mean 'retrieval'"):
        get("score", "retreival")
    with pytest.raises(MethodError, match="there are: retrieval"):
        get("score", "zzz")
    with pytest.raises(MethodError, match="there are: none"):
        get("budget", "duo")
    with pytest.raises(HeadwiseError, match="verb 'scores' does not exist"):
        methods("scores")


def test_a_name_is_taken_once_but_a_reload_is_fine(empty):
    register("score", "x")(scorer)
    register("score", "x")(scorer)
    with pytest.raises(MethodError, match="registered twice"):
        register("score", "x")(_renamed(scorer, "other"))


def test_the_conventions_of_a_verb_are_held_when_registering(empty):
    def no_docstring(model, tokenizer, *, a: int = 0): ...

    def one_argument(model, *, a: int = 0):
        """One."""

    def bare_option(model, tokenizer, *, a=0):
        """Bare."""

    def swallows(model, tokenizer, **options):
        """Swallows."""

    cases = [
        (no_docstring, "no docstring"),
        (one_argument, "exactly 2 positional"),
        (bare_option, "options without a type: a"),
        (swallows, "name every option"),
    ]
    for function, problem in cases:
        with pytest.raises(MethodError, match=problem):
            register("score", "x")(function)
    with pytest.raises(MethodError, match="lower case words"):
        register("score", "Not_A_Name")(scorer)
    with pytest.raises(MethodError, match="two-digit id"):
        register("score", "x", paper="moh")(scorer)
    assert not empty


def test_scale_methods_are_free_in_their_signature(empty):
    def simulate(*ranks, **options):
        """Simulates."""

    register("scale", "simulate")(simulate)
    assert get("scale", "simulate").function is simulate


def test_what_the_source_declares_is_what_is_registered():
    assert declared() == {method.verb for method in methods()}


def test_every_method_is_reached_by_its_verb_and_function_name():
    import importlib

    for method in methods():
        package, _, module = method.function.__module__.rpartition(".")
        assert package.startswith("headwise."), module
        verb = importlib.import_module(".".join(package.split(".")[:2]))
        assert getattr(verb, method.function.__name__) is method.function


def test_every_method_with_a_paper_names_a_row_of_the_table():
    from headwise.papers import rows

    ids = {row.id for row in rows()}
    assert {m.paper for m in methods() if m.paper} <= ids


def _planner(scores, *, budget: float):
    """Plans."""


def _renamed(function, name):
    def copy(model, tokenizer, *, tests: int = 3, seed: int = 0) -> Any:
        """Copies."""

    copy.__qualname__ = name
    assert inspect.isfunction(function)
    return copy
