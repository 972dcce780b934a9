"""`headwise select-data`: files in and out, resumed and shared out runs give what one run gives, and errors say what is wrong."""

import gzip
import json
import math
from pathlib import Path

import pytest

from headwise.cli import main
from headwise.errors import ArtifactError, ScoreError
from headwise.hub import load_model
from headwise.score import InfluenceScorer, _corpus, _select_job
from headwise.score._corpus import Fields
from headwise.score._select_job import SelectJob
from headwise.units import HeadSet

HEADS = "L1H0,L2H3"
WORDS = ("the red fox", "a loop over n", "return x + y", "once upon a time", "let a be an integer", "it rained")


@pytest.fixture
def corpus(tmp_path):
    rows = [{"text": f"{WORDS[i % 6]} {i} " * (i % 4 + 2), "source": "ab"[i % 2], "id": i} for i in range(14)]
    rows[5]["text"] = ""
    path = tmp_path / "corpus.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def scorer(**options):
    model, tokenizer = load_model("tiny-random-llama")
    return InfluenceScorer(model, tokenizer, HeadSet.parse(HEADS), **{"min_tokens": 8, "batch_size": 2, **options})


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def command(*arguments):
    with pytest.raises(SystemExit) as ended:
        main(
            ["select-data", *map(str, arguments), "--model", "tiny-random-llama", "--heads", HEADS, "--min-tokens", "8"]
        )
    return int(ended.value.code or 0)


def test_the_command(corpus, tmp_path, capsys):
    out = tmp_path / "out.jsonl"
    assert command(corpus, "-o", out, "--domain-field", "source", "--keep", "0.5", "--random-sets", "1", "--json") == 0
    said = json.loads(capsys.readouterr().out)
    kept = read(out)
    assert said["kept"] == len(kept) and 0 < len(kept) < 14 and said["heads"] == HEADS
    assert [row["id"] for row in kept] == sorted(row["id"] for row in kept)  # in the order of the input
    for name, domain in said["domains"].items():
        assert domain["kept_tokens"] <= 0.5 * domain["tokens"]
        scores = [row["attention_influence"] for row in kept if row["source"] == name]
        assert min(scores) == pytest.approx(domain["threshold"])
    assert said["domains"]["b"]["undefined"] == 1  # the empty document
    lines = read(tmp_path / "out.jsonl.scores" / "part-00000-of-00001.jsonl")
    assert lines[0]["mode"] == "uniform" and len(lines[1]["controls"]) == 1 and lines[-1] == {"end": True}


def test_a_run_that_broke_off_goes_on(corpus, tmp_path, monkeypatch):
    whole = SelectJob((corpus,), tmp_path / "whole")
    assert whole.score(scorer()) == 14
    job = SelectJob((corpus,), tmp_path / "broken")
    lines = whole.part(0).read_text().splitlines(keepends=True)
    job.scores.mkdir()
    job.part(0).write_text("".join(lines[:6]) + lines[6][:9])  # killed in the middle of a line
    assert job.missing() == [0]
    with pytest.raises(ScoreError, match="not scored yet"):
        job.scored()
    assert job.score(scorer()) == 9
    one, other = whole.scored(), job.scored()
    assert [r.index for r in other] == list(range(14))
    assert [r.score for r in one] == pytest.approx([r.score for r in other], abs=1e-5, nan_ok=True)
    assert job.score(scorer()) == 0  # nothing is left to do


def test_parts_of_another_run_are_not_continued(corpus, tmp_path):
    job = SelectJob((corpus,), tmp_path / "scores")
    job.score(scorer())
    with pytest.raises(ScoreError, match="mode differ"):
        job.score(scorer(mode="zero"))


def test_whole_scores_of_another_request_or_corpus_are_not_selected_from(corpus, tmp_path, capsys):
    out = tmp_path / "out.jsonl"
    assert command(corpus, "-o", out, "--keep", "1") == 0 and command(corpus, "-o", out, "--keep", "0.4") == 0
    assert 0 < len(read(out)) < 13
    assert command(corpus, "-o", out, "--mode", "zero") == 2
    assert "(mode differ)" in capsys.readouterr().err
    corpus.write_text(corpus.read_text() + '{"text": "one more"}\n')
    assert command(corpus, "-o", out) == 2
    assert "(files differ)" in capsys.readouterr().err


def test_shards_together_are_one_run(corpus, tmp_path):
    one = SelectJob((corpus,), tmp_path / "one")
    one.score(scorer())
    job = SelectJob((corpus,), tmp_path / "three", shards=3)
    for shard in (2, 0):
        job.score(scorer(), shard)
    assert job.missing() == [1]
    job.score(scorer(), 1)
    assert [r.score for r in job.scored()] == pytest.approx([r.score for r in one.scored()], abs=1e-5, nan_ok=True)
    with pytest.raises(ScoreError, match="shard 3 of 3"):
        job.part(3)


