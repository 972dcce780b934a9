"""Scenes: pictures, questions and answers agree; what a model says is counted right; bad input is refused."""

import pytest
import torch

from headwise.errors import AttachError, TaskError
from headwise.hub import load_model
from headwise.models.scene_vlm import scene_vlm
from headwise.tasks.descriptions import Descriptions, pull_of_habit
from headwise.tasks.pictures import picture_batches, picture_size
from headwise.tasks.scenes import (
    CELLS,
    EMPTY,
    EOS,
    FIRST_OBJECT,
    ID,
    IMAGE,
    NUMBERS,
    PAD,
    draw,
    make_scenes,
    make_talk,
    scene_tokenizer,
    second_of,
)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def pairs(scenes):
    """(firsts, firsts whose second is there too) over all pictures."""
    firsts = [
        (kind, scenes.objects(row)) for row in range(len(scenes)) for kind in scenes.objects(row) if kind % 2 == 0
    ]
    return len(firsts), sum(second_of(kind) in there for kind, there in firsts)


def test_pictures_show_the_cells():
    scenes = make_scenes(40, noise=0.0, generator=generator())
    clean = draw(scenes.cells)
    assert torch.equal(scenes.pixels, clean)
    for row in range(3):
        for cell in range(CELLS):
            y, x = 8 * (cell // 4), 8 * (cell % 4)
            patch = clean[row, :, y : y + 8, x : x + 8]
            assert bool(patch.any()) == (scenes.cells[row, cell] != EMPTY)
    kinds = [draw(torch.full((1, CELLS), kind)) for kind in range(12)]
    assert all(not torch.equal(a, b) for i, a in enumerate(kinds) for b in kinds[:i])


def test_habits():
    for habit, low, high in (("half", 0.3, 0.7), ("broken", 0.0, 0.0)):
        firsts, kept = pairs(make_scenes(300, habit=habit, generator=generator()))
        assert low <= kept / firsts <= high
    kept = make_scenes(100, habit="kept", generator=generator())
    assert pairs(kept)[0] == pairs(kept)[1]
    talk = make_talk(300, generator=generator())
    said = [[i - FIRST_OBJECT for i in row if i >= FIRST_OBJECT] for row in talk["labels"].tolist()]
    followed = [k + 1 == n for row in said for k, n in zip(row, row[1:]) if k % 2 == 0]
    assert 0.75 < sum(followed) / len(followed) < 0.95
    assert not (talk["input_ids"] == IMAGE).any()


def test_answers_are_true():
    for task in ("at", "count"):
        scenes = make_scenes(50, task=task, questions=3, generator=generator())
        batch = scenes.training()
        for row in range(50):
            ids, labels = batch["input_ids"][row].tolist(), batch["labels"][row].tolist()
            asked = [i for i, label in enumerate(labels) if label not in (-100, EOS)]
            assert len(asked) == 3
            for place in asked:
                what, answer = ids[place - 2], labels[place]
                if task == "count":
                    assert answer == ID[NUMBERS[int((scenes.cells[row] == what - FIRST_OBJECT).sum())]]
                else:
                    kind = int(scenes.cells[row, what - ID[NUMBERS[0]]])
                    assert answer == (ID["nothing"] if kind == EMPTY else FIRST_OBJECT + kind)
    described = make_scenes(50, slip=0.0, generator=generator())
    for row, answer in enumerate(described.answers):
        assert {i - FIRST_OBJECT for i in answer[:-1]} == described.objects(row) and answer[-1] == EOS
    slips = make_scenes(100, habit="broken", slip=1.0, generator=generator())
    assert all(len(answer) - 1 == 2 * len(slips.objects(row)) for row, answer in enumerate(slips.answers))


def test_same_seed_same_scenes_and_training_batches_are_whole():
    one, two = (make_scenes(5, generator=generator(7)) for _ in range(2))
    assert torch.equal(one.pixels, two.pixels) and one.answers == two.answers
    batch = one.training()
    assert (batch["input_ids"] == IMAGE).sum(1).tolist() == [16] * 5
    assert torch.equal(batch["attention_mask"] == 0, batch["input_ids"] == PAD)
    assert (batch["labels"][batch["labels"] != -100] != PAD).all()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"task": "x"}, "task='x'"),
        ({"habit": "x"}, "habit='x'"),
        ({"noise": -1}, "noise=-1"),
        ({"slip": 2}, "slip=2"),
        ({"questions": 2}, "questions is 2"),
    ],
)
def test_refused(options, said):
    with pytest.raises(TaskError, match=said):
        make_scenes(2, generator=generator(), **options)


