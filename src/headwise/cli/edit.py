"""`headwise edit`: write edits of head outputs to a file. The operations that need no model are here; methods that find edits join them."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from headwise.cli import common, generated

app = generated.group("edit")

Units = Annotated[
    str | None,
    typer.Option("--units", "-u", help="Heads such as L18H6,L18H7, each with a strength if wished (L3H1:0.5)."),
]
Scores = Annotated[
    Path | None, typer.Option("--scores", "-s", help="Instead of --units: the best heads of a score file.")
]
Top = Annotated[int, typer.Option("--top", min=1, help="How many of them.")]
Tokens = Annotated[
    str, typer.Option("--tokens", help="Queries by position among the real tokens: all, last, 3, 2:10, …")
]
Phase = Annotated[
    Literal["all", "prefill", "decode"], typer.Option("--phase", help="Reading the prompt, writing, or both.")
]
Amount = Annotated[float, typer.Option("--amount", min=0, max=1, help="Share of the target in the mix, 0 to 1.")]
Output = Annotated[Path, typer.Option("--output", "-o", help="Write the edits (JSON) here.")]
Append = Annotated[bool, typer.Option("--append", help="Add to the edits that the file holds; they act in order.")]


@app.command()
def zero(
    output: Output,
    units: Units = None,
    scores: Scores = None,
    top: Top = 10,
    tokens: Tokens = "all",
    phase: Phase = "all",
    append: Append = False,
    json: common.Json = False,
) -> None:
    """Ablate: the heads give nothing.

    Example: headwise edit zero --scores scores.safetensors --top 3 -o edits.json
    """
    _write("zero", output, units, scores, top, append, json, tokens=tokens, phase=phase)


@app.command()
def scale(
    value: Annotated[float, typer.Option("--value", help="The factor, any number.")],
    output: Output,
    units: Units = None,
    scores: Scores = None,
    top: Top = 10,
    tokens: Tokens = "all",
    phase: Phase = "all",
    append: Append = False,
    json: common.Json = False,
) -> None:
    """Multiply the output of the heads by a factor.

    Example: headwise edit scale --units L18H6 --value 2 -o edits.json
    """
    _write("scale", output, units, scores, top, append, json, value=value, tokens=tokens, phase=phase)


@app.command()
def uniform(
    output: Output,
    units: Units = None,
    scores: Scores = None,
    top: Top = 10,
    tokens: Tokens = "all",
    phase: Phase = "all",
    append: Append = False,
    json: common.Json = False,
) -> None:
    """Let the heads attend to everything alike: what they chose is lost, their scale is kept.

    Example: headwise edit uniform --units L18H6,L20H6 --phase decode -o edits.json
    """
    _write("uniform", output, units, scores, top, append, json, tokens=tokens, phase=phase)


@app.command("mix-v")
def mix_v(
    amount: Amount,
    output: Output,
    units: Units = None,
    scores: Scores = None,
    top: Top = 10,
    tokens: Tokens = "all",
    phase: Phase = "all",
    append: Append = False,
    json: common.Json = False,
) -> None:
    """Mix the output with the token's own value: the head attends to itself by this share.

    Example: headwise edit mix-v --units L3H1:0.5,L4H0 --amount 0.8 -o edits.json
    """
    _write("mix_v", output, units, scores, top, append, json, amount=amount, tokens=tokens, phase=phase)


@app.command("mix-uniform")
def mix_uniform(
    amount: Amount,
    output: Output,
    units: Units = None,
    scores: Scores = None,
    top: Top = 10,
    tokens: Tokens = "all",
    phase: Phase = "all",
    append: Append = False,
    json: common.Json = False,
) -> None:
    """Mix the output with that of uniform attention.

    Example: headwise edit mix-uniform --units L3H1 --amount 0.5 -o edits.json
    """
    _write("mix_uniform", output, units, scores, top, append, json, amount=amount, tokens=tokens, phase=phase)


def _write(
    op: str,
    output: Path,
    units: str | None,
    scores: Path | None,
    top: int,
    append: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Make the edit with the constructor of its name, write it, say what was written."""
    from headwise.edits import Edit, HeadEdits

    chosen, fingerprint = _choose(units, scores, top)
    make: Callable[..., Edit] = getattr(Edit, op)
    edits = HeadEdits.of(make(chosen, **options), fingerprint=fingerprint)
    if append and output.exists():
        edits = HeadEdits.load(output) + edits
    edits.save(output)
    data = {"edits": [str(edit) for edit in edits], "file": output}
    common.say(data, as_json, f"{edits}\nwritten: {output}")


def _choose(units: str | None, scores: Path | None, top: int) -> tuple[Any, Any]:
    """The heads that are meant, and the fingerprint of their model where it is known."""
    from headwise.errors import EditError
    from headwise.units import HeadScores

    if (units is None) == (scores is None):
        raise EditError("say which heads: either --units L18H6,L18H7 or --scores FILE --top N")
    if units is not None:
        return generated.ARTIFACTS["HeadSet"](units), None
    loaded = HeadScores.load(str(scores))
    return loaded.top(top), loaded.fingerprint
