"""Where a vision-language model looks: the drawn attention is the model's, VAR moves it off sinks, and what is refused."""

import pytest
import torch

from headwise.attach import attach
from headwise.attach.maps import attention_map
from headwise.errors import TaskError
from headwise.report.looking import attention_panels, image_attention, looking_section
from headwise.report.page import render
from headwise.steer.var import VAR
from vlm_helper import PATCHES, llava, prompt

ROWS = prompt(["img", 5, 6, 7], [3, 4, "img", 8, 9])


def test_it_is_the_last_row_of_the_maps_whatever_the_padding():
    model, seen = llava(), {}
    drawn = image_attention(model, ROWS)
    watch = lambda call, out: seen.__setitem__(call.layer, attention_map(call)[:, :, -1].mean(1))
    with torch.no_grad(), attach(model, observers=[watch], stack="language_model"):
        model(**ROWS)
    assert drawn.shape == (2, 4, 4, 4)
    for row, first in ((0, 0), (1, 2)):  # positions of the first patch
        wanted = torch.stack([seen[layer][row, first : first + PATCHES] for layer in range(4)]).view(4, 4, 4)
        torch.testing.assert_close(drawn[row], wanted)


def test_var_takes_from_sinks_and_leaves_the_sum():
    model = llava()
    rule = VAR(dims=(5,), tau=1.2, layers=(1, 2, 3), move=1.0, centric=False)
    with rule.attach(model) as running, torch.no_grad():
        model(**ROWS)
        sinks = running.sinks[2][:1, :PATCHES]  # row 0 begins with its picture
    under = image_attention(model, ROWS, rule)[0, 2].flatten()
    assert sinks.any() and not under[sinks[0]].any() and under.sum() > 0


def test_the_section_is_a_page():
    pytest.importorskip("plotly", reason="needs plotly: pip install 'headwise[report]'")
    rule = VAR(dims=(5,), tau=1.2, layers=(1, 2, 3))
    section = looking_section(llava(), ROWS, rule, said=[("row 0", "red-disc")])
    page = render("T", "L", cards=[], sections=[section], facts=[])
    assert "under VAR" in page and "red-disc" in page and len(section.table.rows) == 4


def test_refused():
    with pytest.raises(TaskError, match=r"the rows have \[16, 32\] image tokens"):
        image_attention(llava(), prompt(["img", 5], ["img", "img", 8]))
    pytest.importorskip("plotly", reason="needs plotly: pip install 'headwise[report]'")
    with pytest.raises(TaskError, match="1 pictures and maps of"):
        attention_panels(torch.zeros(1, 3, 8, 8), {"a": torch.zeros(2, 4, 4)})
