"""A reproduction with given numbers, and a row of the catalogue with a given record."""

from headwise.papers import Check, Paper, Reproduction
from headwise.papers.catalogue import Row, row


def reproduction(top: float = 0.0, **changes) -> Reproduction:
    checks = (Check("specific", "recall_top3", "<", "recall_random"), Check("", "recall_top3", "<=", 0.25))
    values = {
        "paper": "moh",
        "claim": "c",
        "scale": "cpu",
        "metrics": {"recall_top3": top},
        "baselines": {"recall_random": 1},
    }
    return Reproduction(**{**values, "checks": checks, "seconds": 1.0, **changes})


class FakeRow(Row):
    """A row whose module and record are given."""

    module = None
    record = None


def fake(monkeypatch, *, status="works", api="headwise.cli.main", record=None, function=reproduction) -> Row:
    import types

    module = types.SimpleNamespace(PAPER=Paper(slug="moh", status=status, api=api, claim="c"), reproduce=function)
    made = FakeRow(*(getattr(row("moh"), name) for name in ("id", "slug", "verb", "arxiv", "title")))
    monkeypatch.setattr(FakeRow, "module", module)
    monkeypatch.setattr(FakeRow, "record", record)
    return made
