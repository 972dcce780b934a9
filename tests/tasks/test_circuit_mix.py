"""The mix that circuit-lm reads: what stands in it, what does not, and which tokens are to be predicted."""

import functools

import pytest
import torch

from headwise.errors import TaskError
from headwise.models.circuit_lm import accuracies, probes
from headwise.tasks import circuit_mix as mix
from headwise.tasks.texts import encode


@functools.cache
def tokenizer():
    return mix.circuit_tokenizer(2048)


def pieces(kind, count=300, seed=0):
    draw = mix.Draw(torch.Generator().manual_seed(seed))
    return [mix.DOCUMENTS[kind](draw) for _ in range(count)]


def test_every_word_is_one_token():
    assert len(tokenizer()) == 2048 and tokenizer()("Mary").input_ids != tokenizer()(" Mary").input_ids
    assert all(len(tokenizer()(text).input_ids) == 1 for word in mix.every_word() for text in (word, " " + word))
    with pytest.raises(TaskError, match="vocabulary=400 is too small"):
        mix.circuit_tokenizer(400)


@pytest.mark.parametrize("kind", ["ioi", "worded", "colors", "asked", "pairs", "lists"])
def test_pieces_are_cut_where_tokens_are(kind):
    for document in pieces(kind, 40):
        together = encode(tokenizer(), "".join(text for text, _ in document))
        assert [t for text, _ in document for t in encode(tokenizer(), text)] == together


@pytest.mark.parametrize(
    "kind, words",
    [
        ("ioi", "names"),
        ("worded", "names"),
        ("colors", "objects"),
        ("asked", "objects"),
        ("pairs", "objects"),
        ("choice", "words"),
    ],
)
def test_held_out_words_and_openings_are_in_no_document(kind, words):
    seen = {text.strip() for document in pieces(kind) for text, _ in document}
    assert not seen & set(mix.HELD_OUT[words])
    assert not any("Which is" in text or "long talk" in text or text.startswith("When") for text in seen)
    assert set(mix.HELD_OUT[words]) <= {t.strip() for document in pieces("lists") for t, _ in document}


def test_what_is_asked_can_be_told_from_the_document():
    for document in pieces("ioi") + pieces("worded"):
        (answer,) = [text for text, wanted in document if wanted]
        names = [text for text, _ in document if text.strip() in mix.NAMES + mix.MORE_NAMES]
        assert names.count(answer) == 2 and len(set(names)) == 2 and names[-1] == answer
    for document in pieces("colors") + pieces("asked") + pieces("pairs"):
        for at in (n for n, (_, wanted) in enumerate(document) if wanted):
            texts = [text for text, _ in document[:at]]
            thing = texts[at - 2]
            assert texts[texts.index(thing) - 1].strip().capitalize() == document[at][0].strip()
    for document in pieces("choice"):
        for _, answer in ((n, text) for n, (text, wanted) in enumerate(document) if wanted):
            assert len(answer.strip()) == 1 and answer.strip().isupper()


def test_rows_are_whole_documents_in_their_shares():
    rows = mix.circuit_rows(tokenizer(), 100, 128, seed=1, code_chars=20_000)
    again = mix.circuit_rows(tokenizer(), 100, 128, seed=1, code_chars=20_000)
    assert torch.equal(rows.ids, again.ids) and torch.equal(rows.wanted, again.wanted)
    assert not torch.equal(rows.ids, mix.circuit_rows(tokenizer(), 100, 128, seed=2, code_chars=20_000).ids)
    assert len(rows) == 100 and rows.wanted[-15:].all() and not rows.wanted[:85].all(1).any()
    first = rows[0]
    assert first["labels"].dtype == torch.long and (first["labels"] == mix.IGNORED).sum() == (~rows.wanted[0]).sum()
    kept = first["labels"] != mix.IGNORED
    assert torch.equal(first["labels"][kept], first["input_ids"][kept])
    names = [tokenizer().decode(t).strip() for t in first["labels"][kept]]
    assert names and set(names) <= set(mix.NAMES + mix.MORE_NAMES)
    assert [len(part["input_ids"]) for part in rows[3:5]] == [128, 128]
    assert tokenizer().eos_token_id == int(rows.ids[0, -1]) or int(rows.ids[0, -1]) > 0


def test_mixes_are_shares_of_known_documents():
    for shares in mix.MIXES.values():
        assert sum(shares.values()) == pytest.approx(1) and set(shares) - set(mix.DOCUMENTS) == {"text"}
    dense = mix.circuit_rows(tokenizer(), 100, 128, mix="dense", seed=1, code_chars=20_000)
    assert len(dense) == 100 and dense.wanted[-15:].all()
    with pytest.raises(TaskError, match="mix='rich'"):
        mix.circuit_rows(tokenizer(), 10, 128, mix="rich")


def test_documents_to_look_at():
    assert all(text.startswith("List:") for text in mix.documents("lists", 3))
    with pytest.raises(TaskError, match="kind='poems'"):
        next(mix.documents("poems", 1))


class Oracle(torch.nn.Module):
    """A model that says what it is told to, row by row."""

    device = torch.device("cpu")

    def __init__(self, said):
        super().__init__()
        self.said = said

    def forward(self, input_ids, **more):
        out = torch.zeros(*input_ids.shape, 2048)
        out[:, -1] = torch.nn.functional.one_hot(self.said, 2048).float()
        return type("Out", (), {"logits": out[:, -1:]})


def test_accuracies_are_shares_of_right_answers():
    asked = probes(tokenizer(), count=4)
    assert set(asked) == {"ioi", "colors", "letters", "random", "question", "question_random"}
    for name, pairs in asked.items():
        model = Oracle(torch.cat([pairs.answers[:3], pairs.contrasts[3:]])).train()
        assert accuracies(model, {name: pairs}) == {name: 0.75} and model.training
