"""The section about guidance: pictures in their places, heads in their order."""

import pytest
import torch

from headwise.attach import fingerprint
from headwise.errors import TaskError
from headwise.report.guidance import guidance_section, sample_grid
from headwise.report.page import render
from headwise.steer import hunt
from tiny_helper import tiny

pytest.importorskip("plotly", reason="needs plotly: pip install 'headwise[report]'")


def test_pictures_stand_in_rows():
    pictures = torch.arange(5.0)[:, None, None, None].expand(5, 1, 2, 2) / 10
    tiles = torch.tensor(sample_grid({"a": pictures}, columns=3).data[0].z)
    assert tiles.shape == (4, 6)
    torch.testing.assert_close(tiles[0, ::2], torch.tensor([0.0, 0.1, 0.2]))
    torch.testing.assert_close(tiles[2, ::2], torch.tensor([0.3, 0.4, -1.0]))


class Toy:
    pairs = 1

    def __call__(self, strengths, like=None):
        return torch.zeros(1, 1, 2, 4) if strengths is None else strengths[:, None]


def test_the_section_names_the_chosen_heads():
    worth = torch.tensor([[0.0, 3.0, 1.0, 0.0], [0.0, 0.0, 2.0, 0.0]])
    model = tiny("vit")
    found = hunt(model, Toy(), lambda images: (images * worth).sum((1, 2)), k=1, rounds=2)
    section = guidance_section(found, {"plain": torch.zeros(4, 1, 8, 8), "guided": torch.ones(4, 1, 8, 8)})
    assert [row[1] for row in section.table.rows] == ["L0H1", "L1H2"]
    page = render("T", "L", cards=[], sections=[section], facts=[("model", str(fingerprint(model)))])
    assert "L1H2" in page and "<script src" not in page


def test_bad_pictures():
    with pytest.raises(TaskError, match="pictures is empty"):
        sample_grid({})
    with pytest.raises(TaskError, match=r"pictures 'a' have shape \(4, 8, 8\)"):
        sample_grid({"a": torch.zeros(4, 8, 8)})
