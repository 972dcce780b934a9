"""Damaged files: every reader gives a valid artifact or a HeadwiseError, never anything else."""

import json
import random

import pytest
import torch

from headwise import storage
from headwise.edits import Edit, HeadEdits, KeyGroup
from headwise.errors import ArtifactError, HeadwiseError
from headwise.plan import Elastic, Full, HeadPlan, SinkWindow
from headwise.units import Fingerprint, HeadScores, HeadSet

MODEL = Fingerprint(architecture="LlamaForCausalLM", config_hash="ab12", layers=3, heads=4, kv_heads=2)
FILES = 500
ODD = [
    None,
    True,
    -1,
    0,
    1,
    2**31,
    2**63,
    10**30,
    1.5,
    -0.0,
    1e308,
    "",
    "full",
    "L1H1",
    "é\x00",
    [],
    {},
    [[]],
    [[0]],
    {"a": 1},
    [1] * 50,
]
HEADERS = [
    "F32",
    "F64",
    "BF16",
    "I64",
    "BOOL",
    "U8",
    "F8_E4M3",
    "F4",
    "X",
    [0],
    [2**62, 0],
    [0, 2**63],
    [-1],
    [1, 1],
    [0, 4],
    [4, 0],
    [0, 2**64 - 1],
]


def save_set(path):
    HeadSet.parse("L0H1:0.5,L2H3").save(path, fingerprint=MODEL)


def save_scores(path):
    HeadScores(values=torch.rand(3, 4), method="m", data="d", fingerprint=MODEL, meta={"tests": 3}).save(path)


def save_plan(path):
    row = (Full(), SinkWindow(2, 6), Elastic(1, 2, 0.5, compensation="count"))
    HeadPlan(patterns=(row, row[::-1]), prefill="dense", method="m", meta={"x": 0.5}).save(path)


def save_edits(path):
    units = HeadSet.parse("L0H1:0.5,L2H3")
    groups = [KeyGroup("sinks", "0:4", 0.5), KeyGroup("rest", "all")]
    edits = [Edit.scale(units, 2.0), Edit.replace(units, torch.randn(2, 4)), Edit.reweight(units, groups)]
    HeadEdits.of(*edits, fingerprint=MODEL, method="m").save(path)


def save_retrieval(path):
    HeadScores(values=torch.rand(2, 2), method="m").to_retrieval_json(path)


def load_retrieval(path):
    return HeadScores.from_retrieval_json(path, 2, 2)


def load_tensors(path):
    return storage.read_tensors(path, "head-scores", 1, {"values": (torch.float32, 2)})


READERS = {
    "set": (save_set, HeadSet.load, "a.safetensors"),
    "scores": (save_scores, HeadScores.load, "a.safetensors"),
    "tensors": (save_scores, load_tensors, "a.safetensors"),
    "plan": (save_plan, HeadPlan.load, "a.json"),
    "edits": (save_edits, HeadEdits.load, "a.json"),
    "retrieval": (save_retrieval, load_retrieval, "a.json"),
}


def damage_bytes(rng, data):
    """Flip bits, cut, repeat, insert or overwrite a few bytes."""
    data = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 8])):
        place = rng.randrange(len(data) + 1)
        kind = rng.choice(["flip", "flip", "flip", "cut", "drop", "insert", "repeat", "size"])
        if kind == "flip" and place < len(data):
            data[place] ^= 1 << rng.randrange(8)
        elif kind == "cut":
            del data[place:]
        elif kind == "drop":
            del data[place : place + rng.randrange(1, 9)]
        elif kind == "insert":
            data[place:place] = rng.randbytes(rng.randrange(1, 9))
        elif kind == "repeat":
            data[place:place] = data[place : place + 32]
        elif kind == "size":
            data[:8] = rng.choice([0, 1, 7, len(data), 2**31, 2**62, 2**64 - 1]).to_bytes(8, "little")
    return bytes(data)


def places(value, found=()):
    """Every (container, key) inside a JSON value."""
    for key, item in list(
        value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    ):
        yield value, key
        yield from places(item)


