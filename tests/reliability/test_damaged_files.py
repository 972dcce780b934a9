"""Damaged files: every reader gives a value or an error of headwise, soon, and of a line that can be read.

`python benchmarks/reliability.py` does the same with more than 10 000 files.
"""

import pytest
from fuzz import fuzz, whole
from readers import READERS

from headwise.errors import ArtifactError

FILES = 60
QUICK_S, FLAT_MB = 20, 600


def named(name):
    """One of the readers, skipped with the reason where it needs an extra that is not installed."""
    why = READERS[name].missing
    return pytest.param(name, marks=pytest.mark.skip(reason=why)) if why else name


@pytest.mark.parametrize("name", map(named, READERS))
def test_damaged_files_are_read_or_refused(tmp_path, name):
    found = fuzz(name, tmp_path, FILES)
    assert not found.wrong
    assert found.files >= 5 and found.slowest_s < QUICK_S and found.memory_mb < FLAT_MB


@pytest.mark.parametrize("name", map(named, READERS))
def test_other_things_in_the_place_of_a_file_are_refused(tmp_path, name):
    found = whole(name, tmp_path)
    assert not found.wrong
    assert found.files >= 18 and found.slowest_s < QUICK_S and found.memory_mb < FLAT_MB


def test_most_damage_is_noticed(tmp_path):
    """A table whose readers read everything would prove nothing."""
    for name in ("plan", "edits", "scores"):
        assert fuzz(name, tmp_path / name, 200).refused > 100


def test_damage_in_the_tensors_of_edits_is_noticed_always(tmp_path):
    """The digest in the JSON file tells damage that leaves valid safetensors."""
    found = fuzz("task embedding", tmp_path, 200)
    assert found.read < 10


ARTIFACTS = (
    "set",
    "scores",
    "plan",
    "edits",
    "expert edits",
    "VHR",
    "VAR",
    "residual vector",
    "step time",
    "influence profile",
)


def test_every_artifact_given_to_every_other_reader(tmp_path):
    for name in ARTIFACTS:
        for other in ARTIFACTS:
            folder = tmp_path / name / other
            folder.mkdir(parents=True)
            READERS[name].save(folder)
            mine, theirs = READERS[name].files[0], READERS[other].files[0]
            if mine != theirs:
                (folder / mine).rename(folder / theirs)
            if name != other:
                with pytest.raises(ArtifactError, match="a\\."):
                    READERS[other].load(folder)
            else:
                READERS[other].load(folder)
