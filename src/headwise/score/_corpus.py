"""Documents in and out of files, one at a time: JSON Lines (also gzipped), and Parquet where pyarrow is installed."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from headwise.errors import ScoreError
from headwise.storage import decoding, parse_json, read_lines

SUFFIXES = (".jsonl", ".jsonl.gz", ".parquet")
ROWS = 1024  # rows of a Parquet file that are in memory at a time


@dataclass(frozen=True)
class Fields:
    """Names of the columns: the text, and where there is one the domain that a document is ranked within."""

    text: str = "text"
    domain: str | None = None

    def read(self, row: Mapping[str, Any], where: str) -> tuple[str, str]:
        """(text, domain) of a row; "" is the domain of all where no column names it. Raises ScoreError."""
        for name in (self.text, *([self.domain] if self.domain else [])):
            if not isinstance(row.get(name), str):
                have = ", ".join(key for key, value in row.items() if isinstance(value, str)) or "none"
                raise ScoreError(f"{where}: no text under {name!r}; fields that hold text: {have}")
        return row[self.text], row[self.domain] if self.domain else ""


def kind(path: Path) -> str:
    """The suffix that says how a file is read and written; ScoreError for another, or for Parquet without pyarrow."""
    found = next((s for s in SUFFIXES if path.name.endswith(s)), None)
    if found is None:
        raise ScoreError(f"{str(path)!r}: documents are read and written as {', '.join(SUFFIXES)}")
    if found == ".parquet":
        _pyarrow()
    return found


def rows(paths: Sequence[Path]) -> Iterator[tuple[str, dict[str, Any]]]:
    """(where, row) of every document of the files, in their order; only a few rows are in memory at a time."""
    for path in paths:
        if not path.is_file():
            raise ScoreError(f"no file at {str(path)!r}")
        yield from _parquet_rows(path) if kind(path) == ".parquet" else _json_rows(path)


def write(path: Path, kept: Iterable[Mapping[str, Any]]) -> int:
    """Write rows as the file's name says; the number of them. The file appears whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    count = _write_parquet(partial, kept) if kind(path) == ".parquet" else _write_json(partial, path, kept)
    partial.replace(path)
    return count


def _json_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    for where, line in read_lines(path):
        if line.strip():
            yield where, parse_json(line, where)


def _write_json(partial: Path, path: Path, kept: Iterable[Mapping[str, Any]]) -> int:
    count = 0
    with (
        gzip.open(partial, "wt", encoding="utf-8")
        if path.name.endswith(".gz")
        else partial.open("w", encoding="utf-8") as file
    ):
        for row in kept:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            count += 1
    return count


def _pyarrow() -> Any:
    try:
        import pyarrow.parquet  # type: ignore[import-not-found]
    except ImportError as error:
        raise ScoreError("Parquet files need pyarrow: pip install 'headwise[parquet]', or use .jsonl") from error
    return pyarrow


def _parquet_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    number = 0
    with decoding(path), _pyarrow().parquet.ParquetFile(path) as file:
        for batch in file.iter_batches(batch_size=ROWS):
            for row in batch.to_pylist():
                number += 1
                yield f"{path}, row {number}", row


def _write_parquet(partial: Path, kept: Iterable[Mapping[str, Any]]) -> int:
    """Row groups of `ROWS`; the columns are those of the first group."""
    arrow, writer, count, group = _pyarrow(), None, 0, []
    try:
        for row in kept:
            group.append(row)
            if len(group) == ROWS:
                writer = _flush(arrow, writer, partial, group)
                count, group = count + ROWS, []
        if group or writer is None:
            writer = _flush(arrow, writer, partial, group)
    finally:
        if writer is not None:
            writer.close()
    return count + len(group)


def _flush(arrow: Any, writer: Any, partial: Path, group: list[Mapping[str, Any]]) -> Any:
    table = arrow.Table.from_pylist(group, schema=None if writer is None else writer.schema)
    writer = arrow.parquet.ParquetWriter(partial, table.schema) if writer is None else writer
    writer.write_table(table)
    return writer
