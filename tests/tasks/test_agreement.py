"""Agreement with the untouched model: the measures are those of the books, and a plan is felt through generate."""

import pytest
import torch

import headwise
from headwise import HeadPlan, HeadwiseCache, SinkWindow
from headwise.errors import TaskError
from headwise.hub import byte_tokenizer, load_model
from headwise.tasks import Agreement, continuations, make_documents
from headwise.tasks.agreement import bootstrap, rouge_l
from headwise.tasks.batches import padded


@pytest.fixture(scope="module")
def llama():
    return load_model("tiny-random-llama")


def documents(tokenizer, count=4, length=200, seed=0):
    return make_documents(tokenizer, count=count, length=length, generator=torch.Generator().manual_seed(seed))


def longest_common(a, b):
    """By trying all subsequences of the shorter."""
    best = 0
    for chosen in range(1 << len(a)):
        part, at = [x for i, x in enumerate(a) if chosen >> i & 1], 0
        for x in b:
            at += at < len(part) and part[at] == x
        best = max(best, at if at == len(part) else 0)
    return best


@pytest.mark.parametrize("seed", range(6))
def test_rouge_l_is_the_longest_common_subsequence(seed):
    generator = torch.Generator().manual_seed(seed)
    a, b = (torch.randint(4, (n,), generator=generator).tolist() for n in (8, 11))
    assert rouge_l(a, b) == pytest.approx(2 * longest_common(a, b) / 19)


def test_measures_of_equal_other_and_empty_texts():
    same = Agreement.of([[1, 2], [3]], [[1, 2], [3]])
    assert same.rouge_l == same.overlap == same.prefix == (1.0, 1.0) and same.chance == (0.0, 0.0)
    mixed = Agreement.of([[1, 2, 3, 4]], [[2, 1, 3, 4, 5, 6]])
    assert mixed.overlap[0] == pytest.approx(0.8) and mixed.prefix == (0.0,) and mixed.rouge_l[0] == pytest.approx(0.6)
    assert mixed.chance == () and mixed.interval() == (0.0, 1.0)
    assert Agreement.of([[], [1]], [[], []]).prefix == (1.0, 0.0)


def test_the_interval_holds_the_mean_and_shrinks():
    few, many = bootstrap([0.0, 1.0] * 3), bootstrap([0.0, 1.0] * 60)
    assert few[0] < many[0] < 0.5 < many[1] < few[1] and bootstrap([0.7] * 5) == pytest.approx((0.7, 0.7))


def test_documents_fill_their_length_and_follow_the_seed():
    made = documents(byte_tokenizer())
    assert all(190 < len(ids) <= 200 for ids in made)
    assert all(torch.equal(a, b) for a, b in zip(made, documents(byte_tokenizer()), strict=True))
    assert not torch.equal(made[0], documents(byte_tokenizer(), seed=1)[0])
    assert "Sum up the text above" in byte_tokenizer().decode(made[0])


def test_a_full_plan_agrees_wholly_and_a_small_one_does_not(llama):
    model, tokenizer = llama
    texts = [ids[: 200 - 30 * i] for i, ids in enumerate(documents(tokenizer))]
    reference = continuations(model, texts, new_tokens=12)
    assert continuations(model, texts, new_tokens=12, batch_size=3) == reference
    with headwise.attach(model, plan=HeadPlan.full(3, 2)):
        whole = Agreement.of(reference, continuations(model, texts, new_tokens=12, batch_size=2))
    assert set(whole.rouge_l) == {1.0} and whole.to_dict()["prefix"] == {"mean": 1.0, "low": 1.0, "high": 1.0}
    plan, made = HeadPlan.uniform(SinkWindow(1, 3), 3, 2), []

    def cache():
        made.append(HeadwiseCache(plan))
        return made[-1]

    with headwise.attach(model, plan=plan):
        small = Agreement.of(reference, continuations(model, texts, new_tokens=12, batch_size=2, cache=cache))
    assert sum(small.rouge_l) < 4 and len(made) == 2 and made[0].get_seq_length() > 100


def test_text_ends_at_the_end_mark(llama):
    model, tokenizer = llama
    texts = documents(tokenizer, 2, 160)
    before = model.generation_config.eos_token_id
    reference = continuations(model, texts, new_tokens=6)
    model.generation_config.eos_token_id = reference[0][2]
    try:
        ended = continuations(model, texts, new_tokens=6, batch_size=2)
    finally:
        model.generation_config.eos_token_id = before
    assert ended[0] == reference[0][: reference[0].index(reference[0][2])]


def test_padding():
    rows = [torch.tensor([5, 6, 7]), torch.tensor([8])]
    assert padded(rows)[0].tolist() == [[5, 6, 7], [0, 0, 8]]
    ids, mask = padded(rows, "right", 9)
    assert ids.tolist() == [[5, 6, 7], [8, 9, 9]] and mask.tolist() == [[1, 1, 1], [1, 0, 0]]


@pytest.mark.parametrize(
    "call, word",
    [
        (lambda: make_documents(byte_tokenizer(), count=0, length=100, generator=torch.Generator()), "count=0"),
        (lambda: make_documents(byte_tokenizer(), count=1, length=10, generator=torch.Generator()), "too short"),
        (lambda: Agreement.of([], []), "0 texts"),
        (lambda: Agreement.of([[1]], []), "cannot be compared"),
        (lambda: continuations(load_model("tiny-random-llama")[0], [], new_tokens=0), "new_tokens=0"),
    ],
)
def test_bad_input(call, word):
    with pytest.raises(TaskError, match=word):
        call()
