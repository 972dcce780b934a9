"""The register of methods: the command line, the papers table and the shared test matrix are made from it.

A method is one function in one file of a verb's folder (`route/`, `score/`, `budget/`, `steer/`, `scale/`):

    @register("score", "retrieval", paper="13")
    def retrieval(model, tokenizer, *, tests: int = 20, seed: int = 0, progress: bool = False) -> HeadScores:
        "How often each head copies the needle."

What each verb takes and gives back:

| verb     | function                                                                    | result       | command            |
|----------|-----------------------------------------------------------------------------|--------------|--------------------|
| `score`  | `f(model, tokenizer, *, options…, seed: int = 0, progress: bool = False)`   | `HeadScores` | `headwise score`   |
| `budget` | `f(scores, *, budget: Budget, options…)`, or `f(model, *, …)`              | `HeadPlan`   | `headwise plan`    |
| `route`  | `f(model, tokenizer, *, options…, seed: int = 0, progress: bool = False)`   | `HeadRouter` | `headwise convert` |
| `train`  | the same; the router is trained, not derived; or a recipe, see below        | `HeadRouter` | `headwise train`   |
| `steer`  | `f(model, tokenizer, *, options…)`                                          | edits        | `headwise edit`    |
| `scale`  | free: models, ranks and simulators differ too much                          | anything     | –                  |

A planner that needs no scores takes `model`: a transformers model, or the `Fingerprint` of one, which is all that most look at.
What a planner gives back has `save` and `ratio`; one that changes reads instead of storage (LongHeads) gives a transform for `attach`.

A conversion that makes one model of several takes `(models, tokenizers)`, two lists; its command takes `--models A B C`. What it, or a
conversion that rebuilds a model, gives back has `save_pretrained` like a router.

A recipe, `f(*, options…)`, trains from scratch: it makes its model and its data itself, so it takes neither, and its command has no
`--model`. What it gives back has `save_pretrained` and `curves`, the losses of its runs.

Edits are `HeadEdits`, or `ExpertEdits` where experts are steered: anything with a text form and `save`.

Options are keyword-only and annotated. Those of a plain type (`int`, `float`, `str`, `bool`, `Literal[…]`, each also `| None`) and the
artifacts (`HeadSet`, `HeadScores`, `HeadPlan`, `Budget`) become options of the command line; an option of another type needs a default and
can be given from Python only. The first line of the docstring is the help text.
"""

import difflib
import importlib
import inspect
import pkgutil
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from headwise.errors import HeadwiseError

FOLDERS = ("route", "score", "budget", "steer", "scale")
"""Folders of the package that hold methods, one file each."""

VERBS = (*FOLDERS, "train")
"""Verbs that a method can be registered under; trainers live beside what they train."""

LEADING = {"score": 2, "route": 2, "train": 2, "steer": 2, "budget": 1}
"""How many positional arguments a verb hands over: (model, tokenizer) or (scores,)."""

ROOT = Path(__file__).parent

F = TypeVar("F", bound=Callable[..., Any])


class MethodError(HeadwiseError, LookupError):
    """A method that does not exist, or one that breaks the conventions of this module."""


@dataclass(frozen=True)
class Method:
    """One registered method.

    Attributes:
        verb: one of `VERBS`.
        name: as typed on the command line, e.g. `"retrieval"`.
        function: the callable itself; registering does not wrap it.
        paper: id of the row in the papers table (`"01"` … `"33"`), or None for a method of no paper in it.
        summary: first line of the function's docstring.
    """

    verb: str
    name: str
    function: Callable[..., Any]
    paper: str | None
    summary: str

    def __call__(self, *args: Any, **options: Any) -> Any:
        """Run the method."""
        return self.function(*args, **options)

    @property
    def options(self) -> dict[str, inspect.Parameter]:
        """Keyword-only parameters by name; annotations are types, or text where they name what is imported for type checkers only."""
        return {p.name: p for p in self._parameters() if p.kind is inspect.Parameter.KEYWORD_ONLY}

    @property
    def leading(self) -> list[inspect.Parameter]:
        """The positional parameters, annotated like `options`: of which type a planner wants its scores."""
        return [p for p in self._parameters() if p.kind is not inspect.Parameter.KEYWORD_ONLY]

    def _parameters(self) -> list[inspect.Parameter]:
        parameters = inspect.signature(self.function).parameters.values()
        return [p.replace(annotation=_evaluated(p.annotation, self.function)) for p in parameters]


_methods: dict[tuple[str, str], Method] = {}


