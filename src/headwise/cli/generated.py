"""Commands that nobody writes: `score`, `plan`, `convert`, `train` and `edit` have one for each registered method.

A method's keyword-only options become the options of its command, with the type, default and, where the docstring has a
line `name: what it means`, the help of the function itself. The method files are imported only when such a command is
called.
"""

import inspect
import re
import types
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Union, get_args, get_origin

import typer
from typer.core import TyperCommand, TyperGroup

from headwise import registry
from headwise.cli import common, plan_sizes
from headwise.registry import Method, MethodError

COMMANDS = {"score": "score", "plan": "budget", "convert": "route", "train": "train", "edit": "steer"}
"""Name of the command → verb of the methods under it."""

HELP = {
    "score": "Score the heads of a model: what is each head worth?\n\n"
    "Example: headwise score retrieval --model smollm2 -o scores.safetensors",
    "plan": "Plan the KV cache: what does each kv head keep?\n\n"
    "Example: headwise plan duo --scores scores.safetensors --budget 0.5 -o plan.json",
    "convert": "Convert a model so that each token uses some of its heads.\n\n"
    "Example: headwise convert moh --model smollm2 -o adapter/",
    "train": "Train a router of heads, or a whole routed model from scratch by a recipe.\n\n"
    "Example: headwise train moh --model smollm2 -o adapter/, or headwise train moh-lm --control -o run/",
    "edit": "Write down what happens to the output of chosen heads.\n\n"
    "Example: headwise edit zero --units L18H6,L18H7 -o edits.json",
}

Required = inspect.Parameter.empty


class MethodGroup(TyperGroup):
    """A command group whose commands are the registered methods of one verb, beside those written by hand."""

    verb: ClassVar[str]

    def list_commands(self, ctx: Any) -> list[str]:
        """Names of the hand-written commands, then of the methods."""
        written = list(super().list_commands(ctx))
        return written + [m.name for m in registry.methods(self.verb) if m.name not in written]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """The command of this name; an unknown one raises `MethodError`, which lists close names."""
        written = super().get_command(ctx, cmd_name)
        if written is not None:
            return written
        names = self.list_commands(ctx)
        if cmd_name not in names:
            raise registry.unknown(f"{self.verb} method", cmd_name, names)
        return command(registry.get(self.verb, cmd_name))


class ListCommand(TyperCommand):
    """A command whose list options take all words up to the next option: `--models A B C` is `--models A --models B …`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Repeat the name of a list option before each of its words."""
        lists = {name for option in self.params if getattr(option, "multiple", False) for name in option.opts}
        spread: list[str] = []
        current, bare = "", False
        for word in args:
            if word.startswith("-"):
                current, bare = (word, True) if word in lists else ("", False)
            elif current and not bare:
                spread.append(current)
            else:
                bare = False
            spread.append(word)
        return super().parse_args(ctx, spread)


def group(name: str) -> typer.Typer:
    """The Typer app of one of `COMMANDS`."""
    cls = types.new_class("Group", (MethodGroup,), exec_body=lambda body: body.update(verb=COMMANDS[name]))
    return typer.Typer(name=name, cls=cls, help=HELP[name], no_args_is_help=True, rich_markup_mode="rich")


@cache
def command(method: Method) -> Any:
    """The command of one method: the standard options of its verb, then the method's own."""
    standard = _standard(method)
    options = [o for o in (Option.of(method, p) for p in method.options.values() if p.name not in _SHARED) if o]
    clash = {p.name for p in standard} & {o.parameter.name for o in options}
    if clash:
        raise MethodError(
            f"{method.verb} method {method.name!r}: option {', '.join(clash)} belongs to the command line"
        )
    shared = [_SHARED[name] for name in method.options if name in _SHARED]
    seed = method.options.get("seed")
    shared = [p.replace(default=seed.default) if p.name == "seed" and seed else p for p in shared]

    def run(**given: Any) -> None:
        chosen = {o.parameter.name: o.decode(given.pop(o.parameter.name)) for o in options}
        if "seed" in method.options:
            chosen["seed"] = given.pop("seed")
        if "progress" in method.options:
            chosen["progress"] = common.show_progress(given.pop("progress"), given["json"])
        _RUN[method.verb](method, chosen, **given)

    parameters = [*standard, *(o.parameter for o in options), *shared, _JSON]
    parameters.sort(key=lambda p: p.default is not Required)
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {p.name: p.annotation for p in parameters}
    run.__doc__ = help_text(method)
    app = typer.Typer(add_completion=False, rich_markup_mode="rich")
    app.command(method.name, cls=ListCommand)(run)
    return typer.main.get_command(app)


def _standard(method: Method) -> list[inspect.Parameter]:
    """The options that a command has because of its verb and of what the method takes."""
    if of_a_model(method):
        return _MODEL_PLAN
    if of_models(method):
        return _MODELS
    return [_output("trained model and its curves (folder)")] if of_nothing(method) else _STANDARD[method.verb]


