"""DuoAttention's pass-phrase data: what is labelled, where the phrases stand, and sizes."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from headwise.errors import TaskError
from headwise.hub import byte_tokenizer
from headwise.tasks import PassphraseSpec, context_lengths, make_passphrases
from headwise.tasks.passphrases import IGNORE, NATO, _ordinal

TOKENIZER = byte_tokenizer()
SMALL = PassphraseSpec(phrases=3, words=4)


def make(length: int = 1000, seed: int = 0, **kwargs):
    return make_passphrases(TOKENIZER, length=length, generator=torch.Generator().manual_seed(seed), **kwargs)


@given(
    length=st.integers(900, 1500),
    batch=st.integers(1, 3),
    phrases=st.integers(1, 3),
    words=st.integers(1, 5),
    multiple=st.sampled_from([1, 16, 63]),
)
@settings(max_examples=25, deadline=None)
def test_shapes_labels_and_spans(length, batch, phrases, words, multiple):
    spec = PassphraseSpec(phrases=phrases, words=words, multiple_of=multiple)
    data = make(length, batch_size=batch, spec=spec)
    total = -(-length // multiple) * multiple
    assert data.ids.shape == data.labels.shape == (batch, total)
    assert data.spans.shape == (batch, phrases, 2)
    assert torch.equal(data.labels[data.supervised], data.ids[data.supervised])
    for row in range(batch):
        asked = TOKENIZER.decode(data.ids[row][data.supervised[row]])
        text_end = int(data.supervised[row].long().argmax())
        assert data.supervised[row, text_end:].all()  # nothing but questions and answers at the end
        assert not data.supervised[row, :text_end].any()
        for (start, stop), phrase in zip(data.spans[row].tolist(), data.phrases[row], strict=True):
            assert TOKENIZER.decode(data.ids[row, start:stop]) == f" {phrase}"
            assert stop <= text_end
            assert f"pass-phrase is: {phrase}." in asked
            assert set(phrase.split()) <= set(NATO)
            assert len(phrase.split()) == words


def test_phrases_stand_in_their_order_at_their_depths():
    data = make(3000, spec=SMALL)
    starts, depths = data.spans[0, :, 0], data.depths[0]
    assert (starts.diff() > 0).all()
    assert (depths.diff() > 0).all()
    assert ((depths >= 0.05) & (depths <= 0.95)).all()
    text = int((data.labels[0] == IGNORE).sum())
    torch.testing.assert_close(starts.double() / text, depths, atol=0.08, rtol=0)
    for name in ("first", "second", "third"):
        assert TOKENIZER.decode(data.ids[0]).count(f"the {name} pass-phrase is:") == 1


def test_one_generator_makes_the_same_data_and_rows_differ():
    first, second = make(seed=4, spec=SMALL, batch_size=2), make(seed=4, spec=SMALL, batch_size=2)
    assert torch.equal(first.ids, second.ids)
    assert first.phrases[0] != first.phrases[1]


def test_the_paper_sizes_are_the_defaults():
    spec = PassphraseSpec()
    assert (spec.phrases, spec.words, spec.depth_steps, len(NATO)) == (10, 32, 1000, 26)
    lengths = context_lengths()
    assert (len(lengths), lengths[0], lengths[-1]) == (50, 1000, 32000)
    assert [_ordinal(i) for i in (0, 9, 10, 20, 111)] == ["first", "tenth", "11th", "21st", "112th"]


def test_what_is_refused():
    for bad in ({"phrases": 0}, {"words": 0}, {"depth_low": 0.9, "depth_high": 0.1}, {"depth_steps": 5}):
        with pytest.raises(TaskError):
            PassphraseSpec(**bad)
    with pytest.raises(TaskError, match="too short"):
        make(300, spec=SMALL)
    with pytest.raises(TaskError, match="exceeds the context"):
        make(4097, spec=SMALL)
    with pytest.raises(TaskError, match="batch_size"):
        make(spec=SMALL, batch_size=0)
    with pytest.raises(TaskError):
        context_lengths(10, 5)