def test_a_shard_of_the_command(corpus, tmp_path, capsys):
    out = tmp_path / "out.jsonl"
    assert command(corpus, "-o", out, "--shard", "1/2") == 0
    assert "shards [0] of 2" in capsys.readouterr().out and not out.exists()
    assert command(corpus, "-o", out, "--shard", "0/2", "--keep", "1") == 0
    assert len(read(out)) == 13


@pytest.mark.slow
def test_processes_of_the_command(corpus, tmp_path):
    out = tmp_path / "out.jsonl.gz"
    assert command(corpus, "-o", out, "--processes", "2", "--keep", "1") == 0
    with gzip.open(out, "rt") as file:
        assert len(file.readlines()) == 13


def test_gzip_goes_in_and_out(tmp_path):
    path = tmp_path / "a.jsonl.gz"
    assert _corpus.write(path, [{"text": "é"}, {"text": "b"}]) == 2
    assert [row for _, row in _corpus.rows([path])] == [{"text": "é"}, {"text": "b"}]


def test_parquet_goes_in_and_out(tmp_path, monkeypatch):
    pytest.importorskip("pyarrow")
    monkeypatch.setattr(_corpus, "ROWS", 4)
    rows = [{"text": f"t{i}", "source": "x", "n": i} for i in range(10)]
    assert _corpus.write(tmp_path / "a.parquet", rows) == 10
    assert [row for _, row in _corpus.rows([tmp_path / "a.parquet"])] == rows
    assert _corpus.write(tmp_path / "none.parquet", []) == 0


def test_parquet_without_pyarrow(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(ScoreError, match=r"pip install .headwise\[parquet\]"):
        _corpus.kind(Path("a.parquet"))


def test_bad_files(corpus, tmp_path):
    def job(text, **fields):
        path = tmp_path / "bad.jsonl"
        path.write_text(text)
        return list(SelectJob((path,), tmp_path / "s", Fields(**fields)).documents(0))

    with pytest.raises(ScoreError, match=r"bad.jsonl:1: no text under 'text'; fields that hold text: body"):
        job('{"body": "x", "n": 1}')
    with pytest.raises(ScoreError, match="no text under 'domain'"):
        job('{"text": "x"}', domain="domain")
    with pytest.raises(ArtifactError, match="bad.jsonl:2' is not the JSON"):
        job('{"text": "x"}\n{"text"')
    with pytest.raises(ArtifactError, match="where an object belongs"):
        job("[1]")
    with pytest.raises(ScoreError, match="no file"):
        SelectJob((tmp_path / "none.jsonl",), tmp_path)
    with pytest.raises(ScoreError, match="inputs is empty"):
        SelectJob((), tmp_path)
    with pytest.raises(ScoreError, match=r"\.jsonl, \.jsonl\.gz, \.parquet"):
        _corpus.kind(Path("a.csv"))
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    with pytest.raises(ScoreError, match="no documents"):
        SelectJob((empty,), tmp_path / "e").score(scorer())


def test_bad_options_end_with_one_line(corpus, tmp_path, capsys):
    out = tmp_path / "out.jsonl"
    for options, words in (
        (["--keep", "1.5"], "--keep 1.5"),
        (["--shard", "2/2"], "--shard '2/2'"),
        (["--shard", "0/2", "--processes", "2"], "leave --processes out"),
        (["--context", "1"], "context"),
    ):
        assert command(corpus, "-o", out, *options) == 2
        assert words in capsys.readouterr().err
    assert command(corpus, "-o", tmp_path / "out.csv") == 2


def test_undefined_scores_are_null_in_the_file():
    assert _select_job._plain({"a": math.nan, "b": [math.inf, 1.0]}) == {"a": None, "b": [None, 1.0]}


def test_parquet_in_and_out(corpus, tmp_path):
    """The same documents kept as from JSON Lines, with every column; more rows than one group holds are read in order."""
    pytest.importorskip("pyarrow", reason="Parquet is an extra: pip install 'headwise[parquet]'")
    rows = read(corpus)
    table, out, other = tmp_path / "corpus.parquet", tmp_path / "out.parquet", tmp_path / "out.jsonl"
    assert _corpus.write(table, rows) == 14
    assert [row for _, row in _corpus.rows([table])] == rows
    assert command(table, "-o", out, "--domain-field", "source", "--keep", "0.5") == 0
    assert command(corpus, "-o", other, "--domain-field", "source", "--keep", "0.5") == 0
    kept = [row for _, row in _corpus.rows([out])]
    assert kept == read(other) and {"text", "source", "id", "attention_influence"} <= set(kept[0])
    many = tmp_path / "many.parquet"
    assert _corpus.write(many, ({"text": str(i)} for i in range(2 * _corpus.ROWS + 3))) == 2 * _corpus.ROWS + 3
    found = [(where, row["text"]) for where, row in _corpus.rows([many])]
    assert [int(text) for _, text in found] == list(range(2 * _corpus.ROWS + 3)) and found[4][0].endswith("row 5")
    with pytest.raises(ScoreError, match="row 1: no text under 'body'"):
        Fields("body").read({"text": "a"}, f"{many}, row 1")