def help_text(method: Method) -> str:
    """First paragraph of the method's docstring and a line that says where else to find it."""
    paragraph = inspect.cleandoc(method.function.__doc__ or "").split("\n\n")[0]
    paper = f" (paper {method.paper}: headwise papers)" if method.paper else ""
    where = f"{method.function.__module__.rpartition('.')[0]}.{method.function.__name__}"
    return f"{_escape(paragraph)}\n\nIn Python: {where}(…){paper}"


@dataclass(frozen=True)
class Option:
    """One keyword of a method as an option of the command line: what typer is told, and how the value becomes the argument."""

    parameter: inspect.Parameter
    decode: Callable[[Any], Any]

    @classmethod
    def of(cls, method: Method, parameter: inspect.Parameter) -> "Option | None":
        """The option for a parameter; None if its type can be given from Python only."""
        kind, decode = _plain(parameter.annotation)
        if kind is None:
            if parameter.default is Required:
                raise MethodError(
                    f"{method.verb} method {method.name!r}: option {parameter.name!r} of type {parameter.annotation} "
                    "has no default and no form on the command line"
                )
            return None
        default = parameter.default
        if default is not Required and default is not None and not isinstance(default, bool | int | float | str):
            default = str(default)
        flag = parameter.name.replace("_", "-")
        flags = [f"--{flag}/--no-{flag}"] if kind is bool else [f"--{flag}"]
        help_ = _escape(_help_of(method, parameter.name))
        told = kind | None if default is None else kind
        annotation = Annotated[told, typer.Option(*flags, help=help_)]  # type: ignore[valid-type]
        made = parameter.replace(annotation=annotation, default=default)
        return cls(made, lambda value: None if value is None else decode(value))


def _plain(annotation: Any) -> tuple[Any, Callable[[Any], Any]]:
    """(type for typer, decoder) of an annotation, without its `| None`; (None, …) for a type that has no text form."""
    if get_origin(annotation) in (Union, types.UnionType):
        arms = [arm for arm in get_args(annotation) if arm is not type(None)]
        known = [(kind, decode) for kind, decode in map(_plain, arms) if kind is not None]
        return known[0] if known else (None, str)
    if get_origin(annotation) is Literal:
        choices = {str(choice): choice for choice in get_args(annotation)}
        return Literal[tuple(choices)], lambda text: choices[text]
    if annotation in (int, float, str, bool, Path):
        return annotation, lambda value: value
    decode = ARTIFACTS.get(getattr(annotation, "__name__", ""))
    return (str, decode) if decode else (None, str)


def _help_of(method: Method, name: str) -> str:
    """The docstring's own words on an option: a line `name: …`, with or without backticks."""
    doc = inspect.getdoc(method.function) or ""
    found = re.search(rf"^\s*[`*]*{name}[`*]*\s*(?:\([^)]*\))?\s*[:–]\s*(.+(?:\n\s{{2,}}\S.*)*)", doc, re.MULTILINE)
    return " ".join(found[1].split()) if found else ""


def _escape(text: str) -> str:
    """Text that rich must not take for markup."""
    return re.sub(r"(\\*)(\[[a-z#/@][^[]*?])", r"\1\1\\\2", text)


def _head_set(text: str) -> Any:
    from headwise.units import HeadSet

    return HeadSet.load(text) if Path(text).is_file() else HeadSet.parse(text)


def _scores(path: str) -> Any:
    from headwise.units import HeadScores

    return HeadScores.load(path)


def _reader(method: Method) -> Callable[[str], Any]:
    """How a planner's scores are read: by `load` of the class that it asks for, `HeadScores` or a finer table."""
    return getattr(method.leading[0].annotation, "load", _scores)


def _plan(path: str) -> Any:
    from headwise.plan import HeadPlan

    return HeadPlan.load(path)


def _budget(text: str) -> Any:
    from headwise.plan import Budget

    return Budget.parse(text)


ARTIFACTS: dict[str, Callable[[str], Any]] = {
    "HeadSet": _head_set,
    "HeadScores": _scores,
    "HeadPlan": _plan,
    "HeadRouter": lambda folder: common.router_of(Path(folder)),
    "Budget": _budget,
}


def _parameter(name: str, annotation: Any, default: Any = Required) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, annotation=annotation, default=default)


def _output(what: str, default: Any = Required) -> inspect.Parameter:
    kind = Path if default is Required else Path | None
    return _parameter(
        "output", Annotated[kind, typer.Option("--output", "-o", help=f"Write the {what} here.")], default
    )


_MODEL = [
    _parameter("model", common.Model, "smollm2"),
    _parameter("dtype", common.Dtype, None),
    _parameter("device", common.Device, None),
]
_JSON = _parameter("json", common.Json, False)
_SHARED = {"seed": _parameter("seed", common.Seed, 0), "progress": _parameter("progress", common.Progress, None)}
_SCORES = Annotated[Path, typer.Option("--scores", "-s", help="A file that `headwise score` wrote.")]

