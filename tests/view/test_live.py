"""The model at hand: maps, distances, alike heads, effects; each against what it must equal."""

import pytest
import torch

from headwise.attach import attach
from headwise.attach.ablate import ablate
from headwise.edits import Edit
from headwise.errors import AttachError, HeadwiseError, UnitError, ViewError
from headwise.hub import load_model
from headwise.plan import HeadPlan, SinkWindow
from headwise.units import HeadSet, Unit
from headwise.view import samples
from headwise.view.explorer import Ask, Explorer, check_files
from headwise.view.library import Library
from headwise.view.live import Live, ablation, distance_profile, lost_mass
from tiny_helper import state
from view_helper import LLAMA, folder_of

TEXT = "a quick brown fox, a quick"
MODELS = (LLAMA, "tiny-random-gpt2", "tiny-random-bert", "tiny-random-vit", "scene-vlm-0", "tiny-random-mixtral")


@pytest.fixture(scope="module", params=MODELS)
def live(request):
    return Live(*load_model(request.param), name=request.param)


def sample_of(live):
    return live.sample(TEXT if live.reads_text and not live.reads_pictures else "")


def test_rows_of_maps_and_bins_of_distances_sum_to_one(live):
    sample = sample_of(live)
    maps = live.maps(sample, 1)
    assert maps.shape == (live.shape[1], sample.tokens, sample.tokens)
    torch.testing.assert_close(maps.sum(-1), torch.ones(maps.shape[:2]))
    profile = distance_profile(maps[0], sample)
    assert sum(even for _, _, even in profile) == pytest.approx(1, abs=1e-5)
    total = sum(share for _, share, _ in profile)
    assert (
        total == pytest.approx(1, abs=1e-5) if sample.side is None else 0 < total <= 1
    )  # pictures: [CLS] has no distance


