"""The one way artifacts touch disk: strict JSON and safetensors, written atomically, read with suspicion.

Every file names its kind and the version of its schema. Whatever is wrong with a file (missing, cut short, of another kind, written by
a newer headwise, holding NaN where a number belongs) becomes one `ArtifactError` that names the path and what to do.
"""

import gzip
import hashlib
import json
import math
import os
import secrets
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from headwise.checks import shown
from headwise.errors import ArtifactError, HeadwiseError

MAX_JSON_BYTES = 64 * 2**20
MAX_LINE = 16 * 2**20  # characters
MAX_TENSOR_BYTES = 16 * 2**30
StrPath = str | os.PathLike[str]
Expect = Mapping[str, tuple[torch.dtype | None, int]]
NOT_TENSORS = (SafetensorError, OSError, ValueError, TypeError, RuntimeError, KeyError, AttributeError, MemoryError)
_T = TypeVar("_T")


def write_json(path: StrPath, kind: str, version: int, payload: Mapping[str, Any]) -> None:
    """Write `payload` as strict, sorted JSON that a person can read and diff: one key a line, one row of numbers a line.

    The file is complete or absent, never half written; missing parent folders are made.

    Raises:
        ArtifactError: the payload holds NaN, infinity or something JSON lacks, or the path cannot be written.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "new" / "a.json"
    >>> write_json(path, "demo", 1, {"rows": [[1, 2], [3, 4]], "name": "x"})
    >>> read_json(path, "demo", 1)
    {'name': 'x', 'rows': [[1, 2], [3, 4]]}
    """
    write_plain_json(path, {**payload, "headwise": kind, "schema": version})


def write_plain_json(path: StrPath, payload: Mapping[str, Any]) -> None:
    """`write_json` without kind and schema, for the file formats of others."""
    try:
        data = (_dump(payload, "") + "\n").encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise ArtifactError(
            f"{path}: cannot be written as JSON ({_line(error)}); use finite numbers, text, lists, dicts"
        ) from error
    _write(path, data)


def write_text(path: StrPath, text: str) -> None:
    """Write UTF-8 text, complete or not at all, for the file formats of others. Raises ArtifactError."""
    _write(path, text.encode())


def read_text(path: StrPath) -> str:
    """UTF-8 text of at most `MAX_JSON_BYTES`. Raises ArtifactError."""
    _check_file(path, MAX_JSON_BYTES)
    try:
        return Path(path).read_bytes().decode()
    except (OSError, ValueError) as error:
        _refuse(path, f"is not UTF-8 text ({_line(error)})")


def read_json(path: StrPath, kind: str, version: int) -> dict[str, Any]:
    """The payload that `write_json` wrote, without its kind and schema.

    Raises:
        ArtifactError: anything at all is wrong with the file.
    """
    document = read_plain_json(path)
    _check_label(path, document.pop("headwise", None), document.pop("schema", None), kind, version)
    return document


def read_plain_json(path: StrPath) -> dict[str, Any]:
    """A JSON object from any source, read strictly: UTF-8, no NaN or infinity, no key twice, at most `MAX_JSON_BYTES`."""
    return parse_json(read_text(path), path)


def parse_json(text: str, name: StrPath) -> dict[str, Any]:
    """The JSON object that a text holds, read strictly; `name` says in errors where it stands. Raises ArtifactError.

    >>> parse_json('{"x": NaN}', "line 3")
    Traceback (most recent call last):
    headwise.errors.ArtifactError: 'line 3' is not the JSON that headwise writes (NaN is no number). Write it again ...
    """
    try:
        document = _parse(text)
    except (ValueError, RecursionError, MemoryError) as error:
        _refuse(name, f"is not the JSON that headwise writes ({_line(error)})")
    if not isinstance(document, dict):
        _refuse(name, f"holds a JSON {type(document).__name__} where an object belongs")
    return document


def read_lines(path: StrPath) -> Iterator[tuple[str, str]]:
    """(where, line) of a UTF-8 text file, gzipped where its name ends in .gz; one line of at most `MAX_LINE` characters is held at a time.

    `where` is `path:number`. Raises ArtifactError, while the lines are read.
    """
    _check_file(path, math.inf)
    number = 0
    try:
        with (
            gzip.open(path, "rt", encoding="utf-8")
            if str(path).endswith(".gz")
            else open(path, encoding="utf-8") as file
        ):
            while line := file.readline(MAX_LINE + 1):
                number += 1
                if len(line) > MAX_LINE:
                    raise ValueError(f"the line has more than {MAX_LINE} characters")
                yield f"{path}:{number}", line
    except (OSError, EOFError, ValueError, zlib.error) as error:
        if isinstance(error, ArtifactError):
            raise
        _refuse(f"{path}:{number + 1}", f"is no line of text ({_line(error)})")


