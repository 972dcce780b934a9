"""Score a corpus in files and select from it: streaming, resumable, shared out over processes.

Each shard i of n scores the documents i, i + n, i + 2n, … and appends one line a document to its own file, whose first
line says what made it. A run that broke off goes on where it stopped; when all shards are whole, the selection is written.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from headwise.checks import whole
from headwise.errors import ScoreError
from headwise.progress import track
from headwise.score._corpus import Fields, kind, rows, write
from headwise.score._selecting import Scored, Selection, select_by_tokens
from headwise.storage import decoding, parse_json, read_lines, write_text
from headwise.storage import field as field_of

if TYPE_CHECKING:
    from headwise.score._influence import InfluenceScorer

SCORE_FIELD = "attention_influence"
END = {"end": True}


@dataclass(frozen=True)
class SelectJob:
    """One corpus to score: `inputs`, the columns, the folder of the scores, the number of shards.

    `request` is what the caller wants to be held to: scores that another request made are neither continued nor selected from.
    """

    inputs: tuple[Path, ...]
    scores: Path
    fields: Fields = field(default_factory=Fields)
    shards: int = 1
    request: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.inputs:
            raise ScoreError("inputs is empty; give at least one file of documents")
        whole("shards", self.shards, 1, ScoreError)
        for path in self.inputs:
            if not path.is_file():
                raise ScoreError(f"no file at {str(path)!r}")
            kind(path)

    def part(self, shard: int) -> Path:
        """The scores of one shard."""
        if not 0 <= shard < self.shards:
            raise ScoreError(f"shard {shard} of {self.shards}; they are numbered 0 to {self.shards - 1}")
        return self.scores / f"part-{shard:05d}-of-{self.shards:05d}.jsonl"

    def documents(self, shard: int) -> Iterator[tuple[int, str, str]]:
        """(index, text, domain) of the shard's documents."""
        for index, (where, row) in enumerate(rows(self.inputs)):
            if index % self.shards == shard:
                yield index, *self.fields.read(row, where)

    def asked(self) -> dict[str, Any]:
        """The part of a header that is known without a model."""
        files = [[path.name, path.stat().st_size] for path in self.inputs]
        asked = {"shards": self.shards, "files": files, "fields": asdict(self.fields), "request": dict(self.request)}
        return json.loads(json.dumps(asked))  # as it is read back

    def header(self, scorer: InfluenceScorer) -> dict[str, Any]:
        """What made the scores: a part with another header is not continued."""
        from headwise.attach import fingerprint

        how: dict[str, Any] = {
            "heads": [str(s) for s in scorer.sets],
            "mode": scorer.mode,
            "denominator": scorer.denominator,
        }
        how |= {"context": scorer.context, "min_tokens": scorer.min_tokens, "dtype": str(scorer.model.dtype)}
        model = fingerprint(scorer.model).to_dict()
        return {"kind": "attention-influence", "version": 1, **self.asked(), **how, "model": model}

    def score(self, scorer: InfluenceScorer, shard: int = 0, *, progress: bool = False) -> int:
        """Score what the shard still lacks; the number of documents scored now. Raises ScoreError for another set-up."""
        self.scores.mkdir(parents=True, exist_ok=True)
        part, header = self.part(shard), self.header(scorer)
        done, ended = _resume(part, header)
        if ended:
            return 0
        waiting: list[tuple[int, str]] = []

        def texts() -> Iterator[str]:
            for index, text, domain in islice(self.documents(shard), done, None):
                waiting.append((index, domain))
                yield text

        count = 0
        with part.open("a", encoding="utf-8") as file:
            for influence in track(scorer.score(texts()), f"documents of shard {shard}", progress):
                index, domain = waiting.pop(0)
                line = {"index": index, "domain": domain, "tokens": influence.tokens, "why": influence.why}
                line |= {"base": influence.base, "reference": influence.reference, "score": influence.score}
                line |= {"controls": list(influence.control_scores)}
                file.write(json.dumps(_plain(line)) + "\n")
                file.flush()
                count += 1
            if count + done == 0:
                raise ScoreError(f"shard {shard} of {self.shards} has no documents: the files hold too few")
            file.write(json.dumps(END) + "\n")
        return count

    def missing(self) -> list[int]:
        """Shards that are not whole yet."""
        return [shard for shard in range(self.shards) if not _whole(self.part(shard))]

    def scored(self) -> list[Scored]:
        """Every document's score, in the order of the input. Raises ScoreError while shards are missing, or do not belong together."""
        if self.missing():
            raise ScoreError(f"shards {self.missing()} of {self.shards} are not scored yet")
        heads, found = set(), []
        for shard in range(self.shards):
            header, *lines = _lines(self.part(shard))
            heads.add(_digest(header))
            _same(self.part(shard), header, self.asked())
            with decoding(self.part(shard)):
                found += [_scored(line) for line in lines if line != END]
        if len(heads) > 1:
            raise ScoreError(
                f"the parts in {str(self.scores)!r} were made by different runs; delete those of the old one"
            )
        return sorted(found, key=lambda row: row.index)

    def select(self, output: Path, share: float) -> Selection:
        """Write the selected documents, with their score in the field `attention_influence`, in the order of the input."""
        scored = self.scored()
        selection = select_by_tokens(scored, share)
        values = {row.index: row.score for row in scored if row.index in selection.keep}
        kept = (
            {**row, SCORE_FIELD: values[index]}
            for index, (_, row) in enumerate(rows(self.inputs))
            if index in selection.keep
        )
        write(output, kept)
        return selection


