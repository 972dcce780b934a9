"""Files: what is written reads back, and whatever is wrong with one is an ArtifactError that names it."""

import json
import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from headwise import storage
from headwise.errors import ArtifactError

PLAIN = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**60), 2**60)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)
TEXTS = st.dictionaries(st.text().filter(lambda key: key not in ("headwise", "schema")), PLAIN, max_size=4)


@settings(max_examples=25, deadline=None)
@given(payload=TEXTS)
def test_json_round_trip(tmp_path_factory, payload):
    path = tmp_path_factory.getbasetemp() / "round.json"
    storage.write_json(path, "demo", 1, payload)
    assert storage.read_json(path, "demo", 1) == payload
    assert json.loads(path.read_text())["headwise"] == "demo"  # any JSON reader can read it


def test_json_is_sorted_with_a_row_a_line(tmp_path):
    storage.write_json(tmp_path / "a.json", "demo", 1, {"z": [[1, 2], [3, 4]], "b": {"y": 1, "x": []}})
    expected = '{\n "b": {\n  "x": [],\n  "y": 1\n },\n "headwise": "demo",\n "schema": 1,\n "z": [\n  [1, 2],\n  [3, 4]\n ]\n}\n'
    assert (tmp_path / "a.json").read_text() == expected


@pytest.mark.parametrize("value", [float("nan"), float("inf"), {1: 2}, object(), torch.ones(1)])
def test_json_refuses_to_write_what_json_lacks(tmp_path, value):
    with pytest.raises(ArtifactError, match=r"a\.json"):
        storage.write_json(tmp_path / "a.json", "demo", 1, {"x": value})
    assert not os.listdir(tmp_path)


def test_tensors_round_trip_any_dtype_and_layout(tmp_path):
    tensors = {
        "a": torch.randn(3, 4, dtype=torch.bfloat16).T,
        "b": torch.arange(6).expand(2, 6),
        "empty": torch.zeros(0, 2),
        "grad": torch.ones(2, requires_grad=True),
    }
    path = tmp_path / "deep" / "er" / "t.safetensors"
    storage.write_tensors(path, "demo", 1, tensors, {"x": {"y": [1, None]}, "text": "é"})
    expect = {name: (tensor.dtype, tensor.ndim) for name, tensor in tensors.items()}
    found, meta = storage.read_tensors(path, "demo", 1, expect)
    assert meta == {"x": {"y": [1, None]}, "text": "é"}
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())


def test_same_tensors_give_the_same_bytes(tmp_path):
    paths = [tmp_path / f"{i}.safetensors" for i in range(5)]
    for path in paths:
        storage.write_tensors(path, "demo", 1, {"a": torch.ones(2), "b": torch.zeros(3)}, {str(i): i for i in range(9)})
    assert len({storage.digest(path) for path in paths}) == 1


def test_writing_leaves_no_half_file_and_keeps_the_old_one(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    storage.write_json(path, "demo", 1, {"x": 1})

    def full_disk(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full_disk)
    with pytest.raises(ArtifactError, match="No space left"):
        storage.write_json(path, "demo", 1, {"x": 2})
    assert os.listdir(tmp_path) == ["a.json"]
    assert storage.read_json(path, "demo", 1) == {"x": 1}


def test_written_files_are_readable_by_the_group_as_the_umask_says(tmp_path):
    old = os.umask(0o022)
    try:
        storage.write_tensors(tmp_path / "a", "demo", 1, {"a": torch.ones(1)}, {})
        storage.write_json(tmp_path / "b", "demo", 1, {})
    finally:
        os.umask(old)
    assert {(tmp_path / name).stat().st_mode & 0o777 for name in "ab"} == {0o644}


def both_readers(path):
    for read in (lambda: storage.read_json(path, "demo", 1), lambda: storage.read_tensors(path, "demo", 1, {})):
        with pytest.raises(ArtifactError) as caught:
            read()
        yield str(caught.value)


def test_missing_folder_and_impossible_paths(tmp_path):
    for path, reason in [
        (tmp_path / "no", "does not exist"),
        (tmp_path, "folder"),
        ("", "folder"),
        ("a\0b", ""),
        ("x" * 5000, ""),
    ]:
        for message in both_readers(path):
            assert reason in message
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file" / "a.json", tmp_path, "", "a\0b", "x" * 5000):
        with pytest.raises(ArtifactError, match="cannot be written"):
            storage.write_json(path, "demo", 1, {})


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "1",
        "null",
        '{"headwise": "demo", "schema": 1, "x": NaN}',
        '{"headwise": "demo", "schema": 1, "x": -Infinity}',
        '{"headwise": "demo", "schema": 1, "x": 1e999}',
        '{"headwise": "demo", "schema": 1, "x": 1, "x": 2}',
        '{"headwise": "demo", "schema": 1, "x": "\\ud800"}',
        '{"headwise": "demo", "schema": 1, "x": ' + "9" * 5000 + "}",
        "[" * 100_000,
        '{"a":' * 100_000,
        '{"headwise": "demo"}',
        '{"headwise": "demo", "schema": true}',
        '{"headwise": "demo", "schema": "1"}',
        '{"headwise": "demo", "schema": 0}',
        '{"headwise": ["demo"], "schema": 1}',
        '{"schema": 1}',
    ],
)
def test_bad_json(tmp_path, text):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(ArtifactError, match=r"a\.json") as caught:
        storage.read_json(tmp_path / "a.json", "demo", 1)
    assert len(str(caught.value)) < 1000