def write_tensors(
    path: StrPath, kind: str, version: int, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]
) -> None:
    """Write tensors of any shape and dtype as safetensors; `meta` goes into the header, each value as JSON text.

    Equal input gives equal bytes. Gradients and devices are not kept.

    Raises:
        ArtifactError: `meta` cannot be JSON, or the path cannot be written.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "a.safetensors"
    >>> write_tensors(path, "demo", 1, {"x": torch.zeros(2, 3)}, {"method": "none"})
    >>> tensors, meta = read_tensors(path, "demo", 1, {"x": (torch.float32, 2)})
    >>> tensors["x"].shape, meta
    (torch.Size([2, 3]), {'method': 'none'})
    """
    try:
        header = {key: json.dumps(value, allow_nan=False, sort_keys=True) for key, value in meta.items()}
        header |= {"headwise": kind, "schema": str(version)}
        data = save({name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}, header)
    except (TypeError, ValueError, RecursionError, SafetensorError) as error:
        raise ArtifactError(f"{path}: cannot be written as safetensors ({_line(error)})") from error
    _write(path, _sorted_header(data))


def read_tensors(
    path: StrPath, kind: str, version: int, expect: Expect | None
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and meta that `write_tensors` wrote.

    `expect` names every tensor with its dtype (None: any floating dtype) and number of dimensions; the file must hold these and no more.
    With `expect=None` it may hold any.

    Raises:
        ArtifactError: anything at all is wrong with the file.
    """
    with _opened(path, kind, version) as (file, header):
        names = set(file.keys())
        if expect is not None and names != set(expect):
            _refuse(path, f"holds the tensors {_names(names)} where {_names(expect)} belong")
        tensors = {name: file.get_tensor(name) for name in (names if expect is None else expect)}
        meta = {key: _parse(value) for key, value in header.items()}
    for name, (dtype, ndim) in (expect or {}).items():
        _check_tensor(path, name, tensors[name], dtype, ndim)
    return tensors, meta


def read_meta(path: StrPath, kind: str, version: int) -> dict[str, Any]:
    """The meta that `write_tensors` wrote, without reading the tensors. Raises ArtifactError."""
    with _opened(path, kind, version) as (_, header):
        return {key: _parse(value) for key, value in header.items()}


@contextmanager
def _opened(path: StrPath, kind: str, version: int) -> Iterator[tuple[Any, dict[str, str]]]:
    """A safetensors file of this kind, and what its header says beside kind and schema."""
    _check_file(path, MAX_TENSOR_BYTES)
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            _check_label(path, header.pop("headwise", None), _whole_text(header.pop("schema", "")), kind, version)
            yield file, header
    except (*NOT_TENSORS, RecursionError) as error:
        if isinstance(error, ArtifactError):
            raise
        _refuse(path, f"is not the safetensors file that headwise writes ({_line(error)})")


def kind_of(path: StrPath) -> str | None:
    """The kind that a safetensors file says it is of; "" where it says nothing, None where it is none."""
    try:
        _check_file(path, MAX_TENSOR_BYTES)
        with safe_open(path, framework="pt") as file:
            return str((file.metadata() or {}).get("headwise", ""))
    except NOT_TENSORS:
        return None


def holds_kind(path: StrPath, kind: str) -> bool:
    """Whether `path` is a safetensors file of this kind."""
    return kind_of(path) == kind


def digest(path: StrPath) -> str:
    """SHA-256 of a file, in hexadecimal digits: ties two files of one artifact together."""
    _check_file(path, MAX_TENSOR_BYTES)
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{path}: cannot be read ({_line(error)}); check the path") from error


@contextmanager
def decoding(path: StrPath) -> Iterator[None]:
    """Inside, whatever is wrong with values read from `path` becomes an `ArtifactError` that names the path.

    That is what headwise refuses, and what no caller of a reader should have to know: a key that is missing, a list where a number
    belongs. Only what turns values that were read into an artifact stands inside.
    """
    try:
        yield
    except HeadwiseError as error:
        _refuse(path, f"holds what no artifact holds: {_short(error)}".rstrip("."))
    except (*NOT_TENSORS, IndexError, OverflowError, RecursionError) as error:
        text = f"{str(path)!r} holds what no artifact holds ({type(error).__name__}: {_line(error)})"
        raise ArtifactError(f"{text}. Write it again with headwise or pass another file.") from error


def field(payload: Mapping[str, Any], name: str, kind: type[_T]) -> _T:
    """`payload[name]`, which must be a `kind`; a bool is no int, an int is a float.

    >>> field({"layers": 4}, "layers", int)
    4
    >>> field({"layers": "4"}, "layers", int)
    Traceback (most recent call last):
    headwise.errors.ArtifactError: 'layers' is '4' where a value of type int belongs
    """
    value: Any = payload.get(name)
    if kind is float and type(value) is int and abs(value) < 2**53:
        value = float(value)
    if type(value) is not kind:
        raise ArtifactError(f"{name!r} is {shown(value)} where a value of type {kind.__name__} belongs")
    return value


def _refuse(path: StrPath, problem: str) -> NoReturn:
    raise ArtifactError(f"{str(path)!r} {problem}. Write it again with headwise or pass another file.") from None


def _names(names: Iterable[str]) -> str:
    """Names of tensors for an error text."""
    return shown(sorted(names), 400)


def _short(error: BaseException) -> str:
    text = str(error)
    return text if len(text) <= 600 else text[:600] + "…"


def _line(error: BaseException) -> str:
    return str(error).split("\n", 1)[0].strip()[:200] or type(error).__name__


def _check_file(path: StrPath, limit: float) -> None:
    try:
        found = Path(path)
        if not found.is_file():
            _refuse(path, "is a folder, not a file" if found.is_dir() else "does not exist or is no regular file")
        size = found.stat().st_size
    except (OSError, ValueError, TypeError) as error:
        if isinstance(error, ArtifactError):
            raise
        _refuse(path, f"cannot be read ({_line(error)})")
    if size > limit:
        _refuse(path, f"has {size} bytes, more than the {limit} that headwise reads")


def _check_label(path: StrPath, kind: object, schema: object, expected: str, version: int) -> None:
    if not isinstance(kind, str):
        _refuse(path, f"is no headwise file; a file of kind {expected!r} belongs here")
    if kind != expected:
        _refuse(path, f"is a file of kind {shown(kind)}; one of kind {expected!r} belongs here")
    if type(schema) is not int or schema < 1:
        _refuse(path, f"has the schema {shown(schema)} where a whole number from 1 to {version} belongs")
    if schema > version:
        raise ArtifactError(
            f"{str(path)!r} has schema {schema}, this headwise reads up to {version}. Update headwise to read it."
        )


def _check_tensor(path: StrPath, name: str, tensor: Tensor, dtype: torch.dtype | None, ndim: int) -> None:
    right = tensor.dtype.is_floating_point if dtype is None else tensor.dtype == dtype
    if not right:
        _refuse(path, f"holds {name!r} as {tensor.dtype} where {dtype or 'a floating dtype'} belongs")
    if tensor.ndim != ndim:
        _refuse(path, f"holds {name!r} with shape {tuple(tensor.shape)} where {ndim} dimensions belong")


def _whole_text(text: str) -> int | None:
    return int(text) if text.isascii() and text.isdigit() and len(text) < 10 else None


def _parse(text: str) -> Any:
    value = json.loads(text, parse_constant=_no_constant, parse_float=_finite, object_pairs_hook=_unique)
    if "\\ud" in text.lower():  # a lone surrogate parses but is no text
        json.dumps(value, ensure_ascii=False).encode()
    return value


def _no_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is no number")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is too large for a float")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key stands twice in one object")
    return found


def _dump(value: Any, indent: str) -> str:
    """Sorted JSON, one item a line, but a list of plain values stays on one line."""
    inner = indent + " "
    if isinstance(value, Mapping) and value:
        if not all(isinstance(key, str) for key in value):
            raise TypeError("keys must be text")
        rows = [f"{inner}{json.dumps(key)}: {_dump(value[key], inner)}" for key in sorted(value)]
        return "{\n" + ",\n".join(rows) + f"\n{indent}}}"
    if isinstance(value, list | tuple) and any(isinstance(item, Mapping | list | tuple) for item in value):
        return "[\n" + ",\n".join(inner + _dump(item, inner) for item in value) + f"\n{indent}]"
    return json.dumps(value, allow_nan=False)


def _sorted_header(data: bytes) -> bytes:
    """The same safetensors file with its metadata sorted: the library writes it in a random order."""
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + data[8 + size :]


def _write(path: StrPath, data: bytes) -> None:
    part = None
    try:
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        part = target.with_name(f".{target.name[:100]}.{secrets.token_hex(6)}.part")
        part.write_bytes(data)
        os.replace(part, target)
    except (OSError, ValueError, TypeError) as error:
        raise ArtifactError(
            f"{str(path)!r} cannot be written ({_line(error)}); give a path of a file in a writable folder"
        ) from error
    finally:
        if part is not None:
            with suppress(OSError, ValueError):
                part.unlink(missing_ok=True)
