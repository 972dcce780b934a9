"""Recipes at a size that trains in a second: smaller models, fewer pictures and rows, shorter texts; the same code."""

from headwise.route import _recipes_flow as flows
from headwise.route import _recipes_images as pictures
from headwise.route import _recipes_recover as recovery
from headwise.route import _recipes_text as texts

TEXTS = texts.TextSize(width=32, layers=2, heads=4, hidden=64, steps=4, batch=4, length=24)
PICTURES = pictures.ImageSize(width=32, layers=2, heads=4, steps=3, batch=8, pictures=64, held_out=32)
FLOWS = flows.FlowSize(width=32, layers=2, heads=4, steps=3, batch=8, pictures=32, held_out=16)
RECOVERY = recovery.RecoverSize(
    steps=3, batch=2, window=64, fit_tokens=1024, eval_tokens=256, held_out=2, passkeys=1, length=200, chars=20_000
)


def shrink(monkeypatch):
    """What the recipes take for `size="cpu"`, until the test ends."""
    for module, size in ((texts, TEXTS), (pictures, PICTURES), (flows, FLOWS), (recovery, RECOVERY)):
        monkeypatch.setitem(module.SIZES, "cpu", size)
    monkeypatch.setattr(texts, "HELD_OUT", 8)
