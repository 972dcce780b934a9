"""A reproduction's verdict is computed from its numbers, survives JSON, and cannot lie; a row works only with a record that holds."""

import json

import pytest

import headwise.papers
from headwise.errors import HeadwiseError
from headwise.papers import Check, Reproduction
from headwise.papers.catalogue import rows
from papers_helper import fake, reproduction


def test_no_paper_claims_more_than_it_proves():
    assert [f"{r.slug}: {problem}" for r in rows() for problem in r.problems()] == []


def test_holds_is_computed_and_can_be_false():
    assert reproduction(0.1).holds
    assert not reproduction(0.5).holds
    assert [str(check) for check in reproduction(0.5).failed()] == ["recall_top3 <= 0.25"]
    assert not reproduction(float("nan")).holds
    assert not reproduction(float("-inf")).holds


def test_a_record_survives_json_and_cannot_lie():
    for made in (reproduction(0.1), reproduction(0.5), reproduction(float("nan"))):
        data = json.loads(made.to_json())
        assert list(data) == [
            "paper", "claim", "scale", "metrics", "baselines", "expected", "holds", "seconds", "environment"
        ]  # fmt: skip
        assert Reproduction.from_json(made.to_json()).to_dict() == made.to_dict()
        with pytest.raises(HeadwiseError, match="its numbers say"):
            Reproduction.from_json(json.dumps({**data, "holds": not data["holds"]}))


@pytest.mark.parametrize(
    "changes, problem",
    [
        ({"checks": ()}, "has no check"),
        ({"scale": "tpu"}, "scale is one of"),
        ({"baselines": {"recall_top3": 1}}, "both as metric and as baseline"),
        ({"metrics": {}}, "needs 'recall_top3'"),
    ],
)
def test_a_reproduction_that_proves_nothing_is_refused(changes, problem):
    with pytest.raises(HeadwiseError, match=problem):
        reproduction(**changes)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"paper": 1}', '"x"', "null"])
def test_a_broken_record_is_one_clear_error(text):
    with pytest.raises(HeadwiseError):
        Reproduction.from_json(text)


@pytest.mark.parametrize("text", ["", "a", "a <", "a < b < c", "< b", "a ~ b", "x: : a < b"])
def test_a_broken_check_is_one_clear_error(text):
    with pytest.raises(HeadwiseError, match="not a check"):
        Check.parse(text)


def test_the_environment_holds_no_host_and_no_path():
    import socket

    text = json.dumps(headwise.papers.environment())
    assert "/" not in text.replace("cpu (", "")
    assert socket.gethostname() not in text


def test_works_needs_an_api_and_a_record_that_holds(monkeypatch):
    assert fake(monkeypatch, record=reproduction(0.1)).status == "works"
    cases = [
        ({"record": None}, "no recorded run"),
        ({"record": reproduction(0.5)}, "this is false: recall_top3 <= 0.25"),
        ({"record": reproduction(0.1, claim="other")}, "tests another claim"),
        ({"record": reproduction(0.1), "api": "headwise.cli.nothing"}, "cannot be imported"),
        ({"record": reproduction(0.1), "function": None}, "no reproduce"),
    ]
    for changes, problem in cases:
        made = fake(monkeypatch, **changes)
        assert made.status == "partial"
        assert any(problem in text for text in made.problems())
    assert fake(monkeypatch, status="partial").problems() == []