def test_json_that_is_not_utf8_or_too_large(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    path.write_bytes(b'{"headwise": "\xff"}')
    with pytest.raises(ArtifactError, match="utf-8"):
        storage.read_json(path, "demo", 1)
    with open(path, "wb") as file:
        file.truncate(storage.MAX_JSON_BYTES + 1)
    with pytest.raises(ArtifactError, match="more than"):
        storage.read_json(path, "demo", 1)
    with open(path, "wb") as file:
        file.truncate(storage.MAX_TENSOR_BYTES + 1)
    with pytest.raises(ArtifactError, match="more than"):
        storage.read_tensors(path, "demo", 1, {})


def test_kind_and_schema(tmp_path):
    storage.write_json(tmp_path / "a.json", "demo", 2, {})
    storage.write_tensors(tmp_path / "a.st", "demo", 2, {}, {})
    assert storage.read_json(tmp_path / "a.json", "demo", 3) == {}
    for kind, version, reason in [("other", 2, "'demo'"), ("demo", 1, "Update headwise")]:
        with pytest.raises(ArtifactError, match=reason):
            storage.read_json(tmp_path / "a.json", kind, version)
        with pytest.raises(ArtifactError, match=reason):
            storage.read_tensors(tmp_path / "a.st", kind, version, {})


def test_tensor_files_of_others(tmp_path):
    save_file({"x": torch.ones(1)}, tmp_path / "a.st")
    with pytest.raises(ArtifactError, match="no headwise file"):
        storage.read_tensors(tmp_path / "a.st", "demo", 1, {"x": (torch.float32, 1)})
    assert not storage.holds_kind(tmp_path / "a.st", "demo")
    assert not storage.holds_kind(tmp_path / "absent", "demo")


@pytest.mark.parametrize(
    ("expect", "reason"),
    [
        ({"x": (torch.float64, 2)}, "torch.float32"),
        ({"x": (torch.float32, 1)}, "shape"),
        ({"y": (torch.float32, 2)}, "'y'"),
        ({}, "'x'"),
        ({"x": (torch.float32, 2), "y": (torch.float32, 2)}, "'y'"),
    ],
)
def test_wrong_dtype_dimensions_and_names(tmp_path, expect, reason):
    storage.write_tensors(tmp_path / "a.st", "demo", 1, {"x": torch.ones(2, 2)}, {})
    with pytest.raises(ArtifactError, match=reason):
        storage.read_tensors(tmp_path / "a.st", "demo", 1, expect)
    assert storage.read_tensors(tmp_path / "a.st", "demo", 1, {"x": (None, 2)})[0]["x"].sum() == 4


def test_tensors_and_meta_that_cannot_be_written(tmp_path):
    for meta in ({"x": float("nan")}, {"x": object()}):
        with pytest.raises(ArtifactError, match="cannot be written"):
            storage.write_tensors(tmp_path / "a.st", "demo", 1, {}, meta)
    assert not os.listdir(tmp_path)


def test_field_is_strict_about_types():
    assert storage.field({"x": 1}, "x", float) == 1.0
    for payload, kind in [({"x": True}, int), ({"x": 1.0}, int), ({}, str), ({"x": 2**60}, float), ({"x": None}, dict)]:
        with pytest.raises(ArtifactError, match="'x'"):
            storage.field(payload, "x", kind)