def test_the_pull_of_a_habit_is_the_chance_of_the_second_behind_its_first():
    model = scene_vlm()
    scenes = make_scenes(5, habit="half", generator=generator(2))
    seen, unseen = [], []
    for row, answer in enumerate(scenes.answers):
        for place, token in enumerate(answer[:-1]):
            second = second_of(token - FIRST_OBJECT)
            if second is None or second in scenes.objects(row):
                continue
            said = torch.tensor([answer[: place + 1]])
            ids = torch.cat([scenes.prompt[row : row + 1], said], dim=1)
            bare = torch.cat([ids[:, :1], ids[:, 1 + CELLS :]], dim=1)
            for found, given in (
                (seen, {"input_ids": ids, "pixel_values": scenes.pixels[row : row + 1]}),
                (unseen, {"input_ids": bare}),
            ):
                with torch.no_grad():
                    found.append(model(**given).logits[0, -1].softmax(-1)[FIRST_OBJECT + second])
    pull = pull_of_habit(model, scenes)
    assert seen and pull["seen"] == pytest.approx(float(torch.stack(seen).mean()), rel=1e-5)
    assert pull["unseen"] == pytest.approx(float(torch.stack(unseen).mean()), rel=1e-5)
    for wrong in (
        make_scenes(2, task="count", generator=generator()),
        make_scenes(4, habit="kept", generator=generator()),
    ):
        with pytest.raises(TaskError, match="a first without its second"):
            pull_of_habit(model, wrong)


def test_descriptions_are_counted_by_kind():
    scenes = make_scenes(2, generator=generator())
    real = [sorted(scenes.objects(row)) for row in range(2)]
    wrong = next(kind for kind in range(12) if kind not in scenes.objects(0))
    answers = torch.full((2, 12), PAD)
    first = [*real[0], real[0][0], wrong, wrong]
    answers[0, : len(first)] = torch.tensor(first) + FIRST_OBJECT
    answers[1, 0] = real[1][0] + FIRST_OBJECT
    found = Descriptions(scenes, answers).measures()
    named = len(real[0]) + 1 + 1
    assert found["chair_s"] == 0.5 and found["chair_i"] == pytest.approx(1 / named)
    assert found["recall"] == pytest.approx((len(real[0]) + 1) / (len(real[0]) + len(real[1])))
    assert found["length"] == (len(first) + 1) / 2 and found["repeats"] == pytest.approx(1 - named / (len(first) + 1))
    silent = Descriptions(scenes, torch.full((2, 3), PAD)).measures()
    assert silent["f1"] == silent["recall"] == silent["chair_i"] == 0.0


def test_pictures_for_models():
    model, tokenizer = load_model("tiny-random-llava")
    batches = picture_batches(model, tokenizer, 5, batch_size=2, prompt="What?")
    assert [len(b["input_ids"]) for b in batches] == [2, 2, 1] and picture_size(model) == (32, 16)
    assert model(**batches[2]).logits.shape[0] == 1
    scene, words = load_model("scene-vlm-0")
    ids = picture_batches(scene, words, 1)[0]["input_ids"][0].tolist()
    assert ids[-2:] == [ID["describe"], ID[":"]] and ids.count(IMAGE) == 16
    assert words.get_vocab() == scene_tokenizer().get_vocab() == ID
    with pytest.raises(TaskError, match="needs a tokenizer"):
        picture_batches(model, None, 2)
    with pytest.raises(TaskError, match="give batches="):
        picture_batches(*load_model("tiny-random-qwen2-vl"), 2)
    with pytest.raises(AttachError, match="no image token"):
        picture_batches(*load_model("tiny-random-llama"), 2)