def damage_value(rng, document, odd):
    """Replace, remove, rename or double a few entries anywhere in a JSON document."""
    for _ in range(rng.choice([1, 1, 2, 4])):
        options = list(places(document))
        if not options:
            return
        parent, key = rng.choice(options)
        kind = rng.choice(["replace", "replace", "replace", "remove", "rename", "nest"])
        if kind == "replace":
            parent[key] = json.loads(json.dumps(rng.choice(odd)))
        elif kind == "remove":
            parent.pop(key)
        elif kind == "rename" and isinstance(parent, dict):
            parent[rng.choice(["x", "", "headwise", "schema", "kind"])] = parent.pop(key)
        elif kind == "nest":
            parent[key] = [parent[key]]


def damage_json(rng, data):
    document = json.loads(data)
    damage_value(rng, document, ODD)
    return json.dumps(document, allow_nan=True).encode()


def damage_header(rng, data):
    """Damage the structure of a safetensors header, or the JSON texts in its metadata."""
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    if rng.random() < 0.5:
        damage_value(rng, header, ODD + HEADERS)
    else:
        values = {
            key: json.loads(value) if key != "headwise" else value for key, value in header["__metadata__"].items()
        }
        damage_value(rng, values, ODD)
        header["__metadata__"] = {
            key: value if key == "headwise" else json.dumps(value) for key, value in values.items()
        }
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data[8 + size :]


def read_or_refuse(load, path):
    """Whether the file loads; anything but success or a HeadwiseError fails the test."""
    refusal = None
    try:
        found = load(path)
        str(found), repr(found)
    except HeadwiseError as error:
        refusal = error
    if refusal is not None:
        assert isinstance(refusal, ArtifactError)
        assert str(path.with_suffix("")) in str(refusal) and len(str(refusal)) < 2000
    return refusal is None


def fuzz(name, tmp_path, target, damages):
    """Damage the file `target` of a saved artifact many times; (files that loaded, files that were refused)."""
    save, load, file_name = READERS[name]
    path = tmp_path / file_name
    save(path)
    assert read_or_refuse(load, path)
    target = tmp_path / (target or file_name)
    data, rng = target.read_bytes(), random.Random(name)
    loaded = 0
    for turn in range(FILES):
        target.write_bytes(damages[turn % len(damages)](rng, data))
        loaded += read_or_refuse(load, path)
    return loaded, FILES - loaded


@pytest.mark.parametrize("name", ["set", "scores", "tensors"])
def test_damaged_tensor_files(tmp_path, name):
    _, refused = fuzz(name, tmp_path, None, [damage_bytes, damage_header])
    assert refused > FILES // 2


@pytest.mark.parametrize("name", ["plan", "edits", "retrieval"])
def test_damaged_json_files(tmp_path, name):
    _, refused = fuzz(name, tmp_path, None, [damage_bytes, damage_json])
    assert refused > FILES // 2


def test_damaged_tensors_of_edits(tmp_path):
    loaded, _ = fuzz("edits", tmp_path, "a.safetensors", [damage_bytes, damage_header])
    assert loaded < FILES // 20  # the digest in the JSON file tells damage that leaves valid safetensors


def test_every_file_given_to_every_other_reader(tmp_path):
    for name, (save, _, file_name) in READERS.items():
        path = tmp_path / name / file_name
        save(path)
        for other, (other_save, load, _) in READERS.items():
            if other_save is not save:
                with pytest.raises(ArtifactError, match="a\\."):
                    load(path)
                assert not read_or_refuse(load, path), (name, other)


@pytest.mark.parametrize("name", sorted(READERS))
def test_empty_huge_and_missing_files(tmp_path, name):
    _, load, file_name = READERS[name]
    path = tmp_path / file_name
    assert not read_or_refuse(load, path)
    for data in (
        b"",
        b"\0" * 8,
        b"\xff" * 64,
        b"{}",
        b"[[",
        (2**40).to_bytes(8, "little") + b"{}",
        b"\x02" + b"\0" * 7 + b"{}",
    ):
        path.write_bytes(data)
        assert not read_or_refuse(load, path)
    with open(path, "wb") as file:
        file.truncate(storage.MAX_TENSOR_BYTES + 1)  # sparse: takes no room
    assert not read_or_refuse(load, path)
    path.unlink()
    path.mkdir()
    assert not read_or_refuse(load, path)
