"""The items come through unchanged, with and without a bar; without one nothing is wrapped or printed."""

from headwise.progress import track


def test_the_items_are_what_was_given(capsys):
    items = [3, 1, 2]
    assert track(items, "sorting", progress=False) is items
    assert capsys.readouterr() == ("", "")
    assert list(track(items, "sorting", progress=True)) == items
    assert list(track((n for n in items), "without a length", progress=True)) == items
    shown = "".join(capsys.readouterr())  # standard error where a command of ours ran before
    assert "sorting" in shown and "without a length" in shown
