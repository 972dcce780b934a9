"""The items come through unchanged, with and without a bar; without one nothing is wrapped."""

from headwise.progress import track


def test_the_items_are_what_was_given(capsys):
    items = [3, 1, 2]
    assert track(items, "sorting", progress=False) is items
    assert list(track(items, "sorting", progress=True)) == items
    assert list(track((n for n in items), "without a length", progress=True)) == items
    assert capsys.readouterr().err == ""
