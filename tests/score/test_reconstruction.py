"""Reading a text back: the score against a loop, and a model that is wired to copy."""

import pytest
import torch

import headwise
from handwired import INDUCTION, handwired_induction
from headwise.budget import duo
from headwise.errors import ScoreError
from headwise.score import reconstruction
from headwise.score.reconstruction import read_back
from tiny_helper import oracle, tiny, tokens


def test_the_score_is_the_loop():
    """Attention of an independent dense oracle; its largest entry for each key of the first copy."""
    model, text, ask, seen = tiny(), tokens(1, 30)[0], tokens(1, 5, seed=1)[0], {}
    with oracle(model, seen=seen), torch.no_grad():
        model(torch.cat([text, ask, text])[None])
    for how in ("mean", "max"):
        got = read_back(model, text, ask, how)
        for layer in range(3):
            for head in range(2):
                weights = seen[layer][0][0, 2 * head : 2 * head + 2, 35:, :30]
                best = torch.stack([weights[..., j].max() for j in range(30)])
                want = best.mean() if how == "mean" else best.max()
                assert float(got[layer, head]) == pytest.approx(float(want), abs=1e-5)


def test_a_head_that_is_wired_to_copy_comes_first():
    model = handwired_induction()
    vocabulary = model.config.vocab_size
    text = torch.randperm(vocabulary - 1, generator=torch.Generator().manual_seed(0))[:20]
    table = read_back(model, text, text[:0])
    layer, head = INDUCTION
    G = headwise.find_stack(model).heads // headwise.find_stack(model).kv_heads
    assert table[layer].argmax() == head // G and table[layer, head // G] > 0.5


def test_scores_follow_the_seed_and_make_plans():
    model, tokenizer = headwise.load_model("tiny-random-llama")
    one = reconstruction(model, tokenizer, tokens=50, seed=1)
    assert one == reconstruction(model, tokenizer, tokens=50, seed=1) and one != reconstruction(
        model, tokenizer, tokens=50
    )
    assert ((one.values >= 0) & (one.values <= 1)).all()
    assert len(duo(one, sparsity=0.5, sinks=2, window=4).full_heads()) == 3


@pytest.mark.parametrize(
    "options, word",
    [
        ({"tokens": 0}, "tokens is 0"),
        ({"texts": 0}, "texts is 0"),
        ({"reduce": "sum"}, "reduce"),
        ({"tokens": 10**8}, "packaged text"),
    ],
)
def test_bad_options(options, word):
    with pytest.raises(ScoreError, match=word):
        reconstruction(*headwise.load_model("tiny-random-llama"), **options)