_PLANNED = [
    _parameter(
        "latency",
        Annotated[
            str | None,
            typer.Option("--latency", help="Instead of a budget: 12ms a decode step at most (see headwise calibrate)."),
        ],
        None,
    ),
    _parameter(
        "machine",
        Annotated[
            Path | None, typer.Option("--machine", help="File of headwise calibrate. Default: the one kept here.")
        ],
        None,
    ),
    _parameter(
        "length",
        Annotated[
            int | None, typer.Option("--length", min=1, help="Tokens at which sizes, and the latency, are told.")
        ],
        None,
    ),
]
_MODEL_PLAN = [*_MODEL, _output("plan (JSON)"), *_PLANNED]
_MODELS = [_parameter("models", common.Models), *_MODEL[1:], _output("mixture's folder")]
_STANDARD = {
    "score": [*_MODEL, _output("scores (safetensors)", None)],
    "budget": [_parameter("scores", _SCORES), _output("plan (JSON)"), *_PLANNED],
    "route": [*_MODEL, _output("adapter folder")],
    "train": [*_MODEL, _output("adapter folder")],
    "steer": [*_MODEL, _output("edits (JSON)")],
}


def _run_score(method: Method, options: dict[str, Any], *, output: Path | None, json: bool, **model: Any) -> None:
    """Score, save if asked to, show the ten best."""
    loaded, tokenizer = common.load(**model)
    scores = method(loaded, tokenizer, **options)
    if output:
        scores.save(output)
    ranking = scores.ranking()[:10]
    data = {
        "method": method.name,
        "model": model["model"],
        "kind": scores.kind,
        "layers": scores.layers,
        "units": scores.units,
        "data": scores.data,
        "top": [[str(unit), score] for unit, score in ranking],
        "file": output,
    }
    common.say(data, json, f"{scores}\n{_written(output)}".rstrip())


def of_a_model(method: Method) -> bool:
    """Does this planner need the model alone, no scores?"""
    return method.verb == "budget" and method.leading[0].name == "model"


def of_models(method: Method) -> bool:
    """Does this conversion make one model of several?"""
    return method.verb == "route" and method.leading[0].name == "models"


def of_nothing(method: Method) -> bool:
    """Is this a recipe, which makes its model itself?"""
    return method.verb == "train" and not method.leading


def _run_budget(
    method: Method, options: dict[str, Any], *, output: Path, json: bool, scores: Path | None = None, **given: Any
) -> None:
    """Plan, save, show the plan and what it takes, by layer and kv head."""
    latency, machine, length = (given.pop(name) for name in ("latency", "machine", "length"))
    source = common.load(**given)[0] if given else _reader(method)(str(scores))
    timed = plan_sizes.machine_of(latency, machine, source)
    if timed:
        options = plan_sizes.budgeted(method, options, latency, length, timed)
    plan = method(source, **options)
    plan.save(output)
    told = plan_sizes.tell(plan, source, options, length, timed)
    data = {"method": method.name, "scores": scores, "budget": str(options.get("budget")), "file": output, **told.data}
    if given:
        data["model"] = given["model"]
    common.say(data, json, f"{plan}\n{told.text}\n{_written(output)}")


def _run_route(method: Method, options: dict[str, Any], *, output: Path, json: bool, **model: Any) -> None:
    """Convert or train, save the adapter."""
    several = "models" in model
    loaded, tokenizer = common.load_all(**model) if several else common.load(**model)
    router = method(loaded, tokenizer, **options)
    router.save_pretrained(output)
    source = {"models": model["models"]} if several else {"model": model["model"]}
    data = {"method": method.name, **source, "router": str(router), "folder": output}
    common.say(data, json, f"{router}\n{_written(output)}")


def _run_train(method: Method, options: dict[str, Any], *, output: Path, json: bool, **model: Any) -> None:
    """Train a router of a model; or follow a recipe, save what it trained, and draw its curves where plotly is."""
    if not of_nothing(method):
        return _run_route(method, options, output=output, json=json, **model)
    from headwise.report.training import save_page

    trained = method(**options)
    trained.save_pretrained(output)
    page = save_page(output)
    data = {"method": method.name, "folder": output, "page": page, **trained.summary()}
    common.say(data, json, f"{trained}\n{_written(output)}")


def _run_steer(method: Method, options: dict[str, Any], *, output: Path, json: bool, **model: Any) -> None:
    """Make the edits, save them."""
    loaded, tokenizer = common.load(**model)
    edits = method(loaded, tokenizer, **options)
    edits.save(output)
    data = {"method": method.name, "model": model["model"], "edits": str(edits), "file": output}
    common.say(data, json, f"{edits}\n{_written(output)}")


def _written(path: Path | None) -> str:
    return f"written: {path}" if path else ""


_RUN: dict[str, Callable[..., None]] = {
    "score": _run_score,
    "budget": _run_budget,
    "route": _run_route,
    "train": _run_train,
    "steer": _run_steer,
}