def register(verb: str, name: str, paper: str | None = None) -> Callable[[F], F]:
    """Decorator that registers a function as a method and returns it unchanged.

    Raises `MethodError` where the function breaks the conventions of its verb, or where another function holds the name.
    """

    def decorator(function: F) -> F:
        method = Method(verb, name, function, paper, (inspect.getdoc(function) or "").split("\n")[0].strip())
        _check(method)
        held = _methods.get((verb, name))
        if held is not None and _source(held.function) != _source(function):
            raise MethodError(
                f"{verb} method {name!r} is registered twice: by {_source(held.function)} and {_source(function)}"
            )
        _methods[verb, name] = method
        return function

    return decorator


def methods(verb: str | None = None) -> list[Method]:
    """All registered methods, of one verb or of all, sorted by verb and name; loads every method file first."""
    if verb is not None:
        _known_verb(verb)
    load_all()
    return [m for key, m in sorted(_methods.items()) if verb in (None, key[0])]


def get(verb: str, name: str) -> Method:
    """The method of this verb and name; `MethodError` names the close ones."""
    _known_verb(verb)
    load_all()
    found = _methods.get((verb, name))
    if found is None:
        raise unknown(f"{verb} method", name, sorted(n for v, n in _methods if v == verb))
    return found


def unknown(what: str, name: str, names: Sequence[str]) -> MethodError:
    """The error for a name that is not among `names`: it lists close ones, or all."""
    close = difflib.get_close_matches(name, names, n=3)
    hint = f"did you mean {' or '.join(map(repr, close))}?" if close else f"there are: {', '.join(names) or 'none'}"
    return MethodError(f"no {what} is called {name!r}; {hint}")


@cache
def load_all() -> None:
    """Import every method file of every verb folder that exists, so that their decorators have run."""
    for folder in FOLDERS:
        if (ROOT / folder).is_dir():
            expose(f"headwise.{folder}")


def expose(package: str) -> None:
    """Import the method files of a verb's package and put each function they register into the package's namespace.

    The one line that a verb's `__init__.py` needs, `registry.expose(__name__)`, so that `headwise.score.retrieval(model, …)`
    works without a list kept by hand. It has to run when the package is imported: a later first import of a file would put
    the module where the function belongs.
    """
    namespace = importlib.import_module(package).__dict__
    for module in method_modules(package.rpartition(".")[2]):
        importlib.import_module(module)
    for method in _methods.values():
        if method.function.__module__.startswith(package + "."):
            namespace[method.function.__name__] = method.function


def method_modules(folder: str) -> Iterator[str]:
    """Dotted names of the method files of one folder, without importing them; `_name.py` is a private helper, not a method."""
    for module in pkgutil.iter_modules([str(ROOT / folder)]):
        if not module.name.startswith("_"):
            yield f"headwise.{folder}.{module.name}"


@cache
def declared() -> frozenset[str]:
    """Verbs that some method file registers, read from the source text: quick, imports nothing."""
    found: set[str] = set()
    for folder in FOLDERS:
        for file in (ROOT / folder).rglob("*.py"):
            found.update(
                re.findall(r'^@(?:\w+\.)?register\(\s*"(\w+)"', file.read_text(encoding="utf-8"), re.MULTILINE)
            )
    return frozenset(found)


def _known_verb(verb: str) -> None:
    if verb not in VERBS:
        raise MethodError(f"verb {verb!r} does not exist; the verbs are {', '.join(VERBS)}")


def _source(function: Callable[..., Any]) -> str:
    return f"{function.__module__}.{function.__qualname__}"


def _evaluated(annotation: Any, function: Callable[..., Any]) -> Any:
    if not isinstance(annotation, str):
        return annotation
    try:
        return eval(annotation, getattr(inspect.unwrap(function), "__globals__", {}))
    except NameError:
        return annotation


def _check(method: Method) -> None:
    """Hold a method to its verb's conventions when it is registered, not when a user calls it."""
    _known_verb(method.verb)
    where = f"{method.verb} method {method.name!r} ({_source(method.function)})"
    if not re.fullmatch(r"[a-z][a-z0-9]*(-[a-z0-9]+)*", method.name):
        raise MethodError(f"{where}: a name is lower case words joined by '-'")
    if method.paper is not None and not re.fullmatch(r"\d\d", method.paper):
        raise MethodError(f"{where}: paper is a two-digit id such as '01', not {method.paper!r}")
    if not method.summary:
        raise MethodError(f"{where} has no docstring: its first line is the help text")
    if method.verb not in LEADING:
        return
    parameters = list(inspect.signature(method.function).parameters.values())
    leading = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    recipe = method.verb == "train" and not leading
    if (len(leading) != LEADING[method.verb] and not recipe) or any(p.default is not p.empty for p in leading):
        raise MethodError(f"{where} takes exactly {LEADING[method.verb]} positional arguments, the rest keyword-only")
    if any(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in parameters):
        raise MethodError(f"{where} takes *args or **kwargs; name every option")
    bare = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY and p.annotation is p.empty]
    if bare:
        raise MethodError(f"{where}: options without a type: {', '.join(bare)}")