def test_statistics_are_those_of_the_maps(live):
    sample = sample_of(live)
    tables, maps = live.tables(sample), torch.stack([live.maps(sample, layer) for layer in range(live.shape[0])])
    entropy = -torch.xlogy(maps, maps).sum(-1).mean(-1)
    torch.testing.assert_close(tables["entropy"].values, entropy, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(tables["mass on the first token"].values, maps[..., 0].mean(-1), atol=1e-5, rtol=1e-4)
    before = maps.diagonal(-1, 2, 3).sum(-1) / sample.tokens
    torch.testing.assert_close(tables["mass on the token before"].values, before, atol=1e-5, rtol=1e-4)


def test_an_ablation_is_that_of_the_library_and_the_model_is_left_as_it_was(live):
    sample, unit, before = sample_of(live), Unit("head", 1, 2), state(live.model)
    effect = live.effect(sample, edits=ablation(unit))
    with torch.no_grad():
        plain = live.model(**sample.inputs).logits
        with ablate(live.model, "L1H2", stack=live.stack):
            without = live.model(**sample.inputs).logits
    pick = (lambda x: x[0, -1]) if plain.ndim == 3 else (lambda x: x[0])
    torch.testing.assert_close(effect.before.logits, pick(plain))
    torch.testing.assert_close(effect.after.logits, pick(without))
    assert effect.kl > 0
    assert effect.change != 0
    assert state(live.model) == before


def test_losses_are_cross_entropy_of_the_text_that_follows():
    live = Live(*load_model(LLAMA), name="x")
    sample = live.sample(TEXT)
    with torch.no_grad():
        wanted = live.model(**sample.inputs, labels=sample.inputs["input_ids"]).loss
    assert live.predict(sample).loss == pytest.approx(float(wanted), abs=1e-5)
    scene = Live(*load_model("scene-vlm-0"), name="x")
    seen = scene.sample("")
    assert scene.predict(seen).losses.shape == (seen.tokens - seen.first,)
    assert not any(label.startswith("▦") for label in seen.labels[seen.first :])


def test_a_head_is_most_like_its_copy():
    model, tokenizer = load_model(LLAMA)
    with torch.no_grad():  # head 3 of layer 2 gets the queries of head 2: both read the same kv head
        weight = model.model.layers[2].self_attn.q_proj.weight
        size = weight.shape[0] // 4
        weight[3 * size :] = weight[2 * size : 3 * size]
    live = Live(model, tokenizer, name="copy")
    (first, r), *_ = live.nearest(live.sample(TEXT), Unit("head", 2, 2), 3)
    assert first == Unit("head", 2, 3)
    assert r == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("prefill", ["masked", "dense"])
def test_a_plan_changes_the_loss_as_reading_through_its_cache_does(prefill):
    live = Live(*load_model(LLAMA), name="x")
    sample = live.sample(TEXT * 3)
    plan = HeadPlan.uniform(SinkWindow(1, 4), 3, 2, prefill=prefill)
    effect = live.effect(sample, plan=plan)
    ids, half = sample.inputs["input_ids"], sample.tokens // 2
    with torch.no_grad(), attach(live.model, plan=plan):
        if prefill == "masked":
            logits = live.model(ids).logits[0]
        else:
            out = live.model(ids[:, :half], use_cache=True)
            parts = [out.logits[0, -1:]]
            for piece in ids[:, half:].split(16, 1):
                out = live.model(piece, past_key_values=out.past_key_values, use_cache=True)
                parts.append(out.logits[0])
            logits = torch.cat(parts)
    torch.testing.assert_close(effect.after.logits, logits[-1], atol=1e-4, rtol=1e-4)
    assert effect.change != 0
    full = live.effect(sample, plan=HeadPlan.full(3, 2, prefill=prefill))
    assert abs(full.change) < 1e-5


def test_lost_mass_is_what_the_pattern_hides():
    live = Live(*load_model(LLAMA), name="x")
    sample = live.sample(TEXT)
    map_ = live.maps(sample, 1)[3]
    plan = HeadPlan.uniform(SinkWindow(2, 3), 3, 2)
    place = torch.arange(sample.tokens)
    hidden = (place[:, None] - place >= 3) & (place >= 2)
    torch.testing.assert_close(lost_mass(map_, plan, Unit("head", 1, 3), 2), (map_ * hidden).sum(1))
    assert float(lost_mass(map_, HeadPlan.full(3, 2), Unit("head", 1, 3), 2).abs().max()) == 0


@pytest.mark.parametrize(
    "prompt, text",
    [
        ("", "empty"),
        ("   ", "empty"),
        ("x", "1 tokens"),
        ("y" * 400, "400 tokens"),
        ("z" * 30_000, "30000 characters"),
        (3, "must be text"),
    ],
)
def test_prompts_that_cannot_be_shown(prompt, text):
    with pytest.raises(ViewError, match=text):
        samples.make_sample(*load_model(LLAMA), prompt=prompt)


@pytest.mark.parametrize("picture", [-1, 2**40, 0.5, True, "1"])
def test_pictures_have_whole_numbers(picture):
    with pytest.raises(ViewError, match="number of the picture"):
        samples.make_sample(*load_model("tiny-random-vit"), picture=picture)


@pytest.mark.parametrize(
    "upload", ["x", "data:text/html,x", "data:image/png;base64,!!!!", "data:image/png;base64,AAAA"]
)
def test_uploads_that_are_no_images(upload):
    with pytest.raises(ViewError, match=r"no image|cannot be read|needs pillow"):
        samples.make_sample(*load_model("tiny-random-vit"), upload=upload)


def test_an_uploaded_image_is_cut_to_its_middle_square():
    Image = pytest.importorskip("PIL.Image")
    import base64
    import io

    picture = Image.new("RGB", (64, 32), "black")
    picture.paste("white", (16, 0, 48, 32))
    file = io.BytesIO()
    picture.save(file, "PNG")
    sample = samples.make_sample(
        *load_model("tiny-random-vit"), upload="data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
    )
    assert float(sample.inputs["pixel_values"].min()) == 1.0


def test_a_model_with_two_towers_needs_to_be_told_which():
    model, tokenizer = load_model("tiny-random-clip")
    with pytest.raises(AttachError):
        Live(model, tokenizer, name="clip")


def test_explorer_joins_files_and_model(tmp_path):
    explorer = Explorer(Library.open([tmp_path]), Live(folder_of(tmp_path), load_model(LLAMA)[1], name="tiny"))
    explorer.library = Library.open([tmp_path])
    ask, unit = Ask(TEXT), Unit("head", 1, 2)
    assert "tiny, now: entropy" in explorer.tables(ask)
    assert explorer.marks()["edits.json: edited"] == HeadSet.parse("L0H0,L1H2")
    heads = explorer.marked("plan.json: full", explorer.table("alpha.safetensors"))
    assert heads == explorer.marks()["plan.json: full"].to_heads(2)
    assert explorer.marked("set.safetensors", explorer.table("gates.safetensors")) == HeadSet.parse("L0K0,L2K1")
    assert explorer.without(ask, unit, "zero") is explorer.without(ask, unit, "zero")
    assert len(explorer.chance(ask, unit, "zero", 3)) == 3
    assert unit not in explorer.live.others(unit, 11)
    changed = explorer.under(ask, None, "edits.json").change
    direct = explorer.live.effect(explorer.sample(ask), edits=explorer.library.get("edits.json", object)).change
    assert changed == pytest.approx(direct)
    assert check_files(explorer) == []


def test_explorer_refuses_what_is_not_there(tmp_path):
    folder_of(tmp_path)
    files_only = Explorer(Library.open([tmp_path]))
    for call in (
        lambda: files_only.maps(Ask(TEXT), Unit("head", 0, 0)),
        lambda: files_only.table("nothing"),
        lambda: files_only.points("plan.json"),
        lambda: files_only.sample(Ask(TEXT)),
    ):
        with pytest.raises(ViewError):
            call()
    with_model = Explorer(Library.open([tmp_path]), Live(*load_model(LLAMA), name="x"))
    with pytest.raises(UnitError, match="does not exist"):
        with_model.maps(Ask(TEXT), Unit("head", 7, 0))
    with pytest.raises(ViewError, match="mode"):
        with_model.without(Ask(TEXT), Unit("head", 0, 0), "explode")
    with pytest.raises(ViewError, match="no longer here"):
        with_model.sample(Ask(upload="gone"))
    other = Explorer(Library.open([tmp_path]), Live(*load_model("tiny-random-qwen3"), name="qwen"))
    assert len(check_files(other)) >= 5
    with pytest.raises(HeadwiseError, match="was made for"):
        other.under(Ask(TEXT), "plan.json", None)


@pytest.mark.parametrize("name", ["", "../out", "a/b", ".hidden", "x" * 200, "a\\b", None, "a..b", "ü"])
def test_exports_stay_in_the_folder(tmp_path, name):
    explorer = Explorer(Library.open([tmp_path]))
    with pytest.raises(ViewError, match="no file name"):
        explorer.export(HeadSet.parse("L0H0"), name)
    assert list(tmp_path.iterdir()) == []


def test_an_export_reads_back_and_replaces_nothing(tmp_path):
    model = folder_of(tmp_path)
    explorer = Explorer(Library.open([tmp_path]), Live(model, load_model(LLAMA)[1], name="x"))
    chosen = HeadSet.parse("L0H1,L2H3")
    path = explorer.export(chosen, "mine")
    assert HeadSet.load(path, fingerprint=explorer.live.fingerprint) == chosen
    assert explorer.library.of("set")["mine.safetensors"].value == chosen
    with pytest.raises(ViewError, match="exists already"):
        explorer.export(chosen, "mine")
    with pytest.raises(ViewError, match="nothing is selected"):
        explorer.export(HeadSet.empty(), "none")


def test_edit_of_one_head_touches_that_head():
    assert ablation(Unit("head", 2, 1), "uniform") == Edit.uniform(HeadSet.parse("L2H1"))
