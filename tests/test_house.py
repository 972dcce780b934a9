"""The house itself: import direction, generated tables, packaging, the command for a fresh machine, and the test set-up."""

import importlib.util
import pkgutil
import re
import socket
import tomllib
from pathlib import Path

import pytest
import torch

import headwise
from distributed_helper import RankError, run_distributed

HOME = Path(__file__).parents[1]
OPTIONAL = {"triton", "timm", "diffusers", "plotly", "gguf", "PIL", "torchvision", "dash", "waitress"}


def load_tool(name: str):
    spec = importlib.util.spec_from_file_location(name, HOME / "tools" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def modules() -> list[str]:
    walked = pkgutil.walk_packages(headwise.__path__, "headwise.", onerror=lambda name: None)
    return sorted(m.name for m in walked if not m.name.endswith("__main__"))


@pytest.mark.parametrize("name", modules())
def test_every_module_imports(name):
    try:
        importlib.import_module(name)
    except ImportError as error:
        if (error.name or "").split(".")[0] not in OPTIONAL:
            raise
        pytest.skip(f"needs {error.name}, an optional package")


# import direction


def test_imports_of_the_package_go_one_way():
    assert list(load_tool("check_imports").violations(HOME / "src" / "headwise")) == []


@pytest.mark.parametrize(
    "path, text, problem",
    [
        ("units.py", "from headwise.attach import attach", "attach is above units"),
        ("attach/x.py", "def f():\n    from ..score import retrieval", "score is above attach"),
        ("attach/x.py", "import headwise", "headwise is above attach"),
        ("score/a.py", "from headwise.score.b import f", "a method file knows no other method"),
        ("score/a.py", "from .b import f", "a method file knows no other method"),
        ("score/a.py", "from headwise import route", "a method file knows no other method"),
        ("budget/a.py", "import headwise.score.b", "a method file knows no other method"),
        ("score/_help.py", "from headwise.score.a import f", "a method file knows no other method"),
        ("strange.py", "", "is in no layer"),
        ("units.py", "from headwise import __version__", "headwise is above units"),
    ],
)
def test_the_import_check_sees(tmp_path, path, text, problem):
    found = list(load_tool("check_imports").violations(_package(tmp_path, path, text)))
    assert len(found) == 1
    assert problem in found[0]


@pytest.mark.parametrize(
    "path, text",
    [
        ("attach/x.py", "from ..units import HeadSet\nfrom .y import z\nfrom headwise.cache import C\nimport torch"),
        (
            "score/a.py",
            "from headwise.score._help import f\nfrom headwise.budget._pack import g\nfrom ..attach import attach",
        ),
        ("score/__init__.py", "from headwise.score.a import f\nfrom headwise import registry"),
        ("scale/serving/sim.py", "from headwise.scale.serving.cost import c"),
        ("papers/moh.py", "import headwise\nfrom headwise.route import moh"),
        ("cli/run.py", "from headwise.report import demo\nfrom headwise import registry"),
        ("__init__.py", "from headwise.papers import rows"),
    ],
)
def test_the_import_check_allows(tmp_path, path, text):
    assert list(load_tool("check_imports").violations(_package(tmp_path, path, text))) == []


def _package(root: Path, path: str, text: str) -> Path:
    file = root / "headwise" / path
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
    return root / "headwise"


# packaging


def test_the_project_never_builds_with_torch_and_names_no_host():
    project = tomllib.loads((HOME / "pyproject.toml").read_text())
    assert project["build-system"]["requires"] == ["setuptools>=77"]
    for name in ("pyproject.toml", "Makefile", "constraints.txt", ".ci/run"):
        text = (HOME / name).read_text()
        assert not re.search(r"https?://|/root/|/home/|index-url|find-links", text), name


def test_constraints_pin_every_dependency_without_local_builds():
    lines = [line for line in (HOME / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][0-9a-z.]*", line) for line in lines)
    pinned = {re.sub(r"[-_.]+", "-", line.split("==")[0]).lower() for line in lines}
    project = tomllib.loads((HOME / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    wanted = [*project["dependencies"], *extras["demo"], *extras["report"], *extras["view"], *extras["dev"]]
    assert {re.split(r"[<>=;\[ ]", w)[0].lower() for w in wanted} <= pinned


def test_the_licence_is_apache_2():
    assert "Apache License\n                           Version 2.0" in (HOME / "LICENSE").read_text()


# generated tables


def test_the_papers_table_is_up_to_date(capsys):
    assert load_tool("papers_table").main(["--check"]) == 0, capsys.readouterr().out


def test_the_readme_names_only_commands_and_options_that_exist():
    from typer.main import get_command

    from headwise.cli import app

    text = re.sub(r"\\\n\s*", " ", (HOME / "README.md").read_text())
    lines = [line.split("#")[0].split() for line in re.findall(r"^headwise (.+)$", text, re.MULTILINE)]
    assert lines
    root = get_command(app)
    for words in lines:
        command, rest = root, list(words)
        while hasattr(command, "list_commands") and rest:
            name = rest.pop(0)
            command = command.get_command(None, name)
            assert command is not None, f"headwise {' '.join(words)}: no command {name}"
        known = {flag for p in command.params for flag in (*p.opts, *p.secondary_opts)}
        assert {w for w in rest if w.startswith("-")} <= known, " ".join(words)


# the test set-up


def test_fresh_memory_is_nan():
    fresh = [
        torch.empty(3),
        torch.empty_like(torch.ones(2, 2)),
        torch.ones(1).new_empty(4),
        torch.empty(2, dtype=torch.half),
    ]
    assert all(tensor.isnan().all() for tensor in fresh)
    assert not torch.empty(3, dtype=torch.int64).is_floating_point()
    assert torch.empty(3, requires_grad=True).requires_grad


def test_the_network_is_out_of_reach():
    with socket.socket() as outside, pytest.raises(RuntimeError, match="tests run without a network"):
        outside.connect(("192.0.2.1", 80))


def test_one_thread_only():
    assert torch.get_num_threads() == 1


def _sum_ranks(rank: int, world_size: int, expected: int) -> None:
    total = torch.tensor(rank)
    torch.distributed.all_reduce(total)
    assert int(total) == expected


def _rank_one_breaks(rank: int, world_size: int) -> None:
    if rank == 1:
        raise KeyError("broken on purpose")
    torch.distributed.barrier()


@pytest.mark.distributed
def test_ranks_run_and_talk():
    run_distributed(_sum_ranks, 3, 3)


@pytest.mark.distributed
def test_an_error_of_a_rank_is_raised_with_its_number():
    with pytest.raises(RankError, match="rank 1: (.|\n)*broken on purpose"):
        run_distributed(_rank_one_breaks)