def _resume(part: Path, header: Mapping[str, Any]) -> tuple[int, bool]:
    """(documents that are scored already, whether all are); a new part gets its header, a line cut short is taken away."""
    lines = _lines(part) if part.exists() else []
    if not lines:
        write_text(part, json.dumps(header) + "\n")
        return 0, False
    _same(part, lines[0], header)
    ended = lines[-1] == END
    write_text(part, "".join(json.dumps(line) + "\n" for line in lines))
    return len(lines) - 1 - ended, ended


def _same(part: Path, header: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Raises ScoreError where the header of a part is not what this run would write."""
    changed = [key for key, value in wanted.items() if header.get(key) != value]
    if "request" in changed:
        old, new = header.get("request", {}), wanted["request"]
        changed[changed.index("request")] = ", ".join(key for key in {**old, **new} if old.get(key) != new.get(key))
    if changed:
        raise ScoreError(
            f"{str(part)!r} was made by another run ({', '.join(changed)} differ): choose another folder, or delete it"
        )


def _lines(part: Path) -> list[dict[str, Any]]:
    """The whole lines of a part; a run that was killed may have left half of one at the end."""
    return [parse_json(line, where) for where, line in read_lines(part) if line.endswith("\n")]


def _scored(line: Mapping[str, Any]) -> Scored:
    score = None if line["score"] is None else field_of(line, "score", float)
    plain = (field_of(line, "index", int), field_of(line, "domain", str), field_of(line, "tokens", int))
    return Scored(*plain, math.nan if score is None else score)


def _whole(part: Path) -> bool:
    return part.exists() and _lines(part)[-1:] == [END]


def _digest(header: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(header, sort_keys=True).encode()).hexdigest()


def _plain(line: Mapping[str, Any]) -> dict[str, Any]:
    """NaN becomes null: JSON has none."""

    def plain(value: Any) -> Any:
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return {k: [plain(x) for x in v] if isinstance(v, list) else plain(v) for k, v in line.items()}


def share_out(job: SelectJob, make: Any, arguments: Sequence[Any], processes: int) -> None:
    """Score the missing shards in `processes` processes; `make(*arguments, process, processes)` gives the scorer in each."""
    import torch.multiprocessing as multiprocessing

    todo = job.missing()
    workers = min(processes, len(todo))
    if workers:
        multiprocessing.spawn(_work, (job, make, tuple(arguments), todo, workers), nprocs=workers)


def _work(process: int, job: SelectJob, make: Any, arguments: tuple, todo: list[int], processes: int) -> None:
    scorer = make(*arguments, process, processes)
    for shard in todo[process::processes]:
        job.score(scorer, shard)
